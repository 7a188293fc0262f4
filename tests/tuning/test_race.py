"""Who leaves a race and who wins it: by hand, and how often by chance in simulated races."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import seeds
from ssm_metarl.algorithms.rollouts import Array
from ssm_metarl.tuning.race import INCUMBENT, Dropped, Race, RaceRule, task_scores, z_score

SPREAD, OTHER_SPREAD = np.array([-1.0, 1.0, -1.0, 1.0]), np.array([1.0, 1.0, -1.0, -1.0])
"""Of variance 4/3 over four tasks: a mean over tasks has a standard error of sqrt(1/3)."""

STRICT = RaceRule(rounds=2, drop_first=3.0, drop=2.0, behind=(1.0, 0.5), win=1.0, spread=1.0)


def ahead(z: float, spread: Array = SPREAD) -> Array:
    """Scores that are so many standard errors ahead of zeros, by `z_score` without a factor."""
    return z * math.sqrt(1 / 3) + spread


def play(race: Race, *rounds: list[Any]) -> None:
    """Rounds of every contender left, decided after each."""
    for scores in rounds:
        for contender in list(race.left):
            race.add(contender, np.asarray(scores[contender], float))
        race.decide()


# --- z ----------------------------------------------------------------------------------------------------


def test_z_by_hand() -> None:
    one, other = np.array([1.0, 3.0, 5.0]), np.array([0.0, 1.0, 0.0])
    # Differences 1, 2, 5: their mean is 8/3 and their variance 13/3.
    assert z_score([one], [other]) == pytest.approx((8 / 3) / math.sqrt(13 / 9))
    assert z_score([one], [other], spread=2.0) == pytest.approx((4 / 3) / math.sqrt(13 / 9))
    # Apart, the variances are 4 and 1/3.
    assert z_score([one], [other], paired=False) == pytest.approx((8 / 3) / math.sqrt((4 + 1 / 3) / 3))


def test_rounds_add_up() -> None:
    first, second = np.array([1.0, 2.0, 5.0]), np.array([0.0, 4.0])
    zeros = [np.zeros(3), np.zeros(2)]
    expected = (8 / 3 + 2) / math.sqrt(13 / 9 + 8 / 2)
    assert z_score([first, second], zeros) == pytest.approx(expected)
    assert z_score([], []) == 0.0


def test_a_lost_task_is_left_out() -> None:
    one, other = np.array([1.0, np.nan, 3.0, 5.0]), np.array([0.0, 7.0, 1.0, 0.0])
    kept = [0, 2, 3]
    assert z_score([one], [other]) == z_score([one[kept]], [other[kept]])
    lost = np.array([0.0, 7.0, np.nan, 0.0])
    assert z_score([one], [lost]) == z_score([one[[0, 3]]], [lost[[0, 3]]])
    # Unpaired, each keeps what it has: 1, 3, 5 with variance 4, and 0, 7, 0 with 49/3.
    expected = (3 - 7 / 3) / math.sqrt((4 + 49 / 3) / 3)
    assert z_score([one], [lost], paired=False) == pytest.approx(expected)


def test_who_has_no_returns_is_infinitely_behind() -> None:
    some, none = np.array([1.0, 2.0]), np.full(2, np.nan)
    assert z_score([some], [none]) == math.inf
    assert z_score([none], [some]) == -math.inf
    assert z_score([none], [none]) == 0.0


@pytest.mark.parametrize("paired", [True, False])
def test_equal_scores_are_no_difference(paired: bool) -> None:
    scores = [np.array([1.0, 2.0, 4.0])] * 3
    assert z_score(scores, scores, paired=paired) == 0.0


def test_a_difference_that_is_the_same_on_every_task_is_certain() -> None:
    scores = np.array([1.0, 2.0, 4.0])
    assert z_score([scores + 1], [scores]) == math.inf
    assert z_score([scores], [scores + 1]) == -math.inf


@given(seed=seeds, paired=st.booleans(), rounds=st.integers(1, 4), scale=st.floats(1e-3, 1e3))
def test_z_turns_with_its_sides_and_has_no_unit(seed: int, paired: bool, rounds: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    one, other = ([rng.normal(size=6) for _ in range(rounds)] for _ in range(2))
    z = z_score(one, other, paired=paired)
    assert z_score(other, one, paired=paired) == pytest.approx(-z)
    scaled = [[scale * scores + 7 for scores in side] for side in (one, other)]
    assert z_score(*scaled, paired=paired) == pytest.approx(z, rel=1e-6, abs=1e-9)


def test_z_is_normal_where_nothing_differs() -> None:
    """Of 4000 comparisons over 20 tasks and three rounds of unequal spread."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(4000):
        one, other = ([spread * rng.normal(size=20) for spread in (0.5, 1.0, 2.0)] for _ in range(2))
        found.append(z_score(one, other))
    assert np.mean(found) == pytest.approx(0, abs=0.06)
    assert np.std(found) == pytest.approx(1, abs=0.06)


