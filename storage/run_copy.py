"""A run's copy at a URI, brought up to date beside the run, which never waits for it."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ssm_metarl.storage.lock import Holder, RunInUse
from ssm_metarl.storage.mirror import Image, Mirror
from ssm_metarl.storage.remote import PATIENCE, Found
from ssm_metarl.storage.run_record import read_record, write_record
from ssm_metarl.storage.uri import StorageError, shown

OWNER = ".owner.json"
"""File of a copy that names the run's id and the process that writes it."""

BEAT, LEASE = 20.0, 120.0
"""Seconds between two signs of life of the process that writes a copy, and without one until others may."""

POLL = 10.0
"""Seconds between two looks into the copy, for what others put there."""

SETTLE = 0.5
"""Seconds in which a process that takes a copy at the same time shows."""

WAIT, WAIT_INTERRUPTED = 60.0, 15.0
"""Seconds that the end of a run waits for its copy at most, and those after a signal."""

_LONGEST_PAUSE = 30.0


class RunCopy:
    """The copy of a run at a URI, written by a thread and a process of its own.

        copy = RunCopy(run, "s3://bucket/runs/name")
        copy.open(resume=False)     # refuses what cannot work; fetches a run to resume
        while training:
            copy.update()           # returns at once
        complete = copy.close()

    A failed push is tried again until the run ends, each time with the newest state of the folder.

    Args:
        run: the folder.
        uri: of its copy.
        skip: paths in the folder that are not copied.
        inbox: a folder of the run into which others put files in the copy: they are fetched as they come.
        say: prints a line.
        patience: seconds until a request without an answer counts as failed.
    """

    def __init__(
        self,
        run: Path,
        uri: str,
        skip: Sequence[str] = (),
        inbox: str | None = None,
        say: Callable[[str], None] = print,
        patience: float = PATIENCE,
    ) -> None:
        self.run, self.uri, self._inbox, self._say = Path(run), uri, inbox, say
        self.place = shown(uri)
        self._mirror = Mirror(run, uri, skip, patience)
        self._me = Holder.here()
        self._id = ""
        self._turn = threading.Condition()
        self._image: Image | None = None
        self._known: set[str] = set()  # checkpoints of the copy that the folder does not have
        self._victims: set[str] = set()  # those of them that are to be deleted
        self._closing = self._done = self._lost = False
        self._thread: threading.Thread | None = None
        self._asked: float | None = None  # when the first state that the copy lacks was taken
        self.behind_since: float | None = None

    def __enter__(self) -> RunCopy:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close(WAIT_INTERRUPTED if kind is None or issubclass(kind, Exception) else 0.0)

    def open(self, resume: bool) -> None:
        """Take the copy for this process and try to write to it; fetch the run where the copy has come further.

        Raises:
            StorageError: it cannot be written, or holds a run already, or another one than the folder.
            RunInUse: another process writes it.
        """
        remote = self._mirror.remote
        found = remote.files()
        if not resume and (there := self._mirror.position(found)):
            raise StorageError(f"{self.place} holds a run already ({there}): resume it, or choose another folder.")
        self._refuse_another(found)
        self._known = {name.rpartition("/")[0] for name in found if name.startswith("rsi/checkpoints/")}
        self._say_if(self._mirror.pull() if resume else None)
        self._id = str(read_record(self.run).get("id", uuid.uuid4().hex))
        remote.put({OWNER: self._claim()})
        time.sleep(SETTLE)
        owner = Holder.read(remote.get([OWNER]).get(OWNER))
        if owner is None or owner.token != self._me.token:
            raise RunInUse(self._in_use(owner))
        self.run.mkdir(parents=True, exist_ok=True)
        write_record(self.run, id=self._id, copy=self.place)
        self._thread = threading.Thread(target=self._work, name="run-copy", daemon=True)
        self._thread.start()
        self.update()

    def update(self) -> None:
        """Have the copy follow the folder as it is now; nothing may be writing to it during this call."""
        image = self._mirror.image()
        with self._turn:
            self._image, self._asked = image, self._asked or time.time()
            self._turn.notify_all()

    def keep(self, folder: str, names: Sequence[str]) -> None:
        """Delete the folders in `folder` of the copy that are not named, once the copy has caught up.

        Those that were never named and were not there when the copy was opened stay: they may be in the making.
        """
        kept = {f"{folder}/{name}" for name in names}
        with self._turn:
            self._victims = {name for name in self._known if name.startswith(f"{folder}/")} - kept
            self._known |= kept
            self._turn.notify_all()

    def close(self, wait: float = WAIT) -> bool:
        """End: wait for the copy to catch up, let others write it; whether it is complete."""
        if self._thread is None:
            self._mirror.remote.close()
            return not self._lost and self.behind_since is None
        with self._turn:
            self._closing = True
            self._turn.notify_all()
            if self.behind_since is not None:
                self._say(f"Waiting up to {wait:.0f} s for the copy at {self.place} …")
            self._turn.wait_for(lambda: self._done, timeout=wait)
            caught_up = self._image is None and self.behind_since is None
            complete = (self._done or caught_up) and not self._lost
            self._closing = self._done = True
            if not complete and self.behind_since is None:
                self.behind_since = self._asked or time.time()
        self._mirror.remote.close()  # also ends a request that hangs
        self._thread = None
        if not complete:
            self._say(f"The copy at {self.place} is incomplete: it is behind since {_clock(self.behind_since)}.")
        return complete

    def summary(self) -> dict[str, Any]:
        """JSON values of how the copy stands."""
        since = self.behind_since
        return {"uri": self.place, "complete": since is None, "behind_since": None if since is None else _clock(since)}

    # --- Another process ----------------------------------------------------------------------------------

    def _refuse_another(self, found: dict[str, Found]) -> None:
        if OWNER not in found:
            return
        remote = self._mirror.remote
        owner = Holder.read(remote.get([OWNER]).get(OWNER))
        if owner is None or owner.is_dead() or owner.token == self._me.token:
            return
        if owner.boot == self._me.boot:
            raise RunInUse(self._in_use(owner))
        probe = f".{self._me.token}"
        remote.put({probe: b""})
        now = remote.files()  # both times by the storage's clock
        remote.delete([probe])
        if OWNER in now and probe in now:
            left = LEASE - (now[probe].time - now[OWNER].time) / 1e9
            if left > 0:
                raise RunInUse(f"{self._in_use(owner)} If it has died, try again in {left:.0f} s.")

    def _in_use(self, owner: Holder | None) -> str:
        return f"The copy at {self.place} is written by {owner.words() if owner else 'another process'}."

    def _claim(self) -> bytes:
        return json.dumps({"run": self._id, **json.loads(self._me.content())}).encode()

    # --- The thread ---------------------------------------------------------------------------------------

    def _work(self) -> None:
        pause, beaten = 1.0, time.monotonic()
        while not self._done:
            with self._turn:
                self._turn.wait_for(lambda: self._image or self._victims or self._closing, timeout=POLL)
                image, victims, closing = self._image, set(self._victims), self._closing
                if self._done:
                    return
            try:
                self._check_owner()
                if time.monotonic() - beaten > BEAT:
                    self._mirror.remote.put({OWNER: self._claim()})
                    beaten = time.monotonic()
                if image:
                    self._mirror.send(image)
                self._mirror.delete_checkpoints(victims)
                if self._inbox:
                    self._mirror.fetch_new(self._inbox)
                with self._turn:
                    caught_up = self._image is image
                    if caught_up:
                        self._image = self._asked = None
                    self._victims -= victims
                    self._known -= victims
                    finished = closing and caught_up and not self._victims
                if caught_up:
                    self._caught_up()
                    pause = 1.0
                if finished:
                    self._mirror.remote.delete([OWNER])
                    self._finish()
            except RunInUse as error:
                self._lost = True
                self._fell_behind(StorageError(f"{error} This process writes it no longer."))
                self._finish()
            except StorageError as error:
                if not self._done:
                    self._fell_behind(error)
                    self._rest(pause, closing)
                    pause = min(2 * pause, _LONGEST_PAUSE)

    def _rest(self, seconds: float, closing: bool) -> None:
        """Wait before the next try; the end of the run does not wait."""
        with self._turn:
            self._turn.wait_for(lambda: self._done or self._closing != closing, timeout=seconds)

    def _check_owner(self) -> None:
        """Write nothing into a copy that another process has taken."""
        owner = Holder.read(self._mirror.remote.get([OWNER]).get(OWNER))
        if owner is not None and owner.token != self._me.token:
            raise RunInUse(self._in_use(owner))

    def _finish(self) -> None:
        with self._turn:
            self._done = True
            self._turn.notify_all()

    def _fell_behind(self, error: StorageError) -> None:
        if self.behind_since is None:
            self.behind_since = self._asked or time.time()
            self._say(f"The copy is behind since {_clock(self.behind_since)}, the run goes on: {error}")

    def _caught_up(self) -> None:
        if self.behind_since is not None:
            self._say(f"The copy at {self.place} is up to date again, after {time.time() - self.behind_since:.0f} s.")
            self.behind_since = None

    def _say_if(self, line: str | None) -> None:
        if line:
            self._say(line)


def _clock(moment: float | None) -> str:
    return time.strftime("%H:%M:%S", time.localtime(moment))
