"""The course of a run: races and stretches, one after the other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from ssm_metarl.algorithms.registry import ALGORITHMS
from ssm_metarl.algorithms.rollouts import Array
from ssm_metarl.seeds import Branch, seed_for
from ssm_metarl.tuning.assessment import Assessing
from ssm_metarl.tuning.incumbent import Course, Outcome
from ssm_metarl.tuning.options import OPTIONS, SIZES, Challenge, changed, independent, playable
from ssm_metarl.tuning.race import INCUMBENT, Race, task_scores
from ssm_metarl.tuning.records import Decision, Phase, Report
from ssm_metarl.tuning.rules import SIZE_ROUND, STUCK, cost

STUCK_POWER = 2.0
"""Power of an option's factor where a policy is stuck and the last one made no difference: it was too short."""

LONGEST = 16
"""A stretch is at most as many times as long as the first one."""


class Running(Assessing):
    """The incumbent's races and stretches."""

    def _run(self) -> Course:
        """The whole run: races and stretches until the budget, the cycles or the failures end it."""
        progress = self.progress
        while not self.finished:
            self._apply_requests()
            if progress.left:
                yield from self._stretch()
            elif not self._affordable() or 0 < self.config.cycles <= progress.cycle:
                yield from self._hand_over()
            elif self._races():
                yield from self._race()
            else:
                progress.cycle += not self.config.mutate or len(self._alive()) < 2
                progress.left, progress.phase = min(progress.length, self._affordable()), Phase.STRETCH

    def _stretch(self) -> Course:
        """The incumbent trains alone: a checkpoint after every leg, and an assessment at the end."""
        progress, incumbent = self.progress, self.incumbent
        leg = max(min(progress.left, int(incumbent.config["checkpoint_every"]), self._affordable()), 1)
        name = self._name(incumbent.iteration + leg)
        reports = yield from self._alone(iterations=leg, checkpoint=name)
        if reports[-1].failure is not None:
            return
        self._advance(reports, name)
        progress.left = min(progress.left - leg, self._affordable())
        if not progress.left:
            if progress.phase == Phase.STRETCH:
                yield from self._assess()
            progress.phase = Phase.RACE
            incumbent.curve = []
        self._boundary()

    def _race(self) -> Course:
        """The incumbent and its challengers train side by side for a few iterations; the winner goes on."""
        challenges = self._challenges()
        if not challenges:  # nothing can move
            self.progress.left, self.progress.cycle = self.progress.length, self.progress.cycle + 1
            self.progress.phase = Phase.STRETCH
            return
        configs = [self.incumbent.config, *(changed(self.incumbent.config, challenge) for challenge in challenges)]
        members = [self._member(), *(m for m in self._alive() if m != self._member())][: len(configs)]
        plays = [OPTIONS[challenge.option].plays for challenge in challenges]
        race = Race(len(members), self.config.race, paired="amount" not in plays)
        rounds = _round_lengths(configs, SIZE_ROUND if challenges[0].option in SIZES else 1)
        # Stages of the first iteration that a challenger would play as the incumbent does.
        alike = {"later": int(self.incumbent.config["inner_steps"]) + 1, "query": 1}
        stages = [0, *(alike.get(play, 0) for play in plays)]
        share = f"{self.progress.cycle}" if any(stages) else ""
        if self._longest_race(configs, rounds, stages) > self._affordable():
            self.progress.left, self.progress.cycle = self._affordable(), self.progress.cycle + 1
            self.progress.phase = Phase.STRETCH
            return
        heard: Outcome = {member: [] for member in members}
        self._show_race(race, members, challenges, rounds, heard)
        # In its first round all play alike: where that can be handed on, the incumbent plays it alone at first.
        number, racing = 1, [INCUMBENT] if share else list(race.left)
        while True:
            tasks = {
                members[contender]: self._assignment(
                    config=configs[contender],
                    start=self.incumbent.checkpoint,
                    iterations=rounds[contender] * number,
                    share=share if contender == INCUMBENT else "",
                    take="" if contender == INCUMBENT else share,
                    stages=stages[contender],
                )
                for contender in racing
            }
            outcome = yield tasks
            for contender in racing:
                reports = _news(outcome[members[contender]], heard[members[contender]])
                heard[members[contender]] += reports
                if reports[-1].failure is not None:
                    race.fail(contender, reports[-1].failure, gone=self._is_gone(members[contender]))
                else:
                    scores = self._scores(heard[members[contender]], configs[contender])
                    if race.first[contender] is None:
                        race.begin(contender, np.concatenate(scores[: rounds[contender]]))
                    if number > 1:
                        race.add(contender, np.concatenate(scores[-rounds[contender] :]))
            for contender in [each for each in race.left if self._is_gone(members[each])]:
                race.fail(contender, "its process is gone", gone=True)  # while it had nothing to do
            if race.failed[INCUMBENT] and self._is_gone(members[INCUMBENT]):  # the race is void
                self._account(losers=sum(map(steps_of, heard.values())))
                self.race = []
                return
            if number > 1 and len(race.left) > 1:
                race.decide()
            self._show_race(race, members, challenges, rounds, heard)
            if not race.left or (race.over and (number > 1 or race.left == [INCUMBENT])):
                break
            # Episodes of a policy that learns to survive grow longer, and rounds with them.
            steps = [steps_of(heard[member]) for member in members]
            if number > 1 and sum(steps) - steps[race.leader()] > self._purse():
                break
            number, racing = number + 1, list(race.left)
        yield from self._end_race(race, members, challenges, configs, heard)

    def _end_race(
        self,
        race: Race,
        members: list[int],
        challenges: list[Challenge],
        configs: list[dict[str, Any]],
        heard: Outcome,
    ) -> Course:
        """The winner gets a checkpoint and is the incumbent from now on; what was learnt is kept."""
        progress, incumbent = self.progress, self.incumbent
        winner = race.winner() if race.left else INCUMBENT
        steps = [steps_of(heard[member]) for member in members]
        member, done = members[winner], heard[members[winner]]
        if not race.left:
            self._account(losers=sum(steps))
            self.race = []
            self._retreat(member, done[-1].failure or "")
            return
        name = self._name(done[-1].iteration)
        task = self._assignment(configs[winner], incumbent.checkpoint, iterations=done[-1].iterations, checkpoint=name)
        reports = _news((yield {member: task})[member], done)
        if reports[-1].failure is not None:  # its process is gone: the race is void
            self._account(losers=sum(steps))
            self.race = []
            return
        admitted, losers = progress.price, sum(steps) - steps[winner]
        self._account(losers=losers)
        accepted = self._conclude(race, winner, challenges, heard[members[INCUMBENT]], steps[winner])
        # Not more than it was meant to cost, and less where the incumbent turned out to make little of its own steps.
        progress.spent["charged"] += round(min(admitted, progress.price) * losers)
        if accepted:
            incumbent.path.append([incumbent.iteration, _difference(incumbent.config, configs[winner])])
            incumbent.latest, progress.flat = [], 0
        incumbent.config, incumbent.member = configs[winner], member
        errors = [report.resize_error for report in done if report.resize_error is not None]
        self._log(
            Phase.RACE,
            Decision.ACCEPTED if accepted else Decision.REJECTED,
            changes=[asdict(challenge) for challenge in challenges],
            accepted=[asdict(challenge) for challenge in accepted],
            contenders=self.race,
            losers=losers,
            resize_error=errors[0] if errors else None,
        )
        self._advance([*done, *reports], name)
        for challenge in accepted[1:]:
            config = changed(incumbent.config, challenge)
            incumbent.path.append([incumbent.iteration, _difference(incumbent.config, config)])
            incumbent.config = config
        progress.cycle, progress.phase, self.race = progress.cycle + 1, Phase.STRETCH, []
        # What won may go farther still: the next race comes at once.
        progress.left = 0 if accepted and self._races() else min(progress.length, self._affordable())
        self._boundary()

    def _conclude(
        self, race: Race, winner: int, challenges: list[Challenge], control: list[Report], played: int
    ) -> list[Challenge]:
        """What a race says of the options, of a loser's price, and of the length of the next stretch.

        Args:
            race: that is over.
            winner: its number.
            challenges: of the challengers, from number 1 on.
            control: what the incumbent's member reported.
            played: environment steps of the winner, which are not accounted yet.

        Returns:
            What the incumbent takes over: of the winner, and of another that is ahead and independent of it.
        """
        progress, accepted, near = self.progress, list[Challenge](), list[Challenge]()
        if winner != INCUMBENT:
            won = challenges[winner - 1]
            ahead = [i for i in range(1, len(challenges) + 1) if i != winner and race.is_ahead(i)]
            near = [challenges[i - 1] for i in sorted(ahead, key=lambda i: -race.z(i, INCUMBENT))]
            accepted = [won, *[each for each in near if independent(won, each)][:1]]
        standing = {
            challenge: -math.inf if race.failed[i] else race.z(i, INCUMBENT)
            for i, challenge in enumerate(challenges, 1)
            if not race.gone[i]
        }
        returns = [report.returns for report in control if report.returns is not None]
        if curve := [*self.incumbent.curve, *(self._normal(each)[-1] for each in returns)]:
            progress.price = self._price(np.stack(curve), played)
        unseen = dict.fromkeys(unseen_options(standing), STUCK_POWER if progress.price < STUCK else 1.0)
        self.options.settle(list(standing), accepted, near, better_ways(standing), unseen)
        grown = max(int((1 + progress.price / 2) * progress.length + 0.5), progress.length + 1)
        progress.length = self.config.stretch if accepted else min(grown, LONGEST * self.config.stretch)
        return accepted

    def _alone(self, iterations: int, checkpoint: str | None = None, **more: Any) -> Course:
        """The incumbent does something alone; returns its reports. A failure has been dealt with."""
        incumbent, member = self.incumbent, self._member()
        task = self._assignment(incumbent.config, incumbent.checkpoint, iterations, checkpoint=checkpoint, **more)
        reports = (yield {member: task})[member]
        if reports[-1].failure is not None:
            self._retreat(member, reports[-1].failure)
        return reports

    def _challenges(self) -> list[Challenge]:
        """The next race's changes, as many as there are members for them."""
        config, progress = self.incumbent.config, self.progress
        clipped = ALGORITHMS[config["algorithm"]].clipped
        rng = np.random.default_rng(seed_for(self.seed, Branch.PROPOSAL, progress.cycle))
        fixed = [name for name in self.config.evolve if not playable(name, config, clipped)]
        count = self._challengers()
        # Not race after race: it may hurt for another reason.
        urgent = {"inner_lr": -1} if progress.cycle % 2 == 0 and self._adaptation_hurts() else {}
        options = self.options
        return options.challenges(config, count, rng, sizes=self._sizes(), fixed=fixed, urgent=urgent) if count else []

    def _name(self, iteration: int) -> str:
        """Name of a checkpoint; what a run wrote before it went back is not written over."""
        return f"iteration_{iteration:06d}_{self.progress.assignments:06d}"

    def _scores(self, reports: list[Report], config: Mapping[str, Any]) -> list[Array]:
        """Returns by task of each meta-iteration."""
        returns = [report.returns for report in reports if report.returns is not None]
        return [task_scores(each, config["step_weights"]) for each in returns]


