"""Changes of options stay within bounds and train; which option is next follows from what won before."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import seeds
from ssm_metarl.config import TrainConfig
from ssm_metarl.tuning.config import EvolveConfig
from ssm_metarl.tuning.course import STUCK_POWER, better_ways, unseen_options
from ssm_metarl.tuning.options import (
    DECAY,
    FIRST,
    GREATEST,
    LEAST,
    LOSS_POWER,
    OPTIONS,
    SIZES,
    WIN_GROWTH,
    Challenge,
    OptionName,
    Options,
    Tally,
    changed,
    playable,
)

WHOLE = [name for name, option in OPTIONS.items() if option.kind in ("count", "step", "size")]
ALONE = ("episodes", "inner_steps", *SIZES)


@st.composite
def configs(draw: Any) -> dict[str, Any]:
    """Any incumbent that training takes, within the bounds of what may move or beyond them."""
    inner_steps = draw(st.integers(1, 7))
    weights = st.lists(st.floats(0.1, 2.0), min_size=inner_steps + 1, max_size=inner_steps + 1)
    values = {
        "outer_lr": draw(st.floats(1e-7, 0.5)),
        "inner_lr": draw(st.floats(1e-4, 30.0)),
        "epochs": draw(st.integers(1, 40)),
        "entropy_bonus": draw(st.just(0.0) | st.floats(1e-6, 0.5)),
        "clip": draw(st.floats(0.01, 0.9)),
        "gae_lambda": draw(st.sampled_from([0.0, 0.5, 0.95, 0.99, 1.0]) | st.floats(0, 1)),
        "discount": draw(st.sampled_from([0.4, 0.9, 0.99, 0.99995]) | st.floats(0.1, 0.99999)),
        "episodes": draw(st.integers(2, 300)),
        "inner_steps": inner_steps,
        "state_dim": 2 * draw(st.integers(1, 160)),
        "hidden_dim": draw(st.integers(1, 320)),
        "num_layers": draw(st.integers(0, 6)),
        "step_weights": tuple(draw(st.just([]) | st.just([0.2, 0.8]) | weights)),
    }
    return TrainConfig().replace(**values).to_dict()


tallies = st.builds(Tally, factor=st.floats(LEAST, GREATEST), direction=st.sampled_from([-1, 0, 1]))


def base(**values: Any) -> dict[str, Any]:
    return TrainConfig.for_task("navigation-2d", **values).to_dict()


def after(name: str, config: dict[str, Any], tally: Tally | None = None, **bounds: Any) -> list[Any]:
    """What an option may change to."""
    options = Options([name], bounds, {name: tally} if tally else {})
    return [challenge.after for challenge in options.moves(name, config)]


# --- Moves ------------------------------------------------------------------------------------------------


def test_every_option_has_a_type_and_is_an_option_of_training() -> None:
    assert get_args(OptionName) == tuple(OPTIONS)
    assert set(OPTIONS) <= set(base())


@pytest.mark.parametrize("name", list(OPTIONS))
@settings(max_examples=50)
@given(config=configs(), tally=tallies)
def test_a_move_stays_within_bounds_and_trains(name: str, config: dict[str, Any], tally: Tally) -> None:
    option, value = OPTIONS[name], config[name]
    found = after(name, config, tally)
    assert len(set(found)) == len(found) <= 2
    for new in found:
        assert option.low <= new <= option.high
        assert new != value
        assert isinstance(new, int if name in WHOLE else float)
        trained = TrainConfig.from_dict(changed(config, Challenge(name, value, new))).to_dict()
        assert trained[name] == new
        others = {key for key in config if trained[key] != config[key]} - {name}
        assert others <= ({"step_weights"} if name == "inner_steps" else set())


@pytest.mark.parametrize("name", list(OPTIONS))
@settings(max_examples=50)
@given(config=configs(), tally=tallies, shares=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_own_bounds_hold(name: str, config: dict[str, Any], tally: Tally, shares: tuple[float, float]) -> None:
    option = OPTIONS[name]
    low, high = sorted(option.low + share * (option.high - option.low) for share in shares)
    for new in after(name, config, tally, **{name: (low, high)}):
        assert low <= new <= high or name in WHOLE
        assert isinstance(new, int if name in WHOLE else float)
        TrainConfig.from_dict(changed(config, Challenge(name, config[name], new)))


@pytest.mark.parametrize("name", list(OPTIONS))
def test_within_bounds_an_option_moves_both_ways(name: str) -> None:
    config = base(episodes=20, inner_steps=2, num_layers=2, entropy_bonus=0.01, gae_lambda=0.9, discount=0.9)
    assert [Challenge(name, config[name], new).direction for new in after(name, config)] == [1, -1]
    for direction in (1, -1):
        (new,) = after(name, config, Tally(direction=direction))
        assert Challenge(name, config[name], new).direction == direction


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("outer_lr", 0.001, [0.004, 0.00025]),
        ("outer_lr", 0.05, [0.1, 0.0125]),
        ("inner_lr", 0.1, [0.4, 0.025]),
        ("entropy_bonus", 0.0, [0.004]),
        ("epochs", 5, [20, 1]),
        ("epochs", 1, [4]),
        ("episodes", 8, [16, 4]),
        ("inner_steps", 1, [2]),
        ("inner_steps", 5, [4]),
        ("discount", 0.9, [0.975, 0.6]),
        ("gae_lambda", 0.9, [0.975, 0.6]),
        ("gae_lambda", 1.0, [0.98, 0.68]),
        ("gae_lambda", 0.99, [1.0, 0.96]),
        ("gae_lambda", 0.5, [0.875, 0.0]),
        ("state_dim", 32, [48, 26]),
        ("state_dim", 2, [4]),
        ("state_dim", 256, [204]),
        ("hidden_dim", 64, [96, 52]),
        ("hidden_dim", 7, [11, 5]),
        ("num_layers", 1, [2, 0]),
        ("num_layers", 4, [3]),
        ("num_layers", 0, [1]),
    ],
)
def test_first_moves_by_hand(name: str, value: float, expected: list[float]) -> None:
    assert after(name, base(**{name: value})) == pytest.approx(expected)


def test_a_size_keeps_its_parity_at_odd_bounds() -> None:
    assert after("state_dim", base(state_dim=8), state_dim=[5, 11]) == [10, 6]


def test_a_value_beyond_its_bounds_comes_back_once() -> None:
    assert after("outer_lr", base(outer_lr=0.5)) == [0.1]
    assert after("state_dim", base(state_dim=600)) == [256]


def test_small_counts_move_by_one_at_least() -> None:
    assert after("epochs", base(epochs=2), Tally(factor=LEAST)) == [3, 1]


def test_what_won_at_a_bound_turns_to_both_ways() -> None:
    options = Options(["outer_lr"], {}, {"outer_lr": Tally(direction=1, factor=3.0)})
    assert [challenge.after for challenge in options.moves("outer_lr", base(outer_lr=0.1))] == [pytest.approx(0.1 / 3)]
    assert options.tallies["outer_lr"].direction == 0


def test_what_cannot_move_has_no_moves() -> None:
    assert after("outer_lr", base(outer_lr=0.01), outer_lr=[0.01, 0.01]) == []
    assert after("outer_lr", base(outer_lr=0.01), Tally(direction=1), outer_lr=[0.01, 0.01]) == []


# --- Which option is next ---------------------------------------------------------------------------------


def draw(options: Options, config: dict[str, Any] | None = None, count: int = 2, sizes: bool = True) -> Counter[str]:
    """The option that a race is about, 400 times."""
    found: Counter[str] = Counter()
    for seed in range(400):
        challenges = options.challenges(config or base(), count, np.random.default_rng(seed), sizes=sizes)
        found[challenges[0].option] += 1
    return found


def test_thompson_sampling_prefers_what_won() -> None:
    names = ["entropy_bonus", "clip", "gae_lambda", "discount"]
    before = draw(Options(names))
    assert min(before[name] for name in names) > 60  # equal beliefs, equal chances: 100 each
    options = Options(names, {}, {"clip": Tally(wins=6), "discount": Tally(losses=12)})
    now = draw(options)
    assert now["clip"] > 300
    assert now["discount"] < before["discount"] / 3


def test_a_lucky_option_is_not_the_only_one() -> None:
    """One that won once and one that did not both come."""
    found = draw(Options(["clip", "gae_lambda"], {}, {"clip": Tally(wins=1), "gae_lambda": Tally(losses=1)}))
    assert 40 < found["gae_lambda"] < 200


def test_priors_look_at_learning_rates_first() -> None:
    found = draw(Options())
    assert found["outer_lr"] > 200
    assert found["outer_lr"] > found["inner_lr"] > found["clip"]


def test_what_has_just_won_goes_first_and_the_same_way() -> None:
    options = Options()
    options.tallies["clip"].direction = -1
    for seed in range(20):
        first, *others = options.challenges(base(), 3, np.random.default_rng(seed), sizes=False)
        assert (first.option, first.after) == ("clip", pytest.approx(0.3 / FIRST))
        assert "clip" not in {other.option for other in others}


def test_what_is_urgent_goes_first_and_its_way_alone() -> None:
    options = Options(tallies={"clip": Tally(direction=1), "inner_lr": Tally(direction=1)})
    for seed in range(20):
        rng = np.random.default_rng(seed)
        first, *others = options.challenges(base(inner_lr=0.4), 3, rng, sizes=False, urgent={"inner_lr": -1})
        assert (first.option, first.after) == ("inner_lr", pytest.approx(0.4 / FIRST))
        assert others[0].option == "clip"
        assert "inner_lr" not in {other.option for other in others}


@pytest.mark.parametrize(
    ("bounds", "fixed", "ways"), [({"inner_lr": [0.4, 0.8]}, [], [1]), ({}, ["inner_lr"], []), ({}, [], [-1])]
)
def test_what_is_urgent_and_cannot_move_its_way_waits(
    bounds: dict[str, Any], fixed: list[str], ways: list[int]
) -> None:
    options, rng = Options(("clip", "inner_lr"), bounds), np.random.default_rng(0)
    challenges = options.challenges(
        base(inner_lr=0.4), 4, rng, sizes=False, fixed=fixed, urgent={"inner_lr": -1, "epochs": 1}
    )
    assert [challenge.direction for challenge in challenges if challenge.option == "inner_lr"] == ways
    assert [challenge.direction for challenge in challenges if challenge.option == "clip"] in ([1, -1], [-1, 1])


@given(seed=seeds, count=st.integers(1, 6), sizes=st.booleans(), config=configs())
def test_a_race_is_fair(seed: int, count: int, sizes: bool, config: dict[str, Any]) -> None:
    fixed = ["epochs"]
    challenges = Options().challenges(config, count, np.random.default_rng(seed), sizes=sizes, fixed=fixed)
    assert 1 <= len(challenges) <= count
    raced = {challenge.option for challenge in challenges}
    assert "epochs" not in raced
    assert sizes or raced.isdisjoint(SIZES)
    # What changes the amount of play, or how long an effect takes to show, races alone.
    assert len(raced) == 1 or raced.isdisjoint(ALONE)
    assert len({(challenge.option, challenge.after) for challenge in challenges}) == len(challenges)
    assert all(challenge.before == config[challenge.option] for challenge in challenges)


@given(seed=seeds)
def test_equal_generators_draw_equal_challenges(seed: int) -> None:
    one, other = (Options().challenges(base(), 4, np.random.default_rng(seed), sizes=True) for _ in range(2))
    assert one == other


def test_where_nothing_can_move_there_is_no_challenge() -> None:
    options, rng = Options(["state_dim", "clip"]), np.random.default_rng(0)
    assert options.challenges(base(), 2, rng, sizes=False, fixed=["clip"]) == []


def test_what_has_no_effect_does_not_race() -> None:
    config = base()
    assert all(playable(name, config, clipped=True) for name in OPTIONS)
    assert [name for name in OPTIONS if not playable(name, config, clipped=False)] == ["epochs", "clip"]
    still = {**config, "inner_steps": 0}
    assert [name for name in OPTIONS if not playable(name, still, clipped=True)] == ["inner_lr", "inner_steps"]
    assert not playable("state_dim", {**config, "num_layers": 0}, clipped=True)


# --- What is learnt ---------------------------------------------------------------------------------------

UP, DOWN = Challenge("clip", 0.2, 0.8), Challenge("clip", 0.2, 0.05)
RATE = Challenge("outer_lr", 0.001, 0.004)


def test_a_winner_goes_on_the_same_way_and_farther() -> None:
    options = Options()
    options.settle([UP, DOWN, RATE], [DOWN])
    assert options.tallies["clip"] == Tally(factor=WIN_GROWTH * FIRST, direction=-1, wins=1.0)
    assert options.tallies["outer_lr"] == Tally(factor=FIRST**LOSS_POWER, losses=1.0, lean=-1)
    assert options.tallies["epochs"] == Tally()


def test_two_ways_that_lose_are_one_loss() -> None:
    options = Options()
    options.settle([UP, DOWN], [])
    assert options.tallies["clip"] == Tally(factor=FIRST**LOSS_POWER, losses=1.0)


def test_who_was_ahead_of_the_incumbent_too_is_tried_again() -> None:
    options = Options()
    options.settle([RATE, DOWN], [RATE], ahead=[DOWN])
    assert options.tallies["clip"] == Tally(factor=FIRST, direction=-1, wins=1.0)
    assert options.tallies["outer_lr"].direction == 1


def test_after_a_win_the_other_way_is_not_what_is_left_to_try() -> None:
    options = Options(("outer_lr",))
    options.settle([Challenge("outer_lr", 0.01, 0.04)], [Challenge("outer_lr", 0.01, 0.04)])
    options.settle([Challenge("outer_lr", 0.04, 0.24)], [])
    assert options.tallies["outer_lr"].lean == 0


def test_two_may_win() -> None:
    options = Options()
    options.settle([RATE, DOWN], [RATE, DOWN], ahead=[DOWN])
    assert options.tallies["clip"].direction == -1
    assert options.tallies["outer_lr"].direction == 1
    assert all(options.tallies[name].factor == WIN_GROWTH * FIRST for name in ("clip", "outer_lr"))


def test_what_made_no_difference_is_tried_as_far_again_or_farther() -> None:
    standing = {UP: 0.9, DOWN: -0.2, RATE: 1.1, Challenge("epochs", 3, 12): 0.1}
    assert unseen_options(standing) == {"clip", "epochs"}
    assert unseen_options({UP: -math.inf, DOWN: 0.1}) == set(), "one that failed went too far"
    options = Options()
    options.settle([UP, DOWN, RATE], [], unseen={"clip": 1.0})
    assert options.tallies["clip"].factor == FIRST
    assert options.tallies["outer_lr"].factor == FIRST**LOSS_POWER
    for _ in range(9):
        options.settle([UP, DOWN, RATE], [], unseen={"clip": STUCK_POWER, "outer_lr": STUCK_POWER})
    assert options.tallies["clip"].factor == GREATEST
    assert options.tallies["outer_lr"].factor == OPTIONS["outer_lr"].reach
    options.settle([RATE], [RATE])
    assert options.tallies["outer_lr"].factor == OPTIONS["outer_lr"].reach, "not less because it won"


def test_factors_have_bounds_and_a_loss_ends_a_streak() -> None:
    options = Options()
    for _ in range(9):
        options.settle([UP], [UP])
    assert options.tallies["clip"].factor == GREATEST
    options.settle([UP], [])
    assert options.tallies["clip"].direction == 0
    for _ in range(20):
        options.settle([UP, DOWN], [])
    assert options.tallies["clip"].factor == LEAST


def test_what_was_learnt_fades() -> None:
    options = Options()
    options.settle([UP], [UP])
    for _ in range(10):
        options.settle([RATE], [])
    assert options.tallies["clip"].wins == pytest.approx(DECAY**10)
    assert options.tallies["outer_lr"].losses == pytest.approx(sum(DECAY**i for i in range(10)))


def test_json_keeps_what_was_learnt() -> None:
    options = Options(["clip", "outer_lr"], {"clip": [0.1, 0.5]})
    options.settle([UP, RATE], [RATE])
    again = Options.from_dict(json.loads(json.dumps(options.to_dict())))
    assert again == options
    rngs = np.random.default_rng(1), np.random.default_rng(1)
    assert again.challenges(base(), 3, rngs[0], sizes=True) == options.challenges(base(), 3, rngs[1], sizes=True)


# --- Refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "bounds", "match"),
    [
        (["outer_rl"], {}, r"There is no option that can evolve 'outer_rl', did you mean 'outer_lr'\?"),
        (["seed"], {}, "There is no option that can evolve 'seed'"),
        (["clip"], {"outer_lr": [0.1, 0.2]}, "Unknown bound key 'outer_lr'"),
        (["clip"], {"clip": [0.1]}, r"The bounds of clip must be a least and a greatest value, not \[0.1\]\."),
        (["clip"], {"clip": 0.1}, "The bounds of clip must be a least and a greatest value"),
        (["clip"], {"clip": "ab"}, "The bounds of clip must be a least and a greatest value"),
        (["clip"], {"clip": [0.5, 0.1]}, "The bounds of clip must be a least and a greatest value"),
        (["clip"], {"clip": ["0.1", 0.5]}, "A bound of clip must be a number"),
        (["outer_lr"], {"outer_lr": [0.0, 0.1]}, "A bound of outer_lr must be a number at least 1e-06"),
        (["state_dim"], {"state_dim": [2, 4096]}, "A bound of state_dim must be a number at least 2 and at most 256"),
    ],
)
def test_what_cannot_evolve_is_refused_in_one_sentence(names: list[str], bounds: Any, match: str) -> None:
    for refuses in (Options, lambda names, bounds: EvolveConfig(evolve=tuple(names), bounds=bounds)):
        with pytest.raises(ValueError, match=match) as caught:
            refuses(names, bounds)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"budget": -1}, "budget must be a number at least 0"),
        ({"cycles": -1}, "cycles must be an integer of 0 or more"),
        ({"proposals": 0}, "proposals must be an integer of 1 or more"),
        ({"mutate": 1}, "mutate must be true or false"),
        ({"assess_share": 1.5}, "assess_share must be a number at least 0 and at most 1"),
        ({"losers_share": -0.1}, "losers_share must be"),
        ({"stretch": 0}, "stretch must be an integer of 1 or more"),
        ({"assess_tasks": 1}, "assess_tasks must be an integer of 2 or more"),
        ({"max_failures": 0}, "max_failures must be"),
        ({"evolve": ()}, "evolve must name at least one option"),
    ],
)
def test_impossible_rules_are_refused_in_one_sentence(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        EvolveConfig(**changes)
    assert "\n" not in str(caught.value)


def test_json_keeps_the_rules() -> None:
    rules = EvolveConfig(budget=1e6, evolve=("clip", "state_dim"), bounds={"clip": [0.1, 0.2]})
    values = json.loads(json.dumps(rules.to_dict()))
    assert json.loads(json.dumps(EvolveConfig.from_dict(values).to_dict())) == values
    for wrong in ({"cycle": 3}, {"race": {"round": 3}}):
        with pytest.raises(ValueError, match="did you mean"):
            EvolveConfig.from_dict(wrong)


# --- Configs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "weights", "expected"),
    [
        (2, (), []),
        (2, (0.2, 0.8), [0.2, 0.8]),
        (2, (0.2, 0.3, 0.5), [0.2, pytest.approx(0.8)]),
        (1, (0.2, 0.8), [0.2, 0.8]),
    ],
)
@pytest.mark.parametrize("more", [1, 2])
def test_weights_of_adaptation_fit_its_steps(steps: int, weights: Any, expected: list[float], more: int) -> None:
    config = base(inner_steps=steps, step_weights=weights)
    new = changed(config, Challenge("inner_steps", steps, steps + more))
    assert new["step_weights"] == expected
    assert config["inner_steps"] == steps
    TrainConfig.from_dict(new)


@pytest.mark.parametrize("lean", [1, -1])
def test_the_way_that_seemed_better_is_the_first_to_be_tried_again(lean: int) -> None:
    up, down = Challenge("outer_lr", 0.01, 0.04), Challenge("outer_lr", 0.01, 0.0025)
    better = better_ways({up: 0.3 * lean, down: -0.2, Challenge("clip", 0.3, 1.0): 2.0})
    assert better == [up if lean > 0 else down]
    assert better_ways({up: 0.1, down: 0.1}) == []
    options = Options(("outer_lr",))
    options.settle([up, down], [], better=better)
    for seed in range(20):
        (first,) = options.challenges(base(), 1, np.random.default_rng(seed), sizes=False)
        assert first.direction == lean


@pytest.mark.parametrize("streak", [0, 1])
def test_the_way_that_did_not_race_is_the_next_to_be_tried(streak: int) -> None:
    """Not after a streak, which may have ended at the best value."""
    options = Options(("outer_lr",), tallies={"outer_lr": Tally(direction=streak, lean=1)})
    options.settle([Challenge("outer_lr", 0.01, 0.04)], [])
    (first,) = options.challenges(base(), 1, np.random.default_rng(0), sizes=False)
    assert first.direction == (1 if streak else -1)


@pytest.mark.parametrize(("streak", "left"), [(1, 0), (-1, -1), (0, 0)])
def test_an_option_that_is_turned_is_tried_that_way_first(streak: int, left: int) -> None:
    options = Options(("outer_lr",), tallies={"outer_lr": Tally(direction=streak, lean=1)})
    options.turn("outer_lr", -1)
    options.turn("clip", -1)  # it may not move in this run
    assert options.tallies == {"outer_lr": Tally(direction=left, lean=-1)}
    (first,) = options.challenges(base(), 1, np.random.default_rng(0), sizes=False)
    assert first.direction == -1
