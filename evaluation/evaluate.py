"""A policy on tasks it has not met, before adaptation and after each step: the only evaluator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ssm_metarl.algorithms.adapters import StandardAdapter
from ssm_metarl.algorithms.policy import SSMPolicy
from ssm_metarl.algorithms.registry import MetaConfig
from ssm_metarl.algorithms.rollouts import Array
from ssm_metarl.algorithms.statistics import confidence_interval, finite
from ssm_metarl.checks import check_count
from ssm_metarl.config import TrainConfig
from ssm_metarl.core import Collect
from ssm_metarl.distributed.pool import Pool
from ssm_metarl.evaluation.tasks import TaskSource, collect_split, open_subject, sample_split
from ssm_metarl.tasks import TaskDistribution


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
        """JSON values: lists `return`, `ci_low`, `ci_high`, `episode_length` over 0..S, and totals.

        The bounds are of the 95 % interval over tasks; null with fewer than two tasks.
        """
        mean, low, high = confidence_interval(self.returns)
        return {
            "task": self.task,
            "split": self.split,
            "return": mean.tolist(),
            "ci_low": [finite(bound) for bound in low],
            "ci_high": [finite(bound) for bound in high],
            "episode_length": np.nanmean(self.lengths, 0).tolist(),
            "num_tasks": len(self.returns),
            "environment_steps": self.environment_steps,
            "seconds": self.seconds,
        }


def evaluate(policy: SSMPolicy, config: MetaConfig, collect: Collect, steps: int, episodes: int) -> Evaluation:
    """Returns of every task before adaptation and after each of `steps` inner steps (see `StandardAdapter`).

    Args:
        policy: the meta-trained policy.
        config: inner algorithm, step size and the number of steps trained for.
        collect: rolls the tasks out; called for steps 0..S in order.
        steps: number S of adaptation steps.
        episodes: episodes a task and step.
    """
    found = StandardAdapter(policy, config, steps=steps).adapt(collect, episodes)
    return Evaluation(found.returns, found.lengths, found.environment_steps, found.seconds)


def evaluate_checkpoint(
    path: str | Path,
    *,
    task: str | None = None,
    task_options: Mapping[str, Any] | None = None,
    task_ranges: Mapping[str, Any] | None = None,
    split: str = "test",
    num_tasks: int = 100,
    steps: int | None = None,
    episodes: int | None = None,
    seed: int = 0,
    num_workers: int = 0,
    deterministic: bool = False,
    distribution: TaskDistribution | None = None,
    inner_lr: float | None = None,
) -> Evaluation:
    """Returns of a checkpoint's policy on held-out tasks before adaptation and after 1..`steps` inner steps.

    Args:
        path: a checkpoint, a run folder for its best one, or pretrained:NAME.
        task, task_options, task_ranges, split, distribution: the tasks, see `TaskSource`.
        num_tasks: how many tasks.
        steps: adaptation steps S; None: as many as the policy was trained for.
        episodes: episodes a task and step; None: as in training.
        seed: of tasks and rollouts: equal seeds give equal tasks and common random numbers.
        num_workers: Ray actors; 0: in process.
        deterministic: take the most likely actions.
        inner_lr: step size; None: as in training.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
        ValueError: an unknown task or split, an impossible number, or a family whose spaces the policy does not fit.
        EnvironmentFailure: more than a tenth of a step's episodes are invalid.
    """
    counts = {"num_tasks": (num_tasks, 1), "seed": (seed, 0)}
    counts |= {"steps": (0 if steps is None else steps, 0), "episodes": (1 if episodes is None else episodes, 1)}
    for name, (value, least) in counts.items():
        check_count(name, value, least)
    source = TaskSource(task, task_options, task_ranges, split, distribution)
    with open_subject(path, source, num_workers, inner_lr=inner_lr) as subject:
        config = subject.config
        return evaluate_policy(
            subject.policy,
            config,
            subject.family,
            subject.pool,
            split=split,
            num_tasks=num_tasks,
            steps=config.inner_steps if steps is None else steps,
            episodes=config.episodes if episodes is None else episodes,
            seed=seed,
            deterministic=deterministic,
        )


def evaluate_policy(
    policy: SSMPolicy,
    config: TrainConfig,
    family: TaskDistribution,
    pool: Pool,
    *,
    split: str,
    num_tasks: int,
    steps: int,
    episodes: int,
    seed: int,
    deterministic: bool = False,
) -> Evaluation:
    """`evaluate_checkpoint` for a policy in memory and a pool of its sizes; see there.

    Raises:
        ValueError: an unknown split.
        EnvironmentFailure: more than a tenth of a step's episodes are invalid.
    """
    tasks = sample_split(family, split, num_tasks, seed)
    collect = collect_split(pool, tasks, split, seed, deterministic=deterministic)
    return replace(evaluate(policy, config, collect, steps, episodes), task=family.name, split=split)
