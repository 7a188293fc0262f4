"""The command job without a cluster: what is sent, and what is refused."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from evolved import fresh_run, race
from ssm_metarl.cli import job as job_cli
from ssm_metarl.cli.main import main
from ssm_metarl.distributed import jobs
from ssm_metarl.storage.run_record import write_record
from ssm_metarl.tuning.store import read_state

pytestmark = pytest.mark.usefixtures("no_cluster")


def test_paths_of_a_command_are_made_absolute(tmp_path: Path) -> None:
    here = tmp_path / "work"
    for name in ("old", "bandit"):
        (here / name).mkdir()
    command, run_dir = job_cli.prepared(["evolve", "--from", "old", "--storage=shared", "--seed", "1"], "runs")
    assert command[:5] == ["evolve", "--from", str(here / "old"), "--storage", str(here / "shared")]
    assert command[-4:-2] == ["--seed", "1"]
    assert run_dir is not None
    assert run_dir.startswith(str(here / "shared" / "navigation-2d-evolve-"))
    assert command[-2:] == ["--run-dir", run_dir]
    assert job_cli.prepared(["train", "--run_dir", "x", "--task", "bandit"], "runs") == (
        ["train", "--run-dir", str(here / "x"), "--task", "bandit"],
        str(here / "x"),
    )
    assert job_cli.prepared(["evaluate", "old"], "runs") == (["evaluate", str(here / "old")], None)
    shipped = ["evaluate", "pretrained:cartpole", "--num-tasks", "3"]
    assert job_cli.prepared(shipped, "runs") == (shipped, None)
    command, run_dir = job_cli.prepared(["train"], "s3://bucket/runs")
    assert run_dir is not None
    assert run_dir.startswith("s3://bucket/runs/navigation-2d-train-")


def test_without_a_command_the_best_there_is_goes_on(tmp_path: Path) -> None:
    """The newest self-improving run, or the newest trained one, or initial weights."""
    runs = tmp_path / "work" / "runs"
    assert job_cli.prepared([], "runs")[0][:3] == ["evolve", "--cycles", "0"]
    fresh_run(runs / "evolved")
    for age, name, file in ((3, "evolved", "notes"), (2, "trained", "best.json"), (1, "other", "notes")):
        path = runs / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"checkpoint": "checkpoint_000001", "return": 1.0}))
        os.utime(runs / name, (10**9 - age, 10**9 - age))
    (runs / "trained" / "checkpoint_000001").mkdir()
    (runs / "trained" / "checkpoint_000001" / "manifest.json").write_text("{}")
    os.utime(runs / "trained", (10**9, 10**9))
    best = str(runs / "trained" / "checkpoint_000001")
    assert job_cli.prepared([], "runs")[0][:5] == ["evolve", "--from", best, "--cycles", "0"]
    os.utime(runs / "evolved", (10**9 + 1, 10**9 + 1))
    command, run_dir = job_cli.prepared([], "runs")
    endless = ["--budget", "0.0", "--cycles", "0"]
    assert command == ["evolve", "--run-dir", str(runs / "evolved"), "--resume", *endless]
    assert run_dir == str(runs / "evolved")
    (runs / "evolved" / "rsi" / "state.json").write_text('{"format": 1}')
    os.utime(runs / "evolved", (10**9 + 1, 10**9 + 1))
    assert job_cli.prepared([], "runs")[0][:3] == ["evolve", "--from", best], "a run of another version is passed by"


@pytest.mark.parametrize(
    ("arguments", "sentence", "code"),
    [
        (["start", "--", "train", "--task", "navigatoin-2d"], "did you mean 'navigation-2d'?", 2),
        (["start", "--", "train", "--hidden-dim", "0"], "hidden_dim must be", 2),
        (["start", "--", "evolve", "--proposals", "0"], "proposals must be", 2),
        (["start", "--", "plot", "runs"], "A job can train, evolve or evaluate, not 'plot'.", 2),
        (["status"], "No cluster is known", 1),
        (["logs", "--follow"], "No cluster is known", 1),
        (["stop"], "No cluster is known", 1),
        (["list", "--json"], "No cluster is known", 1),
        (["shutdown"], "No head of this machine is running.", 1),
        (["list", "--address", "http://127.0.0.1:9"], "No Ray job server answers at http://127.0.0.1:9", 1),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
    code: int,
) -> None:
    monkeypatch.setattr(jobs, "start_head", lambda: pytest.fail("a head would have been started"))
    assert main(["job", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err.replace("\n", " ")
    assert "Traceback" not in err


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_the_status_of_a_run_is_read_where_the_run_is(tmp_path: Path, prefix: str) -> None:
    place = f"{prefix}{tmp_path}/run"
    assert job_cli._progress(place) == (None, [], None)
    (tmp_path / "run" / "rsi").mkdir(parents=True)
    line = {"env_steps": 10, "return_by_step": [1.0], "seconds": {"total": 1.0}}
    lines = [json.dumps({**line, "iteration": number}) + "\n" for number in (1, 2)]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(lines))
    assert job_cli._progress(place) == (None, [], {**line, "iteration": 2, "of": 2, "eta_s": 0.0})
    write_record(tmp_path / "run", iterations=10)
    assert job_cli._progress(place)[2] == {**line, "iteration": 2, "of": 10, "eta_s": 8.0}
    view = dict.fromkeys(("job", "command", "run_dir", "started", "ended", "message")) | {"status": "RUNNING"}
    text = io.StringIO()
    job_cli._status({**view, "run_dir": place}, as_json=False, console=Console(file=text, width=80))
    assert "iteration 2 of 10: return 1.00 → 1.00, ETA 0:00:08" in text.getvalue()
    population = fresh_run(tmp_path / "run")
    population.store.commit({**read_state(tmp_path / "run"), "events_before": 0}, [race(1, won=True)])
    assert job_cli._progress(place) == (read_state(tmp_path / "run"), [race(1, won=True)], None)
    assert job_cli._progress("nowhere://bucket/run") == (None, [], None)


def test_the_commands_of_job_load_what_takes_seconds_only_where_they_need_it() -> None:
    """A shutdown is to end within seconds, and so is the program's help."""
    program = (
        "import sys, ssm_metarl.cli.main, ssm_metarl.cli.job; print(*sorted(set(sys.argv[1:]) & set(sys.modules)))"
    )
    heavy = ["torch", "ray.tune", "matplotlib", "pandas", "tensorboardX", "gradio"]
    found = subprocess.run([sys.executable, "-c", program, *heavy], capture_output=True, text=True, check=True)
    assert found.stdout == "\n"
    program = program.replace(", ssm_metarl.cli.job", "")
    found = subprocess.run([sys.executable, "-c", program, "ray", *heavy], capture_output=True, text=True, check=True)
    assert found.stdout == "\n"


@pytest.mark.parametrize("width", [80, 60])
def test_a_job_is_a_line(width: int) -> None:
    long = {"job": "raysubmit_AbCdEfGhIjKlMnOp", "status": "SUCCEEDED", "started": "2026-11-30 11:22:33"}
    short = {"job": "raysubmit_0123456789abcdef", "status": "RUNNING", "started": None, "command": "evolve"}
    text = io.StringIO()
    views = [{**long, "command": "train --task navigation-2d --run-dir " + "a" * 99}, short]
    job_cli._list(views, as_json=False, console=Console(file=text, width=width))
    _, _, first, second, *_ = (line for line in text.getvalue().splitlines() if line.strip())
    assert first.split()[:5] == ["raysubmit_AbCdEfGhIjKlMnOp", "SUCCEEDED", "11-30", "11:22", "train"]
    assert first.rstrip().endswith("…")
    assert len(first) <= width
    assert second.split() == ["raysubmit_0123456789abcdef", "RUNNING", "evolve"]
