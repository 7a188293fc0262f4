"""The rollout worker, a Ray actor that plays its share of a meta-batch, and its owner's handle of it.

Never imports torch: a worker lives on NumPy alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import ray
from ray import exceptions
from threadpoolctl import threadpool_limits

from ssm_metarl.algorithms.collect import collect_family
from ssm_metarl.algorithms.rollouts import Array, Rollouts
from ssm_metarl.algorithms.spec import PolicySpec
from ssm_metarl.core import Task, TaskDistribution
from ssm_metarl.distributed.references import Kept, Summary, joined_weights

_DEATHS = (
    exceptions.RayActorError,
    exceptions.NodeDiedError,
    exceptions.ObjectLostError,  # the answer was lost with the node that held it
    exceptions.OutOfMemoryError,
    exceptions.WorkerCrashedError,
)


BEAT_SECONDS = 2.0
"""From one sign of life of a worker that plays to the next."""

CLOSING_SECONDS = 3.0
"""What workers have to close their environments before they are ended."""


class Announcement(NamedTuple):
    """So many `Kept` records follow, and then the `Summary` of them all."""

    records: int


class RolloutWorker:
    """A thin shell around `collect_family`, stateless between calls: any worker gives the same answer.

    `WorkerHandle` makes it an actor:

        actor = ray.remote(RolloutWorker).remote(distribution, spec)
        ray.get(actor.process.remote())  # it runs
        for answer in actor.collect.options(num_returns="streaming").remote(weights, tasks, seeds, 20, False):
            print("it lives" if ray.get(answer) is None else "it has ended")

    Args:
        distribution: the family whose environments it makes.
        spec: the policy's sizes.
        trial_episodes: episodes that follow each other in an episode slot.
    """

    def __init__(self, distribution: TaskDistribution, spec: PolicySpec, trial_episodes: int = 1) -> None:
        # Ray sets OMP_NUM_THREADS in a worker, but not over a value that the user's environment has.
        threadpool_limits(limits=1)
        self._distribution = distribution
        self._spec = spec
        self._trial_episodes = trial_episodes

    # Unlike any other call this one is repeated by Ray until the actor runs: its answer ends a restart.
    @ray.method(max_task_retries=-1)
    def process(self) -> tuple[int, str]:
        """Ids of the actor's process and of its node; others after a restart."""
        return os.getpid(), ray.get_runtime_context().get_node_id()

    def collect(
        self,
        weights: Mapping[str, Array] | Sequence[Array],
        tasks: Sequence[Task],
        seeds: Sequence[np.random.SeedSequence],
        num_episodes: int,
        deterministic: bool,
        cuts: Sequence[int] = (),
        *shards: Kept,
    ) -> Iterator[tuple[Rollouts | Summary, float] | Announcement | Kept | None]:
        """Play `num_episodes` episodes of each task; see `collect_family`.

        Args:
            weights: of the policy, or the rows of `shards` where those of the tasks stand.
            cuts: from 0 to the number of tasks, where the record is cut for the object store; empty: it is answered.
            shards: see `joined_weights`.

        Yields:
            None every `BEAT_SECONDS` in which there was a step; at last the record, and the seconds that sampling took
            in this process. With cuts an `Announcement` and the pieces of the record, and its `Summary` instead.
        """
        start = beat = time.perf_counter()
        if not isinstance(weights, Mapping):
            weights = joined_weights(weights, shards)
        steps = collect_family(
            self._distribution, self._spec, weights, seeds, tasks, num_episodes, self._trial_episodes, deterministic
        )
        while True:
            try:
                next(steps)
            except StopIteration as end:
                record: Rollouts = end.value
                break
            if (now := time.perf_counter()) - beat > BEAT_SECONDS:
                beat = now
                yield None
        seconds = time.perf_counter() - start
        if not cuts:
            yield record, seconds
            return
        yield Announcement(len(cuts) - 1)
        for piece in pairwise(cuts):
            yield Kept.of(record.select(slice(*piece)))
        yield Summary.of(record), seconds

    def close_environments(self) -> None:
        """Close those that the family has kept for the next call."""
        self._distribution.close()


class WorkerDied(Exception):
    """The worker's process ended during the call; Ray is starting another."""


