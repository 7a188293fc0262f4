"""A race between a policy in training and challengers forked from it: who falls behind when, and who wins.

Pure NumPy. All contenders train from one checkpoint on the same tasks with the same random numbers; after a round each
has a training return for every task, and contenders are compared by the differences on the same tasks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ssm_metarl.algorithms.rollouts import Array
from ssm_metarl.checks import check_count, check_number

INCUMBENT = 0
"""Number of the contender that trains with the options as they were."""


@dataclass(frozen=True, kw_only=True)
class RaceRule:
    """When a contender leaves a race, and what a challenger must show to win it.

    The chance that a challenger which changes nothing is accepted, and that a better one is, were measured by
    simulation: see `tests/tuning/test_race.py` and docs/concepts/self-improvement.md.

    Attributes:
        rounds: that are scored; the first round of all is not, in it all contenders play the same.
        drop_first: z by which a contender must be behind the leader to leave after the first scored round.
        drop: the same after later rounds.
        behind: z by which a challenger must be behind the incumbent to leave; after the first scored round, and later.
        win: z by which one of at most two challengers must be ahead of the incumbent to win.
        win_of_more: that it must be further ahead for each challenger beyond two.
        spread: factor of the standard errors over tasks. Policies of equal worth drift apart from iteration to
            iteration, which differences over tasks within an iteration do not show.
        lasting: share of a challenger's lead in the first round that the scored ones must still show on average; the
            incumbent leaves only where it did not shrink at all. In the first round nobody has learnt with other
            options yet: a lead there is the options' own, such as that of a longer inner step. Where it shrinks, the
            policy learns less with them.
    """

    rounds: int = 3
    drop_first: float = 2.5
    drop: float = 2.0
    behind: Sequence[float] = (1.0, 0.3)
    win: float = 1.3
    win_of_more: float = 0.25
    spread: float = 1.5
    lasting: float = 0.6

    def __post_init__(self) -> None:
        check_count("rounds", self.rounds, 1)
        for name in ("drop_first", "drop", "win", "spread"):
            check_number(name, getattr(self, name), above=0.0)
        check_number("win_of_more", self.win_of_more, low=0.0)
        check_number("lasting", self.lasting, low=0.0)
        for value in self.behind:
            check_number("behind", value, low=0.0)


@dataclass(frozen=True)
class Dropped:
    """A contender that left, and why in words."""

    contender: int
    reason: str


class Race:
    """Scores and decisions of one race:

        race = Race(contenders=3, rule)
        for contender in race.left: race.begin(contender, returns)
        for each scored round:
            for contender in race.left: race.add(contender, returns)
            race.decide()                       # drops who is behind
        race.winner()

    Args:
        contenders: how many; number 0 is the incumbent.
        rule: the constants.
        paired: whether a round's scores of all contenders are of the same tasks. They are not where an option changes
            how much an iteration plays, and a round has more iterations for some.
    """

    def __init__(self, contenders: int, rule: RaceRule | None = None, *, paired: bool = True) -> None:
        check_count("contenders", contenders, 2)
        self.rule, self.paired = rule or RaceRule(), paired
        self.scores: list[list[Array]] = [[] for _ in range(contenders)]
        self.first: list[Array | None] = [None] * contenders
        self.left = list(range(contenders))
        self.dropped: list[Dropped] = []
        self.failed = [False] * contenders
        self.gone = [False] * contenders

    @property
    def rounds(self) -> int:
        """Scored rounds that every contender left has finished."""
        return min(len(self.scores[contender]) for contender in self.left)

    @property
    def over(self) -> bool:
        """Whether nothing is left to find out: one is left, the incumbent is beaten, or all rounds are done."""
        beaten = INCUMBENT not in self.left and not self.failed[INCUMBENT]
        return len(self.left) == 1 or beaten or self.rounds >= self.rule.rounds

    def begin(self, contender: int, scores: Array) -> None:
        """Take a contender's first round, in which only its options differ; without it, all count as equal there.

        Args:
            contender: its number.
            scores: [M], as for `add`.
        """
        self.first[contender] = np.asarray(scores, np.float64)

    def add(self, contender: int, scores: Array) -> None:
        """Take a contender's round.

        Args:
            contender: its number.
            scores: [M], returns by task; NaN where all of a task's episodes were dropped.
        """
        self.scores[contender].append(np.asarray(scores, np.float64))

    def fail(self, contender: int, reason: str, gone: bool = False) -> None:
        """Take a contender out for another reason than its returns, such as weights that are not finite.

        Args:
            contender: its number.
            reason: for the log.
            gone: its process is, which says nothing of its options.
        """
        self.failed[contender], self.gone[contender] = True, gone
        self._drop(contender, reason)

    def _drop(self, contender: int, reason: str) -> None:
        self.left.remove(contender)
        self.dropped.append(Dropped(contender, reason))

    def decide(self) -> list[Dropped]:
        """Drop who is behind, once all that are left have finished a round.

        Returns:
            Those that leave now.
        """
        leader, first, before = self.leader(), self.rounds <= 1, len(self.dropped)
        bound = self.rule.drop_first if first else self.rule.drop
        behind = self.rule.behind[0 if first else 1]
        for contender in [other for other in self.left if other != leader]:
            if contender == INCUMBENT and not self.lasts(leader, 1.0):
                continue  # a lead that shrinks is looked at to the end
            z = self.z(leader, contender)
            loses = contender != INCUMBENT and INCUMBENT in self.left and self.z(INCUMBENT, contender) > behind
            if z > bound or loses:
                self._drop(contender, f"{z:.1f} standard errors behind")
        return self.dropped[before:]

    def leader(self) -> int:
        """The contender left with the best mean, of those whose lead lasts; of equal ones the first."""
        means = {each: self.mean(each) for each in self.left if self.lasts(each, self.rule.lasting)}
        return max(means or self.left, key=lambda contender: means.get(contender, -math.inf))

    def winner(self) -> int:
        """Who goes on: the best of those left that are clearly better than the incumbent, else it.

        Where the incumbent has left, the leader.
        """
        if INCUMBENT not in self.left:
            return self.leader()
        ahead = [contender for contender in self.left if contender != INCUMBENT and self.is_ahead(contender)]
        return max(ahead, key=self.mean, default=INCUMBENT)

    def is_ahead(self, contender: int) -> bool:
        """Whether a challenger that did not fail was clearly better than the incumbent while both were in the race."""
        # The best of many is ahead by chance more often than the best of two.
        wanted = self.rule.win + self.rule.win_of_more * max(len(self.scores) - 3, 0)
        if self.failed[contender] or not self.scores[contender] or not self.lasts(contender, self.rule.lasting):
            return False
        return self.z(contender, INCUMBENT) >= wanted

    def lasts(self, contender: int, share: float) -> bool:
        """Whether so much of a challenger's lead of the first round is there in the scored ones that both were in."""
        begun, control = self.first[contender], self.first[INCUMBENT]
        if begun is None or control is None or contender == INCUMBENT:
            return True
        rounds = min(len(self.scores[contender]), len(self.scores[INCUMBENT]))
        leads = [
            _mean(one) - _mean(other)
            for one, other in zip(self.scores[contender][:rounds], self.scores[INCUMBENT][:rounds], strict=True)
        ]
        return not leads or float(np.mean(leads)) >= share * (_mean(begun) - _mean(control))

    def mean(self, contender: int) -> float:
        """Mean return over tasks and rounds; −∞ where there is none."""
        rounds = [_mean(scores) for scores in self.scores[contender] if np.isfinite(scores).any()]
        return float(np.mean(rounds)) if rounds else -math.inf

    def z(self, one: int, other: int) -> float:
        """How many standard errors a contender is ahead of another; ±∞ where only one of them has returns."""
        rounds = min(len(self.scores[one]), len(self.scores[other]))
        return z_score(self.scores[one][:rounds], self.scores[other][:rounds], self.rule.spread, self.paired)


