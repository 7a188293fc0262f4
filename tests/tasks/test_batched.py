"""The batched environment: episodes, seeds, flags, and the arrays that it returns."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.spaces import Box, Discrete
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ssm_metarl.tasks import BatchedEnv


class Counting(BatchedEnv):
    """Observes (steps of the episode, a random number drawn at its start); action 1 terminates."""

    def __init__(self, num_envs: int, horizon: int) -> None:
        super().__init__(Box(0, np.inf, (2,), np.float32), Discrete(2), num_envs, horizon)
        self.state = np.zeros((num_envs, 2), np.float32)
        self.starts = np.zeros(num_envs, int)

    def _start(self, slots: NDArray[np.intp]) -> None:
        self.starts[slots] += 1
        self.state[slots] = [(0, self._generator(slot).random()) for slot in slots.tolist()]

    def _advance(self, actions: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        self.state[:, 0] += 1
        return self.state[:, 0].copy(), actions == 1

    def _observe(self) -> NDArray[np.float32]:
        return self.state.copy()


class TestEpisodes:
    @settings(max_examples=60, deadline=None)
    @given(horizon=st.integers(1, 6), num_envs=st.integers(1, 5), steps=st.integers(1, 20), data=st.data())
    def test_against_a_plain_loop(self, horizon: int, num_envs: int, steps: int, data: st.DataObject) -> None:
        envs = Counting(num_envs, horizon)
        envs.reset(seed=0)
        elapsed, starts = [0] * num_envs, [1] * num_envs
        for _ in range(steps):
            actions = data.draw(st.lists(st.integers(0, 1), min_size=num_envs, max_size=num_envs))
            observations, rewards, terminated, truncated, infos = envs.step(np.array(actions))
            for slot, action in enumerate(actions):
                elapsed[slot] += 1
                assert rewards[slot] == elapsed[slot]
                assert terminated[slot] == (action == 1)
                assert truncated[slot] == (elapsed[slot] == horizon)  # at the horizon both can be true
                ended = terminated[slot] or truncated[slot]
                if ended:
                    assert infos["final_obs"][slot][0] == elapsed[slot]
                    elapsed[slot] = 0
                    starts[slot] += 1
                assert observations[slot, 0] == elapsed[slot]
                # What is said of ends is said of all episode slots, and only at a step at which one of them ended.
                assert bool(infos) == bool((terminated | truncated).any())
                if infos:
                    assert infos["_final_obs"][slot] == ended
                    assert (infos["final_obs"][slot] is None) == (not ended)
            assert envs.starts.tolist() == starts  # only episode slots that ended started anew

    def test_the_final_observation_is_of_the_episode_that_ended(self) -> None:
        envs = Counting(3, horizon=10)
        first, _ = envs.reset(seed=0)
        second, _, _, _, infos = envs.step(np.array([0, 1, 0]))
        assert infos["final_obs"].dtype == object
        np.testing.assert_array_equal(infos["final_obs"][1], [1, first[1, 1]])
        np.testing.assert_array_equal(infos["_final_obs"], [False, True, False])
        assert second[1, 1] != first[1, 1]
        np.testing.assert_array_equal(second[[0, 2], 1], first[[0, 2], 1])

    def test_reset_without_a_seed_goes_on_with_the_generators(self) -> None:
        envs = Counting(2, horizon=10)
        first, _ = envs.reset(seed=[3, 4])
        second, _ = envs.reset()
        third, _ = envs.reset(seed=[None, 4])
        assert (second != first)[:, 1].all()
        assert third[0, 1] not in (first[0, 1], second[0, 1])
        assert third[1, 1] == first[1, 1]
        expected = np.random.Generator(np.random.PCG64(3)).random(3).astype(np.float32)
        np.testing.assert_array_equal([first[0, 1], second[0, 1], third[0, 1]], expected)

    def test_unseeded_slots_differ(self) -> None:
        observations, _ = Counting(50, horizon=10).reset()
        assert len(np.unique(observations[:, 1])) == 50

    def test_reset_in_the_middle_starts_the_horizon_anew(self) -> None:
        envs = Counting(1, horizon=3)
        envs.reset(seed=0)
        go_on = np.array([0])
        envs.step(go_on)
        envs.step(go_on)
        envs.reset()
        assert [bool(envs.step(go_on)[3][0]) for _ in range(6)] == [False, False, True] * 2
