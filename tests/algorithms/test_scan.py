"""The scan against a plain loop over time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from builders import seeds
from ssm_metarl.algorithms.scan import scan

DTYPES = [torch.float64, torch.complex128]


def loop(a: Any, b: Any, keep: Any = None, state: Any = None) -> Any:
    """h_t = a ⊙ h_{t-1} · keep_t + b_t, one step at a time."""
    h = torch.zeros_like(b[..., 0, :, :]) if state is None else state
    steps = []
    for t in range(b.shape[-3]):
        h = h if keep is None else h * keep[..., t, :, None]
        h = a.unsqueeze(-2) * h + b[..., t, :, :]
        steps.append(h)
    return torch.stack(steps, -3)


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Any:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def arguments(
    dtype: torch.dtype, seed: int, steps: int, lead: tuple[int, ...], kept: bool, started: bool, shared: bool = False
) -> tuple[Any, ...]:
    num_episodes, size = 2, 2
    a = (0.9 * draw((size,) if shared else (*lead, size), dtype, seed)).requires_grad_()
    b = draw((*lead, steps, num_episodes, size), dtype, seed + 1).requires_grad_()
    keep = (draw((*lead, steps, num_episodes), torch.float64, seed + 2) > -0.5).to(b.real.dtype) if kept else None
    state = draw((*lead, num_episodes, size), dtype, seed + 3).requires_grad_() if started else None
    return a, b, keep, state


@settings(max_examples=40)
@given(
    dtype=st.sampled_from([torch.float32, torch.complex64, *DTYPES]),
    seed=seeds,
    steps=st.sampled_from([1, 2, 3, 4, 7, 23]),  # from 4 on in chunks
    lead=st.sampled_from([(), (1,), (3,), (2, 2)]),
    kept=st.booleans(),
    started=st.booleans(),
    shared=st.booleans(),
    conjugate=st.booleans(),
)
def test_equals_a_loop(dtype: Any, seed: int, conjugate: bool, **form: Any) -> None:
    """Values and gradients, with any leading axes."""
    a, b, keep, state = arguments(dtype, seed, **form)
    inputs = [x for x in (a, b, state) if x is not None]
    fed = b.conj() if conjugate else b
    ours, theirs = scan(a, fed, keep, state), loop(a, fed, keep, state)
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if dtype in (torch.float32, torch.complex64) else {}
    torch.testing.assert_close(ours, theirs, **tolerance)
    weight = draw(ours.shape, dtype, seed + 4)
    # The gradient of the second loss is a single number, expanded.
    for reduced in (lambda h: (weight * h).sum().real, lambda h: h.sum().real):
        ours_grad = torch.autograd.grad(reduced(ours), inputs, retain_graph=True)
        theirs_grad = torch.autograd.grad(reduced(theirs), inputs, retain_graph=True)
        for one, other in zip(ours_grad, theirs_grad, strict=True):
            torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize(("steps", "lead"), [(1, ()), (4, ()), (3, (2,))])
def test_first_and_second_derivatives(dtype: Any, kept: bool, started: bool, steps: int, lead: Any) -> None:
    a, b, keep, state = arguments(dtype, 0, steps, lead, kept, started)
    inputs = (a, b) if state is None else (a, b, state)

    def function(a: Any, b: Any, state: Any = None) -> Any:
        return scan(a, b, keep, state)

    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)
