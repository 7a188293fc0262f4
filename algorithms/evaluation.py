"""Evaluation after 0..S adaptation steps: the only evaluator; the command line and training use it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from scipy import stats

from ssm_metarl.algorithms.adaptation import Collect, StandardAdapter
from ssm_metarl.algorithms.maml import MetaConfig
from ssm_metarl.algorithms.policy import SSMPolicy
from ssm_metarl.algorithms.rollouts import Array

Number: TypeAlias = float | np.floating[Any] | Array
"""A number of Python or of NumPy, or an array of one."""


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
            "ci_low": [finite(bound) for bound in low],
            "ci_high": [finite(bound) for bound in high],
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
    # scipy.stats.trim_mean is the same and takes thirty times as long, a thousand times for each interval.
    values = np.sort(returns[np.isfinite(returns)])
    cut = len(values) // 4
    return float(values[cut : len(values) - cut].mean()) if len(values) else float("nan")


def stratified_bootstrap(
    returns: Array,
    statistic: Callable[[Array], float],
    rng: np.random.Generator,
    resamples: int = 1000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Bootstrap interval of a statistic of the tasks' family: tasks are drawn with replacement, episodes within them.

    The interval covers the statistic's value over new tasks of the family with new episodes, as
    :func:`confidence_interval` over the tasks' means does for the mean.

    A drawn task brings its episodes without replacement: all of them. The spread between tasks already holds the chance
    of their few episodes, and drawing episodes with replacement, too, would count that chance twice. Davison and
    Hinkley 1997, sec. 3.8, compare the two ways; Field and Welsh 2007 (J. R. Statist. Soc. B 69, 369-390) show that
    drawing whole groups gives consistent variances. The bounds are those of :func:`percentile_interval`.

    Args:
        returns: [M, K], episodes by task; NaN entries are left out.
        statistic: of an array [M', K] of the M' tasks that have an episode, where a task can stand several times.
        rng: equal generators give equal intervals.
        resamples: how often to draw.
        level: coverage, in (0, 1).

    Returns:
        Lower and upper bound; NaN where fewer than two tasks have an episode, or no task has two: one episode a task
        does not tell the chance of episodes from that of tasks.
    """
    counts = np.isfinite(returns).sum(1)
    known = returns[counts > 0]
    if len(known) < 2 or counts.max() < 2:
        return float("nan"), float("nan")
    drawn = [statistic(known[rng.integers(len(known), size=len(known))]) for _ in range(resamples)]
    return percentile_interval(np.array(drawn), statistic(known), len(known), level)


def percentile_interval(drawn: Array, value: float, count: int, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of a bootstrap that drew from ``count`` samples, widened as few samples require.

    A resample varies less than a sample does, by sqrt((n - 1) / n), and plain percentiles take the variance as known.
    Hesterberg 2015 (arXiv 1411.5279, sec. 5.2) corrects both by percentiles farther out, but below about ten samples
    there are none. Scaling the bounds' distances from the value is the same for normal resamples, and has no such
    limit::

        value + (percentile - value) · t(n - 1) / z · sqrt(n / (n - 1))

    Args:
        drawn: [R], the statistic of every resample.
        value: the statistic of the samples themselves.
        count: number n of samples, 2 or more.
        level: coverage, in (0, 1).

    Returns:
        Lower and upper bound.
    """
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    scale = stats.t.ppf(tails[1], count - 1) / stats.norm.ppf(tails[1]) * np.sqrt(count / (count - 1))
    # Plotting positions k / (R + 1): as many resamples lie beyond a bound as the level says, also of few.
    low, high = value + scale * (np.quantile(drawn, tails, method="weibull") - value)
    return float(low), float(high)


def interval_values(value: Number, low: Number, high: Number) -> dict[str, float | None]:
    """JSON values of an estimate and its interval: ``value``, ``ci_low`` and ``ci_high``, None for what is unknown."""
    return {"value": finite(value), "ci_low": finite(low), "ci_high": finite(high)}


def finite(value: Number) -> float | None:
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
