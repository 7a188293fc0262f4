"""A run in a folder: what it leaves, how it stops and goes on; and the evaluation of its checkpoints."""

from __future__ import annotations

import json
import os
import signal
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from tensorboardX.proto.event_pb2 import Event

from faulty_tasks import FaultyNavigation
from ssm_metarl.config import TrainConfig
from ssm_metarl.distributed import cluster
from ssm_metarl.distributed import train as run_module
from ssm_metarl.distributed.cluster import start_ray
from ssm_metarl.distributed.collection import EnvironmentFailure
from ssm_metarl.distributed.train import train
from ssm_metarl.evaluation.evaluate import Evaluation, evaluate_checkpoint
from ssm_metarl.storage.checkpoint import load_checkpoint, load_policy
from ssm_metarl.storage.contents import CheckpointError
from ssm_metarl.tasks import Task
from ssm_metarl.tasks.navigation import Navigation2D

Metrics = dict[str, Any]

SMALL = {"meta_batch": 4, "episodes": 3, "hidden_dim": 16, "state_dim": 8, "learner_threads": 1, "epochs": 1}


def config(task: str = "navigation-2d", **changes: Any) -> TrainConfig:
    # A schedule that ends with the last iteration would tell runs of different lengths apart.
    return TrainConfig.for_task(task, **{**SMALL, "lr_schedule": "constant", **changes})


def logged(run: Path) -> list[Metrics]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def steady(run: Path) -> list[Metrics]:
    """What was logged and does not depend on time and on deaths."""
    volatile = ("seconds", "restarts")
    return [{name: value for name, value in line.items() if name not in volatile} for line in logged(run)]


