"""Mutations: which sizes and learning rates a child gets instead of its parent's."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

FACTORS = (0.5, 0.8, 1.25, 2.0)
"""What a learning rate is multiplied with."""

SIZES: Mapping[str, int] = {"state_dim": 2, "hidden_dim": 2, "num_layers": 1}
"""Sizes that evolve, and their least step: one pair of modes, two units, one layer."""

BOUNDS: Mapping[str, tuple[float, float]] = {
    "state_dim": (2, 256),
    "hidden_dim": (4, 256),
    "num_layers": (0, 4),
    "inner_lr": (1e-3, 10.0),
    "outer_lr": (1e-6, 0.1),
    "inner_steps": (1, 3),
}
"""Least and greatest value of what evolves."""


@dataclass(frozen=True)
class Proposal:
    """A mutation of one parent.

    Attributes:
        parent: name of the checkpoint that the child is forked from.
        before, after: the changed options of ``TrainConfig``, JSON values.
    """

    parent: str
    before: dict[str, Any]
    after: dict[str, Any]

    @property
    def key(self) -> str:
        """Identity: equal for proposals that would train the same child."""
        changes = ",".join(f"{name}={self.after[name]!r}" for name in sorted(self.after))
        return f"{self.parent}:{changes}"


def alternatives(name: str, config: Mapping[str, Any]) -> list[float]:
    """Values that a mutation may give to one option, within its bounds.

    Sizes move by 20 %, at least by their least step (even numbers of units keep to it); learning rates by ``FACTORS``;
    inner steps by one.
    """
    value = config[name]
    if name in SIZES:
        least = SIZES[name]
        step = max(least, round(0.2 * value / least) * least)
        moved: list[float] = [value - step, value + step]
    elif name == "inner_steps":
        moved = [value - 1, value + 1]
    else:
        moved = [value * factor for factor in FACTORS]
    low, high = BOUNDS[name]
    return [candidate for candidate in moved if low <= candidate <= high]


def propose(
    parent: str, config: Mapping[str, Any], rng: np.random.Generator, taboo: Collection[str]
) -> Proposal | None:
    """Draw a mutation of one or two options, with equal chances for each option that can move.

    Args:
        parent: name of the parent's checkpoint.
        config: the parent's ``TrainConfig`` as JSON values.
        rng: the only source of chance.
        taboo: keys of proposals that must not come again: rejected from this parent, or already under way.

    Returns:
        A proposal whose key is not in ``taboo``; None when none was found in 100 draws.
    """
    moves = {name: alternatives(name, config) for name in BOUNDS}
    if config["step_weights"]:  # one weight for each of 0..S inner steps: S cannot move alone
        moves["inner_steps"] = []
    if config["num_layers"] == 0:  # without a block, the size of its state says nothing
        moves["state_dim"] = []
    names = [name for name in BOUNDS if moves[name]]
    for _ in range(100 if names else 0):
        count = min(int(rng.integers(1, 3)), len(names))
        chosen = sorted(rng.choice(len(names), count, replace=False).tolist())
        after = {names[i]: moves[names[i]][int(rng.integers(len(moves[names[i]])))] for i in chosen}
        proposal = Proposal(parent, {name: config[name] for name in after}, after)
        if proposal.key not in taboo:
            return proposal
    return None
