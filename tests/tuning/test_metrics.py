"""Metrics by hand, in their range and in their order; intervals against simulated populations of tasks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from builders import seeds
from ssm_metarl.algorithms.rollouts import Array
from ssm_metarl.tasks import ReferenceReturns
from ssm_metarl.tuning.metrics import METRICS, WEIGHTS, composite, metric_intervals, metrics, normalise

WITH_ORACLE = ReferenceReturns(random=-20.0, random_sd=4.0, oracle=5.0)
WITHOUT_ORACLE = ReferenceReturns(random=-20.0, random_sd=4.0, oracle=None)
SPARSE = ReferenceReturns(random=0.0, random_sd=0.0, oracle=None)

finite = st.floats(allow_nan=False, allow_infinity=False)
references = st.sampled_from([WITH_ORACLE, WITHOUT_ORACLE, SPARSE])

Assessed = tuple[Array, Array, Array]
"""Values by adaptation step and task, by meta-iteration and task, and by adaptation step and shifted task."""


def assessed(seed: int, *, lost: float = 0.0) -> Assessed:
    """Up to 12 tasks, 4 adaptation steps and 4 meta-iterations; a share `lost` of the values is NaN."""
    rng = np.random.default_rng(seed)
    tasks, shifted_tasks, steps, iterations = rng.integers(1, [13, 13, 5, 5])

    def values(*shape: int) -> Array:
        return np.where(rng.random(shape) < lost, np.nan, rng.random(shape))

    return values(steps + 1, tasks), values(iterations, tasks), values(steps + 1, shifted_tasks)


# --- Normalised returns -----------------------------------------------------------------------------------


def scaled(returns: Any, reference: ReferenceReturns) -> Array:
    return normalise(np.array(returns), reference)


def test_normalised_returns_by_hand() -> None:
    np.testing.assert_array_equal(scaled([-45.0, -20.0, -10.0, 5.0, 6.0], WITH_ORACLE), np.array([0, 0, 0.4, 1, 1]))
    # x = −1, 0, 1, 3 times |−20| + 4
    np.testing.assert_allclose(scaled([-44.0, -20.0, 4.0, 52.0], WITHOUT_ORACLE), np.array([0.25, 0.5, 0.75, 0.875]))
    np.testing.assert_allclose(scaled([-1.0, 0.0, 1.0], SPARSE), np.array([0.25, 0.5, 0.75]))
    assert np.isnan(scaled([np.nan], WITH_ORACLE)).all()
    assert np.isnan(scaled([np.nan], WITHOUT_ORACLE)).all()


@given(returns=st.tuples(finite, finite), reference=references)
def test_a_better_return_is_never_normalised_to_less(returns: tuple[float, float], reference: ReferenceReturns) -> None:
    low, high = scaled(sorted(returns), reference)
    assert 0 <= low <= high <= 1


@given(size=st.floats(0, 1e6), gain=st.floats(0.01, 1e6), sign=st.sampled_from([-1, 1]))
def test_only_an_oracle_makes_it_saturate(size: float, gain: float, sign: int) -> None:
    low, high = sorted([sign * size, sign * (size + gain)])
    for reference in (WITHOUT_ORACLE, SPARSE):
        worse, better = scaled([low, high], reference)
        assert 0 < worse < better < 1
    beyond = scaled([-20.0 - size, 5.0 + size], WITH_ORACLE)
    assert beyond.tolist() == [0.0, 1.0]


@given(returns=st.floats(-1e6, 1e6), random=st.floats(-1e3, 1e3), deviation=st.floats(0.01, 1e3))
def test_without_an_oracle_it_is_the_formula(returns: float, random: float, deviation: float) -> None:
    x = (returns - random) / (abs(random) + deviation)
    expected = 0.5 * (1 + x / (1 + abs(x)))
    assert scaled(returns, ReferenceReturns(random, deviation, None)) == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize(
    "reference",
    [(1.0, 1.0, 1.0), (1.0, 1.0, 0.0), (np.nan, 1.0, 2.0), (0.0, 1.0, np.inf), (0.0, np.nan, None), (0.0, -1.0, None)],
)
def test_a_reference_without_a_scale_is_refused(reference: Any) -> None:
    with pytest.raises(ValueError, match="finite"):
        scaled([0.0], ReferenceReturns(*reference))


# --- Metrics ----------------------------------------------------------------------------------------------


def test_metrics_by_hand() -> None:
    values = np.array([[0.0, 0.6], [0.4, 0.6], [0.8, 0.4]])
    curve = np.array([[0.0, 0.2], [0.4, 0.2], [0.8, 0.5]])
    shifted = np.array([[0.9] * 3, [0.9] * 3, [0.1, 0.3, 0.8]])
    found = metrics(values, curve, shifted)
    assert list(found) == list(METRICS)
    assert found == pytest.approx(
        {
            "average_return": 0.6,
            "adaptation_speed": ((0.2 + 0.6) / 2 + (0.6 + 0.5) / 2) / 2,
            "generalisation": 0.4,
            "meta_efficiency": 2.1 / 6,
            "stability": 1 - 2 * 0.2,
        }
    )
    assert composite(found) == pytest.approx(0.30 * 0.6 + 0.25 * 0.475 + 0.25 * 0.4 + 0.10 * 0.35 + 0.10 * 0.6)


def test_without_adaptation_steps_a_policy_is_as_fast_as_it_is_good() -> None:
    found = metrics(np.array([[0.2, 0.6]]), np.array([[0.2, 0.6]]))
    assert found["adaptation_speed"] == found["average_return"] == pytest.approx(0.4)


@given(
    returns=st_numpy.arrays(np.float64, st.tuples(st.integers(1, 5), st.integers(1, 6)), elements=finite),
    reference=references,
    seed=seeds,
)
def test_metrics_of_any_returns_are_in_their_range(returns: Array, reference: ReferenceReturns, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = normalise(returns, reference)
    found = metrics(values, rng.permutation(values), rng.permutation(values))
    assert set(found) == set(METRICS)
    assert all(0 <= value <= 1 for value in [*found.values(), composite(found)])


@given(seed=seeds, lost=st.sampled_from([0.0, 0.2]), upto=st.floats(0, 1))
def test_a_better_step_0_never_lowers_anything(seed: int, lost: float, upto: float) -> None:
    """Exactly, not only within rounding."""
    values, curve, shifted = assessed(seed, lost=lost)
    better = values.copy(), shifted.copy()
    for each in better:
        each[0] = np.maximum(each[0], upto)
    old, new = metrics(values, curve, shifted), metrics(better[0], curve, better[1])
    assert all(new[name] >= old[name] for name in METRICS)
    assert composite(new) >= composite(old)


@settings(max_examples=15)
@given(tasks=st.integers(1, 40), steps=st.integers(0, 6), iterations=st.integers(1, 5), seed=seeds)
def test_an_oracle_has_1_everywhere(tasks: int, steps: int, iterations: int, seed: int) -> None:
    values = normalise(np.full((steps + 1, tasks), 5.0), WITH_ORACLE)
    curve = np.ones((iterations, tasks))
    assert metrics(values, curve, values) == dict.fromkeys(METRICS, 1.0)
    expected = [1.0, 1.0] if tasks > 1 else None
    found = metric_intervals(values, curve, values, np.random.default_rng(seed))
    assert found == dict.fromkeys(METRICS, expected)


@given(seed=seeds)
def test_a_task_with_a_lost_value_is_left_out(seed: int) -> None:
    values, curve, shifted = assessed(seed, lost=0.15)
    known, known_shifted = (each[:, np.isfinite(each).all(0)] for each in (values, shifted))
    assert metrics(values, curve, shifted) == metrics(known, curve, known_shifted)
    holes = metrics(values, curve, shifted)["meta_efficiency"]
    assert holes == pytest.approx(np.nanmean(curve) if np.isfinite(curve).any() else 0.0)


def test_a_policy_that_cannot_be_assessed_is_the_worst() -> None:
    lost = np.full((2, 3), np.nan)
    assert metrics(lost, lost, lost) == dict.fromkeys(METRICS, 0.0)


# --- Composite --------------------------------------------------------------------------------------------


@given(seed=seeds)
def test_a_missing_metric_leaves_its_weight_to_the_others(seed: int) -> None:
    values, curve, _ = assessed(seed)
    found = metrics(values, curve)
    assert list(found) == [name for name in METRICS if name != "generalisation"]
    weighted = {"average_return": 0.40, "adaptation_speed": 1 / 3, "meta_efficiency": 2 / 15, "stability": 2 / 15}
    assert composite(found) == pytest.approx(sum(weighted[name] * found[name] for name in found))


def test_one_metric_alone_is_the_composite() -> None:
    for name in METRICS:
        assert composite({name: 0.3}) == pytest.approx(0.3)
    assert composite({}) == 0.0
    assert sum(WEIGHTS.values()) == pytest.approx(1)


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(ValueError, match="'stability'"):
        composite({"stabilty": 1.0})


# --- Intervals --------------------------------------------------------------------------------------------


def population(rng: np.random.Generator, tasks: int) -> Assessed:
    """A policy on tasks that differ much in how hard they are."""
    values, shifted = (
        rng.uniform(0.2, 0.7, tasks) + np.linspace(-0.1, 0.1, 3)[:, None] + rng.uniform(-0.05, 0.05, (3, tasks))
        for _ in range(2)
    )
    return values, values[-1:] + rng.uniform(-0.05, 0.05, (4, tasks)), shifted


def test_intervals_cover_about_as_often_as_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """150 simulated assessments of 30 tasks; percentiles of so few tasks are slightly short."""
    monkeypatch.setattr("ssm_metarl.tuning.metrics.RESAMPLES", 200)
    rng = np.random.default_rng(0)
    truth = metrics(*population(rng, 100_000))
    hits = dict.fromkeys(("average_return", "adaptation_speed", "generalisation", "meta_efficiency"), 0)
    for _ in range(150):
        found = metric_intervals(*population(rng, 30), rng)
        for name in hits:
            low, high = found[name] or [1.0, 0.0]
            hits[name] += low < truth[name] < high
    assert all(0.86 < count / 150 <= 0.99 for count in hits.values()), hits


@given(seed=seeds)
@settings(max_examples=20)
def test_an_interval_is_in_range_and_around_its_metric(seed: int) -> None:
    values, curve, shifted = assessed(seed)
    found, intervals = (
        metrics(values, curve, shifted),
        metric_intervals(values, curve, shifted, np.random.default_rng(0)),
    )
    assert list(intervals) == list(found)
    for name, interval in intervals.items():
        tasks = shifted.shape[1] if name == "generalisation" else values.shape[1]
        assert (interval is None) == (tasks < 2)
        if interval is not None:
            low, high = interval
            assert 0 <= low <= high <= 1
    for name in ("average_return", "adaptation_speed", "meta_efficiency"):
        if intervals[name] is not None:
            assert intervals[name][0] <= found[name] <= intervals[name][1]


def test_equal_generators_give_equal_intervals() -> None:
    values = assessed(3)
    one, again, other = (metric_intervals(*values, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert one == again
    assert one != other


def test_a_higher_level_gives_a_wider_interval() -> None:
    values = population(np.random.default_rng(0), 20)
    narrow, wide = (
        metric_intervals(*values, np.random.default_rng(0), level=level)["average_return"] or []
        for level in (0.5, 0.99)
    )
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_without_shifted_tasks_there_is_no_interval_for_them() -> None:
    values, curve, _ = assessed(3)
    assert "generalisation" not in metric_intervals(values, curve, None, np.random.default_rng(0))
