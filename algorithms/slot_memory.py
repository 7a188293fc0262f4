"""An associative memory beside a block's state space model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssm_metarl.algorithms.affine import normal
from ssm_metarl.algorithms.operations import linear

CHUNK = 128
"""Steps within which a memory is evaluated as a product of matrices, of which every step meets every earlier one."""


class SlotMemory(nn.Module):
    r"""Associative memory: what followed a situation is added up under its address, and recalled where it comes again.

    .. math:: p_t = \mathrm{softmax}(A x_t), \qquad
        (S_t, n_t) = (S_{t-1}, n_{t-1}) + p_{t-1} ⊗ (V x_t + b, 1), \qquad
        r_t = \frac{p_t S_t}{1 + p_t n_t}

    With addresses that hit one slot each, r is the posterior mean of V x + b after the situation, given one prior
    observation of 0, and with b it tells how many there were. It is a state space model as H3 and Mamba-2, whose input
    and output maps depend on what is seen: without that dependence a state learns badly to bind what was done where to
    what came of it. Written is the address of the step before (the shift of H3: Fu et al. 2023, arXiv 2212.14052),
    since an input holds the previous action and its reward; sums divided by their weights are linear attention
    (Katharopoulos et al. 2020, arXiv 2006.16236), evaluated as a product of matrices in chunks (Dao and Gu 2024, arXiv
    2405.21060). Nothing is forgotten until a reset, where S, n and the last p become zero.

    Args:
        hidden_dim: H, width of what comes in and of what is recalled.
        slots: S.
        generator: source of the initial weights.
    """

    def __init__(self, hidden_dim: int, slots: int, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal((hidden_dim, hidden_dim), hidden_dim**-0.5, generator))
        self.bias = nn.Parameter(torch.ones(hidden_dim))  # of 1: counts are recalled from the beginning
        # 3: situations that differ have addresses that do, too, from the beginning.
        self.address = nn.Parameter(normal((hidden_dim, slots), 3 * hidden_dim**-0.5, generator))

    def forward(self, x: Tensor, resets: Tensor | None = None, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Write and recall over a whole sequence.

        Args:
            x: [M, T, K, H] (or [T, K, H]), finite: a step that is not spoils its slot's past, too.
            resets: [M, T, K] bool, where the memory is emptied before the step; None: nowhere.
            state: before the first step, [M, K, S, H+2]: sums, weights and the last address; None: zero.

        Returns:
            What is recalled, of the sequence's shape, and the state after the last step.
        """
        address = linear(x, self.address).softmax(-1).movedim(-3, -2)  # [M, K, T, S]
        value = linear(x, self.weight, self.bias).movedim(-3, -2)
        if resets is None:
            resets = torch.zeros(x.shape[:-1], dtype=torch.bool, device=x.device)
        fresh = resets.movedim(-1, -2)
        last = torch.zeros_like(address[..., :1, :]) if state is None else state[..., -1].unsqueeze(-2)
        written = torch.cat([last, address[..., :-1, :]], -2).masked_fill(fresh.unsqueeze(-1), 0.0)
        # [M, K, T]: what was written since as many resets is what can be recalled.
        age = fresh.cumsum(-1)
        before = torch.zeros_like(age[..., :1])
        held = None if state is None else (state[..., :-2], state[..., -2:-1])  # sums and weights
        recalled = []
        for start in range(0, x.shape[-3], CHUNK):
            part = slice(start, start + CHUNK)
            at, under, what, ages = address[..., part, :], written[..., part, :], value[..., part, :], age[..., part]
            end = ages[..., -1:]
            shares = (at @ under.mT) * (ages.unsqueeze(-1) == ages.unsqueeze(-2)).tril()
            number = 1 + shares.sum(-1, keepdim=True)
            kept = (under * (ages == end).unsqueeze(-1)).mT
            now = kept @ what, kept.sum(-1, keepdim=True)
            if held is None:
                recalled.append((shares / number) @ what)
            else:
                earlier = at * (ages == before).unsqueeze(-1)
                number = number + earlier @ held[1]
                recalled.append((shares / number) @ what + (earlier / number) @ held[0])
                still = (before == end).unsqueeze(-1)
                now = now[0] + held[0] * still, now[1] + held[1] * still
            held, before = now, end
        after = torch.cat([*now, address[..., -1, :].unsqueeze(-1)], -1)
        return torch.cat(recalled, -2).movedim(-2, -3), after
