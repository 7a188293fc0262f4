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
        """JSON values: lists ``return``, ``ci_low``, ``ci_high``, ``episode_length`` over 0..S, and totals.

        The bounds are of the 95 % interval over tasks; null with fewer than two tasks.
        """
        mean, low, high = confidence_interval(self.returns)
        return {
            "task": self.task,
            "split": self.split,
            "return": mean.tolist(),
            "ci_low": [json_bound(bound) for bound in low],
            "ci_high": [json_bound(bound) for bound in high],
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
        Mean, lower and upper bound, [...] each; bounds are NaN where fewer than two samples are left.
    """
    count = np.sum(np.isfinite(samples), 0)
    mean = np.nanmean(samples, 0)
    spread = np.nanstd(samples, 0) * np.sqrt(count / np.maximum(count - 1, 1))
    half = stats.t.ppf(0.5 + level / 2, np.maximum(count - 1, 1)) * spread / np.sqrt(count)
    half = np.where(count > 1, half, np.nan)
    return mean, mean - half, mean + half


def json_bound(bound: float) -> float | None:
    """An interval's bound as a JSON value: null where there is no interval."""
    return float(bound) if np.isfinite(bound) else None


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
    """Percentile interval of a statistic of a family of tasks, of which the given ones are a sample.

    Tasks are drawn with replacement, each with its episodes. The spread between the tasks' own means has the episodes'
    chance in it already; to draw episodes anew within the tasks, too, would count that twice (Davison and Hinkley 1997,
    sec. 3.8: for the variance of a grand mean the groups are resampled and their members are not). Percentiles are
    expanded from those of a normal distribution to those of Student's, since few tasks differ less than the family does
    (Hesterberg 2015, arXiv 1411.5279, sec. 5.2).

    Args:
        returns: [M, K], episodes by task; NaN entries are left out.
        statistic: of an array [M, K] with NaN.
        rng: equal generators give equal intervals.
        resamples: how often to draw.
        level: coverage, in (0, 1).

    Returns:
        Lower and upper bound; NaN where fewer than two tasks have an episode, or none has two: one episode a task does
        not tell chance from tasks that differ.
    """
    kept = np.isfinite(returns).sum(1)
    returns = returns[kept > 0]
    count = len(returns)
    if count < 2 or kept.max() < 2:
        return float("nan"), float("nan")
    drawn = [statistic(returns[rng.integers(count, size=count)]) for _ in range(resamples)]
    tail = float(stats.norm.cdf(np.sqrt(count / (count - 1)) * stats.t.ppf((1 - level) / 2, count - 1)))
    # The order statistics at (resamples + 1) · tail: those at resamples · tail are too near for few resamples (Davison
    # and Hinkley 1997, sec. 2.4).
    low, high = np.quantile(drawn, [tail, 1 - tail], method="weibull")
    return float(low), float(high)


def interval_values(value: float, low: float, high: float) -> dict[str, float | None]:
    """JSON values of an estimate and its interval: ``value``, ``ci_low`` and ``ci_high``, None for what is unknown."""
    return {"value": finite(value), "ci_low": finite(low), "ci_high": finite(high)}


def finite(value: float) -> float | None:
    """The number as JSON has it, None where it is none."""
    return float(value) if np.isfinite(value) else None


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