def steps_of(reports: list[Report]) -> int:
    """Environment steps that a member has played."""
    return sum(report.spent + report.assessed for report in reports)


def better_ways(standing: Mapping[Challenge, float]) -> list[Challenge]:
    """Of the options that raced both ways, the change that stood better; none where both stood equal."""
    pairs = [(one, other) for one in standing for other in standing if one.option == other.option]
    return [one for one, other in pairs if standing[one] > standing[other]]


def unseen_options(standing: Mapping[Challenge, float]) -> set[str]:
    """Of the options that raced, those of which no challenger was a standard error ahead or behind."""
    seen = {challenge.option for challenge, z in standing.items() if abs(z) >= 1.0}
    return {challenge.option for challenge in standing} - seen


def _news(reports: list[Report], heard: list[Report]) -> list[Report]:
    """A round's reports without what a member repeats of earlier rounds, because its process died."""
    done = heard[-1].iterations if heard else 0
    for report in reports:
        if report.iterations <= done:
            report.returns, report.spent, report.assessed = None, 0, 0
    return [report for report in reports if report.iterations > done or report.ended or report.failure is not None]


def _difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """The options that changed."""
    return {name: value for name, value in after.items() if value != before[name]}


def _round_lengths(configs: list[dict[str, Any]], least: int) -> list[int]:
    """Meta-iterations of each contender's round, so that all play about as many environment steps."""
    costs = [cost(config) for config in configs]
    return [least * max(round(max(costs) / cost), 1) for cost in costs]
