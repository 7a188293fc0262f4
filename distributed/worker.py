"""The rollout worker, a Ray actor that plays its share of a meta-batch, and its owner's handle of it.

Never imports torch: a worker lives on NumPy alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import ray
from ray import exceptions
from threadpoolctl import threadpool_limits

from ssm_metarl.algorithms.collect import collect_tasks
from ssm_metarl.algorithms.rollouts import Array, Rollouts
from ssm_metarl.algorithms.spec import PolicySpec
from ssm_metarl.core import Task, TaskDistribution

_DEATHS = (
    exceptions.RayActorError,
    exceptions.NodeDiedError,
    exceptions.ObjectLostError,  # the answer was lost with the node that held it
    exceptions.OutOfMemoryError,
    exceptions.WorkerCrashedError,
)


class RolloutWorker:
    """A thin shell around `collect_tasks`, stateless between calls: any worker gives the same answer.

    `WorkerHandle` makes it an actor:

        actor = ray.remote(RolloutWorker).remote(distribution, spec)
        ray.get(actor.process.remote())  # it runs
        rollouts, seconds = ray.get(actor.collect.remote(weights, tasks, seeds, num_episodes, deterministic))

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
    def process(self) -> int:
        """Id of the actor's process; another one after a restart."""
        return os.getpid()

    def collect(
        self,
        weights: Mapping[str, Array],
        tasks: Sequence[Task],
        seeds: Sequence[np.random.SeedSequence],
        num_episodes: int,
        deterministic: bool,
    ) -> tuple[Rollouts, float]:
        """Play `num_episodes` episodes of each task; see `collect_tasks`.

        Returns:
            The record, and the seconds that sampling took in this process.
        """
        start = time.perf_counter()
        family = self._distribution
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
        return rollouts, time.perf_counter() - start


class WorkerDied(Exception):
    """The worker's process ended during the call; Ray is starting another."""


class WorkerHandle:
    """The owner's side of one `RolloutWorker`: the actor, and the one call that it has under way.

    `Pool` uses it so; after `WorkerDied` the handle is in the state of a new one:

        worker = WorkerHandle("run/rollout-worker-0", distribution, spec)
        worker.result()  # wait until it runs
        worker.submit("collect support 7, 10 tasks", weights, tasks, seeds, num_episodes, deterministic)
        rollouts, seconds = worker.result()

    Args:
        name: the actor's name in Ray, unique in the driver's namespace.
        distribution, spec, trial_episodes: the worker's.

    Attributes:
        call: the reference of the call under way, None when there is none: the worker is free.
    """

    def __init__(self, name: str, distribution: TaskDistribution, spec: PolicySpec, trial_episodes: int = 1) -> None:
        self._name = name
        self._arguments = (distribution, spec, trial_episodes)
        self.call: Any = None
        self._create()

    def submit(self, title: str, *arguments: Any) -> None:
        """Start `RolloutWorker.collect` on a free worker, under `title` in Ray's dashboard."""
        self.call = self.actor.collect.options(name=title).remote(*arguments)

    def result(self) -> Any:
        """Wait for the call under way; return its answer: of `collect`, or the process id after a start.

        Raises:
            WorkerDied: the worker's process ended during the call.
            Exception: what the call raised, with the worker's traceback.
        """
        call, self.call = self.call, None
        try:
            return ray.get(call)
        except _DEATHS as error:
            if call != self._start:
                self.await_process()
            elif isinstance(error, exceptions.ActorDiedError) and not error.actor_init_failed:
                self._create()  # it was ended for good: Ray does not restart it
            else:
                raise
            raise WorkerDied(str(error)) from error

    def await_process(self) -> None:
        """Have under way a call that is answered when the worker runs and has finished all earlier calls."""
        self.call = self._start = self.actor.process.remote()

    def process(self) -> int:
        """Id of the worker's process, once it runs; for a free worker."""
        while True:
            self.await_process()
            try:
                return self.result()
            except WorkerDied:
                continue

    def restart(self) -> None:
        """Kill the worker's process, forget its call and let Ray start another."""
        ray.kill(self.actor, no_restart=False)
        self.await_process()

    def close(self) -> None:
        """End the actor for good."""
        if ray.is_initialized():
            ray.kill(self.actor)

    def _create(self) -> None:
        # Ray applies "SPREAD" even inside a placement group and would take the actor out of it.
        inside = ray.get_runtime_context().should_capture_child_tasks_in_placement_group
        self.actor = (
            ray.remote(RolloutWorker)
            .options(
                name=self._name,
                num_cpus=1,
                max_restarts=-1,
                max_task_retries=0,
                scheduling_strategy=None if inside else "SPREAD",
            )
            .remote(*self._arguments)
        )
        self.await_process()


def ready_workers(workers: Sequence[WorkerHandle], timeout_s: float | None) -> list[WorkerHandle]:
    """Those of `workers` whose call has ended, or none when `timeout_s` passed before the first did."""
    by_call = {worker.call: worker for worker in workers}
    return [by_call[call] for call in ray.wait(list(by_call), num_returns=1, timeout=timeout_s)[0]]
