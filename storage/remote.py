"""Files at a URI, read and written by a process of their own (`arrow_process`), with a deadline."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from ssm_metarl.storage.uri import StorageError, for_arrow, shown

PATIENCE = 60.0
"""Seconds after which requests that are not answered count as failed, and the process that made them is ended."""

_RATE = 100e3
"""Bytes a second that any connection is taken to carry: files that are larger have more time."""

_NOISE = re.compile(r"\s*\(Request ID: [^)]*\)|;? ?Details?: .*|\. Detail: .*", re.DOTALL)
_CHILD = Path(__file__).with_name("arrow_process.py")


class Found(NamedTuple):
    """A file at a URI: its size in bytes and its time in ns by the storage's clock."""

    size: int
    time: int


class Unreachable(StorageError):
    """Storage that does not answer, or not as it should: another try may do better."""


class Remote:
    """The files below a URI of any kind that Arrow knows (s3, gs, hdfs, abfs, file).

    Every method takes what it does to all of its files at once, in parallel, and raises StorageError if one fails.

    Args:
        uri: of the folder.
        patience: seconds until requests without an answer fail.
    """

    def __init__(self, uri: str, patience: float = PATIENCE) -> None:
        self.uri, self.patience = uri, patience
        self._child: _Child | None = None
        self._closed = False
        self._lock = threading.Lock()

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def put(self, contents: Mapping[str, bytes]) -> None:
        """Write files."""
        self._all("written", [("put", name, content) for name, content in contents.items()])

    def get(self, names: Iterable[str]) -> dict[str, bytes]:
        """Contents of those files that are there."""
        names = list(names)
        answers = self._all("read", [("get", name, b"") for name in names])
        return {name: content for name, content in zip(names, answers, strict=True) if content is not None}

    def files(self, folder: str = "") -> dict[str, Found]:
        """The files below a folder, by their path below the URI."""
        (answer,) = self._all("listed", [("list", folder, b"")])
        return {name: Found(size, at) for name, size, at in json.loads(answer or b"[]")}

    def copy(self, targets: Mapping[str, str]) -> None:
        """Copy files within the storage, to the name that each maps to."""
        self._all("written", [("copy", name, target.encode()) for name, target in targets.items()])

    def delete(self, names: Iterable[str]) -> None:
        """Delete files, whether they are there or not."""
        self._all("changed", [("delete", name, b"") for name in names])

    def delete_folders(self, names: Iterable[str]) -> None:
        """Delete folders and all below them."""
        self._all("changed", [("delete_folder", name, b"") for name in names])

    def close(self) -> None:
        """End the process; requests that are under way fail, and there can be no others."""
        self._closed = True
        self._end_process()

    def _end_process(self) -> None:
        with self._lock:
            child, self._child = self._child, None
        if child:
            child.end()

    def _all(self, done: str, requests: list[tuple[str, str, bytes]]) -> list[bytes | None]:
        """The answers to requests; None for a file that is not there."""
        if not requests:
            return []
        with self._lock:
            if self._closed:
                raise Unreachable(f"{shown(self.uri)} is not used any more.")
            if self._child is None or not self._child.alive():
                self._child = _Child(for_arrow(self.uri))
            child = self._child
        futures = [child.ask(*request) for request in requests]
        until = time.monotonic() + self.patience + sum(len(content) for _, _, content in requests) / _RATE
        answers: list[bytes | None] = []
        for future in futures:
            try:
                header, content = future.result(max(until - time.monotonic(), 0))
            except TimeoutError:
                self._end_process()
                raise Unreachable(f"{shown(self.uri)} does not answer.") from None
            except BaseException:  # a signal
                self._end_process()
                raise
            if header.get("kind") == "missing" and done == "read":
                answers.append(None)
            elif "error" in header:
                raise Unreachable(f"{shown(self.uri)} cannot be {done}: {_reason(header['error'])}.")
            else:
                answers.append(content)
        return answers


class _Child:
    """A process of `arrow_process`."""

    def __init__(self, uri: str) -> None:
        # A session of its own: Ctrl-C in the terminal is for the run, which then still has its copy brought up to date.
        self._process = subprocess.Popen(
            [sys.executable, str(_CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._numbers, self._lock = itertools.count(), threading.Lock()
        self._waiting: dict[int, Future[tuple[dict[str, Any], bytes]]] = {}
        self._broken: str | None = None
        self._write(json.dumps(uri).encode() + b"\n")
        threading.Thread(target=self._read, name="storage-answers", daemon=True).start()

    def ask(self, do: str, name: str, content: bytes) -> Future[tuple[dict[str, Any], bytes]]:
        future: Future[tuple[dict[str, Any], bytes]] = Future()
        with self._lock:
            number = next(self._numbers)
            self._waiting[number] = future
            header = {"id": number, "do": do, "name": name, "size": len(content)}
            self._write(json.dumps(header).encode() + b"\n" + content)
            if self._broken is not None:
                self._fail()
        return future

    def alive(self) -> bool:
        return self._broken is None and self._process.poll() is None

    def end(self) -> None:
        self._process.kill()
        self._process.wait()

    def _write(self, message: bytes) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(message)
            self._process.stdin.flush()
        except OSError:  # it has ended; the reader says why
            pass

    def _read(self) -> None:
        stream = self._process.stdout
        assert stream is not None
        why = "the process that reads and writes it has ended"
        while line := stream.readline():
            header = json.loads(line)
            content = stream.read(header["size"])
            if header["id"] == -1:
                why = header["error"]
                break
            with self._lock:
                future = self._waiting.pop(header["id"], None)
            if future is not None:
                future.set_result((header, content))
        with self._lock:
            self._broken = why
            self._fail()
        self._process.wait()

    def _fail(self) -> None:
        for future in self._waiting.values():
            future.set_result(({"error": self._broken, "kind": "refused"}, b""))
        self._waiting.clear()


def _reason(message: str) -> str:
    """What Arrow says, without numbers that mean nothing here."""
    message = _NOISE.sub("", " ".join(message.split()))
    return shown(re.sub(r"^.*operation: (?:curlCode: \d+, )?", "", message).rstrip(". "))
