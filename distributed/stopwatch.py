"""Where an iteration's time goes, and what happened to its workers meanwhile."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ssm_metarl.distributed.pool import Pool


class Stopwatch:
    """Seconds of an iteration by phase; the time that Ray takes of sampling is a phase of its own:

        watch = Stopwatch(pool)
        with watch("sample"):
            pool.collect(...)
        watch.seconds()  # {"sample": ..., "adapt": ..., "update": ..., "ray": ..., "total": ...}

    Args:
        pool: that collects the iteration's rollouts.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool, self._begin = pool, time.perf_counter()
        self._ray, self._dropped, self._timed_out = pool.ray_seconds, len(pool.dropped), pool.timed_out
        self._seconds = {"sample": 0.0, "adapt": 0.0, "update": 0.0}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count what follows to a phase."""
        start = time.perf_counter()
        yield
        self._seconds[phase] += time.perf_counter() - start

    def seconds(self) -> dict[str, float]:
        """Seconds so far by phase, and in all."""
        ray = self._pool.ray_seconds - self._ray
        sample = self._seconds["sample"] - ray
        return {**self._seconds, "sample": sample, "ray": ray, "total": time.perf_counter() - self._begin}

    def losses(self) -> dict[str, Any]:
        """`restarts` of workers so far, and the iteration's number of `timed_out_tasks`."""
        return {
            "restarts": self._pool.restarts,
            "timed_out_tasks": self._pool.timed_out - self._timed_out,
        }

    def dropped_tasks(self) -> list[dict[str, Any]]:
        """The parameters of tasks that were given up in the iteration."""
        return self._pool.dropped[self._dropped :]
