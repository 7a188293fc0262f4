"""The command train: what it prints where, how it fails, and how it is interrupted and goes on."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.progress import Progress

from builders import PNG, logged, steady, tags
from command_line import EVALUATION, IN_PROCESS, OPTIONS, SMALL, Command, join_ray, only_object
from faulty_tasks import FaultyNavigation
from ssm_metarl.config import TrainConfig
from ssm_metarl.distributed.learner import Learner
from ssm_metarl.distributed.train import train
from ssm_metarl.storage.checkpoint import load_checkpoint
from ssm_metarl.storage.run_folder import checkpoints
from ssm_metarl.tasks import Task
from ssm_metarl.tasks import registry as base

RUN_LOCAL = Path(__file__).resolve().parents[2] / "run_local.py"


# --- train ------------------------------------------------------------------------------------------------


def test_a_schedule_gives_the_options_and_changes_them(command: Command, tmp_path: Path) -> None:
    options = TrainConfig.for_task("cartpole", **SMALL).to_dict()
    schedule = {"iterations": 3, "weights": "last", "options": [[0, options], [2, {"state_dim": 10, "outer_lr": 0.01}]]}
    (tmp_path / "schedule.json").write_text(json.dumps(schedule))
    given = ["--num-workers", "0", "--eval-tasks", "2", "--schedule", "schedule.json", "--meta-batch", "2"]
    outcome = command("train", *given, "--run-dir", "run")
    assert outcome.code == 0, outcome.err
    sizes = [load_checkpoint(path).config["state_dim"] for path in checkpoints(tmp_path / "run")]
    assert sizes == [8, 10]
    last = load_checkpoint(checkpoints(tmp_path / "run")[-1])
    assert (last.progress["iteration"], last.config["outer_lr"], last.config["meta_batch"]) == (3, 0.01, 2)
    assert last.config["task"] == "cartpole"
    outcome = command("train", "--schedule", "nowhere.json")
    assert (outcome.code, outcome.err) == (2, "error: There is no schedule nowhere.json.\n")


def test_train_is_the_default_command_and_prints_one_json_object(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "a run [bold] with a long name, that holds spaces and brackets, and is longer than a line"
    outcome = command("--iterations", "3", *IN_PROCESS, "--run-dir", folder, "--json")
    assert outcome.code == 0, outcome.err
    summary = only_object(outcome.out)
    assert summary.keys() == {
        "run_dir",
        "checkpoint",
        "seconds",
        "interrupted",
        "metrics",
        "evaluation",
        "pictures",
    }
    assert summary["run_dir"] == str(folder)
    assert summary["checkpoint"] == str(folder / "checkpoint_000003")
    assert summary["interrupted"] is False
    assert summary["metrics"] == json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert summary["evaluation"].keys() == EVALUATION
    assert (summary["evaluation"]["num_tasks"], len(summary["evaluation"]["return"])) == (3, 2)
    assert [Path(picture).read_bytes()[: len(PNG)] for picture in summary["pictures"]] == [PNG, PNG]
    lines = outcome.err.splitlines()
    assert f"Run folder: {folder}" in lines, "as it is: neither wrapped nor read as markup"
    assert f"Checkpoint: {folder / 'checkpoint_000003'}" in lines
    for number in (1, 2, 3):
        assert any(line.startswith(f"iteration {number}/3: return -") for line in lines)
    board = tags(folder)
    assert board["return_by_step/1"] == [1, 2, 3]
    assert [board[f"evaluation/{name}/{step}"] for name in ("return", "ci_low") for step in (0, 1)] == [[3]] * 4
    assert board["learning_curve"] == board["adaptation_curve"] == [3]


@pytest.mark.slow
def test_a_command_line_names_all_loggers(
    command: Command, tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    join_ray(monkeypatch)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = tmp_path / "run"
    names = ["--log", "tensorboard", "wandb", "mlflow", "csv"]
    outcome = command("train", "--iterations", "2", *IN_PROCESS, *names, "--run-dir", run)
    assert outcome.code == 0, outcome.err
    assert tags(run)["evaluation/return/1"] == [2]
    assert len((run / "progress.csv").read_text().splitlines()) == 3
    (kept,) = run.glob("wandb/offline-run-*/*.wandb")
    assert b"return_after" in kept.read_bytes()
    with sqlite3.connect(run / "mlflow.db") as records:
        query = "SELECT value FROM metrics WHERE key = 'return_after' ORDER BY step"
        assert records.execute(query).fetchall() == [(line["return_by_step"][-1],) for line in logged(run)]


def test_the_first_line_is_the_run_folder(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before that of Ray's dashboard; what repeats the run is in it by then."""

    def start(*_: Any, **__: Any) -> None:
        assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["eval_tasks"] == 3
        print("Ray dashboard: …", file=sys.stderr)

    monkeypatch.setattr("ssm_metarl.distributed.train.start_ray", start)
    outcome = command("--iterations", "1", *IN_PROCESS, "--run-dir", "run")
    assert outcome.code == 0, outcome.err
    assert outcome.err.splitlines()[:2] == ["Run folder: run", "Ray dashboard: …"]


