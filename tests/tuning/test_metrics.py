"""Metrics by hand, in their range and in their order; intervals against simulated populations of tasks."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from builders import seeds
from ssm_metarl.algorithms.rollouts import Array
from ssm_metarl.tasks import ReferenceReturns
from ssm_metarl.tuning.metrics import (
    METRICS,
    WEIGHTS,
    Assessment,
    Comparison,
    compare,
    composite,
    composite_interval,
    metrics,
    normalise,
)

WITH_ORACLE = ReferenceReturns(random=-20.0, random_sd=4.0, oracle=5.0)
WITHOUT_ORACLE = ReferenceReturns(random=-20.0, random_sd=4.0, oracle=None)
SPARSE = ReferenceReturns(random=0.0, random_sd=0.0, oracle=None)

finite = st.floats(allow_nan=False, allow_infinity=False)
references = st.sampled_from([WITH_ORACLE, WITHOUT_ORACLE, SPARSE])


def assess(validation: Any, shifted: Any = None, earlier: Any = (), steps: Any = None) -> Assessment:
    """An assessment whose history is the rows `earlier` and this one."""
    validation = np.array(validation, float)
    history = np.array([*earlier, validation[:, -1]], float)
    return Assessment(validation, shifted, history, np.arange(len(history)) if steps is None else np.array(steps))


def random_assessment(seed: int, *, shifted: bool = True, lost: float = 0.0) -> Assessment:
    """Up to 12 tasks, 4 adaptation steps and 4 evaluations; a share `lost` of the values is NaN."""
    rng = np.random.default_rng(seed)
    tasks, shifted_tasks, steps, evaluations = rng.integers(1, [13, 13, 5, 5])

    def values(*shape: int) -> Array:
        return np.where(rng.random(shape) < lost, np.nan, rng.random(shape))

    at = np.sort(rng.integers(0, 10**6, evaluations))
    outside = values(shifted_tasks, steps + 1) if shifted else None
    return assess(values(tasks, steps + 1), outside, values(evaluations - 1, tasks), at)


def same_tasks(assessment: Assessment, seed: int, shift: float = 0.1) -> Assessment:
    """Another policy on the same tasks."""
    rng = np.random.default_rng(seed)

    def moved(values: Array) -> Array:
        return np.clip(values + rng.uniform(-shift, shift, values.shape), 0, 1)

    shifted = None if assessment.shifted is None else moved(assessment.shifted)
    return assess(
        moved(assessment.validation), shifted, moved(assessment.history[:-1]), assessment.history_steps.tolist()
    )


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
    assessment = assess(
        [[0.0, 0.4, 0.8], [0.6, 0.6, 0.4]],
        shifted=[[0.9, 0.9, 0.1], [0.9, 0.9, 0.3], [0.9, 0.9, 0.8]],
        earlier=[[0.0, 0.2], [0.4, 0.2]],
        steps=[100, 200, 500],
    )
    values = metrics(assessment)
    assert list(values) == list(METRICS)
    assert values == pytest.approx(
        {
            "average_return": 0.6,
            "adaptation_speed": ((0.2 + 0.6) / 2 + (0.6 + 0.5) / 2) / 2,
            "generalisation": 0.4,
            "meta_efficiency": ((1 * 0.2 + 3 * 0.6) / 4 + (1 * 0.2 + 3 * 0.3) / 4) / 2,
            "stability": 1 - 2 * 0.2,
        }
    )
    expected = 0.30 * 0.6 + 0.25 * 0.475 + 0.25 * 0.4 + 0.10 * 0.3875 + 0.10 * 0.6
    assert composite(values) == pytest.approx(expected)


@pytest.mark.parametrize("steps", [[7], [7, 7]])
def test_without_steps_between_evaluations_efficiency_is_the_last_value(steps: list[int]) -> None:
    assessment = assess([[0.0, 0.5], [0.0, 0.7]], earlier=[[0.1, 0.1]][: len(steps) - 1], steps=steps)
    assert metrics(assessment)["meta_efficiency"] == pytest.approx(0.6)


@given(
    returns=st_numpy.arrays(np.float64, st.tuples(st.integers(1, 6), st.integers(2, 5)), elements=finite),
    reference=references,
    seed=seeds,
)
def test_metrics_of_any_returns_are_in_their_range(returns: Array, reference: ReferenceReturns, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = normalise(returns, reference)
    assessment = assess(values, shifted=rng.permutation(values), earlier=rng.permutation(values.T))
    results = metrics(assessment)
    assert set(results) == set(METRICS)
    assert all(0 <= value <= 1 for value in [*results.values(), composite(results)])
    low, high = composite_interval(assessment, rng, resamples=20)
    assert (low is None and high is None) if len(returns) < 2 else 0 <= low <= high <= 1


@given(seed=seeds, lost=st.sampled_from([0.0, 0.2]), upto=st.floats(0, 1))
def test_a_better_step_0_never_lowers_anything(seed: int, lost: float, upto: float) -> None:
    """Exactly, not only within rounding."""
    before = random_assessment(seed, lost=lost)
    rng = np.random.default_rng(seed)
    validation = before.validation.copy()
    validation[:, 0] = np.maximum(validation[:, 0], rng.uniform(0, upto, len(validation)))
    assert before.shifted is not None
    shifted = before.shifted.copy()
    shifted[:, 0] = np.maximum(shifted[:, 0], upto)
    old, new = metrics(before), metrics(replace(before, validation=validation, shifted=shifted))
    assert all(new[name] >= old[name] for name in METRICS)
    assert composite(new) >= composite(old)


@given(tasks=st.integers(1, 40), steps=st.integers(1, 6), evaluations=st.integers(1, 5), seed=seeds)
def test_an_oracle_has_1_everywhere(tasks: int, steps: int, evaluations: int, seed: int) -> None:
    at = np.random.default_rng(seed).integers(0, 10**9, evaluations).cumsum()
    values = normalise(np.full((tasks, steps + 1), 5.0), WITH_ORACLE)
    assessment = assess(values, shifted=values, earlier=np.ones((evaluations - 1, tasks)), steps=at)
    assert metrics(assessment) == dict.fromkeys(METRICS, 1.0)
    assert composite(metrics(assessment)) == 1.0
    expected = (1.0, 1.0) if tasks > 1 else (None, None)
    assert composite_interval(assessment, np.random.default_rng(seed), resamples=10) == expected


@given(seed=seeds)
def test_indices_choose_tasks_and_repeat_them(seed: int) -> None:
    whole, rng = random_assessment(seed, lost=0.1), np.random.default_rng(seed)
    assert whole.shifted is not None
    tasks = rng.integers(len(whole.validation), size=9)
    shifted_tasks = rng.integers(len(whole.shifted), size=4)
    chosen = Assessment(
        whole.validation[tasks], whole.shifted[shifted_tasks], whole.history[:, tasks], whole.history_steps
    )
    assert metrics(whole, tasks, shifted_tasks) == metrics(chosen)
    everything = np.arange(len(whole.validation)), np.arange(len(whole.shifted))
    assert metrics(whole, *everything) == metrics(whole)


@given(seed=seeds)
def test_a_task_with_a_lost_value_is_left_out(seed: int) -> None:
    holed = random_assessment(seed, lost=0.15)
    assert holed.shifted is not None
    kept = np.isfinite(holed.validation).all(1) & np.isfinite(holed.history).all(0)
    kept_shifted = np.isfinite(holed.shifted[:, -1])
    assert metrics(holed) == metrics(holed, np.flatnonzero(kept), np.flatnonzero(kept_shifted))


def test_a_policy_that_cannot_be_assessed_is_the_worst() -> None:
    lost = assess(np.full((3, 2), np.nan), shifted=np.full((2, 2), np.nan), earlier=[[0.5] * 3])
    assert metrics(lost) == dict.fromkeys(METRICS, 0.0)
    assert composite_interval(lost, np.random.default_rng(0), resamples=5) == (None, None)
    assert compare(lost, lost, np.random.default_rng(0), resamples=5) == Comparison(0.0, 0.0, 0.0)


@settings(max_examples=50)
@given(seed=seeds, shifted=st.booleans(), lost=st.sampled_from([0.0, 0.3]))
def test_json_keeps_every_bit(seed: int, shifted: bool, lost: float) -> None:
    assessment = random_assessment(seed, shifted=shifted, lost=lost)
    again = Assessment.from_dict(json.loads(json.dumps(assessment.to_dict(), allow_nan=False)))
    for name, value in vars(assessment).items():
        np.testing.assert_array_equal(getattr(again, name), value, strict=True)
    assert metrics(again) == metrics(assessment)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"validation": [[0.5, 1.5]]}, "validation must be normalised"),
        ({"validation": np.zeros((0, 2))}, "validation must be a matrix"),
        ({"history": [[0.4]]}, "last row"),
        ({"history_steps": [1, 2]}, "must be 1 integers"),
        ({"history_steps": [1.5]}, "integers"),
        ({"history": [[0.1], [0.5]], "history_steps": [2, 1]}, "never decrease"),
        ({"shifted": [[0.1, 0.2, 0.3]]}, "same number of adaptation steps"),
        ({"histori": []}, "'history'"),
    ],
)
def test_an_impossible_assessment_is_refused(changes: dict[str, Any], match: str) -> None:
    values = {"validation": [[0.2, 0.5]], "shifted": None, "history": [[0.5]], "history_steps": [3]}
    assert metrics(Assessment.from_dict(values))["average_return"] == 0.5
    with pytest.raises(ValueError, match=match):
        Assessment.from_dict(values | changes)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ValueError, match="lacks history, validation"):
        Assessment.from_dict({"shifted": None, "history_steps": [0]})


# --- Composite --------------------------------------------------------------------------------------------


@given(seed=seeds)
def test_a_missing_metric_leaves_its_weight_to_the_others(seed: int) -> None:
    values = metrics(random_assessment(seed, shifted=False))
    assert list(values) == [name for name in METRICS if name != "generalisation"]
    weighted = {"average_return": 0.40, "adaptation_speed": 1 / 3, "meta_efficiency": 2 / 15, "stability": 2 / 15}
    assert composite(values) == pytest.approx(sum(weighted[name] * values[name] for name in values))


def test_weights_are_relative_and_those_of_one_metric_give_it() -> None:
    values = metrics(random_assessment(5))
    assert composite(values, {name: 3 * weight for name, weight in WEIGHTS.items()}) == pytest.approx(composite(values))
    for name in METRICS:
        assert composite(values, {name: 0.2}) == pytest.approx(values[name])
    assert sum(WEIGHTS.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        ({"stabilty": 1.0}, "'stability'"),
        ({"stability": -0.1}, "The weight of stability"),
        ({"stability": np.nan}, "The weight of stability"),
        ({"generalisation": 1.0}, "No weight"),
        ({}, "No weight"),
    ],
)
def test_impossible_weights_are_refused(weights: dict[str, float], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        composite({"average_return": 0.5, "stability": 0.5}, weights)


# --- Intervals --------------------------------------------------------------------------------------------


def population(rng: np.random.Generator, tasks: int, shifted_tasks: int) -> tuple[Assessment, Assessment]:
    """A child a little better than its parent, on tasks that differ much in how hard they are for both."""

    def pair(count: int) -> tuple[Array, Array]:
        ease = rng.uniform(0.2, 0.7, (count, 1))
        climb = np.linspace(-0.1, 0.1, 3)
        child, parent = (ease + climb + gain + rng.uniform(-0.05, 0.05, (count, 3)) for gain in (0.05, 0.02))
        return child, parent

    validation, shifted = pair(tasks), pair(shifted_tasks)
    earlier = rng.uniform(0.3, 0.4, (1, tasks))
    return (
        assess(validation[0], shifted[0], earlier, [0, 4000]),
        assess(validation[1], shifted[1], earlier, [0, 4000]),
    )


def test_intervals_cover_about_as_often_as_they_say() -> None:
    """400 simulated comparisons of 20 tasks; the keep rule's plain percentiles of so few are slightly short."""
    rng = np.random.default_rng(0)
    child, parent = (composite(metrics(a)) for a in population(rng, 100_000, 100_000))
    hits = np.zeros((400, 3))
    for row in hits:
        pair = population(rng, 20, 20)
        result = compare(*pair, rng, resamples=300)
        low, high = composite_interval(pair[0], rng, resamples=300)
        row[:] = result.low < child - parent < result.high, result.low < child - parent, low < child < high
    two_sided, lower, single = hits.mean(0)
    assert 0.83 < two_sided < 0.95
    assert 0.90 < lower < 0.985
    assert 0.93 < single < 0.97


