"""The five metrics by which recursive self-improvement judges a policy, their composite, and its intervals.

The scheduler evaluates parent and child on the same validation tasks with common random numbers, then compares:

    validation = normalise(evaluation.returns, distribution.reference)
    child = Assessment(validation, None, history=validation[None, :, -1], history_steps=[lineage_steps])
    composite(metrics(child))
    comparison = compare(child, parent, rng)
    keep = comparison.mean > 0 and comparison.low > -0.02
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from ssm_metarl.algorithms.rollouts import Array
from ssm_metarl.algorithms.statistics import percentile_interval
from ssm_metarl.checks import check_count, check_keys, check_number
from ssm_metarl.tasks import ReferenceReturns

METRICS = ("average_return", "adaptation_speed", "generalisation", "meta_efficiency", "stability")
"""Names of the metrics, in the order in which they are reported."""

WEIGHTS: Mapping[str, float] = dict(zip(METRICS, (0.30, 0.25, 0.25, 0.10, 0.10)))
"""Share of each metric in the composite."""


def normalise(returns: Array, reference: ReferenceReturns) -> Array:
    """Put returns R on a scale from 0 to 1 that is fixed for a family of tasks.

    With an oracle 0 is the random player and 1 the best one, and what lies beyond is clipped:

        clip((R − random) / (oracle − random), 0, 1)

    Where no best is known, the random player is ½ and the scale never saturates:

        x = (R − random) / (|random| + random_sd),    ½ (1 + x / (1 + |x|))

    A random player that always gets 0, as with sparse rewards, gives no unit: the divisor is then 1.

    Args:
        returns: undiscounted, any shape; NaN stays NaN.
        reference: the family's returns.

    Returns:
        float64 in [0, 1], the shape of `returns`; non-decreasing in them.

    Raises:
        ValueError: the reference is not finite, or its oracle is not above its random player.
    """
    returns = np.asarray(returns, np.float64)
    # Of finite returns only the last quotients can overflow, and infinity has the right limit.
    with np.errstate(over="ignore"):
        if reference.oracle is not None:
            gap = reference.oracle - reference.random
            if not 0 < gap < math.inf:
                raise ValueError(f"An oracle must be finite and above the random player: {reference}.")
            return np.clip((returns - reference.random) / gap, 0.0, 1.0)
        unit = abs(reference.random) + reference.random_sd
        if not 0 <= unit < math.inf:
            raise ValueError(f"Reference returns must be finite, with a deviation of 0 or more: {reference}.")
        x = (returns - reference.random) / (unit or 1.0)
    # The formula above for x ≤ 0, mirrored for x > 0: every rounding in this form is monotone.
    low = 0.5 / (1 + np.abs(x))
    return np.where(x > 0, 1 - low, low)


@dataclass(frozen=True, eq=False)
class Assessment:
    """What one policy did on the validation tasks, normalised.

    The arrays are copied. A value is NaN where all of a task's episodes were lost.

    Attributes:
        validation: [V, S+1] float64 in [0, 1], after 0..S adaptation steps, S ≥ 1.
        shifted: [W, S+1] float64 in [0, 1], on the split `shifted`; None where the family has no such split.
        history: [E, V] float64 in [0, 1], on the validation tasks after S adaptation steps, at each evaluation of the
            last generation; the last row is this one's.
        history_steps: [E] int64, the policy's `lineage_steps` at those evaluations, never decreasing.

    Raises:
        ValueError: a shape or a value is none of these.
    """

    validation: Array
    shifted: Array | None
    history: Array
    history_steps: Array

    def __post_init__(self) -> None:
        validation, history = _unit_values("validation", self.validation), _unit_values("history", self.history)
        if not np.array_equal(history[-1], validation[:, -1], equal_nan=True):
            raise ValueError("The last row of history must be the last column of validation.")
        steps = np.array(self.history_steps)
        if steps.shape != history.shape[:1] or steps.dtype.kind not in "iu" or (np.diff(steps) < 0).any():
            raise ValueError(f"history_steps must be {len(history)} integers that never decrease, not {steps}.")
        shifted = None if self.shifted is None else _unit_values("shifted", self.shifted)
        if shifted is not None and shifted.shape[1] != validation.shape[1]:
            raise ValueError("The splits must be evaluated with the same number of adaptation steps.")
        values = {"validation": validation, "shifted": shifted, "history": history}
        for name, value in {**values, "history_steps": steps.astype(np.int64)}.items():
            object.__setattr__(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """JSON values: lists of numbers, with null for NaN."""
        return {field.name: _json_values(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Assessment:
        """The exact inverse of `to_dict`.

        Raises:
            ValueError: a key is missing or unknown, or a value is impossible.
        """
        names = {field.name for field in fields(cls)}
        check_keys(values, names, "assessment")
        if missing := names - set(values):
            raise ValueError(f"An assessment lacks {', '.join(sorted(missing))}.")
        return cls(**values)


@dataclass(frozen=True)
class Comparison:
    """How much better a child's composite is than its parent's.

    Attributes:
        mean: the difference on all tasks, in [−1, 1].
        low, high: bounds of its two-sided interval; with a single task both are the mean.
    """

    mean: float
    low: float
    high: float


def metrics(assessment: Assessment, tasks: Array | None = None, shifted_tasks: Array | None = None) -> dict[str, float]:
    """The metrics of one policy, each in [0, 1]; a better return before adaptation never lowers one.

    With v[i, s] the normalised return of task i after s of S adaptation steps, and h[e, i] the one after S steps at the
    generation's evaluation e, when the policy had n[e] `lineage_steps`:

        average_return    mean_i v[i, S]
        adaptation_speed  mean_i 1/S Σ_s ½ (v[i, s−1] + v[i, s]),  s = 1..S; v[i, 0] where S = 0
        generalisation    mean_i v[i, S] on the shifted tasks
        meta_efficiency   mean_i Σ_e (n[e] − n[e−1]) ½ (h[e−1, i] + h[e, i]) / (n[−1] − n[0]);
                          mean_i h[−1, i] where no steps lie between the evaluations
        stability         1 − 2 sd_i v[i, S]: the deviation of values in [0, 1] is at most ½

    A task with a NaN among its values is left out. Where none is left, the metric is 0: a policy that cannot be
    assessed is the worst.

    Args:
        assessment: V validation tasks and, if it has any, W shifted ones.
        tasks: indices in 0..V−1 of the validation tasks to use, repeated ones too; None for all.
        shifted_tasks: the same in 0..W−1; without meaning where there are no shifted tasks.

    Returns:
        By name, in the order of `METRICS`; without `generalisation` where there are no shifted tasks.
    """
    chosen = (slice(None) if pick is None else pick for pick in (tasks, shifted_tasks))
    splits = [_without_nan(scores[:, pick]) for scores, pick in zip(_task_scores(assessment), chosen)]
    return {name: float(value) for name, value in _metrics(splits).items()}


def composite(values: Mapping[str, float], weights: Mapping[str, float] = WEIGHTS) -> float:
    """The weighted mean of the metrics that are there, in [0, 1]: Σ w v / Σ w.

    Args:
        values: metrics by name, in [0, 1].
        weights: weights by name, 0 or more; a metric that is not named has none.

    Raises:
        ValueError: a name is unknown, a weight is negative or not finite, or all of them are 0.
    """
    return float(_composite(values, weights))


def composite_interval(
    assessment: Assessment,
    rng: np.random.Generator,
    level: float = 0.95,
    resamples: int = 1000,
    weights: Mapping[str, float] = WEIGHTS,
) -> tuple[Any, Any]:
    """Bootstrap interval of the composite over tasks; see `algorithms.evaluation.percentile_interval`.

    Args:
        assessment: of one policy; the tasks of each split are resampled apart.
        rng: equal generators give equal intervals.
        level: coverage, in (0, 1).
        resamples: draws of as many tasks as there are.
        weights: as for `composite`.

    Returns:
        Lower and upper bound, in [0, 1]; None and None where a split has fewer than two tasks without a NaN.
    """
    value, *drawn = _bootstrap([assessment], rng, resamples, weights)[0]
    count = min(_without_nan(scores).shape[-1] for scores in _task_scores(assessment))
    if count < 2:
        return None, None
    low, high = percentile_interval(np.array(drawn), float(value), count, level)
    return max(low, 0.0), min(high, 1.0)


def compare(
    child: Assessment,
    parent: Assessment,
    rng: np.random.Generator,
    level: float = 0.90,
    resamples: int = 2000,
    weights: Mapping[str, float] = WEIGHTS,
) -> Comparison:
    """Paired bootstrap of the difference between two composites: child − parent.

    Every resample draws the same tasks for both, so what makes a task easy or hard for both cancels. A task with a NaN
    among the values of either is left out of both.

    Args:
        child, parent: assessed on the same tasks with the same random numbers.
        rng: equal generators give equal intervals.
        level: coverage of the two-sided percentile interval, in (0, 1]: at 0.90 `low` is the 5th and `high` the
            95th percentile.
        resamples: draws of as many tasks as there are.
        weights: as for `composite`.

    Returns:
        The difference on all tasks and its bounds.

    Raises:
        ValueError: the two differ in their numbers of tasks or of adaptation steps.
    """
    shapes = [[split.shape for split in (a.validation, a.shifted) if split is not None] for a in (child, parent)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"Only assessments on the same tasks and steps can be compared: {shapes[0]} and {shapes[1]}.")
    of_child, of_parent = _bootstrap([child, parent], rng, resamples, weights)
    difference = of_child - of_parent
    return Comparison(float(difference[0]), *_percentiles(difference[1:], level))


def _unit_values(name: str, values: Array) -> Array:
    """A copy in one order of memory, on which the last bits of a sum depend."""
    copy = np.array(values, np.float64, order="C")  # a null of JSON becomes NaN
    if copy.ndim != 2 or not copy.size:
        raise ValueError(f"{name} must be a matrix that is not empty, not of shape {copy.shape}.")
    if ((copy < 0) | (copy > 1)).any():
        raise ValueError(f"{name} must be normalised: in [0, 1], or NaN where all episodes were lost.")
    return copy


def _json_values(array: Array | None) -> list[Any] | None:
    if array is None:
        return None
    values = array.astype(object)
    values[np.isnan(array)] = None
    return values.tolist()


def _task_scores(assessment: Assessment) -> list[Array]:
    """What each task adds to the metrics, by split.

    Returns:
        [3, V] of the validation tasks: return after adaptation, area over adaptation steps, area over the generation.
        [1, W] of the shifted tasks, if there are any: return after adaptation.
    """
    validation, history, steps = assessment.validation, assessment.history, assessment.history_steps
    adapts = validation.shape[1] > 1
    speed = np.trapezoid(validation, axis=1) / (validation.shape[1] - 1) if adapts else validation[:, 0]
    width = steps[-1] - steps[0]
    efficiency = np.trapezoid(history, steps[:, None], axis=0) / width if width else history[-1]
    scores = [np.stack([validation[:, -1], speed, efficiency])]
    return scores if assessment.shifted is None else [*scores, assessment.shifted[None, :, -1]]


def _without_nan(scores: Array) -> Array:
    """Scores [..., V] of the tasks that have all of them."""
    return scores[..., np.isfinite(scores).all(tuple(range(scores.ndim - 1)))]


def _metrics(splits: Sequence[Array]) -> dict[str, Array]:
    """Metrics [...] of scores [3, ..., n] and, if any, [1, ..., m]: axes between are resamples and assessments."""
    final, speed, efficiency = splits[0]
    deviation = final.std(-1) if final.shape[-1] else np.full(final.shape[:-1], 0.5)
    values = {
        "average_return": _mean(final),
        "adaptation_speed": _mean(speed),
        "meta_efficiency": _mean(efficiency),
        "stability": np.maximum(1 - 2 * deviation, 0.0),  # rounding can pass ½
    }
    if len(splits) > 1:
        values["generalisation"] = _mean(splits[1][0])
    return {name: values[name] for name in METRICS if name in values}


def _mean(scores: Array) -> Array:
    """Mean over tasks, 0 without any."""
    return scores.sum(-1) / max(scores.shape[-1], 1)


def _composite(values: Mapping[str, Any], weights: Mapping[str, float]) -> Array:
    """The composite [...] of metrics [...]."""
    check_keys(values, set(METRICS), "metric")
    check_keys(weights, set(METRICS), "weight")
    for name, weight in weights.items():
        check_number(f"The weight of {name}", weight, low=0.0)
    present = [name for name in METRICS if name in values]
    shares = [weights.get(name, 0.0) for name in present]
    if not any(shares):
        raise ValueError(f"No weight is above 0 for any of: {', '.join(present) or 'no metric'}.")
    return np.asarray(np.average([values[name] for name in present], axis=0, weights=shares))


def _bootstrap(
    assessments: Sequence[Assessment], rng: np.random.Generator, resamples: int, weights: Mapping[str, float]
) -> Array:
    """Composites of A assessments on the same tasks: [A, 1+R], of all tasks first, then of R resamples."""
    check_count("resamples", resamples, 1)
    splits = []
    for scores in zip(*map(_task_scores, assessments), strict=True):
        kept = _without_nan(np.stack(scores, 1))  # [k, A, n]
        number = kept.shape[-1]
        drawn = rng.integers(max(number, 1), size=(resamples, number))
        splits.append(np.take(kept, np.concatenate([np.arange(number)[None], drawn]), axis=-1))
    return _composite(_metrics(splits), weights)


def _percentiles(samples: Array, level: float) -> tuple[float, float]:
    check_number("level", level, above=0.0, high=1.0)
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
