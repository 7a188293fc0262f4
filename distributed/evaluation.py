"""A checkpoint's policy on tasks it has not met: evaluated, adapted to one of them, and the modes of adaptation side
by side. ``num_workers`` Ray actors collect, or this process."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ssm_metarl.algorithms.adaptation import Adaptation, Collect, HybridAdapter, StandardAdapter
from ssm_metarl.algorithms.evaluation import (
    Evaluation,
    confidence_interval,
    evaluate,
    interquartile_mean,
    interval_values,
    probability_of_improvement,
    stratified_bootstrap,
)
from ssm_metarl.algorithms.inference import check_count
from ssm_metarl.algorithms.maml import MetaConfig
from ssm_metarl.algorithms.policy import SSMPolicy
from ssm_metarl.algorithms.replay import ReplayBuffer
from ssm_metarl.algorithms.rollouts import Array, Rollouts
from ssm_metarl.distributed.checkpoint import Checkpoint, load_policy
from ssm_metarl.distributed.config import TrainConfig
from ssm_metarl.distributed.pool import Pool
from ssm_metarl.distributed.run import start_ray
from ssm_metarl.distributed.trainer import check_resources, play
from ssm_metarl.seeds import Branch, seed_for
from ssm_metarl.tasks import Task, TaskDistribution, make

SPLIT_BRANCHES = {"train": 0, "validation": 1, "test": 2, "shifted": 3, "shifted-test": 4}
"""Branches of the seed tree for the splits' tasks: validation and test never meet the tasks of training."""

MODES = ("none", "standard", "replay", "hybrid")
"""How a policy adapts: not at all; with the task's own episodes; with randomly drawn replay beside them, unweighted;
with replay weighted by propensity."""


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
class _Subject:
    """A policy, how it was trained, and a pool that plays it."""

    policy: SSMPolicy
    checkpoint: Checkpoint
    config: TrainConfig
    family: TaskDistribution
    pool: Pool


@contextmanager
def _open(path: str | Path, source: TaskSource, num_workers: int, **changes: Any) -> Iterator[_Subject]:
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
        yield _Subject(policy, checkpoint, config, family, pool)


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
    """Returns of a checkpoint's policy on held-out tasks before adaptation and after 1..``steps`` inner steps.

    Args:
        path: a checkpoint, a run folder for its best one, or pretrained:NAME.
        task, task_options, task_ranges, split, distribution: the tasks, see ``TaskSource``.
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
        EnvironmentFailure: the environment spoils more than a tenth of a step's episodes.
    """
    counts = {"num_tasks": (num_tasks, 1), "seed": (seed, 0)}
    counts |= {"steps": (0 if steps is None else steps, 0), "episodes": (1 if episodes is None else episodes, 1)}
    for name, (value, least) in counts.items():
        check_count(name, value, least)
    source = TaskSource(task, task_options, task_ranges, split, distribution)
    with _open(path, source, num_workers, inner_lr=inner_lr) as subject:
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
    """:func:`evaluate_checkpoint` for a policy in memory and a pool of its sizes; see there.

    Raises:
        ValueError: an unknown split.
        EnvironmentFailure: the environment spoils more than a tenth of a step's episodes.
    """
    tasks = _sample(family, split, num_tasks, seed)
    collect = _collect(pool, tasks, split, seed, deterministic=deterministic)
    return replace(evaluate(policy, config, collect, steps, episodes), task=family.name, split=split)


def _sample(family: TaskDistribution, split: str, num_tasks: int, seed: int) -> list[Task]:
    return family.sample(num_tasks, np.random.default_rng(seed_for(seed, Branch.EVALUATION, _branch(split))), split)


def _branch(split: str) -> int:
    return SPLIT_BRANCHES.get(split, len(SPLIT_BRANCHES))


def _collect(
    pool: Pool,
    tasks: Sequence[Task],
    split: str,
    seed: int,
    *,
    branch: Branch = Branch.EVALUATION,
    deterministic: bool = False,
) -> Collect:
    """Plays the tasks, each step's episodes with random numbers of their own."""
    played = np.ones(len(tasks), bool)

    def collect(weights: Mapping[str, Array], episodes: int, step: int) -> Rollouts:
        seeds = [seed_for(seed, branch, _branch(split), step, task) for task in range(len(tasks))]
        label = f"evaluation, step {step}" if branch == Branch.EVALUATION else "evaluation"
        return play(pool, weights, tasks, seeds, episodes, played, label=label, deterministic=deterministic)[0]

    return collect


