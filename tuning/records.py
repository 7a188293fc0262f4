"""The nouns of a self-improving run: what a member is to do, what it reports, what is decided, what is kept."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

from ssm_metarl.algorithms.rollouts import Array

START = "start"
"""Name in the archive of the checkpoint that a run was started from; it alone has no running mean beside it."""


class Phase(StrEnum):
    """What the run does."""

    WARM_UP = "warm-up"
    RACE = "race"
    STRETCH = "stretch"
    ASSESSMENT = "assessment"
    HAND_OVER = "hand-over"


class Status(StrEnum):
    """What a member is at the moment."""

    IDLE = "idle"
    INCUMBENT = "incumbent"
    CHALLENGER = "challenger"
    DROPPED = "dropped"
    GONE = "gone"


class Decision(StrEnum):
    """What an event decided."""

    ACCEPTED = "accepted"
    REJECTED = "rejected"
    CONTINUED = "continued"
    ROLLED_BACK = "rolled back"
    REFUSED = "refused"
    FAILED = "failed"
    HANDED_OVER = "handed over"


@dataclass(frozen=True, kw_only=True)
class Play:
    """Rollouts of one policy on held-out tasks, as deployed: the episodes and inner steps of its training.

    Attributes:
        policy: "last", the weights as they are, or "mean", their running mean.
        split, tasks: which tasks, and how many.
    """

    policy: str
    split: str
    tasks: int

    @property
    def key(self) -> str:
        """Its name in a report."""
        return f"{self.policy} {self.split}"


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What a member is to do next. A member that holds the same start and config goes on where it is.

    Attributes:
        number: rises with every assignment of the run.
        config: `TrainConfig.to_dict()`.
        start: checkpoint in the archive that it trains from; None: initial weights.
        iterations: meta-iterations that it is to have done since the start when this ends.
        share: name under which the rollouts of the first iteration are offered to others.
        take: name of the rollouts that the first iteration takes over; their first `stages` stages are the same.
        checkpoint: name under which it is written at the end; the running mean gets a checkpoint beside it.
        plays: assessments after that.
        seed: of the assessments' tasks and rollouts.
    """

    number: int
    config: dict[str, Any]
    start: str | None
    iterations: int
    share: str = ""
    take: str = ""
    stages: int = 0
    checkpoint: str | None = None
    plays: list[Play] = field(default_factory=list)
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Assignment:
        """The inverse of `to_dict`."""
        return cls(**{**values, "plays": [Play(**play) for play in values["plays"]]})


@dataclass(kw_only=True)
class Report:
    """What a member says after a meta-iteration, and at the end of an assignment.

    Attributes:
        number: of the assignment.
        iterations: done since the start.
        returns: [S+1, M] of the last iteration, mean undiscounted return of each task; None where none was trained.
        env_steps: environment steps of training on the path to its parameters.
        iteration: meta-iterations on that path.
        spent: environment steps that this iteration played itself.
        assessed: environment steps of assessments and of measuring a resize.
        plays: returns [S+1, V] of each assessment, by its key.
        ended: the assignment is done.
        failure: why it cannot go on, such as a meta-gradient that is not finite.
        resize_error: see `resize.Morph`; None where sizes were equal.
        seconds: by phase.
    """

    number: int
    iterations: int = 0
    returns: Array | None = None
    env_steps: int = 0
    iteration: int = 0
    spent: int = 0
    assessed: int = 0
    plays: dict[str, Array] = field(default_factory=dict)
    ended: bool = False
    failure: str | None = None
    resize_error: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        """As Tune carries it: one string, which it does not take apart."""
        values = {**asdict(self), "returns": to_lists(self.returns)}
        values["plays"] = {key: to_lists(play) for key, play in self.plays.items()}
        return json.dumps(values)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The inverse of `to_json`."""
        values = json.loads(text)
        values["returns"] = to_array(values["returns"])
        values["plays"] = {key: np.array(play, float) for key, play in values["plays"].items()}
        return cls(**values)


@dataclass(kw_only=True)
class Record:
    """A checkpoint of the incumbent in the run's archive.

    Attributes:
        name: of its folder; that of the running mean of weights is `mean`.
        iteration, env_steps: meta-iterations and environment steps of training on the path to it.
        cycle: races before it.
        config: `TrainConfig.to_dict()`.
        path: the options that changed on the path to it: [meta-iteration, {name: value}].
        level: normalised return after adaptation over the last iterations of a stretch; None within one.
        metrics, intervals: the five metrics by name; intervals have level .95 and are over tasks.
        handed_over: "last" or "mean": which of the two weights is the better, as far as is known.
    """

    name: str
    iteration: int
    env_steps: int
    cycle: int
    config: dict[str, Any]
    path: list[list[Any]] = field(default_factory=list)
    level: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, Any] = field(default_factory=dict)
    handed_over: str = "last"

    @property
    def mean(self) -> str:
        """Name of the folder with the running mean of weights."""
        return mean_name(self.name)

    @property
    def exported(self) -> str:
        """Name of the folder that is handed over."""
        return self.mean if self.handed_over == "mean" else self.name


def mean_name(name: str) -> str:
    """Name of the checkpoint with the running mean of weights beside a checkpoint."""
    return f"{name}_mean"


def to_lists(array: Array | None) -> Any:
    """A matrix as JSON values, null for NaN."""
    if array is None:
        return None
    values = np.asarray(array, float).astype(object)
    values[np.isnan(np.asarray(array, float))] = None
    return values.tolist()


def to_array(values: Any) -> Array | None:
    """The inverse of `to_lists`."""
    return None if values is None else np.array(values, float)
