"""When an incumbent has collapsed: a plateau's noise does not end a run, and what is really lost is noticed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulated import Member, Policy, World, drive, events, new_population, skill_of
from ssm_metarl.tuning.metrics import RESAMPLES
from ssm_metarl.tuning.population import Population
from ssm_metarl.tuning.records import START, Decision
from ssm_metarl.tuning.safety import GREATEST_FALL, LEAST_FALL, Level, fallen

NOISES = pytest.mark.parametrize("noise", [0.02, 0.04, 0.06])
REAL = pytest.mark.parametrize("real", [0.0, 0.5], ids=["measured", "half of it real"])
"""Share of the noise's variance by which the policy itself fluctuates, as a paired assessment finds it."""


def follow(levels: list[float]) -> Level:
    level = Level()
    for number, value in enumerate(levels):
        level.update(value, str(number))
    return level


# --- By hand ----------------------------------------------------------------------------------------------


def test_the_first_levels_are_averaged() -> None:
    level = follow([0.5, 0.7, 0.6])
    assert level.mean == pytest.approx(0.6)
    assert level.count == 3
    # 1.25 · 0.2 at first, then half of what was, and nothing new: the third level is the average.
    assert level.deviation == pytest.approx(0.125)


def test_later_levels_weigh_more() -> None:
    level = follow([0.5] * 20 + [0.6])
    assert level.mean == pytest.approx(0.53)


def test_the_peak_is_of_the_average_not_of_a_lucky_level() -> None:
    level = follow([0.5, 0.5, 0.5, 0.5, 0.9, 0.4, 0.4, 0.7])
    means = [follow([0.5, 0.5, 0.5, 0.5, 0.9, 0.4, 0.4, 0.7][:count]).mean for count in range(1, 9)]
    assert level.peak == pytest.approx(max(means))
    assert level.peak < 0.65
    assert level.peak_name == str(int(np.argmax(means)))


def test_nothing_is_suspicious_at_first() -> None:
    assert not Level().suspicious(0.0)


def test_a_small_fall_is_not_suspicious_and_a_great_one_is() -> None:
    level = follow([0.6] * 5)
    assert not level.suspicious(0.6 - LEAST_FALL + 1e-6)
    assert level.suspicious(0.6 - LEAST_FALL - 1e-6)
    assert level.suspicious(math.nan)
    noisy = follow([0.6, 0.8, 0.4] * 10)
    assert not noisy.suspicious(noisy.mean - GREATEST_FALL + 1e-6)
    assert noisy.suspicious(noisy.mean - GREATEST_FALL - 1e-6)


def test_an_average_far_below_its_peak_is_suspicious() -> None:
    """However little it fell each time."""
    level = follow([0.6] * 10)
    fell, value = None, 0.6
    for number in range(100):
        value -= 0.005
        if level.suspicious(value):
            fell = number
            break
        level.update(value, f"later {number}")
    assert fell is not None
    assert level.peak_name == "9"
    assert value > 0.4


@given(levels=st.lists(st.floats(0, 1), min_size=1, max_size=30), better=st.floats(0, 1))
def test_a_better_level_is_never_more_suspicious(levels: list[float], better: float) -> None:
    level = follow(levels)
    for value in np.linspace(0, 1, 11):
        assert level.suspicious(value) >= level.suspicious(min(value + better, 1.0))
    assert 0 <= level.mean <= level.peak <= 1


def test_fallen_is_significantly_worse_on_the_same_tasks() -> None:
    ease, own = np.random.default_rng(0).normal(0, 0.2, (2, 20))
    assert fallen(0.5 + ease + 0.1 * own, 0.6 + ease)
    assert not fallen(0.6 + ease, 0.5 + ease + 0.1 * own)
    assert not fallen(0.6 + ease, 0.6 + ease)
    # Apart, such tasks do not tell the two.
    assert not fallen(0.5 + ease, 0.6 + np.random.default_rng(1).permutation(ease) + 2 * own)


def test_a_false_alarm_is_rare() -> None:
    """One of a hundred pairs without a difference; here of 2000, hence 10 to 35."""
    rng = np.random.default_rng(0)
    alarms = [fallen(*(rng.normal(0, 0.1, (2, 20)))) for _ in range(2000)]
    assert 10 <= sum(alarms) <= 35


# --- Error rates ------------------------------------------------------------------------------------------


def returns_of(
    noise: float, real: float, stretches: int, rng: np.random.Generator, fall: Callable[[int], float]
) -> list[int]:
    """At which stretches a run goes back."""
    level, policies, found = Level(), dict[str, float](), list[int]()
    for number in range(stretches):
        policy = 0.6 - fall(number) + noise * math.sqrt(real) * rng.normal()
        measured = policy + noise * math.sqrt(1 - real) * rng.normal()
        policies[str(number)] = policy
        if level.suspicious(measured):
            ease, own, other = rng.normal(size=(3, 20))
            before = policies[level.peak_name or ""]
            if fallen(policy + 0.1 * ease + 0.05 * own, before + 0.1 * ease + 0.05 * other):
                found.append(number)
                continue
        level.update(measured, str(number))
    return found


@NOISES
@REAL
def test_a_plateau_does_not_end_a_run(noise: float, real: float) -> None:
    """0 of 20 runs over 200 stretches go back at three stretches in a row; what is only measured hardly ever does."""
    rng = np.random.default_rng(0)
    runs = [returns_of(noise, real, 200, rng, lambda number: 0.0) for _ in range(20)]
    assert all(third - first > 2 for run in runs for first, third in zip(run, run[2:]))
    if real == 0.0:
        assert sum(map(len, runs)) <= 2


