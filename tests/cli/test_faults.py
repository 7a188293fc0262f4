"""What goes wrong around a command ends in one sentence and the right exit code; environments stay apart from it."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from command_line import IN_PROCESS, Command, only_object
from ssm_metarl.storage.checkpoint import load_checkpoint
from ssm_metarl.storage.run_folder import checkpoints

NOISY = """
import os
import gymnasium, numpy as np

class Noisy(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)
    horizon = 6

    def __init__(self):
        print("an environment prints", flush=True)
        os.system("echo its child prints")
        self.note("opened")

    def note(self, what):
        with open(os.environ["NOISY_LOG"], "a") as file:
            file.write(what + "\\n")

    def sample_tasks(self, n, rng):
        return [{"right": int(rng.integers(2))} for _ in range(n)]

    def set_task(self, task):
        self.task = task

    def reset(self, *, seed=None, options=None):
        return np.zeros(2, np.float32), {}

    def step(self, action):
        return np.zeros(2, np.float32), float(action == self.task["right"]), False, False, {}

    def close(self):
        self.note("closed")
        raise OSError("it cannot be closed")
"""


def run_noisy(folder: Path, *words: str, **how: Any) -> subprocess.CompletedProcess[str]:
    (folder / "noisy.py").write_text(NOISY)
    command = [sys.executable, "-m", "ssm_metarl", *words, "--task", "noisy:Noisy", "--json"]
    environment = {**os.environ, "NOISY_LOG": str(folder / "log"), "XDG_STATE_HOME": str(folder / "state")}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how}
    return subprocess.run(command, cwd=folder, env=environment, text=True, **streams)


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_environments_print_to_stderr_and_are_all_closed(tmp_path: Path, workers: str) -> None:
    options = [*IN_PROCESS, "--num-workers", workers]
    done = run_noisy(tmp_path, "train", "--iterations", "2", *options, "--run-dir", "run")
    assert done.returncode == 0, done.stderr
    assert only_object(done.stdout)["metrics"]["iteration"] == 2
    assert "an environment prints" in done.stderr
    assert "its child prints" in done.stderr
    notes = (tmp_path / "log").read_text().split()
    assert notes.count("opened") > 0
    assert notes.count("closed") == notes.count("opened")


@pytest.mark.slow
def test_an_answer_that_nobody_reads_ends_the_command(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = run_noisy(tmp_path, "train", "--iterations", "1", *IN_PROCESS, "--run-dir", "run", stdout=writing)
    finally:
        os.close(writing)
    assert done.returncode == 141
    assert "Traceback" not in done.stderr
    assert load_checkpoint(checkpoints(tmp_path / "run")[-1]).progress["iteration"] == 1


@pytest.mark.slow
def test_what_is_said_to_a_closed_stderr_is_not_in_the_answer(tmp_path: Path) -> None:
    """As under `2>&-`, in a shell."""
    words = ["train", "--iterations", "2", *IN_PROCESS, "--run-dir", "run"]
    done = run_noisy(tmp_path, *words, stderr=None, preexec_fn=lambda: os.close(2))
    assert done.returncode == 0
    assert only_object(done.stdout)["metrics"]["iteration"] == 2
    assert load_checkpoint(checkpoints(tmp_path / "run")[-1]).progress["iteration"] == 2


@pytest.mark.parametrize("file", ["optimizer.safetensors", "metrics.jsonl"])
def test_a_full_disk_is_named_with_what_is_safe(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """The third time that a checkpoint or the log of metrics is written there is no space."""
    times, run = 0, tmp_path / "run"

    def count() -> None:
        nonlocal times
        times += 1
        if times > 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    def write_new(path: Path, content: bytes) -> None:
        if path.name == file:
            count()
        path.write_bytes(content)

    def add(board: Any, metrics: Any, line: Any) -> None:
        count()

    if file == "metrics.jsonl":
        monkeypatch.setattr("ssm_metarl.distributed.loggers.Board.add", add)
    else:
        monkeypatch.setattr("ssm_metarl.storage.checkpoint.write_new", write_new)
    outcome = command("train", "--iterations", "6", *IN_PROCESS, "--checkpoint-every", "1", "--run-dir", run)
    assert outcome.code == 1
    error = outcome.err.splitlines()[-1]
    assert error.startswith("error: ")
    assert f"{file}: No space left on device. {run}/checkpoint_00000" in error
    assert error.endswith("and the checkpoints before it are safe: --resume goes on from there.")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    again = command("train", "--resume", "--run-dir", run, "--iterations", "6", *IN_PROCESS)
    assert again.code == 0, again.err


def test_a_device_that_holds_no_numbers_is_refused(command: Command) -> None:
    outcome = command("train", "--device", "meta", "--iterations", "1", *IN_PROCESS)
    assert outcome.code == 2
    assert outcome.err.startswith("error: device 'meta' cannot be used here:")


@pytest.mark.parametrize("listens", [False, True])
def test_a_cluster_that_does_not_answer_is_one_sentence(
    command: Command, monkeypatch: pytest.MonkeyPatch, listens: bool
) -> None:
    monkeypatch.setattr("ssm_metarl.distributed.cluster.ANSWER_SECONDS", 1.0)
    monkeypatch.setattr("ssm_metarl.distributed.jobs.ANSWER_SECONDS", 1.0)
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # by a test before
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        if listens:
            place.listen()
        address = f"127.0.0.1:{place.getsockname()[1]}"
        outcome = command("train", "--address", address, "--iterations", "1")
        assert (outcome.code, outcome.err.count("\n")) == (2, 1)
        assert outcome.err.startswith(f"error: No Ray cluster answers at {address} within 1 s")
        outcome = command("job", "list", "--address", f"http://{address}")
        assert (outcome.code, outcome.err.count("\n")) == (1, 1)
        assert outcome.err.startswith(f"error: No Ray job server answers at http://{address}")
