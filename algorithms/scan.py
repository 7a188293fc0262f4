"""Diagonal linear recurrence h_t = a ⊙ h_{t-1} · keep_t + b_t, differentiable any number of times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def scan(a: Tensor, b: Tensor, keep: Tensor | None = None, state: Tensor | None = None) -> Tensor:
    """All states of the recurrence h_t = a ⊙ h_{t-1} · keep_t + b_t.

    Args:
        a: [*L, N] real or complex, the same at every step (L: leading axes, such as tasks; may be empty).
        b: [*L, T, K, N], what enters at each step, of the dtype of ``a``.
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
        steps = b.shape[-3]
        h = torch.empty_like(b, memory_format=torch.contiguous_format)
        # [*L, K, N], one step's size: collapses the loop over axes inside each operation
        factor = a.unsqueeze(-2).expand(b.select(-3, 0).shape).contiguous()
        inputs, outputs = b.unbind(-3), h.unbind(-3)
        masks = None if keep is None else keep.unsqueeze(-1).unbind(-3)
        order = range(steps - 1, -1, -1) if backwards else range(steps)
        before = None
        for t in order:
            if before is None:
                outputs[t].copy_(inputs[t])
            elif masks is None:
                torch.addcmul(inputs[t], factor, before, out=outputs[t])
            else:
                torch.addcmul(inputs[t], factor * masks[t], before, out=outputs[t])
            before = outputs[t]
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

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        a, b, keep = batched(info.batch_size, in_dims, args[:3])
        return _Scan.apply(a, b, keep, args[3]), 0


def batched(size: int, dims: Sequence[int | None], tensors: Sequence[Any]) -> list[Any]:
    """For a ``vmap`` rule: the arguments with the mapped axis in front, those that have none (dim None) expanded."""

    def front(x: Tensor | None, dim: int | None) -> Tensor | None:
        if x is None:
            return None
        return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)

    return [front(x, dim) for x, dim in zip(tensors, dims, strict=False)]


def row_parts(x: Tensor, dim: int) -> list[tuple[Any, ...]]:
    """Indices that cut x [..., H] along ``dim`` (negative) into pieces of about 2048 rows: what a cache holds."""
    rows_each = math.prod(x.shape[:-1]) // max(1, x.shape[dim])
    size = max(1, 2048 // max(1, rows_each))
    after = (slice(None),) * (-dim - 1)
    return [(..., slice(start, start + size), *after) for start in range(0, x.shape[dim], size)]
