"""Toy environments that are not ours, and how the tests play with families of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete, MultiDiscrete, Space
from gymnasium.vector import AutoresetMode

from builders import make_policy
from ssm_metarl.algorithms.collect import collect_tasks, played
from ssm_metarl.algorithms.rollouts import Rollouts
from ssm_metarl.algorithms.spec import PolicySpec
from ssm_metarl.seeds import seed_for
from ssm_metarl.tasks import TaskDistribution
from ssm_metarl.tasks.external.names import from_name

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


def play(
    family: TaskDistribution,
    tasks: list[Any],
    num_episodes: int = 1,
    steps: int = 30,
    seeds: list[int] | None = None,
    close: bool = True,
) -> Any:
    """All observations, rewards and ends [steps, tasks * slots, ...] for actions that a slot's seed decides."""
    envs = family.make_vector_env(tasks, num_episodes)
    seeds = seeds or list(range(envs.num_envs))
    generators = [np.random.default_rng(seed) for seed in seeds]
    space = family.action_space
    seen = [np.pad(envs.reset(seed=seeds)[0], ((0, 0), (0, 3)))]  # type: ignore[arg-type]
    for _ in range(steps):
        if isinstance(space, Discrete):
            actions = np.array([generator.integers(int(space.n)) for generator in generators])
        elif isinstance(space, MultiDiscrete):
            actions = np.array([generator.integers(space.nvec) for generator in generators])
        else:
            assert space.shape is not None
            actions = np.array([generator.normal(0, 2, space.shape) for generator in generators], np.float32)
        observations, *outcome, _ = envs.step(actions)
        seen.append(np.column_stack([observations, *outcome]))
    if close:
        envs.close()
    return np.stack(seen)


def small_policy(family: TaskDistribution) -> tuple[PolicySpec, dict[str, Any]]:
    """Sizes and weights of a policy that fits a family."""
    observation, action = family.observation_space, family.action_space
    assert observation.shape is not None
    discrete = not isinstance(action, Box)
    heads = tuple(action.nvec.tolist()) if isinstance(action, MultiDiscrete) else ()
    size = int(action.n) if isinstance(action, Discrete) else sum(heads) or action.shape[0]  # type: ignore[index]
    spec = PolicySpec(observation.shape[0], size, discrete, action_heads=heads, hidden_dim=6, state_dim=4)
    return spec, make_policy(spec).numpy_weights()


def rollouts(
    family: TaskDistribution, tasks: list[Any], first: int = 0, num_episodes: int = 2, trial_episodes: int = 1
) -> Rollouts:
    """What the small policy plays in these tasks, the first of which has the number `first`."""
    spec, weights = small_policy(family)
    nodes = [seed_for(0, first + number) for number in range(len(tasks))]
    how = (nodes, tasks, num_episodes, family.horizon)
    return played(collect_tasks(family.make_vector_env, spec, weights, *how, trial_episodes=trial_episodes))


def draw(family: TaskDistribution, n: int, seed: int = 0) -> list[Any]:
    """Training tasks."""
    return family.sample(n, np.random.default_rng(seed))


def assert_refused(match: str, *arguments: Any) -> None:
    """`from_name` raises a ValueError of one line."""
    with pytest.raises(ValueError, match=match) as error:
        from_name(*arguments)
    assert "\n" not in str(error.value)


def check_conventions(family: TaskDistribution, steps: int = 30) -> Any:
    """Types, shapes and flags of a batch of four, which is returned."""
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
