"""A policy on tasks it has not met, before adaptation and after each step: the only evaluator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ssm_metarl.algorithms.adapters import StandardAdapter
from ssm_metarl.algorithms.policy import SSMPolicy
from ssm_metarl.algorithms.registry import MetaConfig
from ssm_metarl.algorithms.rollouts import Array, Rollouts
from ssm_metarl.algorithms.statistics import confidence_interval, finite
from ssm_metarl.config import TrainConfig
from ssm_metarl.core import Collect
from ssm_metarl.distributed.pool import Pool
from ssm_metarl.evaluation.config import EvaluationConfig
from ssm_metarl.evaluation.tasks import collector, open_subject, sample_tasks
from ssm_metarl.tasks import TaskDistribution


@dataclass(frozen=True)
class Evaluation:
    """Undiscounted returns over adaptation steps 0..S.

    Attributes:
        returns: [M, S+1] float64, mean over a task's episodes; NaN where all of them were dropped.
        lengths: [M, S+1] float64, mean episode length in steps.
        by_episode: [S+1, E] float64, mean return of each episode of a trial, over tasks and trials; E is 1 where a
            trial is an episode. NaN where no trial has so many.
        success: [S+1, E] float64, share of those episodes that succeeded, see `collect`; None: the environment says
            nothing of it.
        environment_steps: all steps taken, those of the last step's rollouts included.
        seconds: wall time.
        task, split: where the tasks come from.
    """

    returns: Array
    lengths: Array
    by_episode: Array
    environment_steps: int
    seconds: float
    task: str = ""
    split: str = ""
    success: Array | None = None

    def summary(self) -> dict[str, Any]:
        """JSON values: lists `return`, `ci_low`, `ci_high`, `episode_length` and `return_by_episode` over 0..S, totals.

        The bounds are of the 95 % interval over tasks; null with fewer than two tasks. `success_by_episode` is there
        where the environment says it.
        """
        success = {} if self.success is None else {"success_by_episode": _rows(self.success)}
        mean, low, high = confidence_interval(self.returns)
        return {
            "task": self.task,
            "split": self.split,
            "return": mean.tolist(),
            "ci_low": [finite(bound) for bound in low],
            "ci_high": [finite(bound) for bound in high],
            "episode_length": np.nanmean(self.lengths, 0).tolist(),
            "return_by_episode": _rows(self.by_episode),
            **success,
            "num_tasks": len(self.returns),
            "environment_steps": self.environment_steps,
            "seconds": self.seconds,
        }


def evaluate(
    policy: SSMPolicy,
    config: MetaConfig,
    collect: Collect,
    steps: int,
    episodes: int,
    step_size: float | None = None,
) -> Evaluation:
    """Returns of every task before adaptation and after each of `steps` inner steps (see `StandardAdapter`).

    Args:
        policy: the meta-trained policy.
        config: inner algorithm, step size and the number of steps trained for.
        collect: rolls the tasks out; called for steps 0..S in order.
        steps: number S of adaptation steps.
        episodes: episodes a task and step.
        step_size: of the inner steps; None: as in training.
    """
    played, succeeded = list[Array](), list[Array | None]()

    def watched(weights: Mapping[str, Array], episodes: int, step: int) -> Rollouts:
        rollouts = collect(weights, episodes, step)
        own = rollouts.returns_by_episode()
        count = np.isfinite(own).sum((0, 1))
        played.append(np.divide(np.nansum(own, (0, 1)), count, out=np.full(len(count), np.nan), where=count > 0))
        succeeded.append(rollouts.success_rates())
        return rollouts

    found = StandardAdapter(policy, config, steps=steps, step_size=step_size).adapt(watched, episodes)
    # An environment may tell of a success alone, and a step may have none.
    told = any(rates is not None for rates in succeeded)
    rates = [np.zeros(len(own)) if each is None else each for own, each in zip(played, succeeded, strict=True)]
    success = _padded(rates) if told else None
    totals = found.environment_steps, found.seconds
    return Evaluation(found.returns, found.lengths, _padded(played), *totals, success=success)


def _padded(rows: Sequence[Array]) -> Array:
    """Rows that may be of different lengths, with NaN behind them."""
    padded = np.full((len(rows), max(map(len, rows))), np.nan)
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = values
    return padded


def _rows(values: Array) -> list[list[float | None]]:
    """As JSON values."""
    return [[finite(value) for value in row] for row in values]


def evaluate_checkpoint(
    path: str | Path,
    config: EvaluationConfig | None = None,
    *,
    distribution: TaskDistribution | None = None,
    **changes: Any,
) -> Evaluation:
    """Returns of a checkpoint's policy on held-out tasks before adaptation and after 1..`steps` inner steps:

        evaluate_checkpoint("pretrained:cartpole", split="shifted-test", steps=3).summary()

    Args:
        path: a checkpoint, a run folder for its best one, or pretrained:NAME.
        config: which tasks, how and where.
        distribution: the family itself, instead of a registered one.
        **changes: options of `EvaluationConfig`, in place of those of `config`.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or its task is code that nobody named here.
        ValueError: an unknown task or split, an impossible number, or a family whose spaces the policy does not fit.
        EnvironmentFailure: more than a tenth of a step's episodes are invalid.
    """
    config = replace(config or EvaluationConfig(), **changes)
    with open_subject(path, config, distribution) as subject:
        return evaluate_policy(subject.policy, subject.trained, subject.family, subject.pool, config)


def evaluate_policy(
    policy: SSMPolicy,
    trained: TrainConfig,
    family: TaskDistribution,
    pool: Pool,
    config: EvaluationConfig | None = None,
    **changes: Any,
) -> Evaluation:
    """`evaluate_checkpoint` for a policy in memory and a pool of its sizes; see there.

    Raises:
        ValueError: an unknown split.
        EnvironmentFailure: more than a tenth of a step's episodes are invalid.
    """
    config = replace(config or EvaluationConfig(), **changes)
    collect = collector(pool, sample_tasks(family, config), config)
    found = evaluate(policy, trained.meta, collect, *config.extent(trained), config.inner_lr)
    return replace(found, task=family.name, split=config.split)
