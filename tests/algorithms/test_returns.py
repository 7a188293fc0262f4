"""Returns, advantages and the linear baseline against plain loops, one episode or one task at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import drop, make_policy, make_spec, seeds, spoil, toy_rollouts, uneven
from ssm_metarl.algorithms.returns import (
    advantages,
    discounted_returns,
    generalized_advantages,
    linear_baseline,
    normalized,
    tells_apart,
)
from ssm_metarl.algorithms.rollouts import Array, Rollouts


def policy_gradient_advantages(rollouts: Rollouts, discount: float, gae_lambda: float) -> Array:
    return normalized(advantages(rollouts, discount, gae_lambda)[0], rollouts.valid)


fractions = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1))


def record(tasks: int = 3, num_episodes: int = 4, horizon: int = 9, seed: int = 0, **options: Any) -> Rollouts:
    spec = make_spec(**options)
    return toy_rollouts(
        spec, make_policy(spec).numpy_weights(), uneven(tasks, num_episodes, horizon, seed), num_episodes, horizon, seed
    )


def masks(rng: Any, shape: tuple[int, int, int]) -> Any:
    """Prefixes of any length, none included."""
    lengths = rng.integers(0, shape[1] + 1, (shape[0], shape[2]))
    return np.arange(shape[1])[None, :, None] < lengths[:, None]


@settings(max_examples=60)
@given(
    seed=seeds,
    shape=st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 3)),
    discount=fractions,
    gae_lambda=fractions,
)
def test_advantages_equal_a_loop_over_each_episode(seed: int, shape: Any, discount: float, gae_lambda: float) -> None:
    """A_t = Σ_l (γλ)^l δ_{t+l}, bootstrapped from `last_values` behind the last valid step only."""
    rng = np.random.default_rng(seed)
    valid = masks(rng, shape)
    rewards, values = rng.normal(size=(2, *shape))
    last_values = rng.normal(size=(shape[0], shape[2]))
    garbage = np.where(valid, 0.0, rng.choice([np.nan, 1e30], shape))
    ours = generalized_advantages(rewards + garbage, values + garbage, last_values, valid, discount, gae_lambda)
    expected = np.zeros(shape)
    for m, k in np.ndindex(shape[0], shape[2]):
        length = valid[m, :, k].sum()
        v = [*values[m, :length, k], last_values[m, k]]
        delta = [rewards[m, t, k] + discount * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected[m, t, k] = sum((discount * gae_lambda) ** i * d for i, d in enumerate(delta[t:]))
    np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=30)
@given(seed=seeds, discount=fractions)
def test_lambda_of_one_is_return_minus_baseline(seed: int, discount: float) -> None:
    rng = np.random.default_rng(seed)
    shape = (2, 6, 3)
    valid, (rewards, values) = masks(rng, shape), rng.normal(size=(2, *shape))
    returns = discounted_returns(rewards, valid, discount)
    ours = generalized_advantages(rewards, values, np.zeros((2, 3)), valid, discount, 1.0)
    np.testing.assert_allclose(ours, (returns - values) * valid, atol=1e-9)
    for m, k in np.ndindex(2, 3):
        running = 0.0
        for t in reversed(range(valid[m, :, k].sum())):
            running = rewards[m, t, k] + discount * running
            assert returns[m, t, k] == pytest.approx(running)


@pytest.mark.parametrize("how", ["terminated", "truncated"])
def test_only_a_cut_episode_is_bootstrapped(how: str) -> None:
    """An end is worth nothing more; behind a cut stands the value of the last observation."""
    spec = make_spec()
    tasks = [{"ends": [2, 4, 9], "how": how}]
    cut = toy_rollouts(spec, make_policy(spec).numpy_weights(), tasks, 3, 6)
    values = np.zeros(cut.rewards.shape)
    # The value of an observation is its first number.
    ended = cut.terminated.any(1)
    last_values = np.where(ended, 0.0, cut.last_observations[..., 0])
    ours = generalized_advantages(cut.rewards, values, last_values, cut.valid, 0.9, 1.0)
    without = discounted_returns(cut.rewards, cut.valid, 0.9)
    steps = np.arange(6)[:, None]
    lengths = np.array([2, 4, 6])
    beyond = 0.9 ** np.maximum(lengths - steps, 0) * cut.last_observations[0, :, 0]
    bootstrapped = np.array([how == "truncated"] * 2 + [True])
    np.testing.assert_allclose(ours[0], without[0] + beyond * bootstrapped * cut.valid[0], atol=1e-6)


@settings(max_examples=25)
@given(seed=seeds, size=st.integers(1, 3), num_episodes=st.integers(1, 4))
def test_the_baseline_is_each_tasks_ridge_regression(seed: int, size: int, num_episodes: int) -> None:
    rng = np.random.default_rng(seed)
    experience = record(3, num_episodes, 9, seed, observation_size=size)
    far = rng.normal(size=experience.observations.shape).astype(np.float32) * 8
    experience = replace(experience, observations=np.where(experience.valid[..., None], far, 0))
    targets, shrinkage = rng.normal(size=experience.rewards.shape), 0.7
    ours = linear_baseline(experience, targets, shrinkage)
    for task in range(3):
        steps, lanes = np.nonzero(experience.valid[task])
        observations = far[task, steps, lanes].astype(np.float64).clip(-10, 10)
        t = steps[:, None] / 100
        features = np.hstack([observations, observations**2, t, t**2, t**3])
        features = (features - features.mean(0)) / np.where(features.std(0) > 0, features.std(0), 1)
        goal = targets[task, steps, lanes]
        # Ridge regression is least squares with a row of its own for each coefficient but the constant.
        penalty = shrinkage * len(goal) / experience.kept()[task].sum()
        rows = np.vstack([features, np.sqrt(penalty) * np.eye(features.shape[1])])
        goals = np.concatenate([goal - goal.mean(), np.zeros(features.shape[1])])
        fitted = goal.mean() + features @ np.linalg.lstsq(rows, goals)[0]
        np.testing.assert_allclose(ours[task, steps, lanes], fitted, rtol=1e-6, atol=1e-6)
    assert not ours[~experience.valid].any()


def test_the_baseline_finds_what_is_linear_in_its_features() -> None:
    experience = record(2, 5, 9)
    t = np.arange(experience.valid.shape[1])[None, :, None] / 100
    targets = 3 + 2 * experience.observations[..., 1] - experience.observations[..., 0] ** 2 + 40 * t**2
    np.testing.assert_allclose(
        linear_baseline(experience, targets, 1e-9)[experience.valid], targets[experience.valid], atol=1e-4
    )


def test_the_baseline_leaves_what_few_episodes_tell() -> None:
    """Returns that are noise of their episode alone: of the best baseline, their mean, little may be taken away."""
    rng = np.random.default_rng(0)
    experience = record(40, 2, 8)
    noise = np.where(experience.valid, rng.normal(size=(40, 1, 2)), 0.0)
    own = noise - noise.sum((1, 2), keepdims=True) / experience.valid.sum((1, 2), keepdims=True)
    left = np.where(experience.valid, noise - linear_baseline(experience, noise), 0.0)
    shares = (left**2).sum((1, 2)) / (own**2 * experience.valid).sum((1, 2))
    assert shares.mean() > 0.25
    fitted = np.where(experience.valid, noise - linear_baseline(experience, noise, 1e-6), 0.0)
    assert ((fitted**2).sum((1, 2)) / (own**2 * experience.valid).sum((1, 2))).mean() < 0.1


@pytest.mark.parametrize("level", [0.0, 1.0, -3e4])
def test_features_that_do_not_vary_and_equal_returns_are_fitted_exactly(level: float) -> None:
    experience = record(2, 3, 9)
    still = replace(experience, observations=np.where(experience.valid[..., None], np.float32(7), np.float32(0)))
    targets = np.full(still.rewards.shape, level)
    np.testing.assert_allclose(linear_baseline(still, targets), np.where(still.valid, level, 0.0), rtol=1e-9)


def episodes(rewards: Any, terminated: bool = False) -> Rollouts:
    """One task's episodes with these rewards, a list each."""
    whole = record(1, len(rewards), max(map(len, rewards)))
    lengths = np.array([len(each) for each in rewards])
    valid = np.arange(lengths.max())[None, :, None] < lengths
    filled = np.zeros(valid.shape, np.float32)
    for slot, each in enumerate(rewards):
        filled[0, : len(each), slot] = each
    ended = np.zeros_like(valid)
    ended[0, lengths - 1, np.arange(len(rewards))] = terminated
    spec = make_spec()
    blank = np.zeros((*valid.shape, spec.observation_size), np.float32)
    zeros = np.zeros((*valid.shape, spec.action_size), np.float32)
    last = np.zeros((1, len(rewards), spec.observation_size), np.float32)
    return replace(
        whole, observations=blank, actions=zeros, rewards=filled, log_probs=filled * 0, valid=valid, terminated=ended,
        starts=valid & False, resets=valid & False, last_observations=last,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("rewards", "terminated", "expected"),
    [
        ([[1, 1, 1], [1, 1, 1]], False, False),
        ([[1, 1, 1], [1, 1]], False, True),
        ([[0, 1], [1, 0]], False, True),  # sooner is better, at this discount
        ([[0.1] * 3, [0.1] * 3, [0.1] * 3], True, False),
        ([[1, 1, 1]], False, False),
        ([[1, 1, 1]], True, True),
        ([[1, 2, 1]], False, True),
        ([[1, 1], [1, 1], [5, 1]], False, True),
    ],
)
def test_episodes_tell_apart_what_their_returns_do(rewards: Any, terminated: bool, expected: bool) -> None:
    found = episodes(rewards, terminated)
    assert tells_apart(found, 0.9).tolist() == [expected]
    if len(rewards) == 3:  # one that was dropped says nothing
        assert tells_apart(drop(found, 0, 2), 0.9).tolist() == [False]


