"""Families `module:attribute`: the user's own environment with tasks."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np

from ssm_metarl.checks import lookup
from ssm_metarl.core import Task
from ssm_metarl.tasks.external.family import AdaptedFamily
from ssm_metarl.tasks.external.importing import argument_names, call, load_entry, one_line
from ssm_metarl.tasks.external.lending import PolicyEnv
from ssm_metarl.tasks.external.reading import OLD_INTERFACE


class TaskFamily(AdaptedFamily):
    """`module:attribute`: an environment that draws its tasks itself, the convention of learn2learn.

    The attribute is a `gymnasium.Env` class, or a function that makes one (wrapped or not), with

    - `sample_tasks(n)`, which returns n tasks: JSON values, where NumPy's arrays and numbers count and become lists
      and numbers. The draws must depend on the seed given to them alone, for which no global generator is touched: a
      method with an argument `rng` gets a `numpy.random.Generator`, one with `seed` an integer, and any other
      is called after `reset(seed=...)`, which must do without a task, and draws from `self.np_random`;
    - `set_task(task)`, called before every reset, with a copy of the task.

    The family holds the name and imports on use: from the Python path, else from the directory in which it was made.
    A worker on another machine needs the module installed there, or sent along by value, which is the caller's matter
    (`cloudpickle.register_pickle_by_value` and a `TaskDistribution` of one's own).

    Args:
        name: "package.module:attribute".
        horizon: most steps of an episode; None: the time limit that the environment has (`spec.max_episode_steps`),
            or its attribute `horizon` or `max_episode_length`.
        arguments: of the class or function, JSON values.

    Raises:
        ValueError: in one sentence, when there is no such module, attribute, method or horizon; when making the
            environment or drawing tasks fails, or the same seed gives other tasks; for a space that is not supported.
    """

    def __init__(self, name: str, horizon: int | None = None, arguments: Mapping[str, Any] = {}) -> None:
        super().__init__(name, arguments)
        made = call(name, load_entry(name, self._directory), self._constructor)
        if not isinstance(made, gymnasium.Env):
            old = any(kind.__module__.partition(".")[0] == "gym" for kind in type(made).__mro__)
            wrap = f", {OLD_INTERFACE}" if old else ""
            raise ValueError(f"{name} must make a gymnasium.Env, not {type(made).__name__}{wrap}.")
        env: gymnasium.Env[Any, Any] = made
        self._kept.sampler = env
        missing = [method for method in ("sample_tasks", "set_task") if not env.has_wrapper_attr(method)]
        if missing:
            raise ValueError(f"The environment of {name} has no {' and no '.join(missing)}, which tasks need.")
        self._adopt(env, horizon)
        try:
            first, second = (self.sample(3, np.random.default_rng(0)) for _ in range(2))
        except Exception as error:
            raise ValueError(f"{name} cannot draw tasks: {one_line(error)}") from error
        if first != second:
            raise ValueError(
                f"sample_tasks of {name} gives other tasks for the same seed: "
                "let it take an argument rng, or draw from self.np_random."
            )

    def _key(self, task: Task) -> Any:
        return ()

    def _policy_env(self, task: Task) -> PolicyEnv:
        return self._for_policy(self._new(), _set_task, again=False)

    def _new(self) -> gymnasium.Env[Any, Any]:
        env: gymnasium.Env[Any, Any] = load_entry(self.name, self._directory)(**copy.deepcopy(self._constructor))
        return env

    def sample(self, n: int, rng: np.random.Generator, split: str = "train") -> list[Task]:
        """Draw n tasks; see `TaskDistribution.sample`. All splits are what `sample_tasks` draws from."""
        lookup(dict.fromkeys(self.splits), split, "split")
        if not n:
            return []
        if self._kept.sampler is None:
            self._kept.sampler = self._new()
        sample_tasks = self._kept.sampler.get_wrapper_attr("sample_tasks")
        named = argument_names(sample_tasks)
        if "rng" in named:
            tasks = sample_tasks(n, rng=rng)
        else:
            seed = int(rng.integers(2**31))
            if "seed" in named:
                tasks = sample_tasks(n, seed=seed)
            else:
                self._kept.sampler.reset(seed=seed)
                tasks = sample_tasks(n)
        tasks = [_json_value(task) for task in tasks]
        if len(tasks) != n:
            raise ValueError(f"sample_tasks returned {len(tasks)} tasks, not {n}.")
        return tasks


def _set_task(env: gymnasium.Env[Any, Any], task: Task) -> None:
    env.get_wrapper_attr("set_task")(
        copy.deepcopy(task)
    )  # environments share the task, and an environment may change it


def _json_value(value: Any) -> Any:
    """A task as JSON values, with lists and numbers for NumPy's."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _json_value(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(part) for part in value]
    if value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ValueError(f"a task must be JSON values (finite numbers, strings, lists, dicts by string), not {value!r}.")
