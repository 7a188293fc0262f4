"""The learner group: the same metrics and weights to the bit as with the learner in the driver, whoever dies."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray

from builders import SMALL, assert_equal_arrays
from faulty_tasks import FaultyNavigation, Telling
from ssm_metarl.config import TrainConfig
from ssm_metarl.distributed import learner as learner_module
from ssm_metarl.distributed import trainer as trainer_module
from ssm_metarl.distributed.learner_group import LOOKS, LearnerGroup
from ssm_metarl.distributed.references import RemoteRollouts, RemoteWeights
from ssm_metarl.distributed.trainer import MetaTrainer
from ssm_metarl.tasks import Task

pytestmark = pytest.mark.usefixtures("ray_session", "enough_processors")

CARTPOLE_HORIZON = 500
NORMALIZED = {"normalize_observations": True, "scale_rewards": True}

CASES: dict[str, dict[str, Any]] = {
    "promp": {"task": "navigation-2d", "epochs": 2, "replay_episodes": 3},
    "two steps, normalised": {
        "task": "cartpole",
        "inner_steps": 2,
        "step_weights": (1, 0, 2),
        "epochs": 2,
        **NORMALIZED,
    },
    "time": {"task": "cartpole", "baseline": "time", "epochs": 2},
    "critic in minibatches": {"task": "cartpole", "algorithm": "rl2", "baseline": "critic", "minibatches": 2},
    "privileged": {
        "task": "navigation-2d",
        "algorithm": "rl2",
        "baseline": "privileged",
        "minibatches": 2,
        "trial_episodes": 2,
        **NORMALIZED,
    },
    "maml": {"task": "navigation-2d", "algorithm": "maml", "baseline": "critic"},
}

Run = tuple[list[dict[str, Any]], dict[str, Any]]
"""What must not depend on the machine: metrics, and all that a checkpoint has."""


@pytest.fixture
def enough_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' Ray has a CPU for each of four actors, but none for the trainer."""
    monkeypatch.setattr(trainer_module, "check_resources", lambda *needed: None)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """One task a shard, or two in minibatches, so that there is something to share."""

    def shards(shape: Any, minibatches: int) -> list[slice]:
        size = 1 if minibatches == 1 else 2
        return [slice(i, min(i + size, shape[0])) for i in range(0, shape[0], size)]

    monkeypatch.setattr(learner_module, "task_shards", shards)


@contextmanager
def running(distribution: Any = None, **options: Any) -> Iterator[MetaTrainer]:
    config = TrainConfig.for_task(options.pop("task"), **{**SMALL, "meta_batch": 8, **options}).to_dict()
    trainer = MetaTrainer({**config, "task_distribution": distribution})
    try:
        yield trainer
    finally:
        trainer.stop()


def result(trainer: MetaTrainer, iterations: int = 2, before: Callable[[int], None] = lambda iteration: None) -> Run:
    metrics = []
    for iteration in range(iterations):
        before(iteration)
        line = trainer.step()
        metrics.append({name: value for name, value in line.items() if name not in ("seconds", "restarts")})
    checkpoint = trainer.checkpoint()
    arrays = {**checkpoint.policy, **checkpoint.optimizer}
    arrays |= {f"replay {name}": array for name, array in (trainer.replay.arrays() if trainer.replay else {}).items()}
    moments = checkpoint.progress.get("normalizer", {})
    arrays |= {f"{name} {part}": np.array(value) for name, own in moments.items() for part, value in own.items()}
    return metrics, arrays


@cache
def in_driver(case: str) -> Run:
    with running(**CASES[case]) as trainer:
        return result(trainer)


def assert_same_run(run: Run, expected: Run) -> None:
    assert run[0] == expected[0]
    assert_equal_arrays(run[1], expected[1])


CASE_WORKERS_LEARNERS = [
    ("privileged", 1, 1),
    *[(case, workers, learners) for case in CASES for workers in (0, 2) for learners in (1, 2)],
]
CASE_WORKERS_LEARNERS += [("promp", 0, 4), ("critic in minibatches", 0, 4), ("time", 1, 3)]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "workers", "learners"), CASE_WORKERS_LEARNERS)
def test_the_result_depends_neither_on_learners_nor_on_workers(case: str, workers: int, learners: int) -> None:
    with running(**CASES[case], num_workers=workers, num_learners=learners) as trainer:
        assert_same_run(result(trainer), in_driver(case))