def test_without_json_nothing_is_printed_to_stdout(command: Command, tmp_path: Path) -> None:
    outcome = command("train", "--task", "cartpole", "--iterations", "1", *IN_PROCESS)
    assert (outcome.code, outcome.out) == (0, "")
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("cartpole-promp-2")
    assert load_checkpoint(run / "checkpoint_000001").config["inner_lr"] == 0.1, "cartpole's own default"
    assert "of split test" in outcome.err


def test_resume_takes_the_options_of_the_run_and_those_given_win(command: Command, tmp_path: Path) -> None:
    first = ["--iterations", "2", *IN_PROCESS, "--inner-lr", "0.2", "--outer-lr", "0.001", "--seed", "5"]
    first += ["--run-dir", tmp_path / "run"]
    assert command("train", *first).code == 0
    resume = ("train", "--resume", "--run-dir", tmp_path / "run", "--eval-tasks", "2")
    assert command(*resume, "--iterations", "4").code == 0
    assert command(*resume, "--iterations", "6", "--outer-lr", "0.01").code == 0
    configs = [load_checkpoint(path).config for path in checkpoints(tmp_path / "run")[-2:]]
    common = {**SMALL, "inner_lr": 0.2, "seed": 5, "num_workers": 0}
    for found, own in zip(
        configs, ({"iterations": 4, "outer_lr": 1e-3}, {"iterations": 6, "outer_lr": 0.01}), strict=True
    ):
        assert {**found, **common, **own} == found
    lines = steady(tmp_path / "run")
    assert [line["learning_rate"] for line in lines] == [1e-3] * 4 + [0.01] * 2
    unbroken = TrainConfig.for_task("navigation-2d", iterations=4, inner_lr=0.2, outer_lr=1e-3, seed=5, **SMALL)
    assert lines[:4] == steady(train(unbroken, tmp_path / "unbroken").run_dir)


