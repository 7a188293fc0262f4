"""A member does what it is assigned: bit for bit the same whether it goes on, starts again, or takes over rollouts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders import assert_equal_arrays
from faulty_tasks import FaultyNavigation
from simulated import Killed, World, drive, events, new_population
from ssm_metarl.algorithms.rollouts import Rollouts
from ssm_metarl.config import TrainConfig
from ssm_metarl.distributed.trainer import MetaTrainer
from ssm_metarl.evaluation.evaluate import evaluate_policy
from ssm_metarl.storage.checkpoint import load_checkpoint
from ssm_metarl.storage.contents import CheckpointError
from ssm_metarl.tasks import Task
from ssm_metarl.tasks.navigation import Navigation2D
from ssm_metarl.tuning.member_trainer import MemberTrainer
from ssm_metarl.tuning.population import Population
from ssm_metarl.tuning.records import Assignment, Play, Report, mean_name
from ssm_metarl.tuning.store import RunStore

SMALL = {"hidden_dim": 8, "state_dim": 4, "meta_batch": 4, "episodes": 2, "epochs": 2, "lr_schedule": "constant"}
ITERATION = 4 * 2 * 2 * 100
"""Environment steps of a meta-iteration: tasks, episodes, stages, steps."""


def options(**changes: Any) -> dict[str, Any]:
    config = {**SMALL, "normalize_observations": True, "scale_rewards": True, **changes}
    return TrainConfig.for_task("navigation-2d", **config).to_dict()


class LocalExchange:
    """Assignments and rollouts within this process; Tune copies a trainable's config, but not this."""

    def __init__(self) -> None:
        self.assignments: list[Assignment] = []
        self.offered: dict[str, Sequence[Rollouts]] = {}
        self.fetched: list[str] = []
        self.several: list[int] = []  # threads of an iteration each; then as in the config

    def __deepcopy__(self, memo: object) -> LocalExchange:
        return self

    def next(self, member: int, after: int) -> dict[str, Any] | None:
        waiting = [assignment for assignment in self.assignments if assignment.number > after]
        return waiting[0].to_dict() if waiting else None

    def threads(self, member: int) -> int | None:
        return self.several.pop(0) if self.several else None

    def offer(self, key: str, rollouts: Sequence[Rollouts]) -> None:
        self.offered[key] = list(rollouts)

    def fetch(self, key: str) -> Sequence[Rollouts]:
        self.fetched.append(key)
        return self.offered.get(key, ())


class Members:
    """Members in this process, each with its trainer."""

    def __init__(self, folder: Path) -> None:
        self.archive, self.exchange = folder, LocalExchange()
        self.trainers: list[MemberTrainer] = []
        self.numbers = 0

    def member(self, **more: Any) -> MemberTrainer:
        machine = {"num_workers": 0, "learner_threads": 1, "device": "cpu", "sample_timeout_s": "auto"}
        config = {"member": len(self.trainers), "exchange": self.exchange, "archive": str(self.archive)}
        self.trainers.append(MemberTrainer({**config, "mean_iterations": 4, "machine": machine, **more}))
        return self.trainers[-1]

    def play(self, member: MemberTrainer, config: dict[str, Any], start: str | None, **what: Any) -> list[Report]:
        """A member carries out an assignment; its reports."""
        self.numbers += 1
        assignment = Assignment(number=self.numbers, config=config, start=start, **what)
        self.exchange.assignments = [assignment]
        reports = list[Report]()
        while not reports or not (reports[-1].ended or reports[-1].failure):
            result = member.step()
            assert result["done"] is False
            reports.append(Report.from_json(result["report"]))
        return reports

    def checkpoint(self, name: str) -> Path:
        return self.archive / name


@pytest.fixture
def population(tmp_path: Path) -> Iterator[Members]:
    found = Members(tmp_path)
    yield found
    for trainer in found.trainers:
        trainer.stop()


