"""Linear maps and element-wise ends with written-out derivatives, against the same made of torch's operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from builders import seeds
from ssm_metarl.algorithms.operations import gated_residual, linear, skip_tanh, tanh

TASKS, WIDTH = 2, 3
# name: ours, plain, shapes of the arguments without the task axis
CASES: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "linear": (linear, lambda x, w: x @ w, ((4, 5, 3), (3, 17))),
    "linear-narrow": (linear, lambda x, w, b: x @ w + b, ((4, 5, 3), (3, 2), (2,))),
    "linear-residual": (
        lambda x, w, b, r: linear(x, w, b, residual=r), lambda x, w, b, r: x @ w + b + r,
        ((4, 5, 3), (3, 16), (16,), (4, 5, 16)),
    ),
    "tanh": (tanh, torch.tanh, ((4, 5, WIDTH),)),
    "skip_tanh": (skip_tanh, lambda y, x, d: torch.tanh(y + d * x), ((4, 5, WIDTH), (4, 5, WIDTH), (WIDTH,))),
    "gated_residual": (
        gated_residual, lambda y, x, d, w, b: x + (y + d * x) * torch.sigmoid(w * x + b),
        ((4, 5, WIDTH), (4, 5, WIDTH), (WIDTH,), (WIDTH,), (WIDTH,)),
    ),
}  # fmt: skip


def arguments(name: str, seed: int = 0, lead: tuple[int, ...] = (), dtype: Any = torch.float64) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    shapes = CASES[name][2]
    return [torch.randn(*lead, *shape, dtype=dtype, generator=generator).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("lead", [(), (TASKS,)])
def test_first_and_second_derivatives(name: str, lead: tuple[int, ...]) -> None:
    """Against finite differences, with arguments for all tasks or of each task."""
    own = CASES[name][0]
    assert gradcheck(own, arguments(name, lead=lead))
    assert gradgradcheck(own, arguments(name, lead=lead), fast_mode=True)


@settings(max_examples=30)
@given(name=st.sampled_from(sorted(CASES)), seed=seeds)
def test_derivatives_of_any_order_equal_the_plain_ones(name: str, seed: int) -> None:
    """Gradient, gradient of its norm with and without a graph, and the gradient of that gradient's norm."""
    own, plain, _ = CASES[name]
    found, expected = [], []
    for function, results in ((own, found), (plain, expected)):
        inputs = arguments(name, seed)
        out = function(*inputs)
        first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        norm = sum(gradient.square().sum() for gradient in first)
        second = torch.autograd.grad(norm, inputs, retain_graph=True)
        again = torch.autograd.grad(norm, inputs, create_graph=True)
        third = torch.autograd.grad(sum(gradient.square().sum() for gradient in again), inputs)
        results += [out, *first, *second, *again, *third]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("lead", [(), (1,), (TASKS,)])
@pytest.mark.parametrize("rows", [(1, 1), (1, 5), (4, 5)])
def test_nothing_given_changes_and_gradients_are_given_too(
    name: str, lead: tuple[int, ...], rows: tuple[int, int]
) -> None:
    """Arguments, and the gradients that come in on the first and the second way back, down to a single row.

    What is expanded to one row is no copy: written into, it would be the caller's.
    """
    own, plain, shapes = CASES[name]
    of_rows = [(*rows, *shape[2:]) if len(shape) == 3 else shape for shape in shapes]
    results = []
    for function in (own, plain):
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int, generator: torch.Generator = generator) -> Any:
            return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()

        inputs = [draw(*lead, *shape) for shape in of_rows]
        if lead and function is plain:
            out = torch.func.vmap(function)(*inputs)
        else:
            out = function(*inputs)
        above, along = draw(*out.shape), [draw(*value.shape) for value in inputs]
        given = [*inputs, above, *along]
        before = [value.detach().clone() for value in given]
        first = torch.autograd.grad(out, inputs, above, create_graph=True)
        second = torch.autograd.grad(first, [*inputs, above], along, retain_graph=True, allow_unused=True)
        again = torch.autograd.grad(first, [*inputs, above], along, create_graph=True, allow_unused=True)
        assert all(torch.equal(now, then) for now, then in zip(given, before, strict=True))
        # Zeros and no gradient are the same.
        results.append([torch.zeros(()) if value is None else value for value in (out, *first, *second, *again)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours + torch.zeros_like(theirs), theirs + torch.zeros_like(ours))


def test_tanh_is_exact_to_rounding() -> None:
    x = torch.linspace(-20, 20, 4001)[:, None]
    torch.testing.assert_close(tanh(x), torch.tanh(x), rtol=0, atol=2e-7)


def test_many_rows_equal_few() -> None:
    """More rows than go through in one piece."""
    y, x = torch.randn(2, 5000, WIDTH, generator=torch.Generator().manual_seed(0))
    skip = torch.tensor([0.5, -1.0, 2.0])
    torch.testing.assert_close(skip_tanh(y, x, skip), torch.tanh(y + skip * x), rtol=0, atol=5e-7)
