"""Parts of the policy whose first and second derivatives are written out: linear maps and element-wise ends of blocks.

Derived operation by operation, as autograd does it, a meta-gradient reads and writes whole sequences some ninety times,
which costs more than its matrix products. Here a few thousand rows go through several steps while they are in the
cache, and sums are taken in place. The functions can be differentiated any number of times.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_metarl.algorithms.scan import row_parts

NARROW = 16
"""Least columns of a product. With one to eight a BLAS takes two to five times as long as with sixteen (MKL with AVX2,
2000 rows of 64): narrower ones are filled up with zeros."""

_tanh_backward = torch.ops.aten.tanh_backward.default
_tanh_backward_into = torch.ops.aten.tanh_backward.grad_input
_sigmoid_backward = torch.ops.aten.sigmoid_backward.default


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x W + b, with one weight for all tasks or one a task.

    Args:
        x: [*, in], or [M, *, in] when the weight has a task axis.
        weight: [in, out] or [M, in, out].
        bias: [out] or [M, out], or None.
        residual: what is added to the result, of its shape, or None.

    Returns:
        [*, out] or [M, *, out].
    """
    outputs = weight.shape[-1]
    if missing := max(0, NARROW - outputs):
        weight = F.pad(weight, (0, missing))
        bias, residual = (None if v is None else F.pad(v, (0, missing)) for v in (bias, residual))
    tasks = weight.shape[:-2]
    x_rows, residual = (None if v is None else v.reshape(*tasks, -1, v.shape[-1]) for v in (x, residual))
    y: Tensor = _Linear.apply(x_rows, weight, None if bias is None else bias.unsqueeze(-2), residual)
    y = y.reshape(*x.shape[:-1], weight.shape[-1])
    return y[..., :outputs] if missing else y


def tanh(x: Tensor) -> Tensor:
    """The hyperbolic tangent of x [*, H]."""
    y: Tensor = _Tanh.apply(x.reshape(-1, x.shape[-1]))
    return y.view(x.shape)


def skip_tanh(y: Tensor, x: Tensor, skip: Tensor) -> Tensor:
    """tanh(y + skip ⊙ x), with y and x [(M,) *, H] and skip [(M,) H]."""
    tasks = skip.shape[:-1]
    y, rows = (v.reshape(*tasks, -1, v.shape[-1]) for v in (y, x))
    out: Tensor = _SkipTanh.apply(y, rows, skip.unsqueeze(-2))
    return out.view(x.shape)


