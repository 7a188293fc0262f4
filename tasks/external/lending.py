"""Environments that are lent to one batch after the other."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from numpy.typing import NDArray

from ssm_metarl.checks import check_count
from ssm_metarl.core import SUCCESS, InvalidStep, Task
from ssm_metarl.tasks.external.reading import NotInSpace, check_interface, reset_observation, step_results
from ssm_metarl.tasks.external.spaces import action_of, action_space, vector_of, vector_space

_log = logging.getLogger(__name__)


class LentVectorEnv(SyncVectorEnv):
    """Environments of a family, which gets them back when the batch is closed. Infos have ends and success only.

    Args:
        envs: the environments, each with its task.
        give_back: called with them at `close`, unless one of them raised.
    """

    def __init__(self, envs: list[PolicyEnv], give_back: Callable[[list[PolicyEnv]], None]) -> None:
        self._give_back = give_back
        self._sound = True
        super().__init__([functools.partial(_itself, env) for env in envs], autoreset_mode=AutoresetMode.SAME_STEP)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode in every slot; see `gymnasium.vector.SyncVectorEnv.reset`."""
        self._sound = False  # until it returns
        result: tuple[Any, dict[str, Any]] = super().reset(seed=seed, options=options)
        self._sound = True
        return result

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Move every slot one step; see `gymnasium.vector.SyncVectorEnv.step`. Rewards are float32."""
        self._sound = False
        observations, rewards, *ends_and_infos = super().step(actions)  # type: ignore[var-annotated]
        self._sound = True
        return observations, rewards.astype(np.float32), *ends_and_infos

    def close_extras(self, **kwargs: Any) -> None:
        """Part with the environments: this batch cannot be stepped any more."""
        envs, self.envs = getattr(self, "envs", []), []
        if self._sound:
            self._give_back(envs)
        else:
            close_all(envs)


class PolicyEnv(gymnasium.Wrapper[NDArray[np.float32], Any, Any, Any]):
    """One environment as the policy meets it: vectors, clipped actions, infos of success alone, a limit of steps, its
    task at every reset. What the environment returns must be in its spaces, or `InvalidStep` says what was wrong.

    Args:
        name: of the family, for errors.
        env: of which an episode need not end by itself.
        horizon: most steps of an episode.
        observation_space, action_space: of the policy, see `vector_space` and `action_space`.
        assign: called with the environment and the task before every reset.
        again: after it, too, in case that resetting put something else there.

    Attributes:
        task: what is played from the next reset on.
    """

    task: Task

    def __init__(
        self,
        name: str,
        env: gymnasium.Env[Any, Any],
        horizon: int,
        observation_space: gymnasium.Space[Any],
        action_space: gymnasium.Space[Any],
        assign: Callable[[gymnasium.Env[Any, Any], Task], None],
        *,
        again: bool,
    ) -> None:
        super().__init__(env)
        self._name, self._horizon = name, horizon
        self._vector = vector_of(env.observation_space)
        self._action = action_of(env.action_space)
        self.observation_space = observation_space
        self.action_space = action_space
        self.metadata = dict(env.metadata)  # a copy: the vector environment writes into it
        self._assign = assign
        self._again = again
        self._steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Apply the task and start an episode."""
        self._steps = 0
        self._assign(self.env, self.task)
        result = self.env.reset(seed=seed) if options is None else self.env.reset(seed=seed, options=options)
        if self._again:
            self._assign(self.env, self.task)
        try:
            return self._vector(reset_observation(result)), {}
        except (NotInSpace, ValueError) as error:
            raise InvalidStep(f"{self._name}, reset: {error}.") from error

    def assign(self, task: Task) -> None:
        """Let the environment play a task from its next reset on."""
        self.task = task
        self._assign(self.env, task)

    def step(self, action: Any) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Take a step with an action of the policy's."""
        self._steps += 1
        result = self.env.step(self._action(action))
        try:
            observation, reward, terminated, truncated = step_results(result)
            cut = truncated or self._steps >= self._horizon
            return self._vector(observation), reward, terminated, cut, _success(result)
        except (NotInSpace, ValueError) as error:
            raise InvalidStep(f"{self._name}, step {self._steps}: {error}.") from error


def policy_env(env: gymnasium.Env[Any, Any], horizon: int | None = None) -> tuple[PolicyEnv, int]:
    """An environment as a policy meets it, whatever its task is, and the most steps of its episodes.

    Args:
        env: of any supported spaces, with or without a time limit.
        horizon: most steps of an episode; None: the environment's own.

    Raises:
        ValueError: for a space that is not supported, or a horizon that is missing; one sentence.
    """
    name = type(env.unwrapped).__name__
    check_interface(name, env)
    limit = check_count(f"{name}: the horizon", own_horizon(name, env) if horizon is None else horizon, 1)
    spaces = vector_space(name, env.observation_space), action_space(name, env.action_space)
    wrapped = PolicyEnv(name, env, limit, *spaces, lambda env, task: None, again=False)
    wrapped.task = {}
    return wrapped, limit


def _success(result: Any) -> dict[str, float]:
    """Of the infos of a step whether it succeeded, where they have that as a number."""
    info = result[-1] if isinstance(result[-1], dict) else {}
    numbers = bool | int | float | np.number | np.bool_
    return {name: float(info[name]) for name in SUCCESS if isinstance(info.get(name), numbers)}


def _itself(env: PolicyEnv) -> PolicyEnv:
    return env


class Kept:
    """Environments that a family keeps for later; they are closed with it, or at the end of the process.

    Attributes:
        idle: by what is built into them.
        sampler: the one that draws tasks, where there is one.
    """

    def __init__(self) -> None:
        self.idle: dict[Any, list[PolicyEnv]] = {}
        self.sampler: gymnasium.Env[Any, Any] | None = None
        held = vars(self)  # without a reference to this object, which would keep it
        weakref.finalize(self, lambda: _close_held(held))

    def close(self) -> None:
        """Close all of them."""
        _close_held(vars(self))

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()  # a copy of the family has none


def _close_held(held: dict[str, Any]) -> None:
    sampler, held["sampler"] = held["sampler"], None
    envs = [env for kept in held["idle"].values() for env in kept]
    held["idle"].clear()
    close_all([*envs, *([] if sampler is None else [sampler])])


def close_all(envs: Sequence[gymnasium.Env[Any, Any]]) -> None:
    """Close environments; one that cannot be closed is no reason to stop."""
    for env in envs:
        try:
            env.close()
        except Exception as error:
            _log.warning("%s could not be closed: %s: %s", env, type(error).__name__, error)


def own_horizon(name: str, env: gymnasium.Env[Any, Any]) -> Any:
    """The time limit that an environment has."""
    if env.spec is not None and env.spec.max_episode_steps is not None:
        return env.spec.max_episode_steps
    for attribute in ("horizon", "max_episode_length"):  # the second is POPGym's
        if env.has_wrapper_attr(attribute):
            return env.get_wrapper_attr(attribute)
    raise ValueError(f"{name} has no time limit of its own: give a horizon, the most steps of an episode.")
