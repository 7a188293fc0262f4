"""What a self-improving run knows, on disk and for those who look on."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Self

import numpy as np

from ssm_metarl.algorithms.rollouts import Array
from ssm_metarl.tasks import ReferenceReturns
from ssm_metarl.tuning.config import EvolveConfig
from ssm_metarl.tuning.incumbent import Course, Incumbent, Outcome, Progress
from ssm_metarl.tuning.metrics import normalise
from ssm_metarl.tuning.options import Challenge, Options
from ssm_metarl.tuning.race import INCUMBENT, Race
from ssm_metarl.tuning.records import Assignment, Decision, Phase, Record, Status
from ssm_metarl.tuning.safety import Level
from ssm_metarl.tuning.store import RunStore


class Ledger:
    """State and events of a run, see `Population`; what is saved is the state at the incumbent's last checkpoint."""

    def __init__(
        self,
        config: EvolveConfig,
        base: Mapping[str, Any],
        reference: ReferenceReturns,
        store: RunStore,
        start: str | None = None,
    ) -> None:
        self.config, self.base, self.store, self._reference = config, dict(base), store, reference
        self.incumbent = Incumbent(member=0, config=dict(base), checkpoint=start, path=[[0, dict(base)]])
        self.progress = Progress(left=config.warm_up, length=config.stretch)
        self.options = Options(config.evolve, config.bounds)
        self.level = Level()
        self.archive: dict[str, Record] = {}
        self._logged = self.boundaries = 0
        self._clear()
        self._saved = self._snapshot()

    @classmethod
    def resume(cls, store: RunStore, reference: ReferenceReturns, **changes: Any) -> Self:
        """The run in `store` as it was at its incumbent's last checkpoint.

        Args:
            changes: rules to change, such as more `cycles`.

        Raises:
            ValueError: there is no run, or its state is damaged.
        """
        state = store.load()
        try:
            config = EvolveConfig.from_dict({**state["config"], **changes})
            self = cls(config, state["base"], reference, store)
            self.incumbent = Incumbent.from_dict(state["incumbent"])
            self.progress = Progress(**{**state["progress"], "phase": Phase(state["progress"]["phase"])})
            self.options = Options.from_dict({**state["options"], "names": config.evolve, "bounds": config.bounds})
            self.level = Level(**state["level"])
            self.archive = {name: Record(**record) for name, record in state["archive"].items()}
            self._logged = state["events_before"] + len(state["events"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{store.folder / 'state.json'} is damaged: {error!r}.") from None
        if self.progress.failures >= config.max_failures:  # a person looked at it
            self.progress.failures = 0
        if self.progress.collapses >= config.max_failures:
            self.progress.collapses = 0
        self.progress.finished = None
        if self.progress.phase == Phase.HAND_OVER:  # there is more to do now
            self.progress.phase = Phase.RACE
        self._saved = self._snapshot()
        return self

    def _clear(self) -> None:
        """What a run does not remember when it is resumed."""
        self._events: list[dict[str, Any]] = []
        self._requests: list[str] = []
        self._outcome: Outcome = {}
        self._crashed: set[int] = set()
        self._troubled = False
        self._course: Course | None = None
        self.assignments: dict[int, Assignment] = {}
        self._pace: float | None = None  # seconds of the incumbent's meta-iterations
        self.statuses = [Status.IDLE] * self.config.members
        self.race: list[dict[str, Any]] = []

    @property
    def finished(self) -> str | None:
        """Why the run ended; None while it goes on."""
        return self.progress.finished

    @property
    def seed(self) -> int:
        """The run's, from which all its random numbers come."""
        return int(self.base["seed"])

    def _normal(self, returns: Array) -> Array:
        """Returns in [0, 1]. A task that a policy lost altogether counts as played at random."""
        trial = int(self.incumbent.config["trial_episodes"])
        floor = normalise(np.array(self._reference.random), self._reference)
        return np.where(np.isfinite(returns), normalise(returns / trial, self._reference), floor)

    def _level(self, returns: Array) -> float:
        """Of one meta-iteration: normalised return after adaptation, mean over tasks."""
        return float(self._normal(returns)[-1].mean())

    # --- On disk ---

    def _boundary(self) -> None:
        """What was decided is on disk from here on."""
        self.boundaries += 1
        if not self._troubled:
            self.progress.failures = 0
        self._troubled = False
        self._keep_archive()
        self._saved = self._snapshot()
        self.commit(self._events)
        self._logged += len(self._events)
        self._events = []
        for path, _ in self.store.requests():
            if path.name in self._requests:
                path.unlink(missing_ok=True)
        if self._requests:
            self.store.push()
        self._requests = []
        kept = [folder for record in self.archive.values() for folder in (record.name, record.mean)]
        self.store.prune([*kept, self.incumbent.checkpoint or ""])

    def _keep_archive(self) -> None:
        """Forget the records that nothing needs: the incumbent's, best, peak, last ones and those asked for stay."""
        judged = [name for name, record in self.archive.items() if record.level is not None]
        needed = {self.incumbent.checkpoint, self.progress.best, self.level.peak_name}
        needed |= set(judged[-self.config.keep_checkpoints :]) | {name for _, name in self.store.requests()}
        self.archive = {name: record for name, record in self.archive.items() if name in needed}

    def commit(self, events: list[dict[str, Any]] | None = None) -> None:
        """Write the state of the last boundary, and what happens since then for those who look on."""
        events = events or []
        state = {**self._saved, "events_before": self._logged, "time": time.time(), "live": self._live()}
        self.store.commit(state, events)

    def add_seconds(self, phase: str, seconds: float) -> None:
        """Count seconds, such as the wall time of a call."""
        self.progress.seconds[phase] = self.progress.seconds.get(phase, 0.0) + seconds
        self._saved["progress"]["seconds"] = dict(self.progress.seconds)
        self.commit()

    def _snapshot(self) -> dict[str, Any]:
        """Everything that a resumed run needs, JSON values."""
        return {
            "config": self.config.to_dict(),
            "base": self.base,
            "incumbent": self.incumbent.to_dict(),
            "progress": asdict(self.progress),
            "options": self.options.to_dict(),
            "level": asdict(self.level),
            "archive": {name: asdict(record) for name, record in self.archive.items()},
        }

    def _log(self, phase: Phase, decision: Decision, *, record: Record | None = None, **more: Any) -> None:
        event = {
            "time": time.time(),
            "cycle": self.progress.cycle,
            "phase": phase,
            "decision": decision,
            "iteration": self.incumbent.iteration,
            "env_steps": self.incumbent.env_steps,
            "spent": dict(self.progress.spent),
            **more,
        }
        if record is not None:
            event |= {"checkpoint": record.name, "metrics": record.metrics, "intervals": record.intervals}
        self._events.append(event)

    # --- For those who look on ---

    def _live(self) -> dict[str, Any]:
        """What is going on since the last boundary."""
        member = self.incumbent.member
        reports = [report for report in self._outcome.get(member, []) if report.returns is not None]
        last = reports[-1] if reports else None
        returns = self.incumbent.latest[-1] if self.incumbent.latest else None
        returns = last.returns if last else returns
        known = returns is not None and bool(np.isfinite(returns).any(1).all())
        return {
            "phase": self.progress.phase,
            "race": self.race,
            "iteration": last.iteration if last else self.incumbent.iteration,
            "left": max(self.progress.left - len(reports), 0),
            "returns": [float(np.nanmean(row)) for row in returns] if known and returns is not None else None,
            "spent": self.progress.spent["total"]
            + sum(report.spent + report.assessed for heard in self._outcome.values() for report in heard),
            "pace": self._pace,
            "members": [str(status) for status in self._statuses_now()],
        }

    def _statuses_now(self) -> list[Status]:
        roles = {entry["member"]: Status(entry["status"]) for entry in self.race}
        if not self.race:
            roles[self.incumbent.member] = Status.INCUMBENT
        return [status if status == Status.GONE else roles.get(m, status) for m, status in enumerate(self.statuses)]

    def _show_race(
        self, race: Race, members: list[int], challenges: list[Challenge], rounds: list[int], heard: Outcome
    ) -> None:
        """The race as terminal and page show it, and as the log keeps it; curves are levels by meta-iteration."""
        reasons = {dropped.contender: dropped.reason for dropped in race.dropped}
        self.race = [
            {
                "member": member,
                "status": Status.DROPPED
                if contender in reasons
                else (Status.CHALLENGER if contender else Status.INCUMBENT),
                "option": challenges[contender - 1].option if contender else None,
                "value": challenges[contender - 1].after if contender else None,
                "iterations": len(race.scores[contender]) * rounds[contender],
                "of": race.rule.rounds * rounds[contender],
                "return": None if not race.scores[contender] else finite(race.mean(contender)),
                "z": None if not contender or not race.scores[contender] else finite(race.z(contender, INCUMBENT)),
                "reason": reasons.get(contender, ""),
                "curve": [self._level(r.returns) for r in heard[member] if r.returns is not None],
            }
            for contender, member in enumerate(members)
        ]


def finite(value: float) -> float | None:
    """A number as JSON has it, None where it is infinite."""
    return float(value) if np.isfinite(value) else None
