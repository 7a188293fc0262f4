"""One process in a run's folder: who is in it is named, and who has died or stands still keeps nobody out."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from ssm_metarl.config import TrainConfig
from ssm_metarl.distributed.train import train
from ssm_metarl.storage import lock as locks
from ssm_metarl.storage.lock import Holder, RunInUse, RunLock, hold
from ssm_metarl.tuning.store import RunStore

PROGRAM = """
import sys, time
from pathlib import Path
from ssm_metarl.storage.lock import hold
with hold(Path(sys.argv[1])):
    print("in", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_process(run: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that is in the folder until its stdin ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "in\n"
        yield process
    finally:
        process.kill()
        process.wait()


def foreign(token: str = "1") -> Holder:
    return Holder(token, "elsewhere", "another boot", 4711, 1.0, "2026-01-01 00:00:00")


def test_a_second_process_is_refused_by_name_and_may_when_the_first_is_gone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with another_process(run) as process:
        with pytest.raises(RunInUse, match=rf"is in use by process {process.pid} on .+ since 2.+\.$"), hold(run):
            pass
        process.kill()
        process.wait()
        with hold(run):
            pass


def test_runs_of_both_kinds_are_refused_where_another_process_is(tmp_path: Path) -> None:
    with another_process(tmp_path / "run") as process:
        sentence = f"is in use by process {process.pid} on"
        with pytest.raises(RunInUse, match=sentence):
            RunStore(tmp_path / "run").create()
        with pytest.raises(RunInUse, match=sentence):
            train(TrainConfig.for_task("navigation-2d"), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir() if path.name[0] != "."] == []


def test_a_thread_nests_its_holds_and_another_thread_does_not(tmp_path: Path) -> None:
    refused: list[str] = []
    first, second = ExitStack(), ExitStack()
    first.enter_context(hold(tmp_path / "run"))
    second.enter_context(hold(tmp_path / "run"))
    first.close()
    assert (tmp_path / "run" / ".lease.json").exists(), "the second hold goes on"
    second.close()
    assert not (tmp_path / "run").exists()

    def other() -> None:
        try:
            with hold(tmp_path / "run"):
                pass
        except RunInUse as error:
            refused.append(str(error))

    with hold(tmp_path / "run"):
        with hold(tmp_path / "run"):
            pass
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert refused == [f"{tmp_path / 'run'} is in use by another thread of this process."]
    other()
    assert len(refused) == 1


def test_a_folder_that_was_made_for_nothing_goes_again(tmp_path: Path) -> None:
    with hold(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file cannot be made: File exists\.$"), hold(tmp_path / "file"):
        pass


def test_a_lease_of_another_machine_keeps_others_out_while_it_is_fresh(tmp_path: Path) -> None:
    """Where the file system does not pass locks on."""
    lease = tmp_path / ".lease.json"
    lease.write_bytes(foreign().content())
    sentence = r"in use by process 4711 on elsewhere since 2026-01-01 00:00:00\. If it has died, try again in \d+ s\.$"
    with pytest.raises(RunInUse, match=sentence):
        RunLock(tmp_path)
    old = time.time() - locks.LEASE - 1
    os.utime(lease, (old, old))
    lock = RunLock(tmp_path)
    assert json.loads(lease.read_text())["pid"] == os.getpid()
    lock.release()
    assert not lease.exists()


def test_a_process_that_stood_still_learns_that_another_took_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "BEAT", 0.02)
    with hold(tmp_path) as lock:
        before = (tmp_path / ".lease.json").stat().st_mtime_ns
        deadline = time.monotonic() + 5
        while (tmp_path / ".lease.json").stat().st_mtime_ns == before:
            assert time.monotonic() < deadline, "no sign of life"
            time.sleep(0.01)
        lock.check()
        (tmp_path / ".lease.json").write_bytes(foreign().content())
        while not lock.lost:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(RunInUse, match=re.escape("on elsewhere since 2026-01-01 00:00:00. This process stood")):
            lock.check()
    assert (tmp_path / ".lease.json").exists(), "the other's stays"


def test_what_is_collected_meanwhile_waits_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A collection in another thread, such as the one that a lock begins, may meet a forgotten hold."""
    forgotten = ExitStack()
    forgotten.enter_context(hold(tmp_path / "forgotten"))
    circle: list[object] = [forgotten]
    circle.append(circle)
    del forgotten, circle
    ended = []

    def take(lock: RunLock) -> None:
        other = threading.Thread(target=gc.collect, daemon=True)
        other.start()
        other.join(10)
        ended.append(not other.is_alive())

    monkeypatch.setattr(RunLock, "_take", take)
    with hold(tmp_path / "run"):
        assert ended == [True]


def test_a_folder_that_was_deleted_is_held_anew(tmp_path: Path) -> None:
    forgotten = hold(tmp_path / "run")
    forgotten.__enter__()
    shutil.rmtree(tmp_path / "run")
    with hold(tmp_path / "run"), hold(tmp_path / "run"):
        assert (tmp_path / "run" / ".lease.json").exists()
        forgotten.__exit__()
        assert (tmp_path / "run" / ".lease.json").exists()
    assert not (tmp_path / "run").exists(), "made for the lock alone"


def test_of_two_that_take_over_one_succeeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lease changes hands between the look at it and the taking."""
    lease = tmp_path / ".lease.json"
    lease.write_bytes(foreign("stale").content())
    before = RunLock._age

    def other_first(lock: RunLock) -> float:
        before(lock)
        lease.write_bytes(foreign("other").content())
        return locks.LEASE + 1

    monkeypatch.setattr(RunLock, "_age", other_first)
    with pytest.raises(RunInUse, match="on elsewhere"):
        RunLock(tmp_path)
    assert json.loads(lease.read_text())["token"] == "other"


def test_what_is_no_lease_names_nobody() -> None:
    for content in (None, b"", b"[]", b"{}", b'{"pid": "x"}', b"\xff"):
        assert Holder.read(content) is None
    here = Holder.here()
    assert Holder.read(here.content()) == here
    assert not here.is_dead()
    assert not foreign().is_dead(), "nobody knows"
    assert Holder("1", here.host, here.boot, here.pid, here.started - 100, "").is_dead(), "another one of that number"