# --- Scores -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (None, [5.0, 6.0]),
        ([], [5.0, 6.0]),
        ([0.5, 0.0, 0.5], [3.0, 4.0]),
        ([1.0, 1.0, 2.0], [3.5, 4.5]),
        ([0.2, 0.8], [4.2, 5.2]),
    ],
)
def test_scores_weigh_the_steps_of_adaptation(weights: list[float] | None, expected: list[float]) -> None:
    returns = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    np.testing.assert_allclose(task_scores(returns, weights), expected)


def test_a_score_of_a_lost_task_is_lost() -> None:
    scores = task_scores(np.array([[1.0, np.nan], [3.0, 4.0]]), [0.5, 0.5])
    np.testing.assert_array_equal(scores, [2.0, np.nan])


# --- Races by hand ----------------------------------------------------------------------------------------


def test_the_leader_wins_that_is_clearly_ahead() -> None:
    race = Race(3, STRICT)
    play(race, [np.zeros(4), ahead(0.9), ahead(-0.5, OTHER_SPREAD)])
    assert race.left == [0, 1, 2]
    assert race.leader() == 1
    assert race.winner() == INCUMBENT
    play(race, [np.zeros(4), ahead(0.9), ahead(0.4, OTHER_SPREAD)])
    assert race.over
    assert race.z(1, INCUMBENT) == pytest.approx(1.8 / math.sqrt(2))
    assert race.winner() == 1
    assert race.is_ahead(1)
    assert not race.is_ahead(2)


def test_who_is_clearly_ahead_wins_also_where_another_has_the_best_mean() -> None:
    """The other's returns differ so much from task to task that its lead says nothing."""
    race = Race(3, RaceRule(rounds=1, spread=1.0, win=1.0, behind=(9.0, 9.0), drop_first=9.0))
    play(race, [np.zeros(4), ahead(1.5), 3 * ahead(0.6, OTHER_SPREAD)])
    assert race.leader() == 2
    assert not race.is_ahead(2)
    assert race.is_ahead(1)
    assert race.winner() == 1


@pytest.mark.parametrize(("z", "winner"), [(0.9, INCUMBENT), (1.1, 1), (-1.1, INCUMBENT)])
def test_what_a_challenger_must_show(z: float, winner: int) -> None:
    race = Race(2, RaceRule(rounds=1, spread=1.0, win=1.0, behind=(9.0, 9.0), drop_first=9.0))
    play(race, [np.zeros(4), ahead(z)])
    assert race.over
    assert race.z(1, INCUMBENT) == pytest.approx(z)
    assert race.winner() == winner


@pytest.mark.parametrize(("z", "left"), [(-0.9, [0, 1]), (-1.1, [0])])
def test_a_challenger_leaves_that_is_behind_the_incumbent(z: float, left: list[int]) -> None:
    race = Race(2, STRICT)
    play(race, [np.zeros(4), ahead(z)])
    assert race.left == left
    assert race.over == (left == [0])
    assert race.dropped == [Dropped(1, "1.1 standard errors behind")][: 2 - len(left)]


@pytest.mark.parametrize(
    ("later", "left", "winner"), [((5.1,), [1], 1), ((4.9, 1.2), [0, 1], 1), ((4.9, 1.0), [0, 1], INCUMBENT)]
)
def test_a_lead_that_was_there_before_anyone_had_learnt_must_last(
    later: tuple[float, ...], left: list[int], winner: int
) -> None:
    """At least six tenths of it, of 5; where it shrinks, the incumbent stays to the end."""
    race = Race(2, STRICT)
    for contender, lead in ((0, 0.0), (1, 5.0)):
        race.begin(contender, ahead(lead))
    play(race, *([np.zeros(4), ahead(lead)] for lead in later))
    assert race.left == left
    assert race.over
    assert race.winner() == winner
    assert race.is_ahead(1) == bool(winner)


def test_who_leads_at_first_alone_does_not_lead() -> None:
    race = Race(3, STRICT)
    for contender, lead in ((0, 0.0), (1, 5.0), (2, 0.0)):
        race.begin(contender, ahead(lead))
    play(race, [np.zeros(4), ahead(1.4), ahead(1.2)])
    assert race.leader() == 2
    assert race.left == [0, 1, 2]


