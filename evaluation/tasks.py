"""Which tasks a policy is tried on and how, and what plays them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ssm_metarl.checks import check_count, check_flag, check_number
from ssm_metarl.config import TrainConfig
from ssm_metarl.core import Collect
from ssm_metarl.distributed.cluster import check_resources, start_ray
from ssm_metarl.distributed.collection import StageCollector
from ssm_metarl.distributed.pool import Pool
from ssm_metarl.seeds import Branch, seed_for
from ssm_metarl.storage.checkpoint import load_policy
from ssm_metarl.storage.contents import Checkpoint
from ssm_metarl.storage.trust import check_task
from ssm_metarl.tasks import Task, TaskDistribution, make

if TYPE_CHECKING:
    from ssm_metarl.algorithms.policy import SSMPolicy  # loads torch, which the options of a command can do without

SPLIT_BRANCHES = {"train": 0, "validation": 1, "test": 2, "shifted": 3, "shifted-test": 4}
"""Branches of the seed tree for the splits' tasks: validation and test never meet the tasks of training."""


Split = Literal["train", "validation", "test", "shifted", "shifted-test"]
"""The splits of the families here; one of the user's own may have others."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Which tasks a checkpoint is tried on, how, and where.

    Attributes:
        task: family of the tasks; by default the one of training.
        task_options: of the family; by default as in training.
        task_ranges: of gym:ID; by default as in training.
        split: train, validation, test, or outside the training range shifted and shifted-test.
        num_tasks: number of tasks.
        steps: inner steps; by default as many as the policy was trained for, and in a mode of adaptation at least one.
        episodes: episodes a task and step; by default as in training.
        inner_lr: step size of the inner steps; by default as in training.
        deterministic: take the most likely actions instead of sampling.
        seed: of tasks and rollouts: equal seeds give equal tasks and common random numbers.
        num_workers: Ray actors that collect rollouts; 0: in process.
        trust_checkpoint_code: run the code that the checkpoint names as its task, module:attribute or an environment of
            another package than gymnasium; without it only a task that is named here, or a family that is given.
    """

    task: str | None = None
    task_options: Mapping[str, Any] | None = None
    task_ranges: Mapping[str, Any] | None = None
    split: Split | str = "test"
    num_tasks: int = 100
    steps: int | None = None
    episodes: int | None = None
    inner_lr: float | None = None
    deterministic: bool = False
    seed: int = 0
    num_workers: int = 0
    trust_checkpoint_code: bool = False

    def __post_init__(self) -> None:
        check_count("num_tasks", self.num_tasks, 1)
        for name in ("seed", "num_workers"):
            check_count(name, getattr(self, name), 0)
        for name in ("deterministic", "trust_checkpoint_code"):
            check_flag(name, getattr(self, name))
        if self.steps is not None:
            check_count("steps", self.steps, 0)
        if self.episodes is not None:
            check_count("episodes", self.episodes, 1)
        if self.inner_lr is not None:
            check_number("inner_lr", self.inner_lr, above=0.0)

    def family(self, trained: TrainConfig) -> TaskDistribution:
        """The family, that of training but for what is given.

        Raises:
            ValueError: an unknown task, option or range; one sentence.
        """
        same = self.task in (None, trained.task)
        options = trained.task_options if same and self.task_options is None else self.task_options
        ranges = trained.task_ranges if same and self.task_ranges is None else self.task_ranges
        return make(self.task or trained.task, options or {}, ranges or {})

    def extent(self, trained: TrainConfig, least_steps: int = 0) -> tuple[int, int]:
        """Steps, and episodes a task and step."""
        steps = max(trained.meta.inner_steps, least_steps) if self.steps is None else self.steps
        return steps, trained.experience.episodes if self.episodes is None else self.episodes


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
        check_task(path, trained.task, trusted=config.trust_checkpoint_code)
    family = distribution or config.family(trained)
    family.sample(0, np.random.default_rng(), config.split)  # refuses a split that it does not have
    if trained.policy_spec(family) != policy.spec:
        difference = policy.spec.misfit(family.observation_space, family.action_space)
        difference = difference or f"its critic reads {policy.spec.task_size} numbers of a task"
        raise ValueError(f"The policy cannot play {family.name!r}: {difference}.")
    start_ray(config.num_workers)
    check_resources(config.num_workers)
    with Pool(
        family,
        policy.spec,
        num_workers=config.num_workers,
        trial_episodes=trained.experience.trial_episodes,
        name=f"ssm-metarl/evaluate/{time.time_ns()}",
    ) as pool:
        yield Subject(policy, checkpoint, trained, family, pool)


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