@pytest.mark.parametrize(("tasks", "shifted_tasks"), [(1, 20), (20, 1), (1, 1)])
def test_a_split_of_one_task_gives_no_interval_and_still_a_verdict(tasks: int, shifted_tasks: int) -> None:
    child, parent = population(np.random.default_rng(0), tasks, shifted_tasks)
    assert composite_interval(child, np.random.default_rng(0), resamples=5) == (None, None)
    verdict = compare(child, parent, np.random.default_rng(0), resamples=50)
    assert verdict.low <= verdict.mean <= verdict.high
    if tasks == shifted_tasks == 1:
        assert verdict.low == verdict.mean == verdict.high


def test_pairing_narrows_the_interval() -> None:
    """Both policies find the same tasks hard: apart, their intervals overlap; in pairs, the child is better."""
    rng = np.random.default_rng(1)
    child, parent = population(rng, 20, 20)
    paired = compare(child, parent, rng)
    intervals = [composite_interval(assessment, rng, level=0.90) for assessment in (child, parent)]
    unpaired = np.linalg.norm([high - low for low, high in intervals])
    assert paired.high - paired.low < unpaired / 4
    assert intervals[0][0] < intervals[1][1]
    assert 0 < paired.low < paired.mean < paired.high


@settings(max_examples=50)
@given(seed=seeds, shifted=st.booleans(), lost=st.sampled_from([0.0, 0.2]))
def test_identical_assessments_differ_by_exactly_nothing(seed: int, shifted: bool, lost: float) -> None:
    assessment = random_assessment(seed, shifted=shifted, lost=lost)
    assert compare(assessment, assessment, np.random.default_rng(seed), resamples=50) == Comparison(0.0, 0.0, 0.0)


