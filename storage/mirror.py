"""A run's folder at a URI such as `s3://bucket/runs/name`, kept like the local one: a lost head leaves it behind."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ssm_metarl.storage.atomic import replace_file
from ssm_metarl.storage.contents import BEST, MANIFEST
from ssm_metarl.storage.remote import PATIENCE, Found, Remote
from ssm_metarl.storage.run_record import RECORD
from ssm_metarl.storage.uri import StorageError, is_uri, join, name_of, shown

STATE = "rsi/state.json"
"""State of a self-improving run, in its folder."""

_POINTERS = (BEST, STATE)
_CHECKPOINT = re.compile(r"(checkpoint_|iteration_|start)")
_STAND_IN = re.compile(r"\.(checkpoint_[0-9]+)\.old")
_NUMBER = re.compile(r"checkpoint_([0-9]+)")
_BATCH = 32

Stamp = tuple[int, int]


@dataclass(frozen=True)
class Image:
    """A run's folder at one moment.

    Attributes:
        stamps: time and size of its files, by their path in it.
        contents: of those files that the copy does not have like this.
    """

    stamps: dict[str, Stamp]
    contents: dict[str, bytes]


@dataclass(frozen=True, order=True)
class Position:
    """How far a run has come.

    Attributes:
        decisions: of self-improvement.
        iteration: of the newest checkpoint; -1: there is none.
    """

    decisions: int = 0
    iteration: int = -1

    def __bool__(self) -> bool:
        return self != Position()

    def __str__(self) -> str:
        return f"{self.decisions} decisions" if self.decisions else f"checkpoint_{self.iteration:06d}"


class Mirror:
    """The copy of a local folder at a URI; `RunCopy` keeps it up to date beside a run.

        mirror = Mirror(run, "s3://bucket/runs/run")
        mirror.send(mirror.image())

    A push may end at any moment: what the copy then holds is a run that can be resumed. Checkpoints' files and logs are
    sent first, then the manifests, then what names checkpoints, and last is deleted what is gone. A checkpoint whose
    place in the copy is taken is replaced like a local one: the former stands in for it, as `.checkpoint_000123.old`.

    Args:
        local: the folder.
        uri: of its copy.
        skip: paths in the folder that are not copied.
        patience: seconds until a request without an answer counts as failed.
    """

    def __init__(self, local: Path, uri: str, skip: Sequence[str] = (), patience: float = PATIENCE) -> None:
        self.local, self.uri, self._skip = Path(local), uri, tuple(skip)
        self.remote = Remote(uri, patience)
        self._sent: dict[str, Stamp] = {}  # what the copy is known to hold of the local files
        self._ours: set[str] = set()  # names in the copy that follow the folder
        self._there: set[str] = set()  # names in the copy
        self._seen: set[str] = set()  # names that were fetched once, or sent

    # --- Out ----------------------------------------------------------------------------------------------

    def image(self) -> Image:
        """The folder now, in memory: nothing may be writing to it meanwhile."""
        stamps, contents = {}, {}
        for name, stamp in self._files().items():
            try:
                if self._sent.get(name) != stamp:
                    contents[name] = (self.local / name).read_bytes()
                stamps[name] = stamp
            except FileNotFoundError:
                continue
        return Image(stamps, contents)

    def send(self, image: Image) -> None:
        """Make the copy equal to an image of the folder; what others put there stays.

        Raises:
            StorageError: the storage refuses, or does not answer; another call goes on where this one ended.
        """
        changed = {name: new for name, new in image.contents.items() if self._sent.get(name) != image.stamps[name]}
        for folder in sorted({_folder(name) for name in changed if _in_checkpoint(name)}):
            if f"{folder}/{MANIFEST}" in self._there:
                self._set_aside(folder)
        for wave in (0, 1, 2):
            now = {name: content for name, content in changed.items() if _wave(name) == wave}
            self._ours.update(now)
            self._there.update(name for name in now if not name.endswith(MANIFEST))
            self.remote.put(now)
            self._there.update(now)
            self._sent |= {name: image.stamps[name] for name in now}
            self._seen.update(now)
        self._delete(self._ours - set(image.stamps))
        self._delete({name for name in self._there if self._stood_in_for(name)})

    def delete_checkpoints(self, folders: Iterable[str]) -> None:
        """Delete checkpoints of the copy that the folder does not have."""
        folders = list(folders)
        self.remote.delete(f"{folder}/{MANIFEST}" for folder in folders)
        self.remote.delete_folders(folders)

    def close(self) -> None:
        """End what is under way."""
        self.remote.close()

    def fetch_new(self, folder: str) -> None:
        """Fetch the files in a folder of the copy that were not fetched before, nor sent from here."""
        found = {name: at for name, at in self.remote.files(folder).items() if name not in self._seen}
        self.fetch(found)
        self._there.update(found)
        self._ours.update(found)

    # --- In -----------------------------------------------------------------------------------------------

    def position(self, found: dict[str, Found]) -> Position:
        """How far the run in the copy has come; False where there is none."""
        state = self.remote.get([STATE]).get(STATE) if STATE in found else None
        return Position(_decisions(state), _newest(found))

    def pull(self) -> str | None:
        """Fetch the run from the copy, unless the folder has come as far; nothing in the folder is deleted.

        A file that the copy has differently stays as `NAME.local`, unless it belongs to the same run.

        Returns:
            A sentence that says which of the two the run goes on from; None where there is no copy.

        Raises:
            StorageError: the storage refuses, or holds another run.
        """
        found = self.remote.files()
        there, here = self.position(found), local_position(self.local)
        place = shown(self.uri)
        if not there:
            return None
        ours, theirs = _run_id(_read(self.local / RECORD)), _run_id(self.remote.get([RECORD]).get(RECORD))
        if here and ours and theirs and ours != theirs:
            raise StorageError(f"{place} is the copy of another run than {self.local}: choose another folder.")
        if here >= there:
            self._know(found)
            behind = f"; the copy at {place} has {there} and is brought up to date" if here > there else ""
            return f"Going on from {self.local}, which has {here}{behind}."
        self.fetch(found, same_run=bool(here) and ours == theirs)
        self._know(found)
        older = f"; {self.local} had {here}" if here else ""
        return f"Fetched the run from its copy at {place}, which has {there}{older}."

    def fetch(self, found: dict[str, Found] | None = None, folder: str = "", same_run: bool = True) -> list[str]:
        """Copy files of the copy to the folder, checkpoints last; their paths in it."""
        found = self.remote.files(folder) if found is None else found
        wanted = self._wanted(found)
        order = sorted(wanted, key=lambda target: (_wave(target), target))
        for wave in (0, 1, 2):
            targets = [target for target in order if _wave(target) == wave]
            for start in range(0, len(targets), _BATCH):
                part = targets[start : start + _BATCH]
                contents = self.remote.get([wanted[target] for target in part])
                for target in part:
                    if wanted[target] in contents:
                        _write(self.local / target, contents[wanted[target]], same_run)
        self._seen.update(found)
        return order

    def _wanted(self, found: Mapping[str, Found]) -> dict[str, str]:
        """What belongs to the folder of the files found, by its place there; of checkpoints only whole ones."""
        places, wanted = _places(found), {}
        for name in found:
            folder, _, last = name.rpartition("/")
            match = _STAND_IN.fullmatch(folder)
            place = match[1] if match else folder
            target = f"{place}/{last}" if place else last
            hidden = any(part.startswith(".") or not part for part in target.split("/"))
            whole = not _in_checkpoint(target) or places.get(place) == folder
            if whole and not hidden and not self._skipped(target):
                wanted[target] = name
        return wanted

    def _know(self, found: dict[str, Found]) -> None:
        """Take note of what is in the copy: equal checkpoints are not sent again, and those that are gone will go."""
        self._there = set(found)
        self._seen |= {name for name in found if (self.local / name).exists()}
        self._ours = {name for name in found if _in_checkpoint(name) and not self._skipped(name)}
        files = self._files()
        manifests = [name for name in files if name.endswith(f"/{MANIFEST}") and name in found]
        for name, content in self.remote.get(manifests).items():
            if content == _read(self.local / name):
                within = {other: stamp for other, stamp in files.items() if _folder(other) == _folder(name)}
                self._sent |= {other: stamp for other, stamp in within.items() if other in found}

    # --- Parts --------------------------------------------------------------------------------------------

    def _set_aside(self, folder: str) -> None:
        """Let a checkpoint of the copy stand in for itself while its place is written anew."""
        parent, _, name = folder.rpartition("/")
        aside = f"{parent}/.{name}.old".lstrip("/")
        names = [name for name in self._there if _folder(name) == folder]
        manifest = f"{folder}/{MANIFEST}"
        if _NUMBER.fullmatch(folder):  # of the others nobody knows a stand-in
            targets = {name: f"{aside}/{PurePosixPath(name).name}" for name in names}
            for part in ([name for name in names if name != manifest], [manifest]):
                self.remote.copy({name: targets[name] for name in part})
                self._there.update(targets[name] for name in part)
        self.remote.delete([manifest])
        self._there.discard(manifest)

    def _stood_in_for(self, name: str) -> bool:
        match = _STAND_IN.fullmatch(name.partition("/")[0])
        return match is not None and f"{match[1]}/{MANIFEST}" in self._there

    def _delete(self, names: set[str]) -> None:
        """Delete files of the copy: manifests first, for without one there is no checkpoint."""
        manifests = {name for name in names if name.endswith(f"/{MANIFEST}")}
        folders = {_folder(name) for name in names if _in_checkpoint(name) or _STAND_IN.match(name)}
        folders -= {_folder(name) for name in self._there - names}
        self.remote.delete(manifests)
        self.remote.delete_folders(folders)
        self.remote.delete(name for name in names - manifests if _folder(name) not in folders)
        self._there -= names
        self._ours -= names
        for name in names:
            self._sent.pop(name, None)

    def _files(self) -> dict[str, Stamp]:
        """Time and size of what belongs to the copy, by path in the folder."""
        files = {}
        for path in self.local.rglob("*"):
            name = path.relative_to(self.local).as_posix()
            hidden = any(part.startswith(".") for part in Path(name).parts)
            try:
                if not hidden and not self._skipped(name) and path.is_file():
                    stat = path.stat()
                    files[name] = (stat.st_mtime_ns, stat.st_size)
            except FileNotFoundError:
                continue
        return files

    def _skipped(self, name: str) -> bool:
        return any(name == skip or name.startswith(skip + "/") for skip in self._skip)


def local_position(run: Path) -> Position:
    """How far the run in a folder has come; False where there is none."""
    paths = [path for form in ("checkpoint_*", ".checkpoint_*.old") for path in run.glob(f"{form}/{MANIFEST}")]
    found = {path.relative_to(run).as_posix(): Found(0, 0) for path in paths}
    return Position(_decisions(_read(run / STATE)), _newest(found))


def write_folder(place: str, write: Callable[[Path], object]) -> None:
    """Have a folder written at a path or a URI.

    Args:
        place: of the folder.
        write: writes it at the path that it is given.

    Raises:
        StorageError: the storage refuses, or does not answer.
    """
    if not is_uri(place):
        write(Path(place))
        return
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / name_of(place)
        write(folder)
        paths = [path for path in folder.rglob("*") if path.is_file()]
        contents = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        with Remote(place) as remote:
            remote.put({name: content for name, content in contents.items() if name != MANIFEST})
            remote.put({name: content for name, content in contents.items() if name == MANIFEST})


def local_folder(place: str, parent: Path) -> Path:
    """A folder as a path: itself, or a copy of it in `parent` if it is at a URI.

    Raises:
        FileNotFoundError: there is nothing at the URI.
        StorageError: the storage refuses, or does not answer.
    """
    if not is_uri(place):
        return Path(place)
    folder = parent / name_of(place)
    with closing(Mirror(folder, place)) as mirror:
        if not mirror.fetch():
            raise FileNotFoundError(f"There is nothing at {shown(place)}.")
    return folder


def fetch_checkpoint(uri: str, parent: Path) -> Path:
    """A run or a checkpoint at a URI as a folder in `parent`; of a run the checkpoints and which is the best.

    Raises:
        StorageError: there is none, or the storage refuses or does not answer.
    """
    folder = parent / (name_of(uri) or "run")
    with closing(Mirror(folder, uri)) as mirror:
        found = mirror.remote.files()
        kept = {name: at for name, at in found.items() if "/" not in name or name.lstrip(".").startswith("checkpoint_")}
        if MANIFEST not in found and not _places(found):
            raise StorageError(f"{shown(uri)} is neither a checkpoint nor a run: there is none at this place.")
        mirror.fetch(kept)

    return folder


def copy_place(storage: str, name: str) -> str | None:
    """The URI of the copy of the run of that name, if storage is a URI."""
    return join(storage, name) if is_uri(storage) else None


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _in_checkpoint(name: str) -> bool:
    return any(_CHECKPOINT.match(part) for part in PurePosixPath(name).parts[:-1])


def _wave(name: str) -> int:
    """0: checkpoints' files, logs and all others; 1: the manifests; 2: what names checkpoints."""
    return 2 if name in _POINTERS else int(PurePosixPath(name).name == MANIFEST)


def _places(found: Mapping[str, Found]) -> dict[str, str]:
    """Complete checkpoints in a run, and the folder that holds each: its own, or one that stands in for it."""
    places: dict[str, str] = {}
    for name in found:
        folder, _, last = name.rpartition("/")
        if last == MANIFEST and (match := _STAND_IN.fullmatch(folder)):
            places.setdefault(match[1], folder)
        elif last == MANIFEST:
            places[folder] = folder
    return places


def _newest(found: Mapping[str, Found]) -> int:
    """Number of the newest complete checkpoint; -1: there is none."""
    return max((int(match[1]) for name in _places(found) if (match := _NUMBER.fullmatch(name))), default=-1)


def _decisions(state: bytes | None) -> int:
    try:
        value = json.loads(state or b"")
        return int(value["events_before"]) + len(value["events"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return 0


def _run_id(record: bytes | None) -> str | None:
    try:
        return str(json.loads(record or b"")["id"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _write(target: Path, content: bytes, same_run: bool) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if not same_run and target.is_file() and target.read_bytes() != content:
        target.rename(target.with_name(f"{target.name}.local"))
    replace_file(target, content)