def test_a_failing_environment_is_exit_code_1_with_its_traceback(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Falling(FaultyNavigation):
        def sample(self, *args: Any, **kwargs: Any) -> list[Task]:
            return [task | {"fault": "raise"} for task in super().sample(*args, **kwargs)]

    monkeypatch.setitem(base._FACTORIES, "falling", Falling)
    outcome = command("train", "--task", "falling", *IN_PROCESS, "--run-dir", tmp_path / "run", "--json")
    assert (outcome.code, outcome.out) == (1, "")
    assert "episodes (support) were lost" in outcome.err
    assert "OSError: the simulator of goal [" in outcome.err
    assert "faulty_tasks.py" in outcome.err
    assert "cli.py" not in outcome.err, "none of ours"


def test_an_update_that_is_not_finite_is_exit_code_1_and_one_sentence(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*args: Any, **kwargs: Any) -> None:
        raise FloatingPointError("The meta-gradient is not finite.")

    monkeypatch.setattr(Learner, "update", diverge)
    outcome = command(*IN_PROCESS, "--run-dir", tmp_path / "run", "--json")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.splitlines() == [f"Run folder: {tmp_path / 'run'}", "error: The meta-gradient is not finite."]


@pytest.mark.slow
def test_workers_change_nothing(
    command: Command, tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    join_ray(monkeypatch)
    results = []
    for workers in "02":
        folder = tmp_path / workers
        outcome = command("--iterations", "2", *IN_PROCESS, "--num-workers", workers, "--run-dir", folder, "--json")
        assert outcome.code == 0, outcome.err
        results.append((steady(folder), {**only_object(outcome.out)["evaluation"], "seconds": 0}))
    assert results[0] == results[1]


# --- As processes -----------------------------------------------------------------------------------------


ENDLESS = [*OPTIONS, "--iterations", "100000", "--checkpoint-every", "50"]


def start(*arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
    """`python run_local.py` in a process group of its own, as a shell starts it."""
    return subprocess.Popen(
        [sys.executable, str(RUN_LOCAL), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        start_new_session=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("name", "num_workers"), [("SIGINT", 1), ("SIGTERM", 0)])
def test_an_interrupted_run_ends_with_a_checkpoint_and_goes_on(
    command: Command, tmp_path: Path, name: str, num_workers: int
) -> None:
    number, run = signal.Signals[name], tmp_path / "a run"
    process = start("train", *ENDLESS, "--num-workers", num_workers, "--run-dir", run, "--json")
    try:
        assert process.stderr is not None
        lines = until(process.stderr, "iteration 3/")
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does: to Ray's processes too
        else:
            process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + number, err
    lines += err.splitlines()
    assert not any("Traceback" in line for line in lines), lines
    deadline = time.monotonic() + 30
    while left := processes_of_session(process.pid):
        assert time.monotonic() < deadline, f"Ray left {left} behind"
        time.sleep(0.1)
    (iteration,) = (path.name for path in checkpoints(run) if path.name != "checkpoint_000000")
    count = len(steady(run))
    assert 3 <= count < 50
    assert iteration == f"checkpoint_{count:06d}"
    assert any(line.startswith("Ray dashboard: http://127.0.0.1:") for line in lines) == bool(num_workers)
    summary = only_object(out)
    assert summary["interrupted"] is True
    assert summary["checkpoint"] == str(run / iteration)
    # The last line says how to go on.
    said = lines[-1].partition("resume with: ")[2]
    python, script, *resume = shlex.split(said)
    assert (python, script) == ("python", str(RUN_LOCAL))
    assert resume == ["train", "--resume", "--run-dir", str(run)]
    outcome = command(*resume, "--iterations", str(count + 3), "--num-workers", "0", "--eval-tasks", "2")
    assert outcome.code == 0, outcome.err
    unbroken = TrainConfig.for_task("navigation-2d", iterations=count + 3, **SMALL)
    assert steady(run) == steady(train(unbroken, tmp_path / "unbroken").run_dir)


def processes_of_session(session: int) -> list[str]:
    """Names of its living processes."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            name, _, fields = stat.read_text().partition("(")[2].rpartition(")")
            state, _parent, _group, own_session = fields.split()[:4]
            if int(own_session) == session and state not in "ZX":
                found.append(name)
    return found


def until(stream: Any, beginning: str) -> list[str]:
    """Lines up to the one that begins so."""
    lines = []
    for line in stream:
        lines.append(line)
        if line.startswith(beginning):
            return lines
    raise AssertionError(f"ended before {beginning!r}: {lines}")


@pytest.mark.slow
def test_a_resumed_bar_begins_where_the_run_is(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its first iteration, and of one seed as of several."""
    seen: list[tuple[str, int]] = []
    add_task = Progress.add_task

    def noted(self: Progress, description: str, *args: Any, **options: Any) -> Any:
        seen.append((description, options.get("completed", 0)))
        return add_task(self, description, *args, **options)

    monkeypatch.setattr(Progress, "add_task", noted)
    run = ["--run-dir", tmp_path / "run", *IN_PROCESS]
    assert command("--iterations", "2", *run).code == 0
    assert command("--resume", "--iterations", "3", *run).code == 0
    assert command("--resume", "--resume-from", "checkpoint_000002", "--iterations", "3", *run).code == 0
    assert [done for _, done in seen] == [0, 2, 2]
    seen.clear()
    run = ["--run-dir", tmp_path / "many", "--seeds", "4", *IN_PROCESS]
    assert command("--iterations", "1", *run).code == 0
    assert command("--resume", "--iterations", "2", *run).code == 0
    assert seen == [("seed 4", 0), ("seed 4", 1)]
