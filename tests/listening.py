"""What processes of Ray listen on, by name, and what an outsider without the token is answered there."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from collections.abc import Iterable
from http.client import HTTPException, HTTPResponse
from pathlib import Path

import grpc
import psutil

Sockets = dict[str, list[tuple[str, int]]]
"""Addresses that are listened on, by kind of process."""

KINDS = {
    "ray::DashboardAgent": "agent",
    "ray::RuntimeEnvAgent": "environments",
    "ray::JobSupervisor": "supervisor",
    "ray::": "worker",
    "dashboard.py": "dashboard",
    "log_monitor": "log monitor",
    "monitor.py": "monitor",
    "ray.util.client.server": "client server",
    "ssm_metarl": "driver",
}
"""Kinds of processes by a part of their command line, the first that fits; others have their program's name."""

CALLS = {
    "gcs_server": "/ray.rpc.InternalKVGcsService/InternalKVKeys",
    "raylet": "/ray.rpc.NodeManagerService/GetSystemConfig",
    "worker": "/ray.rpc.CoreWorkerService/PushTask",
    "supervisor": "/ray.rpc.CoreWorkerService/PushTask",
    "driver": "/ray.rpc.CoreWorkerService/PushTask",
    "agent": "/ray.rpc.ReporterService/GetTraceback",
    "client server": "/ray.rpc.RayletDriver/ListNamedActors",
}
"""A request by kind of process, on one of its ports that speak gRPC."""


def listening(processes: Iterable[psutil.Process], **known: psutil.Process) -> Sockets:
    """What processes listen on; `known` ones by their kind."""
    found: Sockets = {}
    for process in processes:
        try:
            command, name = " ".join(process.cmdline()), process.name()
            addresses = [c.laddr for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        except psutil.NoSuchProcess:  # it has ended meanwhile
            continue
        kind = next((kind for kind, each in known.items() if each == process), None)
        kind = kind or next((kind for part, kind in KINDS.items() if part in command), name)
        if addresses:
            found.setdefault(kind, []).extend((address.ip, address.port) for address in addresses)
    return found


def users_token(home: Path | None = None) -> str:
    """The token that Ray's processes ask each other for: of this user, or of one with another home."""
    if home is None and (token := os.environ.get("RAY_AUTH_TOKEN")):
        return token
    return ((home or Path.home()) / ".ray" / "auth_token").read_text().strip()


def status(port: int, path: str, **headers: str) -> int | None:
    """What a port answers to a request of HTTP; None: it does not speak it."""
    try:
        with _open(port, path, **headers) as answered:
            return int(answered.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, HTTPException):  # the latter for an answer that is not HTTP
        return None


def _open(port: int, path: str, **headers: str) -> HTTPResponse:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
    answered: HTTPResponse = opener.open(request, timeout=20)
    return answered


def grpc_answers(sockets: Sockets, kind: str) -> set[grpc.StatusCode]:
    """What the ports of a kind of process answer to its request of gRPC without a token."""

    def ask(port: int) -> grpc.StatusCode:
        with grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
            try:
                channel.unary_unary(CALLS[kind])(b"", timeout=10)
            except grpc.RpcError as error:
                code: grpc.StatusCode = error.code()
                return code
        return grpc.StatusCode.OK

    return {ask(port) for _, port in sockets[kind] if status(port, "/") is None}


def assert_on_loopback(sockets: Sockets) -> None:
    for kind, addresses in sockets.items():
        assert {ip.removeprefix("::ffff:") for ip, _ in addresses} == {"127.0.0.1"}, (kind, addresses)


def assert_refused(sockets: Sockets, kind: str) -> None:
    """Nowhere is a call without the token answered, and where the method lives the answer is that it is missing."""
    answers = grpc_answers(sockets, kind)
    assert grpc.StatusCode.UNAUTHENTICATED in answers, (kind, answers)
    assert answers <= {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED}, (kind, answers)


def assert_guarded(sockets: Sockets, token: str, kinds: set[str]) -> None:
    """What speaks HTTP asks for the token, or tells figures alone.

    The dashboard's empty page and the metrics are open on loopback; whatever starts or shows work is not.

    Args:
        sockets: of the processes.
        token: of their user.
        kinds: of processes that must have asked for it.
    """
    guarded = set()
    for kind, port in [(kind, port) for kind, addresses in sockets.items() for _, port in addresses]:
        if status(port, "/") is None:
            continue
        if status(port, "/api/version") == 200:  # metrics, whatever is asked for
            with _open(port, "/api/jobs/") as answered:
                assert answered.read().lstrip()[:1] in (b"#", b""), (kind, port)
            continue
        for path in ("/api/version", "/api/jobs/", "/logs/"):
            assert status(port, path) == 401, (kind, port, path)
            assert status(port, path, Authorization="Bearer guessed") == 403, (kind, port, path)
            assert status(port, path, Authorization=f"Bearer {token}") not in (401, 403), (kind, port, path)
        guarded.add(kind)
    assert guarded >= kinds, guarded
