"""MAML's inner loop: one policy-gradient step of every task.

The inner step is written once. The meta-objective differentiates through it, evaluation and the collection of query
rollouts use its value. All tasks of a meta-batch adapt in one call: parameters carry a leading task axis [M, ...],
so that a sum of per-task losses has every task's own gradient as its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.func import functional_call

from ssm_metarl.algorithms.batch import Batch, make_batch, task_shards
from ssm_metarl.algorithms.inputs import critic_inputs, task_numbers
from ssm_metarl.algorithms.parameters import adapts, of_tasks, per_task, step_size
from ssm_metarl.algorithms.policy import PolicyOutput, SSMPolicy, numpy_weights
from ssm_metarl.algorithms.registry import ALGORITHMS, CRITICS, Algorithm, MetaConfig
from ssm_metarl.algorithms.rollouts import Array, Rollouts

Parameters = dict[str, Tensor]


def for_tasks(parameters: Mapping[str, Tensor], tasks: int) -> Parameters:
    """Shared parameters seen by each of M tasks: [M, ...] views, differentiable to the shared ones."""
    return {name: value.unsqueeze(0).expand(tasks, *value.shape) for name, value in parameters.items()}


def policy_outputs(policy: SSMPolicy, parameters: Parameters, batch: Batch) -> PolicyOutput:
    """What the policy with `parameters`, shared or [M, ...] each, says of every step of a batch."""
    output: PolicyOutput = functional_call(policy, parameters, (batch.inputs, batch.resets, None, batch.task_features))
    return output


def inner_loss(actions: Distribution, batch: Batch, algorithm: Algorithm) -> Tensor:
    """The negative policy-gradient objective that a task descends to adapt, [M].

    Args:
        actions: distributions of the policy that adapts over the batch's steps, [M, T, K].
        batch: support rollouts.
    """
    log_probs = actions.log_prob(batch.actions)
    weight = torch.exp(batch.log_ratio(log_probs)) if algorithm.inner_ratio else batch.counted(log_probs)
    return -(weight * batch.advantages * batch.share).sum((1, 2))


def inner_step(
    policy: SSMPolicy, parameters: Parameters, batch: Batch, config: MetaConfig, *, differentiable: bool
) -> tuple[Parameters, PolicyOutput]:
    """One gradient step of every task on its own support batch: θ'_i = θ_i - α ∇ L_i(θ_i).

    Args:
        parameters: [M, ...] each.
        batch: the M tasks' support rollouts, collected with `parameters` (or, in later epochs, their old values).
        differentiable: keep the graph from the result to `parameters`; without, the result is a new leaf.

    Returns:
        Parameters after the step, [M, ...] each, and what the policy before it says of the batch.
    """
    algorithm = ALGORITHMS[config.algorithm]
    if not differentiable:
        parameters = {name: value.detach().requires_grad_() for name, value in parameters.items()}
    output = policy_outputs(policy, parameters, batch)
    losses = inner_loss(output.actions, batch, algorithm)
    second_order = differentiable and algorithm.second_order
    # From the second step on, a task's parameters depend on the step sizes, whose gradient is no part of adaptation.
    adapting = {name: value for name, value in parameters.items() if adapts(name)}
    gradients = torch.autograd.grad(
        losses.sum(), list(adapting.values()), create_graph=second_order, retain_graph=differentiable
    )
    adapted = dict(parameters)
    for (name, value), gradient in zip(adapting.items(), gradients, strict=True):
        adapted[name] = value - config.inner_lr * gradient * parameters.get(step_size(name), 1.0)
    if not differentiable:
        adapted = {name: value.detach() for name, value in adapted.items()}
    return adapted, output


Weights = dict[str, Array]
Result = TypeVar("Result")


def by_shard(
    policy: SSMPolicy,
    work: Callable[[Parameters, slice], Result],
    weights: Mapping[str, Tensor] | Mapping[str, Array],
    shape: Sequence[int],
) -> list[Result]:
    """The results of `work` for each shard of M tasks, in order.

    Args:
        work: given the weights of the shard's tasks, and the shard.
        weights: shared or [M, ...].
        shape: of the tasks' steps, [M, T, K].
    """
    device = next(policy.parameters()).device
    tensors = {name: torch.as_tensor(value, device=device) for name, value in weights.items()}
    return [work(of_tasks(tensors, part), part) for part in task_shards(shape)]


def batch_for(policy: SSMPolicy, weights: Mapping[str, Array], rollouts: Rollouts, config: MetaConfig) -> Batch:
    """Rollouts as the objectives read them, with a critic's values where one is the baseline.

    Args:
        weights: that acted, shared or [M, ...].
    """
    device = next(policy.parameters()).device
    if config.baseline not in CRITICS:
        return make_batch(policy.spec, rollouts, config, device)

    def values(own: Parameters, part: slice) -> Array:
        return critic_values(policy, own, rollouts.select(part), config)

    found = by_shard(policy, values, weights, rollouts.valid.shape)
    return make_batch(policy.spec, rollouts, config, device, np.concatenate(found), policy.reward_scaling)


@torch.no_grad()
def critic_values(policy: SSMPolicy, parameters: Parameters, rollouts: Rollouts, config: MetaConfig) -> Array:
    """What the critic says of `critic_inputs`, [M, T + 1, K] float32.

    Args:
        parameters: that acted, shared or [M, ...].
    """
    device = next(policy.parameters()).device
    arguments = (torch.as_tensor(array, device=device) for array in critic_inputs(policy.spec, rollouts))
    inputs, resets = arguments
    told = None
    if config.baseline == "privileged":
        told = torch.as_tensor(task_numbers(rollouts.tasks), device=device)
    return np.asarray(functional_call(policy, parameters, (inputs, resets, None, told)).values.cpu().numpy())


def adapt_weights(
    policy: SSMPolicy,
    current: Mapping[str, Tensor] | Mapping[str, Array],
    batch: Batch,
    config: MetaConfig,
) -> Weights:
    """One inner step of every task of `batch`, for acting with afterwards.

    Args:
        current: shared meta-parameters, or the tasks' own weights [M, ...] from the step before.

    Returns:
        Weights by name, [M, ...] float32 each.
    """

    def adapt(own: Parameters, part: slice) -> Weights:
        return adapt_shard(policy, own, batch.tasks(part), config)

    parts = by_shard(policy, adapt, current, batch.share.shape)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def adapt_shard(policy: SSMPolicy, parameters: Parameters, batch: Batch, config: MetaConfig) -> Weights:
    """`adapt_weights` of tasks that are few enough to be computed at once."""
    if not per_task(parameters):
        parameters = for_tasks(parameters, batch.share.shape[0])
    adapting = dict(parameters)
    normalizer = {name: adapting.pop(name) for name, _ in policy.named_buffers()}
    adapted, _ = inner_step(policy, adapting, batch, config, differentiable=False)
    return numpy_weights(adapted) | numpy_weights(normalizer)