@pytest.mark.slow
def test_what_is_kept_for_replay_is_cut_as_it_was_played(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards depend on the longest episode, which another iteration's cuts are made for."""

    def shards(shape: Any, minibatches: int) -> list[slice]:
        parts = 1 if shape[1] == CARTPOLE_HORIZON else 8
        return [slice(i * shape[0] // parts, (i + 1) * shape[0] // parts) for i in range(parts)]

    monkeypatch.setattr(learner_module, "task_shards", shards)
    options = {"task": "cartpole", "replay_episodes": 3, "epochs": 1}
    with running(**options) as trainer:
        expected = result(trainer)
        assert trainer.learner.longest < CARTPOLE_HORIZON
    with running(**options, num_workers=1, num_learners=1) as trainer:
        assert_same_run(result(trainer), expected)


# --- Deaths and faults ------------------------------------------------------------------------------------


def processes(*names: str) -> list[int]:
    """Of the actors of these classes in this test's Ray."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith(tuple(f"ray::{name}" for name in names)):
                found.append(process.pid)
    return found


@pytest.mark.slow
def test_a_learner_that_dies_between_iterations_and_within_one_changes_nothing() -> None:
    killed = []

    def kill(iteration: int) -> None:
        killed.append(trainer.learner.processes()[iteration])  # type: ignore[attr-defined]
        os.kill(killed[-1], signal.SIGKILL)

    with running(**CASES["promp"], num_learners=2) as trainer:
        assert isinstance(trainer.learner, LearnerGroup)
        update = trainer.learner._gradient

        def dying(*arguments: Any) -> Any:
            if trainer.meta_iteration == 1 and len(killed) == 2:  # the first epoch's references are in the store
                kill(0)
            return update(*arguments)

        trainer.learner._gradient = dying  # type: ignore[method-assign]
        run = result(trainer, before=kill)
        assert not set(killed) & set(trainer.learner.processes())
    assert len(set(killed)) == 3
    assert_same_run(run, in_driver("promp"))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_task_that_cannot_be_played_is_lost_to_learners_as_to_the_driver(workers: int) -> None:
    class Faulty(FaultyNavigation):  # not of this module: it travels to the workers by value
        def sample(self, n: int, rng: np.random.Generator, split: str = "train") -> list[Task]:
            tasks = super().sample(n, rng, split)
            tasks[3] |= {"fault": "raise"}
            return tasks

    options = {"task": "navigation-2d", "meta_batch": 12, "episodes": 2, "epochs": 2}
    with running(Faulty(), **options) as trainer:
        expected = result(trainer)
    with running(Faulty(), **options, num_workers=workers, num_learners=2) as trainer:
        run = result(trainer)
    assert expected[0][0]["invalid_episodes"] == 2
    assert_same_run(run, expected)


@pytest.mark.slow
@pytest.mark.parametrize(("where", "call"), [("_gradient", 2), ("batch", 5), ("_take_moments", 5)])
def test_an_iteration_whose_objects_are_lost_is_repeated(where: str, call: int) -> None:
    options = {**CASES["two steps, normalised"], "replay_episodes": 64}
    with running(**options) as trainer:
        expected = result(trainer)
    with running(**options, num_learners=1) as trainer:
        method, calls = getattr(trainer.learner, where), []

        def losing(*arguments: Any, **options: Any) -> Any:
            calls.append(len(calls))
            found = method(*arguments, **options)
            if len(calls) == call:
                raise ray.exceptions.ObjectLostError("00", None, "")
            return found

        setattr(trainer.learner, where, losing)
        run = result(trainer)
    assert len(calls) > call
    assert_same_run(run, expected)


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_learners_and_workers_that_die_at_random_moments_change_nothing() -> None:
    options = {"task": "navigation-2d", "epochs": 3, "hidden_dim": 32, "episodes": 20, "meta_batch": 8}
    enough, kills = threading.Event(), Counter[str]()
    rng = np.random.default_rng(0)
    kinds = {"learner": ("LearnerActor",), "worker": ("RolloutWorker", "collect ")}  # the latter while it plays

    def kill() -> None:
        # Where a start takes longer than the next death, nothing would ever be done.
        while kills.total() < 20 and not enough.wait(rng.uniform(0.3, 3.0)):
            kind = ("learner", "worker")[rng.integers(2)]
            for process in processes(*kinds[kind])[:1]:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
                    kills[kind] += 1

    iterations = 0
    with running(**options, num_workers=2, num_learners=2) as trainer:
        killer = threading.Thread(target=kill)
        killer.start()
        try:
            metrics = []
            while min(kills["learner"], kills["worker"]) < 3:
                metrics += result(trainer, 1)[0]
                iterations += 1
            run = result(trainer, 1)
        finally:
            enough.set()
            killer.join()
    with running(**options) as trainer:
        expected = result(trainer, iterations + 1)
    assert_same_run(([*metrics, *run[0]], run[1]), expected)


# --- Overlap ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_straggler_delays_its_own_shard_alone(tmp_path: Path) -> None:
    """The first task's support ends only when the last one's query has begun."""

    class Waiting(FaultyNavigation):
        def sample(self, n: int, rng: np.random.Generator, split: str = "train") -> list[Task]:
            tally = str(tmp_path / "tally")
            first, *between, last = super().sample(n, rng, split)
            return [first | {"waits_for": tally}, *between, last | {"tally": tally}]

    options = {"task": "navigation-2d", "epochs": 2, "inner_steps": 2}
    (tmp_path / "tally").write_text("played\n" * 2)
    with running(Waiting(), **options) as trainer:
        expected = result(trainer, 1)
    (tmp_path / "tally").unlink()
    with running(Waiting(), **options, num_workers=2, num_learners=1) as trainer:
        assert_same_run(result(trainer, 1), expected)


@pytest.mark.slow
@pytest.mark.parametrize("learners", [0, 1])
def test_a_batch_is_closed_when_enough_tasks_are_there(learners: int) -> None:
    class Hanging(FaultyNavigation):
        def sample(self, n: int, rng: np.random.Generator, split: str = "train") -> list[Task]:
            first, *others = super().sample(n, rng, split)
            return [first | {"fault": "hang"}, *others]

    options = {"task": "navigation-2d", "meta_batch": 3, "num_workers": 3, "min_tasks": 0.6}
    with running(Hanging(), **options, num_learners=learners) as trainer:
        line = trainer.step()
        weights = trainer.learner.weights()
    assert (line["timed_out_tasks"], line["restarts"], line["invalid_episodes"]) == (1, 1, 0)
    assert np.isfinite([line["return_before"], line["return_after"], line["loss"]]).all()
    assert all(np.isfinite(value).all() for value in weights.values())


# --- What the driver holds --------------------------------------------------------------------------------


def test_rollouts_and_weights_stay_in_the_object_store() -> None:
    with running(**CASES["promp"], num_workers=1, num_learners=1) as trainer:
        learner, collector = trainer.learner, trainer._collector()
        weights = learner.weights()
        support = collector(weights, 3, 0)
        stage = learner.batch(weights, support)
        adapted = learner.adapt(weights, stage)
        query = collector(adapted, 3, 1)
        assert isinstance(adapted, RemoteWeights)
        for remote in (support, query):
            assert isinstance(remote, RemoteRollouts)
            record = remote.fetch()
            assert remote.tasks == record.tasks
            assert (remote.num_tasks, remote.num_steps) == (record.num_tasks, record.num_steps)
            np.testing.assert_array_equal(remote.returns(), record.returns())
            np.testing.assert_array_equal(remote.kept(), record.kept())
            # A value that was sent to the driver would be known to the memory of its process alone.
            kept = [reference for _, reference in remote.pieces]
            ray.wait(kept, num_returns=len(kept))
            places = ray.experimental.get_object_locations(kept)
            assert [len(place["node_ids"]) for place in places.values()] == [1] * len(kept)


@pytest.mark.slow
def test_success_is_counted_where_rollouts_stay() -> None:
    """Also beside a task that is lost at the first stage."""

    class Losing(Telling):  # not of this module: it travels to the workers by value
        def sample(self, n: int, rng: np.random.Generator, split: str = "train") -> list[Task]:
            return [{**task, **({"fault": "kill"} if i == 2 else {})} for i, task in enumerate(super().sample(n, rng))]

    def shares(**options: Any) -> list[float]:
        with running(Losing(), task="navigation-2d", **options) as trainer:
            found: list[float] = trainer.step()["details"]["success_by_step"]
            return found

    assert shares(num_workers=1, num_learners=2) == shares(num_workers=1)


def test_learners_that_find_no_node_are_told_after_some_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not while they run, however long an answer takes."""
    with running(task="navigation-2d", num_learners=2) as trainer:
        group, told = trainer.learner, list[int]()
        assert isinstance(group, LearnerGroup)
        group.homeless = told.append
        group.processes()
        for _ in range(4 * LOOKS):
            group.waited()
        assert told == []
        answers = iter([True, True] * (LOOKS - 1) + [False, False] + [True, False] * LOOKS)
        monkeypatch.setattr("ssm_metarl.distributed.learner_group.has_no_node", lambda actor: next(answers))
        for _ in range(2 * LOOKS):
            group.waited()
        assert told == [1]
