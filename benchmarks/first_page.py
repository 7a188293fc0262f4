"""Seconds from the command `app` to the web interface's first page, with and without imports.

python benchmarks/first_page.py
"""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass

import tyro
from _report import log, report, summary

PROGRAM = """
import sys
from pathlib import Path
from ssm_metarl.app.server import serve
print("imported", flush=True)
serve("127.0.0.1", int(sys.argv[1]), Path(sys.argv[2]), None, lambda line: print(line, flush=True))
"""


@dataclass(frozen=True)
class Options:
    """Start the app in a new process, again and again, and fetch its page.

    Attributes:
        repetitions: starts.
    """

    repetitions: int = 5


def main(options: Options) -> None:
    seconds: dict[str, list[float]] = {"imports": [], "first_page": []}
    for repetition in range(options.repetitions):
        log(f"start {repetition + 1} of {options.repetitions}")
        for name, value in _start().items():
            seconds[name].append(value)
    report("first_page", {"seconds": {name: summary(values) for name, values in seconds.items()}})


def _start() -> dict[str, float]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as runs:
        begin = time.perf_counter()
        words = [sys.executable, "-c", PROGRAM, str(port), runs]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            try:
                process.stdout.readline()
                imported = time.perf_counter()
                process.stdout.readline()  # where the page is
                urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=60).read()
                return {"imports": imported - begin, "first_page": time.perf_counter() - imported}
            finally:
                process.terminate()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