def assert_same_reports(one: list[Report], other: list[Report]) -> None:
    """But for the time and the number of the assignment."""
    for ours, theirs in zip(one, other, strict=True):
        assert ours.returns is not None
        assert theirs.returns is not None
        np.testing.assert_array_equal(ours.returns, theirs.returns)
        assert (ours.iteration, ours.env_steps) == (theirs.iteration, theirs.env_steps)


def assert_same_checkpoint(population: Members, one: str, other: str) -> None:
    """The weights, their running mean, the optimiser, and what observations are normalised with."""
    for ours, theirs in ((one, other), (mean_name(one), mean_name(other))):
        first, second = (load_checkpoint(population.checkpoint(name)) for name in (ours, theirs))
        assert_equal_arrays(first.policy, second.policy)
        assert_equal_arrays(first.optimizer, second.optimizer)
        assert first.progress == second.progress
        assert first.config == second.config


def test_a_member_takes_threads_of_idle_ones(population: Members) -> None:
    one, two = population.member(), population.member()
    given = {"iterations": 2, "seed": 1, "plays": [Play(policy="last", split="validation", tasks=2)]}
    alone = population.play(one, options(), None, checkpoint="alone", **given)
    population.exchange.several = [2, 3]
    helped = population.play(two, options(), None, checkpoint="helped", **given)
    assert [len(member.learner._run.modules) for member in (one, two)] == [1, 3]
    assert_same_reports(alone, helped)
    assert_same_checkpoint(population, "alone", "helped")


# --- Training ---------------------------------------------------------------------------------------------


def test_a_member_trains_as_train_does(population: Members) -> None:
    reports = population.play(population.member(), options(), None, iterations=3, checkpoint="end")
    alone = MetaTrainer({**options(), "learner_threads": 1})
    metrics = [alone.step() for _ in range(3)]
    alone.stop()
    for report, line in zip(reports, metrics):
        assert report.returns is not None
        np.testing.assert_allclose(report.returns.mean(1), line["details"]["return_by_step"], rtol=1e-5)
    assert [report.iterations for report in reports] == [1, 2, 3]
    assert [report.spent for report in reports] == [ITERATION] * 3
    assert [report.ended for report in reports] == [False, False, True]
    assert (reports[-1].iteration, reports[-1].env_steps) == (3, 3 * ITERATION)
    saved = load_checkpoint(population.checkpoint("end"))
    assert_equal_arrays(saved.policy, alone.learner.weights())
    assert saved.config == TrainConfig.from_dict({**options(), "learner_threads": 1}).to_dict()


def test_going_on_in_place_equals_starting_again_from_the_checkpoint(population: Members) -> None:
    """Where a leg ends, and within a race, where a process that died begins again."""
    steady, again = population.member(), population.member()
    population.play(steady, options(), None, iterations=2, checkpoint="a")
    first = population.play(steady, options(), "a", iterations=1)
    both = first + population.play(steady, options(), "a", iterations=3)
    assert [report.iterations for report in both] == [1, 2, 3]
    population.play(steady, options(), "a", iterations=3, checkpoint="in place")
    repeated = population.play(again, options(), "a", iterations=3, checkpoint="again")
    assert_same_reports(both, repeated)
    assert_same_checkpoint(population, "in place", "again")


def test_another_assignment_in_between_changes_nothing(population: Members) -> None:
    """A member that lost a race is rolled back to the incumbent."""
    steady, loser = population.member(), population.member()
    population.play(steady, options(), None, iterations=1, checkpoint="a")
    population.play(loser, options(outer_lr=0.1), "a", iterations=2)
    reports = [population.play(member, options(), "a", iterations=2, checkpoint=name) for member, name in
               ((steady, "one"), (loser, "other"))]  # fmt: skip
    assert_same_reports(*reports)
    assert_same_checkpoint(population, "one", "other")


