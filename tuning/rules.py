"""What becomes of the incumbent between races and stretches, and what the budget still has room for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ssm_metarl.algorithms.rollouts import Array
from ssm_metarl.seeds import Branch, seed_for
from ssm_metarl.tuning.config import EvolveConfig
from ssm_metarl.tuning.incumbent import LATEST
from ssm_metarl.tuning.ledger import Ledger
from ssm_metarl.tuning.metrics import metric_intervals, metrics
from ssm_metarl.tuning.options import OPTIONS
from ssm_metarl.tuning.race import z_score
from ssm_metarl.tuning.records import START, Decision, Phase, Record, Report, Status

ENDLESS = 60
"""Without a budget, what losers may cost is a share of the steps so far, or of as many meta-iterations at first."""

SIZE_ROUND = 2
"""Meta-iterations of a round in a race about sizes, whose effect takes longer to show."""

ROUNDS = 3
"""Meta-iterations that a challenger costs a race, as a rule."""

HURT = 3.0
"""Standard errors by which returns after adaptation are below those before where the inner step comes first."""

LEAST_PRICE = 0.5
"""Least share of a loser's step that counts as one."""

STUCK = 0.6
"""A policy is stuck that would not reach this level by itself; without an oracle the random player has ½."""

FLAT = 2
"""Stretches without an improvement after which the policy's sizes may move, too."""