def names(run: Path) -> set[str]:
    return {path.name for path in run.glob("*checkpoint*")}


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for workers fails."""

    def refuse(num_workers: int, *, always: bool = False) -> None:
        assert num_workers == 0, "Ray would have been started"
        assert not always, "Ray would have been started"

    monkeypatch.setattr(run_module, "start_ray", refuse)


# --- What a run leaves ------------------------------------------------------------------------------------


def test_a_run_leaves_metrics_events_and_checkpoints(tmp_path: Path, without_ray: None) -> None:
    seen: list[Metrics] = []
    result = train(config(iterations=5, checkpoint_every=2), tmp_path / "a" / "run", on_iteration=seen.append)
    run = result.run_dir
    assert run == tmp_path / "a" / "run"
    assert logged(run) == seen
    assert [line["iteration"] for line in seen] == [1, 2, 3, 4, 5]
    assert result.metrics == seen[-1]
    assert result.signal is None
    assert result.checkpoint == run / "checkpoint_000005"
    assert load_checkpoint(result.checkpoint).progress == {"iteration": 5, "env_steps": seen[-1]["env_steps"]}
    events = scalars(run)
    assert {step for _, step in events} == {1, 2, 3, 4, 5}
    for line in seen:
        at = line["iteration"]
        assert events["return_by_step/0", at] == pytest.approx(line["return_by_step"][0])
        assert events["return_by_step/1", at] == pytest.approx(line["return_by_step"][1])
        assert events["seconds/sample", at] == pytest.approx(line["seconds"]["sample"])
        assert events["loss", at] == pytest.approx(line["loss"])


def test_the_last_three_checkpoints_and_the_best_are_kept(tmp_path: Path, without_ray: None) -> None:
    # Learning too slow to matter: which iteration is best is up to its tasks.
    result = train(config(iterations=8, checkpoint_every=1, outer_lr=1e-9, seed=3), tmp_path / "run")
    returns = [line["return_by_step"][-1] for line in logged(result.run_dir)]
    best = 1 + int(np.argmax(returns))
    assert best < 6, "choose another seed: this one shows nothing"
    assert names(result.run_dir) == {f"checkpoint_{number:06d}" for number in (best, 6, 7, 8)}
    mark = json.loads((result.run_dir / "best.json").read_text())
    assert mark == {"checkpoint": f"checkpoint_{best:06d}", "return": max(returns)}


def test_the_best_is_that_of_the_mean_since_the_checkpoint_before(tmp_path: Path, without_ray: None) -> None:
    run = train(config(iterations=6, checkpoint_every=3, outer_lr=1e-9), tmp_path / "run").run_dir
    returns = [line["return_by_step"][-1] for line in logged(run)]
    means = [np.mean(returns[:3]), np.mean(returns[3:])]
    mark = json.loads((run / "best.json").read_text())
    assert mark == {"checkpoint": f"checkpoint_{3 + 3 * int(np.argmax(means)):06d}", "return": max(means)}


def test_a_loaded_policy_is_the_one_that_was_saved(tmp_path: Path, without_ray: None) -> None:
    result = train(config(iterations=2, checkpoint_every=1), tmp_path / "run")
    for path in (result.checkpoint, str(result.checkpoint)):
        policy, checkpoint = load_policy(path)
        assert policy.spec == checkpoint.spec
        assert checkpoint.config == config(iterations=2, checkpoint_every=1).to_dict()
        weights = policy.numpy_weights()
        assert weights.keys() == checkpoint.policy.keys()
        for name, value in checkpoint.policy.items():
            np.testing.assert_array_equal(weights[name], value)
    best = json.loads((result.run_dir / "best.json").read_text())["checkpoint"]
    assert load_policy(result.run_dir)[1].progress == load_checkpoint(result.run_dir / best).progress


# --- Going on ---------------------------------------------------------------------------------------------


class Crash(Exception):
    pass


def crash_at(iteration: int) -> Callable[[Metrics], None]:
    def crash(metrics: Metrics) -> None:
        if metrics["iteration"] == iteration:
            raise Crash

    return crash


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(config(**CRASHING), tmp_path_factory.mktemp("undisturbed") / "run").run_dir


CRASHING = {"iterations": 7, "checkpoint_every": 2, "lr_schedule": "cosine", "seed": 4}


@pytest.mark.parametrize("iteration", [1, 3, 4, 6])
def test_a_run_that_crashed_goes_on_as_if_it_had_not(
    tmp_path: Path, undisturbed: Path, without_ray: None, iteration: int
) -> None:
    run = tmp_path / "run"
    with pytest.raises(Crash):
        train(config(**CRASHING), run, on_iteration=crash_at(iteration))
    assert len(logged(run)) == iteration
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"iteration": 8, "env_st')  # torn by the crash
    result = train(config(**CRASHING), run, resume=True)
    assert steady(run) == steady(undisturbed)
    assert names(run) == names(undisturbed)
    assert (run / "best.json").read_text() == (undisturbed / "best.json").read_text()
    one, other = load_checkpoint(result.checkpoint), load_checkpoint(undisturbed / "checkpoint_000007")
    assert (one.config, one.progress) == (other.config, other.progress)
    for mine, theirs in ((one.policy, other.policy), (one.optimizer, other.optimizer)):
        assert mine.keys() == theirs.keys()
        for name in mine:
            np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)
    assert {step for _, step in scalars(run)} == set(range(1, 8))


def test_metrics_and_events_beyond_the_checkpoint_are_taken_back(tmp_path: Path, without_ray: None) -> None:
    with pytest.raises(Crash):
        train(config(iterations=9, checkpoint_every=2), tmp_path, on_iteration=crash_at(3))
    assert {step for _, step in scalars(tmp_path)} == {1, 2, 3}
    train(config(iterations=2), tmp_path, resume=True)
    assert [line["iteration"] for line in logged(tmp_path)] == [1, 2]
    assert {step for _, step in scalars(tmp_path)} == {1, 2}


def test_a_finished_run_is_not_changed_by_resuming_it_and_can_be_made_longer(tmp_path: Path, without_ray: None) -> None:
    run = tmp_path / "run"
    train(config(iterations=2), run)
    lines = logged(run)
    result = train(config(iterations=2), run, resume=True)
    assert logged(run) == lines
    assert (result.metrics, result.checkpoint.name) == ({}, "checkpoint_000002")
    train(config(iterations=4), run, resume=True)
    longer = train(config(iterations=4), tmp_path / "longer").run_dir
    assert steady(run) == steady(longer)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_iteration_with_a_checkpoint(
    tmp_path: Path, without_ray: None, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def interrupt(metrics: Metrics) -> None:
        if metrics["iteration"] == 3:
            os.kill(os.getpid(), number)

    result = train(config(iterations=5, checkpoint_every=2), run, on_iteration=interrupt)
    assert result.signal == number
    assert result.checkpoint == run / "checkpoint_000003"
    assert len(logged(run)) == 3
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    train(config(iterations=5, checkpoint_every=2), run, resume=True)
    assert steady(run) == steady(train(config(iterations=5), tmp_path / "undisturbed").run_dir)


def test_a_second_signal_ends_the_run_at_once(tmp_path: Path, without_ray: None) -> None:
    def interrupt(metrics: Metrics) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)  # a shell that starts the tests in the background has it ignored
    with pytest.raises(KeyboardInterrupt):
        train(config(iterations=5), tmp_path / "run", on_iteration=interrupt)
    assert names(tmp_path / "run") == {"checkpoint_000000"}
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_in_another_thread_works(tmp_path: Path, without_ray: None) -> None:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(train(config(iterations=1), tmp_path / "run")))
    thread.start()
    thread.join()
    assert results[0].checkpoint.name == "checkpoint_000001"


# --- Ray ----------------------------------------------------------------------------------------------------


@pytest.fixture
def ray_starts(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of every ``ray.init``, which starts nothing here."""
    starts: list[dict[str, Any]] = []

    def init(**how: Any) -> SimpleNamespace:
        starts.append(how)
        return SimpleNamespace(dashboard_url="127.0.0.1:8265")

    monkeypatch.setattr(cluster.ray, "init", init)
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: bool(starts))
    monkeypatch.setattr(cluster, "available_cores", lambda: 2)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return starts