class WorkerHandle:
    """The owner's side of one `RolloutWorker`: the actor, and the one call that it has under way.

    `Pool` uses it so; after `WorkerDied` the handle is in the state of a new one:

        worker = WorkerHandle("run/rollout-worker-0", distribution, spec)
        worker.result()  # wait until it runs
        worker.submit("collect support 7, 10 tasks", weights, tasks, seeds, num_episodes, deterministic)
        while (answer := worker.result()) is None:  # a sign of life
            pass
        rollouts, seconds = answer

    Args:
        name: the actor's name in Ray, unique in the driver's namespace.
        distribution, spec, trial_episodes: the worker's.
        processors: that Ray keeps for it.

    Attributes:
        call: the call under way, None when there is none: the worker is free.
        name: the actor's.
        pid, node: ids of its process and node, as last known; 0 and "" before it has started.
    """

    def __init__(
        self,
        name: str,
        distribution: TaskDistribution,
        spec: PolicySpec,
        trial_episodes: int = 1,
        processors: float = 1.0,
    ) -> None:
        self.name = name
        self.pid, self.node = 0, ""
        self._arguments, self._processors = (distribution, spec, trial_episodes), processors
        self.call: Any = None
        self._given: set[str] = set()  # names of the objects that it was called with
        self._create()

    @property
    def starting(self) -> bool:
        """Whether its process has not answered yet since it was started."""
        return self.call is not None and self.call is self._start

    def submit(self, title: str, *arguments: Any) -> None:
        """Start `RolloutWorker.collect` on a free worker, under `title` in Ray's dashboard."""
        self._given = {each.hex() for each in arguments if isinstance(each, ray.ObjectRef)}
        self.call = self.actor.collect.options(name=title, num_returns="streaming").remote(*arguments)

    def result(self) -> Any:
        """Wait for the next answer of the call under way.

        Returns:
            Of `collect`: None for a sign of life, and the call goes on, or its result; with cuts the `Summary` together
            with references to the pieces. Of a start: the process id.

        Raises:
            WorkerDied: the worker's process ended during the call.
            ObjectLostError: what it was called with was lost, with the node that held it.
            Exception: what the call raised, with the worker's traceback.
        """
        starting = self.starting
        call, self.call = self.call, None
        try:
            answer = ray.get(call if starting else next(call))
            if isinstance(answer, Announcement):
                pieces = [next(call) for _ in range(answer.records)]
                summary, seconds = ray.get(next(call))  # with it all of them are in the store
                answer = ((summary, pieces), seconds)
        except (*_DEATHS, StopIteration) as error:  # an error that took a piece's place ends the stream
            if not starting:
                self.await_process()
                if isinstance(error, exceptions.ObjectLostError) and error.object_ref_hex in self._given:
                    raise
            elif isinstance(error, exceptions.ActorDiedError) and not error.actor_init_failed:
                self._create()  # it was ended for good: Ray does not restart it
            else:
                raise
            raise WorkerDied(str(error)) from error
        if starting:
            self.pid, self.node = answer
            return self.pid
        if answer is None:
            self.call = call
        return answer

    def await_process(self) -> None:
        """Have under way a call that is answered when the worker runs and has finished all earlier calls."""
        self.call = self._start = self.actor.process.remote()

    def process(self) -> int:
        """Id of the worker's process, once it runs; for a free worker."""
        while True:
            self.await_process()
            try:
                return int(self.result())
            except WorkerDied:
                continue

    def restart(self) -> None:
        """Kill the worker's process, forget its call and let Ray start another."""
        ray.kill(self.actor, no_restart=False)
        self.await_process()

    def close(self) -> None:
        """End the actor for good."""
        ray.kill(self.actor)

    def _create(self) -> None:
        # Ray applies "SPREAD" even inside a placement group and would take the actor out of it.
        inside = ray.get_runtime_context().should_capture_child_tasks_in_placement_group
        self.actor = (
            ray.remote(RolloutWorker)
            .options(
                name=self.name,
                num_cpus=self._processors,
                max_restarts=-1,
                max_task_retries=0,
                scheduling_strategy=None if inside else "SPREAD",
            )
            .remote(*self._arguments)
        )
        self.await_process()


def close_workers(workers: Sequence[WorkerHandle]) -> None:
    """End workers for good; those that are free get a moment to close their environments."""
    if not ray.is_initialized():
        return
    closing = [worker.actor.close_environments.remote() for worker in workers if worker.call is None]
    if closing:
        ray.wait(closing, num_returns=len(closing), timeout=CLOSING_SECONDS)
    for worker in workers:
        worker.close()


def nodes_alive() -> set[str]:
    """Ids of the cluster's nodes."""
    return {str(node["NodeID"]) for node in ray.nodes() if node["Alive"]}


def ready_workers(
    workers: Sequence[WorkerHandle], timeout_s: float | None, others: Sequence[Any] = ()
) -> list[WorkerHandle]:
    """Those of `workers` whose call has an answer.

    None when `timeout_s` passed before the first had one, or one of the `others`, references, was there.
    """
    by_call = {worker.call: worker for worker in workers}
    if not ray.wait([*by_call, *others], num_returns=1, timeout=timeout_s, fetch_local=False)[0] or not by_call:
        return []
    return [by_call[call] for call in ray.wait(list(by_call), num_returns=len(by_call), timeout=0)[0]]


def in_store(references: Sequence[Any]) -> set[Any]:
    """Those of `references` whose values are somewhere in the cluster."""
    return set(ray.wait(list(references), num_returns=len(references), timeout=0, fetch_local=False)[0])
