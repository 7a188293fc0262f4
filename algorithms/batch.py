"""Rollouts of M tasks as the objectives read them: inputs, advantages and each step's share, as tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_metarl.algorithms.inputs import policy_inputs, task_numbers
from ssm_metarl.algorithms.normalizer import RunningMoments
from ssm_metarl.algorithms.registry import MetaConfig
from ssm_metarl.algorithms.returns import advantages as estimate
from ssm_metarl.algorithms.returns import discounted_returns, normalized, tells_apart
from ssm_metarl.algorithms.rollouts import Array, Rollouts
from ssm_metarl.algorithms.spec import PolicySpec


class Batch(NamedTuple):
    """Rollouts of M tasks as the objectives read them; all tensors on one device.

    Attributes:
        inputs: [M, T, K, I] float32, see `policy_inputs`.
        resets: [M, T, K] bool, or None where the only reset is at the first step (which starts from zero anyway).
        actions: [M, T, K, A] float32, or int64 [M, T, K] or with several heads [M, T, K, D].
        log_probs: [M, T, K] float32, of the policy that acted.
        advantages: [M, T, K] float32, 0 where not valid: for the inner step, normalised in each task.
        share: [M, T, K] float32, each valid step's share of its task's mean; 0 where not valid, sums to 1 a task (to
            0 for a task without any step).
        outer_advantages: the same for the outer objective; with the linear baseline the same numbers. With the others
            they are normalised over all tasks, which are told apart by what is expected of them (float64 until
            `standardized` has done that).
        targets: [M, T, K] float32, what the value head should have said, with the privileged baseline beyond the time
            step's mean return; None without a critic.
        task_features: [M, P] float32, which the privileged critic reads; None without one.
        demonstrated: of the shape of `actions`, what a baseline policy would have done; None: nobody is imitated.
    """

    inputs: Tensor
    resets: Tensor | None
    actions: Tensor
    log_probs: Tensor
    advantages: Tensor
    share: Tensor
    outer_advantages: Tensor
    targets: Tensor | None = None
    task_features: Tensor | None = None
    demonstrated: Tensor | None = None

    def tasks(self, part: slice | Tensor) -> Batch:
        """The batch of some of its tasks: a slice, or indices [n]."""
        return Batch(*(None if x is None else x[part] for x in self))  # type: ignore[arg-type]

    def beside(self, other: Batch) -> Batch:
        """The same tasks with the episodes of `other` after their own, padded in time with steps without a share.

        Args:
            other: a batch of as many tasks.
        """
        longest = max(self.share.shape[1], other.share.shape[1])

        def joined(own: Tensor, others: Tensor) -> Tensor:
            parts = (F.pad(x, (*[0, 0] * (x.dim() - 2), 0, longest - x.shape[1])) for x in (own, others))
            return torch.cat(list(parts), 2)

        named = {
            name: joined(getattr(self, name), getattr(other, name))
            for name in ("inputs", "actions", "log_probs", "advantages", "share", "outer_advantages")
        }
        resets = [
            torch.zeros_like(batch.share, dtype=torch.bool) if batch.resets is None else batch.resets
            for batch in (self, other)
        ]
        together = None if self.resets is None and other.resets is None else joined(*resets)
        return self._replace(**named, resets=together, targets=None)

    def counted(self, numbers: Tensor) -> Tensor:
        """`numbers` [M, T, K], and 0 where a step has no share.

        A product with the share alone would not do: what a policy says of a step that nobody took can overflow, and
        infinity times 0 is not a number.
        """
        return torch.where(self.share > 0, numbers, 0.0)

    def log_ratio(self, log_probs: Tensor) -> Tensor:
        """log π/π_old of the actions, from π's log-probabilities [M, T, K]; 0 where a step has no share."""
        return self.counted(log_probs - self.log_probs)


