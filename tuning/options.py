"""Options that self-improvement may change: how far a challenger goes, in which direction, and which option is next."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_args

import numpy as np

from ssm_metarl.checks import check_keys, check_number, no_such

WIN_GROWTH, LOSS_POWER, GREATEST, LEAST, FIRST = 1.5, 0.6, 10.0, 1.25, 4.0
"""A factor grows by the first after a win and shrinks to its power by the second after a loss, within bounds."""

DECAY = 0.95
"""What a result counts after another one: what helped at first may not help later."""


@dataclass(frozen=True)
class Option:
    """One option of `TrainConfig` that may move.

    Attributes:
        low, high: bounds.
        kind: "factor" (multiplied), "complement" (1 less the value is multiplied, as for a discount), "count" (a
            factor, rounded to a whole number), "step" (± 1), or "size".
        least: of a count or size, the smallest move.
        plays: what it changes of the first round's play: nothing ("later"), what comes after adaptation ("query"),
            "all", or also how much is played ("amount").
        prior: successes and failures that are believed before anything is known.
        reach: largest factor of one move.
    """

    low: float
    high: float
    kind: str = "factor"
    least: int = 1
    plays: str = "later"
    prior: tuple[float, float] = (1.0, 4.0)
    reach: float = GREATEST


OPTIONS: Mapping[str, Option] = {
    "outer_lr": Option(1e-6, 0.1, prior=(9.0, 1.0), reach=100.0),
    "inner_lr": Option(1e-3, 10.0, plays="query", prior=(4.0, 1.5)),
    "epochs": Option(1, 20, "count", prior=(3.0, 2.0)),
    "entropy_bonus": Option(1e-5, 0.1),
    "clip": Option(0.03, 1.0),
    "gae_lambda": Option(0.0, 1.0, "complement"),
    "discount": Option(0.5, 0.9999, "complement"),
    "episodes": Option(2, 200, "count", plays="amount", reach=2.0),
    "inner_steps": Option(1, 5, "step", plays="amount"),
    "state_dim": Option(2, 256, "size", plays="all", least=2, prior=(2.0, 2.0)),
    "hidden_dim": Option(4, 256, "size", plays="all", least=2, prior=(2.0, 2.0)),
    "num_layers": Option(0, 4, "size", plays="all", prior=(1.0, 3.0)),
}
"""What may move, in the order in which `--evolve` lists it."""

SIZES = tuple(name for name, option in OPTIONS.items() if option.kind == "size")
"""Options that change the policy's arrays."""

OptionName = Literal[
    "outer_lr",
    "inner_lr",
    "epochs",
    "entropy_bonus",
    "clip",
    "gae_lambda",
    "discount",
    "episodes",
    "inner_steps",
    "state_dim",
    "hidden_dim",
    "num_layers",
]
"""The keys of `OPTIONS`, as types."""

CLIPPED = ("epochs", "clip")
"""Options without effect on an algorithm whose objective is not clipped."""


@dataclass
class Tally:
    """What is known of an option: how far to go, where it won last time or seemed better, how often it won and lost."""

    factor: float = FIRST
    direction: int = 0
    lean: int = 0
    wins: float = 0.0
    losses: float = 0.0


@dataclass(frozen=True)
class Challenge:
    """One challenger's change of one option."""

    option: str
    before: Any
    after: Any

    @property
    def direction(self) -> int:
        """1 where the value rises, −1 where it falls."""
        return 1 if self.after > self.before else -1


