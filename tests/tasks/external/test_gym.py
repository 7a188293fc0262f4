"""Families gym:ID: ranges, attributes and paths, horizons, and what is refused."""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from typing import Any

import cloudpickle
import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete

from external_environments import PENDULUM, Toy, assert_refused, draw, play
from ssm_metarl.tasks import make
from ssm_metarl.tasks.external.gym import GymFamily
from ssm_metarl.tasks.external.names import from_name


class TestGymTasks:
    def test_numbers_are_drawn_from_the_ranges(self) -> None:
        family = from_name("gym:Pendulum-v1", PENDULUM)
        assert (family.name, family.horizon, family.enumerable) == ("gym:Pendulum-v1", 200, False)
        assert family.splits == ("train", "validation", "test")
        tasks = draw(family, 2000)
        assert json.loads(json.dumps(tasks)) == tasks
        for key, (low, high) in PENDULUM.items():
            values = np.array([task[key] for task in tasks])
            assert low <= values.min() < low + 0.01 * (high - low)
            assert high - 0.01 * (high - low) < values.max() <= high
        assert draw(from_name("gym:Pendulum-v1", dict(reversed(PENDULUM.items()))), 9) == draw(family, 9)
        assert family.sample(3, np.random.default_rng(0), "test") == draw(family, 3)
        with pytest.raises(ValueError, match="no split 'shifted'"):
            family.sample(1, np.random.default_rng(0), "shifted")

    def test_without_ranges_there_is_one_task(self) -> None:
        family = from_name("gym:CartPole-v1")
        assert family.enumerable
        assert draw(family, 2) == [{}, {}]
        assert from_name("gym:CartPole-v1", {"length": [0.5, 0.5]}).enumerable

    def test_pendulum_is_gymnasiums_with_the_tasks_numbers(self) -> None:
        """An argument of the constructor and an attribute, through several episodes, set by hand here."""
        family = from_name("gym:Pendulum-v1", PENDULUM, 20)
        tasks = draw(family, 3)
        played = play(family, tasks, steps=50)
        for number, task in enumerate(tasks):
            env = gymnasium.make("Pendulum-v1", g=task["g"], max_episode_steps=20)
            env.unwrapped.l = task["l"]  # type: ignore[attr-defined]
            observation, _ = env.reset(seed=number)
            generator = np.random.default_rng(number)
            for step in range(50):
                np.testing.assert_array_equal(played[step, number, :3], observation)
                action = generator.normal(0, 2, 1).astype(np.float32).clip(-2, 2)
                observation, reward, _, truncated, _ = env.step(action)
                assert played[step + 1, number, 3] == np.float32(reward)
                assert played[step + 1, number, 5] == truncated
                if truncated:
                    observation, _ = env.reset()

    def test_what_the_constructor_derives_is_right(self) -> None:
        """Gymnasium's cartpole computes mass and moment once: the dynamics must be those of the native family."""
        names = ("gravity", "masscart", "masspole", "length", "force_mag")
        native = make("cartpole")
        tasks = [{**task, "direction": 1} for task in draw(native, 4)]
        family = from_name("gym:CartPole-v1", {name: [0.01, 20] for name in names})
        adapted = play(family, [{name: task[name] for name in names} for task in tasks], steps=60)
        np.testing.assert_allclose(adapted, play(native, tasks, steps=60), rtol=1e-5, atol=1e-6)
        env = family._policy_env(dict.fromkeys(names, 2.0)).unwrapped  # type: ignore[attr-defined]
        assert (env.total_mass, env.polemass_length) == (4.0, 4.0)
        own = type(gymnasium.make("CartPole-v1").unwrapped)
        assert isinstance(env, own)
        assert (type(env).__module__, type(env).__qualname__) == (own.__module__, own.__qualname__)
        env.masscart = 5.0
        assert env.masscart == 5.0, "replaced while the constructor runs, and not afterwards"

    def test_attributes_are_what_the_dynamics_see_after_every_reset(self) -> None:
        """Here a constant of the class."""
        family = from_name("gym:Acrobot-v1", {"LINK_LENGTH_1": [0.5, 1.5]})
        short, long = play(family, [{"LINK_LENGTH_1": 0.5}, {"LINK_LENGTH_1": 1.5}], seeds=[0, 0]).swapaxes(0, 1)
        np.testing.assert_array_equal(short[0], long[0])
        assert not np.allclose(short[-1], long[-1])

    def test_paths_reach_into_objects_and_arrays(self, toy: Callable[..., GymFamily], monkeypatch: Any) -> None:
        class Nested(Toy):
            def __init__(self) -> None:
                super().__init__(Box(-9, 9, (1,)), Discrete(2))
                self.model = types.SimpleNamespace(gravity=np.array([0.0, -9.8]), fuel=1.0, name="x")

            def step(self, action: Any) -> Any:
                self.model.fuel -= 0.25
                reward = self.model.gravity[1] + self.model.fuel
                return np.zeros(1, np.float32), reward, self.model.fuel <= 0, False, {}

        toy(Box(0, 1, (1,)))  # restores the registry
        gymnasium.register("Nested-v0", Nested, max_episode_steps=9)
        family = from_name("gym:Nested-v0", {"model.gravity.1": [-3, -2], "model.fuel": [0.5, 1]})
        task = {"model.gravity.1": -2.5, "model.fuel": 0.5}
        assert play(family, [task], steps=4)[1:, 0, 1].tolist() == [-2.25, -2.5, -2.25, -2.5]
        assert play(family, [task | {"model.fuel": 1.0}], steps=4)[1:, 0, 1].tolist() == [-1.75, -2.0, -2.25, -2.5]
        assert_refused(r"attribute 'gravty', did you mean 'gravity'", "gym:Nested-v0", {"model.gravty.1": [0, 1]})
        assert_refused(r"attribute '2' \(valid: 0, 1\)", "gym:Nested-v0", {"model.gravity.2": [0, 1]})
        assert_refused("no numeric Nested-v0.model attribute 'name'", "gym:Nested-v0", {"model.name": [0, 1]})

    def test_an_entry_point_may_be_a_function_and_travels(self, toy: Callable[..., GymFamily]) -> None:
        toy(Box(0, 1, (1,)))  # restores the registry
        pendulum = type(gymnasium.make("Pendulum-v1").unwrapped)
        gymnasium.register("Made-v0", lambda: pendulum(), max_episode_steps=9)
        family = from_name("gym:Made-v0", {"l": [0.5, 1.5]})
        task = {"l": 0.75}
        expected = play(from_name("gym:Pendulum-v1", {"l": [0.5, 1.5]}, 9), [task])
        np.testing.assert_array_equal(play(family, [task]), expected)
        np.testing.assert_array_equal(play(cloudpickle.loads(cloudpickle.dumps(family)), [task]), expected)

    @pytest.mark.parametrize(
        ("env_id", "ranges", "match"),
        [
            ("Pendulm-v1", {}, "gym:Pendulm-v1 cannot be made: .*Did you mean: `Pendulum`"),
            ("CartPole-v9", {}, "provides versioned environments"),
            ("", {}, "Malformed environment ID"),
            ("no_such_module:X-v0", {}, "no module 'no_such_module'"),
            ("CartPole-v1", {"lenght": [1, 2]}, "attribute 'lenght', did you mean 'length'.*gravity"),
            ("Pendulum-v1", {"gg": [1, 2]}, r"attribute 'gg', did you mean 'g'"),
            ("CartPole-v1", {"state": [1, 2]}, "no numeric CartPole-v1 attribute 'state'"),
            ("CartPole-v1", {"sutton_barto_reward": [0, 1]}, "no numeric CartPole-v1 attribute"),
            ("CartPole-v1", {"length": [2, 1]}, r"range of 'length' must be \[low, high\].*not \[2, 1\]"),
            ("CartPole-v1", {"length": [1]}, "range of 'length'"),
            ("CartPole-v1", {"length": 1}, "range of 'length'"),
            ("CartPole-v1", {"length": "12"}, "range of 'length'"),
            ("CartPole-v1", {"length": [0, float("inf")]}, "range of 'length'"),
            ("CartPole-v1", {"length": [float("nan"), 1]}, "range of 'length'"),
            ("CartPole-v1", {"length": [False, True]}, "range of 'length'"),
            ("CartPole-v1", [["length", 1, 2]], "ranges must be"),
            ("Blackjack-v1", {}, "gym:Blackjack-v1 has no time limit of its own"),
        ],
    )
    def test_what_is_refused(self, env_id: str, ranges: Any, match: str) -> None:
        assert_refused(match, f"gym:{env_id}", ranges)

    def test_impossible_batches_and_tasks(self) -> None:
        family = from_name("gym:Pendulum-v1", PENDULUM)
        good = {"g": 9, "l": 1.0}
        for tasks, num_episodes in (([], 1), ([good], 0)):
            with pytest.raises(ValueError, match="one task and one slot"):
                family.make_vector_env(tasks, num_episodes)
        for wrong, match in (
            ({"g": 9}, "Task 1 lacks the parameter 'l'"),
            (good | {"m": 1}, "no parameter 'm'"),
            (good | {"g": float("nan")}, "Task 1: 'g' must be a number"),
            (good | {"g": "9"}, "Task 1: 'g' must be a number"),
        ):
            with pytest.raises(ValueError, match=match):
                family.make_vector_env([good, wrong], 1)


