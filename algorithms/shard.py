"""What is computed on a shard: some consecutive tasks of a meta-batch, with the same result wherever that is done.

A shard never sees the others: what needs all tasks of a meta-batch comes in as a few numbers, which are added up over
the shards in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ssm_metarl.algorithms.batch import Batch, shard_batch
from ssm_metarl.algorithms.inner_loop import Parameters, critic_values
from ssm_metarl.algorithms.objective import distribution_of, distribution_parameters, meta_loss
from ssm_metarl.algorithms.policy import SSMPolicy
from ssm_metarl.algorithms.registry import CRITICS, MetaConfig
from ssm_metarl.algorithms.rollouts import Array, Rollouts

Gradient = list[Tensor | None]
"""By parameter, in the policy's order; None for one that the loss does not depend on."""

Value = TypeVar("Value")


def batch_of_shard(
    policy: SSMPolicy, parameters: Parameters, rollouts: Rollouts, config: MetaConfig, level: Array | None
) -> Batch:
    """A shard's rollouts as the objectives read them, but for what `standardized` does.

    Args:
        parameters: that acted, with the normaliser; shared or [m, ...].
        rollouts: of the shard.
        level: see `shard_batch`.
    """
    device = next(policy.parameters()).device
    if config.baseline not in CRITICS:
        return shard_batch(policy.spec, rollouts, config, device, level=level)
    values = critic_values(policy, parameters, rollouts, config)
    return shard_batch(policy.spec, rollouts, config, device, values, policy.reward_scaling, level)


class ShardLoss(NamedTuple):
    """A shard's share of the meta-objective; see `MetaLoss`.

    Attributes:
        losses, kl, moved: [m] float32.
        log_ratio, entropy: of the shard.
    """

    losses: Array
    kl: Array
    moved: Array
    log_ratio: float
    entropy: float


def meta_gradient(
    policy: SSMPolicy,
    parameters: Mapping[str, Tensor],
    stages: Sequence[Batch],
    config: MetaConfig,
    weight: Tensor,
    reference: Sequence[Tensor],
) -> tuple[Gradient, ShardLoss, list[Tensor]]:
    """The gradient of Σ weight · loss over a shard's tasks.

    Args:
        parameters: the meta-parameters, leaves that require a gradient.
        stages: S+1 batches of the shard.
        weight: [m], of each task's loss.
        reference: `distribution_parameters` of the policy before the first update; empty: it is this one.

    Returns:
        The gradient, what it cost, and the reference for later epochs.
    """
    several = not policy.spec.discrete or bool(policy.spec.action_heads)
    loss = meta_loss(policy, parameters, stages, config, distribution_of(reference, several) if reference else None)
    gradient = torch.autograd.grad((loss.losses * weight).sum(), list(parameters.values()), allow_unused=True)
    losses, kl, moved = (each.detach().cpu().numpy() for each in (loss.losses, loss.kl_before, loss.moved))
    summary = ShardLoss(losses, kl, moved, float(loss.log_ratio), float(loss.entropy))
    return list(gradient), summary, distribution_parameters(loss.before)


def added(one: list[Any], other: list[Any]) -> list[Any]:
    """The sum of two gradients, of tensors or of arrays."""
    return [a if b is None else b if a is None else a + b for a, b in zip(one, other, strict=True)]


def tree_total(
    leaves: int,
    known: Mapping[tuple[int, int], Value],
    add: Callable[[Value, Value], Value],
    node: tuple[int, int] | None = None,
) -> Value:
    """The sum of n values by halves: floating-point addition depends on the order, and this one is the same for all.

    Args:
        leaves: n.
        known: sums of the leaves from the first to before the second number: at least of each leaf, or of what
            `tree_nodes` takes together.
        node: one of `tree_nodes`, whose leaves alone are added; None: all.
    """

    def total(first: int, last: int) -> Value:
        if (first, last) in known:
            return known[first, last]
        middle = (first + last) // 2
        return add(total(first, middle), total(middle, last))

    return total(*(node or (0, leaves)))


def tree_nodes(leaves: int, first: int, last: int) -> list[tuple[int, int]]:
    """The fewest sums of `tree_total` that take the leaves from `first` to before `last` together, in order."""

    def nodes(low: int, high: int) -> list[tuple[int, int]]:
        if high <= first or low >= last or low >= high:
            return []
        if first <= low and high <= last:
            return [(low, high)]
        middle = (low + high) // 2
        return nodes(low, middle) + nodes(middle, high)

    return nodes(0, leaves)
