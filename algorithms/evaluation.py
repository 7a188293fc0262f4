"""Evaluation after 0..S adaptation steps: the only evaluator; the command line and training use it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from .adaptation import Collect, StandardAdapter
from .maml import MetaConfig
from .policy import SSMPolicy
from .rollouts import Array


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


def evaluate(policy: SSMPolicy, config: MetaConfig, collect: Collect, steps: int, episodes: int) -> Evaluation:
    """Returns of every task before adaptation and after each of ``steps`` inner steps (see ``StandardAdapter``).

    Args:
        policy: the meta-trained policy.
        config: inner algorithm, step size and the number of steps trained for.
        collect: rolls the tasks out; called for steps 0..S in order.
        steps: number S of adaptation steps.
        episodes: episodes a task and step.
    """
    found = StandardAdapter(policy, config, steps=steps).adapt(collect, episodes)
    return Evaluation(found.returns, found.lengths, found.environment_steps, found.seconds)


def interquartile_mean(returns: Array) -> float:
    """Mean of the middle half of all tasks' episodes (Agarwal et al. 2021, arXiv 2108.13264, sec. 4.3).

    Args:
        returns: [M, K]; NaN entries are left out.
    """
    return float(stats.trim_mean(returns[np.isfinite(returns)], 0.25))


def stratified_bootstrap(
    returns: Array,
    statistic: Callable[[Array], float],
    rng: np.random.Generator,
    resamples: int = 1000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of a statistic, with episodes drawn anew within each task (Agarwal et al. 2021, sec. 4.1).

    The tasks are taken as they are: the interval says how sure the figure is on these tasks.

    Args:
        returns: [M, K]; NaN entries are left out.
        statistic: of an array [M, K] with as many NaN.
        resamples: how often to draw.
        level: coverage, in (0, 1).

    Returns:
        Lower and upper bound; NaN where nothing is left.
    """
    finite = np.isfinite(returns)
    counts = finite.sum(1, keepdims=True)
    if not counts.any():
        return float("nan"), float("nan")
    ordered = np.take_along_axis(returns, np.argsort(~finite, axis=1, kind="stable"), 1)
    drawn = []
    for _ in range(resamples):
        index = (rng.random(returns.shape) * counts).astype(int)
        drawn.append(statistic(np.where(finite, np.take_along_axis(ordered, index, 1), np.nan)))
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def probability_of_improvement(returns: Array, others: Array) -> float:
    """How likely an episode does better than one of another algorithm on the same task, mean over the tasks.

    It is the Mann-Whitney statistic of each task, in which a tie counts half (Agarwal et al. 2021, sec. 4.3).

    Args:
        returns: [M, K], of the one algorithm; NaN entries are left out.
        others: [M, L], of the other.

    Returns:
        In [0, 1]; NaN where no task has an episode of both.
    """
    pairs = np.isfinite(returns)[:, :, None] & np.isfinite(others)[:, None]
    with np.errstate(invalid="ignore"):
        difference = np.sign(returns[:, :, None] - others[:, None])
    wins = np.where(pairs, (1 + difference) / 2, 0.0).sum((1, 2))
    counts = pairs.sum((1, 2))
    tasks = counts > 0
    return float(np.mean(wins[tasks] / counts[tasks])) if tasks.any() else float("nan")
