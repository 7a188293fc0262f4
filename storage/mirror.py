"""A run's folder at a URI such as `s3://bucket/runs/name`, kept like the local one: a lost head leaves it behind."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pyarrow import ArrowException
from pyarrow import fs as filesystems

from ssm_metarl.storage.contents import MANIFEST


def is_uri(place: object) -> bool:
    """Whether a place is a URI and not a path."""
    return "://" in str(place)


class Mirror:
    """The copy of a local folder at a URI of any kind that Arrow knows (s3, gs, hdfs, file).

    Whoever writes the folder brings the copy up to date; whoever resumes the run elsewhere fetches it:

        mirror = Mirror(run, "s3://bucket/runs/run")
        if resume:
            mirror.pull()
        ...
        mirror.push()

    Args:
        local: the folder.
        uri: of its copy.
        skip: paths in the folder that are not copied.

    Raises:
        ValueError: no file system answers to the URI; one sentence.
    """

    def __init__(self, local: Path, uri: str, skip: Sequence[str] = ()) -> None:
        self.local, self.uri, self._skip = Path(local), uri.rstrip("/"), tuple(skip)
        try:
            self._fs, self._root = filesystems.FileSystem.from_uri(self.uri)
        except (ArrowException, OSError, ValueError) as error:
            raise ValueError(f"{uri} cannot be used as storage: {error}.") from None
        self._sent: dict[str, tuple[int, int]] = {}  # time and size of what was copied, by path in the folder

    def push(self) -> None:
        """Copy what is new or changed, then delete what is gone.

        A checkpoint's manifest is copied after its other files, and everything that names checkpoints after these: at
        any moment the copy is one from which a run can resume.

        Raises:
            OSError: the storage refuses.
        """
        files = self._files()
        changed = [name for name, stamp in files.items() if self._sent.get(name) != stamp]
        for name in sorted(changed, key=lambda name: (not _in_checkpoint(name), name.endswith(MANIFEST), name)):
            self._send(self.local / name, name)
        for name in sorted(set(self._sent) - set(files), key=lambda name: not name.endswith(MANIFEST)):
            self._delete(name)  # the manifest first: without it there is no checkpoint
        self._sent = files

    def pull(self) -> bool:
        """Make the local folder equal to the copy; False, and nothing is done, where there is no copy.

        Raises:
            OSError: the storage refuses.
        """
        names = self.fetch()
        for name in set(self._files()) - set(names) if names else ():
            (self.local / name).unlink()
        self._sent = self._files() if names else {}
        return bool(names)

    def fetch(self, folder: str = "") -> list[str]:
        """Copy the files of a folder of the copy to the local one; their paths in the whole."""
        found = self._list(f"{self._root}/{folder}".rstrip("/"))
        names = [info.path[len(self._root) :].lstrip("/") for info in found if info.is_file]
        names = [name for name in names if not self._skipped(name)]
        for name in names:
            target = self.local / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with self._fs.open_input_stream(f"{self._root}/{name}") as source:
                target.write_bytes(source.read())
        return names

    def keep(self, folder: str, names: Sequence[str]) -> None:
        """Delete the folders in `folder` of the copy that are not named."""
        for info in self._list(f"{self._root}/{folder}", recursive=False):
            if info.base_name not in names:
                self._fs.delete_dir(info.path)

    def _list(self, place: str, recursive: bool = True) -> list[Any]:
        selector = filesystems.FileSelector(place, recursive=recursive, allow_not_found=True)
        listed: list[Any] = self._fs.get_file_info(selector)
        return listed

    def _send(self, path: Path, name: str) -> None:
        target = f"{self._root}/{name}"
        self._fs.create_dir(target.rpartition("/")[0], recursive=True)
        with path.open("rb") as source, self._fs.open_output_stream(target) as sink:
            sink.write(source.read())

    def _delete(self, name: str) -> None:
        target = f"{self._root}/{name}"
        if self._fs.get_file_info(target).type == filesystems.FileType.File:
            self._fs.delete_file(target)
        parent = target.rpartition("/")[0]
        if parent != self._root and not self._list(parent):
            self._fs.delete_dir(parent)

    def _files(self) -> dict[str, tuple[int, int]]:
        """Time and size of what belongs to the copy, by path in the folder."""
        files = {}
        for path in self.local.rglob("*"):
            name = path.relative_to(self.local).as_posix()
            hidden = any(part.startswith(".") for part in Path(name).parts)
            if path.is_file() and not hidden and not self._skipped(name):
                stat = path.stat()
                files[name] = (stat.st_mtime_ns, stat.st_size)
        return files

    def _skipped(self, name: str) -> bool:
        return any(name == skip or name.startswith(skip + "/") for skip in self._skip)


def write_folder(place: str, write: Callable[[Path], object]) -> None:
    """Have a folder written at a path or a URI.

    Args:
        place: of the folder.
        write: writes it at the path that it is given.
    """
    if not is_uri(place):
        write(Path(place))
        return
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / place.rpartition("/")[2]
        write(folder)
        Mirror(folder, place).push()


def local_folder(place: str, parent: Path) -> Path:
    """A folder as a path: itself, or a copy of it in `parent` if it is at a URI.

    Raises:
        FileNotFoundError: there is nothing at the URI.
    """
    if not is_uri(place):
        return Path(place)
    folder = parent / place.rstrip("/").rpartition("/")[2]
    if not Mirror(folder, place).pull():
        raise FileNotFoundError(f"There is nothing at {place}.")
    return folder


def _in_checkpoint(name: str) -> bool:
    return any(part.startswith(("checkpoint_", "generation_", "start")) for part in Path(name).parts[:-1])
