"""Means, their intervals and comparisons over tasks and episodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from ssm_metarl.algorithms.rollouts import Array

Number: TypeAlias = float | np.floating[Any] | Array
"""A number of Python or of NumPy, or an array of one."""


def confidence_interval(samples: Array, level: float = 0.95) -> tuple[Array, Array, Array]:
    """Student's interval of a mean over the first axis; NaN entries are left out.

    Args:
        samples: [n, ...], independent over the first axis.
        level: coverage, in (0, 1).

    Returns:
        Mean, lower and upper bound, [...] each; bounds are NaN where fewer than two samples are left.
    """
    from scipy import special  # only here: the command line is read without it, and stats would take a second

    count = np.sum(np.isfinite(samples), 0)
    mean = np.nanmean(samples, 0)
    spread = np.nanstd(samples, 0) * np.sqrt(count / np.maximum(count - 1, 1))
    half = special.stdtrit(np.maximum(count - 1, 1), 0.5 + level / 2) * spread / np.sqrt(count)
    half = np.where(count > 1, half, np.nan)
    return mean, mean - half, mean + half


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
) -> tuple[float, float]:
    """Bootstrap interval of a statistic of the tasks' family: tasks are drawn with replacement, episodes within them.

    The interval covers, in 95 of 100 cases, the statistic's value over new tasks of the family with new episodes, as
    `confidence_interval` over the tasks' means does for the mean.

    A drawn task brings its episodes without replacement: all of them. The spread between tasks already holds the chance
    of their few episodes, and drawing episodes with replacement, too, would count that chance twice. Davison and
    Hinkley 1997, sec. 3.8, compare the two ways; Field and Welsh 2007 (J. R. Statist. Soc. B 69, 369-390) show that
    drawing whole groups gives consistent variances. The bounds are those of `percentile_interval`.

    Args:
        returns: [M, K], episodes by task; NaN entries are left out.
        statistic: of an array [M', K] of the M' tasks that have an episode, where a task can stand several times.
        rng: equal generators give equal intervals.
        resamples: how often to draw.

    Returns:
        Lower and upper bound; NaN where fewer than two tasks have an episode, or no task has two: one episode a task
        does not tell the chance of episodes from that of tasks.
    """
    counts = np.isfinite(returns).sum(1)
    known = returns[counts > 0]
    if len(known) < 2 or counts.max() < 2:
        return float("nan"), float("nan")
    drawn = [statistic(known[rng.integers(len(known), size=len(known))]) for _ in range(resamples)]
    return percentile_interval(np.array(drawn), statistic(known), len(known))


def percentile_interval(drawn: Array, value: float, count: int, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of a bootstrap that drew from `count` samples, widened as few samples require.

    A resample varies less than a sample does, by sqrt((n - 1) / n), and plain percentiles take the variance as known.
    Hesterberg 2015 (arXiv 1411.5279, sec. 5.2) corrects both by percentiles farther out, but below about ten samples
    there are none. Scaling the bounds' distances from the value is the same for normal resamples, and has no such
    limit:

        value + (percentile - value) · t(n - 1) / z · sqrt(n / (n - 1))

    Args:
        drawn: [R], the statistic of every resample.
        value: the statistic of the samples themselves.
        count: number n of samples, 2 or more.
        level: coverage, in (0, 1).

    Returns:
        Lower and upper bound.
    """
    from scipy import special  # see above

    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    scale = special.stdtrit(count - 1, tails[1]) / special.ndtri(tails[1]) * np.sqrt(count / (count - 1))
    # Plotting positions k / (R + 1): as many resamples lie beyond a bound as the level says, also of few.
    low, high = value + scale * (np.quantile(drawn, tails, method="weibull") - value)
    return float(low), float(high)


def interval_values(value: Number, low: Number, high: Number) -> dict[str, float | None]:
    """JSON values of an estimate and its interval: `value`, `ci_low` and `ci_high`, None for what is unknown."""
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
