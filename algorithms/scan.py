"""Diagonal linear recurrence h_t = a ⊙ h_{t-1} · keep_t + b_t, differentiable any number of times."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def scan(a: Tensor, b: Tensor, keep: Tensor | None = None, state: Tensor | None = None) -> Tensor:
    """All states of the recurrence h_t = a ⊙ h_{t-1} · keep_t + b_t.

    Args:
        a: [*L, N] real or complex, the same at every step (L: leading axes, such as tasks; may be empty).
        b: [*L, T, K, N], what enters at each step, of the dtype of `a`.
        keep: [*L, T, K] real, 0 where the state is reset before the step and 1 elsewhere; None: no reset.
        state: [*L, K, N], h before the first step; None: zero.

    Returns:
        h, [*L, T, K, N].
    """
    lead = b.shape[:-3]
    a = a.expand(*lead, a.shape[-1])
    if keep is not None:
        keep = keep.to(b.real.dtype).expand(*b.shape[:-1])
    if state is not None:
        carried = a.unsqueeze(-2) * state
        if keep is not None:
            carried = carried * keep[..., 0, :, None]
        b = torch.cat([b[..., :1, :, :] + carried.unsqueeze(-3), b[..., 1:, :, :]], -3)
    return _Scan.apply(a, b, keep, False)


class _Scan(torch.autograd.Function):
    """The recurrence from a zero state, forwards or backwards in time.

    Its gradient with respect to b is the conjugate recurrence in the other direction: for y_t = b_t + a k_t y_{t-1},
    ∂L/∂b_t = ∂L/∂y_t + conj(a) k_{t+1} ∂L/∂b_{t+1}, and ∂L/∂a = Σ_t conj(k_t y_{t-1}) ∂L/∂b_t. Both are made of
    differentiable operations, so gradients of gradients need no code of their own.
    """

    @staticmethod
    def forward(a: Tensor, b: Tensor, keep: Tensor | None, backwards: bool) -> Tensor:
        a, b = a.resolve_conj(), b.resolve_conj()
        h = torch.empty_like(b, memory_format=torch.contiguous_format)
        steps = b.shape[-3]
        length = math.isqrt(steps) if b.numel() < _SMALL * steps else 1
        whole = steps - steps % length if length > 1 else 0
        # In the order of the recurrence, whole chunks come first and what is left over after them.
        first = slice(steps - whole, steps) if backwards else slice(whole)
        rest = slice(steps - whole) if backwards else slice(whole, steps)
        before = None
        if whole:
            masks = None if keep is None else keep[..., first, :]
            before = _chunked(a, b[..., first, :, :], masks, h[..., first, :, :], length, backwards)
        masks = None if keep is None else keep[..., rest, :]
        _step_by_step(a.unsqueeze(-2), b[..., rest, :, :], masks, h[..., rest, :, :], before, backwards)
        return h

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, _, keep, backwards = inputs
        ctx.save_for_backward(a, keep, output)
        ctx.backwards = backwards

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a, keep, h = ctx.saved_tensors
        (grad,) = grads
        backwards = ctx.backwards
        # keep_t belongs to the step from t-1 to t; seen from the other end that step starts at t.
        turned = None if keep is None else torch.roll(keep, 1 if backwards else -1, -2)
        grad_b = _Scan.apply(a.conj(), grad, turned, not backwards)
        grad_a = None
        if ctx.needs_input_grad[0]:
            earlier, later = (h[..., 1:, :, :], grad_b[..., :-1, :, :])
            mask = None if keep is None else keep[..., :-1, :, None]
            if not backwards:
                earlier, later = h[..., :-1, :, :], grad_b[..., 1:, :, :]
                mask = None if keep is None else keep[..., 1:, :, None]
            if mask is not None:
                later = later * mask
            if torch.is_grad_enabled():
                grad_a = (earlier.conj() * later).sum((-3, -2))
            else:
                grad_a = torch.zeros_like(h[..., 0, 0, :])
                for part in row_parts(later, -3):
                    grad_a += (earlier[part].conj() * later[part]).sum((-3, -2))
        return grad_a, grad_b, None, None


_SMALL = 4096
"""Numbers a step below which its work is less than the start of its operations, and chunks are worth a second pass."""


def _step_by_step(
    a: Tensor, b: Tensor, keep: Tensor | None, out: Tensor, before: Tensor | None, backwards: bool
) -> Tensor | None:
    """The recurrence along axis -3 into `out`, after the state `before`; returns the last state.

    Args:
        a: of a step's shape [*, K, N], or what broadcasts to it.
        b, out: [*, T, K, N].
        keep: [*, T, K] or None.
    """
    # One step's size: collapses the loop over axes inside each operation.
    factor = a.expand(b.select(-3, 0).shape).contiguous() if b.shape[-3] else a
    masks = None if keep is None else keep.unsqueeze(-1).unbind(-3)
    steps = list(zip(b.unbind(-3), out.unbind(-3), masks or [None] * b.shape[-3], strict=True))
    for entering, state, mask in reversed(steps) if backwards else steps:
        if before is None:
            state.copy_(entering)
        else:
            torch.addcmul(entering, factor if mask is None else factor * mask, before, out=state)
        before = state
    return before


def _chunked(a: Tensor, b: Tensor, keep: Tensor | None, out: Tensor, length: int, backwards: bool) -> Tensor:
    """The same from a zero state, for a whole number of chunks of `length` steps.

    All chunks at once from zero states, then what enters each from the one before, through the powers of a: T = C L
    steps in L + C operations.
    """
    inputs, states = (v.unflatten(-3, (-1, length)) for v in (b, out))  # [*, C, L, K, N]
    masks = None if keep is None else keep.unflatten(-2, (-1, length))
    _step_by_step(a[..., None, None, :], inputs, masks, states, None, backwards)
    # [*, 1, L, 1, N]: a to the number of steps since the state before the chunk; 0 once it was reset in between.
    powers = a.unsqueeze(-2).expand(*a.shape[:-1], length, -1).cumprod(-2)[..., None, :, None, :]
    if backwards:
        powers = powers.flip(-3)
    if masks is not None:
        kept = (masks.flip(-2) if backwards else masks).cumprod(-2)
        powers = powers * (kept.flip(-2) if backwards else kept).unsqueeze(-1)
    end = 0 if backwards else -1
    chunks = states.unbind(-4)
    through = powers.select(-3, end).expand(states.select(-3, end).shape).unbind(-3)
    order = range(len(chunks) - 1, -1, -1) if backwards else range(len(chunks))
    entering = torch.zeros_like(states.select(-3, end))  # [*, C, K, N]
    carried = entering.unbind(-3)
    before = None
    for i in order:
        if before is not None:
            carried[i].copy_(before)
            before = torch.addcmul(chunks[i].select(-3, end), through[i], before)
        else:
            before = chunks[i].select(-3, end)
    states.addcmul_(powers, entering.unsqueeze(-3))
    return out.select(-3, end)


def row_parts(x: Tensor, dim: int) -> list[tuple[Any, ...]]:
    """Indices that cut x [..., H] along `dim` (negative) into pieces of about 2048 rows: what a cache holds."""
    rows_each = math.prod(x.shape[:-1]) // max(1, x.shape[dim])
    size = max(1, 2048 // max(1, rows_each))
    after = (slice(None),) * (-dim - 1)
    return [(..., slice(start, start + size), *after) for start in range(0, x.shape[dim], size)]
