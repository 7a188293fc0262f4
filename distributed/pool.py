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
from ssm_metarl.distributed.play import Play, owned
from ssm_metarl.distributed.suspicion import Suspicion
from ssm_metarl.distributed.watch import Part, SampleTimeout, Watch

if TYPE_CHECKING:
    from ssm_metarl.distributed.references import RemoteRollouts, RemoteWeights
    from ssm_metarl.distributed.worker import WorkerHandle

    Held = dict[WorkerHandle, tuple[Play, Part]]
    """What each worker plays."""

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
        play = Play(self._calls, self._spec, sent, not shared, tasks, seeds, num_episodes, label, deterministic, cuts)
        play.enough = enough
        play.split(len(self._workers))
        self._play(play)
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
            play = Play(self._calls, self._spec, sent, bool(plays), tasks, own, num_episodes, label, False, cuts)
            play.enough = enough
            play.split(len(self._workers))
            plays.append(play)
        for stage, (play, following) in enumerate(pairwise(plays)):
            play.arrived = partial(_hand_on, play, following, partial(adapt, stage))
        self._play(*plays)
        own_seconds = sum(max(play.seconds.values(), default=0.0) for play in plays)
        self.ray_seconds += max(0.0, time.perf_counter() - start - own_seconds)
        return plays

    @property
    def num_workers(self) -> int:
        """n."""
        return len(self._workers)

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

    def _play(self, *plays: Play) -> None:
        """Hand the plays' parts to free workers, those of the first one first, until none is left."""
        from ssm_metarl.distributed.worker import ready_workers

        held: Held = {}
        try:
            while (waiting := any(play.waiting for play in plays)) or held:
                for play in plays:
                    play.look_for_weights()
                for worker in self._workers:
                    if worker.call is None and (found := self._next(plays, worker)):
                        held[worker] = found
                        found[0].submit(worker, found[1])
                # A worker that is starting or restarting matters only while something waits for it.
                called = [worker for worker in self._workers if worker.call is not None]
                awaited = called if waiting else list(held)
                missing = [reference for play in plays for reference in play.missing]
                timeout = self._watch.seconds([part for _, part in held.values()])
                for worker in ready_workers(awaited, timeout, missing):
                    self._receive(worker, held)
                for worker in list(held):
                    self._look_after(worker, held)
                for play in plays:
                    if play.has_enough:
                        self._close(play, held)
        finally:
            for worker in held:  # after an exception: what they still answer belongs to no play
                worker.await_process()

    def _close(self, play: Play, held: Held) -> None:
        """Give up the tasks of a play that are not there."""
        late = [worker for worker, (own, _) in held.items() if own is play]
        parts = [*(held.pop(worker)[1] for worker in late), *play.waiting]
        play.waiting.clear()
        for worker in late:  # it may never end
            self.restarts += 1
            worker.restart()
        for task in sorted(task for part in parts for task in part.tasks):
            self.timed_out += 1
            play.lose(task, f"was given up: {play.enough} others were there")

    def _next(self, plays: Sequence[Play], worker: WorkerHandle) -> tuple[Play, Part] | None:
        """The first part that waits for a worker on this node: a suspect is rather tried where it has not been."""
        nodes = self._running_nodes()
        for play in plays:
            for part in play.waiting:
                if not play.has_weights(part):
                    continue
                if len(part.tasks) > 1 or not self._suspicion.avoided(play.key(part), worker.node, nodes):
                    play.waiting.remove(part)
                    return play, part
        return None

    def _running_nodes(self) -> set[str]:
        """Nodes with a worker that is not starting or restarting."""
        return {worker.node for worker in self._workers if not worker.starting}

    def _receive(self, worker: WorkerHandle, held: Held) -> None:
        """Take an answer of a worker: a sign of life, what it played, or that it has started."""
        from ssm_metarl.distributed.worker import WorkerDied

        node = worker.node
        try:
            answer = worker.result()
        except WorkerDied:
            if worker in held:
                self._take_back(*held.pop(worker), node)
            return
        if worker not in held:
            return
        play, part = held[worker]
        self._watch.lives(part, worker.name)
        if answer is not None:
            del held[worker]
            play.finish(part, worker, *answer)
            if len(part.tasks) == 1:
                self._suspicion.played(play.key(part))

    def _take_back(self, play: Play, part: Part, node: str) -> None:
        """Have the tasks of a worker that ended wait, one by one; drop one that keeps ending those that play it."""
        from ssm_metarl.distributed.worker import nodes_alive

        self.restarts += 1
        if len(part.tasks) == 1:
            key = play.key(part)
            self._suspicion.ended(key, node)
            if self._suspicion.condemned(key, nodes_alive(), self._running_nodes() | {node}):
                self._suspicion.forget(key)
                self.dropped.append(play.tasks[part.tasks.start])
                play.lose(part.tasks.start, "was dropped: every worker that played it alone ended")
                return
        play.waiting.extend(Part(range(i, i + 1)) for i in part.tasks)

    def _look_after(self, worker: WorkerHandle, held: Held) -> None:
        """Tell of a worker that is silent, and replace one that is so for too long."""
        play, part = held[worker]
        self._watch.tell(part, worker.name, worker.pid)
        if not self._watch.is_late(part):
            return
        _log.warning("%s is replaced.", worker.name)
        del held[worker]
        worker.restart()
        if not self._watch.bounds_calls or len(part.tasks) > 1:
            self._take_back(play, part, worker.node)
            return
        self.restarts += 1
        self.timed_out += 1
        play.lose(part.tasks.start, f"took longer than sample_timeout_s = {self._watch.timeout:g}")
