"""Returns over adaptation steps, and their intervals."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from builders import assert_same, drop, make_policy, make_spec, seeds, toy_rollouts, uneven
from ssm_metarl.algorithms.batch import make_batch
from ssm_metarl.algorithms.inner_loop import adapt_weights, for_tasks, inner_step
from ssm_metarl.algorithms.policy import SSMPolicy
from ssm_metarl.algorithms.registry import MetaConfig
from ssm_metarl.algorithms.statistics import (
    confidence_interval,
    interquartile_mean,
    interval_values,
    probability_of_improvement,
    stratified_bootstrap,
)
from ssm_metarl.evaluation.evaluate import Evaluation, evaluate

TASKS, COLUMNS, HORIZON = 4, 5, 6


@pytest.mark.parametrize("discrete", [False, True])
def test_evaluation_is_the_returns_of_policies_adapted_one_step_after_another(discrete: bool) -> None:
    """With half the step size beyond the steps that were trained for."""
    spec, config = make_spec(discrete=discrete), MetaConfig(inner_lr=0.5)
    policy, tasks = make_policy(spec), uneven(TASKS, COLUMNS, HORIZON)
    seen: list[Any] = []

    def collect(weights: Any, episodes: int, step: int) -> Any:
        seen.append((step, weights, toy_rollouts(spec, weights, tasks, COLUMNS, HORIZON, step)))
        return seen[-1][2]

    result = evaluate(policy, config, collect, 2, COLUMNS)
    assert [step for step, _, _ in seen] == [0, 1, 2]
    weights = policy.numpy_weights()
    for step, used, record in seen:
        assert_same(record, toy_rollouts(spec, weights, tasks, COLUMNS, HORIZON, step))
        for name, value in weights.items():
            np.testing.assert_array_equal(used[name], value)
        np.testing.assert_allclose(result.returns[:, step], record.returns().mean(1))
        np.testing.assert_allclose(result.lengths[:, step], record.lengths().mean(1))
        sized = config if step < config.inner_steps else replace(config, inner_lr=0.25)
        weights = adapt_weights(policy, weights, make_batch(spec, record, config), sized)
    assert result.environment_steps == sum(record.num_steps for _, _, record in seen)
    assert result.seconds > 0


def test_the_policy_is_not_changed() -> None:
    spec = make_spec()
    policy = make_policy(spec)
    before = policy.numpy_weights()
    evaluate(policy, MetaConfig(), lambda w, _, step: toy_rollouts(spec, w, uneven(2, 2, 4), 2, 4, step), 1, 2)
    for name, value in policy.numpy_weights().items():
        np.testing.assert_array_equal(value, before[name])
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_adaptation_pays_on_a_task_that_can_be_learned() -> None:
    """From chance to nearly every reward, with intervals that say so."""
    spec, config = make_spec(discrete=True, inputs="observation"), MetaConfig(inner_lr=1.0, discount=0.0)
    tasks = [{"best": task % 2} for task in range(6)]
    result = evaluate(SSMPolicy(spec), config, lambda w, _, step: toy_rollouts(spec, w, tasks, 30, 6, step), 3, 30)
    summary = json.loads(json.dumps(result.summary(), allow_nan=False))
    for key in ("return", "ci_low", "ci_high", "episode_length"):
        assert len(summary[key]) == 4
    assert summary["return"][0] == pytest.approx(3.0, abs=0.5)
    assert summary["ci_low"][3] > summary["ci_high"][0]
    assert summary["return"][3] > 5.0
    assert summary["episode_length"] == [6.0] * 4
    assert summary["num_tasks"] == 6
    assert summary["environment_steps"] == 4 * 6 * 30 * 6


def test_lost_episodes_and_tasks_are_left_out() -> None:
    spec, tasks = make_spec(), uneven(3, 4, 5)
    whole: list[Any] = []

    def collect(weights: Any, episodes: int, step: int) -> Any:
        whole.append(toy_rollouts(spec, weights, tasks, 4, 5, step))
        return drop(drop(whole[-1], 0, 2), 1)

    result = evaluate(make_policy(spec), MetaConfig(), collect, 1, 4)
    kept = [0, 1, 3]
    for step, record in enumerate(whole):
        assert result.returns[0, step] == pytest.approx(record.returns()[0, kept].mean())
        assert result.lengths[0, step] == pytest.approx(record.lengths()[0, kept].mean())
    assert np.isnan(result.returns).tolist() == [[False] * 2, [True] * 2, [False] * 2]
    assert np.isfinite(result.summary()["return"]).all()


@settings(max_examples=6)
@given(seed=seeds, shared=st.booleans(), columns=st.sampled_from([1, 400, 1100]))
def test_shards_do_not_show(seed: int, shared: bool, columns: int) -> None:
    """Adapting all tasks in one call, or in parts that fit the cache, is the same."""
    spec, config = make_spec(hidden_dim=3), MetaConfig()
    policy = make_policy(spec, seed)
    weights = policy.numpy_weights()
    batch = make_batch(spec, toy_rollouts(spec, weights, [{}] * 3, columns, 4, seed), config)
    parameters = for_tasks(dict(policy.named_parameters()), 3)
    whole, _ = inner_step(policy, parameters, batch, config, differentiable=False)
    current = weights if shared else {name: np.stack([value] * 3) for name, value in weights.items()}
    for name, value in adapt_weights(policy, current, batch, config).items():
        np.testing.assert_allclose(value, whole[name].numpy(), rtol=1e-4, atol=1e-6)
        assert value.dtype == np.float32


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


def test_one_task_has_no_interval_in_json() -> None:
    one = Evaluation(np.array([[1.0, 2.0]]), np.ones((1, 2)), 10, 0.1)
    summary = json.loads(json.dumps(one.summary(), allow_nan=False))
    assert summary["return"] == [1.0, 2.0]
    assert summary["ci_low"] == summary["ci_high"] == [None, None]


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
            (30, 2, 10.0, 3.0, np.nanmean),
            (30, 20, 10.0, 3.0, np.nanmean),
            (10, 5, 10.0, 3.0, np.nanmean),
            (30, 5, 0.0, 3.0, np.nanmean),  # episodes drawn within the tasks, too, would cover 99 %
            (30, 3, 3.0, 3.0, np.nanmean),
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
