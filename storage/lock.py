"""One process in a run's folder, also where machines share it.

The kernel's lock on `.lock` keeps out other processes of this machine, and of others where the file system passes locks
on. `.lease.json` names the holder and is touched every `BEAT` seconds: where locks are not passed on, a lease that was
touched within the last `LEASE` seconds keeps others out. Ages are differences of the file system's own times.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from ssm_metarl.storage.atomic import delete, replace_file, temporary_beside, write_new

BEAT, LEASE = 10.0, 60.0
"""Seconds between two signs of life of a holder, and without one until others may take over."""

_LOCK, _LEASE_FILE = ".lock", ".lease.json"


class RunInUse(ValueError):
    """A run's folder or copy that another process uses: one sentence that names it."""


@dataclass(frozen=True)
class Holder:
    """A process that uses a run.

    Attributes:
        token: random, of this use.
        host: name of its machine.
        boot: of that machine, for names may be equal.
        pid: of the process.
        started: when the process started, seconds since 1970.
        since: of this use, as a person reads it.
    """

    token: str
    host: str
    boot: str
    pid: int
    started: float
    since: str

    @staticmethod
    def here() -> Holder:
        """This process."""
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        started = psutil.Process().create_time()
        return Holder(uuid.uuid4().hex, socket.gethostname(), _boot(), os.getpid(), started, since)

    @staticmethod
    def read(content: bytes | None) -> Holder | None:
        """The holder that a lease names, if it names one."""
        try:
            value = json.loads(content or b"")
            return Holder(**{name: kind(value[name]) for name, kind in _FIELDS.items()})
        except (ValueError, TypeError, KeyError):
            return None

    def content(self) -> bytes:
        """A lease that names it."""
        return json.dumps(asdict(self)).encode()

    def is_dead(self) -> bool:
        """Whether it is known to have ended: it was a process of this machine."""
        if self.boot != _boot():
            return False
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) > 1
        except psutil.Error:
            return True

    def words(self) -> str:
        """For a sentence."""
        return f"process {self.pid} on {self.host} since {self.since}"


_FIELDS: dict[str, Any] = {"token": str, "host": str, "boot": str, "pid": int, "started": float, "since": str}


@functools.cache
def _boot() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()} {psutil.boot_time():.0f}"


_held: dict[str, tuple[int, RunLock, int]] = {}  # thread, lock and number of its holds, by folder
_guard = threading.Lock()


class hold:
    """Keep other processes out of a run's folder, which is made where it is not there.

    A thread may hold it several times, and lets go with the last. A forgotten hold lasts as long as the folder or the
    process: a collection, which may stop any thread at any place, would wait for the guard without end.

    Args:
        run: the folder.

    Raises:
        RunInUse: one is in it.
        ValueError: the folder cannot be made.
    """

    def __init__(self, run: Path) -> None:
        self._run = Path(run)
        self._key = os.path.realpath(run)

    def __enter__(self) -> RunLock:
        with _guard:
            if self._key not in _held or not (self._run / _LOCK).exists():  # the folder was deleted
                _held[self._key] = threading.get_ident(), RunLock(self._run), 0
            thread, self._lock, count = _held[self._key]
            if thread != threading.get_ident():
                raise RunInUse(f"{self._run} is in use by another thread of this process.")
            _held[self._key] = thread, self._lock, count + 1
            return self._lock

    def __exit__(self, *failure: object) -> None:
        with _guard:
            thread, lock, count = _held.get(self._key, (0, None, 0))
            if lock is not self._lock:
                return
            _held[self._key] = thread, lock, count - 1
            if count == 1:
                del _held[self._key]
                lock.release()


class RunLock:
    """The lock on a run's folder, taken; see `hold`."""

    def __init__(self, run: Path) -> None:
        self.run, self.holder, self.lost = run, Holder.here(), False
        try:
            self._made = not run.exists()
            run.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{run} cannot be made: {error.strerror}.") from None
        self._lease = run / _LEASE_FILE
        self._lock = FileLock(run / _LOCK, timeout=0, thread_local=False)
        try:
            self._lock.acquire()
        except Timeout:
            holder = Holder.read(_content(self._lease))
            raise RunInUse(_in_use(run, holder)) from None
        except OSError as error:
            raise ValueError(f"{run} cannot be written to: {error.strerror}.") from None
        try:
            self._take()
        except BaseException:
            self._lock.release()
            raise
        self._done = threading.Event()
        threading.Thread(target=self._beat, name="run-lease", daemon=True).start()

    def check(self) -> None:
        """Refuse to go on where another process has taken over, which believed that this one had ended.

        Raises:
            RunInUse: one has.
        """
        if self.lost:
            raise RunInUse(f"{_in_use(self.run, Holder.read(_content(self._lease)))} This process stood still.")

    def release(self) -> None:
        """Let others in."""
        self._done.set()
        with suppress(OSError):
            holder = Holder.read(_content(self._lease))
            if holder is not None and holder.token == self.holder.token:
                self._lease.unlink(missing_ok=True)
        self._lock.release()
        with suppress(OSError):
            if self._made and [path.name for path in self.run.iterdir()] == [_LOCK]:
                (self.run / _LOCK).unlink()
                self.run.rmdir()

    def _take(self) -> None:
        old = _content(self._lease)
        holder = Holder.read(old)
        if holder is not None and not holder.is_dead() and holder.boot != self.holder.boot:
            left = LEASE - self._age()
            if left > 0:
                wait = f"If it has died, try again in {left:.0f} s."
                raise RunInUse(f"{_in_use(self.run, holder)} {wait}")
        if old is not None:
            aside = temporary_beside(self._lease)
            with suppress(FileNotFoundError):
                os.rename(self._lease, aside)
                taken = _content(aside)
                delete(aside)
                if taken != old:  # another took over in between
                    replace_file(self._lease, taken or b"")
                    raise RunInUse(_in_use(self.run, Holder.read(taken)))
        fresh = temporary_beside(self._lease)
        write_new(fresh, self.holder.content())
        try:
            _link(fresh, self._lease)
        except FileExistsError:
            raise RunInUse(_in_use(self.run, Holder.read(_content(self._lease)))) from None
        finally:
            fresh.unlink(missing_ok=True)

    def _age(self) -> float:
        """Seconds since the lease was touched, by the file system's clock."""
        probe = temporary_beside(self._lease)
        write_new(probe, b"")
        try:
            return probe.stat().st_mtime - self._lease.stat().st_mtime
        except FileNotFoundError:
            return LEASE
        finally:
            probe.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._done.wait(BEAT):
            with suppress(OSError):
                holder = Holder.read(_content(self._lease))
                if holder is None or holder.token != self.holder.token:
                    self.lost = not self._done.is_set()
                    return
                os.utime(self._lease)  # now, by the file server's clock


def _in_use(run: Path, holder: Holder | None) -> str:
    return f"{run} is in use by {holder.words() if holder else 'another process'}."


def _content(path: Path) -> bytes | None:
    with suppress(OSError):
        return path.read_bytes()
    return None


def _link(source: Path, target: Path) -> None:
    """Give a file another name, which must be free."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        write_new(target, source.read_bytes())
