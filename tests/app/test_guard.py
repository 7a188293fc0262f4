"""Who may ask the page and with what: no other name, no odd type, no link that leads out, nothing that blocks."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ssm_metarl import pretrained
from ssm_metarl.app import evolution_tab, pretrained_tab, server, training_tab
from ssm_metarl.app.guard import HostCheck, check_types
from ssm_metarl.app.workspace import Workspace


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """One with a model in it, and without a cluster."""
    runs = tmp_path_factory.mktemp("guard") / "runs"
    shutil.copytree(pretrained.folder("cartpole"), runs / "model" / "checkpoint_000001")
    return Workspace(runs)


@pytest.fixture(scope="module")
def served(workspace: Workspace) -> Iterator[tuple[str, Any]]:
    """Address of the page, and the page."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workspace, "jobs", lambda self: [])
        patch.setattr(Workspace, "start", lambda *_: pytest.fail("a job was started"))
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")
        page = server.build(workspace)
        port = server.launch(page, "127.0.0.1", 0)
        yield f"http://127.0.0.1:{port}/", page
        page.close(verbose=False)


def status(address: str, content: bytes | None = None, **headers: str) -> int:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        return int(opener.open(urllib.request.Request(address, content, headers), timeout=10).status)
    except urllib.error.HTTPError as error:
        return error.code


# --- Names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "code"),
    [
        ("localhost", 200),
        ("LOCALHOST:7860", 200),
        ("127.0.0.1", 200),
        ("127.9.9.9:80", 200),
        ("[::1]:7860", 200),
        ("evil.example", 403),
        ("evil.example:7860", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example", 403),
        ("10.0.0.5", 403),
        ("[::1", 403),
        ("", 403),
    ],
)
def test_the_page_is_served_under_this_machines_names_alone(served: tuple[str, Any], host: str, code: int) -> None:
    """A name that somebody lets lead here (DNS rebinding) is not one."""
    address, _ = served
    for path in ("", "config", "gradio_api/info"):
        assert status(address + path, Host=host) == code


def test_a_request_from_another_page_is_refused(served: tuple[str, Any]) -> None:
    address, _ = served
    content = json.dumps({"data": ["model"], "fn_index": 0, "session_hash": "x"}).encode()
    kind = {"Content-Type": "application/json"}
    for origin, code in (("http://evil.example", 403), ("null", 403), (address.rstrip("/"), 200)):
        assert status(f"{address}gradio_api/queue/join", content, Origin=origin, **kind) == code


@pytest.mark.parametrize(
    ("listening", "host", "welcome"),
    [
        ("0.0.0.0", "192.168.1.7:7860", True),
        ("0.0.0.0", "evil.example", False),
        ("0.0.0.0", socket.gethostname(), True),
        ("0.0.0.0", "space.hf.example", True),
        ("127.0.0.1", "space.hf.example", True),
        ("127.0.0.1", "192.168.1.7", False),
        ("box.example", "box.example:7860", True),
    ],
)
def test_where_others_reach_it_addresses_and_given_names_are_welcome(listening: str, host: str, welcome: bool) -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope)

    async def send(message: Any) -> None:
        assert not welcome
        assert message.get("status", 403) == 403

    check = HostCheck(app, listening, ["Space.hf.example"])
    for kind in ("http", "websocket"):
        scope = {"type": kind, "method": "GET", "headers": [(b"host", host.encode())]}
        asyncio.run(check(scope, None, send))  # type: ignore[arg-type]
    assert len(seen) == 2 * welcome
    asyncio.run(check({"type": "lifespan"}, None, send))  # type: ignore[arg-type]
    assert len(seen) == 2 * welcome + 1


# --- Types ------------------------------------------------------------------------------------------------