def make_batch(
    spec: PolicySpec,
    rollouts: Rollouts,
    config: MetaConfig,
    device: torch.device | str = "cpu",
    values: Array | None = None,
    reward_scale: float = 1.0,
) -> Batch:
    """Rollouts with inputs rebuilt and advantages estimated.

    Args:
        values: with a critic as baseline, what it says of `critic_inputs`, [M, T + 1, K].
        reward_scale: what rewards are divided by for the critic.
    """
    totals = [step_totals(rollouts, config, reward_scale)] if config.baseline in COMPARING else []
    batch = shard_batch(spec, rollouts, config, device, values, reward_scale, mean_returns(totals))
    return standardized(batch, config, outer_moments([advantage_moments(batch, config)]))


def shard_batch(
    spec: PolicySpec,
    rollouts: Rollouts,
    config: MetaConfig,
    device: torch.device | str = "cpu",
    values: Array | None = None,
    reward_scale: float = 1.0,
    level: Array | None = None,
) -> Batch:
    """The same for some tasks of a meta-batch: as far as it goes without the others, see `standardized`.

    Args:
        level: `mean_returns` of the whole meta-batch, for the baselines of `COMPARING`, [T] or longer.
    """
    rollouts = rollouts.masked()
    steps = rollouts.valid.shape[1]
    discount, gae_lambda, baseline = config.discount, config.gae_lambda, config.baseline
    known = np.zeros(steps + 1)
    if level is not None:
        known[: len(level)] = level[: steps + 1]
    beyond = np.zeros((1, 1, 1))
    if values is not None and baseline == "privileged":
        # Most of a return is what everybody gets from that step on. A critic that had to learn it, too, would for
        # long be worse than none: of the return that is left it says how a task and a past differ from the others.
        beyond = known[None, :-1, None]
        values = values + known[None, :, None]
    raw, expected = estimate(rollouts, discount, gae_lambda, baseline, values, reward_scale, known[:-1])
    some = tells_apart(rollouts, discount)
    own_raw = raw
    if baseline in COMPARING:  # how a task adapts must depend neither on the others nor on what it is
        own_raw = estimate(rollouts, discount, gae_lambda)[0]
    own = normalized(own_raw, rollouts.valid) * some.astype(np.float32)[:, None, None]
    if not config.normalize_advantages:
        outer = raw.astype(np.float32)
    else:
        outer = own if baseline == "linear" else raw
    total = rollouts.valid.sum((1, 2), keepdims=True)
    share = (rollouts.valid / np.where(total > 0, total, 1)).astype(np.float32)

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    return Batch(
        inputs=tensor(policy_inputs(spec, rollouts)),
        resets=tensor(rollouts.resets) if rollouts.resets[:, 1:].any() else None,
        actions=tensor(rollouts.actions),
        log_probs=tensor(rollouts.log_probs),
        advantages=tensor(own),
        share=tensor(share),
        # Not all devices have float64: it stays on the CPU until `standardized` has normalised it.
        outer_advantages=tensor(outer) if outer.dtype == np.float32 else torch.from_numpy(np.ascontiguousarray(outer)),
        targets=tensor((raw + expected - beyond).astype(np.float32)) if values is not None else None,
        task_features=tensor(task_numbers(rollouts.tasks)) if baseline == "privileged" else None,
    )


COMPARING = ("time", "privileged")
"""Baselines that compare a task with the others of its meta-batch."""


def step_totals(rollouts: Rollouts, config: MetaConfig, reward_scale: float = 1.0) -> Array:
    """What some tasks add to `mean_returns`: each time step's sum of returns over tasks and slots, and their number.

    Returns:
        [2, T] float64.
    """
    returns = discounted_returns(rollouts.rewards / np.float32(reward_scale), rollouts.valid, config.discount)
    return np.stack([returns.sum((0, 2)), rollouts.valid.sum((0, 2))])


def mean_returns(totals: Sequence[Array]) -> Array | None:
    """Each time step's mean discounted return over a meta-batch, [T] float64, from its shards' `step_totals`.

    None without any. Added up in the shards' order, so that it does not matter who has computed them.
    """
    if not totals:
        return None
    total = np.zeros((2, max(each.shape[1] for each in totals)))
    for each in totals:
        total[:, : each.shape[1]] += each
    return np.asarray(total[0] / np.maximum(total[1], 1))


