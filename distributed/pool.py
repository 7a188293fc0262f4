"""The pool: a meta-batch of tasks over rollout workers, or in process, with the same result to the bit."""

from __future__ import annotations

import logging
import time
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from threadpoolctl import ThreadpoolController

from ssm_metarl.algorithms.collect import blank, collect_family, played
from ssm_metarl.algorithms.rollouts import Array, Rollouts
from ssm_metarl.algorithms.spec import PolicySpec
from ssm_metarl.core import Task, TaskDistribution
from ssm_metarl.distributed.suspicion import Suspicion
from ssm_metarl.distributed.watch import Part, SampleTimeout, Watch

if TYPE_CHECKING:
    from ssm_metarl.distributed.references import RemoteRollouts, RemoteWeights
    from ssm_metarl.distributed.worker import WorkerHandle

_log = logging.getLogger(__name__)

INLINE_BYTES = 90_000
"""Shared weights below this travel with each call (Ray inlines up to 100 KiB): cheaper than a put."""


class EnvironmentFailure(RuntimeError):
    """Too many episodes are invalid, or every task is lost; the message carries a traceback where there is one."""


class Pool:
    """M tasks over n rollout workers, or in process.

    The trainer makes one for a run and calls it twice an iteration, with the meta-parameters and then with
    every task's adapted ones:

        with Pool(distribution, spec, num_workers=4, name="run/trial/0") as pool:
            support = pool.collect(weights, tasks, seeds, num_episodes=20, label="support 7")
            query = pool.collect(adapted, tasks, query_seeds, num_episodes=20, label="query 7")

    Tasks are split evenly and in order. What a task experiences depends on its seed and weights alone, so the
    result depends neither on the number of workers nor on the end of one: what a worker held that died, or gave no sign
    of life, is collected again, task by task, by whichever worker is free. A task that keeps ending workers is dropped,
    see `Suspicion`.

    Args:
        distribution: the family of the tasks.
        spec: the policy's sizes.
        num_workers: n, Ray actors of one CPU each; 0 collects in this process and needs no Ray.
        trial_episodes: episodes that follow each other in an episode slot, see `collect`.
        name: the actors are named `{name}/rollout-worker-{i}`, unique among the open pools of a driver.
        sample_timeout_s: when a worker is replaced and its tasks are played again, see `MachineConfig`. Has no effect
            in process.

    Attributes:
        restarts: workers that died or were replaced so far.
        dropped: tasks dropped so far because they kept ending workers.
        timed_out: number of tasks given up so far because one alone took longer than `sample_timeout_s`.
        ray_seconds: seconds that `collect` took so far, less its slowest worker's own sampling; 0 in
            process. Waiting for workers that start is part of it.

    Raises:
        ValueError: for a negative `num_workers`, or a `sample_timeout_s` that is not above 0.
    """

    def __init__(
        self,
        distribution: TaskDistribution,
        spec: PolicySpec,
        *,
        num_workers: int,
        trial_episodes: int = 1,
        name: str = "local",
        sample_timeout_s: SampleTimeout = "auto",
    ) -> None:
        if num_workers < 0:
            raise ValueError(f"num_workers must be 0 (in process) or more, not {num_workers}.")
        if isinstance(sample_timeout_s, int | float) and not sample_timeout_s > 0:
            raise ValueError(f'sample_timeout_s must be a positive number, "auto" or None, not {sample_timeout_s}.')
        self.restarts = 0
        self.dropped: list[Task] = []
        self.timed_out = 0
        self.ray_seconds = 0.0
        self._distribution = distribution
        self._spec = spec
        self._trial_episodes = trial_episodes
        self._watch = Watch(sample_timeout_s)
        self._suspicion = Suspicion()
        self._calls = 0
        self._put: tuple[Mapping[str, Array], Any] | None = None  # the last shared weights, their reference
        self._workers: list[WorkerHandle] = []
        self._closed = False
        if num_workers:
            from ssm_metarl.distributed.worker import WorkerHandle

            names = [f"{name}/rollout-worker-{i}" for i in range(num_workers)]
            self._workers = [WorkerHandle(worker_name, distribution, spec, trial_episodes) for worker_name in names]
        else:
            self._threads = ThreadpoolController()

    def collect(
        self,
        weights: Mapping[str, Array] | RemoteWeights,
        tasks: Sequence[Task],
        seeds: Sequence[np.random.SeedSequence],
        num_episodes: int,
        *,
        label: str = "",
        deterministic: bool = False,
        cuts: Sequence[int] = (),
    ) -> Any:
        """Play `num_episodes` episodes, or trials, of every task.

        Args:
            weights: float32 arrays by parameter name, shared by all tasks or with a leading task axis [M, …].
                Shared ones may be sent once while the same object comes: pass a new one when they changed. Remote ones
                need not be there yet.
            tasks: M tasks, one or more.
            seeds: a node of the seed tree for each task.
            num_episodes: episodes K a task.
            label: what this is for, such as "support 7", for Ray's dashboard.
            deterministic: take the most likely action instead of sampling.
            cuts: numbers of tasks, in order, before which the record is to be cut; it then stays where it was played.

        Returns:
            One record of the M tasks in their order, in writable C-contiguous arrays, or with `cuts` (and workers)
            `RemoteRollouts`. A task that was dropped or timed out has no valid step, and a sentence in `errors` names
            it.

        Raises:
            ValueError: without a task, or with another number of seeds than tasks.
            EnvironmentFailure: every task was dropped or timed out.
            RuntimeError: the pool is closed.
        """
        if self._closed:
            raise RuntimeError("This pool is closed: its workers are gone.")
        if not tasks or len(tasks) != len(seeds):
            raise ValueError(f"Tasks and as many seeds are needed, not {len(tasks)} and {len(seeds)}.")
        if not self._workers:
            arrays = weights if isinstance(weights, Mapping) else weights.fetch()
            return self._collect_in_process(arrays, tasks, seeds, num_episodes, deterministic)
        start = time.perf_counter()
        shared = isinstance(weights, Mapping) and weights["encoder.weight"].ndim == 2
        sent = self._sent_once(weights) if shared else weights  # type: ignore[arg-type]
        self._calls += 1
        batch = _Batch(
            self._calls, self._spec, sent, not shared, tasks, seeds, num_episodes, label, deterministic, cuts
        )
        batch.split(len(self._workers))
        self._play(batch)
        rollouts = batch.joined()
        self.ray_seconds += time.perf_counter() - start - max(batch.seconds.values())
        return rollouts

    def blank(self, tasks: Sequence[Task], num_episodes: int) -> Rollouts:
        """The record of tasks that are not played."""
        return blank(self._spec, tasks, num_episodes)

    def processes(self) -> list[int]:
        """Process ids of the workers, as soon as all of them run; none in process."""
        return [worker.process() for worker in self._workers]

    def close(self) -> None:
        """End the workers; the pool cannot be used any more. Closing again does nothing."""
        if self._workers:
            from ssm_metarl.distributed.worker import close_workers

            close_workers(self._workers)
        self._distribution.close()
        self._workers = []
        self._put = None
        self._closed = True

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _collect_in_process(
        self,
        weights: Mapping[str, Array],
        tasks: Sequence[Task],
        seeds: Sequence[np.random.SeedSequence],
        num_episodes: int,
        deterministic: bool,
    ) -> Rollouts:
        with self._threads.limit(limits=1, user_api="blas"):
            steps = collect_family(
                self._distribution, self._spec, weights, seeds, tasks, num_episodes, self._trial_episodes, deterministic
            )
            rollouts = played(steps)
        return _owned(rollouts)

    def _sent_once(self, weights: Mapping[str, Array]) -> Any:
        """What workers are called with for shared weights: a reference, or small ones themselves."""
        if sum(array.nbytes for array in weights.values()) < INLINE_BYTES:
            return dict(weights)
        if self._put is None or self._put[0] is not weights:
            import ray

            self._put = (weights, ray.put(dict(weights)))
        return self._put[1]

    def _play(self, batch: _Batch) -> None:
        """Hand the batch's parts to free workers until none is left."""
        from ssm_metarl.distributed.worker import ready_workers

        held: dict[WorkerHandle, Part] = {}
        try:
            while batch.waiting or held:
                batch.look_for_weights()
                for worker in self._workers:
                    if worker.call is None and (part := self._next(batch, worker)):
                        held[worker] = part
                        batch.submit(worker, part)
                # A worker that is starting or restarting matters only while something waits for it.
                called = [worker for worker in self._workers if worker.call is not None]
                awaited = called if batch.waiting else list(held)
                for worker in ready_workers(awaited, self._watch.seconds(held.values()), list(batch.missing)):
                    self._receive(batch, worker, held)
                for worker, part in list(held.items()):
                    self._look_after(batch, worker, part, held)
        finally:
            for worker in held:  # after an exception: what they still answer belongs to no batch
                worker.await_process()

    def _next(self, batch: _Batch, worker: WorkerHandle) -> Part | None:
        """The first part that waits for a worker on this node: a suspect is rather tried where it has not been."""
        nodes = self._running_nodes()
        for part in batch.waiting:
            if not batch.has_weights(part):
                continue
            if len(part.tasks) > 1 or not self._suspicion.avoided(batch.key(part), worker.node, nodes):
                batch.waiting.remove(part)
                return part
        return None

    def _running_nodes(self) -> set[str]:
        """Nodes with a worker that is not starting or restarting."""
        return {worker.node for worker in self._workers if not worker.starting}

    def _receive(self, batch: _Batch, worker: WorkerHandle, held: dict[WorkerHandle, Part]) -> None:
        """Take an answer of a worker: a sign of life, what it played, or that it has started."""
        from ssm_metarl.distributed.worker import WorkerDied

        node, part = worker.node, held.get(worker)
        try:
            answer = worker.result()
        except WorkerDied:
            if part is not None:
                del held[worker]
                self._take_back(batch, part, node)
            return
        if part is None:
            return
        self._watch.lives(part, worker.name)
        if answer is not None:
            del held[worker]
            batch.finish(part, worker, *answer)
            if len(part.tasks) == 1:
                self._suspicion.played(batch.key(part))

    def _take_back(self, batch: _Batch, part: Part, node: str) -> None:
        """Have the tasks of a worker that ended wait, one by one; drop one that keeps ending those that play it."""
        from ssm_metarl.distributed.worker import nodes_alive

        self.restarts += 1
        if len(part.tasks) == 1:
            key = batch.key(part)
            self._suspicion.ended(key, node)
            if self._suspicion.condemned(key, nodes_alive(), self._running_nodes() | {node}):
                self._suspicion.forget(key)
                self.dropped.append(batch.tasks[part.tasks.start])
                batch.lose(part.tasks.start, "was dropped: every worker that played it alone ended")
                return
        batch.waiting.extend(Part(range(i, i + 1)) for i in part.tasks)

    def _look_after(self, batch: _Batch, worker: WorkerHandle, part: Part, held: dict[WorkerHandle, Part]) -> None:
        """Tell of a worker that is silent, and replace one that is so for too long."""
        self._watch.tell(part, worker.name, worker.pid)
        if not self._watch.is_late(part):
            return
        _log.warning("%s is replaced.", worker.name)
        del held[worker]
        worker.restart()
        if not self._watch.bounds_calls or len(part.tasks) > 1:
            self._take_back(batch, part, worker.node)
            return
        self.restarts += 1
        self.timed_out += 1
        batch.lose(part.tasks.start, f"took longer than sample_timeout_s = {self._watch.timeout:g}")


