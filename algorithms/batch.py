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
from ssm_metarl.algorithms.registry import MetaConfig
from ssm_metarl.algorithms.returns import advantages as estimate
from ssm_metarl.algorithms.returns import discounted_returns, normalized, step_means, tells_apart
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
            they are normalised over all tasks, which are told apart by what is expected of them.
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
    rollouts = rollouts.masked()
    discount, gae_lambda, baseline = config.discount, config.gae_lambda, config.baseline
    level = np.zeros((1, 1, 1))
    if values is not None and baseline == "privileged":
        # Most of a return is what everybody gets from that step on. A critic that had to learn it, too, would for
        # long be worse than none: of the return that is left it says how a task and a past differ from the others.
        returns = discounted_returns(rollouts.rewards / np.float32(reward_scale), rollouts.valid, discount)
        level = step_means(returns, rollouts.valid)
        values = values + np.pad(level, ((0, 0), (0, 1), (0, 0)))
    raw, expected = estimate(rollouts, discount, gae_lambda, baseline, values, reward_scale)
    some = tells_apart(rollouts, discount)
    own_raw = raw
    if baseline in ("time", "privileged"):  # how a task adapts must depend neither on the others nor on what it is
        own_raw = estimate(rollouts, discount, gae_lambda)[0]
    own = normalized(own_raw, rollouts.valid) * some.astype(np.float32)[:, None, None]
    if not config.normalize_advantages:
        outer = raw.astype(np.float32)
    else:
        outer = own if baseline == "linear" else normalized(raw, rollouts.valid, (0, 1, 2))
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
        outer_advantages=tensor(outer),
        targets=tensor((raw + expected - level).astype(np.float32)) if values is not None else None,
        task_features=tensor(task_numbers(rollouts.tasks)) if baseline == "privileged" else None,
    )


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


def task_shards(shape: Sequence[int], steps: int = 20_000) -> list[slice]:
    """Slices of the tasks, equal to one task and even in number, of at most about `steps` environment steps each.

    Fewer and larger ones pay less for each operation's start, smaller ones need less memory. Two are the least, so that
    two cores can share the work.

    Args:
        shape: of the batch, [M, T, K].
        steps: about the most of a shard.
    """
    tasks, *per_task = shape
    count = min(tasks, 2 * math.ceil(tasks * math.prod(per_task) / (2 * steps)))
    borders = [tasks * i // count for i in range(count + 1)]
    return [slice(*pair) for pair in pairwise(borders)]
