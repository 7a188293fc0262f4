"""Files and folders that are there whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def replace_file(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Write a file so that a crash at any moment leaves the old one or the new one, whole.

    Args:
        path: of the file.
        content: of it.
        mode: who may read and write it, within the process's own mask.

    Raises:
        OSError: where the disk refuses; the old file stays.
    """
    temporary = temporary_beside(path)
    try:
        with naming(path):
            write_new(temporary, content, mode)
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have an error of the disk name the file that is written: the system's own names none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def delete(path: Path) -> None:
    """Delete a file or a folder; of a folder what cannot be deleted now stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)  # what is left is deleted by the next prune
    else:
        path.unlink(missing_ok=True)


def temporary_beside(path: Path) -> Path:
    """A new hidden name in the same folder, which `prune` knows for a leftover."""
    return path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"


def write_new(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Write a file that is not there yet, to the disk itself.

    Raises:
        OSError: it is there, or the disk refuses.
    """
    with open(path, "xb", opener=lambda path, flags: os.open(path, flags, mode)) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable, where its file system knows of that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
