"""What a pool is asked to play: tasks with weights and seeds, and what became of them."""

from __future__ import annotations

import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from ssm_metarl.algorithms.collect import blank
from ssm_metarl.algorithms.rollouts import Rollouts
from ssm_metarl.algorithms.spec import PolicySpec
from ssm_metarl.core import Task
from ssm_metarl.distributed.watch import Part

if TYPE_CHECKING:
    from ssm_metarl.distributed.references import RemoteRollouts
    from ssm_metarl.distributed.worker import WorkerHandle

_log = logging.getLogger(__name__)


class EnvironmentFailure(RuntimeError):
    """Too many episodes are invalid, or every task is lost; the message carries a traceback where there is one."""


@dataclass
class Play:
    """One call of `Pool.collect`, or a stage of it: its arguments, what waits, what came back, what is lost.

    Attributes:
        arrived: called with the tasks of a part that came back, or was lost.
        enough: tasks that must have been played before the others are given up; None: all.
        empty: records of tasks that were lost, or not played, by number.
    """

    number: int
    spec: PolicySpec
    weights: Any
    per_task: bool
    tasks: Sequence[Task]
    seeds: Sequence[np.random.SeedSequence]
    num_episodes: int
    label: str
    deterministic: bool
    cuts: Sequence[int]
    waiting: deque[Part] = field(default_factory=deque)
    played: dict[int, Any] = field(default_factory=dict)  # by the number of the part's first task
    lost: dict[int, str] = field(default_factory=dict)  # by the number of the task
    seconds: defaultdict[Any, float] = field(default_factory=lambda: defaultdict(float))  # own sampling, by worker
    missing: set[Any] = field(default_factory=set)  # references to weights that nobody has computed yet
    arrived: Callable[[range], None] = lambda tasks: None
    empty: dict[int, Any] = field(default_factory=dict)
    enough: int | None = None

    def __post_init__(self) -> None:
        if self.remote_weights:
            self.missing.update(each for each in self.weights.needed()[1] if each is not None)

    @property
    def remote_weights(self) -> bool:
        """Whether the weights are references to each shard's."""
        return self.per_task and not isinstance(self.weights, Mapping)

    def look_for_weights(self) -> None:
        """Find out which of the missing weights are there by now."""
        if self.missing:
            from ssm_metarl.distributed.worker import in_store

            self.missing -= in_store(list(self.missing))

    def has_weights(self, part: Part) -> bool:
        """Whether the weights of the part's tasks are there."""
        if not self.remote_weights:
            return True
        references = self._weights(part)[1]
        return None not in references and self.missing.isdisjoint(references)

    def give_weights(self, shard: int, reference: Any) -> None:
        """Tell where the weights of a shard will be."""
        self.weights.references[shard] = reference
        self.missing.add(reference)

    def skip(self, task: int) -> None:
        """Play one task less, that no worker has yet."""
        for part in [part for part in self.waiting if task in part.tasks]:
            self.waiting.remove(part)
            pieces = (range(part.tasks.start, task), range(task + 1, part.tasks.stop))
            self.waiting.extend(Part(piece) for piece in pieces if piece)
        self._leave_out(task)

    def _leave_out(self, task: int, *errors: str) -> None:
        """Have an empty record in the place of a task."""
        record = blank(self.spec, [self.tasks[task]], self.num_episodes, errors)
        self.empty[task] = remote(record, range(task, task + 1)) if self.cuts else record
        self.arrived(range(task, task + 1))

    @property
    def has_enough(self) -> bool:
        """Whether those that still play are to be given up."""
        return self.enough is not None and sum(part.num_tasks for part in self.played.values()) >= self.enough

    def of_shard(self, shard: slice) -> RemoteRollouts | None:
        """The record of a shard (with `cuts` at its borders), once all of its tasks have arrived."""
        parts = [part for i in range(shard.start, shard.stop) if (part := self.played.get(i) or self.empty.get(i))]
        if sum(part.num_tasks for part in parts) < shard.stop - shard.start:
            return None
        return joined(parts)  # type: ignore[return-value]

    def _weights(self, part: Part) -> tuple[Any, Sequence[Any]]:
        """What a worker is called with for weights: first, and last."""
        own = slice(part.tasks.start, part.tasks.stop)
        if self.remote_weights:
            return self.weights.select(own).needed()
        return {name: value[own] for name, value in self.weights.items()} if self.per_task else self.weights, ()

    def key(self, part: Part) -> tuple[int, int]:
        """The name of a part's first task, also beside those of other calls."""
        return self.number, part.tasks.start

    def split(self, workers: int) -> None:
        """Let parts of equal size (to one task) wait, at most one a worker."""
        count = min(workers, len(self.tasks))
        borders = [len(self.tasks) * i // count for i in range(count + 1)]
        self.waiting.extend(Part(range(*pair)) for pair in pairwise(borders))

    def submit(self, worker: WorkerHandle, part: Part) -> None:
        """Call the worker with this part's share of the arguments."""
        own = slice(part.tasks.start, part.tasks.stop)
        weights, shards = self._weights(part)
        title = f"collect {self.label}, {len(part.tasks)} tasks"
        part.since = part.alive = time.perf_counter()
        fixed = (weights, self.tasks[own], self.seeds[own], self.num_episodes, self.deterministic)
        worker.submit(title, *fixed, self._cuts(part.tasks), *shards)

    def _cuts(self, tasks: range) -> list[int]:
        """Where a worker is to cut the record of these tasks, from 0 to their number; empty: nowhere."""
        if not self.cuts:
            return []
        within = [cut - tasks.start for cut in self.cuts if tasks.start < cut < tasks.stop]
        return [0, *within, len(tasks)]

    def finish(self, part: Part, worker: WorkerHandle, answer: Any, seconds: float) -> None:
        """Keep what a worker returned."""
        self.seconds[worker] += seconds
        if self.cuts:
            from ssm_metarl.distributed.references import RemoteRollouts

            summary, references = answer
            ranges = [part.tasks[first:last] for first, last in pairwise(self._cuts(part.tasks))]
            own = tuple(self.tasks[i] for i in part.tasks)
            record = RemoteRollouts(list(zip(ranges, references, strict=True)), summary, own)
            self.played |= {piece.pieces[0][0].start: piece for piece in record.split()}
        else:
            self.played[part.tasks.start] = answer
        self.arrived(part.tasks)

    def lose(self, task: int, reason: str) -> None:
        """Have an empty record in the place of a task, and say why."""
        self.lost[task] = f"Task {task}, {self.tasks[task]!r}, {reason}."
        _log.warning(self.lost[task])
        self._leave_out(task, self.lost[task])

    def joined(self) -> Rollouts | RemoteRollouts:
        """The record of all tasks, in order.

        Raises:
            EnvironmentFailure: all are lost.
        """
        if not self.played:
            raise EnvironmentFailure(f"Every task was lost. {next(iter(self.lost.values()), '')}".rstrip())
        parts = self.played | self.empty
        return joined([parts[start] for start in sorted(parts)])


def joined(parts: Sequence[Rollouts] | Sequence[RemoteRollouts]) -> Rollouts | RemoteRollouts:
    """The record of all parts, in order, in writable arrays of C order, or references to it.

    Ray's arrays are read-only, and the order of an array in memory decides the last bits of a sum over it.
    """
    if not isinstance(parts[0], Rollouts):
        return type(parts[0]).concatenate(parts)  # type: ignore[arg-type]
    return owned(Rollouts.concatenate(parts))  # type: ignore[arg-type]


def remote(record: Rollouts, tasks: range) -> RemoteRollouts:
    """A record in the object store."""
    from ssm_metarl.distributed.references import RemoteRollouts

    return RemoteRollouts.put(record, tasks)


def owned(rollouts: Rollouts) -> Rollouts:
    """The same in writable arrays of C order."""
    arrays = {name: np.require(array, requirements=["C", "W"]) for name, array in rollouts.arrays().items()}
    return replace(rollouts, **arrays)
