"""Commands with runs at a URI, and resuming: an S3 server on the loopback address, and nobody's credentials."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from command_line import IN_PROCESS, OPTIONS, SMALL, Command, only_object
from object_store import ObjectStore, proxy
from ssm_metarl.cli.job import prepared, run_name
from ssm_metarl.cli.main import main
from ssm_metarl.config import TrainConfig
from ssm_metarl.distributed.train import train
from ssm_metarl.storage import run_copy
from ssm_metarl.storage.checkpoint import load_checkpoint
from ssm_metarl.storage.remote import Remote
from ssm_metarl.storage.run_folder import checkpoints
from ssm_metarl.storage.uri import join

RUN_LOCAL = Path(__file__).resolve().parents[2] / "run_local.py"
SECRET = "SECRET/with+signs"
USER = "AKIA:SECRET%2Fwith+signs"


@pytest.fixture
def command(
    without_ray: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line in an empty folder; no secret may be printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path.with_suffix(".state")))
    monkeypatch.setattr(run_copy, "SETTLE", 0.05)

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert "SECRET" not in out + err
        assert "AKIA" not in out + err
        return code, out, err

    return run


def there(uri: str) -> dict[str, bytes]:
    with Remote(uri) as remote:
        return remote.get(name for name in remote.files() if not name.startswith("."))


@pytest.mark.slow
def test_a_run_at_a_uri_is_trained_resumed_used_and_started_from(
    command: Command, tmp_path: Path, s3: ObjectStore
) -> None:
    """A head that is lost with its disk loses no finished checkpoint."""
    storage = s3.uri("my runs", user=USER)
    uri = join(storage, "run #1")
    code, out, err = command("train", *IN_PROCESS, "--iterations=1", "--storage", storage, "--run-dir=run #1", "--json")
    assert code == 0, err
    assert only_object(out)["copy"]["complete"]
    assert {"evaluation.json", "metrics.jsonl", "run.json", "best.json"} <= there(uri).keys()
    shutil.rmtree(tmp_path / "run #1")
    resume = ("train", "--resume", "--run-dir=run #1", "--storage", storage, "--iterations=2", "--json")
    code, out, err = command(*resume)
    assert code == 0, err
    assert "Fetched the run from its copy at s3://***@bucket/my%20runs/run%20%231?" in err
    summary = only_object(out)
    assert summary["metrics"]["iteration"] == 2
    assert summary["evaluation"]["num_tasks"] == 3, "as when the run began"
    config = TrainConfig.for_task("navigation-2d", **SMALL, iterations=2)
    quiet = load_checkpoint(train(config, tmp_path / "quiet").checkpoint).policy
    weights = load_checkpoint(checkpoints(tmp_path / "run #1")[-1]).policy
    assert all((weights[name] == value).all() for name, value in quiet.items())
    local = {path.relative_to(tmp_path / "run #1").as_posix() for path in (tmp_path / "run #1").rglob("*")}
    assert there(uri).keys() == {name for name in local if (tmp_path / "run #1" / name).is_file() and name[0] != "."}
    # Read by the other commands.
    code, out, err = command("evaluate", uri, "--num-tasks=2", "--num-workers=0", "--json")
    assert (code, only_object(out)["num_tasks"]) == (0, 2), err
    small = ("--steps=1", "--episodes=2", "--num-workers=0")
    code, out, err = command("adapt", uri, "--out", tmp_path / "adapted", *small)
    assert code == 0, err
    code, out, err = command("train", *IN_PROCESS, "--iterations=1", "--from", uri, "--run-dir=second")
    assert code == 0, err
    code, out, err = command("train", "--resume", "--run-dir=run #1")
    assert "The copy of this run at s3://***@bucket/my%20runs/run%20%231?" in err
    # Taken.
    code, out, err = command("train", *IN_PROCESS, "--iterations=1", "--storage", storage, "--run-dir", "x/run #1")
    assert code == 2
    assert "holds a run already (checkpoint_000002): resume it, or choose another folder." in err
    assert not (tmp_path / "x" / "run #1").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("plot {uri}", "RUN is a folder of this machine, not s3://***@bucket/runs/a?"),
        ("train --run-dir {uri}", "a copy at a URI is asked for with --storage, its parent."),
        ("adapt pretrained:cartpole --out {uri}", "--out is a folder of this machine, not s3://***@bucket/runs/a?"),
        ("train --schedule {uri}", "--schedule is a folder of this machine"),
        ("evolve rollback {uri} x", "RUN is a folder of this machine"),
        ("evaluate {uri}", "is neither a checkpoint nor a run: there is none at this place."),
        ("train --from {uri}", "is neither a checkpoint nor a run: there is none at this place."),
        (
            "train --resume --run-dir a --storage {uri}",
            "There is no run to resume, neither in a nor at s3://***@bucket",
        ),
        ("train --num-workers 0 --storage {wrong}", "cannot be listed: Unexpected query parameter"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(
    command: Command, tmp_path: Path, s3: ObjectStore, arguments: str, sentence: str
) -> None:
    uri = s3.uri("runs/a", user=USER)
    code, out, err = command(*(w.format(uri=uri, wrong=uri + "&regionn=x") for w in arguments.split()))
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert sentence in line
    assert [path for path in tmp_path.iterdir() if path.name != "runs"] == []


def test_nothing_trains_where_the_bucket_is_not_there(
    command: Command, s3: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssm_metarl.distributed.train._train", lambda *_: pytest.fail("trained"))
    uri = s3.uri("runs").replace("bucket/", "nobucket/")
    code, _, err = command("train", *IN_PROCESS, "--storage", uri)
    assert code == 2
    assert err.rstrip().endswith("cannot be written: The specified bucket does not exist.")


def test_an_incomplete_copy_is_in_the_exit_code_and_in_the_summary(
    command: Command, tmp_path: Path, s3: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssm_metarl.cli.train.WAIT", 0.5)
    with proxy(s3) as way:

        def lost(*_: Any, **__: Any) -> None:
            way.fault = "stall"

        monkeypatch.setattr("ssm_metarl.cli.train.write_record", lost)  # with the first iteration
        storage = s3.uri("incomplete", way.port)
        code, out, err = command(
            "train", *IN_PROCESS, "--iterations=2", "--storage", storage, "--run-dir=run", "--json"
        )
    assert code == 1
    summary = only_object(out)
    assert summary["copy"]["complete"] is False
    assert summary["copy"]["behind_since"]
    assert summary["evaluation"], "the run itself is whole"
    assert "is incomplete: it is behind since" in err


def test_resuming_remembers_refuses_and_says(command: Command, tmp_path: Path) -> None:
    run = ("--run-dir", tmp_path / "run")
    assert command("train", *OPTIONS, "--num-workers=0", "--eval-tasks=3", "--iterations=2", *run)[0] == 0
    code, out, err = command("train", "--resume", *run, "--json")
    assert code == 0, err
    assert "Nothing is left to train: the run has its 2 iterations; --iterations N asks for more." in err
    assert only_object(out)["evaluation"]["num_tasks"] == 3
    code, _, err = command("train", "--resume", *run, "--task=cartpole")
    assert code == 2
    assert f"The run in {tmp_path / 'run'} is of the task navigation-2d, which --resume does not change" in err
    code, _, err = command("train", "--resume-from=checkpoint_000000", *run)
    assert (code, err) == (2, "error: --resume-from names the checkpoint that --resume goes on from.\n")


def test_a_damaged_checkpoint_is_said_and_the_one_before_is_gone_on_from_when_asked(
    command: Command, tmp_path: Path
) -> None:
    run, options = tmp_path / "run", ("--run-dir", tmp_path / "run", "--eval-tasks=1")
    every = ("--checkpoint-every=1", "--num-workers=0")
    assert command("train", *OPTIONS, *every, "--iterations=3", *options)[0] == 0
    whole = [path.name for path in checkpoints(run)]
    weights = load_checkpoint(run / "checkpoint_000003").policy
    damaged = run / "checkpoint_000003" / "policy.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    code, _, err = command("train", "--resume", *options)
    assert code == 2
    assert str(damaged) in err
    assert "The one before is whole: resume with --resume-from checkpoint_000002." in err
    assert [path.name for path in checkpoints(run)] == whole, "nothing changed"
    code, _, err = command("train", "--resume", "--resume-from=checkpoint_00000x", *options)
    assert code == 2
    assert "has no checkpoint 'checkpoint_00000x'; it has " in err
    code, _, err = command("train", "--resume", "--resume-from=checkpoint_000002", *options)
    assert code == 0, err
    again = load_checkpoint(run / "checkpoint_000003").policy
    assert all((again[name] == value).all() for name, value in weights.items())
    assert (run / ".checkpoint_000003.aside").is_dir()


def test_default_names_of_one_second_differ() -> None:
    assert len({run_name("a", "train") for _ in range(20)}) > 15


def test_a_job_hands_a_uri_on_as_it_is() -> None:
    words, run_dir = prepared(["train", "--from", "s3://bucket/a b", "--storage", "s3://bucket/runs?x=1"], "runs")
    assert "s3://bucket/a b" in words
    assert run_dir is not None
    assert run_dir.startswith("s3://bucket/runs/navigation-2d-train-")
    assert run_dir.endswith("?x=1")


# --- Processes --------------------------------------------------------------------------------------------


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    words = [sys.executable, str(RUN_LOCAL), *map(str, arguments)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def until_line(process: subprocess.Popen[str], beginning: str) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(beginning):
            return
    raise AssertionError(f"ended before {beginning!r}")


@pytest.mark.slow
def test_two_processes_in_one_folder(tmp_path: Path) -> None:
    run = ("--run-dir", tmp_path / "run")
    first = start("train", *OPTIONS, "--num-workers=0", "--iterations=100000", *run)
    try:
        until_line(first, "iteration 2/")
        second = start("train", "--resume", *run)
        _, err = second.communicate(timeout=60)
        assert second.returncode == 2
        assert f"is in use by process {first.pid} on " in err
        first.kill()
        first.wait()
        third = start("train", "--resume", "--iterations=3", "--eval-tasks=1", *run)
        assert third.wait(60) == 0, third.communicate()
    finally:
        first.kill()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["stall", "refuse"])
def test_sigterm_ends_a_run_whose_storage_is_gone_within_the_stated_time(
    tmp_path: Path, s3: ObjectStore, fault: str
) -> None:
    with proxy(s3) as way:
        storage = s3.uri(f"sigterm-{fault}", way.port)
        options = (*OPTIONS, "--num-workers=0", "--iterations=100000", "--checkpoint-every=2")
        process = start("train", *options, "--storage", storage, "--run-dir", tmp_path / "run", "--json")
        try:
            until_line(process, "iteration 3/")
            way.fault = fault  # type: ignore[assignment]
            until_line(process, "iteration 9/")
            begin = time.monotonic()
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 128 + signal.SIGTERM, err
    assert time.monotonic() - begin < run_copy.WAIT_INTERRUPTED + 10
    assert json.loads(out)["copy"]["complete"] is False
    assert "--storage 's3://***@bucket/" in err


@pytest.mark.slow
def test_google_storage_that_is_not_there_keeps_nobody_waiting_and_no_signal() -> None:
    """Arrow would try for 15 minutes, deaf to signals."""
    uri = "gs://anonymous@bucket/runs?scheme=http&endpoint_override=127.0.0.1:1&retry_limit_seconds=600"
    process = start("train", *OPTIONS, "--num-workers=0", "--storage", uri)
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(8)
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == 130
        assert time.monotonic() - begin < 5
    finally:
        process.kill()
    process = start("train", *OPTIONS, "--num-workers=0", "--storage", uri.partition("&retry")[0])
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.count("error: gs://***@bucket/runs/") == 1