@dataclass(frozen=True, kw_only=True)
class AdaptOptions:
    """How a policy adapts to new tasks; see ``StandardAdapter`` and ``HybridAdapter``.

    Attributes:
        steps: adaptation steps; None: as many as the policy was trained for, at least one.
        episodes: episodes a task and step that the steps are made of; None: as in training.
        step_size: of a step; None: as in training.
        kl_bound: most that a step may move the policy, nats a step; a larger one is halved.
        optimizer: sgd, the inner step of meta-training, or adam.
        replay_episodes: most stored episodes a step uses (replay, hybrid).
        pull: strength of the pull towards the meta-parameters (replay, hybrid).
        test_episodes: fresh episodes a task that judge the adapted policy, and count as no cost.
    """

    steps: int | None = None
    episodes: int | None = None
    step_size: float | None = None
    kl_bound: float = float("inf")
    optimizer: str = "sgd"
    replay_episodes: int = 20
    pull: float = 0.0
    test_episodes: int = 20

    def adapter(
        self, mode: str, policy: SSMPolicy, config: MetaConfig, replay: ReplayBuffer | None, seed: int = 0
    ) -> StandardAdapter:
        """The adapter of a mode.

        Raises:
            ValueError: an unknown mode, an impossible option, or no replay where the mode needs one.
        """
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, not {mode!r}.")
        check_count("test_episodes", self.test_episodes, 1)
        if self.episodes is not None:
            check_count("episodes", self.episodes, 1)
        common: dict[str, Any] = {
            "steps": 0 if mode == "none" else max(config.inner_steps, 1) if self.steps is None else self.steps,
            "step_size": self.step_size,
            "kl_bound": self.kl_bound,
            "optimizer": self.optimizer,
        }
        if mode in ("none", "standard"):
            return StandardAdapter(policy, config, **common)
        return HybridAdapter(
            policy,
            config,
            replay,
            replay_episodes=self.replay_episodes,
            weighted=mode == "hybrid",
            pull=self.pull,
            seed=seed,
            **common,
        )


@dataclass(frozen=True)
class TaskReport:
    """A policy adapted to one task.

    Attributes:
        task: family.
        parameters: the task's.
        mode: of adaptation.
        adaptation: curve, cost and the adapted weights.
        policy: the adapted policy.
        checkpoint: the adapted policy's, of the same run; without an optimiser's state.
        before, after: fresh episodes of the meta-trained and of the adapted policy, with common random numbers.
    """

    task: str
    parameters: Task
    mode: str
    adaptation: Adaptation
    policy: SSMPolicy
    checkpoint: Checkpoint
    before: Rollouts
    after: Rollouts

    def summary(self) -> dict[str, Any]:
        """JSON values: the adaptation curve on the task's own episodes, its cost, and fresh returns with intervals."""
        found = self.adaptation
        result: dict[str, Any] = {
            "task": self.task,
            "parameters": self.parameters,
            "mode": self.mode,
            "curve": found.returns[0].tolist(),
            "best_step": int(found.best_step[0]),
            "step_fractions": found.fractions[0].tolist(),
            "effective_replay_episodes": found.effective_episodes[0].tolist(),
            "environment_steps": found.environment_steps,
            "seconds": found.seconds,
        }
        for name, record in (("before", self.before), ("after", self.after)):
            found_interval = interval_values(*confidence_interval(record.returns()[0]))
            result[name] = {"return": found_interval.pop("value"), **found_interval}
        return result


def adapt_checkpoint(
    path: str | Path,
    params: Mapping[str, Any] | None = None,
    *,
    mode: str = "standard",
    options: AdaptOptions | None = None,
    source: TaskSource | None = None,
    seed: int = 0,
    num_workers: int = 0,
) -> TaskReport:
    """Adapt a checkpoint's policy to one task, and play it before and after::

        report = adapt_checkpoint("pretrained:cartpole", {"direction": -1}, mode="hybrid")
        report.policy

    Args:
        path: a checkpoint, a run folder for its best one, or pretrained:NAME.
        params: the task's parameters; what is not given is as in a task drawn from the split.
        mode: see ``MODES``.
        options: of the adapter.
        source: where the task comes from.
        seed: of the task and the rollouts.
        num_workers: Ray actors; 0: in process.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
        ValueError: an impossible option, task or parameter, or a mode that needs a replay without one.
        EnvironmentFailure: the environment spoils more than a tenth of a step's episodes.
    """
    options, source = options or AdaptOptions(), source or TaskSource()
    check_count("seed", seed, 0)
    with _open(path, source, num_workers) as subject:
        adapter = options.adapter(mode, subject.policy, subject.config, subject.checkpoint.replay, seed)
        task = _sample(subject.family, source.split, 1, seed)[0]
        if params:
            if not isinstance(task, Mapping):
                raise ValueError(f"A task of {subject.family.name} is {task!r} and has no parameters to set.")
            if unknown := set(params) - set(task):
                raise ValueError(
                    f"A task of {subject.family.name} has the parameters {', '.join(task)}, not {sorted(unknown)[0]!r}."
                )
            task = {**task, **params}
        subject.family.make_vector_env([task], 1).close()  # refuses impossible values in one sentence
        episodes = subject.config.episodes if options.episodes is None else options.episodes
        adaptation = adapter.adapt(_collect(subject.pool, [task], source.split, seed), episodes)
        test = [_collect(subject.pool, [task], source.split, seed, branch=Branch.ADAPTED) for _ in range(2)]
        before = test[0](subject.policy.numpy_weights(), options.test_episodes, 0)
        after = test[1](adaptation.weights, options.test_episodes, 0)
        adapted = adaptation.policy(subject.policy)
        checkpoint = replace(
            subject.checkpoint,
            progress={**subject.checkpoint.progress, "adapted_to": task},
            policy=adapted.numpy_weights(),
            optimizer={},
        )
        return TaskReport(subject.family.name, task, mode, adaptation, adapted, checkpoint, before, after)


