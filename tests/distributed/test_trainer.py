"""The trainer: the same iterations however they are collected, through deaths and restores, alone and in Tune."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from builders import SMALL, assert_equal_arrays, assert_same, wait_until
from faulty_tasks import FaultyNavigation, Telling
from ssm_metarl.algorithms.rollouts import Rollouts
from ssm_metarl.config import TrainConfig
from ssm_metarl.distributed import learner as learner_module
from ssm_metarl.distributed import trainer as trainer_module
from ssm_metarl.distributed.cluster import auto_workers, check_resources
from ssm_metarl.distributed.learner import resolve_device
from ssm_metarl.distributed.metrics import log_line
from ssm_metarl.distributed.play import EnvironmentFailure
from ssm_metarl.distributed.trainer import MetaTrainer
from ssm_metarl.storage.checkpoint import load_checkpoint
from ssm_metarl.storage.contents import CheckpointError
from ssm_metarl.tasks import Task

Metrics = dict[str, Any]


def options(task: str = "navigation-2d", **changes: Any) -> dict[str, Any]:
    return TrainConfig.for_task(task, **{**SMALL, **changes}).to_dict()


@contextmanager
def running(config: dict[str, Any], distribution: FaultyNavigation | None = None) -> Iterator[MetaTrainer]:
    trainer = MetaTrainer({**config, "task_distribution": distribution})
    try:
        yield trainer
    finally:
        trainer.stop()


def steady(metrics: Metrics) -> Metrics:
    """What does not depend on time and on deaths."""
    return {name: value for name, value in metrics.items() if name not in ("seconds", "restarts")}


def steps(trainer: MetaTrainer, count: int) -> list[Metrics]:
    return [steady(trainer.step()) for _ in range(count)]


def recorded(trainer: MetaTrainer) -> list[Rollouts]:
    """All that the trainer's pool collects from now on."""
    records = []
    collect = trainer.pool.collect

    def recording(*args: Any, **kwargs: Any) -> Rollouts:
        records.append(collect(*args, **kwargs))
        return records[-1]

    trainer.pool.collect = recording  # type: ignore[method-assign]
    return records


def faulty(fault: Callable[[int, list[Task]], None]) -> FaultyNavigation:
    """A family that calls `fault(iteration from 0, its tasks)`, which may spoil them, when it is asked for tasks."""

    class Faulty(FaultyNavigation):  # not of this module: it travels to the workers by value
        def __init__(self) -> None:
            self.iteration = 0

        def sample(self, n: int, rng: np.random.Generator, split: str = "train") -> list[Task]:
            tasks = super().sample(n, rng, split)
            fault(self.iteration, tasks)
            self.iteration += 1
            return tasks

    return Faulty()


# --- The same seed, the same experience -------------------------------------------------------------------

FAMILIES = {"navigation-2d": {"epochs": 2}, "cartpole": {"epochs": 2, "inner_steps": 2}}


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """One task a shard, so that the learner's threads have something to share."""
    monkeypatch.setattr(learner_module, "task_shards", lambda shape, _: [slice(i, i + 1) for i in range(shape[0])])


def experience(task: str, **changes: Any) -> tuple[list[Rollouts], list[Metrics]]:
    with running(options(task, **FAMILIES[task], **changes)) as trainer:
        records = recorded(trainer)
        return records, steps(trainer, 5)


@cache
def alone(task: str) -> tuple[list[Rollouts], list[Metrics]]:
    return experience(task)


