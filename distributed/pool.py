"""The pool: a meta-batch of tasks over rollout workers, or in process, with the same result to the bit."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from threadpoolctl import ThreadpoolController

from ssm_metarl.algorithms.collect import blank, collect_family, played
from ssm_metarl.algorithms.rollouts import Array, Rollouts
from ssm_metarl.algorithms.spec import PolicySpec
from ssm_metarl.core import Task, TaskDistribution
from ssm_metarl.distributed.dispatch import Dispatcher
from ssm_metarl.distributed.play import Play, owned
from ssm_metarl.distributed.watch import SampleTimeout

if TYPE_CHECKING:
    from ssm_metarl.distributed.references import RemoteRollouts, RemoteWeights
    from ssm_metarl.distributed.worker import WorkerHandle

_log = logging.getLogger(__name__)

INLINE_BYTES = 90_000
"""Shared weights below this travel with each call (Ray inlines up to 100 KiB): cheaper than a put."""


def _hand_on(play: Play, following: Play, adapt: Callable[[int, RemoteRollouts], Any], tasks: range) -> None:
    """Some tasks of a stage have arrived: have the shards adapt that are complete with them, for the next stage."""
    for number, shard in enumerate(following.weights.shards):
        if shard.start < tasks.stop and tasks.start < shard.stop and (rollouts := play.of_shard(shard)):
            following.give_weights(number, adapt(number, rollouts))
            for task in np.flatnonzero(~rollouts.kept().any(1)).tolist():
                following.skip(shard.start + task)


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
        name: the actors are named `{name}/rollout-worker-{i}`, unique among the pools of a driver; empty: one that is.
        sample_timeout_s: when a worker is replaced and its tasks are played again, see `MachineConfig`. Has no effect
            in process.
        processors: that Ray keeps for each worker.

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
        name: str = "",
        sample_timeout_s: SampleTimeout = "auto",
        processors: float = 1.0,
    ) -> None:
        if num_workers < 0:
            raise ValueError(f"num_workers must be 0 (in process) or more, not {num_workers}.")
        if isinstance(sample_timeout_s, int | float) and not sample_timeout_s > 0:
            raise ValueError(f'sample_timeout_s must be a positive number, "auto" or None, not {sample_timeout_s}.')
        self.ray_seconds = 0.0
        self._distribution = distribution
        self._spec = spec
        self._trial_episodes = trial_episodes
        self._calls = 0
        self._put: tuple[Mapping[str, Array], Any] | None = None  # the last shared weights, their reference
        self._workers: list[WorkerHandle] = []
        self._closed = False
        self._name, self._started, self._processors = name or f"pool-{time.monotonic_ns()}", 0, processors
        if num_workers:
            self._start(num_workers)
        else:
            self._threads = ThreadpoolController()
        self._dispatcher = Dispatcher(self._workers, sample_timeout_s)

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
        enough: int | None = None,
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
            enough: tasks that must have been played before the others are given up; None: all. Needs workers.

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
        call = (tasks, seeds, num_episodes, label, deterministic, cuts)
        play = Play(self._calls, self._spec, sent, not shared, *call, enough=enough)
        play.split(len(self._workers))
        self._dispatcher.play(play)
        rollouts = play.joined()
        self.ray_seconds += time.perf_counter() - start - max(play.seconds.values())
        return rollouts

    def collect_stages(
        self,
        weights: Mapping[str, Array],
        tasks: Sequence[Task],
        seeds: Sequence[Sequence[np.random.SeedSequence]],
        num_episodes: int,
        *,
        labels: Sequence[str],
        shards: Sequence[slice],
        adapt: Callable[[int, int, RemoteRollouts], Any],
        enough: int | None = None,
    ) -> list[Play]:
        """`collect` of all stages of a meta-batch; tasks whose weights are there are played while others still are.

        A task that a stage brought no episode of is not played any more. Needs workers.

        Args:
            weights: of the first stage, shared.
            seeds: of each stage, a node of the seed tree for each task.
            labels: of each stage.
            shards: of tasks that adapt together.
            adapt: told the stage, the number of a shard and its rollouts, a reference to the `Kept` weights of its
                tasks in the next stage, see `RemoteWeights`.
            enough: see `collect`.

        Returns:
            Each stage, played; `Play.joined` has its `RemoteRollouts`.
        """
        from ssm_metarl.distributed.references import RemoteWeights

        start = time.perf_counter()
        cuts = [shard.start for shard in shards]
        plays: list[Play] = []
        for own, label in zip(seeds, labels, strict=True):
            self._calls += 1
            sent = RemoteWeights.of(shards, [None] * len(shards)) if plays else self._sent_once(weights)
            call = (tasks, own, num_episodes, label, False, cuts)
            play = Play(self._calls, self._spec, sent, bool(plays), *call, enough=enough)
            play.split(len(self._workers))
            plays.append(play)
        for stage, (play, following) in enumerate(pairwise(plays)):
            play.arrived = partial(_hand_on, play, following, partial(adapt, stage))
        self._dispatcher.play(*plays)
        own_seconds = sum(max(play.seconds.values(), default=0.0) for play in plays)
        self.ray_seconds += max(0.0, time.perf_counter() - start - own_seconds)
        return plays

    @property
    def restarts(self) -> int:
        """See the class."""
        return self._dispatcher.restarts

    @property
    def dropped(self) -> list[Task]:
        """See the class."""
        return self._dispatcher.dropped

    @property
    def timed_out(self) -> int:
        """See the class."""
        return self._dispatcher.timed_out

    def on_wait(self, waited: Callable[[], None]) -> None:
        """Have this called where workers have nothing to do for a while, for want of adapted weights."""
        self._dispatcher.waited = waited

    @property
    def num_workers(self) -> int:
        """n."""
        return len(self._workers)

    def resize(self, num_workers: int) -> None:
        """Have another number of workers from the next `collect` on; those that do not run are the first to end.

        Raises:
            ValueError: the pool is closed or plays in process, or is to.
        """
        if not self._workers or num_workers < 1:
            raise ValueError(f"A pool of {self.num_workers} workers cannot have {num_workers}: both must be above 0.")
        from ssm_metarl.distributed.worker import close_workers, nodes_alive

        alive = nodes_alive()
        lost = {worker for worker in self._workers if worker.starting or worker.node not in alive}
        kept = sorted(self._workers, key=lost.__contains__)[:num_workers]
        close_workers([worker for worker in self._workers if worker not in kept])
        self._workers[:] = [worker for worker in self._workers if worker in kept]
        self._start(num_workers - len(kept))

    def make_room(self, count: int, ends: bool = True, gpus: float = 0.0) -> None:
        """End as many workers as learners wait for a processor, and those that wait themselves; one that runs stays.

        Args:
            count: learners that ended, and that no node has room for.
            ends: False: only say it, as in a placement group, whose processors are not for others.
            gpus: of each learner; where they are missing, too, a worker's processor does not help.
        """
        import ray

        from ssm_metarl.distributed.worker import nodes_alive

        alive, free = nodes_alive(), ray.available_resources()
        running = sum(not worker.starting and worker.node in alive for worker in self._workers)
        helps = free.get("CPU", 0.0) < self._processors and free.get("GPU", 0.0) >= gpus
        waits = f"{count} learner{'s that ended have' if count > 1 else ' that ended has'} no processor yet"
        if ends and helps and running > 1:
            left = max(running - count, 1)
            workers = f"{left} worker{'s' * (left > 1)}"
            _log.warning("%s: %s from now on, instead of %d.", waits, workers, self.num_workers)
            self.resize(left)
        else:
            _log.warning("%s: training goes on when there is one.", waits)

    def _start(self, count: int) -> None:
        """Start so many more workers."""
        from ssm_metarl.distributed.worker import WorkerHandle

        form = self._distribution, self._spec, self._trial_episodes, self._processors
        for _ in range(count):
            self._workers.append(WorkerHandle(f"{self._name}/rollout-worker-{self._started}", *form))
            self._started += 1  # a name is not used again: the end of who had it may not have come through yet

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
        return owned(rollouts)

    def _sent_once(self, weights: Mapping[str, Array]) -> Any:
        """What workers are called with for shared weights: a reference, or small ones themselves."""
        if sum(array.nbytes for array in weights.values()) < INLINE_BYTES:
            return dict(weights)
        if self._put is None or self._put[0] is not weights:
            import ray

            self._put = (weights, ray.put(dict(weights)))
        return self._put[1]
