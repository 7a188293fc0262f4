"""The policy in training, and how far its run has come."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ssm_metarl.algorithms.rollouts import Array
from ssm_metarl.tuning.records import Assignment, Phase, Report, to_array, to_lists

LATEST = 3
"""Last meta-iterations of a stretch whose training returns are the incumbent's level and metrics."""

Outcome = dict[int, list[Report]]
"""What every member that had an assignment reported, by member."""

Course = Generator[dict[int, Assignment], Outcome, Any]
"""Yields assignments, and goes on with their outcome once all have ended."""


@dataclass(kw_only=True)
class Incumbent:
    """The policy that the run hands over.

    Attributes:
        member: that holds it.
        config: what it trains with.
        checkpoint: its last one in the archive; None before the first.
        iteration, env_steps: meta-iterations and environment steps of training on the path to it.
        iteration_steps: environment steps of a meta-iteration, as they were lately; 0: not known.
        path: the options that changed on that path, and the initial ones: [meta-iteration, {name: value}].
        latest: [S+1, M] returns of its last meta-iterations.
        curve: [M] normalised returns after adaptation of every meta-iteration of this stretch.
    """

    member: int
    config: dict[str, Any]
    checkpoint: str | None = None
    iteration: int = 0
    env_steps: int = 0
    iteration_steps: float = 0.0
    path: list[list[Any]] = field(default_factory=list)
    latest: list[Array] = field(default_factory=list)
    curve: list[Array] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        arrays = {name: [to_lists(array) for array in getattr(self, name)] for name in ("latest", "curve")}
        return {**{name: getattr(self, name) for name in self.__dataclass_fields__}, **arrays}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Incumbent:
        """The inverse of `to_dict`."""
        arrays = {name: [to_array(array) for array in values[name]] for name in ("latest", "curve")}
        return cls(**{**values, **arrays})


@dataclass(kw_only=True)
class Progress:
    """What a run knows at a checkpoint of its incumbent, and all that a resumed one needs.

    Attributes:
        cycle: races so far.
        phase: what comes next.
        left: meta-iterations left of the stretch.
        length: meta-iterations of the next stretch.
        flat: stretches in a row that brought no improvement.
        price: share of a loser's step that counts against `losers_share`, see `Rules._price`.
        best: the record that is handed over.
        failures: in a row: until something is decided without one.
        collapses: in a row: until a stretch ends without one.
        assignments: made so far.
        spent: environment steps: "total", "losers", "assessments", and "charged", those of losers at the prices of
            their races.
        seconds: by what they went into, of all members.
        finished: why the run ended.
    """

    cycle: int = 0
    phase: Phase = Phase.WARM_UP
    left: int = 0
    length: int = 0
    flat: int = 0
    price: float = 1.0
    best: str | None = None
    failures: int = 0
    collapses: int = 0
    assignments: int = 0
    spent: dict[str, int] = field(default_factory=lambda: {"total": 0, "losers": 0, "charged": 0, "assessments": 0})
    seconds: dict[str, float] = field(default_factory=dict)
    finished: str | None = None
