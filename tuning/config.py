"""The rules of a self-improving run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

from ssm_metarl.checks import check_count, check_flag, check_keys, check_number
from ssm_metarl.tuning.options import OptionName, Options
from ssm_metarl.tuning.race import RaceRule

WITHOUT_EFFECT = ("iterations", "lr_schedule", "learner_threads")
"""Options of training that a self-improving run does not depend on: it has no last iteration, at which a schedule could
end, and a member has one thread."""


@dataclass(frozen=True, kw_only=True)
class EvolveConfig:
    """How a policy improves itself: short races against challengers, and stretches of training between them.

    Attributes:
        budget: environment steps of all members together, assessments included; 0: no bound.
        cycles: races at most; 0: no bound.
        proposals: challengers K of the first race, later ones have half as many; the run has 1 + K members.
        mutate: False: no races, a plain run.
        evolve: options that may change.
        bounds: least and greatest value by option, such as ``{"state_dim": [8, 64]}``; otherwise wide ones.
        warm_up: meta-iterations before the first race.
        stretch: meta-iterations after the first race that no challenger won; after each further one up to half as
            many again, and at most sixteen times as many. After a race that one won, the next race comes at once.
        losers_share: of all environment steps that may go into the losers of races. A step counts by the level in
            [½, 1] which the incumbent would reach by itself: losers of a policy that is stuck count half.
        race: when a contender leaves a race, and what a challenger must show to win it.
        mean_iterations: meta-iterations over which the running mean of weights reaches back.
        assess_share: of all environment steps that may go into assessments.
        assess_tasks: held-out tasks of an assessment at most.
        keep_checkpoints: kept for going back to, the newest ones beside the best.
        max_failures: failures in a row that end the run.
    """

    budget: float = 0.0
    cycles: int = 6
    proposals: int = 4
    mutate: bool = True
    evolve: tuple[OptionName, ...] = get_args(OptionName)
    bounds: Mapping[str, Any] = field(default_factory=dict)
    warm_up: int = 2
    stretch: int = 3
    losers_share: float = 0.2
    race: RaceRule = field(default_factory=RaceRule, metadata={"without": tuple(RaceRule.__dataclass_fields__)})
    mean_iterations: int = 8
    assess_share: float = 0.05
    assess_tasks: int = 20
    keep_checkpoints: int = 10
    max_failures: int = 3

    def __post_init__(self) -> None:
        check_number("budget", self.budget, low=0.0)
        check_flag("mutate", self.mutate)
        for name in ("assess_share", "losers_share"):
            check_number(name, getattr(self, name), low=0.0, high=1.0)
        check_count("cycles", self.cycles, 0)
        for name in ("proposals", "warm_up", "stretch", "mean_iterations", "keep_checkpoints", "max_failures"):
            check_count(name, getattr(self, name), 1)
        check_count("assess_tasks", self.assess_tasks, 2)
        Options(self.evolve, self.bounds)
        if not self.evolve:
            raise ValueError("evolve must name at least one option; mutate=False makes a plain run.")

    @property
    def members(self) -> int:
        """Policies that train side by side during a race."""
        return 1 + self.proposals if self.mutate else 1

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "evolve": list(self.evolve)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EvolveConfig:
        """The inverse of `to_dict`.

        Raises:
            ValueError: an unknown key or an impossible value.
        """
        check_keys(values, set(cls.__dataclass_fields__), "rule")
        race = values.get("race", {})
        check_keys(race, set(RaceRule.__dataclass_fields__), "rule of races")
        return cls(**{**values, "evolve": tuple(values.get("evolve", get_args(OptionName))), "race": RaceRule(**race)})
