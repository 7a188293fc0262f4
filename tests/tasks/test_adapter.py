"""Existing environments as families: spaces, tasks and ends, what is kept between batches, and what is refused."""

from __future__ import annotations

import itertools
import json
import sys
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import cloudpickle
import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Space
from gymnasium.vector import AutoresetMode

from builders import assert_same, make_policy
from ssm_metarl.algorithms.collect import collect_tasks
from ssm_metarl.algorithms.rollouts import Rollouts
from ssm_metarl.algorithms.spec import PolicySpec
from ssm_metarl.seeds import seed_for
from ssm_metarl.tasks import TaskDistribution, adapter, make
from ssm_metarl.tasks.external.gym import GymFamily
from ssm_metarl.tasks.external.names import from_name
from ssm_metarl.tasks.external.own import TaskFamily

PENDULUM: Mapping[str, Any] = {"g": [8, 12], "l": [0.5, 1.5]}
LINE = '''
import gymnasium, numpy as np
from gymnasium.spaces import Box

class Line(gymnasium.Env):
    """A point on a line; a task is {"goal": [g], "name": "left" or "right"}."""

    horizon = 12
    observation_space = Box(-np.inf, np.inf, (1,), np.float64)
    action_space = Box(-0.5, 0.5, (1,), np.float64)

    def sample_tasks(self, n):
        goals = self.np_random.normal(size=(n, 1))
        return [{"goal": goal, "name": "left" if goal[0] < 0 else "right"} for goal in goals]

    def set_task(self, task):
        self.goal = np.array(task["goal"])
        task.clear()  # only a copy

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = self.np_random.normal(size=1)
        return self.position, {"goal": getattr(self, "goal", None)}

    def step(self, action):
        assert action in self.action_space
        self.position += action
        distance = float(abs(self.position - self.goal)[0])
        return self.position, -distance, distance < 0.1, False, {"distance": distance}
'''


# --- What the tests play with -----------------------------------------------------------------------------


class Toy(gymnasium.Env[Any, Any]):
    """Observes samples of a space and is rewarded by its action; both spaces are constructor arguments."""

    def __init__(self, observation_space: Space[Any], action_space: Space[Any]) -> None:
        self.observation_space = observation_space
        self.action_space = action_space
        self.actions: list[Any] = []

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Any:
        assert action in self.action_space
        self.actions.append(action)
        return self.observation_space.sample(), float(np.sum(action)), False, False, {}


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., GymFamily]]:
    """Registers toy environments of given spaces, and makes families of them."""
    before = dict(gymnasium.registry)

    def family(observation_space: Space[Any], action_space: Space[Any] | None = None, limit: int | None = 9) -> Any:
        spaces = {"observation_space": observation_space, "action_space": action_space or Discrete(2)}
        env_id = f"Toy{len(gymnasium.registry)}-v0"
        gymnasium.register(env_id, Toy, max_episode_steps=limit, kwargs=spaces)
        return from_name(f"gym:{env_id}")

    yield family
    gymnasium.registry.clear()
    gymnasium.registry.update(before)


_COUNTER = itertools.count()


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a module that can be imported, and returns its name."""

    def write(source: str) -> str:
        name = f"adapted_module_{next(_COUNTER)}"
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        monkeypatch.syspath_prepend(tmp_path)
        return name

    return write


def play(
    family: TaskDistribution,
    tasks: list[Any],
    columns: int = 1,
    steps: int = 30,
    seeds: list[int] | None = None,
    close: bool = True,
) -> Any:
    """All observations, rewards and ends [steps, tasks * columns, ...] for actions that a column's seed decides."""
    envs = family.make_vector_env(tasks, columns)
    seeds = seeds or list(range(envs.num_envs))
    generators = [np.random.default_rng(seed) for seed in seeds]
    space = family.action_space
    seen = [np.pad(envs.reset(seed=seeds)[0], ((0, 0), (0, 3)))]  # type: ignore[arg-type]
    for _ in range(steps):
        if isinstance(space, Discrete):
            actions = np.array([generator.integers(int(space.n)) for generator in generators])
        else:
            assert space.shape is not None
            actions = np.array([generator.normal(0, 2, space.shape) for generator in generators], np.float32)
        observations, *outcome, _ = envs.step(actions)
        seen.append(np.column_stack([observations, *outcome]))
    if close:
        envs.close()
    return np.stack(seen)


