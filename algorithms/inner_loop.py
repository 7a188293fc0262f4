"""MAML's inner loop: one policy-gradient step of every task.

The inner step is written once. The meta-objective differentiates through it, evaluation and the collection of query
rollouts use its value. All tasks of a meta-batch adapt in one call: parameters carry a leading task axis [M, ...],
so that a sum of per-task losses has every task's own gradient as its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

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


class Run(Protocol):
    """Applies a function to each shard of the tasks, such as on several threads, each with a module of its own."""

    def __call__(self, work: Callable[[SSMPolicy, slice], Result], shards: Sequence[slice]) -> list[Result]:
        """The results in the shards' order."""


def by_shard(
    policy: SSMPolicy,
    work: Callable[[SSMPolicy, Parameters, slice], Result],
    weights: Mapping[str, Tensor] | Mapping[str, Array],
    shape: Sequence[int],
    run: Run | None = None,
) -> list[Result]:
    """The results of `work` for each shard of M tasks, in order.

    Args:
        work: given a module like `policy`, the weights of the shard's tasks, and the shard.
        weights: shared or [M, ...].
        shape: of the tasks' steps, [M, T, K].
        run: see `Run`; None: one shard after the other with `policy`.
    """
    tensors = {name: torch.as_tensor(value) for name, value in weights.items()}

    def one(module: SSMPolicy, part: slice) -> Result:
        return work(module, of_tasks(tensors, part), part)

    shards = task_shards(shape)
    return run(one, shards) if run else [one(policy, part) for part in shards]


def batch_for(
    policy: SSMPolicy,
    weights: Mapping[str, Array],
    rollouts: Rollouts,
    config: MetaConfig,
    run: Run | None = None,
) -> Batch:
    """Rollouts as the objectives read them, with a critic's values where one is the baseline.

    Args:
        weights: that acted, shared or [M, ...].
        run: see `by_shard`.
    """
    device = next(policy.parameters()).device
    if config.baseline not in CRITICS:
        return make_batch(policy.spec, rollouts, config, device)
    inputs, resets = critic_inputs(policy.spec, rollouts)
    own = {name: torch.as_tensor(value, device=device) for name, value in weights.items()}
    task_features = (
        torch.as_tensor(task_numbers(rollouts.tasks), device=device) if config.baseline == "privileged" else None
    )

    @torch.no_grad()
    def value(module: SSMPolicy, parameters: Parameters, part: slice) -> Array:
        arguments = (torch.as_tensor(array[part], device=device) for array in (inputs, resets))
        told = None if task_features is None else task_features[part]
        return np.asarray(functional_call(module, parameters, (*arguments, None, told)).values.cpu().numpy())

    values = by_shard(policy, value, own, resets.shape, run)
    return make_batch(policy.spec, rollouts, config, device, np.concatenate(values), policy.reward_scaling)


def adapt_weights(
    policy: SSMPolicy,
    current: Mapping[str, Tensor] | Mapping[str, Array],
    batch: Batch,
    config: MetaConfig,
    run: Run | None = None,
) -> Weights:
    """One inner step of every task of `batch`, for acting with afterwards.

    Args:
        current: shared meta-parameters, or the tasks' own weights [M, ...] from the step before.
        run: see `by_shard`.

    Returns:
        Weights by name, [M, ...] float32 each.
    """
    device = batch.share.device
    tensors = {name: torch.as_tensor(value, device=device) for name, value in current.items()}
    if not per_task(tensors):
        tensors = for_tasks(tensors, batch.share.shape[0])
    fixed = numpy_weights({name: tensors.pop(name) for name, _ in policy.named_buffers()})  # the normaliser

    def adapt(module: SSMPolicy, own: Parameters, part: slice) -> Weights:
        return numpy_weights(inner_step(module, own, batch.tasks(part), config, differentiable=False)[0])

    parts = by_shard(policy, adapt, tensors, batch.share.shape, run)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} | fixed
