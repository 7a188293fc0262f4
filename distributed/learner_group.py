"""The learner group: the central learner's work over Ray actors, with the same result to the bit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, ClassVar

import numpy as np
import ray
import torch

from ssm_metarl.algorithms.batch import COMPARING, mean_returns, outer_moments
from ssm_metarl.algorithms.registry import MetaConfig
from ssm_metarl.algorithms.rollouts import Array, Rollouts
from ssm_metarl.algorithms.shard import Gradient, ShardLoss
from ssm_metarl.algorithms.spec import PolicySpec
from ssm_metarl.config import MachineConfig
from ssm_metarl.distributed import dispatch
from ssm_metarl.distributed.collection import StageCollector
from ssm_metarl.distributed.learner import Learner, Stage, task_weights
from ssm_metarl.distributed.learner_actor import LearnerActor
from ssm_metarl.distributed.ray_shim import has_no_node
from ssm_metarl.distributed.references import RemoteRollouts, RemoteWeights
from ssm_metarl.distributed.stopwatch import Stopwatch

LOOKS = 3
"""After how many looks in a row, `PATIENCE` apart, learners without a node are told."""


class LearnerGroup(Learner):
    """A `Learner` whose shards are computed by Ray actors.

    Rollouts, batches, adapted weights and gradients stay in the object store, and go by reference from the worker that
    played a task to the learner that has its shard and back. Here are the meta-parameters, their optimiser, and sums:
    memory and messages of this process do not grow with what the tasks played.

    Each learner has consecutive shards. Its actor keeps nothing of them between calls, and Ray repeats the calls of one
    that died: nothing else has to be done about its end.

    Args:
        spec, config, machine, seed, horizon: see `Learner`; `machine.num_learners` actors of one CPU each, and a GPU
            where the device is one.
        name: the actors are named `{name}/learner-{i}`, unique among a driver's.
        processors: that Ray keeps for each.

    Attributes:
        homeless: called with the number of learners that ended and that no node has room for.
    """

    actor_class: ClassVar[type] = LearnerActor

    def __init__(
        self,
        spec: PolicySpec,
        config: MetaConfig,
        machine: MachineConfig,
        seed: int,
        horizon: int,
        name: str,
        processors: float = 1.0,
    ) -> None:
        super().__init__(spec, config, replace(machine, device="cpu", learner_threads=1), seed, horizon)
        self._shared: tuple[Any, Any] = (None, None)  # the last weights that were put, and the reference to them
        self.homeless: Callable[[int], None] = lambda count: None
        # Ray applies "SPREAD" even inside a placement group and would take the actor out of it.
        inside = ray.get_runtime_context().should_capture_child_tasks_in_placement_group
        options = {
            "num_cpus": processors,
            "num_gpus": learner_gpus(machine),
            "max_restarts": -1,
            "max_task_retries": -1,
            "scheduling_strategy": None if inside else "SPREAD",
        }
        self._actors = [
            ray.remote(self.actor_class)
            .options(name=f"{name}/learner-{i}", **options)
            .remote(spec, config, machine.device)
            for i in range(machine.num_learners)
        ]
        self._looks = 0

    def processes(self) -> list[int]:
        """Process ids of the learners, as soon as all of them run."""
        found: list[int] = ray.get([actor.process.remote() for actor in self._actors])
        return found

    def waited(self) -> None:
        """Look whether learners that ended find no node, and tell `homeless` after several times."""
        count = sum(has_no_node(actor) for actor in self._actors)
        self._looks = self._looks + 1 if count else 0
        if self._looks == LOOKS:
            self._looks = 0
            self.homeless(count)

    def _get(self, references: Any) -> Any:
        """`ray.get`, with `waited` again and again until all is there."""
        several = references if isinstance(references, list) else [references]
        while ray.wait(several, num_returns=len(several), timeout=dispatch.PATIENCE)[1]:
            self.waited()
        return ray.get(references)

    def pieces(self, tasks: int, episodes: int) -> list[slice]:
        """See `Learner.pieces`: the shards."""
        return self.shards(tasks, episodes)

    def first_episodes(self, rollouts: Any) -> list[Rollouts]:
        """See `Learner.first_episodes`."""
        found = self._on_shards("first_episodes", self._remote(rollouts))
        return [record for record in self._get(found) if record is not None]

    def collect(self, collector: StageCollector, episodes: int, watch: Stopwatch) -> tuple[list[Stage], list[Any]]:
        """See `Learner.collect`; where tasks need no others to adapt, they do so while others still play."""
        if not (collector.can_overlap and self.config.inner_steps) or self.config.baseline in COMPARING:
            return super().collect(collector, episodes, watch)
        weights: Any = self.weights()
        current = defaultdict[int, Any](lambda: weights)  # by shard
        batches: dict[tuple[int, int], tuple[Any, Any]] = {}

        def adapt(stage: int, shard: int, rollouts: RemoteRollouts) -> Any:
            pieces = [reference for _, reference in rollouts.pieces]
            batches[stage, shard] = own = self._batch(shard, count, current[shard], pieces)
            current[shard] = self._adapt(shard, count, current[shard], own[1])
            return current[shard]

        count, last = len(collector.shards), self.config.inner_steps
        with watch("sample"):
            collected = collector.overlapped(weights, episodes, last, adapt)
        with watch("adapt"):
            for i, shard in enumerate(collector.shards):
                batches[last, i] = self._batch(i, count, current[i], collected[-1].of_shard(shard))
            stages = [
                self._stage([batches[stage, i] for i in range(count)], rollouts)
                for stage, rollouts in enumerate(collected)
            ]
        return stages, collected

    def batch(self, weights: Any, rollouts: Any) -> Stage:
        """See `Learner.batch`: references to the shards' batches, which may still be computed."""
        rollouts = self._remote(rollouts)
        shards, level = self.shards(*rollouts.kept().shape), None
        if self.config.baseline in COMPARING:
            level = mean_returns(self._get(self._on_shards("totals", rollouts, self._fixed())))
        own = [
            self._batch(i, len(shards), _of_shard(weights, i), rollouts.of_shard(shard), level)
            for i, shard in enumerate(shards)
        ]
        return self._stage(own, rollouts)

    def adapt(self, weights: Any, stage: Stage) -> RemoteWeights:
        """See `Learner.adapt`: references to the shards' weights, which may still be computed."""
        adapted = [
            self._adapt(i, len(stage.shards), _of_shard(weights, i), batch) for i, batch in enumerate(stage.batches)
        ]
        return RemoteWeights.of(stage.shards, adapted)

    def _batch(
        self, shard: int, shards: int, weights: Any, pieces: Sequence[Any], level: Array | None = None
    ) -> tuple[Any, Any]:
        """References to the moments and to the batch of a shard."""
        call = self._owner(shard, shards).batch.options(num_returns=2)
        moments, batch = call.remote(self._fixed(), self._sent(weights), level, *pieces)
        return moments, batch

    def _adapt(self, shard: int, shards: int, weights: Any, batch: Any) -> Any:
        """A reference to the weights of a shard's tasks after a step."""
        return self._owner(shard, shards).adapt.remote(self._fixed(), self._sent(weights), batch)

    def _stage(self, batches: Sequence[tuple[Any, Any]], rollouts: RemoteRollouts) -> Stage:
        """What `_batch` gave for all shards."""
        linear = self.config.baseline == "linear"
        moments = None if linear else outer_moments(self._get([own for own, _ in batches]))
        kept = rollouts.kept()
        return Stage(self.shards(*kept.shape), [batch for _, batch in batches], np.asarray(kept.any(1)), moments)

    def _gradient(
        self,
        config: MetaConfig,
        stages: Sequence[Stage],
        part: Sequence[int],
        complete: Array,
        references: dict[int, Any],
        keep: bool,
    ) -> tuple[Gradient, list[ShardLoss]]:
        shards, moments = stages[0].shards, [stage.moments for stage in stages]
        weights = task_weights(shards, part, complete)
        shared = ray.put((config, self.weights(), moments))  # once for all
        losses, sums, owners = [], [], []
        for owner, places in groupby(range(len(part)), lambda place: self._owner_number(part[place], len(shards))):
            own = list(places)
            values = [stage.batches[part[place]] for place in own for stage in stages]
            values += [references[part[place]] for place in own if part[place] in references]
            found = (
                self._actors[owner]
                .gradient.options(num_returns=2 + keep * len(own))
                .remote(shared, (len(part), own[0]), [weights[place] for place in own], keep, *values)
            )
            losses.append(found[0])
            sums.append(found[1])
            owners.append(self._actors[owner])
            if keep:
                references.update({part[place]: found[2 + row] for row, place in enumerate(own)})
        total = self._get(owners[0].add.remote(len(part), *sums))
        gradient = [None if array is None else torch.from_numpy(np.array(array)) for array in total]
        return gradient, [loss for each in self._get(losses) for loss in each]

    def _take_moments(self, rollouts: Any) -> None:
        if not (self.policy.spec.normalizes or self.policy.spec.task_size):
            return
        for moments in self._get(self._on_shards("moments", self._remote(rollouts))):
            self.normalizer.merge(moments)

    def _remote(self, rollouts: Any) -> RemoteRollouts:
        """Rollouts in the object store, wherever they are."""
        if isinstance(rollouts, RemoteRollouts):
            return rollouts
        shards = self.shards(*rollouts.kept().shape)
        return RemoteRollouts.put(rollouts, *(range(shard.start, shard.stop) for shard in shards))

    def _on_shards(self, method: str, rollouts: RemoteRollouts, *arguments: Any) -> list[Any]:
        """References to what a method of the learners says of each shard's rollouts, in order."""
        shards = self.shards(*rollouts.kept().shape)
        return [
            getattr(self._owner(i, len(shards)), method).remote(*arguments, *rollouts.of_shard(shard))
            for i, shard in enumerate(shards)
        ]

    def _owner_number(self, shard: int, shards: int) -> int:
        return shard * len(self._actors) // shards

    def _owner(self, shard: int, shards: int) -> Any:
        """The learner that has a shard."""
        return self._actors[self._owner_number(shard, shards)]

    def _sent(self, weights: Any) -> Any:
        """A reference to weights: they are one, or shared by all tasks."""
        if not isinstance(weights, Mapping):
            return weights
        if self._shared[0] is not weights:
            self._shared = (weights, ray.put(dict(weights)))
        return self._shared[1]

    def _fixed(self) -> dict[str, Array]:
        """The normaliser."""
        return {name: buffer.numpy().copy() for name, buffer in self.policy.named_buffers()}

    def close(self) -> None:
        """End the learners."""
        self._shared = (None, None)
        if ray.is_initialized():
            for actor in self._actors:
                ray.kill(actor)
        self._actors = []


def _of_shard(weights: Any, shard: int) -> Any:
    """The weights of a shard's tasks, shared or a reference."""
    return weights.references[shard] if isinstance(weights, RemoteWeights) else weights


def learner_gpus(machine: MachineConfig) -> float:
    """GPUs of each learner of a group, or of the one in the driver."""
    many = ray.cluster_resources().get("GPU", 0.0) if machine.device == "auto" and ray.is_initialized() else 0.0
    return float(machine.device.startswith("cuda") or many >= max(machine.num_learners, 1))
