"""The run's decisions: equal in any order of reports, within their budget, and the same after a crash at any moment."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simulated import (
    BEST_RATE,
    EPISODE_STEPS,
    SHORT,
    Killed,
    World,
    drive,
    events,
    new_population,
    resumed,
    skill_of,
)
from ssm_metarl.config import TrainConfig
from ssm_metarl.tuning.config import EvolveConfig
from ssm_metarl.tuning.population import Population
from ssm_metarl.tuning.records import Decision, Phase
from ssm_metarl.tuning.rules import LEAST_PRICE, least_budget

ITERATION = 20 * 4 * 2 * EPISODE_STEPS
"""Environment steps of a meta-iteration of the simulated incumbent."""

pytestmark = pytest.mark.usefixtures("fast")


def outcome(population: Population) -> dict[str, Any]:
    """All that decides how a run goes on, and what it hands over."""
    state = json.loads(json.dumps(population._snapshot()))
    del state["progress"]["seconds"]
    return state


# --- Courses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_a_learning_rate_ten_times_too_small_is_mended(folders: Iterator[Path], seed: int) -> None:
    """And what is handed over is better than after plain training with as many steps."""
    base, world = {"seed": seed}, World()
    budget = 100 * ITERATION
    ours = drive(new_population(next(folders), base=base, budget=budget, cycles=0), world)
    plain = drive(new_population(next(folders), base=base, budget=budget, cycles=0, mutate=False), World())
    assert skill_of(ours) > skill_of(plain) + 0.2
    assert BEST_RATE / 3 < ours.incumbent.config["outer_lr"] < BEST_RATE * 3
    accepted = events(ours, decision=Decision.ACCEPTED)
    assert accepted[0]["accepted"][0]["option"] == "outer_lr"
    assert accepted[0]["accepted"][0]["after"] == 4 * accepted[0]["accepted"][0]["before"]


def test_a_run_has_races_and_stretches_and_hands_over(tmp_path: Path) -> None:
    population = drive(new_population(tmp_path, **SHORT), World())
    assert population.finished == "3 cycles"
    assert len(events(population, phase=Phase.RACE)) == 3
    log = events(population)
    assert log[-1]["decision"] == Decision.HANDED_OVER
    assert [event["cycle"] for event in log] == sorted(event["cycle"] for event in log)
    assert population.progress.best == log[-1]["checkpoint"] == population.incumbent.checkpoint
    best = population.archive[population.progress.best or ""]
    assert best.path[0] == [0, population.base]
    changes = [each["accepted"] for each in events(population, decision=Decision.ACCEPTED)]
    assert [names for _, values in best.path[1:] for names in values] == [
        challenge["option"] for accepted in changes for challenge in accepted
    ]


def test_the_path_replays_the_incumbents_options(tmp_path: Path) -> None:
    """Hence one run without a population has the same options at every iteration."""
    population = drive(new_population(tmp_path, cycles=5), World())
    config: dict[str, Any] = {}
    for _, changes in population.incumbent.path:
        config |= changes
    assert config == population.incumbent.config
    at = [iteration for iteration, _ in population.incumbent.path]
    assert at == sorted(at)
    assert len(at) >= 2
    TrainConfig.from_dict(config)


def test_every_assessment_has_five_metrics_with_intervals(tmp_path: Path) -> None:
    population = drive(new_population(tmp_path, cycles=8), World())
    assessed = events(population, phase=Phase.STRETCH)
    assert len(assessed) >= 3
    names = {"average_return", "adaptation_speed", "meta_efficiency", "stability"}
    for event in assessed:
        assert set(event["metrics"]) - {"generalisation"} == names
        assert set(event["intervals"]) == set(event["metrics"])
        for name, (low, high) in event["intervals"].items():
            assert 0 <= low <= high <= 1, name
    assert "generalisation" in assessed[-1]["metrics"]


@pytest.mark.parametrize(("mean", "weights"), [(0.05, "mean"), (-0.05, "last")])
def test_the_better_of_weights_and_their_mean_is_handed_over(tmp_path: Path, mean: float, weights: str) -> None:
    population = drive(new_population(tmp_path, **SHORT), World(mean=mean))
    best = population.archive[population.progress.best or ""]
    assert best.handed_over == weights
    assert events(population)[-1]["weights"] == weights
    assert skill_of(population) == pytest.approx(skill_of(population, best.name) + max(mean, 0.0))


def test_without_mutations_a_run_trains_alone(tmp_path: Path) -> None:
    world = World()
    population = drive(new_population(tmp_path, cycles=4, mutate=False), world)
    assert population.finished == "4 cycles"
    assert population.progress.spent["losers"] == 0
    assert not events(population, phase=Phase.RACE)
    assert len(events(population, phase=Phase.STRETCH)) == 4
    assert population.incumbent.config == population.base
    assert len(population.statuses) == 1
    assert {assignment.config["outer_lr"] for assignment in world.played} == {BEST_RATE / 10}


def test_an_endless_run_goes_on(tmp_path: Path) -> None:
    population = new_population(tmp_path, cycles=0, proposals=2)
    with pytest.raises(Killed):
        drive(population, World(), reports=700)
    assert population.progress.cycle > 8
    assert population.progress.failures == 0
    assert population.progress.length <= 16 * population.config.stretch
    spent = population.progress.spent
    assert spent["charged"] <= 0.2 * spent["total"] + 10 * ITERATION


def test_where_nothing_can_move_a_run_still_trains(tmp_path: Path) -> None:
    bounds = {"outer_lr": [0.001, 0.001]}
    population = drive(new_population(tmp_path, evolve=("outer_lr",), bounds=bounds, cycles=3), World())
    assert population.finished == "3 cycles"
    assert len(events(population, phase=Phase.STRETCH)) == 3
    assert population.progress.spent["losers"] == 0


def test_sizes_race_where_a_stretch_brought_nothing(tmp_path: Path) -> None:
    """Also where they are all that may move; a policy that grew keeps its new size."""

    def gain(config: Any, iteration: int) -> float:
        return 0.03 if config["state_dim"] > 4 and iteration < 25 else 0.0

    population = drive(
        new_population(tmp_path, base={"state_dim": 4}, evolve=("state_dim",), cycles=6), World(gain=gain)
    )
    accepted = events(population, decision=Decision.ACCEPTED)
    assert accepted[0]["accepted"] == [{"option": "state_dim", "before": 4, "after": 6}]
    assert population.incumbent.config["state_dim"] >= 6
    assert skill_of(population) > 0.5


# --- Steps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("iterations", [30, 90, 250])
def test_a_budget_is_kept(folders: Iterator[Path], iterations: int, seed: int) -> None:
    world, budget = World(), iterations * ITERATION
    population = drive(new_population(next(folders), base={"seed": seed}, budget=budget, cycles=0), world)
    spent = population.progress.spent
    assert population.finished == "the budget is spent"
    assert spent["total"] == world.spent, "every step is counted once"
    # What is set aside for assessments, and not spent on them, is left.
    assert 0.95 * budget - ITERATION <= spent["total"] - spent["assessments"]
    assert spent["total"] <= budget + ITERATION
    assert spent["assessments"] <= 0.05 * budget
    assert spent["charged"] <= spent["losers"] < spent["total"]
    assert spent["charged"] <= 0.2 * budget + 8 * ITERATION
    log = events(population)
    assert [event["spent"]["total"] for event in log] == sorted(event["spent"]["total"] for event in log)
    assert sum(event["losers"] for event in log if event["phase"] == Phase.RACE) == spent["losers"]


@pytest.mark.parametrize("iterations", [25, 80])
@pytest.mark.parametrize("option", ["episodes", "state_dim"])
def test_a_budget_is_kept_where_races_are_dear(folders: Iterator[Path], option: str, iterations: int) -> None:
    """More of an option helps, and an iteration plays more then, or a round is longer."""

    def gain(config: Any, iteration: int) -> float:
        return 0.0002 * config[option] if iteration % 3 else 0.0

    for seed in range(3):
        world, budget = World(gain=gain), iterations * ITERATION
        rules = {"evolve": (option,), "budget": budget, "cycles": 0}
        population = drive(new_population(next(folders), base={"seed": seed}, **rules), world)
        config = population.incumbent.config
        dearest = 20 * config["episodes"] * (config["inner_steps"] + 1) * EPISODE_STEPS
        assert population.finished == "the budget is spent"
        assert population.progress.spent["total"] == world.spent <= budget + max(dearest, ITERATION)


def test_an_endless_run_assesses_with_a_twentieth_of_its_steps(tmp_path: Path) -> None:
    population = drive(new_population(tmp_path, cycles=12), World())
    spent = population.progress.spent
    assert 0 < spent["assessments"] <= 0.05 * spent["total"]


# --- Order ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_who_reports_first_decides_nothing(folders: Iterator[Path], seed: int) -> None:
    runs = [drive(new_population(next(folders), base={"seed": seed}, **SHORT), World(), order) for order in range(4)]
    assert [events(run) for run in runs[1:]] == [events(runs[0])] * 3
    assert [outcome(run) for run in runs[1:]] == [outcome(runs[0])] * 3


def test_other_seeds_give_other_decisions(folders: Iterator[Path]) -> None:
    one, other = (drive(new_population(next(folders), base={"seed": seed}, **SHORT), World()) for seed in (0, 1))
    assert events(one) != events(other)


# --- Resuming ---------------------------------------------------------------------------------------------


def killed_again_and_again(population: Population, moments: list[int], world: Callable[[], World]) -> Population:
    """A run whose driver is killed after so many reports, and goes on each time from what is on disk."""
    seen: list[dict[str, Any]] = []
    for order, moment in enumerate(moments):
        with pytest.raises(Killed):
            drive(population, world(), order, reports=moment)
        population = resumed(population)
        now = events(population)
        assert now[: len(seen)] == seen, "what was logged stays"
        seen = now
    return drive(population, world(), 99)


@pytest.mark.parametrize("rules", [SHORT, {"budget": 30 * ITERATION, "cycles": 0}], ids=["cycles", "budget"])
def test_a_run_killed_at_any_moment_decides_as_if_nothing_had_happened(
    folders: Iterator[Path], rules: dict[str, Any]
) -> None:
    heard = list[int]()
    undisturbed = drive(
        new_population(next(folders), **rules),
        World(),
        disturb=lambda population, member, report: bool(heard.append(member)),
    )
    for moment in np.random.default_rng(0).integers(0, len(heard) - 1, 12):
        run = killed_again_and_again(new_population(next(folders), **rules), [int(moment)], World)
        assert events(run) == events(undisturbed)
        assert outcome(run) == outcome(undisturbed)


def test_a_run_killed_many_times_arrives(folders: Iterator[Path]) -> None:
    undisturbed = drive(new_population(next(folders), **SHORT), World())
    run = killed_again_and_again(new_population(next(folders), **SHORT), [20, 3, 0, 5, 2], World)
    assert events(run) == events(undisturbed)
    assert outcome(run) == outcome(undisturbed)


@pytest.mark.parametrize("first", [1, 2])
def test_a_finished_run_can_go_on(folders: Iterator[Path], first: int) -> None:
    longer = drive(new_population(next(folders), **SHORT), World())
    run = drive(new_population(next(folders), **{**SHORT, "cycles": first}), World())
    assert run.finished == f"{first} cycle{'s' * (first > 1)}"
    again = drive(resumed(run, cycles=3), World())
    assert again.finished == "3 cycles"
    races = [event["accepted"] for event in events(again, phase=Phase.RACE)]
    assert races == [event["accepted"] for event in events(longer, phase=Phase.RACE)]
    assert again.incumbent.config == longer.incumbent.config


def test_a_run_that_its_failures_stopped_gets_as_many_again(tmp_path: Path) -> None:
    """A person looked at it."""
    broken = World(failure=lambda config, iteration: "the disk is full" if iteration == 4 else None)
    population = drive(new_population(tmp_path, **SHORT), broken)
    assert population.finished == "3 failures in a row"
    again = resumed(population)
    assert (again.finished, again.progress.failures) == (None, 0)
    assert drive(again, World()).finished == "3 cycles"


def test_the_state_is_json_and_back(tmp_path: Path) -> None:
    population = drive(new_population(tmp_path, **SHORT), World())
    text = (tmp_path / "rsi" / "state.json").read_text()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    state = json.loads(text, parse_constant=refuse)
    assert state["progress"]["finished"] == "3 cycles"
    again = resumed(population)
    again.progress.finished, again.progress.phase = population.finished, population.progress.phase
    assert outcome(again) == outcome(population)


def _without(*path: str) -> Callable[[dict[str, Any]], None]:
    def damage(state: dict[str, Any]) -> None:
        for name in path[:-1]:
            state = state[name]
        del state[path[-1]]

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        _without("incumbent"),
        _without("incumbent", "latest"),
        _without("progress", "phase"),
        _without("options", "tallies"),
        _without("config"),
        lambda state: state["incumbent"].update(more=1),
        lambda state: state["progress"].update(more=1),
        lambda state: state["level"].update(more=1),
        lambda state: state.update(archive=None),
        lambda state: state.update(archive={"x": {"name": "x"}}),
        lambda state: state["progress"].update(phase="probation"),
        lambda state: state["config"].update(generations=3),
    ],
)
def test_a_damaged_state_is_refused_in_one_sentence(tmp_path: Path, damage: Callable[[dict[str, Any]], None]) -> None:
    population = drive(new_population(tmp_path, cycles=1, proposals=1), World())
    path = tmp_path / "rsi" / "state.json"
    state = json.loads(path.read_text())
    damage(state)
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"state\.json is damaged.*: .*\.$") as caught:
        resumed(population)
    assert "\n" not in str(caught.value)


def test_a_run_of_the_old_rules_is_refused_in_one_sentence(tmp_path: Path) -> None:
    population = new_population(tmp_path)
    (tmp_path / "rsi" / "state.json").write_text('{"format": 1, "generation": 3, "trials": [], "events": []}')
    with pytest.raises(ValueError, match=r"state\.json is of format 1, but this version .* reads 3\.$"):
        resumed(population)


@pytest.mark.parametrize(("iterations", "challengers"), [(14, []), (29, [1]), (40, [2]), (50, [3]), (200, [4])])
def test_the_first_race_has_as_many_challengers_as_losers_may_cost(
    tmp_path: Path, iterations: int, challengers: list[int]
) -> None:
    """A fifth of the budget, three meta-iterations each, of a policy that learns by itself."""
    rules = {"budget": iterations * ITERATION, "cycles": 0, "proposals": 4}
    world = World(gain=lambda config, iteration: 0.05, start=0.9, drift=0.0, own=0.0, ease=0.0)
    population = drive(new_population(tmp_path, **rules), world)
    races = events(population, phase=Phase.RACE)
    assert [len(race["changes"]) for race in races[:1]] == challengers
    assert (least_budget(population.config, ITERATION) > rules["budget"]) == (not challengers)


@pytest.mark.parametrize(("level", "pace", "price"), [(0.2, 0.0, LEAST_PRICE), (0.9, 0.0, 0.9), (0.2, 0.02, 1.0)])
def test_losers_cost_what_the_incumbent_would_have_made_of_their_steps(
    tmp_path: Path, level: float, pace: float, price: float
) -> None:
    """Half where it learns nothing at a low level; all where it learns by itself, and nearly where it has learnt."""
    world = World(gain=lambda config, iteration: pace, start=level, drift=0.0, own=0.0, ease=0.0)
    rules = {"budget": 100 * ITERATION, "cycles": 0, "proposals": 2}
    population = drive(new_population(tmp_path, **rules), world)
    races = events(population, phase=Phase.RACE)
    assert {race["decision"] for race in races} == {Decision.REJECTED}
    assert races[0]["spent"]["charged"] == pytest.approx(price * races[0]["losers"], rel=0.01)


def test_where_adaptation_hurts_its_step_is_shortened_first(tmp_path: Path) -> None:
    population = drive(new_population(tmp_path, cycles=1, base={"inner_lr": 0.5}), World(adaptation=-0.2))
    (race,) = events(population, phase=Phase.RACE)
    changes = [change for change in race["changes"] if change["option"] == "inner_lr"]
    assert race["changes"][0] == {"option": "inner_lr", "before": 0.5, "after": 0.125}
    assert len(changes) == 1


def test_where_adaptation_hurts_for_another_reason_other_options_race_too(tmp_path: Path) -> None:
    population = drive(new_population(tmp_path, cycles=8, proposals=1, base={"inner_lr": 0.5}), World(adaptation=-0.2))
    raced = [race["changes"][0]["option"] for race in events(population, phase=Phase.RACE)]
    assert raced[::2] == ["inner_lr"] * 4
    assert "outer_lr" in raced[1::2]


def test_a_race_is_charged_at_the_price_that_admitted_it(tmp_path: Path) -> None:
    """Also where an assessment found the policy worse than the one that is kept, and its level is high."""

    def gain(config: Any, iteration: int) -> float:
        return -0.05 * (iteration == 9)

    world = World(gain=gain, start=0.85, drift=0.0, own=0.001, ease=0.0)
    rules = {"budget": 100 * ITERATION, "cycles": 0, "proposals": 2}
    population = drive(new_population(tmp_path, **rules), world)
    races = events(population, phase=Phase.RACE)
    charged = np.diff([0, *(race["spent"]["charged"] for race in races)]) / [race["losers"] for race in races]
    assert charged[0] == pytest.approx(0.85, abs=0.01)
    assert min(charged) == pytest.approx(LEAST_PRICE, abs=0.01)


def test_a_policy_that_got_worse_is_not_stuck(tmp_path: Path) -> None:
    """After the fall `outer_lr` is tried downwards first."""

    def gain(config: Any, iteration: int) -> float:
        return -0.1 if iteration == 9 else 0.01 * (iteration < 9)

    world = World(gain=gain, start=0.75, drift=0.0, own=0.001, ease=0.0)
    rules = {"budget": 60 * ITERATION, "cycles": 0, "evolve": ("outer_lr",), "proposals": 1}
    population = drive(new_population(tmp_path, **rules), world)
    after = [race["changes"][0] for race in events(population, phase=Phase.RACE) if race["iteration"] > 9]
    assert [change["after"] > change["before"] for change in after[:3]] == [False] * 3


def test_a_stretch_of_one_iteration_grows_too(tmp_path: Path) -> None:
    world = World(gain=lambda config, iteration: 0.0, start=0.2, drift=0.0)
    population = drive(new_population(tmp_path, cycles=6, stretch=1), world)
    assert population.progress.length > 4


@pytest.mark.parametrize("share", [0.1, 0.2])
@pytest.mark.parametrize("assess", [0.0, 0.05, 0.3])
def test_the_least_budget_is_the_first_with_a_race(folders: Iterator[Path], share: float, assess: float) -> None:
    world = World(gain=lambda config, iteration: 0.05, start=0.9, drift=0.0, own=0.0, ease=0.0)

    def races(iterations: int) -> int:
        rules = {"cycles": 0, "losers_share": share, "assess_share": assess, "budget": iterations * ITERATION}
        return len(events(drive(new_population(next(folders), **rules), world), phase=Phase.RACE))

    least = round(least_budget(EvolveConfig(losers_share=share, assess_share=assess), ITERATION) / ITERATION)
    assert (races(least - 1), races(least) > 0) == (0, True)


@pytest.mark.parametrize(("losers", "assess"), [(0.0, 0.05), (0.2, 1.0)])
def test_without_steps_for_losers_no_budget_is_enough(losers: float, assess: float) -> None:
    assert least_budget(EvolveConfig(losers_share=losers, assess_share=assess), ITERATION) == math.inf


@pytest.mark.parametrize(
    ("start", "ways"),
    [(0.5, [True, True, False, True, False, True, False]), (0.1, [True, True, True, False, True, False, True, False])],
)
def test_a_policy_that_stops_learning_is_tried_with_a_lower_rate(
    tmp_path: Path, start: float, ways: list[bool]
) -> None:
    """Also where a higher one had won before; a higher one where it is stuck. Then ways take turns."""

    def gain(config: Any, iteration: int) -> float:
        return 0.04 * (iteration < 8) * (config["outer_lr"] > 0.002) + 0.001 * (iteration < 8)

    rules = {"budget": 150 * ITERATION, "cycles": 0, "evolve": ("outer_lr",), "proposals": 2}
    population = drive(new_population(tmp_path, **rules), World(gain=gain, start=start, drift=0.0, own=0.0, ease=0.0))
    races = events(population, phase=Phase.RACE)
    assert races[0]["accepted"][0]["after"] == BEST_RATE / 10 * 4
    raised = [race["changes"][0]["after"] > race["changes"][0]["before"] for race in races[1:]]
    # The streak ends, the curve of the first stretch still rises, the second one is flat; then in turns.
    assert raised == ways
