"""The critic: bootstrapping, baselines, what it learns, and what it is told of the task."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch.func import functional_call

from builders import make_policy, make_spec, recorded, seeds, tensors, toy_rollouts, uneven
from ssm_metarl.algorithms.adapters import StandardAdapter
from ssm_metarl.algorithms.inner_loop import batch_for, for_tasks
from ssm_metarl.algorithms.inputs import critic_inputs
from ssm_metarl.algorithms.objective import meta_loss
from ssm_metarl.algorithms.registry import MetaConfig
from ssm_metarl.algorithms.returns import advantages, discounted_returns, normalized, step_means

# --- The critic -------------------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_the_critic_bootstraps_where_a_slot_was_cut(seed: int) -> None:
    """Against the sum written out, with values of the step-by-step policy."""
    policy, weights, record = recorded(seed % 1000)
    discount, gae_lambda = 0.9, 0.7
    inputs, resets = critic_inputs(policy.spec, record)
    parameters = {name: torch.from_numpy(value) for name, value in weights.items()}
    with torch.no_grad():
        values = functional_call(
            policy, parameters, (torch.from_numpy(inputs), torch.from_numpy(resets))
        ).values.numpy()
    found, expected = advantages(record, discount, gae_lambda, "critic", values)
    for task, slot in np.ndindex(3, 2):
        length = int(record.lengths()[task, slot])
        value = values[task, : length + 1, slot].astype(float)
        if record.terminated[task, :, slot].any():
            value[length] = 0.0
        delta = record.rewards[task, :length, slot] + discount * value[1:] - value[:-1]
        for t in range(length):
            powers = (discount * gae_lambda) ** np.arange(length - t)
            assert found[task, t, slot] == pytest.approx((powers * delta[t:]).sum(), abs=1e-4)
        assert not found[task, length:, slot].any()
        np.testing.assert_allclose(expected[task, :length, slot], value[:length], atol=1e-6)


def test_scaled_rewards_scale_advantages() -> None:
    _, _, record = recorded(0)
    values = np.zeros((*record.rewards.shape[:1], record.rewards.shape[1] + 1, 2))
    plain = advantages(record, 0.9, 0.8, "critic", values)[0]
    scaled = advantages(record, 0.9, 0.8, "critic", values, 4.0)[0]
    np.testing.assert_allclose(scaled, plain / 4, atol=1e-6)


def test_the_time_baseline_is_the_mean_of_a_step_over_all() -> None:
    _, _, record = recorded(1)
    returns = discounted_returns(record.rewards, record.valid, 0.9)
    means = step_means(np.where(record.valid, returns, np.nan), record.valid)
    _, found = advantages(record, 0.9, 0.8, "time")
    for t in range(record.valid.shape[1]):
        here = record.valid[:, t]
        np.testing.assert_allclose(means[0, t, 0], returns[:, t][here].mean())
        assert (found[:, t][here] == means[0, t, 0]).all()
        assert not found[:, t][~here].any()


def test_the_value_head_learns_what_the_critic_should_have_said() -> None:
    policy, _, _ = recorded(0)
    weights = policy.numpy_weights()
    record = toy_rollouts(policy.spec, weights, uneven(3, 2, 9), 2, 9)
    config = MetaConfig(algorithm="rl2", baseline="critic", inner_steps=0, value_weight=1.0)
    batch = batch_for(policy, weights, record, config)
    parameters = tensors(weights)
    loss = meta_loss(policy, parameters, [batch], config).losses.sum()
    # At the policy that acted the ratio is 1, so that all of this gradient is the squared error's.
    (gradient,) = torch.autograd.grad(loss, parameters["value.bias"])
    values = functional_call(policy, parameters, (batch.inputs, batch.resets)).values
    assert batch.targets is not None
    expected = (2 * (values - batch.targets) * batch.share).sum()
    torch.testing.assert_close(gradient[0], expected.detach(), rtol=1e-4, atol=1e-5)


# --- The critic that is told the task ---------------------------------------------------------------------


@pytest.mark.parametrize("own", [False, True])
def test_what_is_known_moves_values_and_no_action(own: bool) -> None:
    """V = hidden w + v + C · tanh(hidden W + known U + b), with shared weights and with weights a task."""
    spec = make_spec(task_size=4, discrete=True)
    policy = make_policy(spec)
    policy.task_mean += 0.5
    policy.task_scale *= 2.0
    weights = {name: value.astype(np.float64) for name, value in policy.numpy_weights().items()}
    parameters = {name: torch.tensor(value) for name, value in weights.items()}
    if own:
        parameters = for_tasks(parameters, 3)
    rng = np.random.default_rng(0)
    inputs, known = torch.tensor(rng.normal(size=(3, 7, 2, spec.input_size))), rng.normal(size=(3, 4))
    told = functional_call(policy.double(), parameters, (inputs, None, None, torch.tensor(known)))
    untold = functional_call(policy, parameters, (inputs,))
    torch.testing.assert_close(told.actions.logits, untold.actions.logits, rtol=0, atol=0)
    hidden = torch.tanh(inputs @ policy.encoder.weight + policy.encoder.bias)
    hidden, _ = policy.blocks[0](hidden)
    for output, read in ((told, (known - 0.5) / 2.0), (untold, np.zeros((3, 4)))):
        inner = hidden.detach().numpy() @ weights["critic.weight"] + weights["critic.bias"]
        inner = inner + (read @ weights["critic.task"])[:, None, None]
        expected = hidden.detach().numpy() @ weights["value.weight"] + weights["value.bias"]
        expected = expected + np.tanh(inner) @ weights["critic.out"]
        np.testing.assert_allclose(output.values.detach().numpy(), expected[..., 0], atol=1e-9)


def test_nobody_needs_to_know_the_task_to_adapt() -> None:
    """The inner step, in training and at test time, is that of the linear baseline."""
    spec = make_spec(discrete=True, task_size=2)
    policy = make_policy(spec)
    weights = policy.numpy_weights()
    tasks = [{**task, "best": i % 2} for i, task in enumerate(uneven(3, 2, 9))]
    record = toy_rollouts(spec, weights, tasks, 2, 9)
    record = replace(record, tasks=tuple({"goal": [0.1 * i, 1.0]} for i in range(3)))
    privileged, linear = (MetaConfig(algorithm="rl2", baseline=baseline) for baseline in ("privileged", "linear"))
    batch, plain = (batch_for(policy, weights, record, config) for config in (privileged, linear))
    torch.testing.assert_close(batch.advantages, plain.advantages, rtol=0, atol=0)
    assert batch.task_features is not None
    assert batch.targets is not None
    assert (batch.outer_advantages != plain.outer_advantages).any()
    # At test time there may be nothing to be told.
    foreign = replace(record, tasks=("whatever",) * 3)
    adapted = StandardAdapter(policy, privileged, steps=1).adapt(lambda *_: foreign, 2)
    expected = StandardAdapter(policy, linear, steps=1).adapt(lambda *_: record, 2)
    for name, value in expected.weights.items():
        np.testing.assert_array_equal(adapted.weights[name], value, err_msg=name)


def test_the_critic_bootstraps_on_what_it_is_told() -> None:
    """GAE of the privileged values, whose targets the meta-loss then holds them to."""
    spec = make_spec(discrete=True, task_size=1)
    policy = make_policy(spec)
    weights = policy.numpy_weights()
    record = toy_rollouts(spec, weights, uneven(3, 2, 9), 2, 9)
    record = replace(record, tasks=tuple({"mass": float(i)} for i in range(3)))
    config = MetaConfig(algorithm="rl2", inner_steps=0, baseline="privileged", value_weight=1.0)
    batch = batch_for(policy, weights, record, config)
    inputs, resets = (torch.from_numpy(array) for array in critic_inputs(spec, record))
    known = torch.tensor([[0.0], [1.0], [2.0]])
    values = policy(inputs, resets, None, known).values.detach().numpy()
    # What it says is meant beyond the mean return of the time step, which is 0 after the last.
    returns = discounted_returns(record.rewards, record.valid, config.discount)
    level = np.zeros_like(values)
    for t in range(values.shape[1] - 1):
        if (here := record.valid[:, t]).any():
            level[:, t] = returns[:, t][here].mean()
    raw, expected = advantages(record, config.discount, config.gae_lambda, "privileged", values + level)
    np.testing.assert_allclose(batch.targets, raw + expected - level[:, :-1], atol=1e-5)
    np.testing.assert_allclose(batch.outer_advantages, normalized(raw, record.valid, (0, 1, 2)), atol=1e-5)
    parameters = tensors(weights)
    (gradient,) = torch.autograd.grad(
        meta_loss(policy, parameters, [batch], config).losses.sum(), parameters["value.bias"]
    )
    error = 2 * (torch.from_numpy(values[:, :-1]) - batch.targets) * batch.share
    torch.testing.assert_close(gradient[0], error.sum(), rtol=1e-4, atol=1e-5)


# --- Options of the critic --------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [0, 3])
def test_a_separate_critic_and_the_policy_have_nothing_in_common(slots: int) -> None:
    policy = make_policy(make_spec(separate_critic=True, num_layers=2, memory_slots=slots))
    inputs = torch.randn((2, 7, 3, policy.spec.input_size), generator=torch.Generator().manual_seed(0))
    output = policy(inputs)
    parameters = dict(policy.named_parameters())
    for part, said in (("policy", output.actions.mean), ("critic", output.values)):
        gradients = torch.autograd.grad(said.sum(), list(parameters.values()), allow_unused=True, retain_graph=True)
        read = {name for name, each in zip(parameters, gradients, strict=True) if each is not None}
        critics = {name for name in parameters if name.startswith(("tower.", "value."))}
        assert read == (critics if part == "critic" else set(parameters) - critics - {"policy.log_std"})


def test_a_separate_critic_keeps_a_state_of_its_own() -> None:
    """Step by step as over the whole sequence."""
    policy = make_policy(make_spec(separate_critic=True, num_layers=2, memory_slots=3))
    inputs = torch.randn((2, 7, 3, policy.spec.input_size), generator=torch.Generator().manual_seed(0))
    whole, state = policy(inputs), policy.initial_state(2, 3)
    for t in range(7):
        step = policy(inputs[:, t : t + 1], None, state)
        state = step.state
        torch.testing.assert_close(step.values[:, 0], whole.values[:, t], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(step.actions.mean[:, 0], whole.actions.mean[:, t], rtol=1e-4, atol=1e-5)
    assert len(state) == len(whole.state) == 8


@pytest.mark.parametrize(("loss", "most"), [("squared", np.inf), ("huber", 1.0)])
def test_the_gradient_of_an_error_is_bounded_by_hubers_loss(loss: str, most: float) -> None:
    policy, _, _ = recorded(0)
    weights = policy.numpy_weights()
    record = toy_rollouts(policy.spec, weights, uneven(3, 2, 9), 2, 9)
    record = replace(record, rewards=record.rewards * 10)
    config = MetaConfig(algorithm="rl2", baseline="critic", inner_steps=0, value_weight=0.7, value_loss=loss)  # type: ignore[arg-type]
    batch = batch_for(policy, weights, record, config)
    parameters = tensors(weights)
    gradient = torch.autograd.grad(
        meta_loss(policy, parameters, [batch], config).losses.sum(), parameters["value.bias"]
    )[0]
    assert batch.targets is not None
    error = functional_call(policy, parameters, (batch.inputs, batch.resets)).values - batch.targets
    assert (error.abs() > 1).any()
    assert (error.abs() < 1).any()
    expected = (2 * 0.7 * error.clamp(-most, most) * batch.share).sum()
    torch.testing.assert_close(gradient[0], expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("baseline", ["linear", "time", "critic"])
def test_advantages_can_keep_their_unit(baseline: str) -> None:
    """Ten times the reward gives ten times the advantage in the outer loss; inner steps stay as they are."""
    policy, weights, record = recorded(0)
    options = {"algorithm": "promp", "baseline": baseline, "gae_lambda": 0.9}
    plain, raw = (MetaConfig(**options, normalize_advantages=flag) for flag in (True, False))  # type: ignore[arg-type]
    batch, usual = (batch_for(policy, weights, record, config) for config in (raw, plain))
    values = None
    if baseline == "critic":
        inputs, resets = (torch.from_numpy(array) for array in critic_inputs(policy.spec, record))
        values = functional_call(policy, tensors(weights), (inputs, resets)).values.detach().numpy()
    expected, _ = advantages(record, 0.99, 0.9, baseline, values)
    np.testing.assert_allclose(batch.outer_advantages, expected, atol=1e-5)
    torch.testing.assert_close(batch.advantages, usual.advantages, rtol=0, atol=0)
