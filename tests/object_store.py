"""An S3 server of this process on the loopback address (moto), and a proxy before it that fails on demand."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from moto.server import ThreadedMotoServer
from werkzeug.serving import WSGIRequestHandler

BUCKET = "bucket"

Fault = Literal["none", "refuse", "stall", "late"]


@dataclass
class ObjectStore:
    """A running server.

    Attributes:
        port: of it.
        lines: first lines of the requests so far.
    """

    port: int
    lines: list[str] = field(default_factory=list)

    def uri(self, path: str, port: int | None = None, user: str = "key:secret") -> str:
        """The URI of something in the bucket, by way of a port."""
        query = f"endpoint_override=127.0.0.1:{port or self.port}&scheme=http&region=us-east-1"
        return f"s3://{user}@{BUCKET}/{path}?{query}"

    def writes(self) -> list[str]:
        """Names that were written or deleted, in order."""
        return [line for line in self.lines if line.split()[0] in ("PUT", "POST", "DELETE")]


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """Run the server with an empty bucket."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    store = ObjectStore(server.get_host_and_port()[1])
    before = WSGIRequestHandler.log_request
    WSGIRequestHandler.log_request = lambda handler, *_: store.lines.append(handler.requestline)  # type: ignore[method-assign]
    try:
        request = urllib.request.Request(f"http://127.0.0.1:{store.port}/{BUCKET}", method="PUT")
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request).close()
        yield store
    finally:
        WSGIRequestHandler.log_request = before  # type: ignore[method-assign]
        server.stop()


class Proxy:
    """A port that leads to another one, with faults.

    Attributes:
        fault: "refuse" ends connections at once, "stall" never answers, "late" answers after `delay` seconds.
        writes_left: requests that write and still get through, if not None; then it refuses all.
    """

    def __init__(self, target: int) -> None:
        self.fault: Fault = "none"
        self.delay = 0.2
        self.writes_left: int | None = None
        self._target, self._loop = target, asyncio.new_event_loop()
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready.set,), daemon=True)
        self._thread.start()
        assert ready.wait(10)

    def end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _run(self, ready: Callable[[], None]) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        ready()
        self._loop.run_forever()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            there, back = await asyncio.open_connection("127.0.0.1", self._target)
            answers = asyncio.ensure_future(self._copy(there, writer))
            try:
                while line := await reader.readline():
                    head = [line]
                    while (line := await reader.readline()).strip():
                        head.append(line)
                    if not await self._lets_through(head[0]):
                        break
                    back.write(b"".join(head) + b"\r\n")  # the body comes when the server says so
                    back.write(await self._body(reader, b"".join(head[1:]).lower()))
                    await back.drain()
            finally:
                answers.cancel()
                back.close()
        writer.close()

    async def _body(self, reader: asyncio.StreamReader, head: bytes) -> bytes:
        if b"transfer-encoding: chunked" not in head:
            found = re.search(rb"content-length: *(\d+)", head)
            return await reader.readexactly(int(found[1]) if found else 0)
        body, size = b"", 1
        while size:
            line = await reader.readline()
            size = int(line, 16)
            body += line + (await reader.readexactly(size + 2) if size else b"")
        while (line := await reader.readline()).strip():
            body += line
        return body + line

    async def _lets_through(self, line: bytes) -> bool:
        if self.fault == "stall":
            await asyncio.sleep(60)
        if self.fault == "late":
            await asyncio.sleep(self.delay)
        if self.writes_left is not None and line.split()[0] in (b"PUT", b"POST", b"DELETE"):
            self.writes_left -= 1
            if self.writes_left < 0:
                self.fault = "refuse"
        return self.fault not in ("refuse", "stall")

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while content := await reader.read(2**16):
                writer.write(content)
                await writer.drain()


@contextmanager
def proxy(store: ObjectStore) -> Iterator[Proxy]:
    """Run a proxy before the server."""
    found = Proxy(store.port)
    try:
        yield found
    finally:
        found.end()
