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
from ssm_metarl.algorithms.adaptation import adapt_weights
from ssm_metarl.algorithms.evaluation import (
    confidence_interval,
    evaluate,
    interquartile_mean,
    probability_of_improvement,
    stratified_bootstrap,
)
from ssm_metarl.algorithms.maml import MetaConfig, for_tasks, inner_step, make_batch
from ssm_metarl.algorithms.policy import SSMPolicy

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


def test_one_sample_has_no_width() -> None:
    assert [float(x) for x in confidence_interval(np.array([2.0, np.nan]))] == [2.0, 2.0, 2.0]


class TestAggregates:
    """Definitions of Agarwal et al. 2021, written out."""

    RETURNS = np.random.default_rng(0).normal(size=(6, 8)) * 3 + np.arange(6)[:, None]

    def test_the_interquartile_mean_is_of_the_middle_half_of_all_episodes(self) -> None:
        ordered = np.sort(self.RETURNS.ravel())
        assert interquartile_mean(self.RETURNS) == pytest.approx(ordered[12:36].mean())
        holed = self.RETURNS.copy()
        holed[0] = np.nan
        assert interquartile_mean(holed) == pytest.approx(interquartile_mean(self.RETURNS[1:]))

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

    def test_the_bootstrap_draws_within_tasks(self) -> None:
        """Tasks that differ much and episodes that do not: the interval is that of the episodes."""
        rng = np.random.default_rng(2)
        returns = 100.0 * np.arange(10)[:, None] + rng.normal(size=(10, 40))
        low, high = stratified_bootstrap(returns, np.nanmean, np.random.default_rng(0), resamples=400)
        expected = 2 * 1.96 / np.sqrt(400)
        assert high - low == pytest.approx(expected, rel=0.15)
        assert low < returns.mean() < high

    def test_the_bootstrap_leaves_lost_episodes_out(self) -> None:
        returns = self.RETURNS.copy()
        returns[1, 2:] = np.nan
        returns[4] = np.nan
        seen: list[Any] = []

        def statistic(drawn: Any) -> float:
            seen.append(drawn)
            return float(np.nanmean(drawn))

        stratified_bootstrap(returns, statistic, np.random.default_rng(0), resamples=20)
        for drawn in seen:
            np.testing.assert_array_equal(np.isfinite(drawn), np.isfinite(returns))
            for task in (0, 1, 2, 3, 5):
                assert np.isin(drawn[task][np.isfinite(drawn[task])], returns[task]).all()
        nothing = stratified_bootstrap(np.full((2, 2), np.nan), np.nanmean, np.random.default_rng(0))
        assert np.isnan(nothing).all()
