"""What the incumbent is worth at the end of a stretch, whether it has fallen, and what is handed over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ssm_metarl.algorithms.rollouts import Array
from ssm_metarl.seeds import Branch, seed_for
from ssm_metarl.tuning.incumbent import Course
from ssm_metarl.tuning.metrics import metric_intervals, metrics
from ssm_metarl.tuning.records import Assignment, Decision, Phase, Play, Record
from ssm_metarl.tuning.rules import LEAST_PRICE, STUCK, Rules, gain
from ssm_metarl.tuning.safety import fallen

LEAST_TASKS = 4
"""Held-out tasks that an assessment needs."""

MEAN_TASKS = 40
"""Held-out tasks at most on which the weights and their running mean are compared before they are handed over."""


class Assessing(Rules):
    """The assessments in the course of a run."""

    def _assess(self) -> Course:
        """The five metrics of the incumbent from what it played; held-out tasks while there are steps for them."""
        incumbent, progress = self.incumbent, self.progress
        assert incumbent.checkpoint is not None
        record = self.archive[incumbent.checkpoint]
        known = self.archive.get(progress.best or "")
        plays: dict[str, Array] = {}
        for kinds in (["last validation", "mean validation", "last shifted"], ["last shifted"]):
            tasks = self._affordable_tasks(len(kinds), 0.5 if self.config.budget else 1.0)
            if tasks >= LEAST_TASKS:
                plays = yield from self._play(kinds, min(tasks, self.config.assess_tasks))
                break
        values, curve = self._normal(np.concatenate(incumbent.latest, axis=1)), np.stack(incumbent.curve)
        shifted = self._normal(plays["last shifted"]) if "last shifted" in plays else None
        rng = np.random.default_rng(seed_for(self.seed, Branch.COMPARISON, progress.cycle))
        record.metrics, record.intervals = (
            metrics(values, curve, shifted),
            metric_intervals(values, curve, shifted, rng),
        )
        if shifted is None and known is not None and "generalisation" in known.metrics:
            record.metrics["generalisation"] = known.metrics["generalisation"]
            record.intervals["generalisation"] = known.intervals["generalisation"]
        record.level = record.metrics["average_return"]
        record.handed_over = known.handed_over if known else "last"
        self._choose(record, plays)
        worse = known is not None and significantly_below(record, known)
        price = self._price(curve)
        # Steps that make a policy worse are worth nothing.
        progress.price = LEAST_PRICE if worse else price
        progress.flat = 0 if len(curve) < 2 or gain(curve) else progress.flat + 1
        if progress.flat == 1:
            # What a policy learnt fast with makes it swing later; what it learnt nothing with is too low.
            self.options.turn("outer_lr", 1 if price < STUCK else -1)
        if self.level.suspicious(record.level) and (yield from self._confirmed(record)):
            return
        self.progress.collapses = 0
        self.level.update(record.level, record.name)
        if not worse:  # what is worse trains on, and is not handed over
            progress.best = record.name
        self._log(Phase.STRETCH, Decision.CONTINUED, record=record, level=record.level, curve=_means(curve))

    def _confirmed(self, record: Record) -> Course:
        """Whether the incumbent is significantly worse than the best it was, which it then is again."""
        peak = self.archive.get(self.level.peak_name or "")
        if peak is None or peak.name == record.name:
            return False
        # A suspicion is followed up also where earlier assessments have taken their share of the steps.
        tasks = max(min(self._affordable_tasks(2, 1.0), self.config.assess_tasks), LEAST_TASKS)
        now = (yield from self._play(["last validation"], tasks)).get("last validation")
        before = (yield from self._play(["last validation"], tasks, peak)).get("last validation")
        if now is None or before is None or not fallen(self._normal(now)[-1], self._normal(before)[-1]):
            return False
        reason = f"level {record.level:.3f}, and significantly worse than {peak.name} on the same tasks"
        self._fail(self.incumbent.member, reason)
        self._return_to(peak, reason)
        self.progress.collapses += 1
        if self.progress.collapses >= self.config.max_failures:
            self._end(f"{self.progress.collapses} collapses in a row")
        return True

    def _hand_over(self) -> Course:
        """The end: the best of the incumbent's weights, their running mean, and the best kept before."""
        if (record := self.archive.get(self.incumbent.checkpoint or "")) is not None:
            known = self.archive.get(self.progress.best or "")
            rival = None if known is record else known
            if record.level is None:
                record.metrics, record.intervals = (known.metrics, known.intervals) if known else ({}, {})
                record.level, record.handed_over = self.level.mean, known.handed_over if known else "last"
                self.progress.best = record.name
            policies = 3 if rival and self._affordable_tasks(3, 1.0) >= LEAST_TASKS else 2
            tasks = min(self._affordable_tasks(policies, 1.0), MEAN_TASKS)
            if tasks >= LEAST_TASKS:
                plays = yield from self._play(["last validation", "mean validation"], tasks)
                self._choose(record, plays)
                if rival and plays and policies == 3:
                    own = plays[f"{record.handed_over} validation"]
                    kind = f"{rival.handed_over} validation"
                    others = (yield from self._play([kind], tasks, rival)).get(kind)
                    if others is not None:
                        ahead = np.nanmean(self._normal(others)[-1] - self._normal(own)[-1]) > 0
                        self.progress.best = rival.name if ahead else record.name
            best = self.archive[self.progress.best or record.name]
            self._log(Phase.HAND_OVER, Decision.HANDED_OVER, record=best, weights=best.handed_over)
        self._end("the budget is spent" if not self._affordable() else cycles_words(self.config.cycles))

    def _assignment(self, config: Mapping[str, Any], start: str | None, iterations: int, **more: Any) -> Assignment:
        self.progress.assignments += 1
        return Assignment(
            number=self.progress.assignments, config=dict(config), start=start, iterations=iterations, **more
        )

    def _play(self, kinds: list[str], tasks: int, record: Record | None = None) -> Course:
        """Assessments of the incumbent, or of a record; returns [S+1, V] by kind, nothing where it failed."""
        plays = [Play(policy=kind.split()[0], split=kind.split()[1], tasks=tasks) for kind in kinds]
        config, start = self.incumbent.config, self.incumbent.checkpoint
        if record is not None:
            config, start = record.config, record.name
        member = self._member()
        reports = (yield {member: self._assignment(config, start, 0, plays=plays, seed=self.seed)})[member]
        self._account(assessments=sum(report.assessed for report in reports))
        return {} if reports[-1].failure is not None else reports[-1].plays

    def _choose(self, record: Record, plays: Mapping[str, Array]) -> None:
        """Hand over the running mean of weights where it is no worse, on the same tasks."""
        if {"last validation", "mean validation"} <= set(plays):
            last, mean = (self._normal(plays[f"{kind} validation"])[-1] for kind in ("last", "mean"))
            record.handed_over = "mean" if np.nanmean(mean - last) >= 0 else "last"


def significantly_below(record: Record, other: Record) -> bool:
    """Whether the level of a record is below that of another by more than its interval."""
    interval = record.intervals.get("average_return")
    return interval is not None and other.level is not None and bool(interval[1] < other.level)


def cycles_words(count: int) -> str:
    """What a run says, and its state keeps as `finished`, that ended because it did its cycles."""
    return f"{count} cycle{'s' * (count != 1)}"


def _means(curve: Array) -> list[float]:
    """Of a curve over tasks, one number an iteration."""
    return [float(mean) for mean in curve.mean(1)]
