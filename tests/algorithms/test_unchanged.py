"""No operation writes into a tensor that it was given, down to a single row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call

from builders import make_policy, make_spec, seeds, specs
from ssm_metarl import load_pretrained
from ssm_metarl.algorithms.numpy_policy import NumpyPolicy
from ssm_metarl.algorithms.operations import gated_residual, linear, skip_tanh, tanh
from ssm_metarl.algorithms.scan import scan


def frozen(value: Any) -> list[torch.Tensor]:
    """Copies of all tensors in a nest of lists and dicts."""
    if isinstance(value, torch.Tensor):
        return [value.detach().clone()]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [copy for part in parts for copy in frozen(part)]


def check_unchanged(function: Any, *given: Any, grad: bool) -> None:
    """Run it, and its gradient twice where `grad`, and compare what it was given with what that was."""
    before = frozen(list(given))
    with torch.set_grad_enabled(grad):
        result = function(*given)
        if grad:
            wanted = [x for x in _leaves(list(given)) if x.requires_grad]
            total = sum(part.abs().square().sum() for part in _leaves(result) if part.is_floating_point())
            first = torch.autograd.grad(total, wanted, create_graph=True, allow_unused=True)
            again = sum(part.square().sum() for part in first if part is not None)
            if isinstance(again, torch.Tensor) and again.requires_grad:
                torch.autograd.grad(again, wanted, allow_unused=True)
    for now, then in zip(_leaves(list(given)), before, strict=True):
        torch.testing.assert_close(now.detach(), then, rtol=0, atol=0, equal_nan=True)


def _leaves(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [leaf for part in parts for leaf in _leaves(part)]


rows = st.integers(1, 3)


@settings(max_examples=60)
@given(spec=specs(), seed=seeds, tasks=st.integers(0, 2), steps=rows, num_episodes=rows, grad=st.booleans())
def test_a_policy_leaves_parameters_inputs_and_state_as_they_are(
    spec: Any, seed: int, tasks: int, steps: int, num_episodes: int, grad: bool
) -> None:
    policy = make_policy(spec, seed % 1000)
    lead = (tasks,) if tasks else (1,)
    generator = torch.Generator().manual_seed(seed)
    parameters = {
        name: (value.detach().expand(tasks, *value.shape).clone() if tasks else value.detach().clone())
        for name, value in policy.named_parameters()
    }
    for value in parameters.values():
        value.requires_grad_(grad)
    inputs = torch.randn(*lead, steps, num_episodes, spec.input_size, generator=generator)
    resets = torch.rand(*lead, steps, num_episodes, generator=generator) < 0.3
    state = [torch.randn(each.shape, generator=generator) for each in policy.initial_state(*lead, num_episodes)]

    def forward(parameters: Any, inputs: Any, resets: Any, state: Any) -> Any:
        output = functional_call(policy, parameters, (inputs, resets, state))
        head = output.actions.logits if spec.discrete else output.actions.base_dist.loc
        return [head, output.values, *output.state]

    check_unchanged(forward, parameters, inputs, resets, state, grad=grad)
    check_unchanged(forward, parameters, inputs[:, :1] if lead else inputs[:1], None, state, grad=grad)


@settings(max_examples=60)
@given(seed=seeds, tasks=st.integers(0, 2), count=rows, width=st.integers(1, 20), grad=st.booleans())
def test_an_operation_leaves_what_it_is_given_as_it_is(
    seed: int, tasks: int, count: int, width: int, grad: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    lead = (tasks,) if tasks else ()

    def draw(*shape: int, dtype: Any = torch.float32) -> torch.Tensor:
        return torch.randn(*lead, *shape, generator=generator, dtype=dtype).requires_grad_(grad)

    x, y, weight = draw(count, width), draw(count, width), draw(width, width)
    skip, gate, bias = draw(width), draw(width), draw(width)
    check_unchanged(linear, x, weight, bias, grad=grad)
    check_unchanged(linear, x, weight, bias, y, grad=grad)
    check_unchanged(linear, x, weight, None, y, grad=grad)
    check_unchanged(tanh, x, grad=grad)
    check_unchanged(skip_tanh, y, x, skip, grad=grad)
    check_unchanged(gated_residual, y, x, skip, gate, bias, grad=grad)
    check_unchanged(scan, draw(width), draw(count, 1, width), None, draw(1, width), grad=grad)


def test_one_row_is_what_two_equal_rows_are() -> None:
    policy = make_policy(make_spec(num_layers=2, memory_slots=2))
    inputs = torch.randn(1, 1, policy.spec.input_size)
    with torch.no_grad():
        one = policy(inputs[:, None])
        two = policy(inputs[:, None].expand(1, 1, 2, -1))
    torch.testing.assert_close(one.actions.base_dist.loc[0, 0, 0], two.actions.base_dist.loc[0, 0, 1])
    torch.testing.assert_close(one.values[0, 0, 0], two.values[0, 0, 1])


@pytest.mark.parametrize("num_episodes", [1, 2])
def test_500_steps_of_acting_are_those_of_the_numpy_policy(num_episodes: int) -> None:
    policy, _ = load_pretrained("cartpole")
    weights = policy.numpy_weights()
    acting = NumpyPolicy(policy.spec, weights)
    state, other = policy.initial_state(1, num_episodes), acting.initial_state(1, num_episodes)
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for _ in range(500):
            inputs = rng.normal(size=(1, num_episodes, policy.spec.input_size)).astype(np.float32)
            output = policy(torch.from_numpy(inputs)[:, None], None, state)
            state = output.state
            head, other = acting.head(inputs, other)
            expected = head - np.log(np.exp(head).sum(-1, keepdims=True))
            np.testing.assert_allclose(output.actions.logits[:, 0].numpy(), expected, atol=1e-4)
    for name, value in policy.numpy_weights().items():
        np.testing.assert_array_equal(value, weights[name])