def advantage_moments(batch: Batch, config: MetaConfig) -> RunningMoments | None:
    """Moments of the outer advantages, where they are to be normalised over the whole meta-batch; else None."""
    if config.baseline == "linear" or not config.normalize_advantages:
        return None
    moments = RunningMoments(1)
    moments.update(batch.outer_advantages[batch.share.cpu() > 0].numpy()[:, None])
    return moments


def outer_moments(shards: Sequence[RunningMoments | None]) -> tuple[float, float] | None:
    """Mean and standard deviation of the outer advantages of a meta-batch, from its shards' moments in their order."""
    together = RunningMoments(1)
    for each in shards:
        if each is None:
            return None
        together.merge(each)
    return float(together.mean[0]), float(together.deviation[0])


def standardized(batch: Batch, config: MetaConfig, moments: tuple[float, float] | None) -> Batch:
    """A `shard_batch` with its outer advantages normalised over the whole meta-batch, by `outer_moments` of it."""
    if moments is None:
        return batch
    mean, deviation = moments
    outer = torch.where(batch.share.cpu() > 0, batch.outer_advantages - mean, 0.0) / (deviation + 1e-8)
    return batch._replace(outer_advantages=outer.float().to(batch.share.device))


def replayed_batch(spec: PolicySpec, rollouts: Rollouts, advantages: Array, weight: Array, ratio: Array) -> Batch:
    """Stored episodes of M tasks, each with one advantage for all its steps.

    Args:
        rollouts: with the current policy's log-probabilities.
        advantages: [M, K], of the episodes.
        weight: [M, K], of each episode, at least 0.
        ratio: [M], the sum of a task's shares: how much these episodes count beside its own, whose shares sum to 1.
    """
    rollouts = rollouts.masked()
    counted = rollouts.valid * weight[:, None]
    total = counted.sum((1, 2), keepdims=True)
    share = counted / np.where(total > 0, total, 1) * ratio[:, None, None]
    same = torch.from_numpy((advantages[:, None] * rollouts.valid).astype(np.float32))
    return Batch(
        inputs=torch.from_numpy(policy_inputs(spec, rollouts)),
        resets=torch.from_numpy(rollouts.resets) if rollouts.resets[:, 1:].any() else None,
        actions=torch.from_numpy(rollouts.actions),
        log_probs=torch.from_numpy(rollouts.log_probs),
        advantages=same,
        share=torch.from_numpy(share.astype(np.float32)),
        outer_advantages=same,
    )


def task_shards(shape: Sequence[int], minibatches: int = 1, *, steps: int = 20_000) -> list[slice]:
    """Slices of the tasks, equal to one task and even in number, of at most about `steps` environment steps each.

    A shard is what is computed at once, and what a learner owns. Fewer and larger ones pay less for each operation's
    start, smaller ones need less memory. Two are the least, so that two cores can share the work.

    Args:
        shape: of the batch, [M, T, K]; T is the longest that an episode slot can be, so that the shards are known
            before anything is played.
        minibatches: B; each is made of whole shards, at least two where there are as many tasks.
        steps: about the most of a shard.

    Returns:
        B times as many shards as a minibatch has.
    """
    tasks, *per_task = shape
    parts = min(minibatches, tasks)
    each = min(tasks // parts, 2 * math.ceil(tasks * math.prod(per_task) / (2 * steps * parts)))
    borders = [tasks * i // (parts * each) for i in range(parts * each + 1)]
    return [slice(*pair) for pair in pairwise(borders)]


def draw_minibatches(shards: int, minibatches: int, rng: np.random.Generator | None) -> list[list[int]]:
    """The shards of each minibatch of a pass, in random order, or (without `rng`) all as one.

    Each minibatch has one of every `minibatches` consecutive shards: tasks are drawn independently, so that it matters
    little which of them stand together, and learners that own consecutive shards share the work of each minibatch.

    Args:
        shards: their number, see `task_shards`.
    """
    if rng is None:
        return [list(range(shards))]
    minibatches = min(minibatches, shards)
    columns = [first + rng.permutation(minibatches) for first in range(0, shards, minibatches)]
    return [[int(column[i]) for column in columns] for i in range(minibatches)]
