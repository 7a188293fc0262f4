"""The policy in torch: sequence against steps, resets, per-task parameters, heads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call

from builders import make_policy, make_spec, seeds, specs, task_weights, tensors
from ssm_metarl.algorithms.policy import SSMPolicy

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def draw(seed: int, *shape: int) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def heads(output: Any) -> list[Any]:
    """All that an output says, as tensors."""
    actions = output.actions
    said = [actions.logits] if hasattr(actions, "logits") else [actions.base_dist.loc, actions.base_dist.scale]
    return [*said, output.values, *output.state]


@settings(max_examples=40)
@given(
    spec=specs(),
    seed=seeds,
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    per_task=st.booleans(),
)
def test_sequence_splits_and_steps_agree(spec: Any, seed: int, lengths: Any, density: float, per_task: bool) -> None:
    tasks, steps, num_episodes = 2, sum(lengths), 3
    policy = make_policy(spec, seed)
    parameters = tensors(task_weights(spec, tasks, seed) if per_task else policy.numpy_weights())
    inputs = draw(seed, tasks, steps, num_episodes, spec.input_size)
    resets = torch.rand(tasks, steps, num_episodes, generator=torch.Generator().manual_seed(seed)) < density
    start = [draw(seed + i, *state.shape).abs() for i, state in enumerate(policy.initial_state(tasks, num_episodes))]

    def run(*arguments: Any) -> Any:
        return functional_call(policy, parameters, arguments)

    *whole, values = heads(run(inputs, resets, start))[: -len(start) or None]
    end = run(inputs, resets, start).state
    stepped: list[Any] = []
    state = start
    for t in range(steps):
        state = [torch.where(resets[:, t, :, None, None], 0.0, h) for h in state]
        output = run(inputs[:, t : t + 1], None, state)
        state = output.state
        stepped.append(heads(output)[: -len(start) or None])
    pieces: list[Any] = []
    carried = start
    for part, reset in zip(inputs.split(lengths, 1), resets.split(lengths, 1), strict=True):
        output = run(part, reset, carried)
        carried = output.state
        pieces.append(heads(output)[: -len(start) or None])
    for i, expected in enumerate([*whole, values]):
        torch.testing.assert_close(torch.cat([step[i] for step in stepped], 1), expected, **CLOSE)
        torch.testing.assert_close(torch.cat([piece[i] for piece in pieces], 1), expected, **CLOSE)
    for i, expected in enumerate(end):
        torch.testing.assert_close(state[i], expected, **CLOSE)
        torch.testing.assert_close(carried[i], expected, **CLOSE)


@settings(max_examples=20)
@given(spec=specs(), seed=seeds, at=st.integers(0, 4))
def test_a_reset_is_a_new_start(spec: Any, seed: int, at: int) -> None:
    policy, inputs = make_policy(spec, seed), draw(seed, 5, 2, spec.input_size)
    resets = torch.zeros(5, 2, dtype=torch.bool)
    resets[at] = True
    for ours, fresh in zip(heads(policy(inputs, resets)), heads(policy(inputs[at:])), strict=True):
        torch.testing.assert_close(ours[at:] if ours.shape[0] == 5 else ours, fresh, **CLOSE)


@settings(max_examples=20)
@given(spec=specs(), seed=seeds)
def test_parameters_of_each_task_equal_a_loop_over_tasks(spec: Any, seed: int) -> None:
    """Values and gradients."""
    tasks = 3
    policy, parameters = make_policy(spec, seed), tensors(task_weights(spec, tasks, seed))
    inputs, resets = draw(seed, tasks, 4, 2, spec.input_size), draw(seed, tasks, 4, 2) > 1
    known = draw(seed, tasks, spec.task_size) if spec.task_size else [None] * tasks
    together = functional_call(policy, parameters, (inputs, resets, None, known if spec.task_size else None))

    def gradients(output: Any, of: Any) -> Any:
        loss = sum(head.square().sum() for head in heads(output))
        return torch.autograd.grad(loss, list(of.values()), allow_unused=True)

    batched = gradients(together, parameters)
    for task in range(tasks):
        own = {name: value[task] for name, value in parameters.items()}
        alone = functional_call(policy, own, (inputs[task], resets[task], None, known[task]))
        for ours, theirs in zip(heads(together), heads(alone), strict=True):
            torch.testing.assert_close(ours[task], theirs, **CLOSE)
        for ours, theirs in zip(batched, gradients(alone, own), strict=True):
            torch.testing.assert_close(ours[task], theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("gated", [False, True])
def test_slots_are_apart(gated: bool) -> None:
    policy, inputs = make_policy(make_spec(num_layers=2, gated=gated)), draw(0, 6, 3, 7)
    clean = policy(inputs)
    inputs[2:, 1] = float("nan")
    for before, after in zip(heads(clean), heads(policy(inputs)), strict=True):
        num_episodes = 1 if before.shape[0] == 6 else 0
        others = torch.tensor([0, 2])
        torch.testing.assert_close(after.index_select(num_episodes, others), before.index_select(num_episodes, others))


@pytest.mark.parametrize("num_layers", [0, 1, 3])
def test_memory_is_what_the_layers_give(num_layers: int) -> None:
    policy, inputs = make_policy(make_spec(num_layers=num_layers)), draw(0, 5, 1, 7)
    changed = inputs.clone()
    changed[0] += 1.0
    (one, *_), (other, *_) = heads(policy(inputs)), heads(policy(changed))
    assert torch.equal(one[1:], other[1:]) == (num_layers == 0)
    assert not torch.equal(one[0], other[0])


def test_starts_near_the_uniform_or_the_zero_mean_policy() -> None:
    inputs = draw(0, 20, 5, 7)
    discrete, gaussian = (SSMPolicy(make_spec(discrete=d, initial_std=0.7))(inputs).actions for d in (True, False))
    torch.testing.assert_close(discrete.probs, torch.full((20, 5, 2), 0.5), rtol=0.0, atol=0.05)
    assert gaussian.mean.abs().max() < 0.2
    torch.testing.assert_close(gaussian.stddev, torch.full((20, 5, 2), 0.7))


def test_initial_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(0)
    one = SSMPolicy(make_spec(), 5).numpy_weights()
    torch.manual_seed(1)
    same, other = SSMPolicy(make_spec(), 5).numpy_weights(), SSMPolicy(make_spec(), 6).numpy_weights()
    for name, value in one.items():
        np.testing.assert_array_equal(value, same[name])
        assert value.dtype == np.float32
    assert not np.array_equal(one["encoder.weight"], other["encoder.weight"])


def test_numpy_weights_are_copies() -> None:
    policy = SSMPolicy(make_spec())
    policy.numpy_weights()["encoder.bias"][:] = 7.0
    assert not policy.encoder.bias.any()


def test_min_period_divides_the_initial_phases_alone() -> None:
    slow, fast = (SSMPolicy(make_spec(min_period=period), seed=3).numpy_weights() for period in (20.0, 2.0))
    for name, value in slow.items():
        np.testing.assert_allclose(fast[name], value * (10.0 if name.endswith("theta") else 1.0), rtol=1e-6)


def test_encoder_scale_is_a_factor_of_the_encoder_s_initial_weights_alone() -> None:
    one, four = (SSMPolicy(make_spec(encoder_scale=scale), seed=3).numpy_weights() for scale in (1.0, 4.0))
    for name, value in one.items():
        np.testing.assert_allclose(four[name], value * (4.0 if name == "encoder.weight" else 1.0), rtol=1e-6)
