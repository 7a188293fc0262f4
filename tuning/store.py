"""What a self-improving run keeps on disk, so that a crash at any moment loses no decision.

    rsi/state.json      the whole population, replaced atomically: the only source for terminal, page and resume
    rsi/events.jsonl    one line a decision
    rsi/checkpoints/    the incumbent's checkpoints, under names that say the meta-iteration
    rsi/requests/       manual rollbacks that wait for the next decision

The state is written first and holds its own last events: what a crash kept from `events.jsonl` is appended on
resume, and a line once written stays.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from ssm_metarl.checks import brief
from ssm_metarl.storage.atomic import replace_file
from ssm_metarl.storage.checkpoint import load_checkpoint
from ssm_metarl.storage.contents import MANIFEST, Checkpoint, CheckpointError
from ssm_metarl.storage.documents import LARGE, checked, decode_json, read_file, read_lines, read_object
from ssm_metarl.storage.lock import hold
from ssm_metarl.storage.mirror import Mirror, local_folder
from ssm_metarl.storage.remote import Remote
from ssm_metarl.storage.run_copy import WAIT, RunCopy
from ssm_metarl.storage.run_record import write_record
from ssm_metarl.storage.uri import below, join
from ssm_metarl.tuning.forms import REQUEST_FORM, STATE_FORM, event_form

FORMAT_VERSION = 3
"""Version of `state.json`."""

NOT_COPIED = ("rsi/tune", "rsi/checkpoints")
"""Parts of a run that its copy does not follow: Tune's own files, and checkpoints that members write there."""

REQUESTS = "rsi/requests"
"""Folder of a run that its copy is looked through for."""


class RunStore:
    """The folder `rsi/` of a run; `Population` writes it, everything else reads.

    Args:
        run: the run's folder.
        mirror: URI at which it is copied with every decision; the checkpoints of the population are then there alone.
            A `RunCopy` is closed by whoever made it.
    """

    def __init__(self, run: Path, mirror: str | RunCopy | None = None) -> None:
        self.folder = Path(run).resolve() / "rsi"
        self._own_copy = isinstance(mirror, str)
        self._copy = RunCopy(self.folder.parent, mirror, NOT_COPIED, REQUESTS) if isinstance(mirror, str) else mirror
        self.archive = join(self._copy.uri, "rsi/checkpoints") if self._copy else str(self.folder / "checkpoints")
        self._held = ExitStack()
        self.checkpoints = self.folder / "checkpoints"
        self._requests = self.folder / "requests"
        self._state = self.folder / "state.json"
        self._events = self.folder / "events.jsonl"

    def create(self) -> None:
        """Make the folders of a new run, which this process keeps until `finish`.

        Raises:
            RunInUse: another process is in the run, or writes its copy.
            StorageError: the copy cannot be written, or holds a run already.
        """
        self._open(resume=False)

    def _open(self, resume: bool) -> None:
        self._held.enter_context(hold(self.folder.parent))
        if self._copy:
            self._copy.open(resume)
        write_record(self.folder.parent)
        for folder in (self.checkpoints, self._requests):
            folder.mkdir(parents=True, exist_ok=True)

    def commit(self, state: Mapping[str, Any], events: Sequence[Mapping[str, Any]] = ()) -> None:
        """Replace the state, then append the decisions that led to it.

        Args:
            state: JSON values; "events_before" is the number of lines in the log so far.
            events: JSON values, one a decision.
        """
        content = json.dumps({"format": FORMAT_VERSION, **state, "events": list(events)})
        replace_file(self._state, content.encode())
        self._append(events)
        if events:
            self.push()

    def push(self) -> None:
        """Bring the copy at the URI up to date, if there is to be one."""
        if self._copy:
            self._copy.update()

    def pull(self) -> None:
        """Keep the run for this process until `finish`; it is fetched from its copy, if that has come further.

        Raises:
            RunInUse: another process is in the run, or writes its copy.
            StorageError: the copy cannot be written, or is of another run.
        """
        if self._copy or self.folder.is_dir():
            self._open(resume=True)

    def finish(self) -> None:
        """Wait a stated time for the copy at the URI, and let other processes in."""
        self.push()
        self.close(WAIT)

    def close(self, wait: float = 0.0) -> None:
        """Let other processes in.

        Args:
            wait: seconds that the copy at the URI has to become complete.
        """
        if self._copy and self._own_copy:
            self._copy.close(wait)
        self._held.close()

    def load(self) -> dict[str, Any]:
        """The last state; the log of events is completed from it.

        Raises:
            ValueError: there is none, or it is damaged or of another format.
        """
        state = read_state(self.folder.parent)
        lines = [line for line, _ in self._lines()][: int(state["events_before"]) + len(state["events"])]
        written = len(lines) - int(state["events_before"])
        if written < 0:
            raise ValueError(f"{self._events} has lost lines: {len(lines)} instead of {state['events_before']}.")
        replace_file(self._events, "".join(line + "\n" for line in lines).encode())
        self._append(state["events"][written:])
        return state

    def events(self) -> list[dict[str, Any]]:
        """All decisions so far, oldest first."""
        return [event for _, event in self._lines()]

    def requests(self) -> list[tuple[Path, str]]:
        """Checkpoint names that a person asked to go back to, oldest first, each with the file of its request.

        The name is that of no checkpoint, "?", where a file cannot be read.
        """
        found = []
        for path in sorted(self._requests.glob("*.json")) if self._requests.is_dir() else []:
            try:
                name = str(read_object(path, REQUEST_FORM)["checkpoint"])
            except CheckpointError:
                name = "?"
            found.append((path, name))
        return found

    def request(self, checkpoint: str) -> Path:
        """Ask for a rollback at the next decision."""
        self._requests.mkdir(parents=True, exist_ok=True)
        path = self._requests / f"{time.time_ns():020d}.json"
        replace_file(path, json.dumps({"checkpoint": checkpoint, "time": time.time()}).encode())
        return path

    def prune(self, keep: Collection[str]) -> None:
        """Delete every checkpoint that is not named in `keep`, and what a crash left half written."""
        if self._copy:
            self._copy.keep("rsi/checkpoints", list(keep))
        for path in self.checkpoints.iterdir():
            if path.name not in keep:
                shutil.rmtree(path, ignore_errors=True)

    def checkpoint(self, name: str) -> Checkpoint:
        """One of the archive.

        Raises:
            CheckpointError: it is damaged, or not there.
            FileNotFoundError: it is not at the URI.
        """
        with tempfile.TemporaryDirectory() as folder:
            return load_checkpoint(local_folder(below(self.archive, name), Path(folder)))

    def _lines(self) -> list[tuple[str, dict[str, Any]]]:
        """The log, each line as text and as values; without one that a crash tore."""
        return list(read_lines(self._events, event_form)) if os.path.lexists(self._events) else []

    def _append(self, events: Sequence[Mapping[str, Any]]) -> None:
        if not events:
            return
        with self._events.open("a") as log:
            log.write("".join(json.dumps(event) + "\n" for event in events))
            log.flush()
            os.fsync(log.fileno())