def test_the_assigned_learning_rate_is_the_one_that_trains(population: Members) -> None:
    """Parameters move ten times as far in the first step after a checkpoint, whatever that was trained with."""
    member = population.member()
    population.play(member, options(outer_lr=1e-4), None, iterations=1, checkpoint="a")
    before = load_checkpoint(population.checkpoint("a")).policy["encoder.weight"]
    moved = []
    for rate in (1e-3, 1e-2):
        population.play(member, options(outer_lr=rate, epochs=1), "a", iterations=1, checkpoint=f"{rate}")
        moved.append(load_checkpoint(population.checkpoint(f"{rate}")).policy["encoder.weight"] - before)
    np.testing.assert_allclose(moved[1], 10 * moved[0], rtol=0.05, atol=1e-6)
    assert np.abs(moved[1]).max() > 1e-4


def test_the_running_mean_reaches_back_as_far_as_it_may(population: Members) -> None:
    member, weights = population.member(), []
    for number in range(7):
        start = f"{number - 1}" if number else None
        population.play(member, options(), start, iterations=1, checkpoint=f"{number}")
        weights.append(load_checkpoint(population.checkpoint(f"{number}")).policy["encoder.weight"])
    expected = weights[0]
    for number, new in enumerate(weights[1:], 2):
        expected = expected + (new - expected) * max(1 / number, 1 / 4)
    mean = load_checkpoint(population.checkpoint("6_mean"))
    np.testing.assert_allclose(mean.policy["encoder.weight"], expected, rtol=1e-5, atol=1e-7)
    assert mean.progress["mean_iterations"] == 7
    assert mean.optimizer == {}


# --- Rollouts that are taken over -------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "stages"), [({"outer_lr": 0.03}, 2), ({"epochs": 4}, 2), ({"inner_lr": 0.3}, 1)])
def test_what_another_has_played_equals_playing_it(population: Members, changes: Any, stages: int) -> None:
    incumbent, sharing, alone = (population.member() for _ in range(3))
    population.play(incumbent, options(), None, iterations=2, checkpoint="a")
    population.play(incumbent, options(), "a", iterations=1, share="race")
    config = options(**changes)
    what = {"take": "race", "stages": stages, "iterations": 2}
    shared = population.play(sharing, config, "a", **what, checkpoint="shared")
    played = population.play(alone, config, "a", iterations=2, checkpoint="played")
    assert_same_reports(shared, played)
    assert_same_checkpoint(population, "shared", "played")
    assert shared[1].spent == played[1].spent
    assert shared[0].spent == played[0].spent - sum(
        each.num_steps for each in population.exchange.offered["race"][:stages]
    )
    assert shared[0].spent <= ITERATION * (2 - stages) // 2
    assert population.exchange.fetched == ["race"], "only the first iteration's"


def test_rollouts_that_are_gone_are_played(population: Members) -> None:
    population.play(population.member(), options(), None, iterations=1, checkpoint="a")
    one, other = population.member(), population.member()
    gone = population.play(one, options(), "a", iterations=1, take="nowhere", stages=2, checkpoint="gone")
    played = population.play(other, options(), "a", iterations=1, checkpoint="played")
    assert_same_reports(gone, played)
    assert gone[0].spent == 0, "who offered them has counted them"


# --- Other sizes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{"state_dim": 8}, {"hidden_dim": 12}, {"num_layers": 2}, {"state_dim": 2, "hidden_dim": 6}]
)
def test_only_a_member_takes_another_size(population: Members, changes: dict[str, int]) -> None:
    """Growing keeps the policy's outputs, hence its returns."""
    old, new = population.member(), population.member()
    population.play(old, options(), None, iterations=2, checkpoint="a")
    other = options(**changes)
    with pytest.raises(CheckpointError, match="instead of"):
        MetaTrainer(other).load_checkpoint(str(population.checkpoint("a")))
    play = {"iterations": 0, "plays": [Play(policy="last", split="validation", tasks=4)], "seed": 3}
    (before,) = population.play(old, options(), "a", **play)
    (after,) = population.play(new, other, "a", **play)
    assert before.resize_error is None
    assert after.resize_error is not None
    difference = np.abs(after.plays["last validation"][0] - before.plays["last validation"][0]).max()
    if changes.get("hidden_dim", 9) > 8:
        assert after.resize_error < 1e-5
        assert difference < 1e-3
    else:
        assert after.resize_error > 0
    # A resize plays ten tasks twice to measure what contributes; episodes that reach their goal are shorter.
    assert 1200 <= after.assessed - before.assessed <= 10 * 2 * 100
    trained = population.play(new, other, "a", iterations=1, checkpoint="b")
    assert trained[-1].iteration == 3
    assert trained[-1].env_steps == before.env_steps + trained[-1].spent
    assert load_checkpoint(population.checkpoint("b")).spec == new.spec
    population.play(old, other, "b", iterations=1, checkpoint="c")
    assert load_checkpoint(population.checkpoint("c_mean")).spec == new.spec


