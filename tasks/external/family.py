"""What families of external environments share."""

from __future__ import annotations

import abc
import copy
import functools
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from ssm_metarl.checks import check_count
from ssm_metarl.core import ReferenceReturns, Task, TaskDistribution
from ssm_metarl.tasks.external.importing import one_line
from ssm_metarl.tasks.external.lending import Kept, LentVectorEnv, PolicyEnv, close_all, own_horizon
from ssm_metarl.tasks.external.reading import check_interface
from ssm_metarl.tasks.external.spaces import action_space, vector_space
from ssm_metarl.tasks.parameters import stack_parameters

REFERENCE_EPISODES = 100
PROBE_STEPS = 50


class AdaptedFamily(TaskDistribution, abc.ABC):
    """What both kinds share: batches of environments that are kept for the next batch, and the random player.

    Environments are costly to make, so those of a closed batch are kept and lent to the next one, but only if a trial
    at the first batch shows that a used one plays just as a new one does. One that raised is not used again. A pickled
    family has none.

    Observations are float32 vectors, flattened as gymnasium does: a `Box` (with several axes, up to `MAX_FLAT`
    numbers), `Discrete` and `MultiDiscrete` as one-hot vectors, `MultiBinary`, and `Dict` and `Tuple` of them. Actions
    are `Discrete`; a `Box` of real numbers, to which they are clipped; or several integers, each of them drawn by
    itself: `MultiDiscrete`, `MultiBinary`, and a `Box` of integers.

    Args:
        name: of the family.
        arguments: of the environment's constructor.
    """

    splits = ("train", "validation", "test")

    def __init__(self, name: str, arguments: Mapping[str, Any] = {}) -> None:
        self.name = name
        self._constructor = copy.deepcopy(dict(arguments))
        self._directory = os.getcwd()  # may hold modules that Python does not find, and workers start elsewhere
        self._kept = Kept()
        self._keeps: bool | None = None

    def _adopt(self, env: gymnasium.Env[Any, Any], horizon: int | None) -> None:
        """Take spaces and horizon from one of the environments."""
        check_interface(self.name, env)
        self.observation_space = vector_space(self.name, env.observation_space)
        self.action_space = action_space(self.name, env.action_space)
        limit = own_horizon(self.name, env) if horizon is None else horizon
        self.horizon = check_count(f"{self.name}: the horizon", limit, 1)

    @abc.abstractmethod
    def _key(self, task: Task) -> Any:
        """What of a task is built into an environment: it can play another task only with an equal key."""

    @abc.abstractmethod
    def _policy_env(self, task: Task) -> PolicyEnv:
        """Make an environment for a task."""

    def environment(self, task: Task) -> gymnasium.Env[Any, Any]:
        """A new environment as it is, that is to play a task; the caller closes it."""
        made = self._policy_env(task)
        made.assign(task)
        return made.env

    def filmed(self, task: Task) -> PolicyEnv:
        """A new environment that renders pictures, as the policy meets it, and plays a task; the caller closes it.

        Raises:
            ValueError: its constructor takes no `render_mode`, or it cannot be made with "rgb_array"; one sentence.
        """
        renders = copy.copy(self)
        renders._constructor = {**self._constructor, "render_mode": "rgb_array"}
        try:
            made = renders._policy_env(task)
        except Exception as error:
            raise ValueError(
                f"{self.name} cannot render pictures (render_mode='rgb_array'): {one_line(error)}"
            ) from error
        made.assign(task)
        return made

    def _for_policy(self, env: gymnasium.Env[Any, Any], assign: Any, *, again: bool) -> PolicyEnv:
        """An environment as the policy meets it."""
        spaces = self.observation_space, self.action_space
        return PolicyEnv(self.name, env, self.horizon, *spaces, assign, again=again)

    def _check(self, tasks: Sequence[Task], num_episodes: int) -> None:
        """Raise ValueError for a batch that cannot be; the message is a sentence."""
        stack_parameters([{} for _ in tasks], {}, num_episodes)

    def make_vector_env(self, tasks: Sequence[Task], num_episodes: int) -> LentVectorEnv:
        """Build the environments of `tasks`; see `TaskDistribution.make_vector_env`."""
        self._check(tasks, num_episodes)
        if self._keeps is None:
            self._keeps = self._used_plays_as_new()
        keys = [self._key(task) for task in tasks]
        for unwanted in self._kept.idle.keys() - set(keys):
            close_all(self._kept.idle.pop(unwanted))
        return LentVectorEnv(
            [self._lend(*row) for row in zip(keys, tasks) for _ in range(num_episodes)], self._give_back
        )

    def _lend(self, key: Any, task: Task) -> PolicyEnv:
        idle = self._kept.idle.get(key)
        env = idle.pop() if idle else self._policy_env(task)
        env.task = task
        return env

    def _give_back(self, envs: list[PolicyEnv]) -> None:
        if not self._keeps:
            close_all(envs)
            return
        for env in envs:
            self._kept.idle.setdefault(self._key(env.task), []).append(env)

    def _used_plays_as_new(self) -> bool:
        """Try whether an episode depends on its task and seed alone, and not on those that were played before."""
        task, other = self.sample(2, np.random.default_rng(0))
        envs: list[PolicyEnv] = []
        try:
            envs.append(self._policy_env(task))
            env = envs[0]
            first = _played(env, task, seed=0)
            _played(env, other if self._key(other) == self._key(task) else task, seed=1)
            if np.array_equal(first, _played(env, task, seed=0), equal_nan=True):
                return True
            envs.append(self._policy_env(task))
            new = _played(envs[1], task, seed=0)
        except Exception:
            return False  # it will be raised, and reported, where episodes are collected
        finally:
            close_all(envs)
        if not np.array_equal(first, new, equal_nan=True):
            warnings.warn(
                f"{self.name} plays differently with the same task, seed and actions: runs cannot be repeated.",
                stacklevel=3,
            )
        return False

    @functools.cached_property
    def reference(self) -> ReferenceReturns:  # type: ignore[override]
        """Returns of uniformly random actions (normal ones where a `Box` has no bounds); no best player is known.

        Measured when first asked for, over `REFERENCE_EPISODES` episodes on as many training tasks with fixed seeds.
        """
        returns = np.zeros(REFERENCE_EPISODES)
        running = np.ones(REFERENCE_EPISODES, bool)
        envs = self.make_vector_env(self.sample(REFERENCE_EPISODES, np.random.default_rng(0)), 1)
        try:
            actions = batch_space(self.action_space, REFERENCE_EPISODES)
            actions.seed(0)
            envs.reset(seed=list(range(REFERENCE_EPISODES)))
            while running.any():
                _, rewards, terminated, truncated, _ = envs.step(actions.sample())
                returns += np.where(running, rewards, 0.0)
                running &= ~(terminated | truncated)
        finally:
            envs.close()
        return ReferenceReturns(float(returns.mean()), float(returns.std()), None)

    def close(self) -> None:
        """Close the environments that are kept."""
        self._kept.close()


def _played(env: PolicyEnv, task: Task, seed: int) -> NDArray[Any]:
    """All that an environment returns in `PROBE_STEPS` steps of random actions, in one row."""
    env.task = task
    actions = copy.deepcopy(env.action_space)
    actions.seed(seed)
    seen = [env.reset(seed=seed)[0]]
    for _ in range(PROBE_STEPS):
        observation, reward, terminated, truncated, _ = env.step(actions.sample())
        seen += [observation, np.array([reward, terminated, truncated], np.float64)]
        if terminated or truncated:
            seen.append(env.reset()[0])
    return np.concatenate(seen)