def z_score(one: Sequence[Array], other: Sequence[Array], spread: float = 1.0, paired: bool = True) -> float:
    """Standard errors by which the mean over rounds of some scores is above that of others.

        z = Σ_r mean_i d[r, i] / (spread · sqrt(Σ_r var_i d[r, i] / M_r)),    d = one − other

    Args:
        one, other: returns [M] of each round; NaN entries are left out.
        spread: factor of the standard error.
        paired: entries of equal place belong to the same task; otherwise the variances of both are added.

    Returns:
        0 where all differences are 0 or nothing can be compared; ±∞ where only one side has returns.
    """
    total = variance = 0.0
    for a, b in zip(one, other, strict=True):
        known = np.isfinite(a).any(), np.isfinite(b).any()
        if known[0] != known[1]:
            return math.inf if known[0] else -math.inf
        if paired:
            samples = [a - b]
        else:
            samples = [a, -b]
        for sample in samples:
            finite = sample[np.isfinite(sample)]
            if len(finite):
                total += float(finite.mean())
                variance += float(finite.var(ddof=1)) / len(finite) if len(finite) > 1 else math.inf
    if total == 0.0 or math.isinf(variance):
        return 0.0
    return total / (spread * math.sqrt(variance)) if variance else math.copysign(math.inf, total)


def _mean(scores: Array) -> float:
    return float(np.nanmean(scores)) if np.isfinite(scores).any() else -math.inf


def task_scores(returns: Array, weights: Sequence[float] | None = None) -> Array:
    """A task's one number of an iteration: its returns by adaptation step, weighted as the meta-objective weighs them.

    Args:
        returns: [S+1, M], mean return of each task after 0..S inner steps.
        weights: w_0..w_S, or two for before adaptation and the last step; None: all on the last step.

    Returns:
        [M] float64.
    """
    if not weights:
        return np.asarray(returns[-1], np.float64)
    shares = np.zeros(len(returns))
    if len(weights) == len(returns):
        shares[:] = weights
    else:
        shares[0], shares[-1] = weights[0], weights[-1]
    return np.asarray(np.average(returns, axis=0, weights=shares), np.float64)
