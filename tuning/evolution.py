"""The population and its decisions, without Ray: who continues, who is forked and mutated, who is rolled back.

A generation is the same number of environment steps for every trial. At its end (the border) children on probation are
judged against their parents, which went on unmutated; then the bottom trials become mutated copies of better ones.
`RecursiveSelfImprovement` carries the decisions out in Ray Tune; `EvolvingTrainer` trains and assesses.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import numpy as np

from ssm_metarl.seeds import Branch, seed_for
from ssm_metarl.tuning.metrics import Assessment, compare, composite, composite_interval, metrics
from ssm_metarl.tuning.mutation import SIZES, Proposal, moves, propose
from ssm_metarl.tuning.population import EvolveConfig, Record, Report, Slot, all_generations
from ssm_metarl.tuning.safety import below_floor, collapsed, keeps
from ssm_metarl.tuning.store import RunStore

RESTORED = 1 << 20
"""In a seed's path: of a trial that got a checkpoint of the past, beside the small numbers of restarts."""

VERDICT_DECAY = 0.95
"""What a verdict on a kind of mutation counts after another verdict."""

RATES = ("inner_lr", "outer_lr", "inner_steps")
"""Options beside the sizes that evolve and are shown."""


class Evolution:
    """The population's state machine. Everything it decides is on disk before anyone acts on it:

        evolution = Evolution(config, base, store)
        ...                                     # a trial trains with evolution.assignment(trial)
        evolution.report(trial, report)         # "continue", "wait" or "restart"
        if evolution.ready():
            evolution.advance()                 # the border: every trial has a new assignment

    Equal seeds and equal reports give equal decisions.

    Args:
        config: the rules.
        base: `TrainConfig` of the first generation as JSON values.
        store: where state, events and checkpoints are.
        start: name of a checkpoint in the archive folder that all trials start from; None: own initial weights.
    """

    def __init__(
        self, config: EvolveConfig, base: Mapping[str, Any], store: RunStore, start: str | None = None
    ) -> None:
        self.config, self.store = config, store
        self.base = dict(base)
        self.seed = int(base["seed"])
        self.generation = 0
        self.archive: dict[str, Record] = {}
        self.best: str | None = None
        self.floor: float | None = None
        self.failures = 0
        self._failures_before = 0  # when this generation began
        self.sole: int | None = None
        self._border = False  # judged, and the next generation has not begun: the run ended here
        self._requests: list[str] = []  # files of requests that this state has carried out
        self.rejected: list[str] = []
        self.verdicts: dict[str, list[float]] = {}
        self.finished: str | None = None
        self.seconds = {"training": 0.0, "assessment": 0.0, "border": 0.0}
        self._events: list[dict[str, Any]] = []
        self._logged = 0
        self.slots = [
            Slot(id=i, config={**base, "seed": self._draw_seed(0, i)}, start=start, parent=start)
            for i in range(config.population)
        ]

    @classmethod
    def resume(cls, store: RunStore, **changes: Any) -> Evolution:
        """The run in `store` as its last decision left it; a generation that was not finished begins again.

        Args:
            changes: options of `EvolveConfig` to change, such as more `generations`.

        Raises:
            ValueError: there is no run, or its state is damaged.
        """
        try:
            self = cls._read(store, store.load(), changes)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{store.folder / 'state.json'} is damaged: {error!r}.") from None
        self._go_on()
        self._finish_commit()
        return self

    @classmethod
    def _read(cls, store: RunStore, state: Mapping[str, Any], changes: Mapping[str, Any]) -> Evolution:
        """The population as `state` describes it."""
        self = cls.__new__(cls)
        known = {f.name for f in fields(Slot)}
        self.store, self.config = store, EvolveConfig(**{**state["config"], **changes})
        self.archive = {name: Record(**{**r, "interval": tuple(r["interval"])}) for name, r in state["archive"].items()}
        self.slots = [
            Slot(**{name: value for name, value in slot.items() if name in known}) for slot in state["trials"]
        ]
        for name in (
            "base",
            "seed",
            "generation",
            "best",
            "floor",
            "failures",
            "sole",
            "rejected",
            "verdicts",
            "seconds",
        ):
            setattr(self, name, state[name])
        self.finished, self._border = state["finished"], state["border"]
        self._failures_before, self._requests = state["failures_before"], state["requests"]
        self._events, self._logged = [], state["events_before"] + len(state["events"])
        return self

    def _go_on(self) -> None:
        """After a resume: leave a border where the run ended, or begin the generation again."""
        stopped_by_failures = self.failures >= self.config.max_failures
        asked = self._apply_requests()
        if asked is not None:
            self.sole = asked.id
        if self._border and 0 < self.config.generations <= self.generation:
            self.finished = all_generations(self.config.generations)
            return
        self.finished = None
        if stopped_by_failures:  # a person looked at it
            self.failures = self._failures_before = 0
        for slot in self.slots:
            self._revive(slot, asked)
            slot.ended, slot.spent = False, 0
        if self._border or asked:
            # Under a new number: nothing may write over the checkpoint that was asked for.
            self.generation += 1
            self._begin_generation(None if self.sole is None else self.slots[self.sole])

    def _revive(self, slot: Slot, asked: Slot | None) -> None:
        """Have a trial back that died with the process of a run that is over; its mutation was never judged."""
        if slot.status == "dead":
            slot.status = "initial" if self.floor is None else "continued"
            if slot.fallback is not None:
                slot.config = slot.fallback
            slot.partner = slot.proposal = slot.fallback = None
            if self.floor is not None:
                slot.budget, slot.restarts = self._budget(slot), 0
                if slot.start not in self.archive:
                    slot.start = slot.checkpoint
        if asked is not None and self.floor is None:
            self.floor = self._record_of(asked).composite
        if self.floor is not None and slot.checkpoint is None:
            assert self.best is not None
            self._take(slot, self.archive[self.best], "restored")
            slot.start, slot.budget = self.best, self._budget(slot)
            slot.config = {**slot.config, "seed": self._draw_seed(self.generation, slot.id, RESTORED)}

    # --- What the scheduler asks ----------------------------------------------------------------------------

    def assignment(self, trial: int) -> dict[str, Any]:
        """What a trial's trainer must know of the evolution, JSON values."""
        slot, config = self.slots[trial], self.config
        start = self.archive.get(slot.start or "")
        history = [] if start is None else [[start.lineage_steps, start.assessment["history"][-1]]]
        return {
            "trial": trial,
            "generation": self.generation,
            "budget": slot.budget,
            "probation": slot.status == "on probation",
            "checkpoints": self.store.archive,
            "seed": self.seed,
            "history": history,
            **{name: getattr(config, name) for name in _VALIDATION},
        }

    def start_path(self, trial: int) -> str | None:
        """The checkpoint folder, a path or a URI, that a trial goes on from; None for initial weights."""
        start = self.slots[trial].start
        return None if start is None else f"{self.store.archive}/{start}"

    @property
    def living(self) -> list[Slot]:
        """Trials that have not died for good."""
        return [slot for slot in self.slots if slot.status != "dead"]

    def report(self, trial: int, report: Report) -> str:
        """Take a trial's report.

        Returns:
            "continue" training; "wait" for the others at the border; "restart" from a new assignment.
        """
        slot = self.slots[trial]
        slot.lifetime_steps += report.spent - slot.spent
        slot.spent, slot.lineage_steps = report.spent, report.lineage_steps
        if report.resize_error is not None:
            slot.resize_error = report.resize_error
        for name, seconds in report.seconds.items():
            self.seconds[name] += seconds
        record = self._record(slot, report) if report.assessment is not None else None
        answer = "continue"
        if report.failure is not None:
            answer = self._fail(slot, report, report.failure)
        elif record is not None and self.floor is not None and below_floor(record.composite, self.floor, self.config):
            reason = f"composite {record.composite:.4f} is more than {self.config.floor_margin:g} under the first's"
            answer = self._fail(slot, report, reason, record)
        elif report.ended:
            assert record is not None
            self.archive[record.name] = record
            slot.checkpoint, slot.ended, answer = record.name, True, "wait"
            slot.carry = slot.budget - report.trained
        self.commit()
        return answer

    def crashed(self, trial: int, reason: str) -> None:
        """A trial's process died and is started again from its assignment."""
        slot = self.slots[trial]
        # A node that is lost takes several trials with it, which is one failure.
        another = slot.restarts > 0 or all(other.restarts == 0 for other in self.slots)
        slot.spent, slot.ended = 0, False
        slot.restarts += 1
        self._count_failure(slot, reason, counts=another)
        self.commit()

    def died(self, trial: int, reason: str) -> None:
        """A trial died too often and does not come back; the others go on without it."""
        slot = self.slots[trial]
        slot.status, slot.ended, slot.partner = "dead", False, None
        self._count_failure(slot, f"it does not come back: {reason}", decision="given up")
        if not self.living:
            self.finished = self.finished or "every trial died"
        self.commit()

    def ready(self) -> bool:
        """Whether all living trials are at the border."""
        return not self.finished and bool(self.living) and all(slot.ended for slot in self.living)

    def advance(self) -> None:
        """The border: judge, remember the best, go back if need be, fork and mutate; then begin the next generation."""
        begin = time.perf_counter()
        if self.floor is None:
            self.floor = min(self._record_of(slot).composite for slot in self.living)
        quiet = self.failures == self._failures_before
        for slot in self.living:
            if slot.status == "on probation":
                self._judge(slot)
                quiet = True
            else:
                slot.status = "continued"
                self._log(slot, "training", decision="continued", reason="", record=self._record_of(slot))
        sole = self._remember_best(quiet)
        sole = self._apply_requests() or sole
        self.sole = None if sole is None else sole.id
        for slot in self.living:
            slot.proposal = slot.fallback = slot.partner = None
        if self.config.generations and self.generation >= self.config.generations:
            self.finished = self.finished or all_generations(self.config.generations)
        self._border = bool(self.finished)
        if not self.finished:
            self.generation += 1
            self._begin_generation(sole)
        self._keep_archive()
        self.seconds["border"] += time.perf_counter() - begin
        self._finish_commit()
        self.store.prune(self.archive)

    # --- Decisions ------------------------------------------------------------------------------------------

    def _judge(self, child: Slot) -> None:
        """Keep a child, or give its place to its parent as it is now."""
        assert child.proposal is not None
        assert child.partner is not None
        proposal, partner = Proposal(**child.proposal), self.slots[child.partner]
        record, compared = self._record_of(child), False
        # Since the fork; a trial that had to begin again has lost what it trained before.
        steps, beside = (slot.lineage_steps - self.archive[proposal.parent].lineage_steps for slot in (child, partner))
        if partner.status == "dead":
            keep, reason = False, "the trial that continued its parent died"
        elif abs(steps - beside) > self.config.step_tolerance * self.config.generation_steps:
            keep, reason = False, f"it trained {steps:,} steps and its parent {beside:,}: no comparison"
        else:
            compared = True
            rng = np.random.default_rng(seed_for(self.seed, Branch.COMPARISON, self.generation, child.id))
            theirs = Assessment.from_dict(self._record_of(partner).assessment)
            level = self.config.keep_level
            keep, reason = keeps(compare(Assessment.from_dict(record.assessment), theirs, rng, level), self.config)
        self._log(
            child,
            "probation",
            before=proposal.before,
            after=proposal.after,
            decision="kept" if keep else "rolled back",
            reason=reason,
            record=record,
        )
        if compared:  # otherwise nothing is known of the mutation
            self._learn(proposal, keep)
        if keep:
            child.status = "kept"
            return
        if compared:
            self.rejected.append(proposal.key)
        back = self.archive[proposal.parent] if partner.status == "dead" else self._record_of(partner)
        self._take(child, back, "rolled back")

    def _learn(self, proposal: Proposal, kept: bool) -> None:
        """Count a verdict for the moves that it was about; what was good before may not be now, so that counts fade."""
        for verdict in self.verdicts.values():
            verdict[:] = [VERDICT_DECAY * count for count in verdict]
        for move in moves(proposal.before, proposal.after):
            self.verdicts.setdefault(move, [0.0, 0.0])[0 if kept else 1] += 1.0

    def _fail(self, slot: Slot, report: Report, reason: str, record: Record | None = None) -> str:
        """A trial cannot go on as it is: back to where this generation began, at once."""
        rolled_back = slot.status == "on probation"
        self._count_failure(slot, reason, record, "rolled back" if rolled_back else "restarted")
        if rolled_back:
            assert slot.proposal is not None
            assert slot.fallback is not None
            proposal = Proposal(**slot.proposal)
            self.rejected.append(proposal.key)
            self._learn(proposal, False)
            slot.config, slot.status = slot.fallback, "rolled back"
            slot.partner = slot.proposal = slot.fallback = None
        slot.restarts += 1
        # With the same tasks it would end the same way.
        slot.config = {**slot.config, "seed": self._draw_seed(self.generation, slot.id, slot.restarts)}
        slot.budget = max(slot.budget - report.trained, 0)
        slot.spent, slot.ended = 0, False
        start = self.archive.get(slot.start or "")
        slot.lineage_steps = start.lineage_steps if start else 0
        return "restart"

    def _count_failure(
        self,
        slot: Slot,
        reason: str,
        record: Record | None = None,
        decision: str = "restarted",
        *,
        counts: bool = True,
    ) -> None:
        self.failures += counts
        proposal = slot.proposal or {"before": {}, "after": {}}
        self._log(
            slot,
            "failure",
            before=proposal["before"],
            after=proposal["after"],
            decision=decision,
            reason=reason,
            record=record,
        )
        if self.failures >= self.config.max_failures:
            failures = f"{self.failures} failure{'s' * (self.failures > 1)} in a row"
            self.finished = f"emergency stop: {failures}, the last: {reason}"
            self._log(slot, "stop", decision="stopped", reason=self.finished)

    def _remember_best(self, quiet: bool) -> Slot | None:
        """Update the best ever; return the trial that got it back if the whole population fell below it.

        Args:
            quiet: a proposal was judged, or nothing failed: unless the population fell, a row of failures has ended.
        """
        ranked = sorted(self.living, key=lambda slot: (self._record_of(slot).composite, -slot.id))
        top, worst = self._record_of(ranked[-1]), ranked[0]
        best = self.archive[self.best] if self.best else None
        if best is None or not collapsed(top.composite, best.composite, self.config):
            if best is None or top.composite > best.composite:
                self.best = top.name
            if quiet:
                self.failures = 0
            return None
        reason = f"the whole population is more than {self.config.collapse_margin:g} below the best ever"
        self._count_failure(worst, reason, best, "restored")
        self._restore(worst, best)
        return worst

    def _apply_requests(self) -> Slot | None:
        """Carry out manual rollbacks; return the trial that got the last one's checkpoint."""
        chosen = None
        for path, name in self.store.requests():
            if path.name in self._requests:
                continue
            self._requests.append(path.name)
            record, trial = self.archive.get(name), chosen or min(self.living or self.slots, key=self._composite)
            if record is None:
                reason = f"the run keeps no checkpoint {name!r}"
                self._log(trial, "request", decision="refused", reason=reason)
                continue
            chosen = trial
            self._log(chosen, "request", decision="restored", reason="asked for by a person", record=record)
            self._restore(chosen, record)
            self.best = name
        return chosen

    def _restore(self, slot: Slot, record: Record) -> None:
        """Give a trial a checkpoint of the past, and tasks other than those that it went on with then."""
        self._take(slot, record, "restored")
        slot.config = {**slot.config, "seed": self._draw_seed(self.generation, slot.id, RESTORED)}

    def _begin_generation(self, sole: Slot | None) -> None:
        """Let the survivors go on and make the other trials children of theirs."""
        self._border, self.sole, self._failures_before = False, None, self.failures
        for slot in self.living:
            slot.budget, slot.spent, slot.ended, slot.restarts = self._budget(slot), 0, False, 0
            slot.start = self._name(slot)
            slot.lineage_steps = self._record_of(slot).lineage_steps
        survivors = [sole] if sole else self._survivors()
        for child in [slot for slot in self.living if slot not in survivors]:
            rng = np.random.default_rng(seed_for(self.seed, Branch.PARENT, self.generation, child.id))
            self._fork(child, survivors[int(rng.integers(len(survivors)))])

    def _budget(self, slot: Slot) -> int:
        """Steps of the next generation: what the last one was too long or too short by evens out."""
        steps = self.config.generation_steps
        return steps + min(max(slot.carry, -steps // 2), steps // 2)

    def _survivors(self) -> list[Slot]:
        """The trials that go on unmutated: the better ones, without copies of another's policy."""
        distinct: dict[str, Slot] = {}
        for slot in sorted(self.living, key=lambda slot: (slot.status == "rolled back", slot.id)):
            distinct.setdefault(self._name(slot), slot)
        ranked = sorted(distinct.values(), key=lambda slot: (-self._composite(slot), slot.id))
        return ranked[: self.config.survivors or (len(self.living) + 1) // 2]

    def _fork(self, child: Slot, parent: Slot) -> None:
        """Make `child` a copy of `parent`, mutated, on probation beside it."""
        record = self._record_of(parent)
        self._take(child, record, "copied")
        child.parent = child.start = record.name
        child.budget = parent.budget
        fallback = dict(child.config)
        child.config = {**fallback, "seed": self._draw_seed(self.generation, child.id)}
        rng = np.random.default_rng(seed_for(self.seed, Branch.PROPOSAL, self.generation, child.id))
        under_way = [Proposal(**slot.proposal).key for slot in self.living if slot.proposal and slot is not child]
        proposal = None
        if self.config.mutate:
            proposal = propose(record.name, fallback, rng, {*self.rejected, *under_way}, self.verdicts)
        if proposal is None:
            reason = "no mutation" if not self.config.mutate else "every mutation of this parent was rejected"
            self._log(child, "mutation", decision="copied", reason=reason, record=record)
            return
        child.config.update(proposal.after)
        child.config["step_weights"] = _fit_weights(child.config["step_weights"], child.config["inner_steps"])
        child.status, child.partner = "on probation", parent.id
        child.proposal, child.fallback = asdict(proposal), fallback
        self._log(
            child,
            "mutation",
            before=proposal.before,
            after=proposal.after,
            decision="on probation",
            reason=f"beside trial {parent.id}",
            record=record,
        )

    def _take(self, slot: Slot, record: Record, status: str) -> None:
        """Give a trial the policy and the config of a record."""
        slot.config, slot.checkpoint, slot.status = dict(record.config), record.name, status
        slot.lineage_steps, slot.partner, slot.proposal, slot.fallback = record.lineage_steps, None, None, None
        slot.resize_error = None

    # --- Bookkeeping ----------------------------------------------------------------------------------------

    def commit(self) -> None:
        """Write the state and the events since the last time."""
        self.store.commit(self.state(), self._events)
        self._logged += len(self._events)
        self._events = []

    def _finish_commit(self) -> None:
        """Write the state with the requests that it carries out; only then delete these."""
        self.commit()
        for path, _ in self.store.requests():
            if path.name in self._requests:
                path.unlink(missing_ok=True)
        if self._requests:
            self.store.push()
        self._requests = []

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run, a terminal or a page needs, JSON values."""
        return {
            "time": time.time(),
            "generation": self.generation,
            "best": self.best,
            "floor": self.floor,
            "failures": self.failures,
            "failures_before": self._failures_before,
            "sole": self.sole,
            "border": self._border,
            "requests": self._requests,
            "finished": self.finished,
            "seed": self.seed,
            "base": self.base,
            "config": asdict(self.config),
            "rejected": self.rejected,
            "verdicts": self.verdicts,
            "seconds": self.seconds,
            "events_before": self._logged,
            "trials": [self._view(slot) for slot in self.slots],
            "archive": {name: asdict(record) for name, record in self.archive.items()},
        }

    def _view(self, slot: Slot) -> dict[str, Any]:
        """A trial as others read it: sizes, learning rates and figures beside the slot's own fields."""
        record = self.archive.get(slot.checkpoint or "")
        return {
            **asdict(slot),
            "sizes": {name: slot.config[name] for name in SIZES},
            "learning_rates": {name: slot.config[name] for name in RATES},
            "metrics": record.metrics if record else {},
            "composite": record.composite if record else None,
        }

    def _record(self, slot: Slot, report: Report) -> Record:
        assert report.assessment is not None
        assessment = Assessment.from_dict(report.assessment)
        values = metrics(assessment)
        rng = np.random.default_rng(seed_for(self.seed, Branch.COMPARISON, self.generation, slot.id, 1))
        return Record(
            name=report.checkpoint or "",
            generation=self.generation,
            trial=slot.id,
            config=dict(slot.config),
            lineage_steps=report.lineage_steps,
            assessment=report.assessment,
            metrics=values,
            composite=composite(values),
            interval=composite_interval(assessment, rng),
        )

    def _log(
        self,
        slot: Slot,
        kind: str,
        *,
        decision: str,
        reason: str,
        before: Mapping[str, Any] | None = None,
        after: Mapping[str, Any] | None = None,
        record: Record | None = None,
    ) -> None:
        self._events.append(
            {
                "time": time.time(),
                "generation": self.generation,
                "trial": slot.id,
                "parent": slot.parent,
                "start": slot.start,
                "kind": kind,
                "before": dict(before or {}),
                "after": dict(after or {}),
                "metrics": record.metrics if record else {},
                "composite": record.composite if record else None,
                "interval": list(record.interval) if record else None,
                "decision": decision,
                "reason": reason,
                "checkpoint": record.name if record and record.name else slot.checkpoint,
                "resize_error": slot.resize_error if after else None,
                "lineage_steps": slot.lineage_steps,
                "lifetime_steps": slot.lifetime_steps,
            }
        )

    def _keep_archive(self) -> None:
        """Forget the records that nothing refers to: at most 2P + 1 + `keep_generations` stay, on disk too."""
        needed = {slot.start for slot in self.slots} | {slot.checkpoint for slot in self.slots} | {self.best}
        champions: dict[int, Record] = {}
        for record in self.archive.values():
            other = champions.get(record.generation)
            if other is None or record.composite > other.composite:
                champions[record.generation] = record
        last = sorted(champions)[-self.config.keep_generations :] if self.config.keep_generations else []
        needed |= {champions[generation].name for generation in last}
        self.archive = {name: record for name, record in self.archive.items() if name in needed}
        self.rejected = [key for key in self.rejected if key.split(":")[0] in self.archive]

    def _name(self, slot: Slot) -> str:
        assert slot.checkpoint is not None
        return slot.checkpoint

    def _record_of(self, slot: Slot) -> Record:
        return self.archive[self._name(slot)]

    def _composite(self, slot: Slot) -> float:
        record = self.archive.get(slot.checkpoint or "")
        return record.composite if record else -math.inf

    def _draw_seed(self, *path: int) -> int:
        """A task seed of a trial's own."""
        return int(seed_for(self.seed, Branch.CHILD_SEED, *path).generate_state(1)[0])


_VALIDATION = ("validation_tasks", "validation_episodes", "validation_steps")


def _fit_weights(weights: Sequence[float], inner_steps: int) -> list[float]:
    """Step weights that do for another number of inner steps: before adaptation, and after all of them."""
    if len(weights) in (0, 2, inner_steps + 1):
        return list(weights)
    return [weights[0], sum(weights[1:])]
