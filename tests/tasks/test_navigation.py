"""`navigation-2d` against a plain scalar game, and what it must not give away."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssm_metarl.tasks import make
from ssm_metarl.tasks.navigation import HORIZON, NavigationEnv

F32 = np.float32


def scalar_step(
    position: tuple[F32, F32], goal: tuple[F32, F32], action: tuple[F32, F32]
) -> tuple[tuple[F32, F32], F32, bool]:
    """One point, one step, one number at a time: position, reward, terminated."""
    x = position[0] + min(max(action[0], F32(-0.1)), F32(0.1))
    y = position[1] + min(max(action[1], F32(-0.1)), F32(0.1))
    dx, dy = x - goal[0], y - goal[1]
    return (x, y), -np.sqrt(dx * dx + dy * dy), bool(abs(dx) < F32(0.01) and abs(dy) < F32(0.01))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_envs=st.integers(1, 9), scale=st.sampled_from([0.02, 0.1, 1.0]))
def test_equals_a_scalar_game(seed: int, num_envs: int, scale: float) -> None:
    """Bit for bit through goals reached, horizons and the episodes that follow."""
    rng = np.random.default_rng(seed)
    goals = rng.uniform(-0.5, 0.5, (num_envs, 2)).astype(np.float32)
    envs = NavigationEnv(goals)
    observations, _ = envs.reset(seed=seed)
    positions: list[Any] = [(F32(0), F32(0))] * num_envs
    elapsed = [0] * num_envs
    for _ in range(130):
        # Half of the players know the way, so that goals are reached.
        actions = rng.normal(0.0, scale, (num_envs, 2)).astype(np.float32)
        actions[::2] = (goals - observations)[::2]
        observations, rewards, terminated, truncated, infos = envs.step(actions)
        for i in range(num_envs):
            positions[i], reward, arrived = scalar_step(positions[i], tuple(goals[i]), tuple(actions[i]))
            elapsed[i] += 1
            assert rewards[i] == reward
            assert terminated[i] == arrived
            assert truncated[i] == (elapsed[i] == HORIZON)
            if arrived or elapsed[i] == HORIZON:
                np.testing.assert_array_equal(infos["final_obs"][i], positions[i])
                positions[i], elapsed[i] = (F32(0), F32(0)), 0
            np.testing.assert_array_equal(observations[i], positions[i])


def test_the_reward_is_the_distance_not_its_square() -> None:
    envs = make("navigation-2d").make_vector_env([{"goal": [0.3, 0.4]}], 1)
    observations, _ = envs.reset(seed=0)
    np.testing.assert_array_equal(observations, [[0, 0]])
    _, rewards, *_ = envs.step(np.zeros((1, 2), np.float32))
    assert rewards[0] == pytest.approx(-0.5)


def test_actions_are_clipped_along_each_axis() -> None:
    envs = make("navigation-2d").make_vector_env([{"goal": [0.5, 0.5]}], 1)
    envs.reset(seed=0)
    observations, *_ = envs.step(np.array([[3.0, -0.04]], np.float32))
    np.testing.assert_array_equal(observations, np.array([[0.1, -0.04]], np.float32))
    observations, *_ = envs.step(np.array([[-np.inf, -0.2]], np.float32))
    np.testing.assert_allclose(observations, [[0.0, -0.14]], atol=1e-7)


def test_both_errors_must_be_small() -> None:
    goals = [0.1, 0.0], [0.1, 0.02], [0.109, 0.009], [0.111, 0.0]
    envs = make("navigation-2d").make_vector_env([{"goal": goal} for goal in goals], 1)
    envs.reset(seed=0)
    _, _, terminated, truncated, _ = envs.step(np.tile(np.array([0.1, 0.0], np.float32), (4, 1)))
    assert terminated.tolist() == [True, False, True, False]
    assert not truncated.any()


def test_the_goal_does_not_show() -> None:
    """Whatever the goals, equal moves give equal observations and infos, until a goal is reached."""
    family = make("navigation-2d")
    assert family.observation_space.shape == (2,)
    goals = [family.sample(20, np.random.default_rng(seed), "shifted") for seed in (0, 1)]
    envs = [family.make_vector_env(tasks, 1) for tasks in goals]
    starts = [env.reset(seed=3) for env in envs]
    np.testing.assert_array_equal(starts[0][0], starts[1][0])
    rng = np.random.default_rng(0)
    for _ in range(99):
        actions = rng.normal(0.0, 0.02, (20, 2)).astype(np.float32)  # far too slow for these goals
        first, reward, *_, info = envs[0].step(actions)
        second, other_reward, *_, other_info = envs[1].step(actions)
        np.testing.assert_array_equal(first, second)
        assert info == other_info == {}
        assert (reward != other_reward).all()


def test_nan_actions_spoil_one_episode_of_one_slot() -> None:
    """A broken policy shows as NaN in its own slot and ends at the horizon; the next episode is sound."""
    envs = make("navigation-2d").make_vector_env([{"goal": [0.5, 0.5]}], 2)
    envs.reset(seed=0)
    actions = np.zeros((2, 2), np.float32)
    actions[0, 0] = np.nan
    observations, rewards, *_ = envs.step(actions)
    assert np.isnan(observations[0, 0])
    assert np.isnan(rewards[0])
    assert np.isfinite(observations[1]).all()
    assert np.isfinite(rewards[1])
    for _ in range(HORIZON - 1):
        observations, _, terminated, truncated, _ = envs.step(np.zeros((2, 2), np.float32))
    assert truncated.all()
    assert not terminated.any()
    assert np.isfinite(observations).all()


@pytest.mark.parametrize("split", make("navigation-2d").splits)
def test_goals_fill_their_ranges(split: str) -> None:
    inner, outer = {"shifted": (0.5, 0.6), "shifted-test": (0.6, 0.75)}.get(split, (0.0, 0.5))
    tasks = make("navigation-2d").sample(20_000, np.random.default_rng(0), split)
    assert all(set(task) == {"goal"} for task in tasks)
    goals = np.array([task["goal"] for task in tasks])
    norms = np.abs(goals).max(axis=1)
    assert (norms > inner).all()
    assert (norms <= outer).all()
    assert norms.min() < inner + 0.02
    assert norms.max() > outer - 0.01
    np.testing.assert_allclose(goals.mean(axis=0), 0.0, atol=0.02)
    # Uniform over the area: the area within max-norm r grows with its square.
    share = (norms**2 - inner**2) / (outer**2 - inner**2)
    np.testing.assert_allclose(np.quantile(share, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.02)