def test_a_resize_is_the_same_again(population: Members) -> None:
    population.play(population.member(), options(), None, iterations=1, checkpoint="a")
    for name in ("one", "other"):
        population.play(population.member(), options(state_dim=2), "a", iterations=1, checkpoint=name)
    assert_same_checkpoint(population, "one", "other")


# --- Assessments ------------------------------------------------------------------------------------------


def test_an_assessment_plays_as_deployed(population: Members) -> None:
    """As many episodes and inner steps as training has, on the tasks that the seed draws."""
    member = population.member()
    population.play(member, options(), None, iterations=2, checkpoint="a")
    plays = [Play(policy=policy, split=split, tasks=5) for policy, split in
             (("last", "validation"), ("mean", "validation"), ("last", "shifted"))]  # fmt: skip
    (report,) = population.play(member, options(), "a", iterations=0, plays=plays, seed=7)
    assert set(report.plays) == {"last validation", "mean validation", "last shifted"}
    assert all(returns.shape == (2, 5) for returns in report.plays.values())
    assert report.assessed == 3 * 5 * 2 * 2 * 100
    assert (report.spent, report.returns, report.iterations) == (0, None, 0)
    assert not np.array_equal(report.plays["last validation"], report.plays["mean validation"])
    trainer = MetaTrainer(options())
    trainer.load_checkpoint(str(population.checkpoint("a")))
    for kind, split in (("last", "validation"), ("last", "shifted")):
        expected = evaluate_policy(
            trainer.learner.policy,
            trainer.train_config,
            trainer.distribution,
            trainer.pool,
            split=split,
            num_tasks=5,
            steps=1,
            episodes=2,
            seed=7,
        )
        np.testing.assert_array_equal(report.plays[f"{kind} {split}"], expected.returns.T)
    trainer.stop()


def test_an_assessment_does_not_disturb_training(population: Members) -> None:
    steady, assessed = population.member(), population.member()
    population.play(steady, options(), None, iterations=1, checkpoint="a")
    plays = [Play(policy="mean", split="validation", tasks=3)]
    for member, name, played in ((steady, "one", []), (assessed, "other", plays)):
        population.play(member, options(), "a", iterations=0, plays=played)
        population.play(member, options(), "a", iterations=2, checkpoint=name)
    assert_same_checkpoint(population, "one", "other")


def test_equal_seeds_assess_on_equal_tasks(population: Members) -> None:
    """So that two policies are compared in pairs; other seeds give others."""
    member = population.member()
    population.play(member, options(), None, iterations=1, checkpoint="a")
    plays = [Play(policy="last", split="validation", tasks=4)]
    found = [
        population.play(member, options(), "a", iterations=0, plays=plays, seed=seed)[0].plays["last validation"]
        for seed in (1, 1, 2)
    ]
    np.testing.assert_array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])


# --- What goes wrong --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_policy_that_is_not_finite_is_reported(population: Members) -> None:
    member = population.member()
    population.play(member, options(), None, iterations=1, checkpoint="a")
    *_, report = population.play(member, options(inner_lr=1e38), "a", iterations=2)
    assert report.failure is not None
    assert "not finite" in report.failure
    assert not report.ended
    # And the member does what it is assigned next.
    ended = population.play(member, options(), "a", iterations=1, checkpoint="b")[-1]
    assert (ended.ended, ended.iteration) == (True, 2)


