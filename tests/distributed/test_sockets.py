"""Who gets in: every socket of a Ray that is started here is on loopback, and asks an outsider for a token."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from listening import Sockets, assert_guarded, assert_on_loopback, assert_refused, listening, users_token
from ssm_metarl.distributed import cluster

PROGRAM = """
import ray, sys
from ssm_metarl.distributed.cluster import start_ray
start_ray(1)
@ray.remote
class Worker:
    def ready(self): return True
worker = Worker.remote()
assert ray.get(worker.ready.remote())
print("up", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def driver(home: Path) -> Iterator[psutil.Process]:
    """A process that started Ray as `train` does, in a home without a token, where RAY_AUTH_MODE said otherwise."""
    unset = ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"HOME": str(home), "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdin
    if process.stdout.readline() != "up\n":
        pytest.fail(process.communicate()[1])
    yield psutil.Process(process.pid)
    process.stdin.close()
    process.wait(60)
    assert "ray get-auth-token" in (process.stderr.read() if process.stderr else "")


@pytest.fixture(scope="module")
def sockets(driver: psutil.Process) -> Sockets:
    return listening((driver, *driver.children(recursive=True)), driver=driver)


def test_every_socket_is_on_loopback(sockets: Sockets) -> None:
    assert {"driver", "gcs_server", "raylet", "worker", "agent", "dashboard"} <= set(sockets)
    assert_on_loopback(sockets)


@pytest.mark.parametrize("kind", ["driver", "gcs_server", "raylet", "worker", "agent"])
def test_an_outsider_is_refused(kind: str, sockets: Sockets) -> None:
    assert_refused(sockets, kind)


def test_what_speaks_http_asks_for_the_token_or_tells_figures_alone(sockets: Sockets, home: Path) -> None:
    # The agent's own port for HTTP is a fixed one, which another Ray of this machine may have.
    assert_guarded(sockets, users_token(home), {"dashboard", "environments"})


def test_the_token_is_the_users_own(home: Path, driver: psutil.Process) -> None:
    path = home / ".ray" / "auth_token"
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(path.read_text()) == 64


def test_a_token_that_others_can_read_is_closed_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / ".ray" / "auth_token"
    path.parent.mkdir()
    path.write_text("known")
    path.chmod(0o644)
    cluster.ensure_token()
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("known", 0o600)


def test_a_head_of_this_machine_is_started_on_loopback_and_with_the_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `job start` and the page start; the drill with real jobs is in tests/cluster."""
    from ssm_metarl.distributed import jobs

    started: list[tuple[list[str], dict[str, str]]] = []

    real = subprocess.Popen

    def popen(command: list[str], **how: Any) -> Any:
        started.append((command, how["env"]))
        return real([sys.executable, "-c", "import time; time.sleep(60)"])

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "known")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr(jobs.subprocess, "Popen", popen)
    with pytest.raises(jobs.JobError, match="did not come up"):
        jobs.start_head(timeout_s=2.0)
    ((command, environment),) = started
    assert environment["RAY_AUTH_MODE"] == "token"
    assert cluster.ON_LOOPBACK.items() <= environment.items()
    assert "--node-ip-address=127.0.0.1" in command
    assert "--dashboard-host=127.0.0.1" in command
