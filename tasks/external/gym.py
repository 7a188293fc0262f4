"""Families `gym:ID`: a registered environment in which some numbers differ between tasks."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import load_env_creator

from ssm_metarl.checks import check_count, lookup
from ssm_metarl.core import Task
from ssm_metarl.tasks.external.attributes import (
    check_attribute,
    checked_range,
    is_number,
    set_attribute,
    with_attributes,
)
from ssm_metarl.tasks.external.family import AdaptedFamily
from ssm_metarl.tasks.external.importing import check_arguments, import_module, one_line
from ssm_metarl.tasks.external.lending import PolicyEnv, close_all
from ssm_metarl.tasks.parameters import Parameter, stack_parameters

GYM = "gym:"
UNLIMITED = -1
"""For `gymnasium.make`: no `TimeLimit`, for `PolicyEnv` limits the steps."""

_FINITE = Parameter(-sys.float_info.max, sys.float_info.max)


class GymFamily(AdaptedFamily):
    """`gym:<environment id>`: one registered environment with numbers drawn anew for each task.

    A task is {"name": number, ...}, drawn uniformly from the ranges. A name is

    - an argument of the environment's constructor, such as `g` of Pendulum: passed to it;
    - else an attribute of the unwrapped environment, such as `length` of CartPole. It has the task's value while the
      constructor runs, so that what the constructor derives from it is right (`polemass_length`), and again before and
      after every reset. Where the environment's entry point is a function, it is set after construction only;
    - or a path such as `model.opt.gravity.2`, with numbers for indices: set before and after every reset. What the
      environment derived from such a number before keeps its value.

    Without ranges there is one task, {}.

    Args:
        env_id: as for `gymnasium.make`: "CartPole-v1", or "module:MyEnv-v0", where importing the module registers it.
        ranges: name → [low, high], finite.
        horizon: most steps of an episode; None: as registered, or the attribute `horizon` or
            `max_episode_length` of the environment.
        arguments: of the environment's constructor, the same for all tasks; JSON values.

    Raises:
        ValueError: in one sentence, for an unknown environment or name, an impossible range, a space that is not
            supported, or a horizon that is missing.
    """

    def __init__(
        self,
        env_id: str,
        ranges: Mapping[str, Sequence[float]] = {},
        horizon: int | None = None,
        arguments: Mapping[str, Any] = {},
    ) -> None:
        super().__init__(f"{GYM}{env_id}", arguments)
        if not isinstance(ranges, Mapping):
            raise ValueError(f"{self.name}: ranges must be {{name: [low, high], ...}}, not {ranges!r}.")
        # Sorted: the same draws whatever order the ranges are read in.
        self._ranges = {key: checked_range(self.name, key, ranges[key]) for key in sorted(ranges)}
        self._parameters = dict.fromkeys(self._ranges, _FINITE)
        self.enumerable = all(low == high for low, high in self._ranges.values())
        self._module, _, self._env_id = env_id.rpartition(":")
        if horizon is not None:
            check_count(f"{self.name}: the horizon", horizon, 1)
        for key in arguments:
            if key in self._ranges:
                raise ValueError(f"{self.name}: {key!r} has a range and a value: give one of them.")
        env = self._attempt("", lambda: self._checked_make(arguments))
        try:
            self._adopt(env, self._entry[0].max_episode_steps if horizon is None else horizon)
            self._sort_names(env.unwrapped)
        finally:
            close_all([env])
        lowest = {key: low for key, (low, _) in self._ranges.items()}
        self._attempt(f" with {lowest}", lambda: self._try(lowest))

    def _attempt(self, what: str, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except Exception as error:
            raise ValueError(f"{self.name} cannot be made{what}: {one_line(error)}") from error

    def _checked_make(self, arguments: Mapping[str, Any]) -> gymnasium.Env[Any, Any]:
        check_arguments(self.name, self._entry[1], arguments)
        return self._make({}, {})

    def _try(self, task: Task) -> None:
        env = self._policy_env(task)
        try:
            self._assign(env, task)
        finally:
            close_all([env])

    def _sort_names(self, env: Any) -> None:
        """Tell arguments, attributes and paths apart; raise ValueError for a name that is none of these."""
        _, creator = self._entry
        parameters = inspect.signature(creator).parameters.values()
        arguments = [parameter.name for parameter in parameters if is_number(parameter.default)]
        self._arguments = [key for key in self._ranges if key in arguments]
        self._paths = [key for key in self._ranges if "." in key]
        self._attributes = [key for key in self._ranges if key not in (*self._arguments, *self._paths)]
        for key in (*self._attributes, *self._paths):
            check_attribute(env, self._env_id, key, arguments)

    @functools.cached_property
    def _entry(self) -> tuple[Any, Callable[..., Any]]:
        """The environment's registration, and what makes it: a class or a function."""
        if self._module:
            import_module(self._module, self._directory)
        spec = gymnasium.spec(self._env_id)
        if spec.entry_point is None:
            raise ValueError("it has no entry point")
        entry = spec.entry_point
        return spec, load_env_creator(entry) if isinstance(entry, str) else entry

    def _make(self, arguments: Mapping[str, float], attributes: Mapping[str, float]) -> gymnasium.Env[Any, Any]:
        spec, creator = self._entry
        if attributes and inspect.isclass(creator):
            spec = copy.copy(spec)
            spec.entry_point = with_attributes(creator, attributes)
        given = {**copy.deepcopy(self._constructor), **arguments}
        return gymnasium.make(spec, max_episode_steps=UNLIMITED, disable_env_checker=True, **given)

    def _key(self, task: Task) -> Any:
        return tuple(task[key] for key in (*self._arguments, *self._attributes))

    def _policy_env(self, task: Task) -> PolicyEnv:
        arguments = {key: float(task[key]) for key in self._arguments}
        env = self._make(arguments, {key: float(task[key]) for key in self._attributes})
        return self._for_policy(env, self._assign, again=True)

    def _assign(self, env: gymnasium.Env[Any, Any], task: Task) -> None:
        for key in (*self._attributes, *self._paths):
            set_attribute(env.unwrapped, key, float(task[key]))

    def _check(self, tasks: Sequence[Task], num_episodes: int) -> None:
        stack_parameters(tasks, self._parameters, num_episodes)

    def sample(self, n: int, rng: np.random.Generator, split: str = "train") -> list[Task]:
        """Draw n tasks from the ranges; see `TaskDistribution.sample`."""
        lookup(dict.fromkeys(self.splits), split, "split")
        values = {key: rng.uniform(low, high, n).tolist() for key, (low, high) in self._ranges.items()}
        return [{key: values[key][row] for key in values} for row in range(n)]

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state.pop("_entry", None)  # a function that made the environment need not be picklable
        return state
