"""The slot memory: its recurrence, and what it recalls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import seeds
from ssm_metarl.algorithms import slot_memory
from ssm_metarl.algorithms.slot_memory import SlotMemory


def draw(seed: int, *shape: int, dtype: Any = torch.float32) -> Any:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=20)
@given(seed=seeds, steps=st.integers(1, 9), chunk=st.integers(1, 10), density=st.sampled_from([0.0, 0.3]))
def test_a_memory_is_its_recurrence(seed: int, steps: int, chunk: int, density: float) -> None:
    """Whatever the chunks; from a state, and after resets."""
    memory = SlotMemory(3, 4, torch.Generator().manual_seed(seed)).double()
    x, state = draw(seed, steps, 2, 3, dtype=torch.float64), draw(seed + 1, 2, 4, 5, dtype=torch.float64).abs()
    resets = torch.rand(steps, 2, generator=torch.Generator().manual_seed(seed)) < density
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slot_memory, "CHUNK", chunk)
        recalled, after = memory(x, resets, state)
    for slot in range(2):
        sums, counts, last = state[slot, :, :3], state[slot, :, 3], state[slot, :, 4]
        for t in range(steps):
            if resets[t, slot]:
                sums, counts, last = (torch.zeros_like(each) for each in (sums, counts, last))
            value = x[t, slot] @ memory.weight + memory.bias
            sums, counts = sums + torch.outer(last, value), counts + last
            last = (x[t, slot] @ memory.address).softmax(-1)
            torch.testing.assert_close(recalled[t, slot], last @ sums / (1 + last @ counts))
        torch.testing.assert_close(after[slot], torch.cat([sums, counts[:, None], last[:, None]], 1))


def test_a_memory_recalls_the_posterior_mean_of_what_followed() -> None:
    """Inputs say which of three places one is at, and what the step there, from the place before, paid."""
    memory = SlotMemory(4, 3, torch.Generator().manual_seed(0))
    with torch.no_grad():
        memory.address.zero_()[:3] = 100 * torch.eye(3)
        memory.weight.zero_()[3, 3] = 1.0
        memory.bias.zero_()
    places, paid = [0, 1, 0, 2, 0, 1], [0.0, 4.0, -1.0, 2.0, 5.0, 7.0]
    x = torch.zeros(6, 1, 4)
    x[torch.arange(6), 0, torch.tensor(places)] = 1.0
    x[:, 0, 3] = torch.tensor(paid)
    recalled, _ = memory(x)
    # Of place 0: nothing, then 4, then 4 and 2; of place 1: nothing, then -1; with a prior observation of 0.
    expected = torch.tensor([0.0, 0.0, 4 / 2, 0.0, (4 + 2) / 3, -1 / 2])
    torch.testing.assert_close(recalled[:, 0, 3], expected)