def test_later_less_is_enough() -> None:
    race = Race(2, RaceRule(rounds=3, spread=1.0, behind=(1.0, 0.5)))
    play(race, [np.zeros(4), ahead(-0.6)])
    assert race.left == [0, 1]
    play(race, [np.zeros(4), ahead(-0.6)])
    assert race.left == [0]


@pytest.mark.parametrize(("z", "left"), [(-0.7, [0, 1, 2]), (-0.9, [0, 1])])
def test_a_challenger_leaves_that_is_far_behind_another(z: float, left: list[int]) -> None:
    """Though it is not behind the incumbent."""
    race = Race(3, RaceRule(spread=1.0, drop_first=2.0, behind=(1.0, 0.5)))
    play(race, [np.zeros(4), ahead(1.95), ahead(z, OTHER_SPREAD)])
    assert race.left == left


def test_a_race_is_over_when_the_incumbent_is_beaten() -> None:
    race = Race(3, STRICT)
    play(race, [np.zeros(4), ahead(3.5), ahead(3.2, OTHER_SPREAD)])
    assert race.left == [1, 2]
    assert race.over
    assert race.winner() == 1
    assert race.dropped == [Dropped(INCUMBENT, "3.5 standard errors behind")]


def test_a_tie_is_the_incumbents() -> None:
    race = Race(3, STRICT)
    play(race, [np.ones(4)] * 3, [np.ones(4)] * 3)
    assert race.left == [0, 1, 2]
    assert race.leader() == INCUMBENT
    assert race.winner() == INCUMBENT
    assert not race.is_ahead(1)


def test_a_challenger_that_fails_leaves_without_scores() -> None:
    race = Race(3, STRICT)
    race.fail(2, "not finite")
    play(race, [np.zeros(4), ahead(-0.2), None])
    assert race.left == [0, 1]
    assert race.dropped == [Dropped(2, "not finite")]
    assert not race.is_ahead(2)
    assert race.mean(2) == -math.inf
    race.fail(1, "not finite either")
    assert race.over
    assert race.winner() == INCUMBENT


def test_a_challenger_that_led_and_then_fails_is_not_ahead() -> None:
    race = Race(3, STRICT)
    play(race, [np.zeros(4), ahead(2.5), ahead(2.0, OTHER_SPREAD)])
    assert race.left == [0, 1, 2]
    assert race.is_ahead(1)
    race.fail(1, "not finite")
    assert not race.is_ahead(1)
    assert race.winner() == 2


def test_where_the_incumbent_fails_the_best_challenger_wins() -> None:
    race = Race(3, STRICT)
    race.fail(INCUMBENT, "not finite")
    assert not race.over
    play(race, [None, ahead(0), ahead(0.5, OTHER_SPREAD)])
    assert not race.over
    play(race, [None, ahead(0), ahead(0.5, OTHER_SPREAD)])
    assert race.over
    assert race.winner() == 2


def test_all_may_fail() -> None:
    race = Race(2, STRICT)
    race.fail(1, "one")
    race.fail(0, "two")
    assert race.left == []
    assert race.dropped == [Dropped(1, "one"), Dropped(0, "two")]


def test_a_challenger_that_lost_every_task_leaves() -> None:
    race = Race(3, STRICT)
    play(race, [np.zeros(4), np.full(4, np.nan), ahead(0.1)])
    assert race.dropped == [Dropped(1, "inf standard errors behind")]
    assert race.mean(1) == -math.inf


def test_rounds_are_those_that_all_have_finished() -> None:
    race = Race(2, RaceRule(rounds=1))
    assert race.rounds == 0
    race.add(0, np.zeros(4))
    assert race.rounds == 0
    assert not race.over
    race.add(1, np.zeros(4))
    assert race.rounds == 1
    assert race.over


def test_unpaired_scores_may_differ_in_number() -> None:
    """As where an iteration of a challenger plays a third as much, and its rounds have three."""
    race = Race(2, RaceRule(rounds=1, spread=1.0, win=1.0, behind=(9.0, 9.0)), paired=False)
    play(race, [SPREAD, np.tile(SPREAD, 3) + 1])
    expected = 1 / math.sqrt(4 / 3 / 4 + 12 / 11 / 12)
    assert race.z(1, 0) == pytest.approx(expected)
    assert race.winner() == 1


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"rounds": 0}, "rounds must be an integer of 1 or more"),
        ({"drop_first": 0.0}, "drop_first must be a number above 0"),
        ({"drop": -1.0}, "drop must be"),
        ({"win": math.nan}, "win must be"),
        ({"spread": 0.0}, "spread must be"),
        ({"behind": (-1.0, 0.0)}, "behind must be a number at least 0"),
        ({"lasting": -0.1}, "lasting must be a number at least 0"),
    ],
)
def test_impossible_rules_are_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        RaceRule(**changes)