@NOISES
@REAL
@pytest.mark.parametrize("at", [5, 30])
def test_a_collapse_is_noticed_within_two_assessments(noise: float, real: float, at: int) -> None:
    """19 of 20: here of 100."""
    rng = np.random.default_rng(1)
    runs = [returns_of(noise, real, at + 2, rng, lambda number: 0.3 * (number >= at)) for _ in range(100)]
    assert sum(any(number >= at for number in run) for run in runs) >= 95


@NOISES
def test_a_gradual_fall_is_noticed_in_the_end(noise: float) -> None:
    rng = np.random.default_rng(2)

    def fall(number: int) -> float:
        return 0.3 * min(max((number - 30) / 10, 0.0), 1.0)

    runs = [returns_of(noise, 0.5, 100, rng, fall) for _ in range(20)]
    assert all(any(number >= 30 for number in run) for run in runs)


# --- In a run ---------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    monkeypatch.setattr("ssm_metarl.tuning.metrics.RESAMPLES", 2)


PLAIN = {"mutate": False, "stretch": 3}


@NOISES
def test_an_endless_plain_run_on_a_plateau_goes_on(noise: float, tmp_path: Path) -> None:
    """The level is over three iterations, and its noise is what a policy really has at each of them."""
    world = World(gain=lambda config, iteration: 0.0, start=0.6, wander=noise * math.sqrt(3))
    population = drive(new_population(tmp_path, cycles=60, **PLAIN), world)
    assert population.finished == "60 cycles"
    assert population.progress.failures == 0


def collapsing(at: int, seeds: tuple[int, ...]) -> World:
    """Skill is lost at an iteration by incumbents with some seeds, or whatever the seed."""

    def gain(config: object, iteration: int) -> float:
        return -0.3 if iteration == at and (not seeds or config["seed"] in seeds) else 0.0  # type: ignore[index]

    return World(gain=gain, start=0.6, wander=0.02)


@pytest.mark.parametrize("rules", [PLAIN, {"stretch": 3, "proposals": 1}], ids=["plain", "races"])
def test_a_collapse_goes_back_to_the_best(rules: dict[str, bool | int], tmp_path: Path) -> None:
    """With other random numbers, which do not collapse."""
    population = drive(new_population(tmp_path, cycles=14, **rules), collapsing(20, seeds=(0,)))
    assert population.finished == "14 cycles"
    (back,) = events(population, decision=Decision.ROLLED_BACK)
    assert back["iteration"] <= 20
    assert len(events(population, decision=Decision.FAILED)) == 1
    assert population.incumbent.config["seed"] != 0
    assert skill_of(population) > 0.55
    assert back["metrics"]["average_return"] > 0.55


def test_what_collapses_again_and_again_stops_the_run_and_keeps_the_best(tmp_path: Path) -> None:
    population = drive(new_population(tmp_path, cycles=0, **PLAIN), collapsing(20, seeds=()))
    assert population.finished == "3 failures in a row"
    assert skill_of(population) > 0.55
    assert population.archive[population.progress.best or ""].iteration <= 20


# --- From a policy that is good already -----------------------------------------------------------------------------


def from_start(folder: Path, world: World, skill: float = 0.6, **rules: object) -> Population:
    """A run that starts from a checkpoint with a skill."""
    population = new_population(folder, start=START, **rules)  # type: ignore[arg-type]
    member = Member(world, population.store.checkpoints)
    member.policy = Policy(skill)
    member.write(START, skill)
    return population


def shown(population: Population) -> list[str]:
    """What would have been handed over after every stretch, and what was in the end."""
    found = list[str]()
    while_running = population._boundary

    def look() -> None:
        while_running()
        found.append(population.progress.best or "")

    population._boundary = look  # type: ignore[method-assign]
    return found


@pytest.mark.parametrize("rules", [PLAIN, {"stretch": 3, "proposals": 1}], ids=["plain", "races"])
@pytest.mark.parametrize("loss", [0.1, *(pytest.param(loss, marks=pytest.mark.slow) for loss in (0.3, 0.05))])
def test_training_that_ruins_a_policy_does_not_hand_it_over(
    folders: Iterator[Path], rules: dict[str, bool | int], loss: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it loses at once, and never makes up for."""
    monkeypatch.setattr("ssm_metarl.tuning.metrics.RESAMPLES", RESAMPLES)  # of the intervals that decide
    kept = 0
    for seed in range(10):
        world = World(gain=lambda config, iteration: -loss if iteration == 1 else 0.0, drift=0.0)
        population = from_start(next(folders), world, base={"seed": seed}, cycles=6, **rules)
        seen = shown(population)
        drive(population, world)
        kept += skill_of(population) > 0.59 and set(seen) == {START}
    assert kept == 10


def test_training_that_helps_hands_the_better_policy_over(tmp_path: Path) -> None:
    world = World(gain=lambda config, iteration: 0.01)
    population = drive(from_start(tmp_path, world, cycles=6, **PLAIN), world)
    assert skill_of(population) == pytest.approx(population.incumbent.iteration * 0.01 + 0.6, abs=0.03)
    assert population.progress.best == population.incumbent.checkpoint


def test_a_start_that_cannot_train_is_kept(tmp_path: Path) -> None:
    """Its first meta-iteration fails, three times."""
    world = World(failure=lambda config, iteration: "the meta-gradient is not finite")
    population = drive(from_start(tmp_path, world, **PLAIN), world)
    assert population.finished == "3 failures in a row"
    assert (population.store.checkpoints / START).is_dir()
