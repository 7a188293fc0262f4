"""Affine maps whose parameters may have a task axis."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssm_metarl.algorithms.operations import linear


def along(vector: Tensor, x: Tensor) -> Tensor:
    """A per-task vector [M, n] (or a shared one [n]) in a shape that broadcasts over the middle axes of x [M, *, n]."""
    if vector.dim() == 1:
        return vector
    return vector.reshape(vector.shape[0], *[1] * (x.dim() - 2), vector.shape[-1])


class Affine(nn.Module):
    """x W + b with W stored [in, out] and an optional task axis; see `linear`."""

    def __init__(self, inputs: int, outputs: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal((inputs, outputs), scale, generator))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out]."""
        return linear(x, self.weight, self.bias)


def normal(shape: tuple[int, ...], scale: float, generator: torch.Generator) -> Tensor:
    """Normal initial weights of a standard deviation `scale`, from `generator` alone."""
    return torch.randn(shape, generator=generator) * scale