@dataclass
class _Batch:
    """One call of `Pool.collect`: its arguments, what waits, what came back, what is lost."""

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

    def __post_init__(self) -> None:
        if self.remote_weights:
            self.missing.update(self.weights.needed()[1])

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
        return not self.missing or self.missing.isdisjoint(self._weights(part)[1])

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
            answer = RemoteRollouts(list(zip(ranges, references, strict=True)), summary, own)
        self.played[part.tasks.start] = answer

    def lose(self, task: int, reason: str) -> None:
        """Have an empty record in the place of a task, and say why."""
        self.lost[task] = f"Task {task}, {self.tasks[task]!r}, {reason}."
        _log.warning(self.lost[task])

    def joined(self) -> Rollouts | RemoteRollouts:
        """The record of all tasks, in order.

        Raises:
            EnvironmentFailure: all are lost.
        """
        if not self.played:
            raise EnvironmentFailure(f"Every task was lost. {next(iter(self.lost.values()))}")
        parts = dict(self.played)
        for i, reason in self.lost.items():
            parts[i] = blank(self.spec, [self.tasks[i]], self.num_episodes, [reason])
        if not self.cuts:
            return _owned(Rollouts.concatenate([parts[start] for start in sorted(parts)]))
        from ssm_metarl.distributed.references import RemoteRollouts

        for i in self.lost:
            parts[i] = RemoteRollouts.put(parts[i], range(i, i + 1))
        return RemoteRollouts.concatenate([parts[start] for start in sorted(parts)])


def _owned(rollouts: Rollouts) -> Rollouts:
    """The same in writable arrays of C order.

    Ray's arrays are read-only, and the order of an array in memory decides the last bits of a sum over it.
    """
    names = [f.name for f in fields(rollouts) if f.name not in ("tasks", "errors")]
    arrays = {name: np.require(getattr(rollouts, name), requirements=["C", "W"]) for name in names}
    return replace(rollouts, **arrays)