def gated_residual(y: Tensor, x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x + (y + skip ⊙ x) ⊙ sigmoid(weight ⊙ x + bias), with y and x [(M,) *, H] and vectors [(M,) H]."""
    vectors = [vector.unsqueeze(-2) for vector in (skip, weight, bias)]
    y, rows = (v.reshape(*skip.shape[:-1], -1, v.shape[-1]) for v in (y, x))
    out: Tensor = _GatedResidual.apply(y, rows, *vectors)[0]
    return out.view(x.shape)


class _Function(torch.autograd.Function):
    """Over rows [*L, R, H] with vectors [*L, 1, H]."""

    def __init_subclass__(cls) -> None:
        # Otherwise `apply` works it out anew in every call, in a tenth of a millisecond.
        cls.forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]


def _plus_product(out: Tensor | None, x: Tensor, weight: Tensor) -> Tensor:
    """out + x W, in place where no graph is kept; `out` None: 0."""
    if out is None:
        return x @ weight
    if torch.is_grad_enabled():
        return out + x @ weight
    if out.dim() == 2:
        return out.addmm_(x, weight)
    flat, x, weight = (v.flatten(0, -3) for v in (out, x, weight))
    flat.baddbmm_(x, weight)
    return out


class _Linear(_Function):
    """x W + b + r, with x [*L, R, I], W [*L, I, O], b [*L, 1, O] or None and r [*L, R, O] or None."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        if bias is None:
            out = None if residual is None else residual.clone(memory_format=torch.contiguous_format)
        elif residual is None:
            # Of a single row `contiguous` would be the bias itself, and the product be added to it.
            out = bias.expand(*x.shape[:-1], -1).clone(memory_format=torch.contiguous_format)
        else:
            out = residual + bias
        with torch.no_grad():
            return _plus_product(out, x, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        by_x, by_weight, by_bias, by_residual = ctx.needs_input_grad
        gradients = _LinearBackward.apply(above, x, weight, by_x, by_weight, by_bias)
        return *gradients, above if by_residual else None


class _LinearBackward(_Function):
    """From the gradient G with respect to x W + b those with respect to x, W and b, where they are wanted."""

    @staticmethod
    def forward(
        above: Tensor, x: Tensor, weight: Tensor, by_x: bool, by_weight: bool, by_bias: bool
    ) -> tuple[Tensor | None, ...]:
        return (
            above @ weight.mT if by_x else None,
            x.mT @ above if by_weight else None,
            above.sum(-2, keepdim=True) if by_bias else None,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:3])

    @staticmethod
    def backward(ctx: Any, along_x: Tensor | None, along_weight: Tensor | None, along_bias: Tensor | None) -> Any:
        above, x, weight = ctx.saved_tensors
        by_above, by_x, by_weight = None, None, None
        if ctx.needs_input_grad[0]:
            if along_bias is not None:
                by_above = along_bias.expand_as(above).clone(memory_format=torch.contiguous_format)
            if along_x is not None:
                by_above = _plus_product(by_above, along_x, weight)
            if along_weight is not None:
                by_above = _plus_product(by_above, x, along_weight)
        if along_weight is not None and ctx.needs_input_grad[1]:
            by_x = above @ along_weight.mT
        if along_x is not None and ctx.needs_input_grad[2]:
            by_weight = along_x.mT @ above
        return by_above, by_x, by_weight, None, None, None


def _tanh_of_half(z: Tensor) -> None:
    """tanh(z / 2) = 2 sigmoid(z) - 1 in place, exact to 1e-7: three times faster than torch's tanh."""
    z.sigmoid_().mul_(2).sub_(1)


class _Tanh(_Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        for part in row_parts(x, -2):
            _tanh_of_half(torch.mul(x[part], 2, out=out[part]))
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> Tensor:
        (out,) = ctx.saved_tensors
        by_x: Tensor = _TanhBackward.apply(above, out)
        return by_x


class _TanhBackward(_Function):
    """G (1 - y²) for y = tanh(x)."""

    @staticmethod
    def forward(above: Tensor, out: Tensor) -> Tensor:
        return _tanh_backward(above, out)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, along: Tensor) -> tuple[Tensor, Tensor]:
        above, out = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _tanh_backward(along, out), -2 * along * above * out
        by_above, by_out = torch.empty_like(out), torch.empty_like(out)
        for part in row_parts(out, -2):
            torch.mul(along[part], above[part], out=by_out[part]).mul_(out[part]).mul_(-2)
            _tanh_backward_into(along[part], out[part], grad_input=by_above[part])
        return by_above, by_out


class _SkipTanh(_Function):
    """tanh(y + skip ⊙ x)."""

    @staticmethod
    def forward(y: Tensor, x: Tensor, skip: Tensor) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        for part in row_parts(x, -2):
            _tanh_of_half(torch.addcmul(y[part], skip, x[part], out=out[part]).mul_(2))
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:], output)

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, ...]:
        gradients: tuple[Tensor, ...] = _SkipTanhBackward.apply(above, *ctx.saved_tensors)
        return gradients


