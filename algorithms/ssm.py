"""A residual block around a diagonal complex state space model, in the family of LRU and S5."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .functions import gated_residual, linear, skip_tanh
from .inference import MAX_NU, MIN_DECAY
from .scan import scan


def along(vector: Tensor, x: Tensor) -> Tensor:
    """A per-task vector [M, n] (or a shared one [n]) in a shape that broadcasts over the middle axes of x [M, *, n]."""
    if vector.dim() == 1:
        return vector
    return vector.reshape(vector.shape[0], *[1] * (x.dim() - 2), vector.shape[-1])


class SSMBlock(nn.Module):
    r"""Residual block around the state space model

    .. math:: h_t = a ⊙ h_{t-1} + γ ⊙ (B x_t), \qquad y_t = \mathrm{Re}(C h_t) + D ⊙ x_t

    whose output is x + W tanh(y) + b, or with ``gated`` x + y ⊙ sigmoid(w ⊙ x + b): what is read from memory is let
    through by what is seen now. C has mixed the channels already, so that the gate needs no matrix of its own,
    with N/2 complex modes a = exp(-(e^ν + ε) + iθ), so |a| < 1 whatever the parameters are, and γ = sqrt(1 - |a|²),
    which gives every mode the same output variance for white input (Orvieto et al. 2023, arXiv 2303.06349, eq. 7).
    There is no normalisation across hidden units: it would keep a policy from growing without changing its function.

    Complex quantities are kept as real pairs (re, im) side by side: B is [H, N], C is [N, H], the state [..., N/2, 2].
    Every parameter may carry a leading task axis M (through ``torch.func.functional_call``); then x is [M, T, K, H].

    Args:
        hidden_dim: H, width of input and output.
        state_dim: N, even number of real state variables.
        gated: form of the output.
        generator: source of the initial weights.
        min_period: least period of the initial modes, in steps: θ is uniform in [0, 2π/min_period].
    """

    def __init__(
        self, hidden_dim: int, state_dim: int, gated: bool, generator: torch.Generator, min_period: float = 20.0
    ) -> None:
        super().__init__()
        self.gated = gated
        modes = state_dim // 2
        # Memory of 1 to 1000 steps, spread evenly on a logarithmic scale: |a| up to .999.
        steps = torch.logspace(0, 3, modes) if modes > 1 else torch.tensor([30.0])
        self.nu = nn.Parameter(-torch.log(steps))
        self.theta = nn.Parameter(torch.rand(modes, generator=generator) * math.pi / (min_period / 2))
        self.B = nn.Parameter(_normal((hidden_dim, state_dim), (2 * hidden_dim) ** -0.5, generator))
        self.C = nn.Parameter(_normal((state_dim, hidden_dim), state_dim**-0.5, generator))
        self.D = nn.Parameter(_normal((hidden_dim,), 1.0, generator))
        if gated:
            self.gate = nn.ParameterDict({"weight": torch.ones(hidden_dim), "bias": torch.zeros(hidden_dim)})
        else:
            self.out = Affine(hidden_dim, hidden_dim, hidden_dim**-0.5, generator)

    def modes(self) -> tuple[Tensor, Tensor]:
        """The modes a, [(M,) N/2] complex with |a| < 1, and their input gain γ, [(M,) N/2] real."""
        decay = torch.exp(self.nu.clamp(max=MAX_NU)) + MIN_DECAY
        return torch.polar(torch.exp(-decay), self.theta), torch.sqrt(-torch.expm1(-2 * decay))

    def _driven(self, x: Tensor, gain: Tensor) -> Tensor:
        """γ ⊙ (B x) as complex [..., N/2]; the gain is folded into B, which is smaller than the sequence."""
        into = self.B * gain.repeat_interleave(2, -1).unsqueeze(-2)
        return torch.view_as_complex(linear(x, into).unflatten(-1, (-1, 2)))

    def _output(self, h: Tensor, x: Tensor) -> Tensor:
        y = linear(torch.view_as_real(h).flatten(-2), self.C)
        if self.gated:
            return gated_residual(y, x, self.D, self.gate["weight"], self.gate["bias"])
        return linear(skip_tanh(y, x, self.D), self.out.weight, self.out.bias, residual=x)

    def forward(
        self, sequence: Tensor, resets: Tensor | None = None, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run over a whole sequence.

        Args:
            sequence: [M, T, K, H] (or [T, K, H] when parameters have no task axis).
            resets: [M, T, K] bool, where the state is zeroed before the step; None: nowhere.
            state: [M, K, N/2, 2], state before the first step; None: zero.

        Returns:
            Output of the sequence's shape, and the state after the last step.
        """
        a, gain = self.modes()
        keep = None if resets is None else (~resets).to(sequence.dtype)
        before = None if state is None else torch.view_as_complex(state)
        h = scan(a, self._driven(sequence, gain), keep, before)
        return self._output(h, sequence), torch.view_as_real(h[..., -1, :, :])

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Run over one step; equals :meth:`forward` on a sequence of one step without reset.

        Args:
            x: [M, K, H] (or [K, H]).
            state: [M, K, N/2, 2].

        Returns:
            Output [M, K, H] and the new state.
        """
        a, gain = self.modes()
        h = torch.addcmul(self._driven(x, gain), along(a, x), torch.view_as_complex(state))
        return self._output(h, x), torch.view_as_real(h)


class Affine(nn.Module):
    """x W + b with W stored [in, out] and an optional task axis; see :func:`linear`."""

    def __init__(self, inputs: int, outputs: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(_normal((inputs, outputs), scale, generator))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out]."""
        return linear(x, self.weight, self.bias)


def _normal(shape: tuple[int, ...], scale: float, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator) * scale
