"""Which tasks a policy is tried on, and what plays them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssm_metarl.algorithms.policy import SSMPolicy
from ssm_metarl.checks import check_count
from ssm_metarl.config import TrainConfig
from ssm_metarl.core import Collect
from ssm_metarl.distributed.cluster import check_resources, start_ray
from ssm_metarl.distributed.collection import StageCollector
from ssm_metarl.distributed.pool import Pool
from ssm_metarl.seeds import Branch, seed_for
from ssm_metarl.storage.checkpoint import load_policy
from ssm_metarl.storage.contents import Checkpoint
from ssm_metarl.tasks import Task, TaskDistribution, make

SPLIT_BRANCHES = {"train": 0, "validation": 1, "test": 2, "shifted": 3, "shifted-test": 4}
"""Branches of the seed tree for the splits' tasks: validation and test never meet the tasks of training."""


@dataclass(frozen=True)
class TaskSource:
    """Which tasks a checkpoint is tried on.

    Attributes:
        task: family of the tasks; None: the one it was trained on.
        task_options, task_ranges: of the family; None: as in training if it is the same one, else none.
        split: of that family.
        distribution: the family itself, instead of a registered one.
    """

    task: str | None = None
    task_options: Mapping[str, Any] | None = None
    task_ranges: Mapping[str, Any] | None = None
    split: str = "test"
    distribution: TaskDistribution | None = None

    def family(self, config: TrainConfig) -> TaskDistribution:
        """The family, that of training but for what is given; checked to have the split.

        Raises:
            ValueError: an unknown task, option, range or split; one sentence.
        """
        options, ranges = self.task_options, self.task_ranges
        if self.distribution is not None:
            family = self.distribution
        elif self.task is not None and self.task != config.task:
            family = make(self.task, options or {}, ranges or {})
        else:
            options = config.task_options if options is None else options
            family = make(config.task, options, config.task_ranges if ranges is None else ranges)
        family.sample(0, np.random.default_rng(), self.split)
        return family


@dataclass(frozen=True)
class Subject:
    """A policy, how it was trained, and a pool that plays it."""

    policy: SSMPolicy
    checkpoint: Checkpoint
    config: TrainConfig
    family: TaskDistribution
    pool: Pool


@contextmanager
def open_subject(path: str | Path, source: TaskSource, num_workers: int, **changes: Any) -> Iterator[Subject]:
    """Load a checkpoint, check that its policy fits the tasks, and start what plays it.

    Args:
        changes: of the config.
    """
    policy, checkpoint = load_policy(path)
    given = {name: value for name, value in changes.items() if value is not None}
    config = TrainConfig.from_dict({**checkpoint.config, **given})
    family = source.family(config)
    if config.policy_spec(family) != policy.spec:
        difference = policy.spec.misfit(family.observation_space, family.action_space)
        difference = difference or f"its critic reads {policy.spec.task_size} numbers of a task"
        raise ValueError(f"The policy cannot play {family.name!r}: {difference}.")
    check_count("num_workers", num_workers, 0)
    start_ray(num_workers)
    check_resources(num_workers)
    with Pool(
        family,
        policy.spec,
        num_workers=num_workers,
        trial_episodes=config.trial_episodes,
        name=f"ssm-metarl/evaluate/{time.time_ns()}",
    ) as pool:
        yield Subject(policy, checkpoint, config, family, pool)


def sample_split(family: TaskDistribution, split: str, num_tasks: int, seed: int) -> list[Task]:
    """Held-out tasks: equal splits and seeds give equal tasks."""
    return family.sample(num_tasks, np.random.default_rng(seed_for(seed, Branch.EVALUATION, _branch(split))), split)


def _branch(split: str) -> int:
    return SPLIT_BRANCHES.get(split, len(SPLIT_BRANCHES))


def collect_split(
    pool: Pool,
    tasks: Sequence[Task],
    split: str,
    seed: int,
    *,
    branch: Branch = Branch.EVALUATION,
    deterministic: bool = False,
) -> Collect:
    """What plays the tasks, each step's episodes with random numbers of their own."""

    def seeds(step: int) -> list[np.random.SeedSequence]:
        return [seed_for(seed, branch, _branch(split), step, task) for task in range(len(tasks))]

    def label(step: int) -> str:
        return f"evaluation, step {step}" if branch == Branch.EVALUATION else "evaluation"

    return StageCollector(pool, tasks, seeds, label, deterministic=deterministic)
