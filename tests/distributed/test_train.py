"""A run in a folder: what it leaves, how it stops and goes on, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders import (
    events,
    logged,
    small_config,
    steady,
)
from faulty_tasks import FaultyAfter
from ssm_metarl.distributed.play import EnvironmentFailure
from ssm_metarl.distributed.train import train
from ssm_metarl.storage.checkpoint import load_checkpoint, load_policy
from ssm_metarl.storage.contents import CheckpointError

Metrics = dict[str, Any]


def names(run: Path) -> set[str]:
    return {path.name for path in run.glob("*checkpoint*")}


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if not path.name.startswith(".lock"))


# --- What a run leaves ------------------------------------------------------------------------------------


def test_a_run_leaves_metrics_events_and_checkpoints(tmp_path: Path, without_ray: None) -> None:
    seen: list[Metrics] = []
    result = train(small_config(iterations=5, checkpoint_every=2), tmp_path / "a" / "run", on_iteration=seen.append)
    run = result.run_dir
    assert run == tmp_path / "a" / "run"
    assert logged(run) == seen
    assert [line["iteration"] for line in seen] == [1, 2, 3, 4, 5]
    assert result.metrics == seen[-1]
    assert result.signal is None
    assert result.checkpoint == run / "checkpoint_000005"
    assert load_checkpoint(result.checkpoint).progress == {
        "iteration": 5,
        "env_steps": seen[-1]["env_steps"],
        "longest": 100,  # steps of an episode
    }
    found = scalars(run)
    assert {step for _, step in found} == {1, 2, 3, 4, 5}
    for line in seen:
        at = line["iteration"]
        assert found["return_by_step/0", at] == pytest.approx(line["return_by_step"][0])
        assert found["return_by_step/1", at] == pytest.approx(line["return_by_step"][1])
        assert found["seconds/sample", at] == pytest.approx(line["seconds"]["sample"])
        assert found["loss", at] == pytest.approx(line["loss"])


def test_the_last_three_checkpoints_and_the_best_are_kept(tmp_path: Path, without_ray: None) -> None:
    # Learning too slow to matter: which iteration is best is up to its tasks.
    result = train(small_config(iterations=8, checkpoint_every=1, outer_lr=1e-9, seed=3), tmp_path / "run")
    returns = [line["return_by_step"][-1] for line in logged(result.run_dir)]
    best = 1 + int(np.argmax(returns))
    assert best < 6, "choose another seed: this one shows nothing"
    assert names(result.run_dir) == {f"checkpoint_{number:06d}" for number in (best, 6, 7, 8)}
    mark = json.loads((result.run_dir / "best.json").read_text())
    assert mark == {"checkpoint": f"checkpoint_{best:06d}", "return": max(returns)}


def test_the_best_is_that_of_the_mean_since_the_checkpoint_before(tmp_path: Path, without_ray: None) -> None:
    run = train(small_config(iterations=6, checkpoint_every=3, outer_lr=1e-9), tmp_path / "run").run_dir
    returns = [line["return_by_step"][-1] for line in logged(run)]
    means = [np.mean(returns[:3]), np.mean(returns[3:])]
    mark = json.loads((run / "best.json").read_text())
    assert mark == {"checkpoint": f"checkpoint_{3 + 3 * int(np.argmax(means)):06d}", "return": max(means)}


def test_a_loaded_policy_is_the_one_that_was_saved(tmp_path: Path, without_ray: None) -> None:
    result = train(small_config(iterations=2, checkpoint_every=1), tmp_path / "run")
    for path in (result.checkpoint, str(result.checkpoint)):
        policy, checkpoint = load_policy(path)
        assert policy.spec == checkpoint.spec
        assert checkpoint.config == small_config(iterations=2, checkpoint_every=1).to_dict()
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
    return train(small_config(**CRASHING), tmp_path_factory.mktemp("undisturbed") / "run").run_dir


CRASHING = {"iterations": 7, "checkpoint_every": 2, "lr_schedule": "cosine", "seed": 4}


@pytest.mark.parametrize("iteration", [1, 3, 4, 6])
def test_a_run_that_crashed_goes_on_as_if_it_had_not(
    tmp_path: Path, undisturbed: Path, without_ray: None, iteration: int
) -> None:
    run = tmp_path / "run"
    with pytest.raises(Crash):
        train(small_config(**CRASHING), run, on_iteration=crash_at(iteration))
    assert len(logged(run)) == iteration
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"iteration": 8, "env_st')  # torn by the crash
    result = train(small_config(**CRASHING), run, resume=True)
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
        train(small_config(iterations=9, checkpoint_every=2), tmp_path, on_iteration=crash_at(3))
    assert {step for _, step in scalars(tmp_path)} == {1, 2, 3}
    train(small_config(iterations=2), tmp_path, resume=True)
    assert [line["iteration"] for line in logged(tmp_path)] == [1, 2]
    assert {step for _, step in scalars(tmp_path)} == {1, 2}


def test_a_finished_run_is_not_changed_by_resuming_it_and_can_be_made_longer(tmp_path: Path, without_ray: None) -> None:
    run = tmp_path / "run"
    train(small_config(iterations=2), run)
    lines = logged(run)
    result = train(small_config(iterations=2), run, resume=True)
    assert logged(run) == lines
    assert (result.metrics, result.checkpoint.name) == ({}, "checkpoint_000002")
    train(small_config(iterations=4), run, resume=True)
    longer = train(small_config(iterations=4), tmp_path / "longer").run_dir
    assert steady(run) == steady(longer)


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture
def heard() -> Iterator[None]:
    """The signals have their default actions, also in tests that a shell starts in the background or under nohup."""
    before = [signal.signal(number, signal.SIG_DFL) for number in SIGNALS]
    yield
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_run_after_the_iteration_with_a_checkpoint(
    tmp_path: Path, without_ray: None, heard: None, number: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    handlers = [signal.getsignal(each) for each in SIGNALS]

    def interrupt(metrics: Metrics) -> None:
        if metrics["iteration"] == 3:
            os.kill(os.getpid(), number)

    result = train(small_config(iterations=5, checkpoint_every=2), run, on_iteration=interrupt)
    assert result.signal == number
    assert result.checkpoint == run / "checkpoint_000003"
    assert len(logged(run)) == 3
    assert [signal.getsignal(each) for each in SIGNALS] == handlers
    again = "Ctrl-C" if number == signal.SIGINT else number.name
    assert caplog.messages == [f"The iteration is being finished; another {again} ends it at once."]
    train(small_config(iterations=5, checkpoint_every=2), run, resume=True)
    assert steady(run) == steady(train(small_config(iterations=5), tmp_path / "undisturbed").run_dir)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_ends_the_run_at_once(
    tmp_path: Path, without_ray: None, heard: None, number: signal.Signals
) -> None:
    def interrupt(metrics: Metrics) -> None:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)

    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as ended:
        train(small_config(iterations=5), tmp_path / "run", on_iteration=interrupt)
    if number != signal.SIGINT:
        assert ended.value.code == 128 + number
    assert names(tmp_path / "run") == {"checkpoint_000000"}
    assert signal.getsignal(number) == signal.SIG_DFL


def test_a_run_under_nohup_outlives_its_terminal(tmp_path: Path, without_ray: None, heard: None) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    result = train(
        small_config(iterations=2), tmp_path / "run", on_iteration=lambda _: os.kill(os.getpid(), signal.SIGHUP)
    )
    assert (result.signal, result.metrics["iteration"]) == (None, 2)


def test_a_run_in_another_thread_works(tmp_path: Path, without_ray: None) -> None:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(train(small_config(iterations=1), tmp_path / "run")))
    thread.start()
    thread.join()
    assert results[0].checkpoint.name == "checkpoint_000001"


# --- What is refused, before anything is written or started -----------------------------------------------


def test_a_folder_that_holds_something_is_refused(tmp_path: Path, without_ray: None) -> None:
    train(small_config(iterations=1), tmp_path / "run")
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
            train(small_config(num_workers=1), tmp_path / folder)
    assert visible(tmp_path) == before


def test_an_empty_folder_is_taken(tmp_path: Path, without_ray: None) -> None:
    (tmp_path / ".gitkeep").write_text("")
    assert train(small_config(iterations=1), tmp_path).checkpoint == tmp_path / "checkpoint_000001"


def test_without_a_checkpoint_there_is_nothing_to_resume(tmp_path: Path, without_ray: None) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "crashed" / "checkpoint_000000").mkdir(parents=True)  # without a manifest
    before = visible(tmp_path)
    for folder in ("empty", "crashed", "absent"):
        with pytest.raises(ValueError, match=rf"^There is no checkpoint in {tmp_path / folder} to resume from.$"):
            train(small_config(num_workers=1), tmp_path / folder, resume=True)
    assert visible(tmp_path) == before


def test_a_checkpoint_that_is_damaged_or_of_other_sizes_is_not_resumed(tmp_path: Path, without_ray: None) -> None:
    checkpoint = train(small_config(iterations=1), tmp_path).checkpoint
    before = visible(tmp_path)
    for other, reason in (
        (small_config(hidden_dim=24, num_workers=1), r"hidden_dim 16 instead of 24\.$"),
        (small_config("cartpole", num_workers=1), r"observation_size 2 instead of 4, discrete False instead of True"),
    ):
        with pytest.raises(CheckpointError, match=rf"^{checkpoint}: its policy has .*{reason}"):
            train(other, tmp_path, resume=True)
    (checkpoint / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors is truncated or altered"):
        train(small_config(num_workers=1), tmp_path, resume=True)
    assert visible(tmp_path) == before


def test_a_device_that_is_not_there_is_refused(tmp_path: Path, without_ray: None) -> None:
    with pytest.raises(ValueError, match=r"^device 'abacus' cannot be used here: "):
        train(small_config(device="abacus", num_workers=1), tmp_path / "run")
    assert visible(tmp_path) == []


def test_a_faulty_environment_stops_the_run_and_leaves_its_last_checkpoint(tmp_path: Path, without_ray: None) -> None:
    with pytest.raises(EnvironmentFailure, match="OSError: the simulator of goal"):
        train(small_config(iterations=5, checkpoint_every=1), tmp_path, distribution=FaultyAfter(after=2))
    assert len(logged(tmp_path)) == 2
    assert load_checkpoint(tmp_path / "checkpoint_000002").progress["iteration"] == 2


# --- Evaluation -------------------------------------------------------------------------------------------


def scalars(run: Path) -> dict[tuple[str, int], float]:
    """What TensorBoard shows of a run, by tag and step: a later file replaces the steps from its first one on."""
    values: dict[tuple[str, int], float] = {}
    for event in events(run):
        if event.session_log.status == event.session_log.START:
            values = {(tag, step): value for (tag, step), value in values.items() if step < event.step}
        numbers = [value for value in event.summary.value if value.WhichOneof("value") == "simple_value"]
        values |= {(value.tag, event.step): value.simple_value for value in numbers}
    return values