def small_policy(family: TaskDistribution) -> tuple[PolicySpec, dict[str, Any]]:
    observation, action = family.observation_space, family.action_space
    assert observation.shape is not None
    discrete = isinstance(action, Discrete)
    size = int(action.n) if isinstance(action, Discrete) else action.shape[0]  # type: ignore[index]
    spec = PolicySpec(observation.shape[0], size, discrete, hidden_dim=6, state_dim=4)
    return spec, make_policy(spec).numpy_weights()


def rollouts(family: TaskDistribution, tasks: list[Any], first: int = 0, columns: int = 2) -> Rollouts:
    spec, weights = small_policy(family)
    nodes = [seed_for(0, first + number) for number in range(len(tasks))]
    return collect_tasks(family.make_vector_env, spec, weights, nodes, tasks, columns, family.horizon)


def draw(family: TaskDistribution, n: int, seed: int = 0) -> list[Any]:
    return family.sample(n, np.random.default_rng(seed))


def assert_refused(match: str, *arguments: Any) -> None:
    """``from_name`` raises a ValueError of one line."""
    with pytest.raises(ValueError, match=match) as error:
        from_name(*arguments)
    assert "\n" not in str(error.value)


# --- gym:<environment id> ---------------------------------------------------------------------------------


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
        env = family._column(dict.fromkeys(names, 2.0)).unwrapped  # type: ignore[attr-defined]
        assert (env.total_mass, env.polemass_length) == (4.0, 4.0)
        assert type(env) is type(gymnasium.make("CartPole-v1").unwrapped)

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
            ("Blackjack-v1", {}, "gym:Blackjack-v1: observations must be a Box, Discrete or MultiDiscrete, not Tuple"),
        ],
    )
    def test_what_is_refused(self, env_id: str, ranges: Any, match: str) -> None:
        assert_refused(match, f"gym:{env_id}", ranges)

    def test_impossible_batches_and_tasks(self) -> None:
        family = from_name("gym:Pendulum-v1", PENDULUM)
        good = {"g": 9, "l": 1.0}
        for tasks, columns in (([], 1), ([good], 0)):
            with pytest.raises(ValueError, match="one task and one column"):
                family.make_vector_env(tasks, columns)
        for wrong, match in (
            ({"g": 9}, "Task 1 lacks the parameter 'l'"),
            (good | {"m": 1}, "no parameter 'm'"),
            (good | {"g": float("nan")}, "Task 1: 'g' must be a number"),
            (good | {"g": "9"}, "Task 1: 'g' must be a number"),
        ):
            with pytest.raises(ValueError, match=match):
                family.make_vector_env([good, wrong], 1)


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
        assert_refused("the horizon must be a whole number of steps", "gym:Pendulum-v1", {}, wrong)

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


