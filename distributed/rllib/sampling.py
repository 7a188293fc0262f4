"""An iteration's samples of RLlib's workers, of which one that does not answer is replaced."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ray.rllib.utils.metrics import NUM_ENV_STEPS_SAMPLED

from ssm_metarl.distributed import ray_shim
from ssm_metarl.distributed.watch import Part, Watch

if TYPE_CHECKING:
    from ray.rllib.env.env_runner import EnvRunner
    from ray.rllib.env.env_runner_group import EnvRunnerGroup
    from ray.rllib.env.single_agent_episode import SingleAgentEpisode

FIRST_CALL = 3600.0
"""Seconds after which a worker is replaced while no call has been answered: how long one takes is not known."""

LOOK = 1.0
"""Seconds between two looks at who has answered."""

TAG = "sample"
"""Of these calls, among others under way."""

ATTEMPTS = 60
"""Times, as far apart, that workers are asked for where none is left: their processes are starting."""

_log = logging.getLogger(__name__)


class Sampler:
    """Samples of all workers, as `ray.rllib.execution.rollout_ops.synchronous_parallel_sample` takes them.

    That function waits for a worker that stands still without end, or drops what a slow one has collected. Here a
    worker is replaced that takes ten times as long as any call that was answered, and at least a minute.

    Args:
        group: RLlib's workers.
        restore: brings workers back whose process has ended, with the weights of the learner.
    """

    def __init__(self, group: EnvRunnerGroup, restore: Callable[[EnvRunnerGroup], list[int]]) -> None:
        self._group, self._restore = group, restore
        self._watch = Watch("auto", FIRST_CALL)
        self._pids = dict[int, int]()

    def __call__(self, steps: int) -> tuple[list[SingleAgentEpisode], list[dict[str, Any]]]:
        """Sample until there are enough environment steps, or no worker is left.

        Returns:
            The episodes, some of which go on; and RLlib's metrics of every call.
        """
        episodes, found, sampled = list["SingleAgentEpisode"](), list[dict[str, Any]](), 0
        while sampled < steps and (answers := self._round()):
            for played, metrics in answers:
                episodes += played
                found.append(metrics)
                sampled += int(metrics.get(NUM_ENV_STEPS_SAMPLED, 0))
        return episodes, found

    def _round(self) -> list[tuple[list[SingleAgentEpisode], dict[str, Any]]]:
        """A call of every worker; empty where none answered."""
        group = self._group
        if not group.num_remote_env_runners():
            return [(group.local_env_runner.sample(), group.local_env_runner.get_metrics())]
        for _ in range(ATTEMPTS):
            if answers := self._ask(group.healthy_env_runner_ids()):
                return answers
            if not self._restore(group):
                time.sleep(LOOK)
        return []

    def _ask(self, workers: Sequence[int]) -> list[tuple[list[SingleAgentEpisode], dict[str, Any]]]:
        """The answers of some workers, in their order."""
        group, begin = self._group, time.perf_counter()
        group.foreach_env_runner_async(_sample, TAG, remote_worker_ids=list(workers))
        parts = {worker: Part(range(0), since=begin, alive=begin) for worker in workers}
        answers, killed = dict[int, Any](), set[int]()
        while parts:
            for worker, (pid, *answer) in group.fetch_ready_async_reqs(tags=TAG, timeout_seconds=LOOK):
                self._pids[worker], answers[worker] = pid, answer
                self._watch.lives(parts.pop(worker), _name(worker))
            for worker in set(parts) - set(group.healthy_env_runner_ids()):  # its process has ended
                del parts[worker]
            for worker, part in parts.items():
                self._watch.tell(part, _name(worker), self._pids.get(worker, 0))
                if self._watch.is_late(part) and worker not in killed:
                    _log.warning("%s is replaced.", _name(worker))
                    ray_shim.kill_env_runner(group, worker)  # its call then fails, and RLlib brings it back
                    killed.add(worker)
        return [answers[worker] for worker in sorted(answers)]


def _name(worker: int) -> str:
    return f"RLlib's worker {worker}"


def _sample(worker: EnvRunner) -> tuple[int, list[SingleAgentEpisode], dict[str, Any]]:
    return os.getpid(), worker.sample(), worker.get_metrics()
