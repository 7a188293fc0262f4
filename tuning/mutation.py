"""Mutations: which sizes and learning rates a child gets instead of its parent's."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
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
        before, after: the changed options of `TrainConfig`, JSON values.
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

    Sizes move by 20 %, at least by their least step (even numbers of units keep to it); learning rates by `FACTORS`;
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


def moves(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What a mutation does to each option, such as "outer_lr up"."""
    return [f"{name} {'up' if after[name] > before[name] else 'down'}" for name in after]


def propose(
    parent: str,
    config: Mapping[str, Any],
    rng: np.random.Generator,
    taboo: Collection[str],
    verdicts: Mapping[str, Sequence[float]] | None = None,
) -> Proposal | None:
    """Draw a mutation of one or two options; moves that were kept before come more often.

    Which options move, and whether up or down, is drawn by Thompson sampling (Thompson 1933): every move's chance of
    being kept is drawn from its Beta posterior, and the greatest ones are taken. How far is drawn uniformly.

    Args:
        parent: name of the parent's checkpoint.
        config: the parent's `TrainConfig` as JSON values.
        rng: the only source of chance.
        taboo: keys of proposals that must not come again: rejected from this parent, or already under way.
        verdicts: how often a move was kept and rejected so far, by its name as from `moves`.

    Returns:
        A proposal whose key is not in `taboo`; None when none was found in 100 draws.
    """
    choices: dict[str, list[float]] = {}
    for name in BOUNDS:
        if name == "state_dim" and config["num_layers"] == 0:
            continue  # without a block, the size of its state says nothing
        if name in ("inner_lr", "inner_steps") and config["inner_steps"] == 0:
            continue  # a policy that learns in its state alone stays one
        for value in alternatives(name, config):
            choices.setdefault(moves({name: config[name]}, {name: value})[0], []).append(value)
    for _ in range(100 if choices else 0):
        chances = {move: rng.beta(*(1.0 + np.array((verdicts or {}).get(move, (0.0, 0.0))))) for move in choices}
        after: dict[str, Any] = {}
        count = int(rng.integers(1, 3))
        for move in sorted(choices, key=lambda move: -chances[move]):
            name = move.split()[0]
            if len(after) < count and name not in after:
                after[name] = choices[move][int(rng.integers(len(choices[move])))]
        proposal = Proposal(parent, {name: config[name] for name in after}, after)
        if proposal.key not in taboo:
            return proposal
    return None
