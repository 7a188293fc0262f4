"""The modes of adaptation side by side, on the same held-out tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ssm_metarl.algorithms.adapters import Adaptation
from ssm_metarl.algorithms.rollouts import Array
from ssm_metarl.algorithms.statistics import (
    confidence_interval,
    interquartile_mean,
    interval_values,
    probability_of_improvement,
    stratified_bootstrap,
)
from ssm_metarl.evaluation.config import MODES, AdaptOptions, EvaluationConfig
from ssm_metarl.evaluation.tasks import collector, open_subject, sample_tasks
from ssm_metarl.seeds import Branch, seed_for
from ssm_metarl.tasks import TaskDistribution


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
    config: EvaluationConfig | None = None,
    distribution: TaskDistribution | None = None,
    **changes: Any,
) -> ModeComparison:
    """Adapt a checkpoint's policy in several modes to the same held-out tasks, and try each on fresh episodes.

    Args:
        path: a checkpoint, a run folder for its best one, or pretrained:NAME.
        modes: of `MODES`; the first is what the others are compared with.
        options: of the adapters.
        config: which tasks, steps and episodes; each mode gets the same.
        distribution: the family itself, instead of a registered one.
        **changes: options of `EvaluationConfig`, in place of those of `config`.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or its task is code that nobody named here.
        ValueError: an impossible option, or a mode that needs a replay without one.
        EnvironmentFailure: more than a tenth of a step's episodes are invalid.
    """
    options, config = options or AdaptOptions(), replace(config or EvaluationConfig(), **changes)
    if not modes or len(set(modes)) < len(modes):
        raise ValueError(f"modes must be one or more different ones of {', '.join(MODES)}.")
    with open_subject(path, config, distribution) as subject:
        adapters = {mode: options.adapter(mode, subject, config) for mode in modes}
        tasks = sample_tasks(subject.family, config)
        _, episodes = config.extent(subject.trained)
        adaptations, returns = {}, {}
        for mode, adapter in adapters.items():
            adaptations[mode] = adapter.adapt(collector(subject.pool, tasks, config), episodes)
            test = collector(subject.pool, tasks, config, Branch.ADAPTED)
            returns[mode] = test(adaptations[mode].weights, options.test_episodes, 0).returns()
        return ModeComparison(subject.family.name, config.split, returns, adaptations, config.seed)
