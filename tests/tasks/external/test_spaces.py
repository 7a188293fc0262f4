"""Spaces of external environments, as vectors and actions of a policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete

from external_environments import LINE, check_conventions
from ssm_metarl.tasks.external.gym import GymFamily
from ssm_metarl.tasks.external.names import from_name


class TestSpaces:
    @pytest.mark.parametrize(
        ("env_id", "size"),
        [("Pendulum-v1", 3), ("CartPole-v1", 4), ("FrozenLake-v1", 16), ("Taxi-v3", 500), ("CliffWalking-v1", 48)],
    )
    def test_gymnasiums_own(self, env_id: str, size: int) -> None:
        family = from_name(f"gym:{env_id}", {}, 25)
        assert family.observation_space.shape == (size,)
        check_conventions(family).close()

    def test_discrete_observations_become_one_hot(self) -> None:
        envs = from_name("gym:FrozenLake-v1").make_vector_env([{}], 3)
        observations, _ = envs.reset(seed=[0, 1, 2])  # type: ignore[arg-type]
        for _ in range(20):
            states = [env.unwrapped.s for env in envs.envs]  # type: ignore[attr-defined]
            np.testing.assert_array_equal(observations, np.eye(16)[states])
            observations, *_ = envs.step(np.array([0, 1, 2]))

    def test_several_discrete_ones_are_put_together(self, toy: Callable[..., GymFamily]) -> None:
        family = toy(MultiDiscrete([3, 2, 4], start=[1, 0, -2]))
        assert family.observation_space == Box(0, 1, (9,), np.float32)
        check_conventions(family)
        slot = family._policy_env({})
        np.testing.assert_array_equal(slot._vector(np.array([3, 0, -2])), [0, 0, 1, 1, 0, 1, 0, 0, 0])
        family = toy(Discrete(3, start=5), Discrete(4, start=-1))
        assert (family.observation_space.shape, family.action_space) == ((3,), Discrete(4))
        check_conventions(family)
        slot = family._policy_env({})
        np.testing.assert_array_equal(slot._vector(6), [0, 1, 0])
        assert [slot._action(np.int64(action)) for action in range(4)] == [-1, 0, 1, 2]

    def test_boxes_become_vectors(self, toy: Callable[..., GymFamily]) -> None:
        for space, size in (
            (Box(-1, 1, (2, 3), np.float64), 6),
            (Box(0, 255, (), np.uint8), 1),
            (Box(0, 1, (2000,)), 2000),
        ):
            family = toy(space)
            assert family.observation_space.shape == (size,)
            assert family.observation_space.dtype == np.float32
            check_conventions(family, steps=12)
        unbounded = toy(Box(-1e308, np.finfo(np.float64).max, (2,), np.float64)).observation_space
        assert unbounded == Box(-np.inf, np.inf, (2,), np.float32)

    @pytest.mark.parametrize(
        ("space", "match"),
        [
            (Box(0, 255, (64, 64, 3), np.uint8), r"shape \(64, 64, 3\) are too large"),
            (Dict({"a": Box(0, 1, (65, 64))}), r"observations\['a'\] of the shape \(65, 64\) are too large"),
            (Dict({"a": Discrete(1000), "b": MultiDiscrete([10, 20])}), "1030 values are too many for one-hot"),
            (Discrete(10**6), "1000000 values are too many for one-hot"),
            (MultiDiscrete([1000, 1000]), "2000 values are too many"),
        ],
    )
    def test_other_observations_are_refused(self, toy: Callable[..., GymFamily], space: Any, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            toy(space)

    @pytest.mark.parametrize(
        ("space", "match"),
        [
            (MultiDiscrete([3000, 3000]), "have 6000 values, 4096 at most"),
            (Box(-1000, 1000, (2,), np.int64), "are integers of 2001 values, 256 at most"),
            (Box(np.iinfo(np.int64).min, np.iinfo(np.int64).max, (1,), np.int64), "256 at most"),
            (Dict({"a": Discrete(2)}), "actions must be a Box, Discrete, MultiDiscrete or MultiBinary, not Dict"),
        ],
    )
    def test_other_actions_are_refused(self, toy: Callable[..., GymFamily], space: Any, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            toy(Box(0, 1, (1,)), space)

    def test_continuous_actions_are_clipped(self, toy: Callable[..., GymFamily]) -> None:
        family = toy(Box(0, 1, (1,)), Box(np.array([-1.0, 0.0]), np.array([1.0, np.inf]), dtype=np.float64))
        envs = family.make_vector_env([{}], 1)
        envs.reset(seed=[0])
        rewards = envs.step(np.array([[-3.0, 7.0]], np.float32))[1]
        assert rewards.tolist() == [6.0]
        assert envs.envs[0].unwrapped.actions[-1].dtype == np.float64  # type: ignore[attr-defined]

    def test_returned_arrays_are_the_callers(self, module: Callable[[str], str]) -> None:
        """The line returns the array that it goes on changing."""
        family = from_name(f"{module(LINE)}:Line")
        envs = family.make_vector_env([{"goal": [9.0]}], 1)
        envs.reset(seed=[0])  # type: ignore[arg-type]
        for _ in range(family.horizon):
            observations, *_, infos = envs.step(np.full((1, 1), 0.5, np.float32))
        final = infos["final_obs"][0]
        before = float(final[0])
        assert before != float(observations[0, 0])
        envs.step(np.zeros((1, 1), np.float32))
        assert float(final[0]) == before