def read_state(run: Path) -> dict[str, Any]:
    """The last state of the run in a folder.

    Raises:
        ValueError: there is none, or it is damaged or of another format: one sentence that names the file.
    """
    path = Path(run) / "rsi" / "state.json"
    if not os.path.lexists(path):
        raise ValueError(f"{run} is no run of evolve: there is no {path}.")
    state = decode_json(path, read_file(path, LARGE))
    if type(found := state.get("format")) is not int or found != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} is of format {brief(found)}, but this version of ssm-metarl reads {FORMAT_VERSION}."
        )
    checked(path, state, STATE_FORM)
    return state


def request_rollback(run: Path, checkpoint: str, mirror: str | None = None) -> Path:
    """Ask a run, going on or stopped, to make a kept checkpoint its incumbent again.

    Args:
        run: folder of a run of evolve.
        checkpoint: name of a folder in its `rsi/checkpoints`, or a path to one.
        mirror: URI of the run's copy, if it has one: the run, wherever it goes on, looks there.

    Returns:
        The file of the request; with a copy it comes into the run's folder from there.

    Raises:
        ValueError: the run keeps no such checkpoint; the sentence lists those that it does.
        CheckpointError: it is damaged.
    """
    store = RunStore(run)
    state = _state_at(mirror) if mirror else read_state(run)
    name = Path(checkpoint).name
    kept = sorted(state["archive"])
    if not mirror:
        kept = [name for name in kept if (store.checkpoints / name / MANIFEST).is_file()]
    if name not in kept:
        raise ValueError(f"{run} keeps no checkpoint {checkpoint!r}; it has {', '.join(kept) or 'none'}.")
    store.archive = join(mirror, "rsi/checkpoints") if mirror else store.archive
    store.checkpoint(name)
    if not mirror:
        return store.request(name)
    with tempfile.TemporaryDirectory() as folder, Remote(mirror) as remote:
        request = RunStore(Path(folder)).request(name)
        remote.put({f"{REQUESTS}/{request.name}": request.read_bytes()})
    return store.folder.parent / REQUESTS / request.name


def _state_at(mirror: str) -> dict[str, Any]:
    """The last state of the run whose copy is at a URI."""
    with tempfile.TemporaryDirectory() as folder, closing(Mirror(Path(folder), mirror, NOT_COPIED)) as copy:
        copy.fetch()
        return read_state(Path(folder))