class TestArguments:
    """`--task-options` of `gym:ID` are the constructor's arguments."""

    def test_they_are_passed_to_every_environment(self) -> None:
        family: Any = make("gym:FrozenLake-v1", {"map_name": "8x8", "is_slippery": False, "horizon": 7})
        assert (family.observation_space.shape, family.horizon) == ((64,), 7)
        other = cloudpickle.loads(cloudpickle.dumps(family))
        envs = other.make_vector_env([{}], 2)
        assert [env.unwrapped.desc.shape for env in envs.envs] == [(8, 8)] * 2
        np.testing.assert_array_equal(play(family, [{}]), play(other, [{}]))

    def test_beside_ranges(self) -> None:
        family = make("gym:FrozenLake-v1", {"is_slippery": False}, {"success_rate": [0.2, 0.4]})
        (task,) = draw(family, 1)
        assert 0.2 < task["success_rate"] < 0.4
        with pytest.raises(ValueError, match="'g' has a range and a value: give one of them"):
            make("gym:Pendulum-v1", {"g": 9.0}, {"g": [8, 12]})

    def test_what_environments_get_is_a_copy(self, toy: Callable[..., GymFamily]) -> None:
        class Changing(Toy):
            def __init__(self, sizes: Any) -> None:
                super().__init__(Box(0, 1, (sizes.pop(),)), Discrete(2))

        toy(Box(0, 1, (1,)))  # restores the registry
        gymnasium.register("Changing-v0", Changing, max_episode_steps=9)
        family = make("gym:Changing-v0", {"sizes": [1, 2, 3]})
        assert family.observation_space.shape == (3,)
        family.make_vector_env([{}], 3).close()

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"is_sliperry": True}, "no option of 'gym:FrozenLake-v1' 'is_sliperry', did you mean 'is_slippery'"),
            ({"horizn": 3}, "did you mean 'horizon'"),
            ({"map_name": "9x9"}, "gym:FrozenLake-v1 cannot be made: KeyError: '9x9'"),
            ({"max_episode_steps": 3}, "no option of 'gym:FrozenLake-v1' 'max_episode_steps'"),
        ],
    )
    def test_what_is_refused(self, options: Any, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            make("gym:FrozenLake-v1", options)


class TestHorizon:
    def test_an_environment_without_one_needs_one(self, toy: Callable[..., GymFamily]) -> None:
        with pytest.raises(ValueError, match="has no time limit of its own: give a horizon"):
            toy(Box(0, 1, (2,)), limit=None)
        env_id = list(gymnasium.registry)[-1]
        assert from_name(f"gym:{env_id}", {}, 7).horizon == 7

    @pytest.mark.parametrize("attribute", ["horizon", "max_episode_length"])
    def test_an_attribute_can_be_the_limit(
        self, toy: Callable[..., GymFamily], attribute: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Toy, attribute, 5, raising=False)
        assert toy(Box(0, 1, (2,)), limit=None).horizon == 5

    @pytest.mark.parametrize("wrong", [0, -1, 2.5, True, "9"])
    def test_must_be_a_number_of_steps(self, wrong: Any) -> None:
        assert_refused("the horizon must be an integer of 1 or more, not ", "gym:Pendulum-v1", {}, wrong)

    @pytest.mark.parametrize("horizon", [3, 300])
    def test_cuts_episodes(self, horizon: int) -> None:
        """It replaces the registered limit, is no end of the task, and the last observation comes along."""
        family = from_name("gym:Pendulum-v1", {}, horizon)
        envs = family.make_vector_env([{}], 2)
        envs.reset(seed=[0, 1])  # type: ignore[arg-type]
        for step in range(1, horizon + 2):
            observations, _, terminated, truncated, infos = envs.step(np.zeros((2, 1), np.float32))
            assert not terminated.any()
            assert truncated.tolist() == [step == horizon] * 2
            if step == horizon:
                assert infos["_final_obs"].tolist() == [True, True]
                assert infos["final_obs"][0].dtype == np.float32
                assert not np.allclose(infos["final_obs"][0], observations[0])