@settings(max_examples=50)
@given(seed=seeds, shifted=st.booleans())
def test_a_comparison_is_of_composites_and_turns_its_sign(seed: int, shifted: bool) -> None:
    parent = random_assessment(seed, shifted=shifted)
    child = same_tasks(parent, seed)
    forth, back = (compare(*pair, np.random.default_rng(seed), resamples=50) for pair in [(child, parent)] * 2)
    assert forth == back  # equal generators
    assert forth.mean == pytest.approx(composite(metrics(child)) - composite(metrics(parent)), abs=1e-12)
    other = compare(parent, child, np.random.default_rng(seed), resamples=50)
    assert [other.mean, other.low, other.high] == pytest.approx([-forth.mean, -forth.high, -forth.low], abs=1e-12)


@settings(max_examples=50)
@given(seed=seeds)
def test_a_resample_is_the_metrics_of_the_tasks_it_draws(seed: int) -> None:
    """One resample: its percentiles are the composite itself."""
    parent = random_assessment(seed)
    child = same_tasks(parent, seed)
    drawn = np.random.default_rng(seed)
    assert parent.shifted is not None
    chosen = [drawn.integers(len(split), size=(1, len(split)))[0] for split in (parent.validation, parent.shifted)]
    expected = composite(metrics(child, *chosen)) - composite(metrics(parent, *chosen))
    result = compare(child, parent, np.random.default_rng(seed), resamples=1)
    assert [result.low, result.high] == pytest.approx([expected] * 2, abs=1e-12)


