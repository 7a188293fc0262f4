"""Intervals and aggregates over tasks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from builders import seeds
from ssm_metarl.algorithms.statistics import (
    confidence_interval,
    interquartile_mean,
    interval_values,
    probability_of_improvement,
    stratified_bootstrap,
)


@settings(max_examples=30)
@given(seed=seeds, count=st.integers(2, 9), level=st.floats(0.5, 0.99))
def test_intervals_are_students_over_what_is_there(seed: int, count: int, level: float) -> None:
    samples = np.random.default_rng(seed).normal(size=(count, 3))
    mean, low, high = confidence_interval(samples, level)
    error = stats.sem(samples, axis=0)
    expected = stats.t.interval(level, count - 1, samples.mean(0), error)
    np.testing.assert_allclose([mean, low, high], [samples.mean(0), *expected])
    gaps = np.insert(samples, seed % (count + 1), np.nan, axis=0)
    np.testing.assert_allclose(confidence_interval(gaps, level), [mean, low, high])


def test_intervals_cover_as_often_as_they_say() -> None:
    samples = np.random.default_rng(0).normal(size=(6, 20_000))
    _, low, high = confidence_interval(samples)
    assert ((low < 0) & (high > 0)).mean() == pytest.approx(0.95, abs=0.01)


def test_one_sample_has_no_interval() -> None:
    mean, low, high = (float(x) for x in confidence_interval(np.array([2.0, np.nan])))
    assert mean == 2.0
    assert np.isnan([low, high]).all()
    assert interval_values(mean, low, high) == {"value": 2.0, "ci_low": None, "ci_high": None}


class TestAggregates:
    """Definitions of Agarwal et al. 2021, written out."""

    RETURNS = np.random.default_rng(0).normal(size=(6, 8)) * 3 + np.arange(6)[:, None]

    def test_the_interquartile_mean_is_of_the_middle_half_of_all_episodes(self) -> None:
        ordered = np.sort(self.RETURNS.ravel())
        assert interquartile_mean(self.RETURNS) == pytest.approx(ordered[12:36].mean())
        holed = self.RETURNS.copy()
        holed[0] = np.nan
        assert interquartile_mean(holed) == pytest.approx(interquartile_mean(self.RETURNS[1:]))
        for size in range(1, 12):
            assert interquartile_mean(self.RETURNS.ravel()[:size]) == pytest.approx(
                stats.trim_mean(self.RETURNS.ravel()[:size], 0.25)
            )
        assert np.isnan(interquartile_mean(np.full(3, np.nan)))

    def test_probability_of_improvement_counts_pairs_of_a_task(self) -> None:
        rng = np.random.default_rng(1)
        one, other = rng.integers(0, 4, (5, 7)).astype(float), rng.integers(0, 4, (5, 3)).astype(float)
        pairs = [
            np.mean([(x > y) + (x == y) / 2 for x in row for y in rival]) for row, rival in zip(one, other, strict=True)
        ]
        assert probability_of_improvement(one, other) == pytest.approx(np.mean(pairs))
        assert probability_of_improvement(one, one) == pytest.approx(0.5)
        assert probability_of_improvement(one + 9, other) == 1
        lost = np.where(np.arange(5)[:, None] == 2, np.nan, one)
        assert probability_of_improvement(lost, other) == pytest.approx(np.mean([pairs[i] for i in (0, 1, 3, 4)]))
        assert np.isnan(probability_of_improvement(np.full((2, 2), np.nan), np.ones((2, 2))))

    @pytest.mark.parametrize(
        ("tasks", "episodes", "between", "within", "statistic"),
        [
            pytest.param(30, 2, 10.0, 3.0, np.nanmean, marks=pytest.mark.slow),
            pytest.param(30, 20, 10.0, 3.0, np.nanmean, marks=pytest.mark.slow),
            pytest.param(10, 5, 10.0, 3.0, np.nanmean, marks=pytest.mark.slow),
            (30, 5, 0.0, 3.0, np.nanmean),  # episodes drawn within the tasks, too, would cover 99 %
            pytest.param(30, 3, 3.0, 3.0, np.nanmean, marks=pytest.mark.slow),
            (30, 3, 10.0, 3.0, interquartile_mean),
        ],
    )
    def test_the_bootstrap_covers_the_familys_value_as_often_as_it_says(
        self, tasks: int, episodes: int, between: float, within: float, statistic: Any
    ) -> None:
        rng = np.random.default_rng(0)
        experiments, hits = 300 if statistic is interquartile_mean else 600, 0
        for _ in range(experiments):
            returns = rng.normal(0, between, (tasks, 1)) + rng.normal(0, within, (tasks, episodes))
            low, high = stratified_bootstrap(returns, statistic, rng, resamples=200)
            hits += low <= 0 <= high
        assert 0.93 <= hits / experiments <= 0.97

    def test_the_bootstrap_leaves_lost_tasks_out(self) -> None:
        returns = self.RETURNS.copy()
        returns[1, 2:] = np.nan
        returns[4] = np.nan
        rng = np.random.default_rng
        expected = stratified_bootstrap(np.delete(returns, 4, 0), np.nanmean, rng(0), resamples=20)
        assert stratified_bootstrap(returns, np.nanmean, rng(0), resamples=20) == expected
        assert np.isfinite(expected).all()

    @pytest.mark.parametrize("shape", [(1, 20), (20, 1), (0, 5)])
    def test_one_task_or_one_episode_gives_no_interval(self, shape: tuple[int, int]) -> None:
        found = stratified_bootstrap(np.random.default_rng(0).normal(size=shape), np.nanmean, np.random.default_rng(0))
        assert np.isnan(found).all()

    def test_nothing_left_gives_no_interval(self) -> None:
        nothing = stratified_bootstrap(np.full((2, 2), np.nan), np.nanmean, np.random.default_rng(0))
        assert np.isnan(nothing).all()