ODD = [["x"], {"a": 1}, 5, True, None, "\0", "a" * 5000, 10**400, [[[[]]]]]
ODD.append({"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}})


def ask(address: str, number: int, data: list[Any]) -> tuple[bool, str]:
    """What the page answers to a click with these values."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    session = f"s{time.monotonic_ns()}"
    content = json.dumps({"data": data, "fn_index": number, "session_hash": session}).encode()
    headers = {"Content-Type": "application/json"}
    opener.open(urllib.request.Request(f"{address}gradio_api/queue/join", content, headers), timeout=10).read()
    for line in opener.open(f"{address}gradio_api/queue/data?session_hash={session}", timeout=20):
        if b"process_completed" in line:
            found = json.loads(line[5:])
            return bool(found["success"]), str((found["output"] or {}).get("error"))
    raise AssertionError("no answer")


@pytest.mark.slow
@pytest.mark.parametrize("few", [True, False])
def test_odd_values_are_refused_in_a_sentence(
    served: tuple[str, Any], capfd: pytest.CaptureFixture[str], few: bool
) -> None:
    """By every button and list of the page, which meet all of them or one each; the terminal shows no traceback."""
    address, page = served
    for number, fn in page.fns.items():
        if fn.fn is None:  # of the browser alone
            continue
        boxes = len(fn.inputs)
        values = ODD if fn.name not in ("offer", "handle") else ODD[:3]
        for odd in [values[number % len(values)]] if few else values:
            success, sentence = ask(address, number, [odd] * boxes)
            assert success or (sentence and "\n" not in sentence and len(sentence) < 900), (fn.name, odd, sentence)
            assert "nobody foresaw" not in sentence, (fn.name, odd)
        success, sentence = ask(address, number, [])
        assert success is (fn.name in ("defaults",) and not boxes), (fn.name, sentence)
    shown = capfd.readouterr()
    assert "Traceback" not in shown.err + shown.out


def test_types_are_those_of_the_handler() -> None:
    def handler(name: str | None, count: int, share: float, keep: bool, which: list[str], *rest: float | None) -> None:
        """One of every kind."""

    for good in ((None, 3, 1, True, ["a"]), ("a", 3.0, 0.5, False, [], 1.0, None)):
        check_types(handler, good)
    for bad, name in (
        ((5, 3, 1.0, True, []), "name"),
        (("a", 3.5, 1.0, True, []), "count"),
        (("a", True, 1.0, True, []), "count"),
        (("a", 3, float("nan"), True, []), "share"),
        (("a", 3, 1.0, 1, []), "keep"),
        (("a", 3, 1.0, True, [1]), "which"),
        (("a", 3, 1.0, True, [], "x"), "rest"),
    ):
        with pytest.raises(ValueError, match=f"^{name} cannot be "):
            check_types(handler, bad)


# --- Files ------------------------------------------------------------------------------------------------


@pytest.fixture
def run(workspace: Workspace) -> Iterator[Path]:
    """A run in the workspace, whose files a test exchanges."""
    folder = workspace.runs / "run"
    shutil.copytree(workspace.runs / "model", folder)
    yield folder
    shutil.rmtree(folder)


READS = ["checkpoint_000001/card.json", "evaluation.json", "metrics.jsonl", "best.json", "rsi/state.json"]


def readings(workspace: Workspace) -> list[Any]:
    def look(tab: Any) -> Any:
        return lambda: tab.look("run", workspace.folder("run"), None, {})[1]()

    return [
        workspace.models,
        lambda: workspace.list_runs("train", []) + workspace.list_runs("evolve", []),
        lambda: pretrained_tab.describe(workspace, "run"),
        look(training_tab),
        look(evolution_tab),
    ]


@pytest.mark.parametrize("name", READS)
def test_a_pipe_blocks_nothing(name: str, workspace: Workspace, run: Path) -> None:
    path = run / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    refusals, begin = 0, time.monotonic()
    for read in readings(workspace):
        try:
            read()
        except ValueError as error:
            refusals += f"{name.rpartition('/')[2]} is not a regular file." in str(error)
    assert refusals
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("name", READS)
def test_a_link_is_not_followed(name: str, workspace: Workspace, run: Path, tmp_path: Path) -> None:
    path = run / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    (tmp_path / "secret").write_text('{"about": "a secret", "checkpoint": "checkpoint_000001", "return": 1.0}')
    path.symlink_to(tmp_path / "secret")
    refusals = 0
    for read in readings(workspace):
        try:
            assert "a secret" not in str(read())
        except ValueError as error:
            refusals += "is a symbolic link, which is not followed." in str(error)
    assert refusals


@pytest.mark.parametrize("name", ["rsi", "rsi/checkpoints", "checkpoint_000002"])
def test_a_folder_in_a_run_that_lies_elsewhere_is_refused(
    name: str, workspace: Workspace, run: Path, tmp_path: Path
) -> None:
    (run / name).parent.mkdir(exist_ok=True)
    shutil.copytree(run / "checkpoint_000001", tmp_path / "outside")
    (run / name).symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match="is not in the runs folder"):
        workspace.folder("run")
    (run / name).unlink()
    (run / name).symlink_to(run / name)  # a ring
    with pytest.raises(ValueError, match=r"cannot be read|is not in the runs folder") as error:
        workspace.folder("run")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["\0", "x" * 5000, "~root", "run/\n"])
def test_names_that_no_file_has(name: str, workspace: Workspace) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        workspace.checkpoint(name)
    assert "\n" not in str(error.value)
