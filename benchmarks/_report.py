"""What the benchmarks share: timing in turns, facts about the machine, log on stderr, result on stdout."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any


def log(message: str) -> None:
    """Say on stderr what is going on."""
    print(message, file=sys.stderr, flush=True)


def report(benchmark: str, result: Mapping[str, Any]) -> None:
    """Print the result as the one JSON object on stdout, with what made it: command, commit and machine."""
    made = {"command": command(), "commit": commit(), "date": date.today().isoformat(), "machine": machine()}
    print(json.dumps({"benchmark": benchmark, **made, **result}, indent=1))


def command() -> str:
    """The command line, as one types it in the project's folder."""
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def commit() -> str | None:
    """The commit of the project's folder, with a "+" where files but results differ from it; None without one."""

    def git(*words: str) -> str:
        found = ["git", "-C", str(Path(__file__).parents[1]), *words]
        return subprocess.run(found, capture_output=True, text=True, check=False).stdout.strip()

    name = git("describe", "--always", "--abbrev=10", "--exclude=*")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)benchmarks/results")
    return f"{name}{'+' * bool(changed)}" or None


def kept_runs(path: Path) -> dict[str, dict[str, Any]]:
    """The lines of a file of runs, by their job; without one whose writing was cut short."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return {run["job"]: run for run in (json.loads(line) for line in lines if line.endswith("\n"))}


def keep_run(path: Path, job: str, at: str | None, result: Mapping[str, Any]) -> dict[str, Any]:
    """Append a run's line to a file, from which it is read the next time.

    Args:
        path: of the file.
        job: a name that says all that changes the result but the code.
        at: the commit of the code that did it.
        result: JSON values.

    Returns:
        The line's values.
    """
    run = {"job": job, "commit": at, **result}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(end - 1, 0))
        if file.read(1) not in (b"", b"\n"):  # a line that was cut short goes
            file.truncate(path.read_bytes().rfind(b"\n") + 1)
        file.write(json.dumps(run).encode() + b"\n")
    return run


def machine() -> dict[str, Any]:
    """Processor, versions, and the load: above the benchmark's own threads it makes timings worthless."""
    return {
        "cpu": _processor(),
        "cpu_count": len(os.sched_getaffinity(0)),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "numpy", "ray")},
    }


def timings(works: Mapping[str, Callable[[], object]], repetitions: int) -> dict[str, dict[str, float]]:
    """Time pieces of work in turns (A B C A B C …), so that all meet the same disturbances.

    Args:
        works: by name.
        repetitions: measured turns; one that is not measured goes before.

    Returns:
        For each name `median` and `min` seconds.
    """
    for work in works.values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repetitions):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    return {name: summary(values) for name, values in seconds.items()}


def summary(values: list[float]) -> dict[str, float]:
    """`median` and `min`."""
    return {"median": statistics.median(values), "min": min(values)}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