class _SkipTanhBackward(_Function):
    """From the gradient G with respect to r = tanh(y + skip ⊙ x) those with respect to y, x and skip: E = G (1 - r²),
    skip ⊙ E and Σ x ⊙ E."""

    @staticmethod
    def forward(above: Tensor, x: Tensor, skip: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        by_y, by_x, by_skip = torch.empty_like(out), torch.empty_like(out), torch.zeros_like(skip)
        for part in row_parts(out, -2):
            gradient = _tanh_backward_into(above[part], out[part], grad_input=by_y[part])
            by_skip += torch.mul(gradient, x[part], out=by_x[part]).sum(-2, keepdim=True)
            torch.mul(gradient, skip, out=by_x[part])
        return by_y, by_x, by_skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, along_y: Tensor, along_x: Tensor, along_skip: Tensor) -> tuple[Tensor, ...]:
        above, x, skip, out = ctx.saved_tensors
        if torch.is_grad_enabled():
            along = along_y + along_x * skip + x * along_skip
            gradient = _tanh_backward(above, out)
            by_skip = (along_x * gradient).sum(-2, keepdim=True)
            return _tanh_backward(along, out), gradient * along_skip, by_skip, -2 * along * above * out
        by_above, by_x, by_out = (torch.empty_like(out) for _ in range(3))
        by_skip = torch.zeros_like(skip)
        for part in row_parts(out, -2):
            aboves, xs, outs, along_xs = (v[part] for v in (above, x, out, along_x))
            gradient = _tanh_backward(aboves, outs)
            by_skip += torch.mul(gradient, along_xs, out=by_x[part]).sum(-2, keepdim=True)
            torch.mul(gradient, along_skip, out=by_x[part])
            along = torch.addcmul(along_y[part], along_xs, skip).addcmul_(xs, along_skip)
            _tanh_backward_into(along, outs, grad_input=by_above[part])
            torch.mul(along, aboves, out=by_out[part]).mul_(outs).mul_(-2)
        return by_above, by_x, by_skip, by_out


class _GatedResidual(_Function):
    """The element-wise end of a gated block, over rows [*L, R, H] with vectors [*L, 1, H].

    The derivative is written out because operation by operation every step reads and writes whole sequences: here a
    few thousand rows go through all steps while they are in the cache. What the backward pass needs again (y with its
    skip, the open gate) are outputs, so that gradients of gradients come back to this function.
    """

    @staticmethod
    def forward(y: Tensor, x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, read, gate = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(3))
        for part in row_parts(x, -2):
            ys, xs, outs, reads, gates = (v[part] for v in (y, x, out, read, gate))
            torch.addcmul(ys, skip, xs, out=reads)
            torch.addcmul(bias, weight, xs, out=gates).sigmoid_()
            torch.addcmul(xs, reads, gates, out=outs)
        return out, read, gate

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        _, x, skip, weight, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, skip, weight, *output[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, ...]:
        x, skip, weight, read, gate = ctx.saved_tensors
        above, above_read, above_gate = grads
        if above is None:  # a gradient of the saved outputs alone
            above = torch.zeros_like(x)
        if torch.is_grad_enabled():
            by_read = above * gate if above_read is None else torch.addcmul(above_read, above, gate)
            by_gate = above * read if above_gate is None else torch.addcmul(above_gate, above, read)
            by_gate = _sigmoid_backward(by_gate, gate)
            by_x = above + by_read * skip + by_gate * weight
            by_skip, by_weight = ((v * x).sum(-2, keepdim=True) for v in (by_read, by_gate))
            return by_read, by_x, by_skip, by_weight, by_gate.sum(-2, keepdim=True)
        by_read, by_x = torch.empty_like(read), torch.empty_like(read)
        by_skip, by_weight, by_bias = (torch.zeros_like(skip) for _ in range(3))
        for part in row_parts(x, -2):
            xs, reads, gates, aboves, by_reads, by_xs = (v[part] for v in (x, read, gate, above, by_read, by_x))
            torch.mul(aboves, gates, out=by_reads)
            if above_read is not None:
                by_reads += above_read[part]
            by_gates = aboves * reads
            if above_gate is not None:
                by_gates += above_gate[part]
            by_gates = _sigmoid_backward(by_gates, gates)
            torch.addcmul(aboves, by_reads, skip, out=by_xs).addcmul_(by_gates, weight)
            by_bias += by_gates.sum(-2, keepdim=True)
            by_weight += by_gates.mul_(xs).sum(-2, keepdim=True)
            by_skip += torch.mul(by_reads, xs, out=by_gates).sum(-2, keepdim=True)
        return by_read, by_x, by_skip, by_weight, by_bias
