"""Which tasks a policy is tried on and how, and what plays them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ssm_metarl.config import TrainConfig
from ssm_metarl.core import Collect
from ssm_metarl.distributed.collection import StageCollector
from ssm_metarl.distributed.pool import Pool
from ssm_metarl.evaluation.config import EvaluationConfig
from ssm_metarl.seeds import Branch, seed_for
from ssm_metarl.storage.checkpoint import load_policy
from ssm_metarl.storage.contents import Checkpoint
from ssm_metarl.storage.trust import check_task
from ssm_metarl.tasks import Task, TaskDistribution

if TYPE_CHECKING:
    from ssm_metarl.algorithms.policy import SSMPolicy  # loads torch, which the options of a command can do without

SPLIT_BRANCHES = {"train": 0, "validation": 1, "test": 2, "shifted": 3, "shifted-test": 4}
"""Branches of the seed tree for the splits' tasks: validation and test never meet the tasks of training."""


@dataclass(frozen=True)
class Subject:
    """A policy, how it was trained, and a pool that plays it."""

    policy: SSMPolicy
    checkpoint: Checkpoint
    trained: TrainConfig
    family: TaskDistribution
    pool: Pool


@contextmanager
def open_subject(
    path: str | Path, config: EvaluationConfig, distribution: TaskDistribution | None = None
) -> Iterator[Subject]:
    """Load a checkpoint, check that its policy fits the tasks, and start what plays it."""
    policy, checkpoint = load_policy(path)
    trained = TrainConfig.from_checkpoint(checkpoint.config)
    if distribution is None and config.task is None:
        options = trained.task_options if config.task_options is None else {}
        check_task(path, trained.task, options=options, trusted=config.trust_checkpoint_code)
    family = distribution or config.family(trained)
    family.sample(0, np.random.default_rng(), config.split)  # refuses a split that it does not have
    if trained.policy_spec(family) != policy.spec:
        difference = policy.spec.misfit(family.observation_space, family.action_space)
        difference = difference or f"its critic reads {policy.spec.task_size} numbers of a task"
        raise ValueError(f"The policy cannot play {family.name!r}: {difference}.")
    start_ray(config.num_workers)
    with Pool(
        family,
        policy.spec,
        num_workers=config.num_workers,
        trial_episodes=trained.experience.trial_episodes,
        name=f"ssm-metarl/evaluate/{time.time_ns()}",
    ) as pool:
        yield Subject(policy, checkpoint, trained, family, pool)


def start_ray(num_workers: int) -> None:
    """Have Ray, with processors for so many workers; without any, it is not even loaded."""
    if num_workers:
        from ssm_metarl.distributed import cluster

        cluster.start_ray(num_workers)
        cluster.check_resources(num_workers)


def sample_tasks(family: TaskDistribution, config: EvaluationConfig) -> list[Task]:
    """Held-out tasks: equal splits and seeds give equal tasks."""
    seed = seed_for(config.seed, Branch.EVALUATION, _branch(config.split))
    return family.sample(config.num_tasks, np.random.default_rng(seed), config.split)


def _branch(split: str) -> int:
    return SPLIT_BRANCHES.get(split, len(SPLIT_BRANCHES))


def collector(
    pool: Pool, tasks: Sequence[Task], config: EvaluationConfig, branch: Branch = Branch.EVALUATION
) -> Collect:
    """What plays the tasks, each step's episodes with random numbers of their own."""

    def seeds(step: int) -> list[np.random.SeedSequence]:
        return [seed_for(config.seed, branch, _branch(config.split), step, task) for task in range(len(tasks))]

    def label(step: int) -> str:
        return f"evaluation, step {step}" if branch == Branch.EVALUATION else "evaluation"

    return StageCollector(pool, tasks, seeds, label, deterministic=config.deterministic)
