"""The run's decisions, without Ray: one incumbent, races against challengers forked from it, stretches in between.

`RecursiveSelfImprovement` carries the assignments out in Ray Tune; `MemberTrainer` trains and plays. What a population
knows and saves is in `ledger.py`, what it decides in `rules.py`, `assessment.py` and `course.py`.
"""

from __future__ import annotations

from ssm_metarl.tuning.course import Running
from ssm_metarl.tuning.incumbent import Outcome
from ssm_metarl.tuning.records import Report, Status


class Population(Running):
    """The state machine. Everything it decides is on disk before anyone acts on it:

        population = Population(config, base, reference, store)
        population.begin()
        ...                                     # a member carries out population.assignments[member]
        population.report(member, report)       # until population.finished

    Equal seeds and equal reports give equal decisions, whatever the order in which members report. What is saved is
    the state at the incumbent's last checkpoint; a resumed run repeats what came after it.

    Args:
        config: the rules.
        base: `TrainConfig` of the first incumbent, flat JSON values.
        reference: the family's, by which returns are normalised.
        store: where state, events and checkpoints are.
        start: name of the checkpoint in the archive that the incumbent starts from; None: initial weights.
    """

    def begin(self) -> None:
        """Make the first assignments, of a new run or of one that was read from disk."""
        self._course = self._run()
        self._go_on(None)

    def report(self, member: int, report: Report) -> None:
        """Take a member's report. What it repeats, because it had to start again, is known already."""
        assignment = self.assignments.get(member)
        known = assignment is not None and report.number == assignment.number
        if self.finished or not known or self.statuses[member] == Status.GONE:
            return
        heard = self._outcome.setdefault(member, [])
        repeated = bool(heard) and report.iterations <= heard[-1].iterations
        if repeated and not report.ended and report.failure is None:
            return
        if repeated and report.returns is not None:
            report.returns, report.spent = None, 0
        heard.append(report)
        if report.returns is not None and member == self.incumbent.member:
            seconds = sum(report.seconds.values())
            self._pace = seconds if self._pace is None else 0.7 * self._pace + 0.3 * seconds
        for name, seconds in report.seconds.items():
            self.progress.seconds[name] = self.progress.seconds.get(name, 0.0) + seconds
        self._settle()
        self.commit()

    def crashed(self, member: int, reason: str) -> None:
        """A member's process died; it is started again and repeats its assignment."""
        if self.finished or member not in self.assignments:
            return
        # A node that is lost takes several members with it, which is one failure.
        counts = not self._crashed or member in self._crashed
        self._crashed.add(member)
        self._fail(member, reason, counts)
        self.commit()

    def gone(self, member: int, reason: str) -> None:
        """A member does not come back; what it was doing is done by another, or not at all."""
        if self.finished or self.statuses[member] == Status.GONE:
            return
        self.statuses[member] = Status.GONE
        self._fail(member, f"it does not come back: {reason}", counts=member not in self._crashed)
        if not self._alive():
            self._end("every member is gone")
        elif not self.finished and member in self.assignments:
            number = self.assignments[member].number
            self._outcome.setdefault(member, []).append(Report(number=number, failure=reason))
            self._settle()
        self.commit()

    def _settle(self) -> None:
        """Decide, once every assignment has ended."""
        heard = [self._outcome.get(member, []) for member in self.assignments]
        if all(reports and (reports[-1].ended or reports[-1].failure is not None) for reports in heard):
            outcome, self._outcome = self._outcome, {}
            self._go_on(outcome)

    def _go_on(self, outcome: Outcome | None) -> None:
        assert self._course is not None
        self._crashed.clear()
        try:
            self.assignments = self._course.send(outcome) if outcome is not None else next(self._course)
        except StopIteration:
            self.assignments = {}