def test_nobody_races_alone() -> None:
    with pytest.raises(ValueError, match="contenders must be an integer of 2 or more"):
        Race(1)


# --- Error rates ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Noise:
    """Of a family's races, as measured on runs of it.

    Attributes:
        level: deviation of a run's own level from iteration to iteration, which all contenders share.
        differences: deviation over tasks of the differences between two contenders, by scored round.
        excess: how many times as much the means of near-equal contenders differ as these let expect.
    """

    level: float
    differences: tuple[float, ...]
    excess: float = 1.5


NAVIGATION = Noise(1.5, (0.25, 0.7, 1.5))
NAVIGATION_LATER = Noise(1.5, (0.7, 1.5, 1.7))
CARTPOLE = Noise(40.0, (18.0, 27.0, 35.0))
FAMILIES = pytest.mark.parametrize(
    "noise", [NAVIGATION, NAVIGATION_LATER, CARTPOLE], ids=["navigation", "navigation, a round later", "cartpole"]
)
TASKS, RACES = 20, 400


def simulated_race(
    noise: Noise, gains: list[float], rng: np.random.Generator, lead: tuple[float, ...] | None = None
) -> int:
    """The winner of a race whose challengers are better by `gains` at its end, and by less before.

    Args:
        lead: of the first challenger in the first round and the scored ones, beside that.
    """
    race = Race(1 + len(gains))
    if lead:
        for contender in race.left:
            own = noise.differences[0] / math.sqrt(2) * rng.normal(size=TASKS)
            race.begin(contender, own + (lead[0] if contender == 1 else 0.0))
    while not race.over:
        number = race.rounds
        deviation = noise.differences[number]
        ease = noise.level * rng.normal(size=1 + TASKS)
        drift = math.sqrt((noise.excess**2 - 1) / (2 * TASKS)) * deviation * rng.normal(size=1 + len(gains))
        for contender in list(race.left):
            gain = gains[contender - 1] * (number + 1) / len(noise.differences) if contender else 0.0
            gain += lead[number + 1] if lead and contender == 1 else 0.0
            own = deviation / math.sqrt(2) * rng.normal(size=TASKS)
            race.add(contender, ease[0] + ease[1:] + drift[contender] + gain + own)
        race.decide()
    return race.winner()


@pytest.mark.parametrize("challengers", [2, 4])
@FAMILIES
def test_what_changes_nothing_is_seldom_accepted(noise: Noise, challengers: int) -> None:
    rng = np.random.default_rng(0)
    winners = [simulated_race(noise, [0.0] * challengers, rng) for _ in range(RACES)]
    assert np.mean([winner != INCUMBENT for winner in winners]) <= 0.2


@pytest.mark.parametrize("challengers", [2, 4])
@FAMILIES
def test_what_is_better_is_mostly_accepted(noise: Noise, challengers: int) -> None:
    """By one standard deviation of the level of a policy, at the race's end."""
    rng = np.random.default_rng(1)
    gains = [noise.level] + [0.0] * (challengers - 1)
    assert np.mean([simulated_race(noise, gains, rng) == 1 for _ in range(RACES)]) >= 0.9


@FAMILIES
@pytest.mark.parametrize(("later", "rate"), [((0.68, 0.24, 0.4), (0.0, 0.2)), ((1.0, 1.0, 1.0), (0.9, 1.0))])
def test_a_lead_of_the_options_alone_must_last(noise: Noise, later: tuple[float, ...], rate: tuple[float, ...]) -> None:
    """One of two deviations of the level: it shrinks as cartpole's with a step four times as long, or lasts."""
    rng = np.random.default_rng(3)
    lead = 2 * noise.level * np.array([1.0, *later])
    won = [simulated_race(noise, [0.0, 0.0], rng, tuple(lead)) == 1 for _ in range(RACES)]
    assert rate[0] <= np.mean(won) <= rate[1]


@FAMILIES
def test_what_is_worse_leaves_early(noise: Noise) -> None:
    """Hence losers cost little: most ruinous challengers play one scored round."""
    rng = np.random.default_rng(2)
    rounds = []
    for _ in range(100):
        race = Race(2)
        ease, own = rng.normal(size=TASKS), noise.differences[0] / math.sqrt(2) * rng.normal(size=(2, TASKS))
        race.add(0, noise.level * ease + own[0])
        race.add(1, noise.level * (ease - 2) + own[1])
        race.decide()
        rounds.append(race.left == [INCUMBENT])
    assert np.mean(rounds) >= 0.95
