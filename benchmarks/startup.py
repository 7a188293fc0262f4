"""Seconds from a command to its answer, and from `app` to the web interface's first page, each in a new process.

python benchmarks/startup.py
"""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}

import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from _report import log, report

APP = """
import sys
from pathlib import Path
from ssm_metarl.app.server import serve
print("imported", flush=True)
serve("127.0.0.1", int(sys.argv[1]), Path(sys.argv[2]), None, lambda line: print(line, flush=True))
"""

COMMANDS: Mapping[str, Sequence[str]] = {
    "`--help`": ["--help"],
    "`train --help`": ["train", "--help"],
    "`plot RUN`": ["plot", "RUN"],
    "`evaluate pretrained:cartpole`": ["evaluate", "pretrained:cartpole"],
    "`adapt pretrained:cartpole`": ["adapt", "pretrained:cartpole", "--out", "OUT"],
}
"""What is typed, with the names of two folders."""

IMPORTS, PAGE = "`app`: its imports", "`app`: from there to its first page"

GOALS = {"`--help`": 1.0, "`plot RUN`": 1.0, "`evaluate pretrained:cartpole`": 3.0}
"""Most seconds."""


@dataclass(frozen=True)
class Options:
    """Start each of them in a new process, in turns.

    Attributes:
        repetitions: measured turns; one that is not measured goes before.
    """

    repetitions: int = 5


def main(options: Options) -> dict[str, Any]:
    """A row a command: median and least seconds, and of the processor."""
    seconds: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        small = ["--iterations", "2", "--meta-batch", "2", "--episodes", "2", "--num-workers", "0", "--eval-tasks", "2"]
        _ended([sys.executable, "-m", "ssm_metarl", "train", *small, "--run-dir", str(run)])
        for turn in range(-1, options.repetitions):
            log(f"turn {turn + 1} of {options.repetitions}")
            places = {"RUN": str(run), "OUT": f"{folder}/out"}
            found = {name: _command(words, places) for name, words in COMMANDS.items()}
            found |= _first_page(folder)
            if turn >= 0:
                for name, value in found.items():
                    seconds.setdefault(name, []).append(value)
    rows = [
        {
            "name": name,
            "cells": [round(value, 2) or None for value in (statistics.median(wall), min(wall), min(processor))],
        }
        for name, values in seconds.items()
        for wall, processor in [tuple(zip(*values, strict=True))]
    ]
    columns = ["median", "least", "of the processor"]
    goals = [
        {"row": row["name"], "column": "median", "bound": GOALS[row["name"]], "most": True, "mean": row["cells"][0]}
        for row in rows
        if row["name"] in GOALS
    ]
    goals = [{**goal, "met": goal["mean"] <= goal["bound"]} for goal in goals]
    return {"title": "Seconds until a command answers", "columns": columns, "rows": rows, "goals": goals}


def _command(words: Sequence[str], places: Mapping[str, str]) -> tuple[float, float]:
    shutil.rmtree(places["OUT"], ignore_errors=True)
    return _ended([sys.executable, "-m", "ssm_metarl", *(places.get(word, word) for word in words)])


def _ended(words: Sequence[str]) -> tuple[float, float]:
    """Seconds that a process takes, and those of the processor."""
    begin, before = time.perf_counter(), os.times()
    subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    after = os.times()
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - begin, processor


def _first_page(runs: str) -> dict[str, tuple[float, float]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    begin = time.perf_counter()
    words = [sys.executable, "-c", APP, str(port), runs]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            process.stdout.readline()
            imported = time.perf_counter()
            process.stdout.readline()  # where the page is
            urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=60).read()
            page = time.perf_counter()
        finally:
            process.terminate()
    return {IMPORTS: (imported - begin, 0.0), PAGE: (page - imported, 0.0)}


if __name__ == "__main__":
    report("startup", main(tyro.cli(Options, description=__doc__)))
