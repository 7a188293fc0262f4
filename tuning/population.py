"""The nouns of a self-improving run: its rules, its trials, their reports, and the records of its checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ssm_metarl.checks import check_count, check_flag
from ssm_metarl.tuning.safety import SafetyConfig


@dataclass(frozen=True, kw_only=True)
class EvolveConfig(SafetyConfig):
    """How a population evolves.

    Attributes:
        population: trials P.
        generations: after the assessment of the initial policies; 0: until stopped.
        generation_steps: environment steps of training of every trial in a generation, to the nearest meta-iteration;
            0: five iterations of the first config with episodes of full length.
        survivors: trials that go on unmutated at a border; the others are forked from them. 0: the better half.
        mutate: False makes the others plain copies: what selection and training do alone.
        validation_tasks: fixed tasks on which every trial is assessed, of each of two splits.
        validation_episodes: episodes a task and adaptation step of an assessment.
        validation_steps: adaptation steps S of every assessment, whatever a trial's own `inner_steps`; 0 for policies
            that learn in their recurrent state alone.
        keep_generations: a generation's best checkpoint is kept for as many generations, for manual rollbacks.
    """

    population: int = 4
    generations: int = 6
    generation_steps: int = 0
    survivors: int = 0
    mutate: bool = True
    validation_tasks: int = 20
    validation_episodes: int = 10
    validation_steps: int = 1
    keep_generations: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("population", self.population, 2)
        check_count("validation_steps", self.validation_steps, 0)
        for name in ("validation_tasks", "validation_episodes"):
            check_count(name, getattr(self, name), 1)
        for name in ("generations", "generation_steps", "survivors", "keep_generations"):
            check_count(name, getattr(self, name), 0)
        check_flag("mutate", self.mutate)
        if self.survivors >= self.population:
            raise ValueError(f"survivors must be below population ({self.population}), not {self.survivors}.")


@dataclass(kw_only=True)
class Record:
    """A checkpoint of the run's archive, and what it did on the validation tasks.

    Attributes:
        config: `TrainConfig` as JSON values.
        assessment: `Assessment.to_dict()`.
        metrics, composite, interval: computed from it; the interval has level .95.
    """

    name: str
    generation: int
    trial: int
    config: dict[str, Any]
    lineage_steps: int
    assessment: dict[str, Any]
    metrics: dict[str, float]
    composite: float
    interval: tuple[float, float]


def all_generations(count: int) -> str:
    """What a run says, and its state keeps as `finished`, that ended because it did its generations."""
    return f"{count} generation{'s' * (count != 1)}"


@dataclass(kw_only=True)
class Slot:
    """A trial: its place in the population, whatever policy it holds.

    Attributes:
        status: "initial", "continued", "on probation", "copied", "kept", "rolled back", "restored" or "dead".
        config: what it trains with.
        checkpoint: name of the record that its policy had at the last border; None before the first.
        start: name of the checkpoint that it goes on from in this generation; None: initial weights.
        parent: name of the checkpoint that it was last forked from.
        partner: the trial that continues its parent unmutated, while on probation.
        proposal: its mutation, while on probation.
        fallback: the parent's config, while on probation.
        budget: environment steps of training left in this generation when it was last started.
        carry: what the last generation fell short of its budget by; negative where it went beyond.
        spent: environment steps since then, validation included.
        resize_error: of its last mutation of sizes, as in `Report`.
        ended: it has reached the end of this generation.
    """

    id: int
    config: dict[str, Any]
    status: str = "initial"
    checkpoint: str | None = None
    start: str | None = None
    parent: str | None = None
    partner: int | None = None
    proposal: dict[str, Any] | None = None
    fallback: dict[str, Any] | None = None
    budget: int = 0
    carry: int = 0
    spent: int = 0
    restarts: int = 0
    lineage_steps: int = 0
    lifetime_steps: int = 0
    resize_error: float | None = None
    ended: bool = False


@dataclass(kw_only=True)
class Report:
    """What a trial says after a meta-iteration, or at its generation's end.

    Attributes:
        spent: environment steps since it was (re)started, validation included.
        lineage_steps: environment steps of training on the path to its parameters.
        trained: environment steps of training since it was (re)started.
        assessment: `Assessment.to_dict()`, at a check or at the end; None otherwise.
        ended: the generation's budget is used up; `checkpoint` is written.
        checkpoint: name of its checkpoint in the run's archive.
        failure: why it cannot go on, such as a meta-gradient that is not finite; None if it can.
        resize_error: relative change of the action head's output that taking a checkpoint of other sizes made, see
            `morph.Morph`; None where sizes were equal.
        seconds: "training" and "assessment" (with checkpoints and resizing) since the last report.
    """

    spent: int
    lineage_steps: int
    trained: int = 0
    assessment: dict[str, Any] | None = None
    ended: bool = False
    checkpoint: str | None = None
    failure: str | None = None
    resize_error: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)


def checkpoint_bound(config: EvolveConfig) -> int:
    """Most checkpoints that a run keeps at a border, the exported best included.

    Two a trial (where it is and where it was forked from), the best ever, one a kept generation, and what the run
    folder holds as ordinary checkpoints.
    """
    return 2 * config.population + 1 + config.keep_generations + 4