def test_a_task_without_an_episode_tells_nothing() -> None:
    assert tells_apart(drop(record(2), 1), 0.9).tolist() == [True, False]


@settings(max_examples=25)
@given(seed=seeds)
def test_normalised_advantages_have_each_tasks_mean_0_and_deviation_1(seed: int) -> None:
    rng = np.random.default_rng(seed)
    valid, advantages = masks(rng, (4, 6, 3)), 5 + 3 * rng.normal(size=(4, 6, 3))
    valid[0] = False
    ours = normalized(np.where(valid, advantages, np.nan), valid)
    assert ours.dtype == np.float32
    assert not ours[~valid].any()
    for task in range(1, 4):
        own = ours[task][valid[task]]
        if own.size > 1:
            assert own.mean() == pytest.approx(0, abs=1e-5)
            assert own.std() == pytest.approx(1, abs=1e-4)
        assert np.isfinite(own).all()


def test_equal_advantages_say_nothing() -> None:
    assert np.abs(normalized(np.full((1, 5, 2), 0.3), np.ones((1, 5, 2), bool))).max() < 1e-6


@settings(max_examples=30)
@given(seed=seeds, discount=fractions, gae_lambda=fractions, discrete=st.booleans())
def test_garbage_that_is_not_valid_changes_nothing(
    seed: int, discount: float, gae_lambda: float, discrete: bool
) -> None:
    clean = drop(drop(record(3, 3, 7, seed, discrete=discrete), 0, 1), 2)
    spoiled = spoil(clean, seed)
    for garbled, fine in ((spoiled, clean), (spoil(clean, seed + 1), clean)):
        returns = discounted_returns(garbled.rewards, garbled.valid, discount)
        np.testing.assert_array_equal(returns, discounted_returns(fine.rewards, fine.valid, discount))
        targets = np.where(fine.valid, returns, np.nan)
        np.testing.assert_array_equal(linear_baseline(garbled, targets), linear_baseline(fine, returns))
        np.testing.assert_array_equal(
            policy_gradient_advantages(garbled, discount, gae_lambda),
            policy_gradient_advantages(fine, discount, gae_lambda),
        )


def test_a_task_without_a_valid_step_gets_zeros_and_harms_no_other() -> None:
    whole = record(3)
    lost = drop(whole, 1)
    found = policy_gradient_advantages(lost, 0.9, 0.9)
    assert np.isfinite(found).all()
    assert not found[1].any()
    np.testing.assert_array_equal(found[[0, 2]], policy_gradient_advantages(whole, 0.9, 0.9)[[0, 2]])
    assert not policy_gradient_advantages(drop(drop(lost, 0), 2), 0.9, 0.9).any()


@settings(max_examples=15)
@given(seed=seeds)
def test_tasks_are_apart(seed: int) -> None:
    whole = record(3, seed=seed)
    together = policy_gradient_advantages(whole, 0.95, 0.9)
    for task in range(3):
        alone = policy_gradient_advantages(whole.select(slice(task, task + 1)), 0.95, 0.9)
        np.testing.assert_allclose(alone[0], together[task], rtol=1e-5, atol=1e-5)
