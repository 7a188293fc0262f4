"""What every native family keeps to: splits, tasks, seeds, episode slots, and wrong calls."""

from __future__ import annotations

import json
from typing import Any

import cloudpickle
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from ssm_metarl.tasks import TaskDistribution, make

FAMILIES = ("cartpole", "navigation-2d")
WRONG_NUMBERS: list[Any] = [np.nan, np.inf, -np.inf, -1e9, 1e9, "1", None, True, [0.1], [[1], [1, 2]]]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> TaskDistribution:
    return make(request.param)


def actions_for(family: TaskDistribution, num_envs: int, rng: np.random.Generator) -> NDArray[Any]:
    """Actions that a policy could send: unclipped normals [N, A] float32, or [N] int64."""
    if isinstance(family.action_space, Discrete):
        return rng.integers(0, int(family.action_space.n), num_envs)
    assert isinstance(family.action_space, Box)
    return rng.normal(0.0, 0.1, (num_envs, *family.action_space.shape)).astype(np.float32)


class TestFamilies:
    def test_has_the_standard_splits(self, family: TaskDistribution) -> None:
        assert family.splits == ("train", "validation", "test", "shifted", "shifted-test")
        assert not family.enumerable

    def test_tasks_are_json_and_depend_on_the_generator_only(self, family: TaskDistribution) -> None:
        for split in family.splits:
            tasks = family.sample(7, np.random.default_rng(3), split)
            assert len(tasks) == 7
            assert json.loads(json.dumps(tasks)) == tasks
            assert family.sample(7, np.random.default_rng(3), split) == tasks
            assert family.sample(7, np.random.default_rng(4), split) != tasks
        assert family.sample(0, np.random.default_rng(0)) == []

    def test_train_validation_and_test_are_one_distribution(self, family: TaskDistribution) -> None:
        train, validation, test = (family.sample(5, np.random.default_rng(0), s) for s in family.splits[:3])
        assert train == validation == test == family.sample(5, np.random.default_rng(0))

    def test_unknown_split_lists_the_valid(self, family: TaskDistribution) -> None:
        with pytest.raises(ValueError, match="'shifted_test', did you mean 'shifted-test'") as error:
            family.sample(1, np.random.default_rng(0), "shifted_test")
        assert all(split in str(error.value) for split in family.splits)

    def test_travels_to_workers(self, family: TaskDistribution) -> None:
        copy = cloudpickle.loads(cloudpickle.dumps(family))
        rng = np.random.default_rng(0)
        assert copy.sample(3, rng) == family.sample(3, np.random.default_rng(0))
        assert copy.reference == family.reference

    def test_vector_conventions(self, family: TaskDistribution) -> None:
        rng = np.random.default_rng(0)
        envs = family.make_vector_env(family.sample(3, rng), num_episodes=2)
        assert isinstance(family.observation_space, Box)
        assert envs.num_envs == 6
        assert envs.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
        assert envs.single_observation_space == family.observation_space
        assert envs.single_action_space == family.action_space
        assert envs.observation_space.shape == (6, *family.observation_space.shape)
        observations, infos = envs.reset(seed=0)
        assert infos == {}
        for _ in range(30):
            assert observations in envs.observation_space
            assert observations.dtype == np.float32
            assert observations.flags.c_contiguous
            observations, rewards, terminated, truncated, infos = envs.step(actions_for(family, 6, rng))
            assert rewards.dtype == np.float32
            assert rewards.shape == (6,)
            assert terminated.dtype == truncated.dtype == np.bool_
            assert terminated.shape == truncated.shape == (6,)
            assert bool(infos) == bool((terminated | truncated).any())
        envs.step(envs.action_space.sample())
        envs.close()

    def test_returned_arrays_are_the_callers(self, family: TaskDistribution) -> None:
        """A caller that keeps or overwrites what it was given changes nothing, also where episodes end."""
        tasks = family.sample(4, np.random.default_rng(0))
        steps = family.horizon + 5

        def play(scribble: bool) -> list[NDArray[np.float32]]:
            rng = np.random.default_rng(1)
            envs = family.make_vector_env(tasks, num_episodes=2)
            seen = [envs.reset(seed=5)[0]]
            for _ in range(steps):
                *arrays, infos = envs.step(actions_for(family, 8, rng))
                seen.append(arrays[0].copy())
                if scribble:
                    for array in (*arrays, *(row for row in infos.get("final_obs", ()) if row is not None)):
                        array.fill(1)
            return seen

        np.testing.assert_array_equal(play(scribble=False), play(scribble=True))

    def test_slots_do_not_touch_each_other(self, family: TaskDistribution) -> None:
        """Tasks together, apart or in another company: the same bits, over several episodes."""
        rng = np.random.default_rng(0)
        tasks, num_episodes, steps = family.sample(7, rng), 3, 150
        seeds = rng.integers(2**63, size=(7, num_episodes))
        actions = np.stack([actions_for(family, 7 * num_episodes, rng) for _ in range(steps)])
        actions = actions.reshape(steps, 7, num_episodes, *actions.shape[2:])

        def play(chosen: list[int]) -> NDArray[np.float32]:
            envs: Any = family.make_vector_env([tasks[m] for m in chosen], num_episodes)
            seen = [envs.reset(seed=seeds[chosen].ravel().tolist())[0]]
            rewards = []
            for step in actions[:, chosen].reshape(steps, len(chosen) * num_episodes, *actions.shape[3:]):
                observations, reward, *_ = envs.step(step)
                seen.append(observations)
                rewards.append(reward)
            outcome = np.concatenate([np.stack(seen[1:]), np.stack(rewards)[..., None]], axis=-1)
            return outcome.reshape(steps, len(chosen), num_episodes, -1)

        together = play(list(range(7)))
        for chosen in ([0], [6], [2, 5], [6, 0, 3]):
            np.testing.assert_array_equal(play(chosen), together[:, chosen])

    def test_same_seed_same_experience(self, family: TaskDistribution) -> None:
        tasks = family.sample(2, np.random.default_rng(0))
        envs = family.make_vector_env(tasks, num_episodes=4)

        def play(seed: Any) -> NDArray[np.float32]:
            rng = np.random.default_rng(1)
            observations = [envs.reset(seed=seed)[0]]
            observations += [envs.step(actions_for(family, 8, rng))[0] for _ in range(120)]
            return np.stack(observations)

        first = play(11)
        np.testing.assert_array_equal(first, play(11))
        np.testing.assert_array_equal(first, play(list(range(11, 19))))
        np.testing.assert_array_equal(first, play(np.arange(11, 19)))

    def test_impossible_batches(self, family: TaskDistribution) -> None:
        tasks = family.sample(2, np.random.default_rng(0))
        with pytest.raises(ValueError, match="one task and one slot"):
            family.make_vector_env([], 2)
        with pytest.raises(ValueError, match="one task and one slot"):
            family.make_vector_env(tasks, 0)

    def test_impossible_tasks_are_named(self, family: TaskDistribution) -> None:
        good = family.sample(1, np.random.default_rng(0))[0]
        for key, value in good.items():

            def raises(task: dict[str, Any], match: str) -> None:
                with pytest.raises(ValueError, match=match) as error:
                    family.make_vector_env([good, task], 1)
                assert "\n" not in str(error.value)

            def like(number: Any, value: Any = value) -> Any:
                return [number, 0.0] if isinstance(value, list) else number

            raises({k: v for k, v in good.items() if k != key}, f"Task 1 lacks the parameter '{key}'")
            raises(good | {key[:-1]: value}, f"Task 1: .*'{key[:-1]}', did you mean '{key}'")
            for wrong in WRONG_NUMBERS:
                raises(good | {key: like(wrong)}, f"Task 1: '{key}' must be ")
            raises(good | {key: {}}, f"Task 1: '{key}' must be ")

    def test_wrong_calls(self, family: TaskDistribution) -> None:
        envs: Any = family.make_vector_env(family.sample(2, np.random.default_rng(0)), num_episodes=2)
        actions = actions_for(family, 4, np.random.default_rng(0))
        with pytest.raises(ResetNeeded):
            envs.step(actions)
        with pytest.raises(ValueError, match="4 environments need 4 seeds, not 3"):
            envs.reset(seed=[1, 2, 3])
        with pytest.raises(ValueError, match="0 or more"):
            envs.reset(seed=[1, 2, -3, 4])
        with pytest.raises(ValueError, match="no reset options, not low"):
            envs.reset(seed=0, options={"low": 0})
        envs.reset(seed=0, options={})
        with pytest.raises(ValueError, match="must have the shape"):
            envs.step(actions[:3])
        with pytest.raises(ValueError, match="must have the shape"):
            envs.step(actions[:, None])
