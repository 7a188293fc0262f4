"""A residual block around a diagonal complex state space model, in the family of LRU and S5."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ssm_metarl.algorithms.affine import Affine, normal
from ssm_metarl.algorithms.operations import gated_residual, linear, skip_tanh
from ssm_metarl.algorithms.parameters import MAX_NU, MIN_DECAY
from ssm_metarl.algorithms.scan import scan
from ssm_metarl.algorithms.slot_memory import SlotMemory


class SSMBlock(nn.Module):
    r"""Residual block around the state space model

    .. math:: h_t = a ⊙ h_{t-1} + γ ⊙ (B x_t), \qquad y_t = \mathrm{Re}(C h_t) + D ⊙ x_t

    whose output is x + W tanh(y) + b, or with `gated` x + y ⊙ sigmoid(w ⊙ x + b): what is read from memory is let
    through by what is seen now. C has mixed the channels already, so that the gate needs no matrix of its own,
    with N/2 complex modes a = exp(-(e^ν + ε) + iθ), so |a| < 1 whatever the parameters are, and γ = sqrt(1 - |a|²),
    which gives every mode the same output variance for white input (Orvieto et al. 2023, arXiv 2303.06349, eq. 7).
    There is no normalisation across hidden units: it would keep a policy from growing without changing its function.
    With `slots` what a `SlotMemory` reads is added to y.

    Complex quantities are kept as real pairs (re, im) side by side: B is [H, N], C is [N, H], the state [..., N/2, 2].
    Every parameter may carry a leading task axis M (through `torch.func.functional_call`); then x is [M, T, K, H].

    Args:
        hidden_dim: H, width of input and output.
        state_dim: N, even number of real state variables.
        gated: form of the output.
        generator: source of the initial weights.
        min_period: least period of the initial modes, in steps: θ is uniform in [0, 2π/min_period].
        slots: of the memory; 0: there is none.
    """

    def __init__(
        self,
        hidden_dim: int,
        state_dim: int,
        gated: bool,
        generator: torch.Generator,
        min_period: float = 20.0,
        slots: int = 0,
    ) -> None:
        super().__init__()
        self.gated = gated
        modes = state_dim // 2
        # Memory of 1 to 1000 steps, spread evenly on a logarithmic scale: |a| up to .999.
        steps = torch.logspace(0, 3, modes) if modes > 1 else torch.tensor([30.0])
        self.nu = nn.Parameter(-torch.log(steps))
        self.theta = nn.Parameter(torch.rand(modes, generator=generator) * math.pi / (min_period / 2))
        self.B = nn.Parameter(normal((hidden_dim, state_dim), (2 * hidden_dim) ** -0.5, generator))
        self.C = nn.Parameter(normal((state_dim, hidden_dim), state_dim**-0.5, generator))
        self.D = nn.Parameter(normal((hidden_dim,), 1.0, generator))
        if gated:
            self.gate = nn.ParameterDict({"weight": torch.ones(hidden_dim), "bias": torch.zeros(hidden_dim)})
        else:
            self.out = Affine(hidden_dim, hidden_dim, hidden_dim**-0.5, generator)
        self.memory = SlotMemory(hidden_dim, slots, generator) if slots else None

    def modes(self) -> tuple[Tensor, Tensor]:
        """The modes a, [(M,) N/2] complex with |a| < 1, and their input gain γ, [(M,) N/2] real."""
        decay = torch.exp(self.nu.clamp(max=MAX_NU)) + MIN_DECAY
        return torch.polar(torch.exp(-decay), self.theta), torch.sqrt(-torch.expm1(-2 * decay))

    def _driven(self, x: Tensor, gain: Tensor) -> Tensor:
        """γ ⊙ (B x) as complex [..., N/2]; the gain is folded into B, which is smaller than the sequence."""
        into = self.B * gain.repeat_interleave(2, -1).unsqueeze(-2)
        return torch.view_as_complex(linear(x, into).unflatten(-1, (-1, 2)))

    def read(self, h: Tensor, recalled: Tensor | None) -> Tensor:
        """Re(C h), and what the memory recalled: y without D ⊙ x, [..., H]."""
        y = linear(torch.view_as_real(h).flatten(-2), self.C)
        return y if recalled is None else y + recalled

    def _output(self, h: Tensor, recalled: Tensor | None, x: Tensor) -> Tensor:
        y = self.read(h, recalled)
        if self.gated:
            return gated_residual(y, x, self.D, self.gate["weight"], self.gate["bias"])
        return linear(skip_tanh(y, x, self.D), self.out.weight, self.out.bias, residual=x)

    def states(self, sequence: Tensor, resets: Tensor | None = None, state: Tensor | None = None) -> Tensor:
        """The state space model's complex states h over a sequence, [M, T, K, N/2]; arguments as of `forward`."""
        a, gain = self.modes()
        keep = None if resets is None else (~resets).to(sequence.dtype)
        before = None if state is None else torch.view_as_complex(state)
        return scan(a, self._driven(sequence, gain), keep, before)

    def forward(
        self, sequence: Tensor, resets: Tensor | None = None, state: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Run over a whole sequence.

        Args:
            sequence: [M, T, K, H] (or [T, K, H] when parameters have no task axis).
            resets: [M, T, K] bool, where the state is zeroed before the step; None: nowhere.
            state: before the first step, [M, K, N/2, 2] and with a memory [M, K, S, H+2]; None: zero.

        Returns:
            Output of the sequence's shape, and the state after the last step.
        """
        h = self.states(sequence, resets, None if state is None else state[0])
        after, recalled = [torch.view_as_real(h[..., -1, :, :])], None
        if self.memory is not None:
            recalled, contents = self.memory(sequence, resets, None if state is None else state[1])
            after.append(contents)
        return self._output(h, recalled, sequence), after
