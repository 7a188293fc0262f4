"""A learner of a group: a Ray actor that computes shards of a meta-batch."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from ssm_metarl.algorithms.batch import Batch, advantage_moments, standardized, step_totals
from ssm_metarl.algorithms.inner_loop import Parameters, adapt_shard
from ssm_metarl.algorithms.normalizer import Normalizer, RunningMoments
from ssm_metarl.algorithms.policy import SSMPolicy
from ssm_metarl.algorithms.registry import MetaConfig
from ssm_metarl.algorithms.replay import ReplayBuffer
from ssm_metarl.algorithms.rollouts import Array, Rollouts
from ssm_metarl.algorithms.shard import ShardLoss, added, batch_of_shard, meta_gradient, tree_nodes, tree_total
from ssm_metarl.algorithms.spec import PolicySpec
from ssm_metarl.distributed.learner import keep_freed_memory, resolve_device, reward_scale, set_normalizer
from ssm_metarl.distributed.references import Kept

PartialSums = dict[tuple[int, int], list[Any]]
"""Sums of gradients, see `tree_nodes`: an array a parameter, or None."""


class LearnerActor:
    """Computes shards, and keeps nothing of them: any learner of any group gives the same answer.

    What it is called with and what it answers stays in Ray's object store, as `Kept`, but for summaries. So a call
    whose learner died can be repeated, by Ray itself, on the process that takes its place.

    Args:
        spec: the policy's sizes.
        config: of meta-learning.
        device: where it computes.
    """

    def __init__(self, spec: PolicySpec, config: MetaConfig, device: str) -> None:
        threadpool_limits(limits=1)
        torch.set_num_threads(1)
        keep_freed_memory()
        # Arrays in the object store cannot be written to, and nothing here does.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        self._config = config
        self._device = torch.device(resolve_device(device))
        self._policy = SSMPolicy(spec).to(self._device)
        self._normalizer = Normalizer(spec, config.discount)

    def process(self) -> int:
        """Id of the actor's process; another one after a restart."""
        return os.getpid()

    def totals(self, normalizer: Mapping[str, Array], *pieces: Kept) -> Array:
        """A shard's `step_totals`.

        Args:
            normalizer: the policy's, by name.
            pieces: the shard's rollouts, in order.
        """
        set_normalizer(self._policy, normalizer)
        return step_totals(_record(pieces), self._config, reward_scale(self._policy, self._config))

    def batch(
        self, normalizer: Mapping[str, Array], weights: Mapping[str, Array] | Kept, level: Array | None, *pieces: Kept
    ) -> tuple[RunningMoments | None, Kept]:
        """A shard's `advantage_moments` and `Batch`.

        Args:
            normalizer, pieces: see `totals`.
            weights: that acted.
            level: see `shard_batch`.
        """
        set_normalizer(self._policy, normalizer)
        batch = batch_of_shard(self._policy, self._tensors(weights), _record(pieces), self._config, level)
        arrays = Batch(*(None if each is None else each.cpu().numpy() for each in batch))  # type: ignore[arg-type]
        return advantage_moments(batch, self._config), Kept.of(arrays)

    def adapt(self, normalizer: Mapping[str, Array], weights: Mapping[str, Array] | Kept, batch: Kept) -> Kept:
        """The weights of a shard's tasks after one inner step from `weights`."""
        set_normalizer(self._policy, normalizer)
        return Kept.of(adapt_shard(self._policy, self._tensors(weights), self._batch(batch), self._config))

    def gradient(
        self,
        shared: tuple[MetaConfig, Mapping[str, Array], Sequence[tuple[float, float] | None]],
        place: tuple[int, int],
        task_weights: Sequence[Array],
        keep: bool,
        *values: Kept,
    ) -> tuple[Any, ...]:
        """The `meta_gradient` of consecutive shards of a minibatch, added up as far as these go.

        Args:
            shared: config of the objective; the meta-parameters, with the normaliser; and of the S+1 stages the
                moments, see `standardized`.
            place: number of the minibatch's shards, and of the first one of these.
            task_weights: of each shard's tasks.
            keep: answer the references, too.
            values: the S+1 batches of each shard, shard by shard; and the shards' references, unless they are their
                own.

        Returns:
            The shards' losses; their gradients, `PartialSums`; and where they are kept, each shard's reference.
        """
        config, meta, moments = shared
        set_normalizer(self._policy, meta)
        names = [name for name, _ in self._policy.named_parameters()]
        parameters = {name: value.requires_grad_() for name, value in self._tensors(meta).items() if name in names}
        parameters = {name: parameters[name] for name in names}
        count, stages = len(task_weights), len(moments)
        losses, references, leaves = list[ShardLoss](), list[Kept](), {}
        for i, weight in enumerate(task_weights):
            batches = [
                standardized(self._batch(each), config, own)
                for each, own in zip(values[stages * i : stages * (i + 1)], moments, strict=True)
            ]
            given = values[stages * count + i].value if len(values) > stages * count else ()
            reference = [torch.as_tensor(array, device=self._device) for array in given]
            own_weight = torch.as_tensor(weight, device=self._device)
            gradient, loss, reference = meta_gradient(self._policy, parameters, batches, config, own_weight, reference)
            losses.append(loss)
            if keep:
                references.append(Kept.of([each.cpu().numpy() for each in reference]))
            leaves[place[1] + i, place[1] + i + 1] = [None if g is None else g.cpu().numpy() for g in gradient]
        nodes = tree_nodes(place[0], place[1], place[1] + count)
        sums = {node: tree_total(place[0], leaves, added, node) for node in nodes}
        return losses, Kept.of(sums), *references

    def add(self, shards: int, *partial: Kept) -> list[Array | None]:
        """The gradient of a minibatch of so many shards, from its learners' `PartialSums`."""
        known = {node: value for each in partial for node, value in each.value.items()}
        return tree_total(shards, known, added)

    def moments(self, *pieces: Kept) -> dict[str, RunningMoments]:
        """The running moments of a shard's rollouts alone."""
        return self._normalizer.of(_record(pieces))

    def first_episodes(self, *pieces: Kept) -> Rollouts | None:
        """What a `ReplayBuffer` takes of a shard's rollouts."""
        record = _record(pieces)
        replay = ReplayBuffer(record.num_tasks)
        replay.add(record)
        return replay.rollouts() if len(replay) else None

    def _tensors(self, weights: Mapping[str, Array] | Kept) -> Parameters:
        arrays = weights.value if isinstance(weights, Kept) else weights
        return {name: torch.as_tensor(array, device=self._device) for name, array in arrays.items()}

    def _batch(self, batch: Kept) -> Batch:
        def tensor(array: Array) -> torch.Tensor:
            return torch.as_tensor(array, device="cpu" if array.dtype == np.float64 else self._device)

        return Batch(*(None if each is None else tensor(each) for each in batch.value))  # type: ignore[arg-type]


def _record(pieces: Sequence[Kept]) -> Rollouts:
    """The rollouts of a shard."""
    return Rollouts.concatenate([piece.value for piece in pieces]).trimmed()
