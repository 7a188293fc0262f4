"""The five metrics of a policy that improves itself, their composite, and intervals.

They are computed at the end of every stretch from what training played anyway, with as many episodes and inner steps
as the policy has where it is used; only shifted tasks are played for them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ssm_metarl.algorithms.rollouts import Array
from ssm_metarl.algorithms.statistics import percentile_interval
from ssm_metarl.checks import check_keys
from ssm_metarl.tasks import ReferenceReturns

METRICS = ("average_return", "adaptation_speed", "generalisation", "meta_efficiency", "stability")
"""Names of the metrics, in the order in which they are reported."""

WEIGHTS: Mapping[str, float] = dict(zip(METRICS, (0.30, 0.25, 0.25, 0.10, 0.10)))
"""Share of each metric in the composite."""

RESAMPLES = 500
"""Bootstrap resamples of an interval."""


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


def metrics(values: Array, curve: Array, shifted: Array | None = None) -> dict[str, float]:
    """The metrics of one policy, each in [0, 1]; a better return before adaptation never lowers one.

    With v[s, i] the normalised return of task i after s of S adaptation steps, and h[e] those after adaptation of
    meta-iteration e of the stretch:

        average_return    mean_i v[S, i]
        adaptation_speed  mean_i 1/S Σ_s ½ (v[s−1, i] + v[s, i]),  s = 1..S; v[0, i] where S = 0
        generalisation    mean_i v[S, i] on the shifted tasks
        meta_efficiency   mean_e mean_i h[e, i]
        stability         1 − 2 sd_i v[S, i]: the deviation of values in [0, 1] is at most ½

    A task with a NaN among its values is left out. Where none is left, the metric is 0: a policy that cannot be
    assessed is the worst.

    Args:
        values: [S+1, N] in [0, 1].
        curve: [E, M] in [0, 1].
        shifted: [S+1, W] in [0, 1]; None: there are none.

    Returns:
        By name, in the order of `METRICS`; without `generalisation` where there are no shifted tasks.
    """
    values = _known(values)
    final = values[-1]
    result = {
        "average_return": _mean(final),
        "adaptation_speed": _mean((values[1:] + values[:-1]).mean(0) / 2) if len(values) > 1 else _mean(final),
        "meta_efficiency": _mean(curve[np.isfinite(curve)]),
        "stability": max(1 - 2 * float(final.std()), 0.0) if final.size else 0.0,
    }
    if shifted is not None:
        result["generalisation"] = _mean(_known(shifted)[-1])
    return {name: result[name] for name in METRICS if name in result}


def metric_intervals(
    values: Array, curve: Array, shifted: Array | None, rng: np.random.Generator, level: float = 0.95
) -> dict[str, list[float] | None]:
    """Bootstrap intervals of the metrics over tasks.

    Args:
        values, curve, shifted: as for `metrics`.
        rng: equal generators give equal intervals.
        level: coverage, in (0, 1).

    Returns:
        Lower and upper bound by name, in [0, 1]; None where there are fewer than two tasks.
    """
    found = metrics(values, curve, shifted)
    values, shifted = _known(values), None if shifted is None else _known(shifted)
    drawn: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(RESAMPLES):
        again = metrics(_resampled(values, rng), _resampled(curve, rng), _resampled(shifted, rng))
        for name, value in again.items():
            drawn[name].append(value)
    result: dict[str, list[float] | None] = {}
    for name, value in found.items():
        source = {"generalisation": shifted, "meta_efficiency": curve}.get(name, values)
        count = 0 if source is None else source.shape[1]
        bounds = percentile_interval(np.array(drawn[name]), value, count, level) if count > 1 else None
        result[name] = None if bounds is None else [max(bounds[0], 0.0), min(bounds[1], 1.0)]
    return result


def composite(values: Mapping[str, float]) -> float:
    """The weighted mean of the metrics that are there, in [0, 1]: Σ w v / Σ w; 0 without any.

    Raises:
        ValueError: a name is unknown.
    """
    check_keys(values, set(METRICS), "metric")
    present = [name for name in METRICS if name in values]
    total = sum(WEIGHTS[name] for name in present)
    return sum(WEIGHTS[name] * values[name] for name in present) / total if total else 0.0


def _known(values: Array) -> Array:
    """Columns without NaN."""
    return values[:, np.isfinite(values).all(0)]


def _mean(values: Array) -> float:
    return float(values.mean()) if values.size else 0.0


def _resampled(values: Any, rng: np.random.Generator) -> Any:
    """As many columns, drawn with replacement."""
    return None if values is None else values[:, rng.integers(max(values.shape[1], 1), size=values.shape[1])]
