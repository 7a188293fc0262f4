"""What the benchmarks share: timing in turns, facts about the machine, log on stderr, result on stdout."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any


def log(message: str) -> None:
    """Say on stderr what is going on."""
    print(message, file=sys.stderr, flush=True)


def report(benchmark: str, result: Mapping[str, Any]) -> None:
    """Print the result, with the machine it was measured on, as the one JSON object on stdout."""
    print(json.dumps({"benchmark": benchmark, **result, "machine": machine()}, indent=2))


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
        For each name ``median`` and ``min`` seconds.
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
    """``median`` and ``min``."""
    return {"median": statistics.median(values), "min": min(values)}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