@pytest.mark.parametrize(("num_workers", "cpus"), [(1, 2), (2, 3), (5, 6)])
def test_a_ray_of_our_own_is_local_and_has_a_cpu_for_the_learner_and_each_worker(
    ray_starts: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], num_workers: int, cpus: int
) -> None:
    start_ray(0)
    assert ray_starts == []
    start_ray(num_workers)
    start_ray(num_workers)
    (how,) = ray_starts
    assert (how["address"], how["num_cpus"], how["dashboard_host"]) == ("local", cpus, "127.0.0.1")
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert capsys.readouterr() == ("", "Ray dashboard: http://127.0.0.1:8265\n")


def test_a_cluster_that_the_environment_names_is_joined(
    ray_starts: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    start_ray(4)
    (how,) = ray_starts
    assert {"address", "num_cpus"}.isdisjoint(how), "ray.init takes the address, and refuses a number of CPUs"


# --- What is refused, before anything is written or started -----------------------------------------------


def test_a_folder_that_holds_something_is_refused(tmp_path: Path, without_ray: None) -> None:
    train(config(iterations=1), tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    (tmp_path / "file").write_text("")
    before = visible(tmp_path)
    for folder, reason in (
        ("run", "not empty"),
        ("other", "not empty"),
        ("file", "cannot be made"),
        ("file/run", "cannot be made"),
    ):
        with pytest.raises(ValueError, match=rf"^{tmp_path / folder} .*{reason}"):
            train(config(num_workers=1), tmp_path / folder)
    assert visible(tmp_path) == before


def test_an_empty_folder_is_taken(tmp_path: Path, without_ray: None) -> None:
    (tmp_path / ".gitkeep").write_text("")
    assert train(config(iterations=1), tmp_path).checkpoint == tmp_path / "checkpoint_000001"


def test_without_a_checkpoint_there_is_nothing_to_resume(tmp_path: Path, without_ray: None) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "crashed" / "checkpoint_000000").mkdir(parents=True)  # without a manifest
    before = visible(tmp_path)
    for folder in ("empty", "crashed", "absent"):
        with pytest.raises(ValueError, match=rf"^There is no checkpoint in {tmp_path / folder} to resume from.$"):
            train(config(num_workers=1), tmp_path / folder, resume=True)
    assert visible(tmp_path) == before


def test_a_checkpoint_that_is_damaged_or_of_other_sizes_is_not_resumed(tmp_path: Path, without_ray: None) -> None:
    checkpoint = train(config(iterations=1), tmp_path).checkpoint
    before = visible(tmp_path)
    for other, reason in (
        (config(hidden_dim=24, num_workers=1), r"hidden_dim 16 instead of 24\.$"),
        (config("cartpole", num_workers=1), r"observation_size 2 instead of 4, discrete False instead of True"),
    ):
        with pytest.raises(CheckpointError, match=rf"^{checkpoint}: its policy has .*{reason}"):
            train(other, tmp_path, resume=True)
    (checkpoint / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors is truncated or altered"):
        train(config(num_workers=1), tmp_path, resume=True)
    assert visible(tmp_path) == before


def test_a_device_that_is_not_there_is_refused(tmp_path: Path, without_ray: None) -> None:
    with pytest.raises(ValueError, match=r"^device 'abacus' cannot be used here: "):
        train(config(device="abacus", num_workers=1), tmp_path / "run")
    assert visible(tmp_path) == []


def test_a_faulty_environment_stops_the_run_and_leaves_its_last_checkpoint(tmp_path: Path, without_ray: None) -> None:
    with pytest.raises(EnvironmentFailure, match="OSError: the simulator of goal"):
        train(config(iterations=5, checkpoint_every=1), tmp_path, distribution=Spoiled(after=2))
    assert len(logged(tmp_path)) == 2
    assert load_checkpoint(tmp_path / "checkpoint_000002").progress["iteration"] == 2


# --- Evaluation -------------------------------------------------------------------------------------------


class Spoiled(FaultyNavigation):
    """Every environment raises, after some calls of ``sample``."""

    def __init__(self, after: int) -> None:
        self.left = after

    def sample(self, n: int, rng: np.random.Generator, split: str = "train") -> list[Task]:
        self.left -= 1
        return [task | ({"fault": "raise"} if self.left < 0 else {}) for task in super().sample(n, rng, split)]


class Recorded(Navigation2D):
    """Remembers the tasks that it drew, by split and in order."""

    drawn: ClassVar[list[tuple[str, str]]] = []

    def sample(self, n: int, rng: np.random.Generator, split: str = "train") -> list[Task]:
        tasks = super().sample(n, rng, split)
        Recorded.drawn += [(split, json.dumps(task)) for task in tasks]
        return tasks


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(config(iterations=2), tmp_path_factory.mktemp("trained") / "run").run_dir


def evaluated(run: Path, **changes: Any) -> Evaluation:
    return evaluate_checkpoint(run, **{"num_tasks": 5, "steps": 2, "episodes": 3, **changes})


def test_random_numbers_are_common_to_evaluations_of_the_same_seed(trained: Path, without_ray: None) -> None:
    report = evaluated(trained)
    assert report.returns.shape == report.lengths.shape == (5, 3)
    assert np.array_equal(evaluated(trained).returns, report.returns)
    for fewer in (0, 1):
        assert np.array_equal(evaluated(trained, steps=fewer).returns, report.returns[:, : fewer + 1])
    slower = evaluated(trained, inner_lr=0.003).returns
    assert np.array_equal(slower[:, 0], report.returns[:, 0]), "the same tasks, starts and actions"
    assert not np.array_equal(slower[:, 1], report.returns[:, 1])
    for other in ({"seed": 1}, {"split": "validation"}, {"deterministic": True}):
        assert not np.isin(evaluated(trained, **other).returns, report.returns).any(), other


def test_evaluation_does_not_depend_on_workers(trained: Path, ray_session: None) -> None:
    alone, shared = evaluated(trained), evaluated(trained, num_workers=2)
    assert np.array_equal(alone.returns, shared.returns)
    assert np.array_equal(alone.lengths, shared.lengths)
    assert alone.environment_steps == shared.environment_steps


def test_evaluation_does_not_depend_on_the_threads_that_torch_has(trained: Path, without_ray: None) -> None:
    before = torch.get_num_threads()
    try:
        reports = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            reports.append(evaluated(trained, num_tasks=20, episodes=20, steps=1))
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(reports[0].returns, reports[1].returns)


def test_no_split_shares_a_task_with_another_or_with_training(
    tmp_path: Path, without_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Recorded, "drawn", [])  # the class's: the trainer has a copy of the family
    family = Recorded()
    run = train(config(iterations=2), tmp_path, distribution=family).run_dir
    for split in ("train", "validation", "test"):
        evaluated(run, split=split, steps=0, distribution=family)
    drawn = Recorded.drawn
    assert [split for split, _ in drawn] == ["train"] * 13 + ["validation"] * 5 + ["test"] * 5
    assert len({task for _, task in drawn}) == len(drawn)


def test_the_report_says_what_was_evaluated(trained: Path, without_ray: None) -> None:
    report = evaluated(trained, split="shifted-test")
    summary = report.summary()
    assert (summary["task"], summary["split"], summary["num_tasks"]) == ("navigation-2d", "shifted-test", 5)
    assert summary["return"] == pytest.approx(report.returns.mean(0).tolist())
    assert summary["environment_steps"] == pytest.approx(3 * report.lengths.sum())
    for low, mean, high in zip(summary["ci_low"], summary["return"], summary["ci_high"], strict=True):
        assert low < mean < high
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_a_runs_best_checkpoint_is_evaluated_unless_one_is_named(tmp_path: Path, without_ray: None) -> None:
    run = train(config(iterations=4, checkpoint_every=1, outer_lr=0.05), tmp_path).run_dir
    best = json.loads((run / "best.json").read_text())["checkpoint"]
    reports = {name: evaluated(run / name, steps=0).returns for name in names(run)}
    assert np.array_equal(evaluated(run, steps=0).returns, reports.pop(best))
    assert all(not np.array_equal(evaluated(run, steps=0).returns, returns) for returns in reports.values())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"task": "cartpole"},
            r"cannot play 'cartpole': its observations are of the size 2, not of the shape \(4,\)\.$",
        ),
        (
            {"task": "faulty_tasks:Doubled"},
            r"its actions are bounded by \[-0.1, -0.1\] and \[0.1, 0.1\], not as in Box\(",
        ),
        ({"task": "navigation"}, r"no task family 'navigation', did you mean 'navigation-2d'"),
        ({"split": "tset"}, r"no split 'tset', did you mean 'test'"),
        ({"num_tasks": 0}, r"^num_tasks must be an integer of 1 or more, not 0\.$"),
        ({"steps": -1}, r"^steps must be an integer of 0 or more, not -1\.$"),
        ({"episodes": 0}, r"^episodes must be an integer of 1 or more, not 0\.$"),
        ({"seed": -1}, r"^seed must be an integer of 0 or more, not -1\.$"),
        ({"num_workers": -1}, r"^num_workers must be an integer of 0 or more, not -1\.$"),
        ({"inner_lr": float("nan")}, r"^inner_lr must be a number above 0, not nan\.$"),
    ],
)
def test_impossible_evaluations_are_refused_before_ray_is_started(
    trained: Path, without_ray: None, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        evaluated(trained, **{"num_workers": 2, **changes})


def test_more_workers_than_ray_has_cpus_are_refused(trained: Path, ray_session: None) -> None:
    with pytest.raises(ValueError, match="need 5 CPUs, but this Ray cluster has 4"):
        evaluated(trained, num_workers=4)


def test_a_faulty_environment_fails_the_evaluation(trained: Path, without_ray: None) -> None:
    with pytest.raises(EnvironmentFailure, match="OSError: the simulator of goal"):
        evaluated(trained, distribution=Spoiled(after=0))


def scalars(run: Path) -> dict[tuple[str, int], float]:
    """What TensorBoard shows of a run, by tag and step: a later file replaces the steps from its first one on."""
    values: dict[tuple[str, int], float] = {}
    for path in sorted(run.glob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime_ns):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)  # then its checksum, the event and the event's checksum
            event = Event.FromString(content[at + 12 : at + 12 + length])
            at += length + 16
            if event.session_log.status == event.session_log.START:
                values = {(tag, step): value for (tag, step), value in values.items() if step < event.step}
            values |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
    return values
