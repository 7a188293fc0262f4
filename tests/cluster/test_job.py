"""Background jobs on a head that the command line starts: names, metrics, logs, a stop with a checkpoint, a resume."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from listening import assert_guarded, assert_on_loopback, assert_refused, listening, users_token
from ssm_metarl.cli.main import main
from ssm_metarl.distributed import jobs
from ssm_metarl.storage.checkpoint import load_checkpoint
from ssm_metarl.storage.run_folder import checkpoints
from ssm_metarl.tuning.config import EvolveConfig

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

SMALL = ["--meta-batch", "4", "--episodes", "2", "--hidden-dim", "8", "--state-dim", "4", "--epochs", "1"]
TRAIN = ["train", *SMALL, "--iterations", "100000", "--num-workers", "1"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty folder from which the commands are given, with a head's record of its own; no head is left behind."""
    folder = tmp_path_factory.mktemp("job")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(folder / "state"))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
            patch.delenv(name, raising=False)
        yield folder
        if head := jobs.recorded_head():
            jobs.end_head(head)


def job(home: Path, *arguments: str) -> str:
    """Standard output of one command, in this process: a new one takes seconds to import all that it needs."""
    with contextlib.chdir(home), contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["job", *arguments]) == 0
    return out.getvalue()


def status(home: Path, *arguments: str) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(job(home, "status", "--json", *arguments))
    return answer


def wait_for(condition: Callable[[], Any], seconds: float = 120.0) -> Any:
    end = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(1.0)
    return answer