class Broken(FaultyNavigation):
    """Every episode of a training task fails."""

    def sample(self, n: int, rng: np.random.Generator, split: str = "train") -> list[Task]:
        return [{**task, "fault": "raise"} for task in super().sample(n, rng, split)]


def test_an_environment_that_is_broken_is_reported(population: Members) -> None:
    member = population.member(task_distribution=Broken())
    (report,) = population.play(member, options(), None, iterations=2)
    assert report.failure is not None
    assert "of 8 episodes (support) were lost" in report.failure


def test_a_run_that_is_over_ends_the_member(population: Members) -> None:
    member = population.member()
    assert member.step()["done"] is True
    population.play(member, options(), None, iterations=1)
    assert member.step()["done"] is True


def test_tune_has_no_checkpoints_of_a_member(population: Members, tmp_path: Path) -> None:
    """It asks at the end of an experiment, also a member that never had an assignment."""
    member = population.member()
    folder = tmp_path / "tune"
    folder.mkdir()
    assert member.save_checkpoint(str(folder)) == str(folder)
    member.load_checkpoint(str(folder))
    assert list(folder.iterdir()) == []


def test_a_start_without_a_running_mean_has_its_weights_as_one(population: Members, tmp_path: Path) -> None:
    """As a run's own start, which another run wrote."""
    trainer = MetaTrainer(options())
    trainer.step()
    trainer.save_checkpoint(str(tmp_path / "start"))
    trainer.stop()
    member = population.member()
    population.play(member, options(), "start", iterations=1, checkpoint="a")
    start, last, mean = (
        load_checkpoint(population.checkpoint(name)).policy["encoder.weight"] for name in ("start", "a", "a_mean")
    )
    np.testing.assert_allclose(mean, (start + last) / 2, rtol=1e-6)


def test_members_share_processors() -> None:
    machine = {"num_workers": 2, "device": "cpu"}
    request = MemberTrainer.default_resource_request({"machine": machine, "share": 0.25})
    assert request.bundles == [{"CPU": 0.25}] * 3


# --- A whole run ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_driver_killed_at_20_random_moments_gives_the_same_policy(tmp_path: Path) -> None:
    """Of the real trainer: the log before is a prefix of the one after, and the incumbent is the same to the bit."""

    def run(folder: Path, moments: list[int]) -> tuple[list[dict[str, Any]], dict[str, Any], int]:
        """Its log, its policy's weights, and how many reports there were since the last moment."""
        base = {**SMALL, "epochs": 1, "learner_threads": 1}
        found = new_population(folder, base=base, cycles=2, proposals=2, stretch=2, assess_tasks=4, assess_share=0.5)
        found._reference = Navigation2D.reference  # type: ignore[assignment]
        log: list[dict[str, Any]] = []
        heard = 0

        def count(population: Population, member: int, report: Report) -> bool:
            nonlocal heard
            heard += 1
            return False

        for order, moment in enumerate([*moments, 10**6]):
            members, heard = Members(found.store.checkpoints), 0
            with suppress(Killed):
                drive(found, World(), order, reports=moment, disturb=count, process=lambda number: members.member())  # noqa: B023
            for trainer in members.trainers:
                trainer.stop()
            if found.finished:
                break
            found = Population.resume(RunStore(folder), Navigation2D.reference)
            now = events(found)
            assert now[: len(log)] == log
            log = now
        best = found.archive[found.progress.best or ""]
        return events(found), load_checkpoint(found.store.checkpoints / best.exported).policy, heard

    log, policy, reports = run(tmp_path / "quiet", [])
    assert log[-1]["decision"] == "handed over"
    for number, moment in enumerate(np.random.default_rng(0).integers(0, reports - 1, 20)):
        ours, weights, _ = run(tmp_path / f"{number}", [int(moment)])
        assert ours == log
        assert_equal_arrays(weights, policy)
