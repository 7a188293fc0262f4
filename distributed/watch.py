"""How long a worker may be silent before it is told, and replaced."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

FIRST_SILENCE, LEAST_SILENCE = 300.0, 60.0
"""Seconds without a sign of life after which a worker is replaced: before any worker has played, and at least later."""

SILENCES = 10.0
"""The same, in the longest silence of a worker that went on."""

WARNING = 0.25
"""The share of it after which a silence is told."""

SampleTimeout = float | Literal["auto"] | None
"""See `MachineConfig.sample_timeout_s`."""

_log = logging.getLogger(__name__)


@dataclass
class Part:
    """Consecutive tasks of a batch, that a worker plays in one call.

    Attributes:
        since: when the call began.
        alive: when the worker gave the last sign of life.
        told: whether its silence since then was told.
    """

    tasks: range
    since: float = 0.0
    alive: float = 0.0
    told: bool = False


class Watch:
    """How long a worker may be silent, from how long others were.

    Args:
        timeout: `MachineConfig.sample_timeout_s`.
        first: seconds without a sign of life that are too many before any worker has given one.

    Attributes:
        bounds_calls: whether `timeout` is one of whole calls.
    """

    def __init__(self, timeout: SampleTimeout, first: float = FIRST_SILENCE) -> None:
        self.timeout: Any = timeout
        self._first = first
        self.bounds_calls = isinstance(timeout, int | float)
        self._longest: float | None = None

    def _silence(self) -> float:
        """Seconds without a sign of life that are too many."""
        return self._first if self._longest is None else max(LEAST_SILENCE, SILENCES * self._longest)

    def lives(self, part: Part, worker: str) -> None:
        """The worker of this name gave a sign of life."""
        now = time.perf_counter()
        if part.told:
            _log.warning("%s plays again, after %.0f s.", worker, now - part.alive)
        self._longest = max(self._longest or 0.0, now - part.alive)
        part.alive, part.told = now, False

    def is_late(self, part: Part) -> bool:
        """Whether the worker is to be replaced."""
        now = time.perf_counter()
        if self.bounds_calls:
            return bool(now - part.since >= self.timeout)
        return self.timeout is not None and now - part.alive >= self._silence()

    def tell(self, part: Part, worker: str, pid: int) -> None:
        """Warn of a silence, once.

        Args:
            part: that the worker plays.
            worker: its name.
            pid: of its process; 0: not known.
        """
        now, silence = time.perf_counter(), self._silence()
        if part.told or now - part.alive < WARNING * silence:
            return
        part.told = True
        clock = time.strftime("%H:%M:%S", time.localtime(time.time() - (now - part.alive)))
        if self.bounds_calls:
            end = f"; it is replaced when its call takes {self.timeout:g} s"
        else:
            end = "" if self.timeout is None else f"; it is replaced after {silence:.0f} s"
        name = f"{worker} (process {pid})" if pid else worker
        _log.warning("%s has given no sign of life since %s%s.", name, clock, end)

    def seconds(self, parts: Collection[Part]) -> float | None:
        """Seconds until one of these parts wants to be looked after."""
        moments = [part.alive + WARNING * self._silence() for part in parts if not part.told]
        if self.bounds_calls:
            moments += [part.since + self.timeout for part in parts]
        elif self.timeout is not None:
            moments += [part.alive + self._silence() for part in parts]
        return max(0.0, min(moments) - time.perf_counter()) if moments else None
