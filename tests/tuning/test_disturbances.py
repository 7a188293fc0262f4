"""What befalls members and runs: processes that die, numbers that are not finite, requests of a person, a full disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simulated import SHORT, Killed, World, drive, events, new_population, read_policy, resumed, skill_of
from ssm_metarl.tuning.options import FIRST, LOSS_POWER
from ssm_metarl.tuning.population import Population
from ssm_metarl.tuning.records import Decision, Phase, Report, Status, mean_name
from ssm_metarl.tuning.store import read_state, request_rollback

pytestmark = pytest.mark.usefixtures("fast")


def decided(population: Population) -> list[dict[str, Any]]:
    """The log without failures, and without what it cost to play again."""
    kept = [event for event in events(population) if event["decision"] != Decision.FAILED]
    return [{name: value for name, value in event.items() if name not in ("spent", "losers")} for event in kept]


def failed(population: Population) -> list[dict[str, Any]]:
    return events(population, decision=Decision.FAILED)


class Accidents:
    """Processes that die: as many as `times` of a member (None: the incumbent's), before it reports its iteration `at`
    in a phase."""

    def __init__(
        self,
        member: int | None,
        phase: Phase,
        *,
        times: int = 1,
        gone: bool = False,
        cycle: int | None = None,
        at: int = 1,
    ):
        self.member, self.phase, self.times, self.gone, self.cycle, self.at = member, phase, times, gone, cycle, at

    def __call__(self, population: Population, member: int, report: Report) -> bool:
        racing = any(entry["status"] != Status.IDLE for entry in population.race)
        phase = Phase.RACE if racing else population.progress.phase
        whose = population.incumbent.member if self.member is None else self.member
        due = member == whose and phase == self.phase and report.iterations >= self.at
        if not due or self.times == 0 or self.cycle not in (None, population.progress.cycle):
            return False
        self.times -= 1
        population.crashed(member, "its process died")
        if self.gone:
            population.gone(member, "its node is lost")
        return True


# --- Processes that die -----------------------------------------------------------------------------------


@pytest.mark.parametrize("member", [0, 1, 2])
@pytest.mark.parametrize("at", [1, 3])
def test_a_process_that_dies_in_a_race_changes_no_decision(folders: Iterator[Path], member: int, at: int) -> None:
    """In the first round or in a later one, of which it repeats those before."""
    quiet = drive(new_population(next(folders), **SHORT), World())
    accident = Accidents(member, Phase.RACE, at=at)
    disturbed = drive(new_population(next(folders), **SHORT), World(), disturb=accident)
    assert [(event["member"], event["reason"]) for event in failed(disturbed)] == [(member, "its process died")]
    assert decided(disturbed) == decided(quiet)
    assert disturbed.progress.spent == quiet.progress.spent
    assert skill_of(disturbed) == skill_of(quiet)
    assert disturbed.progress.failures == 0, "checkpoints without a failure came after it"


def test_a_process_that_dies_in_a_stretch_changes_nothing(folders: Iterator[Path]) -> None:
    quiet = drive(new_population(next(folders), **SHORT), World())
    disturbed = drive(new_population(next(folders), **SHORT), World(), disturb=Accidents(0, Phase.WARM_UP))
    assert len(failed(disturbed)) == 1
    assert decided(disturbed) == decided(quiet)
    assert disturbed.progress.spent == quiet.progress.spent


def test_reports_that_a_process_repeats_are_known_already(tmp_path: Path) -> None:
    population = new_population(tmp_path, warm_up=3, mutate=False, cycles=1)
    population.begin()
    (assignment,) = population.assignments.values()

    def report(iterations: int, number: int = assignment.number, ended: bool = False) -> Report:
        returns, steps = np.full((2, 20), 0.1 * iterations), 100 * iterations
        values = {"iteration": iterations, "env_steps": steps, "returns": returns, "spent": 100, "ended": ended}
        return Report(number=number, iterations=iterations, **values)

    for iterations in (1, 2):
        population.report(0, report(iterations))
    population.crashed(0, "its process died")
    population.report(0, report(2, number=assignment.number + 7))  # another assignment's
    for iterations in (1, 2):
        population.report(0, report(iterations))
    assert population._live()["spent"] == 200
    assert population._live()["left"] == 1
    population.report(0, report(3, ended=True))
    assert population.progress.spent["total"] == 300
    assert [float(row.mean()) for row in population.incumbent.latest] == pytest.approx([0.1, 0.2, 0.3])
    assert population.incumbent.iteration == 3


def test_the_end_of_an_assignment_may_be_repeated(tmp_path: Path) -> None:
    """A process that died while the others were still at work says again that it has ended."""
    world = World()
    population = new_population(tmp_path, **SHORT)
    again: dict[int, Report] = {}

    def repeat(population: Population, member: int, report: Report) -> bool:
        for other, earlier in list(again.items()):
            population.report(other, Report.from_json(earlier.to_json()))
        again.clear()
        if report.ended:
            again[member] = report
        return False

    assert drive(population, world, disturb=repeat).finished == "3 cycles"
    assert population.progress.spent["losers"] <= world.spent
    assert population.progress.spent["total"] - population.progress.spent["assessments"] <= world.spent


def test_a_process_that_dies_again_and_again_stops_the_run(tmp_path: Path) -> None:
    population = drive(new_population(tmp_path, **SHORT), World(), disturb=Accidents(1, Phase.RACE, times=99))
    assert population.finished == "3 failures in a row"
    assert [event["member"] for event in failed(population)] == [1, 1, 1]
    assert population.progress.best == population.incumbent.checkpoint
    assert skill_of(population) > 0.3
    assert population.assignments == {}


def test_a_lost_node_is_one_failure(tmp_path: Path) -> None:
    """Though it takes two processes with it."""
    population = new_population(tmp_path, **SHORT)
    population.begin()
    while Phase.RACE not in {population.progress.phase}:
        report_quietly(population)
    while len(population.assignments) < 2:
        report_quietly(population)
    for member in population.assignments:
        population.crashed(member, "its node is lost")
    assert population.progress.failures == 1
    population.crashed(min(population.assignments), "its node is lost again")
    assert population.progress.failures == 2


def report_quietly(population: Population) -> None:
    """Every assignment ends at once."""
    for member, assignment in list(population.assignments.items()):
        returns = np.random.default_rng([member, assignment.number]).normal(0.5, 0.01, (2, 20))
        at = population.incumbent.iteration + assignment.iterations
        report = Report(number=assignment.number, iterations=assignment.iterations, returns=returns, iteration=at)
        report.env_steps, report.spent, report.ended = 1600 * at, 1600, True
        population.report(member, report)


def test_crashes_far_apart_are_not_in_a_row(tmp_path: Path) -> None:
    accidents = [Accidents(0, Phase.RACE, cycle=cycle) for cycle in range(4)]

    def disturb(population: Population, member: int, report: Report) -> bool:
        return any(accident(population, member, report) for accident in accidents)

    population = drive(new_population(tmp_path, **{**SHORT, "cycles": 5}), World(), disturb=disturb)
    assert population.finished == "5 cycles"
    assert len(failed(population)) == 4


# --- Members that do not come back ------------------------------------------------------------------------


@pytest.mark.parametrize("phase", [Phase.WARM_UP, Phase.RACE, Phase.STRETCH])
def test_without_the_incumbents_member_another_goes_on(tmp_path: Path, phase: Phase) -> None:
    rules = {**SHORT, "cycles": 5}
    population = drive(new_population(tmp_path, **rules), World(), disturb=Accidents(None, phase, gone=True))
    assert population.finished == "5 cycles"
    assert population.statuses.count(Status.GONE) == 1
    assert population.statuses[population.incumbent.member] != Status.GONE
    assert len(failed(population)) == 2, "it died, and did not come back"
    assert population._live()["members"].count("gone") == 1
    assert skill_of(population) > 0.4


def test_a_process_that_is_gone_is_one_failure(tmp_path: Path) -> None:
    population = new_population(tmp_path, **SHORT)
    population.begin()
    population.crashed(0, "its node is lost")
    population.gone(0, "its node is lost")
    assert population.progress.failures == 1
    assert list(population.assignments) == [1]
    population.gone(0, "as was said")
    assert population.progress.failures == 1


def test_a_ruinous_challenger_does_not_win_because_the_incumbent_is_gone(tmp_path: Path) -> None:
    """The race is void, and held again."""
    world = World(gain=lambda config, iteration: 0.01 if config["outer_lr"] == 0.001 else -0.3, start=0.6)
    rules = {**SHORT, "evolve": ("outer_lr",), "proposals": 2}
    population = drive(new_population(tmp_path, **rules), world, disturb=Accidents(0, Phase.RACE, gone=True))
    assert population.finished == "3 cycles"
    assert not events(population, decision=Decision.ACCEPTED)
    assert population.incumbent.config["outer_lr"] == 0.001
    assert skill_of(population) > 0.6


@pytest.mark.parametrize("at_work", [False, True], ids=["while it waits", "at work"])
def test_without_a_challenger_the_others_race(tmp_path: Path, at_work: bool) -> None:
    """Also where it is lost while the incumbent plays the first round for all."""
    lost = []

    def disturb(population: Population, member: int, report: Report) -> bool:
        racing = len(population.assignments) > 1
        waits = population.progress.phase == Phase.RACE and member == 0 and not racing
        if lost or not (racing if at_work else waits):
            return False
        lost.append(2)
        population.gone(2, "its node is lost")
        return False

    population = drive(new_population(tmp_path, **SHORT), World(), disturb=disturb)
    assert lost == [2]
    assert population.finished == "3 cycles"
    first, *_ = events(population, phase=Phase.RACE, decision=Decision.ACCEPTED)
    assert first["accepted"][0]["after"] > first["accepted"][0]["before"]
    assert population.statuses[2] == Status.GONE


def test_a_challenger_whose_process_is_gone_says_nothing_of_its_option(folders: Iterator[Path]) -> None:
    """One whose weights are not finite went too far."""
    rules = {**SHORT, "cycles": 1, "evolve": ("outer_lr",), "proposals": 2}
    flat = World(gain=lambda config, iteration: 0.0, start=0.8, drift=0.0)
    gone = drive(new_population(next(folders), **rules), flat, disturb=Accidents(1, Phase.RACE, gone=True))
    assert gone.statuses[1] == Status.GONE
    assert [entry["reason"] for entry in events(gone, phase=Phase.RACE)[-1]["contenders"] if entry["reason"]]
    flat.failure = lambda config, iteration: "not finite" if config["outer_lr"] > 0.001 else None
    broken = drive(new_population(next(folders), **rules), flat)
    factors = [population.options.tallies["outer_lr"].factor for population in (gone, broken)]
    assert factors == [FIRST, FIRST**LOSS_POWER]


def test_a_challenger_that_came_back_late_says_nothing_of_its_option_either(tmp_path: Path) -> None:
    """Its process was gone while the others raced on."""
    rules = {**SHORT, "cycles": 1, "evolve": ("outer_lr",), "proposals": 2}
    flat, lost = World(gain=lambda config, iteration: 0.0, start=0.8, drift=0.0), list[int]()

    def disturb(population: Population, member: int, report: Report) -> bool:
        if len(population.assignments) > 1 and not lost:
            lost.append(1)
            population.gone(1, "its node is lost")
        elif lost and report.iterations >= 3 and population.statuses[1] == Status.GONE:
            population.statuses[1] = Status.IDLE  # as the scheduler does once its trial runs again
        return False

    population = drive(new_population(tmp_path, **rules), flat, disturb=disturb)
    assert lost == [1]
    assert Status.GONE not in population.statuses
    assert population.options.tallies["outer_lr"].factor == FIRST


def test_without_any_challenger_the_incumbent_trains_alone(tmp_path: Path) -> None:
    population = new_population(tmp_path, **SHORT, max_failures=9)
    for member in (1, 2):
        population.gone(member, "its node is lost")
    drive(population, World())
    assert population.finished == "3 cycles"
    assert population.progress.spent["losers"] == 0
    assert len(events(population, phase=Phase.STRETCH, decision=Decision.CONTINUED)) == 3


def test_the_loss_of_all_ends_the_run(tmp_path: Path) -> None:
    population = new_population(tmp_path, **SHORT, max_failures=9)
    with pytest.raises(Killed):
        drive(population, World(), reports=8)
    for member in range(3):
        population.gone(member, "the cluster is gone")
    assert population.finished == "every member is gone"
    assert drive(resumed(population), World()).finished == "3 cycles"


# --- What is not finite -----------------------------------------------------------------------------------


def diverges(where: Callable[[Mapping[str, Any], int], bool]) -> World:
    return World(
        failure=lambda config, iteration: "the meta-gradient is not finite" if where(config, iteration) else None
    )


def test_a_challenger_that_diverges_leaves_the_race(tmp_path: Path) -> None:
    world = diverges(lambda config, iteration: config["outer_lr"] > 0.001)
    population = drive(new_population(tmp_path, **SHORT, evolve=("outer_lr",)), world)
    assert population.finished == "3 cycles"
    assert failed(population) == []
    contenders = events(population, phase=Phase.RACE)[0]["contenders"]
    reasons = {entry["value"]: entry["reason"] for entry in contenders}
    assert reasons[0.004] == "the meta-gradient is not finite"
    assert population.incumbent.config["outer_lr"] <= 0.001


def test_an_incumbent_that_diverges_goes_back_with_half_the_rate(tmp_path: Path) -> None:
    """And with other random numbers, from its last checkpoint."""
    world = diverges(lambda config, iteration: iteration == 3 and config["seed"] == 0)
    population = drive(new_population(tmp_path, **SHORT, mutate=False), world)
    assert population.finished == "3 cycles"
    (failure,) = failed(population)
    assert failure["reason"] == "the meta-gradient is not finite"
    start, retreat = population.incumbent.path
    assert retreat[0] == 2
    assert retreat[1]["outer_lr"] == pytest.approx(start[1]["outer_lr"] / 2)
    assert retreat[1]["seed"] != start[1]["seed"]
    assert population.incumbent.config == {**population.base, **retreat[1]}


def test_where_the_incumbent_diverges_in_a_race_a_challenger_wins(tmp_path: Path) -> None:
    world = diverges(lambda config, iteration: iteration == 4 and config["outer_lr"] == 0.001)
    population = drive(new_population(tmp_path, **{**SHORT, "cycles": 1}, evolve=("outer_lr",)), world)
    (race,) = events(population, phase=Phase.RACE)
    assert race["decision"] == Decision.ACCEPTED
    assert race["contenders"][0]["reason"] == "the meta-gradient is not finite"
    assert population.incumbent.config["outer_lr"] != 0.001


@pytest.mark.parametrize("proposals", [1, 2, 4])
@pytest.mark.parametrize("at", [2, 3])
def test_where_all_diverge_the_incumbent_goes_back(tmp_path: Path, proposals: int, at: int) -> None:
    world = diverges(lambda config, iteration: iteration == at and config["seed"] == 0)
    population = drive(new_population(tmp_path, **{**SHORT, "proposals": proposals}), world)
    assert population.finished == "3 cycles"
    assert len(failed(population)) == 1
    assert population.incumbent.config["seed"] != 0


@pytest.mark.parametrize("proposals", [1, 2])
def test_where_the_incumbent_alone_diverges_at_once_a_challenger_goes_on(tmp_path: Path, proposals: int) -> None:
    """Before any of them has played: the incumbent plays the first round for all."""
    world = diverges(lambda config, iteration: iteration == 2 and config["outer_lr"] == 0.001)
    rules = {**SHORT, "proposals": proposals, "cycles": 1}
    population = drive(new_population(tmp_path, **rules, evolve=("outer_lr",)), world)
    assert population.finished == "1 cycle"
    assert population.incumbent.config["outer_lr"] != 0.001
    assert population.progress.spent["total"] == world.spent


def test_what_diverges_always_stops_the_run_and_keeps_the_best(tmp_path: Path) -> None:
    population = drive(new_population(tmp_path, **SHORT), diverges(lambda config, iteration: iteration >= 9))
    assert population.finished == "3 failures in a row"
    assert population.progress.best is not None
    assert skill_of(population) > 0.3
    rates = [changes["outer_lr"] for _, changes in population.incumbent.path if "seed" in changes][1:]
    assert len(rates) == 2
    assert rates[1] == pytest.approx(rates[0] / 2)


def test_a_run_that_never_trained_has_nothing_to_hand_over(tmp_path: Path) -> None:
    population = drive(new_population(tmp_path, **SHORT), diverges(lambda config, iteration: True))
    assert population.finished == "3 failures in a row"
    assert population.progress.best is None
    assert population.archive == {}


# --- Requests ---------------------------------------------------------------------------------------------


def ask(population: Population, name: str) -> None:
    population.store.request(name)


def test_a_person_goes_back_to_a_checkpoint(tmp_path: Path) -> None:
    population = new_population(tmp_path, **{**SHORT, "cycles": 6})
    with pytest.raises(Killed):
        drive(population, World(), reports=40)
    name = min(population.archive)
    iteration = population.archive[name].iteration
    assert iteration < population.incumbent.iteration
    ask(population, name)
    drive(again := resumed(population), World())
    (back,) = events(again, decision=Decision.ROLLED_BACK)
    assert (back["checkpoint"], back["reason"], back["iteration"]) == (name, "asked for", iteration)
    assert again.finished == "6 cycles"
    assert again.store.requests() == []
    assert [iteration] == [at for at, changes in again.incumbent.path[1:] if set(changes) == {"seed"}]
    assert again.incumbent.config["seed"] != again.base["seed"]


def test_a_request_takes_effect_while_a_run_goes_on(tmp_path: Path) -> None:
    asked = []

    def disturb(population: Population, member: int, report: Report) -> bool:
        if not asked and population.progress.cycle == 2:
            asked.append(min(population.archive))
            ask(population, asked[0])
        return False

    population = drive(new_population(tmp_path, **SHORT), World(), disturb=disturb)
    (back,) = events(population, decision=Decision.ROLLED_BACK)
    assert back["checkpoint"] == asked[0]
    assert population.finished == "3 cycles"


def test_the_last_of_several_requests_counts(tmp_path: Path) -> None:
    population = drive(new_population(tmp_path, **{**SHORT, "cycles": 5}), World())
    first, *_, last = sorted(name for name, record in population.archive.items() if record.level is not None)
    assert first != last
    for name in (first, last):
        ask(population, name)
    again = resumed(population, cycles=6)
    again.begin()
    assert again.incumbent.checkpoint == last
    assert [event["checkpoint"] for event in events(again, decision=Decision.ROLLED_BACK)] == [first, last]
    assert again.store.requests() == []


@pytest.mark.parametrize(
    ("content", "name"),
    [("{", "?"), ("[]", "?"), ("{}", "?"), ('{"checkpoint": "iteration_9", "time": 1.0}', "iteration_9")],
)
def test_a_request_that_makes_no_sense_is_refused(folders: Iterator[Path], content: str, name: str) -> None:
    """With a line in the log; nothing else changes."""
    quiet = drive(new_population(next(folders), **SHORT), World())
    population = new_population(next(folders), **SHORT)
    (population.store.folder / "requests" / "1.json").write_text(content)
    drive(population, World())
    (refused,) = events(population, decision=Decision.REFUSED)
    assert refused["reason"] == f"the run keeps no checkpoint {name!r} any more"
    assert [event for event in events(population) if event != refused] == events(quiet)
    assert population.store.requests() == []


def test_a_request_of_a_finished_run_counts_when_it_goes_on(tmp_path: Path) -> None:
    population = drive(new_population(tmp_path, **SHORT), World())
    name = min(population.archive)
    ask(population, name)
    again = drive(resumed(population, cycles=4), World())
    assert [event["checkpoint"] for event in events(again, decision=Decision.ROLLED_BACK)] == [name]
    assert again.finished == "4 cycles"


# --- Disk and what others read ----------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 3])
def test_the_disk_does_not_fill(tmp_path: Path, keep: int) -> None:
    """Beside the last ones only the incumbent's, the best and the peak, each with its running mean."""
    checked = []

    def disturb(population: Population, member: int, report: Report) -> bool:
        on_disk = {path.name for path in population.store.checkpoints.iterdir()}
        known = set(population.archive)
        assert len(known) <= keep + 3
        assert on_disk >= {name for record in known for name in (record, mean_name(record))}
        assert len(on_disk) <= 2 * (keep + 3) + 2, "and the one that is being made"
        checked.append(len(on_disk))
        return False

    population = drive(new_population(tmp_path, cycles=12, keep_checkpoints=keep), World(), disturb=disturb)
    assert max(checked) > 2 * keep
    best = population.archive[population.progress.best or ""]
    assert read_policy(population.store.checkpoints, best.exported).iteration == best.iteration


def test_the_state_is_what_others_read(tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    phases, statuses = set[str](), set[str]()

    def disturb(population: Population, member: int, report: Report) -> bool:
        state = json.loads((tmp_path / "rsi" / "state.json").read_text(), parse_constant=refuse)
        live = state["live"]
        phases.add(live["phase"])
        statuses.update(live["members"])
        assert len(live["members"]) == 3
        assert live["left"] >= 0
        assert live["spent"] >= state["progress"]["spent"]["total"]
        assert {entry["member"] for entry in live["race"]} <= {0, 1, 2}
        return False

    population = drive(new_population(tmp_path, **SHORT), World(), disturb=disturb)
    assert {Phase.WARM_UP, Phase.RACE, Phase.STRETCH} <= phases
    assert {Status.INCUMBENT, Status.CHALLENGER, Status.IDLE} <= statuses
    for line in (tmp_path / "rsi" / "events.jsonl").read_text().splitlines():
        event = json.loads(line, parse_constant=refuse)
        assert {"time", "cycle", "phase", "decision", "iteration", "env_steps", "spent"} <= set(event)
    assert population._live()["members"] == ["incumbent", "idle", "idle"] or population.incumbent.member != 0


def test_tasks_that_were_lost_count_as_played_at_random(tmp_path: Path) -> None:
    population = new_population(tmp_path, warm_up=1, mutate=False, cycles=1, stretch=1, assess_share=0.0)
    population.begin()
    for iteration in (1, 2):
        (assignment,) = population.assignments.values()
        returns = np.where(np.arange(20) % 2, np.nan, 0.8) * np.ones((2, 1))
        report = Report(number=assignment.number, iterations=1, returns=returns, iteration=iteration, ended=True)
        report.env_steps, report.spent = 1600 * iteration, 1600
        population.report(0, Report.from_json(report.to_json()))
    (assessed,) = events(population, phase=Phase.STRETCH)
    assert assessed["metrics"]["average_return"] == pytest.approx(0.4)
    assert population.finished == "1 cycle"


def test_a_challenger_that_loses_every_task_is_still_json(tmp_path: Path) -> None:
    """It leaves the race, and the run can be resumed at any moment."""

    def disturb(population: Population, member: int, report: Report) -> bool:
        if member and report.returns is not None:
            report.returns = np.full_like(report.returns, np.nan)
        read_state(tmp_path)
        return False

    population = drive(new_population(tmp_path, **SHORT), World(), disturb=disturb)
    assert population.finished == "3 cycles"
    races = events(population, phase=Phase.RACE)
    assert {event["decision"] for event in races} == {Decision.REJECTED}
    contenders = [entry for entry in races[0]["contenders"] if entry["option"]]
    assert [entry["return"] for entry in contenders] == [None] * len(contenders)
    assert drive(resumed(population, cycles=4), World()).finished == "4 cycles"


def test_a_request_names_what_the_run_keeps(tmp_path: Path) -> None:
    drive(new_population(tmp_path, **SHORT), World())
    with pytest.raises(ValueError, match="keeps no checkpoint 'iteration_9'"):
        request_rollback(tmp_path, "iteration_9")