@pytest.mark.usefixtures("ray_session", "small_shards")
@pytest.mark.parametrize(
    ("num_workers", "learner_threads"),
    [(0, 2), (2, 2), *(pytest.param(count, 1, marks=pytest.mark.slow) for count in (1, 4))],
)
@pytest.mark.parametrize("task", FAMILIES)
def test_experience_and_metrics_depend_neither_on_workers_nor_on_threads(
    task: str, num_workers: int, learner_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The tests' Ray has a CPU for each of four workers, but none for the learner.
    monkeypatch.setattr(trainer_module, "check_resources", lambda *needed: None)
    expected_records, expected_metrics = alone(task)
    records, metrics = experience(task, num_workers=num_workers, learner_threads=learner_threads)
    assert len(records) == 5 * (2 if task == "navigation-2d" else 3)
    for record, expected in zip(records, expected_records, strict=True):
        assert_same(record, expected)
    assert metrics == expected_metrics


@pytest.mark.usefixtures("small_shards")
def test_another_seed_or_iteration_is_other_experience() -> None:
    records, metrics = alone("navigation-2d")
    others, other_metrics = experience("navigation-2d", seed=1)
    tasks = [str(task) for record in (*records[::2], *others[::2]) for task in record.tasks]
    assert len(set(tasks)) == len(tasks)
    returns = [tuple(line["details"]["return_by_step"]) for line in (*metrics, *other_metrics)]
    assert len(set(returns)) == len(returns)


def test_every_task_of_every_stage_has_chance_of_its_own() -> None:
    nodes = []
    with running(options(inner_steps=2)) as trainer:
        collect = trainer.pool.collect

        def noting(weights: Any, tasks: Any, seeds: Any, *args: Any, **kwargs: Any) -> Rollouts:
            nodes.extend((seed.entropy, seed.spawn_key) for seed in seeds)
            return collect(weights, tasks, seeds, *args, **kwargs)

        trainer.pool.collect = noting  # type: ignore[method-assign]
        steps(trainer, 3)
    assert len(nodes) == 3 * 3 * 4
    assert len(set(nodes)) == len(nodes)


@pytest.mark.usefixtures("small_shards")
def test_metrics_say_what_was_collected() -> None:
    records, metrics = alone("cartpole")
    env_steps = 0
    for number, line in enumerate(metrics):
        stages = records[3 * number : 3 * number + 3]
        assert all(stage.tasks == stages[0].tasks for stage in stages), "support and query are of the same tasks"
        env_steps += sum(int(stage.valid.sum()) for stage in stages)
        assert (line["iteration"], line["env_steps"]) == (number + 1, env_steps)
        returns = [np.mean((stage.rewards * stage.valid).sum(1, dtype=float)) for stage in stages]
        assert line["details"]["return_by_step"] == pytest.approx(returns)
        assert line["details"]["episode_length_by_step"] == pytest.approx(
            [stage.valid.sum(1).mean() for stage in stages]
        )
        assert (line["details"]["dropped_tasks"], line["timed_out_tasks"], line["invalid_episodes"]) == ([], 0, 0)


# --- Deaths and faults ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_workers_killed_in_the_middle_of_an_iteration_change_nothing(ray_session: None, tmp_path: Path) -> None:
    announcement = tmp_path / "process"
    dies_in = {1: "support", 2: "query"}  # by iteration, from 0

    def slow(iteration: int, tasks: list[Task]) -> None:
        if iteration in dies_in:
            tasks[2] |= {"pause": 0.03, "announce": str(announcement)}

    def kill() -> None:
        wait_until(announcement.exists)
        os.kill(int(announcement.read_text()), signal.SIGKILL)

    with running(options(), faulty(lambda iteration, tasks: None)) as trainer:
        expected = steps(trainer, 4)
    with running(options(num_workers=2), faulty(slow)) as trainer:
        collect = trainer.pool.collect
        processes = [set(trainer.pool.processes())]

        def collect_while_one_dies(*args: Any, label: str = "", **kwargs: Any) -> Rollouts:
            announcement.unlink(missing_ok=True)
            if not label.startswith(dies_in.get(trainer.meta_iteration, "none")):
                return collect(*args, label=label, **kwargs)
            killer = threading.Thread(target=kill)
            killer.start()
            rollouts = collect(*args, label=label, **kwargs)
            killer.join()
            processes.append(set(trainer.pool.processes()))
            return rollouts

        trainer.pool.collect = collect_while_one_dies  # type: ignore[method-assign]
        metrics = [trainer.step() for _ in range(4)]
    assert [steady(line) for line in metrics] == expected
    assert [line["restarts"] for line in metrics] == [0, 1, 2, 2]
    assert [len(before - after) for before, after in pairwise(processes)] == [1, 1], "another process after each death"


@pytest.mark.slow
def test_a_task_that_kills_its_workers_is_dropped_after_three_and_named_and_the_run_goes_on(ray_session: None) -> None:
    def deadly(iteration: int, tasks: list[Task]) -> None:
        if iteration == 0:
            tasks[1] |= {"fault": "kill"}

    with running(options(num_workers=2), faulty(deadly)) as trainer:
        records = recorded(trainer)
        first, second = trainer.step(), trainer.step()
    (dropped,) = first["details"]["dropped_tasks"]
    assert dropped == {"goal": records[0].tasks[1]["goal"], "fault": "kill"}
    assert [line["restarts"] for line in (first, second)] == [4, 4], "it is not played again for the query"
    assert second["details"]["dropped_tasks"] == []
    assert [line["invalid_episodes"] for line in (first, second)] == [0, 0]
    assert [record.num_tasks for record in records] == [4, 3, 4, 4]
    assert first["env_steps"] == sum(record.num_steps for record in records[:2]) == 2 * 3 * 3 * 20
    assert_numbers(first)
    assert_numbers(second)


def test_invalid_episodes_are_dropped_and_counted_and_the_run_goes_on() -> None:
    def spoiled(iteration: int, tasks: list[Task]) -> None:
        if iteration == 0:
            tasks[3] |= {"fault": "nan"}  # its first episode: 1 of 30 in the support and in the query
        if iteration == 1:
            tasks[7] |= {"fault": "raise"}  # 3 of 30, not more than a tenth, and then it is not played again

    with running(options(meta_batch=10), faulty(spoiled)) as trainer:
        records = recorded(trainer)
        metrics = [trainer.step() for _ in range(3)]
    assert [line["invalid_episodes"] for line in metrics] == [2, 3, 0]
    assert [record.num_tasks for record in records] == [10, 10, 10, 9, 10, 10]
    kept = [int(record.kept().sum()) for record in records]
    assert [kept[0] + kept[1], kept[2] + kept[3], kept[4] + kept[5]] == [58, 54, 60]
    steps = np.cumsum([record.num_steps for record in records])[1::2]
    assert [line["env_steps"] for line in metrics] == steps.tolist()
    for line, first in zip(metrics, records[::2], strict=True):
        assert_numbers(line)
        assert line["details"]["return_by_step"][0] == pytest.approx(np.nanmean(first.returns()))


def test_metrics_have_the_share_of_trials_that_succeed() -> None:
    with running(options(meta_batch=10), Telling()) as trainer:
        records = recorded(trainer)
        metrics = trainer.step()
    expected = []
    for record in records:
        goals = np.array([task["goal"][0] for task in record.tasks])
        ends = np.concatenate([record.observations[:, 1:], record.last_observations[:, None]], 1)[..., 0]
        expected.append(((ends * goals[:, None, None] > 0) & record.valid).any(1).mean())
    assert metrics["details"]["success_by_step"] == pytest.approx(expected)
    assert metrics["success_after"] == metrics["details"]["success_by_step"][-1]
    assert 0 < expected[0] < 1
    assert log_line(metrics)["success_by_step"] == metrics["details"]["success_by_step"]
    assert "success_after" not in log_line(metrics)


@pytest.mark.parametrize(("fault", "count"), [("raise", 2), ("raise", 10), ("nan", 10)])
def test_too_many_invalid_episodes_stop_the_run_with_the_environments_own_words(fault: str, count: int) -> None:
    def spoiled(iteration: int, tasks: list[Task]) -> None:
        for task in tasks[:count] if iteration == 1 else []:
            task |= {"fault": fault}

    with running(options(meta_batch=10), faulty(spoiled)) as trainer:
        records = recorded(trainer)
        trainer.step()
        before = trainer.learner.weights()
        with pytest.raises(EnvironmentFailure) as failure:
            trainer.step()
        bad = 3 * count if fault == "raise" else count
        words = [f"{bad} of 30 episodes", str(records[2].tasks[0]["goal"])]
        if fault == "raise":
            words += ["Traceback", "faulty_tasks.py", "OSError: the simulator of goal"]
        assert [word for word in words if word not in str(failure.value)] == []
        assert trainer.meta_iteration == 1
        assert_equal_arrays(trainer.learner.weights(), before)


def test_episodes_lost_to_the_environment_show_its_traceback_before_a_number_that_is_not_finite() -> None:
    def spoiled(iteration: int, tasks: list[Task]) -> None:
        tasks[0] |= {"fault": "nan"}
        tasks[3] |= {"fault": "raise"}

    with running(options(), faulty(spoiled)) as trainer, pytest.raises(EnvironmentFailure, match=r"OSError: the sim"):
        trainer.step()


# --- Checkpoints ------------------------------------------------------------------------------------------


def test_restored_iterations_equal_those_without_a_stop(tmp_path: Path) -> None:
    config = options("cartpole", lr_schedule="linear", iterations=8, inner_steps=2, step_weights=[1, 0, 2])
    with running(config) as trainer:
        steps(trainer, 2)
        trainer.save_checkpoint(str(tmp_path / "checkpoint"))
        expected = steps(trainer, 3)
        parameters = {**trainer.learner.weights(), **trainer.learner.optimizer_arrays()}
    with running(config) as trainer:
        trainer.load_checkpoint(str(tmp_path / "checkpoint"))
        assert steps(trainer, 3) == expected
        assert_equal_arrays({**trainer.learner.weights(), **trainer.learner.optimizer_arrays()}, parameters)


def test_learning_rates_of_the_config_win_over_those_of_the_checkpoint(tmp_path: Path) -> None:
    path = str(tmp_path / "checkpoint")
    with running(options(inner_lr=0.1, outer_lr=1e-3, lr_schedule="constant")) as trainer:
        trainer.step()
        trainer.save_checkpoint(path)
        kept = [trainer.step(), trainer.step()]
    with running(options(inner_lr=0.4, outer_lr=5e-3, lr_schedule="constant")) as trainer:
        trainer.load_checkpoint(path)
        changed = [trainer.step(), trainer.step()]
    assert [line["learning_rate"] for line in kept + changed] == [1e-3, 1e-3, 5e-3, 5e-3]
    assert changed[0]["details"]["return_by_step"][0] == kept[0]["details"]["return_by_step"][0], (
        "the checkpoint's policy acts"
    )
    assert changed[0]["details"]["return_by_step"][1] != kept[0]["details"]["return_by_step"][1], (
        "the config's inner step"
    )
    assert changed[1]["details"]["return_by_step"][0] != kept[1]["details"]["return_by_step"][0], (
        "the config's outer step"
    )


def test_a_checkpoint_of_other_sizes_is_refused_in_one_sentence(tmp_path: Path) -> None:
    path = str(tmp_path / "checkpoint")
    with running(options()) as trainer:
        trainer.step()
        trainer.save_checkpoint(path)
    with running(options(hidden_dim=24, num_layers=2)) as trainer:
        before = trainer.learner.weights()
        with pytest.raises(CheckpointError) as refusal:
            trainer.load_checkpoint(path)
        sentence = str(refusal.value)
        assert sentence == f"{path}: its policy has hidden_dim 16 instead of 24, num_layers 1 instead of 2."
        assert_equal_arrays(trainer.learner.weights(), before)
        assert (trainer.meta_iteration, trainer.env_steps) == (0, 0)


def test_reset_takes_other_sizes_and_learning_rates_in_the_same_process(ray_session: None) -> None:
    config = options(hidden_dim=24, state_dim=12, num_layers=2, inner_lr=0.3, outer_lr=5e-3)
    with running(config) as trainer:
        expected = steps(trainer, 2)
    with running(options(num_workers=1)) as trainer:
        steps(trainer, 2)
        (process,) = trainer.pool.processes()
        assert trainer.reset({**config, "num_workers": 1})
        assert steps(trainer, 2) == expected
        assert trainer.pool.processes() != [process]
        wait_until(lambda: not Path(f"/proc/{process}").exists())


# --- Resources, and Tune ----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_a_cpu_is_requested_for_the_learner_and_for_each_worker(num_workers: int) -> None:
    request = MetaTrainer.default_resource_request(options(num_workers=num_workers))
    assert request.bundles == [{"CPU": 1.0}] * (1 + num_workers)
    assert request.strategy == "SPREAD"


def test_without_a_number_of_workers_one_cpu_is_requested() -> None:
    assert MetaTrainer.default_resource_request({}).bundles == [{"CPU": 1.0}]


def test_more_workers_than_ray_has_cpus_are_refused_in_one_sentence(ray_session: None) -> None:
    sentence = "^4 workers and the learner need 5 CPUs, but this Ray cluster has 4; use num_workers=3 or fewer.$"
    with pytest.raises(ValueError, match=sentence):
        MetaTrainer(options(num_workers=4))
    for fitting in (0, 3):
        check_resources(fitting)


def test_alone_no_folder_is_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from ray.tune.trainable import trainable

    monkeypatch.setattr(trainable, "DEFAULT_STORAGE_PATH", str(tmp_path / "ray_results"))
    monkeypatch.chdir(tmp_path)
    with running(options()) as trainer:
        trainer.train()
    assert list(tmp_path.iterdir()) == []


def test_in_tune_it_trains_and_writes_checkpoints_that_can_be_continued(ray_session: None, tmp_path: Path) -> None:
    from ray import tune

    with running(options()) as trainer:
        expected = steps(trainer, 3)
    tuner = tune.Tuner(
        MetaTrainer,
        param_space=options(num_workers=1, learner_threads=2),
        run_config=tune.RunConfig(
            name="in-tune",
            storage_path=str(tmp_path),
            stop={"training_iteration": 2},
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=True),
            verbose=0,
        ),
    )
    (result,) = tuner.fit()
    assert result.error is None
    assert {name: result.metrics[name] for name in expected[1]} == expected[1]
    assert load_checkpoint(result.checkpoint.path).config["learner_threads"] == 1  # the one CPU of its request
    with running(options()) as trainer:
        trainer.restore(result.checkpoint.path)
        assert steps(trainer, 1) == expected[2:]