@dataclass
class Options:
    """The options that may move in a run, and what was learnt of them.

    Attributes:
        names: of the options.
        bounds: own bounds by name; otherwise those of `OPTIONS`.
        tallies: by name.
    """

    names: Sequence[str] = get_args(OptionName)
    bounds: Mapping[str, Sequence[float]] = field(default_factory=dict)
    tallies: dict[str, Tally] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.names:
            if name not in OPTIONS:
                raise ValueError(f"There is {no_such('option that can evolve', name, OPTIONS)}")
        check_keys(self.bounds, set(self.names), "bound")
        for name, bounds in self.bounds.items():
            pair = isinstance(bounds, Sequence) and not isinstance(bounds, str) and len(bounds) == 2
            for value in bounds if pair else ():
                check_number(f"A bound of {name}", value, low=OPTIONS[name].low, high=OPTIONS[name].high)
            if not pair or bounds[0] > bounds[1]:
                raise ValueError(f"The bounds of {name} must be a least and a greatest value, not {bounds!r}.")
        self.tallies = {name: self.tallies.get(name, Tally()) for name in self.names}

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"names": list(self.names), "bounds": dict(self.bounds), "tallies": _dicts(self.tallies)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Options:
        """The inverse of `to_dict`."""
        return cls(values["names"], values["bounds"], {name: Tally(**v) for name, v in values["tallies"].items()})

    def challenges(
        self,
        config: Mapping[str, Any],
        count: int,
        rng: np.random.Generator,
        *,
        sizes: bool,
        fixed: Collection[str] = (),
        urgent: Mapping[str, int] = MappingProxyType({}),
    ) -> list[Challenge]:
        """The changes of the next race: an option both ways, or only the way that won last time.

        The option is drawn by Thompson sampling (Thompson 1933): every option's chance of winning is drawn from its
        Beta posterior, and the greatest one is taken; where it has fewer than `count` changes, the next one is added.

        Args:
            config: the incumbent's options.
            count: challengers at most.
            rng: the only source of chance.
            sizes: whether the policy's sizes may move, too.
            fixed: options that must stay.
            urgent: direction of options that come before all others.

        Returns:
            At most `count` changes; empty where nothing can move. Options that change how much is played, or the
            policy's arrays, race alone.
        """
        moves = {name: self.moves(name, config) for name in self.names if name not in fixed}
        moves = {name: found for name, found in moves.items() if found and (sizes or name not in SIZES)}
        # Drawn for all in one order, so that the draw of one does not depend on which others can move.
        chance = {
            name: float(rng.beta(option.prior[0] + tally.wins, option.prior[1] + tally.losses))
            for name, option, tally in ((name, OPTIONS[name], self.tallies[name]) for name in self.names)
        }
        pressing = {name: self.moves(name, config, urgent[name]) for name in urgent.keys() & moves}
        moves |= {name: found for name, found in pressing.items() if found}
        # What has just won is tried again, farther.
        streaks = {name: bool(self.tallies[name].direction) for name in moves}
        order = sorted(moves, key=lambda name: (not pressing.get(name), not streaks[name], -chance[name]))
        found: list[Challenge] = []
        for name in order:
            lean = self.tallies[name].lean or (1 if rng.random() < 0.5 else -1)
            both = sorted(moves[name], key=lambda challenge: -challenge.direction * lean)
            if not found or _alike(name, found[0].option):
                found += both[: count - len(found)]
            if len(found) >= count:
                break
        return found

    def moves(self, name: str, config: Mapping[str, Any], way: int = 0) -> list[Challenge]:
        """What an option may change to, within its bounds: the way asked for, the one that won last time, or both."""
        option, tally, value = OPTIONS[name], self.tallies[name], config[name]
        low, high = self.bounds.get(name, (option.low, option.high))
        asked = way or tally.direction
        directions = (asked,) if asked else (1, -1)
        found: list[Challenge] = []
        if option.kind in ("count", "step", "size"):
            low, high = math.ceil(low / option.least) * option.least, math.floor(high / option.least) * option.least
        for direction in directions:
            moved = _moved(option, value, direction, tally.factor)
            after = min(max(moved, low), high)
            known = [value, *(challenge.after for challenge in found)]
            if moved != value and all(abs(after - other) > 1e-9 * abs(value) for other in known):
                found.append(Challenge(name, value, after))
        if not found and tally.direction and not way:  # at its bound
            tally.direction = 0
            return self.moves(name, config)
        return found

    def turn(self, name: str, direction: int) -> None:
        """The next race about an option tries this way first; a streak of wins the other way is over."""
        if (tally := self.tallies.get(name)) is not None:
            tally.lean = direction
            tally.direction = direction if tally.direction == direction else 0

    def settle(
        self,
        challenges: Sequence[Challenge],
        winners: Sequence[Challenge],
        ahead: Collection[Challenge] = (),
        better: Collection[Challenge] = (),
        unseen: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Learn from a race: a winner's option goes on the same way and farther, the others' shorter.

        Args:
            challenges: of the race.
            winners: those that the incumbent takes over; empty where none won.
            ahead: others that were as clearly ahead of the incumbent; they are tried again the same way.
            better: of options that raced both ways, the better one; it is the first to be tried again.
            unseen: of options that made no difference which could be seen, the power of the next factor instead.
        """
        for tally in self.tallies.values():
            tally.wins, tally.losses = DECAY * tally.wins, DECAY * tally.losses
        won = {challenge.option: challenge.direction for challenge in winners}
        near = {challenge.option: challenge.direction for challenge in ahead}
        raced: dict[str, list[int]] = {}
        for challenge in challenges:
            raced.setdefault(challenge.option, []).append(challenge.direction)
        for name, ways in raced.items():
            tally = self.tallies[name]
            streak, tally.direction = tally.direction, won.get(name, near.get(name, 0))
            if tally.direction:
                tally.wins += 1.0
                if name in won:
                    tally.factor = min(max(GREATEST, tally.factor), WIN_GROWTH * tally.factor)
            else:
                tally.losses += 1.0
                if len(ways) == 1 and not streak:
                    tally.lean = -ways[0]  # the other way is still to be tried
                farthest = max(GREATEST, OPTIONS[name].reach)
                tally.factor = min(farthest, max(LEAST, tally.factor ** unseen.get(name, LOSS_POWER)))
        for challenge in better:
            self.tallies[challenge.option].lean = challenge.direction


def _alike(one: str, other: str) -> bool:
    """Whether two options can be in one race: rounds of all contenders must play as much, and take as long to show."""
    return one == other or {OPTIONS[one].plays, OPTIONS[other].plays} <= {"later", "query"}


def _moved(option: Option, value: float, direction: int, factor: float) -> float:
    """A value one move away, without regard to bounds."""
    factor = min(factor, option.reach)
    ratio = factor if direction > 0 else 1 / factor
    if option.kind == "step":
        return value + direction
    if option.kind == "complement":  # up: the horizon 1 / (1 − value) grows
        rest = (1 - value) or 0.02 * factor
        return 1 - min(rest / ratio, 1.0) if rest / ratio > 5e-3 or option.high < 1 else 1.0
    if option.kind == "size":
        share = 0.5 * factor / FIRST if direction > 0 else 0.2
        change = max(option.least, round(share * value / option.least) * option.least)
        return value + direction * change
    if option.kind == "count":
        moved = round(value * ratio)
        return moved if moved != value else value + direction
    return (value or option.low * 100) * ratio if value or direction > 0 else value


def playable(name: str, config: Mapping[str, Any], clipped: bool) -> bool:
    """Whether an option has an effect with the others as they are.

    Args:
        name: of the option.
        config: all options.
        clipped: whether the algorithm's objective is, see `Algorithm`.
    """
    if name in ("inner_lr", "inner_steps") and config["inner_steps"] == 0:
        return False  # a policy that learns in its state alone stays one
    if name == "state_dim" and config["num_layers"] == 0:
        return False  # without a block, the size of its state says nothing
    return clipped or name not in CLIPPED


def independent(one: Challenge, other: Challenge) -> bool:
    """Whether two changes may be taken over together: one is of the adaptation, the other of the meta-update."""
    return {OPTIONS[one.option].plays, OPTIONS[other.option].plays} == {"later", "query"}


def changed(config: Mapping[str, Any], challenge: Challenge) -> dict[str, Any]:
    """The options with one changed, and what depends on it."""
    after = {**config, challenge.option: challenge.after}
    weights = config["step_weights"]
    if len(weights) not in (0, 2, after["inner_steps"] + 1):
        after["step_weights"] = [weights[0], sum(weights[1:])]  # before adaptation, and after all of its steps
    return after


def _dicts(tallies: Mapping[str, Tally]) -> dict[str, Any]:
    return {name: asdict(tally) for name, tally in tallies.items()}
