"""Who gets in: every socket of a Ray that is started here is on loopback, and asks an outsider for a token."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

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

CALLS = {
    "gcs_server": "/ray.rpc.InternalKVGcsService/InternalKVKeys",
    "raylet": "/ray.rpc.NodeManagerService/GetSystemConfig",
    "worker": "/ray.rpc.CoreWorkerService/PushTask",
    "driver": "/ray.rpc.CoreWorkerService/PushTask",
    "agent": "/ray.rpc.ReporterService/GetTraceback",
}
"""A request by kind of process, on one of its ports that speak gRPC."""


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
def sockets(driver: psutil.Process) -> dict[str, list[tuple[str, int]]]:
    """Addresses that are listened on, by kind of process."""
    found: dict[str, list[tuple[str, int]]] = {}
    for process in (driver, *driver.children(recursive=True)):
        command = " ".join(process.cmdline())
        kinds = {"ray::DashboardAgent": "agent", "ray::RuntimeEnvAgent": "environments", "ray::": "worker"}
        kinds |= {"dashboard.py": "dashboard", "log_monitor": "log monitor", "monitor.py": "monitor"}
        kind = next((kind for part, kind in kinds.items() if part in command), process.name())
        kind = "driver" if process == driver else kind
        listening = [c.laddr for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        found.setdefault(kind, []).extend((laddr.ip, laddr.port) for laddr in listening)
    return {kind: addresses for kind, addresses in found.items() if addresses}


def status(port: int, path: str, **headers: str) -> int | None:
    """What a port answers to a request of HTTP; None: it does not speak it."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
        return int(opener.open(request, timeout=5).status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, HTTPException):  # the latter for an answer that is not HTTP
        return None


def answer(port: int, method: str) -> grpc.StatusCode:
    """What a port answers to a request of gRPC without a token."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            channel.unary_unary(method)(b"", timeout=10)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


def test_every_socket_is_on_loopback(sockets: dict[str, list[tuple[str, int]]]) -> None:
    assert {"driver", "gcs_server", "raylet", "worker", "agent", "dashboard"} <= set(sockets)
    for kind, addresses in sockets.items():
        assert {ip.removeprefix("::ffff:") for ip, _ in addresses} == {"127.0.0.1"}, (kind, addresses)


@pytest.mark.parametrize("kind", CALLS)
def test_an_outsider_is_refused(kind: str, sockets: dict[str, list[tuple[str, int]]]) -> None:
    """Nowhere is a call without the token answered, and where the method lives the answer is that it is missing."""
    spoken = [port for _, port in sockets[kind] if status(port, "/") is None]
    answers = [answer(port, CALLS[kind]) for port in spoken]
    assert grpc.StatusCode.UNAUTHENTICATED in answers, answers
    assert set(answers) <= {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED}


def test_what_speaks_http_asks_for_the_token_or_tells_figures_alone(
    sockets: dict[str, list[tuple[str, int]]], home: Path
) -> None:
    """The dashboard's empty page and the metrics are open on loopback; whatever starts or shows work is not."""
    token = (home / ".ray" / "auth_token").read_text()
    guarded = 0
    for port in [port for addresses in sockets.values() for _, port in addresses]:
        if status(port, "/") is None:
            continue
        if status(port, "/api/version") == 200:  # metrics, whatever is asked for
            body = urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
                f"http://127.0.0.1:{port}/api/jobs/"
            )
            assert body.read().lstrip()[:1] in (b"#", b""), port
            continue
        for path in ("/api/version", "/api/jobs/", "/logs/"):
            assert status(port, path) == 401, (port, path)
            assert status(port, path, Authorization="Bearer guessed") == 403, (port, path)
            assert status(port, path, Authorization=f"Bearer {token}") not in (401, 403), (port, path)
        guarded += 1
    assert guarded >= 2  # the dashboard and the agent


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