@dataclass(frozen=True)
class ModeComparison:
    """The modes of adaptation on the same tasks with common random numbers.

    Attributes:
        task, split: where the tasks come from.
        returns: by mode, undiscounted returns of the adapted policy on fresh episodes, [M, K] float64.
        adaptations: by mode, what adapting gave.
        seed: of the bootstrap.
    """

    task: str
    split: str
    returns: Mapping[str, Array]
    adaptations: Mapping[str, Adaptation]
    seed: int

    def summary(self) -> dict[str, Any]:
        """JSON values, by mode: mean and interquartile mean, and the paired gain over the first mode, with 95 %
        intervals over tasks (bootstrap, and Student's); the probability of improvement over it, and the cost.
        """
        modes: dict[str, Any] = {}
        first = next(iter(self.returns.values()))
        for mode, returns in self.returns.items():
            found = self.adaptations[mode]
            row: dict[str, Any] = {}
            for name, statistic in (("mean", np.nanmean), ("iqm", interquartile_mean)):
                rng = np.random.default_rng(seed_for(self.seed, Branch.BOOTSTRAP))
                row[name] = interval_values(statistic(returns), *stratified_bootstrap(returns, statistic, rng))
            row["gain"] = interval_values(*confidence_interval(np.nanmean(returns, 1) - np.nanmean(first, 1)))
            row["probability_of_improvement"] = probability_of_improvement(returns, first)
            row["curve"] = np.nanmean(found.returns, 0).tolist()
            row["unchanged_tasks"] = float(np.mean(found.best_step == 0))
            row["effective_replay_episodes"] = found.effective_episodes.mean(0).tolist()
            row["environment_steps_per_task"] = found.environment_steps / len(returns)
            row["seconds"] = found.seconds
            modes[mode] = row
        return {
            "task": self.task,
            "split": self.split,
            "num_tasks": len(first),
            "test_episodes": first.shape[1],
            "compared_with": next(iter(self.returns)),
            "modes": modes,
        }


def compare_modes(
    path: str | Path,
    modes: Sequence[str] = MODES,
    *,
    options: AdaptOptions | None = None,
    source: TaskSource | None = None,
    num_tasks: int = 100,
    seed: int = 0,
    num_workers: int = 0,
) -> ModeComparison:
    """Adapt a checkpoint's policy in several modes to the same held-out tasks, and try each on fresh episodes.

    Args:
        path: a checkpoint, a run folder for its best one, or pretrained:NAME.
        modes: of ``MODES``; the first is what the others are compared with.
        options: of the adapters.
        source: where the tasks come from.
        num_tasks: how many tasks.
        seed: of tasks and rollouts: each mode gets the same.
        num_workers: Ray actors; 0: in process.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
        ValueError: an impossible option, or a mode that needs a replay without one.
        EnvironmentFailure: the environment spoils more than a tenth of a step's episodes.
    """
    options, source = options or AdaptOptions(), source or TaskSource()
    check_count("num_tasks", num_tasks, 1)
    check_count("seed", seed, 0)
    if not modes or len(set(modes)) < len(modes):
        raise ValueError(f"modes must be one or more different ones of {', '.join(MODES)}.")
    with _open(path, source, num_workers) as subject:
        replay = subject.checkpoint.replay
        adapters = {mode: options.adapter(mode, subject.policy, subject.config, replay, seed) for mode in modes}
        tasks = _sample(subject.family, source.split, num_tasks, seed)
        episodes = subject.config.episodes if options.episodes is None else options.episodes
        adaptations, returns = {}, {}
        for mode, adapter in adapters.items():
            adaptations[mode] = adapter.adapt(_collect(subject.pool, tasks, source.split, seed), episodes)
            test = _collect(subject.pool, tasks, source.split, seed, branch=Branch.ADAPTED)
            returns[mode] = test(adaptations[mode].weights, options.test_episodes, 0).returns()
        return ModeComparison(subject.family.name, source.split, returns, adaptations, seed)
