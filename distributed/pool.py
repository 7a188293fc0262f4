"""The pool: a meta-batch of tasks over rollout workers, or in process, with the same result to the bit."""

from __future__ import annotations

import time
from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from threadpoolctl import ThreadpoolController

from ssm_metarl.algorithms.collect import collect_tasks
from ssm_metarl.algorithms.rollouts import Array, Rollouts
from ssm_metarl.algorithms.spec import PolicySpec
from ssm_metarl.core import Task, TaskDistribution

if TYPE_CHECKING:
    from ssm_metarl.distributed.worker import WorkerHandle

MAX_DEATHS = 3
"""A task held by a worker at this many deaths in one call is taken to be their cause, and dropped."""

INLINE_BYTES = 90_000
"""Shared weights below this travel with each call (Ray inlines up to 100 KiB): cheaper than a put."""


class Pool:
    """M tasks over n rollout workers, or in process.

    The trainer makes one for a run and calls it twice an iteration, with the meta-parameters and then with
    every task's adapted ones:

        with Pool(distribution, spec, num_workers=4, name="run/trial/0") as pool:
            support = pool.collect(weights, tasks, seeds, num_episodes=20, label="support 7")
            query = pool.collect(adapted, tasks, query_seeds, num_episodes=20, label="query 7")

    Tasks are split evenly and in order. What a task experiences depends on its seed and weights alone, so the
    result depends neither on the number of workers nor on a worker's death: what the worker held is collected
    again, task by task, by whichever worker is free.

    Args:
        distribution: the family of the tasks.
        spec: the policy's sizes.
        num_workers: n, Ray actors of one CPU each; 0 collects in this process and needs no Ray.
        trial_episodes: episodes that follow each other in an episode slot, see `collect`.
        name: the actors are named `{name}/rollout-worker-{i}`, unique among the open pools of a driver.
        sample_timeout_s: seconds after which a worker is replaced and the tasks that it holds are given up;
            None: never. When it fires, the run is no longer reproducible. Has no effect in process.

    Attributes:
        restarts: workers that died or were replaced so far.
        dropped: tasks dropped so far because they killed `MAX_DEATHS` workers.
        timed_out: number of tasks given up so far because of `sample_timeout_s`.
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
        sample_timeout_s: float | None = None,
    ) -> None:
        if num_workers < 0:
            raise ValueError(f"num_workers must be 0 (in process) or more, not {num_workers}.")
        if sample_timeout_s is not None and not sample_timeout_s > 0:
            raise ValueError(f"sample_timeout_s must be a positive number or None, not {sample_timeout_s}.")
        self.restarts = 0
        self.dropped: list[Task] = []
        self.timed_out = 0
        self.ray_seconds = 0.0
        self._distribution = distribution
        self._spec = spec
        self._trial_episodes = trial_episodes
        self._timeout_s = sample_timeout_s
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
        weights: Mapping[str, Array],
        tasks: Sequence[Task],
        seeds: Sequence[np.random.SeedSequence],
        num_episodes: int,
        *,
        label: str = "",
        deterministic: bool = False,
    ) -> Rollouts:
        """Play `num_episodes` episodes, or trials, of every task.

        Args:
            weights: float32 arrays by parameter name, shared by all tasks or with a leading task axis [M, …].
                Shared ones may be sent once while the same object comes: pass a new one when they changed.
            tasks: M tasks, one or more.
            seeds: a node of the seed tree for each task.
            num_episodes: episodes K a task.
            label: what this is for, such as "support 7", for Ray's dashboard.
            deterministic: take the most likely action instead of sampling.

        Returns:
            One record of the M tasks in their order, in writable C-contiguous arrays. A task that was dropped
            or timed out has no valid step, and a sentence in `errors` names it.

        Raises:
            ValueError: without a task, or with another number of seeds than tasks.
            RuntimeError: when every task was dropped or timed out; when the pool is closed.
        """
        if self._closed:
            raise RuntimeError("This pool is closed: its workers are gone.")
        if not tasks or len(tasks) != len(seeds):
            raise ValueError(f"Tasks and as many seeds are needed, not {len(tasks)} and {len(seeds)}.")
        if not self._workers:
            return self._collect_in_process(weights, tasks, seeds, num_episodes, deterministic)
        start = time.perf_counter()
        per_task = weights["encoder.weight"].ndim == 3
        sent = weights if per_task else self._sent_once(weights)
        batch = _Batch(sent, per_task, tasks, seeds, num_episodes, label, deterministic)
        batch.split(len(self._workers))
        self._play(batch)
        rollouts = batch.joined()
        self.ray_seconds += time.perf_counter() - start - max(batch.seconds.values())
        return rollouts

    def processes(self) -> list[int]:
        """Process ids of the workers, as soon as all of them run; none in process."""
        return [worker.process() for worker in self._workers]

    def close(self) -> None:
        """End the workers; the pool cannot be used any more. Closing again does nothing."""
        for worker in self._workers:
            worker.close()
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
        family = self._distribution
        with self._threads.limit(limits=1, user_api="blas"):
            rollouts = collect_tasks(
                family.make_vector_env,
                self._spec,
                weights,
                seeds,
                tasks,
                num_episodes,
                family.horizon,
                trial_episodes=self._trial_episodes,
                deterministic=deterministic,
            )
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

        held: dict[WorkerHandle, _Part] = {}
        try:
            while batch.waiting or held:
                for worker in self._workers:
                    if batch.waiting and worker.call is None:
                        held[worker] = batch.waiting.popleft()
                        batch.submit(worker, held[worker])
                # A worker that is starting or restarting matters only while something waits for it.
                awaited = self._workers if batch.waiting else list(held)
                done = ready_workers(awaited, self._time_left(held))
                for worker in done:
                    self._receive(batch, worker, held.pop(worker, None))
                if not done:
                    self._give_up_late(batch, held)
        finally:
            for worker in held:  # after an exception: what they still answer belongs to no batch
                worker.await_process()

    def _receive(self, batch: _Batch, worker: WorkerHandle, part: _Part | None) -> None:
        """Take the answer of a worker that played `part`, or (None) that has started."""
        from ssm_metarl.distributed.worker import WorkerDied

        try:
            answer = worker.result()
        except WorkerDied:
            if part is not None:
                self.restarts += 1
                self.dropped += batch.blame(part)
        else:
            if part is not None:
                batch.finish(part, worker, *answer)

    def _time_left(self, held: Mapping[WorkerHandle, _Part]) -> float | None:
        """Seconds until the first part held is late."""
        if self._timeout_s is None or not held:
            return None
        since = min(part.since for part in held.values())
        return max(0.0, since + self._timeout_s - time.perf_counter())

    def _give_up_late(self, batch: _Batch, held: dict[WorkerHandle, _Part]) -> None:
        """Replace the workers that took longer than `sample_timeout_s`."""
        assert self._timeout_s is not None
        latest = time.perf_counter() - self._timeout_s
        for worker in [worker for worker, part in held.items() if part.since <= latest]:
            part = held.pop(worker)
            worker.restart()
            self.restarts += 1
            self.timed_out += len(part.tasks)
            for i in part.tasks:
                batch.lose(i, f"took longer than sample_timeout_s = {self._timeout_s:g}")


@dataclass
class _Part:
    """Consecutive tasks of a batch, that a worker plays in one call, and when the call began."""

    tasks: range
    since: float = 0.0


@dataclass
class _Batch:
    """One call of `Pool.collect`: its arguments, what waits, what came back, whom deaths are blamed on."""

    weights: Any
    per_task: bool
    tasks: Sequence[Task]
    seeds: Sequence[np.random.SeedSequence]
    num_episodes: int
    label: str
    deterministic: bool
    waiting: deque[_Part] = field(default_factory=deque)
    played: dict[int, Rollouts] = field(default_factory=dict)  # by the number of the part's first task
    lost: dict[int, str] = field(default_factory=dict)  # by the number of the task
    deaths: Counter[int] = field(default_factory=Counter)  # by the number of the task
    seconds: defaultdict[Any, float] = field(default_factory=lambda: defaultdict(float))  # own sampling, by worker

    def split(self, workers: int) -> None:
        """Let parts of equal size (to one task) wait, at most one a worker."""
        count = min(workers, len(self.tasks))
        borders = [len(self.tasks) * i // count for i in range(count + 1)]
        self.waiting.extend(_Part(range(*pair)) for pair in pairwise(borders))

    def submit(self, worker: WorkerHandle, part: _Part) -> None:
        """Call the worker with this part's share of the arguments."""
        own = slice(part.tasks.start, part.tasks.stop)
        weights = self.weights
        if self.per_task:
            weights = {name: value[own] for name, value in weights.items()}
        title = f"collect {self.label}, {len(part.tasks)} tasks"
        part.since = time.perf_counter()
        worker.submit(title, weights, self.tasks[own], self.seeds[own], self.num_episodes, self.deterministic)

    def finish(self, part: _Part, worker: WorkerHandle, rollouts: Rollouts, seconds: float) -> None:
        """Keep what a worker returned."""
        self.played[part.tasks.start] = rollouts
        self.seconds[worker] += seconds

    def blame(self, part: _Part) -> list[Task]:
        """Count a death for the tasks held and let them wait one by one; return those dropped instead."""
        dropped = []
        for i in part.tasks:
            self.deaths[i] += 1
            if self.deaths[i] < MAX_DEATHS:
                self.waiting.append(_Part(range(i, i + 1)))
            else:
                self.lose(i, f"was dropped: {MAX_DEATHS} workers died while they played it")
                dropped.append(self.tasks[i])
        return dropped

    def lose(self, task: int, reason: str) -> None:
        """Have an empty record in the place of a task, and a sentence why."""
        self.lost[task] = f"Task {task}, {self.tasks[task]!r}, {reason}."

    def joined(self) -> Rollouts:
        """The record of all tasks, in order.

        Raises:
            RuntimeError: when all are lost.
        """
        if not self.played:
            raise RuntimeError(f"Every task was lost. {next(iter(self.lost.values()))}")
        like = next(iter(self.played.values()))
        parts = dict(self.played)
        for i, reason in self.lost.items():
            parts[i] = Rollouts.empty([self.tasks[i]], self.num_episodes, like, [reason])
        return _owned(Rollouts.concatenate([parts[start] for start in sorted(parts)]))


def _owned(rollouts: Rollouts) -> Rollouts:
    """The same in writable arrays of C order.

    Ray's arrays are read-only, and the order of an array in memory decides the last bits of a sum over it.
    """
    names = [f.name for f in fields(rollouts) if f.name not in ("tasks", "errors")]
    arrays = {name: np.require(getattr(rollouts, name), requirements=["C", "W"]) for name in names}
    return replace(rollouts, **arrays)
