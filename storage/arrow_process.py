"""A process that reads and writes a file system of Arrow for another one, which can end it at any moment.

Arrow's C++ code retries and sleeps for up to minutes, deaf to signals, and keeps a process from ending. Requests come
on stdin and are carried out in parallel, answers go to stdout: each a line of JSON, followed by as many bytes as its
"size" says. The first line is the URI. The end of stdin ends the process. Only the standard library and Arrow are
loaded, so that it starts at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pyarrow import fs as filesystems

_PARALLEL = 16


class _Storage:
    """What is below one URI."""

    def __init__(self, uri: str) -> None:
        self.fs, root = filesystems.FileSystem.from_uri(uri)
        self.root = root.rstrip("/")
        # Object stores have no folders: to make one costs a request and leaves an empty object.
        self.has_folders = self.fs.type_name not in ("s3", "gcs", "abfs")

    def put(self, name: str, content: bytes) -> bytes:
        """Write a file; on a disk it is there whole or not at all."""
        target = self._path(name)
        folder, _, last = target.rpartition("/")
        written = f"{folder}/.{last}.tmp" if self.fs.type_name == "local" else target
        if self.has_folders:
            self.fs.create_dir(folder, recursive=True)
        with self.fs.open_output_stream(written) as sink:
            sink.write(content)
        if written != target:
            self.fs.move(written, target)
        return b""

    def get(self, name: str, _: bytes) -> bytes:
        """Content of a file."""
        with self.fs.open_input_stream(self._path(name)) as source:
            content: bytes = source.read()
            return content

    def list(self, name: str, _: bytes) -> bytes:
        """Name, size and time of each file below a folder, as JSON."""
        selector = filesystems.FileSelector(self._path(name), recursive=True, allow_not_found=True)
        found = [info for info in self.fs.get_file_info(selector) if info.is_file]
        cut = len(self.root) + 1
        return json.dumps([[info.path[cut:], info.size, info.mtime_ns or 0] for info in found]).encode()

    def copy(self, name: str, target: bytes) -> bytes:
        """Copy a file within the storage."""
        place = self._path(target.decode())
        if self.has_folders:
            self.fs.create_dir(place.rpartition("/")[0], recursive=True)
        self.fs.copy_file(self._path(name), place)
        return b""

    def delete(self, name: str, _: bytes) -> bytes:
        """Delete a file, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.delete_file(self._path(name))
        return b""

    def delete_folder(self, name: str, _: bytes) -> bytes:
        """Delete a folder and all below it, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.delete_dir(self._path(name))
        return b""

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}".rstrip("/")


def main() -> None:
    """Serve the process that started this one."""
    requests, answers, lock = sys.stdin.buffer, sys.stdout.buffer, threading.Lock()
    storage: _Storage | None = None

    def answer(header: dict[str, Any], content: bytes = b"") -> None:
        with lock:
            answers.write(json.dumps({**header, "size": len(content)}).encode() + b"\n" + content)
            answers.flush()

    def carry_out(request: dict[str, Any], content: bytes) -> None:
        try:
            answer({"id": request["id"]}, getattr(storage, request["do"])(request["name"], content))
        except Exception as error:  # of any kind: the other process makes a sentence of it
            kind = "missing" if isinstance(error, FileNotFoundError) else "refused"
            answer({"id": request["id"], "error": str(error) or repr(error), "kind": kind})

    try:
        storage = _Storage(json.loads(requests.readline()))
    except Exception as error:
        answer({"id": -1, "error": str(error) or repr(error), "kind": "refused"})
        return
    pool = ThreadPoolExecutor(_PARALLEL)
    while line := requests.readline():
        request = json.loads(line)
        pool.submit(carry_out, request, requests.read(request["size"]))
    os._exit(0)  # whatever still runs in C++


if __name__ == "__main__":
    main()
