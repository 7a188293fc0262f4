"""What a self-improving run keeps on disk, so that a crash at any moment loses no decision.

    rsi/state.json      the whole population, replaced atomically: the only source for terminal, page and resume
    rsi/events.jsonl    one line a decision
    rsi/checkpoints/    the population's checkpoints, under names that say generation and trial
    rsi/requests/       manual rollbacks that wait for the next generation

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
from pathlib import Path
from typing import Any

from ssm_metarl.storage.atomic import replace_file
from ssm_metarl.storage.checkpoint import load_checkpoint
from ssm_metarl.storage.contents import MANIFEST, Checkpoint
from ssm_metarl.storage.mirror import Mirror, local_folder

FORMAT_VERSION = 1
"""Version of `state.json`."""


class RunStore:
    """The folder `rsi/` of a run; `Evolution` writes it, everything else reads.

    Args:
        run: the run's folder.
        mirror: URI at which it is copied with every decision; the checkpoints of the population are then there alone.
    """

    def __init__(self, run: Path, mirror: str | None = None) -> None:
        self.folder = Path(run).resolve() / "rsi"
        # Tune's own files are worth nothing elsewhere; checkpoints are written by the trials, wherever they run.
        self._mirror = Mirror(self.folder.parent, mirror, ("rsi/tune", "rsi/checkpoints")) if mirror else None
        self.archive = f"{self._mirror.uri}/rsi/checkpoints" if self._mirror else str(self.folder / "checkpoints")
        self.checkpoints = self.folder / "checkpoints"
        self._requests = self.folder / "requests"
        self._state = self.folder / "state.json"
        self._events = self.folder / "events.jsonl"

    def create(self) -> None:
        """Make the folders of a run."""
        for folder in (self.checkpoints, self._requests):
            folder.mkdir(parents=True, exist_ok=True)

    def commit(self, state: Mapping[str, Any], events: Sequence[Mapping[str, Any]] = ()) -> None:
        """Replace the state, then append the decisions that led to it.

        Args:
            state: JSON values; "events_before" is the number of lines in the log so far.
            events: JSON values, one a decision.
        """
        content = json.dumps({"format": FORMAT_VERSION, **state, "events": list(events)}, indent=1)
        replace_file(self._state, content.encode())
        self._append(events)
        if events:
            self.push()

    def push(self) -> None:
        """Bring the copy at the URI up to date, if there is to be one."""
        if self._mirror:
            self._mirror.push()

    def pull(self) -> None:
        """Fetch the run from the copy at the URI, if there is one."""
        if self._mirror and self._mirror.pull():
            self.create()  # the copy has no empty folders

    def load(self) -> dict[str, Any]:
        """The last state; the log of events is completed from it.

        Raises:
            ValueError: there is none, or it is damaged or of another format.
        """
        state = read_state(self.folder.parent)
        lines = _whole_lines(self._events)
        written = len(lines) - int(state["events_before"])
        if written < 0:
            raise ValueError(f"{self._events} has lost lines: {len(lines)} instead of {state['events_before']}.")
        replace_file(self._events, "".join(line + "\n" for line in lines).encode())
        self._append(state["events"][written:])
        return state

    def events(self) -> list[dict[str, Any]]:
        """All decisions so far, oldest first."""
        return [json.loads(line) for line in _whole_lines(self._events)]

    def requests(self) -> list[tuple[Path, str]]:
        """Checkpoint names that a person asked to go back to, oldest first, each with the file of its request.

        The name is that of no checkpoint, "?", where a file cannot be read.
        """
        if self._mirror:
            self._mirror.fetch("rsi/requests")
        found = []
        for path in sorted(self._requests.glob("*.json")) if self._requests.is_dir() else []:
            try:
                name = str(json.loads(path.read_text())["checkpoint"])
            except (ValueError, TypeError, KeyError, OSError):
                name = "?"
            found.append((path, name))
        return found

    def request(self, checkpoint: str) -> Path:
        """Ask for a rollback at the next generation's border."""
        self._requests.mkdir(parents=True, exist_ok=True)
        path = self._requests / f"{time.time_ns():020d}.json"
        replace_file(path, json.dumps({"checkpoint": checkpoint, "time": time.time()}).encode())
        return path

    def prune(self, keep: Collection[str]) -> None:
        """Delete every checkpoint that is not named in `keep`, and what a crash left half written."""
        if self._mirror:
            self._mirror.keep("rsi/checkpoints", list(keep))
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
            return load_checkpoint(local_folder(f"{self.archive}/{name}", Path(folder)))

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
    try:
        state = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{run} is no run of evolve: there is no {path}.") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT_VERSION:
        found = state.get("format") if isinstance(state, dict) else None
        raise ValueError(f"{path} is of format {found!r}, but this version of ssm-metarl reads {FORMAT_VERSION}.")
    return state


def request_rollback(run: Path, checkpoint: str, mirror: str | None = None) -> Path:
    """Ask a run, going on or stopped, to make a kept checkpoint its best and the parent of the next generation.

    Args:
        run: folder of a run of evolve.
        checkpoint: name of a folder in its `rsi/checkpoints`, or a path to one.
        mirror: URI of the run's copy, if it has one: the run, wherever it goes on, looks there.

    Returns:
        The file of the request.

    Raises:
        ValueError: the run keeps no such checkpoint; the sentence lists those that it does.
        CheckpointError: it is damaged.
    """
    store = RunStore(run, mirror)
    store.pull()
    state = read_state(run)
    name = Path(checkpoint).name
    kept = sorted(state["archive"])
    if not mirror:
        kept = [name for name in kept if (store.checkpoints / name / MANIFEST).is_file()]
    if name not in kept:
        raise ValueError(f"{run} keeps no checkpoint {checkpoint!r}; it has {', '.join(kept) or 'none'}.")
    store.checkpoint(name)
    request = store.request(name)
    store.push()
    return request


def _whole_lines(path: Path) -> list[str]:
    """Lines of a log without one that a crash tore."""
    if not path.exists():
        return []
    text = path.read_text()
    return text[: text.rfind("\n") + 1].splitlines()