class TestSpaces:
    def conventions(self, family: TaskDistribution, steps: int = 30) -> Any:
        envs = family.make_vector_env(draw(family, 2), 2)
        assert envs.num_envs == 4
        assert envs.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
        assert envs.single_observation_space == family.observation_space
        assert envs.single_action_space == family.action_space
        envs.action_space.seed(0)
        observations, infos = envs.reset(seed=[0, 1, 2, 3])  # type: ignore[arg-type]
        assert infos == {}
        for _ in range(steps):
            assert observations.dtype == np.float32
            assert observations.shape == (4, *family.observation_space.shape)  # type: ignore[misc]
            assert observations in envs.observation_space
            observations, rewards, terminated, truncated, infos = envs.step(envs.action_space.sample())
            assert (rewards.dtype, rewards.shape) == (np.float32, (4,))
            assert terminated.dtype == truncated.dtype == np.bool_
            assert bool(infos) == bool((terminated | truncated).any())
        return envs

    @pytest.mark.parametrize(
        ("env_id", "size"),
        [("Pendulum-v1", 3), ("CartPole-v1", 4), ("FrozenLake-v1", 16), ("Taxi-v3", 500), ("CliffWalking-v1", 48)],
    )
    def test_gymnasiums_own(self, env_id: str, size: int) -> None:
        family = from_name(f"gym:{env_id}", {}, 25)
        assert family.observation_space.shape == (size,)
        self.conventions(family).close()

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
        self.conventions(family)
        column = family._column({})
        np.testing.assert_array_equal(column._vector(np.array([3, 0, -2])), [0, 0, 1, 1, 0, 1, 0, 0, 0])
        family = toy(Discrete(3, start=5), Discrete(4, start=-1))
        assert (family.observation_space.shape, family.action_space) == ((3,), Discrete(4))
        self.conventions(family)
        column = family._column({})
        np.testing.assert_array_equal(column._vector(6), [0, 1, 0])
        assert [column._action(np.int64(action)) for action in range(4)] == [-1, 0, 1, 2]

    def test_boxes_become_vectors(self, toy: Callable[..., GymFamily]) -> None:
        for space, size in (
            (Box(-1, 1, (2, 3), np.float64), 6),
            (Box(0, 255, (), np.uint8), 1),
            (Box(0, 1, (2000,)), 2000),
        ):
            family = toy(space)
            assert family.observation_space.shape == (size,)
            assert family.observation_space.dtype == np.float32
            self.conventions(family, steps=12)
        unbounded = toy(Box(-1e308, np.finfo(np.float64).max, (2,), np.float64)).observation_space
        assert unbounded == Box(-np.inf, np.inf, (2,), np.float32)

    @pytest.mark.parametrize(
        ("space", "match"),
        [
            (Box(0, 255, (64, 64, 3), np.uint8), r"shape \(64, 64, 3\) are too large"),
            (Dict({"a": Discrete(2)}), "must be a Box, Discrete or MultiDiscrete, not Dict"),
            (MultiBinary(3), "not MultiBinary"),
            (Discrete(10**6), "1000000 values are too many for one-hot"),
            (MultiDiscrete([1000, 1000]), "2000 values are too many"),
        ],
    )
    def test_other_observations_are_refused(self, toy: Callable[..., GymFamily], space: Any, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            toy(space)

    @pytest.mark.parametrize(
        "space", [MultiDiscrete([2, 2]), Box(0, 1, (2, 2)), Box(0, 9, (2,), np.int64), MultiBinary(2), Box(0, 1, ())]
    )
    def test_other_actions_are_refused(self, toy: Callable[..., GymFamily], space: Any) -> None:
        with pytest.raises(ValueError, match="actions must be Discrete or a Box of real numbers with one axis, not"):
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


# --- module:attribute -------------------------------------------------------------------------------------


class TestTaskFamily:
    def test_tasks_are_the_environments_own(self, module: Callable[[str], str]) -> None:
        name = f"{module(LINE)}:Line"
        family = from_name(name)
        assert isinstance(family, TaskFamily)
        assert (family.name, family.horizon, from_name(name, {}, 5).horizon) == (name, 12, 5)
        tasks = draw(family, 4)
        assert json.loads(json.dumps(tasks)) == tasks
        assert draw(family, 4) == tasks == family.sample(4, np.random.default_rng(0), "validation")
        assert draw(family, 4, seed=1) != tasks
        assert draw(family, 0) == []
        TestSpaces().conventions(family).close()
        with pytest.raises(ValueError, match="no split 'tset', did you mean 'test'"):
            family.sample(1, np.random.default_rng(0), "tset")
        for wrong in (([], 1), (tasks, 0)):
            with pytest.raises(ValueError, match="one task and one column"):
                family.make_vector_env(*wrong)

    def test_a_task_is_applied_to_its_columns_at_every_reset(self, module: Callable[[str], str]) -> None:
        family = from_name(f"{module(LINE)}:Line")
        tasks: list[Any] = [{"goal": [3.0], "name": "right"}, {"goal": [-3.0], "name": "left"}]
        played = play(family, tasks, columns=2, steps=40)
        ends = played[:, :, 2:].any(-1)
        assert ends.sum(0).min() >= 3
        goals = np.array([3.0, 3.0, -3.0, -3.0])
        distance = abs(played[1:, :, 0] - goals)
        np.testing.assert_allclose(-played[1:, :, 1][~ends[1:]], distance[~ends[1:]], rtol=1e-5)
        assert tasks[0] == {"goal": [3.0], "name": "right"}

    def test_the_example_of_the_docs(self, module: Callable[[str], str]) -> None:
        docs = Path(__file__).parents[2] / "docs" / "own-environments.md"
        (source,) = (block for block in docs.read_text().split("```") if "class MyEnv" in block)
        family = from_name(f"{module(source.removeprefix('python'))}:MyEnv")
        assert family.horizon == 50
        record = rollouts(family, draw(family, 3))
        assert not record.errors
        assert record.valid.all()

    @pytest.mark.parametrize("argument", ["rng", "seed"])
    def test_sampling_may_take_its_chance_as_an_argument(self, module: Callable[[str], str], argument: str) -> None:
        source = LINE.replace("(self, n)", f"(self, n, {argument}=None)")
        source = source.replace("self.np_random.normal(size=(n", f"np.random.default_rng({argument}).normal(size=(n")
        family = from_name(f"{module(source)}:Line")
        assert draw(family, 3) == draw(family, 3) != draw(family, 3, seed=1)
        rng = np.random.default_rng(0)
        assert family.sample(3, rng) != family.sample(3, rng)

    def test_global_generators_are_left_alone(self, module: Callable[[str], str]) -> None:
        np.random.seed(3)  # noqa: NPY002
        before = np.random.get_state()[1].tolist()  # type: ignore[index] # noqa: NPY002
        name = module(LINE)
        play(from_name(f"{name}:Line"), draw(from_name(f"{name}:Line"), 2))
        assert np.random.get_state()[1].tolist() == before  # type: ignore[index] # noqa: NPY002
        source = LINE.replace("self.np_random.normal(size=(n", "np.random.normal(size=(n")
        assert_refused("gives other tasks for the same seed", f"{module(source)}:Line")

    def test_a_factory_may_wrap_it(self, module: Callable[[str], str]) -> None:
        source = LINE.replace("    horizon = 12\n", "") + (
            "\ndef limited():\n"
            "    if 'Limited-v0' not in gymnasium.registry:\n"
            "        gymnasium.register('Limited-v0', Line, max_episode_steps=6)\n"
            "    return gymnasium.make('Limited-v0')\n"
        )
        family = from_name(f"{module(source)}:limited")
        gymnasium.registry.pop("Limited-v0")
        assert family.horizon == 6

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (("Line(", "Lime("), "no attribute of adapted_module_.* 'Line', did you mean 'Lime'"),
            (("sample_tasks", "draw_tasks"), "has no sample_tasks, which tasks need"),
            (("gymnasium.Env)", "object)"), "must make a gymnasium.Env, not Line"),
            (("    horizon = 12", "    horizon = 0"), "the horizon must be a whole number of steps"),
            (("    horizon = 12", ""), "has no time limit of its own"),
            (("    horizon = 12", "    def __init__(self, size): pass"), "cannot be made: TypeError: .*'size'"),
            (
                ("    horizon = 12", "    def __init__(self): raise OSError('no\\nlicence')"),
                "made: OSError: no licence",
            ),
            (("(1,), np.float64", "(1, 1), np.float64"), "actions must be Discrete or"),
            (("import gymnasium,", "import no_such_simulator,"), "cannot be imported: ModuleNotFoundError: No module"),
            (("class Line", "class class"), "cannot be imported: SyntaxError"),
            (('"goal": goal', '"goal": self'), "cannot draw tasks: a task must be JSON values"),
            (("size=(n, 1)", "size=(n + 1, 1)"), "cannot draw tasks: sample_tasks returned 4 tasks, not 3"),
            (("goals = self", "goals = this"), "cannot draw tasks: NameError"),
        ],
    )
    def test_what_is_refused(self, module: Callable[[str], str], change: tuple[str, str], match: str) -> None:
        assert change[0] in LINE
        assert_refused(match, f"{module(LINE.replace(*change))}:Line")

    def test_names_of_nothing(self, module: Callable[[str], str]) -> None:
        for wrong in ("", "windy", "a:b:c", ":x", "x:", "a b:c", "1:2", "../x:y"):
            assert_refused("gym:<environment id> or module:attribute, not", wrong)
        assert_refused("There is no module 'no_such_module', neither installed nor in", "no_such_module:X")
        assert_refused("must be a class or a function without arguments, not 3.14", "math:pi")
        assert_refused("must make a gymnasium.Env, not str", "os:getcwd")
        name = f"{module(LINE)}:Line"
        assert_refused("Ranges are for gym: environments", name, {"goal": [0, 1]})

    def test_the_current_directory_is_searched(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Also by a family that is unpickled elsewhere, which has to import the module anew."""
        monkeypatch.setattr(sys, "path", [*sys.path])
        (tmp_path / "adapted_here.py").write_text(LINE)
        monkeypatch.chdir(tmp_path)
        family = from_name("adapted_here:Line")
        assert str(tmp_path) in sys.path
        expected = play(family, draw(family, 2))
        sent = cloudpickle.dumps(family)
        monkeypatch.chdir("/")
        monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(tmp_path)])
        monkeypatch.delitem(sys.modules, "adapted_here")
        arrived = cloudpickle.loads(sent)
        assert "adapted_here" not in sys.modules
        np.testing.assert_array_equal(play(arrived, draw(arrived, 2)), expected)

    @pytest.mark.parametrize("attribute", ["Family", "family", "Family.make"])
    def test_a_family_is_used_as_it_is(self, module: Callable[[str], str], attribute: str) -> None:
        source = """
            from ssm_metarl.tasks.navigation import Navigation2D
            class Family(Navigation2D):
                name = "mine"
                @classmethod
                def make(cls):
                    return cls()
            family = Family()
        """
        name = f"{module(source)}:{attribute}"
        family = from_name(name)
        assert (type(family).__name__, family.name) == ("Family", "mine")
        assert_refused("has a horizon of its own, 100 steps", name, {}, 50)


# --- What is kept between batches -------------------------------------------------------------------------


@pytest.fixture(params=["gym:Pendulum-v1", "gym:CartPole-v1", "gym:FrozenLake-v1", "Line"])
def family(request: pytest.FixtureRequest, module: Callable[[str], str]) -> TaskDistribution:
    ranges = {"gym:Pendulum-v1": PENDULUM, "gym:CartPole-v1": {"length": [0.3, 1], "gravity": [5, 15]}}
    name = f"{module(LINE)}:Line" if request.param == "Line" else request.param
    return from_name(name, ranges.get(name, {}))


class TestReuse:
    def test_a_column_depends_on_its_task_seed_and_actions_alone(self, family: TaskDistribution) -> None:
        """New or used, alone, beside others or at the same time as another batch: the same bits."""
        tasks = draw(family, 4)
        seeds = [11, 12, 13, 14, 15, 16, 17, 18]
        first = play(family, tasks, 2, seeds=seeds)
        np.testing.assert_array_equal(play(family, tasks, 2, seeds=seeds), first)
        play(family, draw(family, 3, seed=5), 3)
        np.testing.assert_array_equal(play(family, tasks[1:3], 2, seeds=seeds[2:6], close=False), first[:, 2:6])
        np.testing.assert_array_equal(play(family, tasks[::-1], 1, seeds=seeds[6::-2]), first[:, 6::-2])
        np.testing.assert_array_equal(play(family, tasks, 2, seeds=seeds), first)
        other = cloudpickle.loads(cloudpickle.dumps(family))
        np.testing.assert_array_equal(play(other, tasks, 2, seeds=seeds), first)

    def test_environments_are_lent_again_to_one_batch_at_a_time(self, family: Any) -> None:
        tasks = draw(family, 2)
        one = family.make_vector_env(tasks, 2)
        beside = family.make_vector_env(tasks, 2)
        assert not {map(id, one.envs)} & {map(id, beside.envs)}
        lent = {id(env) for env in one.envs}
        one.close()
        one.close()
        assert {id(env) for env in family.make_vector_env(tasks, 2).envs} == lent

    def test_environments_of_tasks_that_are_over_are_not_kept(self) -> None:
        family = from_name("gym:Pendulum-v1", {"g": [8, 12]})
        for seed in range(3):
            family.make_vector_env(draw(family, 5, seed), 2).close()
        assert sum(map(len, family._idle.values())) == 10  # type: ignore[attr-defined]

    def test_a_pickle_holds_no_environment(self, family: Any) -> None:
        before = len(cloudpickle.dumps(family))
        family.make_vector_env(draw(family, 3), 2).close()
        assert family._idle
        assert len(cloudpickle.dumps(family)) < before + 1000  # generators of the spaces, which batching makes
        assert not cloudpickle.loads(cloudpickle.dumps(family))._idle

    def test_an_environment_that_raised_is_not_used_again(self, module: Callable[[str], str]) -> None:
        source = LINE.replace(
            "self.position += action", "self.position += action / self.goal[0] ** 0 + 0 * self.check()"
        )
        source += "    def check(self):\n        if self.goal[0] > 5: raise OSError('fell over')\n        return 0\n"
        family: Any = from_name(f"{module(source)}:Line")
        healthy, faulty = {"goal": [1.0]}, {"goal": [6.0]}
        family.make_vector_env([healthy], 2).close()
        record = rollouts(family, [faulty, healthy])
        assert len(record.errors) == 2
        assert "fell over" in record.errors[0]
        assert record.valid.any((1, 2)).tolist() == [False, True]
        assert sum(map(len, family._idle.values())) == 2
        assert_same(rollouts(family, [healthy]), rollouts(from_name(family.name), [healthy]))

    def test_an_environment_that_remembers_is_made_anew(self, module: Callable[[str], str]) -> None:
        """It starts every episode farther away: kept, it would play otherwise in the next batch."""
        source = LINE.replace("horizon = 12", "horizon = 12\n    episodes = 0")
        source = source.replace("super().reset(seed=seed)", "super().reset(seed=seed); self.episodes += 1")
        source = source.replace("normal(size=1)", "normal(size=1) + self.episodes")
        family: Any = from_name(f"{module(source)}:Line")
        tasks = draw(family, 2)
        np.testing.assert_array_equal(play(family, tasks), play(family, tasks))
        assert not family._idle

    def test_an_environment_that_cannot_be_repeated_is_named(self, module: Callable[[str], str]) -> None:
        source = LINE.replace("self.position = self.np_random", "self.position = np.random.default_rng()")
        family = from_name(f"{module(source)}:Line")
        with pytest.warns(UserWarning, match="Line plays differently with the same task, seed and actions"):
            family.make_vector_env(draw(family, 1), 1)


# --- Together with the rest -------------------------------------------------------------------------------


class TestRollouts:
    def test_are_valid_and_do_not_depend_on_the_company(self, family: TaskDistribution) -> None:
        tasks = draw(family, 3)
        record = rollouts(family, tasks)
        assert not record.errors
        assert record.tasks == tuple(tasks)
        assert record.kept().all()
        lengths = record.valid.sum(1)
        assert lengths.min() >= 1
        assert lengths.max() <= family.horizon
        assert (record.terminated.any(1) | (lengths == family.horizon)).all()
        assert np.isfinite(record.returns()).all()
        assert_same(rollouts(family, tasks), record)
        alone = rollouts(family, tasks[2:], first=2)
        np.testing.assert_array_equal(alone.returns()[0], record.returns()[2])
        np.testing.assert_array_equal(alone.last_observations[0], record.last_observations[2])

    def test_the_random_player_is_measured_once_and_the_same_everywhere(
        self, family: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(adapter, "REFERENCE_EPISODES", 20)
        play(family, draw(family, 2))
        other = cloudpickle.loads(cloudpickle.dumps(family))
        reference = family.reference
        assert other.reference == reference
        assert family.reference is reference
        assert cloudpickle.loads(cloudpickle.dumps(family)).__dict__["reference"] == reference
        assert reference.oracle is None
        assert np.isfinite([reference.random, reference.random_sd]).all()

    def test_the_random_player_of_cartpole(self) -> None:
        """Known to get 22 of 500, with a standard deviation of 12."""
        reference = from_name("gym:CartPole-v1").reference
        assert 17 < reference.random < 28
        assert 6 < reference.random_sd < 20
