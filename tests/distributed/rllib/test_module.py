"""RLlib's module is the policy: step by step, chunk by chunk and at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ray.rllib.core.columns import Columns

from builders import make_policy, make_spec
from ssm_metarl.algorithms.numpy_policy import NumpyPolicy
from ssm_metarl.algorithms.policy import SSMPolicy, logits_of
from ssm_metarl.distributed.rllib.module import SSMModule, state_name

SPECS = {
    "continuous": make_spec(num_layers=2),
    "discrete": make_spec(discrete=True, gated=True, action_size=3),
    "normalised": make_spec(normalize_observations=True, scale_rewards=True),
    "observation": make_spec(inputs="observation", discrete=True),
    "memory slots": make_spec(num_layers=2, memory_slots=3),
    "separate critic": make_spec(num_layers=2, memory_slots=3, separate_critic=True),
    "memoryless": make_spec(num_layers=0),
    "several integers": make_spec(discrete=True, action_size=6, action_heads=(2, 4)),
}


def module_of(policy: SSMPolicy) -> SSMModule:
    spec = {"spec": policy.spec.to_dict(), "max_seq_len": 50}
    module = SSMModule(observation_space=None, action_space=None, inference_only=False, model_config=spec)
    module.set_state(policy.numpy_weights())
    return module


def normalised(policy: SSMPolicy) -> SSMPolicy:
    """With a normaliser that does something."""
    for name, buffer in policy.named_buffers():
        buffer += torch.rand(buffer.shape, generator=torch.Generator().manual_seed(len(name)))
    return policy


def states(module: SSMModule, num_episodes: int) -> dict[str, Any]:
    """What RLlib puts in a batch at the first step of `num_episodes` episodes."""
    initial = module.get_initial_state()
    return {Columns.STATE_IN: {name: value.expand(num_episodes, *value.shape) for name, value in initial.items()}}


@pytest.mark.parametrize("form", SPECS)
def test_step_by_step_chunk_by_chunk_and_at_once_the_module_is_the_policy(form: str) -> None:
    policy = normalised(make_policy(SPECS[form]))
    module, num_episodes, steps = module_of(policy), 5, 23
    inputs = torch.randn(num_episodes, steps, policy.spec.input_size, generator=torch.Generator().manual_seed(0))
    expected = policy(inputs.transpose(0, 1))
    values = expected.values.T * policy.reward_scaling
    if policy.spec.discrete:
        logits = logits_of(expected.actions, policy.spec).transpose(0, 1)
    else:
        normal = expected.actions.base_dist
        logits = torch.cat([normal.loc, normal.scale.log()], -1).transpose(0, 1)
    acting = NumpyPolicy(policy.spec, policy.numpy_weights())
    for size in (1, 4, steps):
        batch = states(module, num_episodes)
        state = acting.initial_state(1, num_episodes)
        for begin in range(0, steps, size):
            part = inputs[:, begin : begin + size]
            obs = part if module.is_stateful() else part.flatten(0, 1)
            found = module.forward_exploration({Columns.OBS: obs, **batch})
            dist = found[Columns.ACTION_DIST_INPUTS].reshape(num_episodes, -1, logits.shape[-1])
            torch.testing.assert_close(dist, logits[:, begin : begin + size], atol=1e-5, rtol=1e-5)
            batch = {Columns.STATE_IN: found.get(Columns.STATE_OUT, {})}
            for i in range(part.shape[1]):
                head, state = acting.head(part[None, :, i].numpy(), state)
            mean = dist[:, -1] if policy.spec.discrete else dist[:, -1, : policy.spec.action_size]
            if policy.spec.discrete:
                parts = np.split(head, np.cumsum(policy.spec.heads)[:-1], -1)
                head = np.concatenate([part - np.log(np.exp(part).sum(-1, keepdims=True)) for part in parts], -1)
            np.testing.assert_allclose(mean.detach(), head[0], atol=1e-5, rtol=1e-5)
    if module.is_stateful():
        train = {Columns.OBS: inputs, **states(module, num_episodes)}
        torch.testing.assert_close(module.compute_values(train), values, atol=1e-5, rtol=1e-5)
        for i, after in enumerate(expected.state):
            torch.testing.assert_close(batch[Columns.STATE_IN][state_name(i)], after, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("form", "padding"), [("discrete", torch.nan), ("memory slots", -1e6)])
def test_padding_changes_nothing(form: str, padding: float) -> None:
    """Nor what is not finite, but in a memory's products of matrices."""
    module = module_of(make_policy(SPECS[form]))
    lengths = torch.tensor([3, 7, 1])
    inputs = torch.randn(3, 7, module.ssm.spec.input_size)
    padded = torch.cat([inputs, torch.full((3, 5, inputs.shape[-1]), 1e6)], 1)
    for row, length in enumerate(lengths):
        padded[row, length:] = padding if row else 0.0
    found = module.forward_train({Columns.OBS: padded, Columns.SEQ_LENS: lengths, **states(module, 3)})
    for row, length in enumerate(lengths):
        alone = module.forward_train({Columns.OBS: inputs[row : row + 1, :length], **states(module, 1)})
        for name in (Columns.ACTION_DIST_INPUTS, Columns.EMBEDDINGS):
            assert found[name].shape[:2] == (3, 12)
            torch.testing.assert_close(found[name][row, :length], alone[name][0], atol=1e-6, rtol=1e-6)


def test_a_density_that_overflows_in_the_padding_leaves_gradients_finite() -> None:
    """RLlib takes the ratio of padded steps, too, before it leaves them out: 30 actions of deviation .02."""
    module = module_of(SSMPolicy(make_spec(action_size=30, initial_std=0.02)))
    batch = {Columns.OBS: torch.zeros(2, 5, module.ssm.spec.input_size), Columns.SEQ_LENS: torch.tensor([5, 2])}
    logits = module.forward_train({**batch, **states(module, 2)})[Columns.ACTION_DIST_INPUTS]
    mean, log_std = logits.chunk(2, -1)
    taken = torch.arange(5) < torch.tensor([[5], [2]])
    actions = torch.where(taken[..., None], mean.detach() + 0.02, 0.0)
    log_probs = torch.distributions.Normal(mean, log_std.exp()).log_prob(actions).sum(-1)
    ratio = torch.exp(log_probs - torch.where(taken, log_probs, 0.0).detach())
    ratio[taken].mean().backward()
    gradients = [parameter.grad for parameter in module.ssm.parameters() if parameter.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("heads", [(2, 4), (3, 3)])
def test_rllibs_distribution_of_several_integers_is_the_policys(heads: tuple[int, ...]) -> None:
    policy = make_policy(make_spec(discrete=True, action_size=6, action_heads=heads))
    module, inputs = module_of(policy), torch.randn(3, 5, policy.spec.input_size)
    logits = module.forward_train({Columns.OBS: inputs, **states(module, 3)})[Columns.ACTION_DIST_INPUTS]
    dist = module.get_train_action_dist_cls().from_logits(logits)
    actions = dist.sample()
    own = policy(inputs.transpose(0, 1)).actions
    torch.testing.assert_close(dist.logp(actions), own.log_prob(actions.transpose(0, 1)).T, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dist.entropy(), own.entropy().T, atol=1e-5, rtol=1e-5)