@pytest.fixture(scope="module")
def started(home: Path) -> dict[str, Any]:
    """A job that trains without end, some iterations after its start; the command that starts it is a process.

    Its shell has proxies that are dead, and Ray's tokens switched off.
    """
    command = [sys.executable, "-m", "ssm_metarl", "job", "start", "--json", "--", *TRAIN]
    odd = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    shell = {name: value for name, value in os.environ.items() if name.lower() != "no_proxy"} | odd
    result = subprocess.run(
        command, cwd=home, env=shell | {"RAY_AUTH_MODE": "disabled"}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert "it asks for the token that `ray get-auth-token` prints" in result.stderr
    answer: dict[str, Any] = json.loads(result.stdout)
    wait_for(lambda: (status(home)["metrics"] or {"iteration": 0})["iteration"] > 11)
    return answer


def test_a_job_outlives_the_command_that_started_it(home: Path, started: dict[str, Any]) -> None:
    view = status(home, started["job"])
    assert (view["status"], view["job"], view["run_dir"]) == ("RUNNING", started["job"], started["run_dir"])
    assert Path(started["run_dir"]).parent == home / "runs"
    assert [each["job"] for each in json.loads(job(home, "list", "--json"))] == [started["job"]]
    assert "iteration 1/100000" in job(home, "logs")


def test_nobody_gets_in_at_a_head_or_its_job(started: dict[str, Any]) -> None:
    """Every socket is on loopback, and an outsider without the token is refused even there."""
    head = jobs.recorded_head()
    assert head is not None
    first = psutil.Process(head.pid)
    sockets = listening((first, *first.children(recursive=True)))
    rpc = {"gcs_server", "raylet", "agent", "client server", "supervisor", "driver", "worker"}
    assert {*rpc, "dashboard"} <= set(sockets)
    assert_on_loopback(sockets)
    for kind in rpc:
        assert_refused(sockets, kind)
    assert_guarded(sockets, users_token(), {"dashboard", "agent"})


def test_actors_and_calls_have_telling_names(home: Path, started: dict[str, Any]) -> None:
    head = jobs.recorded_head()
    assert head is not None
    names = [actor["name"] or "" for actor in _state(head, "actors") if actor["state"] == "ALIVE"]
    assert any(name.startswith("ssm-metarl/") and name.endswith("/rollout-worker-0") for name in names), names
    calls = wait_for(lambda: {task["name"] for task in _state(head, "tasks")} & {"collect support, 4 tasks"})
    assert calls


def _state(head: jobs.Head, what: str) -> list[dict[str, Any]]:
    """What Ray's State API lists, asked for as the dashboard's page does."""
    answer = jobs.connect(head.dashboard)._do_request("GET", f"/api/v0/{what}?limit=1000&detail=1")
    listed: list[dict[str, Any]] = answer.json()["data"]["result"]["result"]
    return listed


def test_the_metrics_port_has_our_metrics(home: Path, started: dict[str, Any]) -> None:
    """They appear some seconds late."""
    head = jobs.recorded_head()
    assert head is not None
    nodes = jobs.connect(head.dashboard)._do_request("GET", "/nodes?view=summary").json()["data"]["summary"]
    address = f"http://{nodes[0]['ip']}:{nodes[0]['raylet']['metricsExportPort']}/metrics"

    def ours() -> set[str]:
        with urllib.request.urlopen(address, timeout=10) as page:
            lines = page.read().decode().splitlines()
        found = {line.partition("{")[0] for line in lines if line.startswith("ray_ssm_metarl_")}
        wanted = {"iterations_total", "env_steps_total", "return", "phase_seconds"}
        return found if found >= {f"ray_ssm_metarl_{name}" for name in wanted} else set()

    assert wait_for(ours)


def test_a_stop_writes_a_checkpoint_and_a_resume_goes_on(home: Path, started: dict[str, Any]) -> None:
    run = Path(started["run_dir"])
    follower = subprocess.Popen(
        [sys.executable, "-m", "ssm_metarl", "job", "logs", "--follow"], cwd=home, stdout=subprocess.PIPE, text=True
    )
    job(home, "stop")
    logged, _ = follower.communicate(timeout=60)
    assert "Interrupted; resume with" in logged, "followed to the end"
    assert status(home)["status"] == "STOPPED"
    done = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["iteration"]
    last = load_checkpoint(checkpoints(run)[-1])
    assert last.progress["iteration"] == done
    again = json.loads(job(home, "start", "--json", "--", "train", "--resume", "--run-dir", str(run)))
    assert again["run_dir"] == str(run)
    wait_for(lambda: (status(home)["metrics"] or {"iteration": 0})["iteration"] > done + 1)
    job(home, "stop", again["job"])


def test_without_a_command_self_improvement_goes_on_from_the_best(home: Path, started: dict[str, Any]) -> None:
    answer = json.loads(job(home, "start", "--json"))
    assert answer["command"][:2] == ["evolve", "--from"]
    assert answer["command"][-4:-2] == ["--cycles", "0"]
    view = wait_for(lambda: (view := status(home))["state"] and view["state"]["progress"]["cycle"] >= 1 and view, 240)
    assert view["status"] == "RUNNING"
    assert len(view["state"]["live"]["members"]) == 1 + EvolveConfig.proposals
    job(home, "stop")
    run = Path(answer["run_dir"])
    assert load_checkpoint(checkpoints(run)[-1]).progress["env_steps"] > 0


def test_a_cluster_that_lacks_the_package_gets_it_from_an_empty_folder(home: Path, tmp_path: Path) -> None:
    """`ray job submit`, as for any cluster: logs followed, stopped with a checkpoint, resumed."""
    python = other_python(tmp_path / "venv")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", str(python))
        patch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
        head = jobs.start_head()
    try:
        environment = {"py_modules": [str(jobs.PACKAGE)], "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "120"}}
        empty, run = tmp_path / "empty", tmp_path / "runs" / "run"
        empty.mkdir()
        ray = [str(Path(sys.executable).with_name("ray")), "job"]
        where = ["--address", head.dashboard]
        told = {**os.environ, "RAY_AUTH_MODE": "token"}
        submit = [*ray, "submit", *where, "--runtime-env-json", json.dumps(environment)]
        for attempt, words in enumerate(([*TRAIN, "--run-dir", run], ["train", "--resume", "--run-dir", run])):
            name = f"attempt-{attempt}"
            job_command = [*submit, "--submission-id", name, "--", str(python), "-m", "ssm_metarl", *map(str, words)]
            with (tmp_path / f"{name}.log").open("w") as log:
                following = subprocess.Popen(job_command, cwd=empty, env=told, stdout=log, stderr=log)
                done = _iteration(run) if attempt else 0
                wait_for(lambda: _iteration(run) > done + 2)  # noqa: B023
                stop = [*ray, "stop", *where, name]
                assert subprocess.run(stop, cwd=empty, env=told, capture_output=True, timeout=120).returncode == 0
                assert following.wait(60) == 0
            text = (tmp_path / f"{name}.log").read_text()
            assert f"iteration {done + 1}/100000" in text
            assert "was stopped" in text
            assert load_checkpoint(checkpoints(run)[-1]).progress["iteration"] == _iteration(run)
    finally:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
            jobs.end_head(head)


def other_python(folder: Path) -> Path:
    """An interpreter with all that this one has installed, but for this package."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    own, theirs = (
        subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        for python in (sys.executable, folder / "bin" / "python")
    )
    # A folder that is named in a .pth file is searched, but the .pth files in it are not read: no editable install.
    (Path(theirs) / "packages.pth").write_text(own + "\n")
    program = "import ray, torch, importlib.util; print(importlib.util.find_spec('ssm_metarl'))"
    python = folder / "bin" / "python"
    found = subprocess.run([python, "-c", program], cwd=folder, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "None"
    return python


def _iteration(run: Path) -> int:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return int(json.loads(lines[-1])["iteration"]) if lines else 0


def test_a_shutdown_ends_the_heads_processes_and_no_others(home: Path, started: dict[str, Any]) -> None:
    """Within seconds, where no job has to end before."""
    for each in json.loads(job(home, "list", "--json")):
        if each["status"] == "RUNNING":
            job(home, "stop", each["job"])
    head = jobs.recorded_head()
    assert head is not None
    family = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
    assert {"gcs_server", "raylet"} <= {process.name() for process in family}
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)", "gcs_server raylet ray start"])
    begin = time.monotonic()
    command = [sys.executable, "-m", "ssm_metarl", "job", "shutdown"]
    subprocess.run(command, cwd=home, check=True, timeout=60)
    assert time.monotonic() - begin < 5.0
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()
    assert not [process for process in family if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert jobs.recorded_head() is None