class Rules(Ledger):
    """A run's ledger with the decisions that need no race: going on, going back, ending."""

    def _advance(self, reports: list[Report], name: str) -> None:
        """The incumbent is where its member's reports say, with a checkpoint."""
        incumbent = self.incumbent
        if incumbent.checkpoint == START and START not in self.archive and reports[0].returns is not None:
            self._judge_start(reports[0].returns)
        self._account(incumbent=sum(report.spent + report.assessed for report in reports))
        for report in reports:
            if report.returns is not None:
                incumbent.latest = [*incumbent.latest[1 - LATEST :], report.returns]
                incumbent.curve.append(self._normal(report.returns)[-1])
        if done := reports[-1].iteration - incumbent.iteration:
            incumbent.iteration_steps = (reports[-1].env_steps - incumbent.env_steps) / done
        incumbent.iteration, incumbent.env_steps = reports[-1].iteration, reports[-1].env_steps
        incumbent.checkpoint = name
        known = self.archive.get(self.progress.best or "")
        self.archive[name] = Record(
            name=name,
            iteration=incumbent.iteration,
            env_steps=incumbent.env_steps,
            cycle=self.progress.cycle,
            config=incumbent.config,
            path=[list(change) for change in incumbent.path],
            handed_over=known.handed_over if known else "last",
        )
        self.progress.best = self.progress.best or name

    def _judge_start(self, returns: Array) -> None:
        """The checkpoint that the run started from is the first record: the first iteration was played with it.

        Args:
            returns: [S+1, M] of that iteration.
        """
        incumbent, values = self.incumbent, self._normal(returns)
        rng = np.random.default_rng(seed_for(self.seed, Branch.COMPARISON, 0))
        found, curve = metrics(values, values[-1:]), values[-1:]
        self.archive[START] = Record(
            name=START,
            iteration=incumbent.iteration,
            env_steps=incumbent.env_steps,
            cycle=0,
            config=incumbent.config,
            path=[list(change) for change in incumbent.path],
            level=found["average_return"],
            metrics=found,
            intervals=metric_intervals(values, curve, None, rng),
        )
        self.level.update(found["average_return"], START)
        self.progress.best = START

    def _retreat(self, member: int, reason: str) -> None:
        """The incumbent cannot go on: again from its checkpoint, with other random numbers and half the rate."""
        if self._is_gone(member):  # which was said, and counted, at once
            return
        self._fail(member, reason)
        if self.finished:
            return
        incumbent = self.incumbent
        node = seed_for(self.seed, Branch.CHILD_SEED, self.progress.assignments)
        low = self.config.bounds.get("outer_lr", (OPTIONS["outer_lr"].low,))[0]
        rate = float(incumbent.config["outer_lr"])
        changes = {"seed": int(node.generate_state(1)[0]), "outer_lr": max(rate / 2, min(low, rate))}
        incumbent.config = {**incumbent.config, **changes}
        incumbent.path.append([incumbent.iteration, changes])
        self._boundary()

    def _return_to(self, record: Record, reason: str) -> None:
        """Make an earlier checkpoint the incumbent, with random numbers of its own from there on."""
        incumbent = self.incumbent
        seed = {"seed": int(seed_for(self.seed, Branch.CHILD_SEED, self.progress.assignments).generate_state(1)[0])}
        incumbent.config, incumbent.checkpoint = {**record.config, **seed}, record.name
        incumbent.iteration, incumbent.env_steps = record.iteration, record.env_steps
        incumbent.path, incumbent.latest = [*(list(change) for change in record.path), [record.iteration, seed]], []
        self.progress.best = record.name
        self._log(Phase.STRETCH, Decision.ROLLED_BACK, record=record, reason=reason)

    def _apply_requests(self) -> None:
        """Go back to the checkpoint that a person asked for last."""
        for path, name in self.store.requests():
            if path.name in self._requests:
                continue
            self._requests.append(path.name)
            if (record := self.archive.get(name)) is None:
                reason = f"the run keeps no checkpoint {name!r} any more"
                self._log(self.progress.phase, Decision.REFUSED, reason=reason)
                self._boundary()
            else:
                self._return_to(record, "asked for")
                self.progress.left = self.progress.left or self.progress.length
                self.progress.phase, self.incumbent.curve = Phase.STRETCH, []
                self._boundary()

    def _fail(self, member: int, reason: str, counts: bool = True) -> None:
        self._troubled = True
        self.progress.failures += counts
        self._log(self.progress.phase, Decision.FAILED, member=member, reason=reason)
        if self.progress.failures >= self.config.max_failures:
            self._end(f"{self.progress.failures} failures in a row")

    def _end(self, why: str) -> None:
        """Nothing comes after this."""
        if not self.finished:
            self.progress.finished = why
            self.progress.phase = Phase.HAND_OVER
            self.assignments = {}
            self._boundary()

    def _is_gone(self, member: int) -> bool:
        return self.statuses[member] == Status.GONE

    def _alive(self) -> list[int]:
        return [member for member in range(len(self.statuses)) if not self._is_gone(member)]

    def _member(self) -> int:
        """Who trains the incumbent: its own member, or another one where that is gone."""
        if self._is_gone(self.incumbent.member):
            self.incumbent.member = self._alive()[0]
        return self.incumbent.member

    # --- Environment steps ---

    def _iteration_steps(self) -> float:
        """Environment steps of a meta-iteration of the incumbent, as they were lately; 0: not known."""
        return self.incumbent.iteration_steps

    def _affordable(self) -> int:
        """Meta-iterations that the budget still has room for, what assessments may take set aside."""
        if not self.config.budget:
            return 1 << 30
        spent = self.progress.spent
        left = self.config.budget * (1 - self.config.assess_share) - (spent["total"] - spent["assessments"])
        each = self._iteration_steps()
        return max(int(left / each + 0.5), 0) if each else int(left > 0) * (1 << 30)

    def _affordable_tasks(self, policies: int, share: float) -> int:
        """Held-out tasks on which as many policies can be played with a share of what assessments may take."""
        config, spent = self.incumbent.config, self.progress.spent
        whole = self.config.budget if share == 1.0 and self.config.budget else spent["total"]
        purse = self.config.assess_share * share * whole - spent["assessments"]
        each = self._iteration_steps() / config["meta_batch"]
        return max(int(purse / (policies * each)), 0) if each else 0

    def _account(self, *, losers: int = 0, assessments: int = 0, incumbent: int = 0) -> None:
        spent = self.progress.spent
        spent["losers"] += losers
        spent["assessments"] += assessments
        spent["total"] += losers + assessments + incumbent

    def _races(self) -> bool:
        """Whether there is to be another race, and there are steps for it and for the winner to go on."""
        config = self.config
        if not config.mutate or 0 < config.cycles <= self.progress.cycle or len(self._alive()) < 2:
            return False
        challengers = self._challengers()
        iterations = config.race.rounds + 1 + challengers + config.stretch
        return self._affordable() > iterations and challengers > 0

    def _challengers(self) -> int:
        """Of the next race, as many as what losers may still cost allows; 0: it allows no race.

        The first race looks at the most promising options in both directions, later ones at fewer.
        """
        config, each = self.config, ROUNDS * self._iteration_steps()
        wanted = config.proposals if not self.progress.cycle else (config.proposals + 1) // 2
        wanted = min(wanted, len(self._alive()) - 1)
        return max(min(wanted, int(self._purse() / each)), 0) if each else wanted

    def _purse(self) -> float:
        """Environment steps that losers may still play."""
        spent = self.progress.spent
        whole = self.config.budget or max(spent["total"], ENDLESS * self._iteration_steps())
        return (self.config.losers_share * whole - spent["charged"]) / self.progress.price

    def _price(self, curve: Array, played: int = 0) -> float:
        """Share of a loser's step that counts: the level which the incumbent would reach by itself at its pace.

        What it would have made of those steps is little where it no longer learns far below what is possible.

        Args:
            curve: [I, M], its normalised returns after adaptation in the last meta-iterations.
            played: environment steps of the incumbent-to-be that are not accounted yet.
        """
        each = self._iteration_steps()
        left = max(self._affordable() - played / each, 0) if self.config.budget and each else ENDLESS
        # Learning slows down: half of its pace is what lasts.
        reached = float(curve[-LATEST:].mean()) + gain(curve) / 2 * left
        return min(max(reached, LEAST_PRICE), 1.0)

    def _adaptation_hurts(self) -> bool:
        """Whether the policy lately played clearly worse after adaptation than before: its inner step is too long."""
        latest = self.incumbent.latest
        return z_score([each[-1] for each in latest], [each[0] for each in latest]) < -HURT

    def _sizes(self) -> bool:
        """Whether the policy's sizes may move: the last stretches were flat, and there are steps for a longer race."""
        longer = SIZE_ROUND * (self.config.race.rounds + 1) * self.config.members
        return self.progress.flat >= FLAT and self._affordable() > longer

    def _longest_race(self, configs: list[dict[str, Any]], rounds: list[int], stages: list[int]) -> float:
        """Meta-iterations of the incumbent that a race costs where nobody leaves it."""
        costs = [count * cost(config) / cost(configs[0]) for count, config in zip(rounds, configs)]
        alike = [each > int(configs[0]["inner_steps"]) for each in stages]  # who takes over the whole first iteration
        return sum(cost * (self.config.race.rounds + 1) for cost in costs) - sum(map(int, alike))


