"""`cartpole` against gymnasium's CartPole-v1, and what each parameter does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.classic_control.cartpole import CartPoleEnv as GymnasiumCartPole
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from numpy.typing import NDArray

from ssm_metarl.tasks import make
from ssm_metarl.tasks.cartpole import CARTPOLE_V1, HORIZON, RANGES

FAMILY = make("cartpole")


def balance(observations: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.int64]:
    """Keep the pole up to the horizon: push to where it leans and falls, and back to the middle."""
    position, velocity, angle, angular_velocity = observations.T
    return np.asarray(0.1 * position + 0.2 * velocity + angle + 0.5 * angular_velocity > 0, dtype=np.int64)


def either(observations: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.int64]:
    return rng.integers(0, 2, len(observations))


def reference_envs(num_envs: int) -> Any:
    makers = [lambda: gymnasium.make("CartPole-v1") for _ in range(num_envs)]
    return SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)


def assert_same_infos(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if key == "final_obs":
            assert ours[key].dtype == object
            for row, expected in zip(ours[key], value, strict=True):
                np.testing.assert_array_equal(row, expected)
        elif isinstance(value, dict):
            assert_same_infos(ours[key], value)
        else:
            np.testing.assert_array_equal(ours[key], value)


@pytest.mark.parametrize(
    ("play", "steps", "seed"),
    [(either, 300, 0), (either, 300, 1), (either, 300, 12345), (balance, 1010, 7)],
)
def test_is_cartpole_v1(play: Callable[..., NDArray[np.int64]], steps: int, seed: int) -> None:
    """Same seeds, same bits: resets, falls, the horizon, every episode that follows, and all infos."""
    envs, expected = FAMILY.make_vector_env([CARTPOLE_V1], num_episodes=5), reference_envs(5)
    assert envs.single_observation_space == expected.single_observation_space
    assert envs.observation_space == expected.observation_space
    assert envs.action_space == expected.action_space
    rng = np.random.default_rng(seed)
    observations, infos = envs.reset(seed=seed)
    their_observations, their_infos = expected.reset(seed=seed)
    ends = {"terminated": 0, "truncated": 0}
    for _ in range(steps):
        assert observations.dtype == their_observations.dtype
        np.testing.assert_array_equal(observations, their_observations)
        assert_same_infos(infos, their_infos)
        actions = play(observations, rng)
        observations, rewards, terminated, truncated, infos = envs.step(actions)
        their_observations, *theirs, their_infos = expected.step(actions)
        np.testing.assert_array_equal(np.stack([rewards, terminated, truncated]), np.stack(theirs))
        ends["terminated"] += int(terminated.sum())
        ends["truncated"] += int(truncated.sum())
    assert ends["truncated" if play is balance else "terminated"] >= 10


@pytest.mark.parametrize("split", RANGES)
def test_every_task_is_gymnasiums_with_its_parameters(split: str) -> None:
    """Not only at default values: gymnasium's own class with the task's physics, pushes mirrored by us."""
    tasks = FAMILY.sample(8, np.random.default_rng(1), split)
    envs = FAMILY.make_vector_env(tasks, num_episodes=1)
    observations, _ = envs.reset(seed=3)
    rng = np.random.default_rng(0)
    references: list[Any] = []
    for task, observation in zip(tasks, observations, strict=True):
        reference: Any = GymnasiumCartPole()
        physics = {key: value for key, value in task.items() if key != "direction"}
        for key, value in physics.items():
            assert hasattr(reference, key)
            setattr(reference, key, value)
        reference.total_mass = reference.masspole + reference.masscart
        reference.polemass_length = reference.masspole * reference.length
        np.testing.assert_array_equal(reference.reset(seed=3 + len(references))[0], observation)
        references.append(reference)
    running = np.ones(len(tasks), dtype=bool)
    while running.any():
        actions = either(observations, rng)
        observations, _, terminated, _, infos = envs.step(actions)
        for i in np.flatnonzero(running):
            pushed = actions[i] if tasks[i]["direction"] == 1 else 1 - actions[i]
            expected, _, fell, _, _ = references[i].step(int(pushed))
            assert terminated[i] == fell
            np.testing.assert_array_equal(infos["final_obs"][i] if fell else observations[i], expected)
        running &= ~terminated


def after(task_change: dict[str, Any], actions: list[int]) -> NDArray[np.float32]:
    """Observation of one cart after these actions from the start of seed 0."""
    envs = FAMILY.make_vector_env([CARTPOLE_V1 | task_change], num_episodes=1)
    observations, _ = envs.reset(seed=0)
    for action in actions:
        observations, *_ = envs.step(np.array([action]))
    return np.asarray(observations[0])


def test_push_direction_mirrors_the_actions() -> None:
    pushes = [1, 0, 0, 1, 1]
    mirrored = [1 - push for push in pushes]
    np.testing.assert_array_equal(after({"direction": -1}, pushes), after({}, mirrored))
    assert after({}, [1])[1] > after({}, [0])[1]
    assert after({"direction": -1}, [1])[1] < after({"direction": -1}, [0])[1]


def test_parameters_act_in_the_right_direction() -> None:
    def cart_kick(change: dict[str, Any]) -> float:
        return float(after(change, [1])[1] - after(change, [0])[1])  # speed between a push right and one left

    def pole_kick(change: dict[str, Any]) -> float:
        return float(after(change, [0])[3] - after(change, [1])[3])

    assert cart_kick({"force_mag": 14.0}) > cart_kick({}) > cart_kick({"force_mag": 6.0}) > 0
    assert cart_kick({"force_mag": 0.0}) == 0
    assert cart_kick({"masscart": 0.5}) > cart_kick({}) > cart_kick({"masscart": 2.0})
    assert pole_kick({"length": 0.25}) > pole_kick({}) > pole_kick({"length": 1.0}) > 0

    def fall_time(change: dict[str, Any]) -> int:
        envs = FAMILY.make_vector_env([CARTPOLE_V1 | {"force_mag": 0.0} | change], 1)
        envs.reset(seed=1)
        return next(step for step in range(1, HORIZON + 1) if envs.step(np.array([0]))[2].any())

    assert fall_time({"gravity": 15.0}) < fall_time({}) < fall_time({"gravity": 5.0})
    assert fall_time({"length": 0.25}) < fall_time({}) < fall_time({"length": 1.0})
    # A heavy pole pushes its own cart back: the same push turns it less or more, but never alike.
    assert pole_kick({"masspole": 0.3}) != pole_kick({"masspole": 0.05})


@pytest.mark.parametrize("bad", [2, -1, 7])
def test_unknown_actions_are_refused(bad: int) -> None:
    envs = FAMILY.make_vector_env([CARTPOLE_V1], num_episodes=2)
    envs.reset(seed=0)
    with pytest.raises(ValueError, match="must be 0 or 1"):
        envs.step(np.array([0, bad]))
    with pytest.raises(ValueError, match="must be 0 or 1"):
        envs.step(np.array([0.5, np.nan]))


@pytest.mark.parametrize("split", RANGES)
def test_tasks_fill_their_ranges(split: str) -> None:
    expected = {
        "gravity": (5, 15),
        "masscart": (0.5, 2),
        "masspole": (0.05, 0.3),
        "length": (0.25, 1),
        "force_mag": (6, 14),
    }
    expected |= {"shifted": {"gravity": (15, 18), "length": (1, 1.25)}}.get(split, {})
    expected |= {"shifted-test": {"gravity": (18, 20), "length": (1.25, 1.5)}}.get(split, {})
    tasks = FAMILY.sample(10_000, np.random.default_rng(0), split)
    assert all(task.keys() == CARTPOLE_V1.keys() for task in tasks)
    for key, (low, high) in expected.items():
        shares = (np.array([task[key] for task in tasks]) - low) / (high - low)
        assert shares.min() >= 0
        assert shares.max() <= 1
        np.testing.assert_allclose(np.quantile(shares, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.02)
    directions = [task["direction"] for task in tasks]
    assert set(directions) == {-1, 1}
    assert abs(np.mean(directions)) < 0.04


@pytest.mark.parametrize("task", [{"masscart": 0.0}, {"length": -0.5}, {"gravity": -9.8}, {"direction": 0}])
def test_impossible_physics_is_refused(task: dict[str, float]) -> None:
    (key,) = task
    with pytest.raises(ValueError, match=f"'{key}' must be "):
        FAMILY.make_vector_env([CARTPOLE_V1 | task], 1)


def test_recommended_options() -> None:
    assert FAMILY.recommended == {
        "episodes": 10,
        "inner_lr": 0.1,
        "outer_lr": 2e-3,
        "lr_schedule": "linear",
        "iterations": 40,
    }