def assert_numbers(metrics: Metrics) -> None:
    """Whatever is a number is finite."""
    for name, value in metrics.items():
        if isinstance(value, int | float) or name.endswith("_by_step"):
            assert np.isfinite(value).all(), name


# --- What a trial asks the cluster for --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "gpus", "learner"),
    [
        ("cpu", 1.0, {"CPU": 1.0}),
        ("auto", 0.0, {"CPU": 1.0}),
        ("auto", 1.0, {"CPU": 1.0, "GPU": 1.0}),
        ("cuda", 0.0, {"CPU": 1.0, "GPU": 1.0}),  # whoever names it waits for one
    ],
)
def test_a_trial_is_one_placement_group_of_the_learner_and_its_workers(
    monkeypatch: pytest.MonkeyPatch, device: str, gpus: float, learner: dict[str, float]
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": gpus})
    request = MetaTrainer.default_resource_request({"num_workers": 2, "device": device})
    assert request.bundles == [learner, {"CPU": 1.0}, {"CPU": 1.0}]
    assert request.strategy == "SPREAD"


@pytest.mark.parametrize("there", [False, True])
def test_the_learner_is_on_a_gpu_when_there_is_one(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert resolve_device("auto") == ("cuda" if there else "cpu")
    assert resolve_device("cpu") == "cpu"


@pytest.mark.parametrize(("trials", "workers"), [(1, 6), (2, 2), (7, 0), (20, 0)])
def test_automatic_workers_are_the_free_processors_less_the_learners(
    monkeypatch: pytest.MonkeyPatch, trials: int, workers: int
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 7.0})
    assert auto_workers(trials) == workers
