"""Evaluation after 0..S adaptation steps: the only evaluator; the command line and training use it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from torch.func import functional_call

from .maml import Batch, MetaConfig, critic_inputs, for_tasks, inner_step, make_batch, task_shards
from .policy import SSMPolicy, numpy_weights
from .rollouts import Array, Rollouts

Weights = dict[str, Array]
Result = TypeVar("Result")


class Collect(Protocol):
    """How an evaluator gets rollouts of its tasks; ``Pool`` provides it, in process or over Ray."""

    def __call__(self, weights: Mapping[str, Array], step: int) -> Rollouts:
        """Roll every task out with ``weights`` (shared, or [M, ...] a task) after ``step`` adaptation steps."""


@dataclass(frozen=True)
class Evaluation:
    """Undiscounted returns over adaptation steps 0..S.

    Attributes:
        returns: [M, S+1] float64, mean over a task's episodes; NaN where all of them were dropped.
        lengths: [M, S+1] float64, mean episode length in steps.
        environment_steps: all steps taken, those of the last step's rollouts included.
        seconds: wall time.
        task, split: where the tasks come from.
    """

    returns: Array
    lengths: Array
    environment_steps: int
    seconds: float
    task: str = ""
    split: str = ""

    def summary(self) -> dict[str, Any]:
        """JSON values: lists ``return``, ``ci_low``, ``ci_high`` (95 %), ``episode_length`` over 0..S, and totals."""
        mean, low, high = confidence_interval(self.returns)
        return {
            "task": self.task,
            "split": self.split,
            "return": mean.tolist(),
            "ci_low": low.tolist(),
            "ci_high": high.tolist(),
            "episode_length": np.nanmean(self.lengths, 0).tolist(),
            "num_tasks": len(self.returns),
            "environment_steps": self.environment_steps,
            "seconds": self.seconds,
        }


def confidence_interval(samples: Array, level: float = 0.95) -> tuple[Array, Array, Array]:
    """Student's interval of a mean over the first axis; NaN entries are left out.

    Args:
        samples: [n, ...], independent over the first axis.
        level: coverage, in (0, 1).

    Returns:
        Mean, lower and upper bound, [...] each; bounds equal the mean where fewer than two samples are left.
    """
    count = np.sum(np.isfinite(samples), 0)
    mean = np.nanmean(samples, 0)
    spread = np.nanstd(samples, 0) * np.sqrt(count / np.maximum(count - 1, 1))
    half = stats.t.ppf(0.5 + level / 2, np.maximum(count - 1, 1)) * spread / np.sqrt(count)
    half = np.where(count > 1, half, 0.0)
    return mean, mean - half, mean + half


def evaluate(policy: SSMPolicy, config: MetaConfig, collect: Collect, steps: int) -> Evaluation:
    """Returns of every task before adaptation and after each of ``steps`` inner steps.

    Steps beyond those that the policy was meta-trained for are half as large, as in MAML's own evaluation (Finn et
    al. 2017, appendix A.2): advantages are normalised, so that near an optimum a full step would follow noise.

    Args:
        policy: the meta-trained policy.
        config: inner algorithm, step size and the number of steps trained for.
        collect: rolls the tasks out; called for steps 0..S in order.
        steps: number S of adaptation steps.
    """
    begin = time.perf_counter()
    weights = policy.numpy_weights()
    returns, lengths, environment_steps = [], [], 0
    for step in range(steps + 1):
        rollouts = collect(weights, step)
        environment_steps += rollouts.num_steps
        returns.append(_task_means(rollouts.returns()))
        lengths.append(_task_means(np.where(rollouts.kept(), rollouts.lengths(), np.nan)))
        if step < steps:
            step_config = config if step < config.inner_steps else replace(config, inner_lr=config.inner_lr / 2)
            batch = batch_for(policy, weights, rollouts, config)
            weights = adapt_weights(policy, weights, batch, step_config)
    seconds = time.perf_counter() - begin
    return Evaluation(np.stack(returns, 1), np.stack(lengths, 1), environment_steps, seconds)


class Run(Protocol):
    """Applies a function to each shard of the tasks, such as on several threads, each with a module of its own."""

    def __call__(self, work: Callable[[SSMPolicy, slice], Result], shards: Sequence[slice]) -> list[Result]:
        """The results in the shards' order."""


def batch_for(
    policy: SSMPolicy, weights: Mapping[str, Array], rollouts: Rollouts, config: MetaConfig, run: Run | None = None
) -> Batch:
    """Rollouts as the objectives read them, with the critic's values where it is the baseline.

    Args:
        weights: that acted, shared or [M, ...].
        run: see ``Run``; None: one shard after the other with ``policy``.
    """
    device = next(policy.parameters()).device
    if config.baseline != "critic":
        return make_batch(policy.spec, rollouts, config, device)
    inputs, resets = critic_inputs(policy.spec, rollouts)
    own = {name: torch.as_tensor(value, device=device) for name, value in weights.items()}
    shared = own["encoder.weight"].dim() == 2

    def value(module: SSMPolicy, part: slice) -> Array:
        parameters = own if shared else {name: value[part] for name, value in own.items()}
        arguments = (torch.as_tensor(array[part], device=device) for array in (inputs, resets))
        with torch.no_grad():
            return functional_call(module, parameters, tuple(arguments)).values.cpu().numpy()

    shards = task_shards(resets.shape)
    values = run(value, shards) if run else [value(policy, part) for part in shards]
    return make_batch(policy.spec, rollouts, config, device, np.concatenate(values), policy.reward_scaling)


def adapt_weights(
    policy: SSMPolicy,
    current: Mapping[str, Tensor] | Mapping[str, Array],
    batch: Batch,
    config: MetaConfig,
    run: Run | None = None,
) -> Weights:
    """One inner step of every task of ``batch``, for acting with afterwards.

    Args:
        current: shared meta-parameters, or the tasks' own weights [M, ...] from the step before.
        run: see ``Run``; None: one shard after the other with ``policy``.

    Returns:
        Weights by name, [M, ...] float32 each.
    """
    device = batch.share.device
    tensors = {name: torch.as_tensor(value, device=device) for name, value in current.items()}
    if tensors["encoder.weight"].dim() == 2:
        tensors = for_tasks(tensors, batch.share.shape[0])
    fixed = numpy_weights({name: tensors.pop(name) for name, _ in policy.named_buffers()})  # the normaliser

    def adapt(module: SSMPolicy, part: slice) -> Weights:
        own = {name: value[part] for name, value in tensors.items()}
        return numpy_weights(inner_step(module, own, batch.tasks(part), config, differentiable=False)[0])

    shards = task_shards(batch.share.shape)
    parts = run(adapt, shards) if run else [adapt(policy, part) for part in shards]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} | fixed


def _task_means(values: Array) -> Array:
    """Mean over columns, NaN without any: [M, K] → [M]."""
    count = np.isfinite(values).sum(1)
    return np.where(count > 0, np.nansum(values, 1) / np.maximum(count, 1), np.nan)
