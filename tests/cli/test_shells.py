"""Odd shells: dead proxies, a notebook, a terminal that is gone, Ctrl-C at once, the record of a dead head."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import ray

from builders import PNG, logged
from command_line import IN_PROCESS, Command
from ssm_metarl.storage.checkpoint import load_checkpoint
from ssm_metarl.storage.run_folder import checkpoints

DEAD_END = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
"""Proxies at a port where nothing listens."""

TRAIN = ["train", "--iterations", "100000", *IN_PROCESS, "--checkpoint-every", "100000", "--run-dir", "run"]
"""A run that ends when it is told to, and only then writes a checkpoint that has trained."""


def start(folder: Path, *words: str, **how: Any) -> subprocess.Popen[str]:
    """A command in a process of its own, that hears Ctrl-C also where the tests run in the background."""
    environment = {name: value for name, value in os.environ.items() if name not in ("no_proxy", "NO_PROXY")}
    return subprocess.Popen(
        [sys.executable, "-m", "ssm_metarl", *words],
        cwd=folder,
        env=environment | how.pop("env", {}),
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how},
    )


# --- Proxies ----------------------------------------------------------------------------------------------


class _JobServer(BaseHTTPRequestHandler):
    """Answers as Ray's does where no job was ever started."""

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.end_headers()

    def do_GET(self) -> None:
        versions = {"version": "4", "ray_version": ray.__version__, "ray_commit": "", "session_name": ""}
        body = json.dumps(versions if self.path == "/api/version" else []).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def job_server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _JobServer) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("excepted", [None, "example.org"])
def test_a_job_server_of_this_machine_is_not_asked_for_through_a_proxy(
    command: Command, job_server: str, monkeypatch: pytest.MonkeyPatch, excepted: str | None
) -> None:
    for name, value in DEAD_END.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")  # of another cluster than is named
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, excepted or "")  # so that it is put back, whatever the command makes of it
        if excepted is None:
            monkeypatch.delenv(name)
    assert command("job", "list", "--json", "--address", job_server)[:2] == (0, "[]\n")
    assert os.environ["no_proxy"].startswith("example.org," if excepted else "localhost,")


@pytest.mark.slow
def test_the_page_opens_where_a_proxy_is_dead(tmp_path: Path) -> None:
    """Gradio asks the page whether it is there before it goes on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    page = start(tmp_path, "app", "--port", port, "--storage", "runs", env=DEAD_END)
    assert page.stderr
    try:
        line = page.stderr.readline()
        assert line.startswith(f"The page is at http://127.0.0.1:{port} "), line + page.stderr.read()
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        assert opener.open(f"http://127.0.0.1:{port}/", timeout=10).status == 200
    finally:
        page.send_signal(signal.SIGINT)
        _, error = page.communicate(timeout=60)
    assert "Traceback" not in error


# --- A notebook's terminal --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "no such backend"])
def test_pictures_are_drawn_whatever_backend_the_shell_names(tmp_path: Path, trained: Path, backend: str) -> None:
    assert start(tmp_path, "--help", env={"MPLBACKEND": backend}).wait(60) == 0
    plot = start(tmp_path, "plot", str(trained), env={"MPLBACKEND": backend})
    out, error = plot.communicate(timeout=60)
    assert (plot.returncode, error) == (0, "")
    assert all(Path(line).read_bytes().startswith(PNG) for line in out.splitlines())
    assert len(out.splitlines()) >= 1


# --- Terminals that are gone ------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_whose_terminal_is_gone_checkpoints_and_ends(tmp_path: Path) -> None:
    """`train 2>&1 | head -1`, and that head has read enough."""
    run = start(tmp_path, *TRAIN, stderr=subprocess.STDOUT)
    assert run.stdout
    try:
        assert run.stdout.readline() == "Run folder: run\n"
        run.stdout.close()
        assert run.wait(60) == 128 + signal.SIGPIPE
    finally:
        run.kill()
    iteration = load_checkpoint(checkpoints(tmp_path / "run")[-1]).progress["iteration"]
    assert iteration == logged(tmp_path / "run")[-1]["iteration"] >= 1


# --- Ctrl-C -----------------------------------------------------------------------------------------------

INTERRUPT = """
import os, signal, sys

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["INTERRUPTED_AT"]:
            exec("os.kill(os.getpid(), signal.SIGINT)")  # an exception that leaves this would end Python by the signal

sys.meta_path.insert(0, Interrupt())
"""


@pytest.mark.parametrize("module", ["ssm_metarl.cli.main", "ray", "torch"])
def test_ctrl_c_while_the_program_is_loaded_is_quiet(tmp_path: Path, module: str) -> None:
    """In the midst of an import."""
    (tmp_path / "sitecustomize.py").write_text(INTERRUPT)
    process = start(tmp_path, *TRAIN[:2], "1", env={"PYTHONPATH": str(tmp_path), "INTERRUPTED_AT": module})
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 128 + signal.SIGINT
    assert not (tmp_path / "runs").exists()


STARTING = """
import atexit, signal, sys

atexit.register(print, "at exit", file=sys.stderr)
signal.raise_signal(signal.SIGINT)
"""


def test_ctrl_c_while_a_run_starts_waits_for_nothing(tmp_path: Path) -> None:
    """Not for what libraries do at an exit either: a Ray that was being started may crash there."""
    (tmp_path / "starting.py").write_text(STARTING)
    process = start(tmp_path, "train", "--task", "starting:Env")
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 128 + signal.SIGINT


# --- Dead heads -------------------------------------------------------------------------------------------


@pytest.fixture
def dead_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a head that has ended, which Ray's record of this machine still has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    (tmp_path / "tmp" / "ray").mkdir(parents=True)
    (tmp_path / "tmp" / "ray" / "ray_current_cluster").write_text(address)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "tmp"))
    return address


@pytest.mark.parametrize("given", ["option", "environment"])
def test_a_record_of_a_head_that_has_ended_is_one_sentence(
    command: Command, dead_head: str, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setattr("ssm_metarl.distributed.cluster.ANSWER_SECONDS", 1.0)
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # by a test before
    monkeypatch.setenv("RAY_ADDRESS", "auto" if given == "environment" else "")
    address = ["--address", "auto"] if given == "option" else []
    found = f"{dead_head}, where Ray's record of this machine has one,"
    for words, code in ((["train", "--iterations", "1"], 2), (["job", "list"], 1)):
        outcome = command(*words, *address)
        assert (outcome.code, outcome.err.count("\n")) == (code, 1)
        assert outcome.err.startswith(f"error: No Ray cluster answers at {found} within 1 s")


@pytest.mark.slow
def test_the_sentence_comes_within_half_a_minute(tmp_path: Path, dead_head: str) -> None:
    """Also where Ray was never loaded before, and with no line of its own."""
    begin = time.monotonic()
    process = start(tmp_path, "train", "--num-workers", "1", "--address", "auto")
    try:
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert time.monotonic() - begin < 30.0
    assert (process.returncode, error.count("\n")) == (2, 2)
    assert re.match(f"Run folder: runs/.*\nerror: No Ray cluster answers at {dead_head}, .* within 10 s", error)