def gain(curve: Array) -> float:
    """What a meta-iteration brought lately; 0 where that is within the noise.

    Args:
        curve: [I, M], normalised returns.
    """
    if len(curve) < 2:
        return 0.0
    lately = curve[-2 * LATEST :]
    before, after = (half.ravel() for half in np.array_split(lately, 2))
    better = z_score([after], [before], paired=False) >= 1.0
    return float(after.mean() - before.mean()) / (len(lately) / 2) if better else 0.0


def least_budget(rules: EvolveConfig, iteration_steps: float) -> float:
    """Environment steps with which a run has its first race, also where a loser's step counts in full.

    Args:
        rules: of the run.
        iteration_steps: environment steps of a meta-iteration.

    Returns:
        ∞ where there is nothing for losers, or all is for assessments.
    """
    training = 1 - rules.assess_share
    if not (rules.losers_share and training):
        return math.inf
    iterations = 0
    for challengers in range(1, rules.proposals + 1):
        needed = max(rules.race.rounds + 2 + challengers + rules.stretch, (1 + challengers) * (rules.race.rounds + 1))
        # `_challengers`, `_affordable`, `_races` and `_longest_race` the other way round.
        iterations = math.ceil(
            max(ROUNDS * challengers / rules.losers_share, (rules.warm_up + needed - 0.5) / training) - 1e-9
        )
        if int(rules.losers_share * iterations / ROUNDS + 1e-9) <= challengers:
            break
    return iterations * iteration_steps


def cost(config: Mapping[str, Any]) -> int:
    """Episodes of a meta-iteration."""
    return int(config["meta_batch"] * config["episodes"] * (config["inner_steps"] + 1))