@settings(max_examples=50)
@given(seed=seeds)
def test_a_task_lost_by_either_is_left_out_of_both(seed: int) -> None:
    rng = np.random.default_rng(seed)
    whole_parent = assess(rng.random((8, 3)), rng.random((6, 3)), rng.random((2, 8)))
    whole_child = same_tasks(whole_parent, seed)

    def lose(assessment: Assessment, task: int, step: int) -> Assessment:
        validation, history = assessment.validation.copy(), assessment.history.copy()
        validation[task, step] = np.nan
        history[-1] = validation[:, -1]
        return replace(assessment, validation=validation, history=history)

    holed = compare(lose(whole_child, 0, 0), lose(whole_parent, 7, 2), np.random.default_rng(seed), resamples=50)

    def cut(a: Assessment) -> Assessment:
        return Assessment(a.validation[1:7], a.shifted, a.history[:, 1:7], a.history_steps)

    assert holed == compare(cut(whole_child), cut(whole_parent), np.random.default_rng(seed), resamples=50)


def test_other_tasks_cannot_be_compared() -> None:
    rng = np.random.default_rng(0)
    three, two = assess(np.zeros((3, 2))), assess(np.zeros((2, 2)))
    for other in (two, assess(np.zeros((3, 3))), assess(np.zeros((3, 2)), shifted=np.zeros((3, 2)))):
        with pytest.raises(ValueError, match="same tasks and steps"):
            compare(three, other, rng)
    with pytest.raises(ValueError, match="level"):
        compare(three, three, rng, level=1.2)
    with pytest.raises(ValueError, match="resamples"):
        composite_interval(three, rng, resamples=0)


def test_a_policy_that_takes_no_adaptation_step_is_as_fast_as_it_is_good() -> None:
    returns = np.array([[0.2], [0.6]])
    found = metrics(Assessment(returns, None, returns.T, np.array([0])))
    assert found["adaptation_speed"] == found["average_return"] == pytest.approx(0.4)
