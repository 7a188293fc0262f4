"""Families of tasks from gymnasium environments that exist already: ``gym:<environment id>`` and ``module:attribute``.

The registry calls ``from_name`` for names that it does not have; what it gets is a family like any other::

    family = from_name("gym:Pendulum-v1", {"g": [8, 12], "l": [0.5, 1.5]})  # a task: {"g": 9.3, "l": 0.7}
    family = from_name("mymodule:MyEnv")  # tasks from its sample_tasks(n), applied by its set_task(task)

The environments are stepped one after another in Python: a family written as a ``BatchedEnv`` is much faster.
"""

from __future__ import annotations

import abc
import contextlib
import copy
import functools
import importlib.machinery
import importlib.util
import inspect
import math
import os
import re
import sys
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import load_env_creator
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from ssm_metarl.tasks.base import Parameter, ReferenceReturns, Task, TaskDistribution, lookup, stack_parameters

GYM = "gym:"
MAX_FLAT = 1024  # numbers of a one-hot vector, or of a Box with several axes: beyond it is an image or a hash
REFERENCE_EPISODES = 100
PROBE_STEPS = 50

_MODULE_ATTRIBUTE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
_FINITE = Parameter(-sys.float_info.max, sys.float_info.max)
_NO_RANGES: Mapping[str, Sequence[float]] = types.MappingProxyType({})


def from_name(
    name: str, ranges: Mapping[str, Sequence[float]] = _NO_RANGES, horizon: int | None = None
) -> TaskDistribution:
    """Make the family that a name with a colon means.

    Args:
        name: "gym:Pendulum-v1", or "package.module:attribute". Such an attribute is a gymnasium environment's class,
            or a function without arguments that makes one, with the methods of ``TaskFamily``; or a
            ``TaskDistribution`` (class, instance, or a function that makes one), which is used as it is.
        ranges: for ``gym:`` only, see ``GymFamily``.
        horizon: most steps of an episode; None: the environment's own. Not for a ``TaskDistribution``.

    Raises:
        ValueError: in one sentence, when the name is neither, or the family cannot be made.
    """
    if name.startswith(GYM):
        return GymFamily(name.removeprefix(GYM), ranges, horizon)
    if not _MODULE_ATTRIBUTE.fullmatch(name):
        raise ValueError(f"A task family is {GYM}<environment id> or module:attribute, not {name!r}.")
    if ranges:
        raise ValueError(f"Ranges are for {GYM} environments: {name} draws its tasks itself.")
    entry = _load(name, os.getcwd())
    made = entry if isinstance(entry, TaskDistribution) else _call(name, entry)
    if not isinstance(made, TaskDistribution):
        if isinstance(made, gymnasium.Env):
            made.close()
        return TaskFamily(name, horizon)
    if horizon is not None:
        raise ValueError(f"{name} has a horizon of its own, {made.horizon} steps: another cannot be given.")
    return made


# --- The families -----------------------------------------------------------------------------------------


class AdaptedFamily(TaskDistribution, abc.ABC):
    """What both kinds share: batches of environments that are kept for the next batch, and the random player.

    Environments are costly to make, so those of a closed batch are kept and lent to the next one, but only if a trial
    at the first batch shows that a used one plays just as a new one does. One that raised is not used again. A pickled
    family has none.

    Observations are float32 vectors: a ``Box`` is flattened where it has several axes and up to ``MAX_FLAT`` numbers,
    ``Discrete`` and ``MultiDiscrete`` become one-hot. Actions are ``Discrete``, or a ``Box`` with one axis, to which
    they are clipped.
    """

    splits = ("train", "validation", "test")

    def __init__(self, name: str) -> None:
        self.name = name
        self._directory = os.getcwd()  # may hold modules that Python does not find, and workers start elsewhere
        self._idle: dict[Any, list[Column]] = {}
        self._keeps: bool | None = None

    def _adopt(self, env: gymnasium.Env[Any, Any], horizon: int | None) -> None:
        """Take spaces and horizon from one of the environments."""
        self.observation_space = _vector_space(self.name, env.observation_space)
        self.action_space = _action_space(self.name, env.action_space)
        self.horizon = _checked_horizon(self.name, _own_horizon(self.name, env) if horizon is None else horizon)

    @abc.abstractmethod
    def _key(self, task: Task) -> Any:
        """What of a task is built into an environment: it can play another task only with an equal key."""

    @abc.abstractmethod
    def _column(self, task: Task) -> Column:
        """Make an environment for a task."""

    def _check(self, tasks: Sequence[Task], columns: int) -> None:
        """Raise ValueError for a batch that cannot be; the message is a sentence."""
        stack_parameters([{} for _ in tasks], {}, columns)

    def make_vector_env(self, tasks: Sequence[Task], columns: int) -> LentVectorEnv:
        """Build the environments of `tasks`; see ``TaskDistribution.make_vector_env``."""
        self._check(tasks, columns)
        if self._keeps is None:
            self._keeps = self._used_plays_as_new()
        keys = [self._key(task) for task in tasks]
        for unwanted in self._idle.keys() - set(keys):
            _close(self._idle.pop(unwanted))
        return LentVectorEnv([self._lend(*row) for row in zip(keys, tasks) for _ in range(columns)], self._give_back)

    def _lend(self, key: Any, task: Task) -> Column:
        idle = self._idle.get(key)
        column = idle.pop() if idle else self._column(task)
        column.task = task
        return column

    def _give_back(self, columns: list[Column]) -> None:
        if not self._keeps:
            _close(columns)
            return
        for column in columns:
            self._idle.setdefault(self._key(column.task), []).append(column)

    def _used_plays_as_new(self) -> bool:
        """Try whether what a column plays depends on its task and seed alone, and not on what it played before."""
        task, other = self.sample(2, np.random.default_rng(0))
        columns: list[Column] = []
        try:
            columns.append(self._column(task))
            column = columns[0]
            first = _played(column, task, seed=0)
            _played(column, other if self._key(other) == self._key(task) else task, seed=1)
            if np.array_equal(first, _played(column, task, seed=0), equal_nan=True):
                return True
            columns.append(self._column(task))
            new = _played(columns[1], task, seed=0)
        except Exception:
            return False  # it will be raised, and reported, where episodes are collected
        finally:
            _close(columns)
        if not np.array_equal(first, new, equal_nan=True):
            warnings.warn(
                f"{self.name} plays differently with the same task, seed and actions: runs cannot be repeated.",
                stacklevel=3,
            )
        return False

    @functools.cached_property
    def reference(self) -> ReferenceReturns:  # type: ignore[override]
        """Returns of uniformly random actions (normal ones where a ``Box`` has no bounds); no best player is known.

        Measured when first asked for, over ``REFERENCE_EPISODES`` episodes on as many training tasks with fixed seeds.
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

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_idle": {}}


class GymFamily(AdaptedFamily):
    """``gym:<environment id>``: one registered environment with numbers drawn anew for each task.

    A task is {"name": number, ...}, drawn uniformly from the ranges. A name is

    - an argument of the environment's constructor, such as `g` of Pendulum: passed to it;
    - else an attribute of the unwrapped environment, such as `length` of CartPole. It has the task's value while the
      constructor runs, so that what the constructor derives from it is right (`polemass_length`), and again before and
      after every reset. Where the environment's entry point is a function, it is set after construction only;
    - or a path such as `model.opt.gravity.2`, with numbers for indices: set before and after every reset. What the
      environment derived from such a number before keeps its value.

    Without ranges there is one task, {}.

    Args:
        env_id: as for ``gymnasium.make``: "CartPole-v1", or "module:MyEnv-v0", where importing the module registers it.
        ranges: name → [low, high], finite.
        horizon: most steps of an episode; None: as registered, or the attribute ``horizon`` or
            ``max_episode_length`` of the environment.

    Raises:
        ValueError: in one sentence, for an unknown environment or name, an impossible range, a space that is not
            supported, or a horizon that is missing.
    """

    def __init__(
        self, env_id: str, ranges: Mapping[str, Sequence[float]] = _NO_RANGES, horizon: int | None = None
    ) -> None:
        super().__init__(f"{GYM}{env_id}")
        if not isinstance(ranges, Mapping):
            raise ValueError(f"{self.name}: ranges must be {{name: [low, high], ...}}, not {ranges!r}.")
        # Sorted: the same draws whatever order the ranges are read in.
        self._ranges = {key: _checked_range(self.name, key, ranges[key]) for key in sorted(ranges)}
        self._parameters = dict.fromkeys(self._ranges, _FINITE)
        self.enumerable = all(low == high for low, high in self._ranges.values())
        self._module, _, self._env_id = env_id.rpartition(":")
        self._limit = None if horizon is None else _checked_horizon(self.name, horizon)
        env = self._attempt("", lambda: self._make({}, {}))
        self._adopt(env, horizon)
        self._limit = self.horizon
        self._sort_names(env.unwrapped)
        lowest = {key: low for key, (low, _) in self._ranges.items()}
        self._attempt(f" with {lowest}", lambda: self._assign(self._column(lowest), lowest))

    def _attempt(self, what: str, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except Exception as error:
            raise ValueError(f"{self.name} cannot be made{what}: {_one_line(error)}") from error

    def _sort_names(self, env: Any) -> None:
        """Tell arguments, attributes and paths apart; raise ValueError for a name that is none of these."""
        _, creator = self._entry
        parameters = inspect.signature(creator).parameters.values()
        arguments = [parameter.name for parameter in parameters if _is_number(parameter.default)]
        self._arguments = [key for key in self._ranges if key in arguments]
        self._paths = [key for key in self._ranges if "." in key]
        self._attributes = [key for key in self._ranges if key not in (*self._arguments, *self._paths)]
        for key in (*self._attributes, *self._paths):
            _check_number(env, self._env_id, key, arguments)

    @functools.cached_property
    def _entry(self) -> tuple[Any, Callable[..., Any]]:
        """The environment's registration, and what makes it: a class or a function."""
        if self._module:
            _import(self._module, self._directory)
        spec = gymnasium.spec(self._env_id)
        if spec.entry_point is None:
            raise ValueError("it has no entry point")
        entry = spec.entry_point
        return spec, load_env_creator(entry) if isinstance(entry, str) else entry

    def _make(self, arguments: Mapping[str, float], attributes: Mapping[str, float]) -> gymnasium.Env[Any, Any]:
        spec, creator = self._entry
        if attributes and inspect.isclass(creator):
            spec = copy.copy(spec)
            spec.entry_point = _with_attributes(creator, attributes)
        return gymnasium.make(spec, max_episode_steps=self._limit, disable_env_checker=True, **arguments)

    def _key(self, task: Task) -> Any:
        return tuple(task[key] for key in (*self._arguments, *self._attributes))

    def _column(self, task: Task) -> Column:
        arguments = {key: float(task[key]) for key in self._arguments}
        env = self._make(arguments, {key: float(task[key]) for key in self._attributes})
        return Column(env, self.observation_space, self.action_space, self._assign, again=True)

    def _assign(self, env: gymnasium.Env[Any, Any], task: Task) -> None:
        for key in (*self._attributes, *self._paths):
            _set_number(env.unwrapped, key, float(task[key]))

    def _check(self, tasks: Sequence[Task], columns: int) -> None:
        stack_parameters(tasks, self._parameters, columns)

    def sample(self, n: int, rng: np.random.Generator, split: str = "train") -> list[Task]:
        """Draw n tasks from the ranges; see ``TaskDistribution.sample``."""
        lookup(dict.fromkeys(self.splits), split, "split")
        values = {key: rng.uniform(low, high, n).tolist() for key, (low, high) in self._ranges.items()}
        return [{key: values[key][row] for key in values} for row in range(n)]

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state.pop("_entry", None)  # a function that made the environment need not be picklable
        return state


class TaskFamily(AdaptedFamily):
    """``module:attribute``: an environment that draws its tasks itself, the convention of learn2learn.

    The attribute is a ``gymnasium.Env`` class, or a function without arguments that makes one (wrapped or not), with

    - ``sample_tasks(n)``, which returns n tasks: JSON values, where NumPy's arrays and numbers count and become lists
      and numbers. The draws must depend on the seed given to them alone, for which no global generator is touched: a
      method with an argument ``rng`` gets a ``numpy.random.Generator``, one with ``seed`` an integer, and any other
      is called after ``reset(seed=...)``, which must do without a task, and draws from ``self.np_random``;
    - ``set_task(task)``, called before every reset, with a copy of the task.

    The family holds the name and imports on use: from the Python path, else from the directory in which it was made.
    A worker on another machine needs the module installed there, or sent along by value, which is the caller's matter
    (``cloudpickle.register_pickle_by_value`` and a ``TaskDistribution`` of one's own).

    Args:
        name: "package.module:attribute".
        horizon: most steps of an episode; None: the time limit that the environment has (``spec.max_episode_steps``),
            or its attribute ``horizon`` or ``max_episode_length``.

    Raises:
        ValueError: in one sentence, when there is no such module, attribute, method or horizon; when making the
            environment or drawing tasks fails, or the same seed gives other tasks; for a space that is not supported.
    """

    def __init__(self, name: str, horizon: int | None = None) -> None:
        super().__init__(name)
        made = _call(name, _load(name, self._directory))
        if not isinstance(made, gymnasium.Env):
            raise ValueError(f"{name} must make a gymnasium.Env, not {type(made).__name__}.")
        env: gymnasium.Env[Any, Any] = made
        missing = [method for method in ("sample_tasks", "set_task") if not env.has_wrapper_attr(method)]
        if missing:
            raise ValueError(f"The environment of {name} has no {' and no '.join(missing)}, which tasks need.")
        self._adopt(env, horizon)
        self._sampler: Any = env
        try:
            first, second = (self.sample(3, np.random.default_rng(0)) for _ in range(2))
        except Exception as error:
            raise ValueError(f"{name} cannot draw tasks: {_one_line(error)}") from error
        if first != second:
            raise ValueError(
                f"sample_tasks of {name} gives other tasks for the same seed: "
                "let it take an argument rng, or draw from self.np_random."
            )

    def _key(self, task: Task) -> Any:
        return ()

    def _column(self, task: Task) -> Column:
        env: gymnasium.Env[Any, Any] = gymnasium.wrappers.TimeLimit(_load(self.name, self._directory)(), self.horizon)
        return Column(env, self.observation_space, self.action_space, _set_task, again=False)

    def sample(self, n: int, rng: np.random.Generator, split: str = "train") -> list[Task]:
        """Draw n tasks; see ``TaskDistribution.sample``. All splits are what ``sample_tasks`` draws from."""
        lookup(dict.fromkeys(self.splits), split, "split")
        if not n:
            return []
        if self._sampler is None:
            self._sampler = _load(self.name, self._directory)()
        sample_tasks = self._sampler.get_wrapper_attr("sample_tasks")
        named = _argument_names(sample_tasks)
        if "rng" in named:
            tasks = sample_tasks(n, rng=rng)
        else:
            seed = int(rng.integers(2**31))
            if "seed" in named:
                tasks = sample_tasks(n, seed=seed)
            else:
                self._sampler.reset(seed=seed)
                tasks = sample_tasks(n)
        tasks = [_json_value(task) for task in tasks]
        if len(tasks) != n:
            raise ValueError(f"sample_tasks returned {len(tasks)} tasks, not {n}.")
        return tasks

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_sampler": None}


# --- The environments -------------------------------------------------------------------------------------


class LentVectorEnv(SyncVectorEnv):
    """Environments of a family, which gets them back when the batch is closed. Infos have the ends only.

    Args:
        columns: the environments, each with its task.
        give_back: called with them at ``close``, unless one of them raised.
    """

    def __init__(self, columns: list[Column], give_back: Callable[[list[Column]], None]) -> None:
        self._give_back = give_back
        self._sound = True
        super().__init__(
            [functools.partial(_itself, column) for column in columns], autoreset_mode=AutoresetMode.SAME_STEP
        )

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode in every column; see ``gymnasium.vector.SyncVectorEnv.reset``."""
        self._sound = False  # until it returns
        result: tuple[Any, dict[str, Any]] = super().reset(seed=seed, options=options)
        self._sound = True
        return result

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Move every column one step; see ``gymnasium.vector.SyncVectorEnv.step``. Rewards are float32."""
        self._sound = False
        observations, rewards, *ends_and_infos = super().step(actions)  # type: ignore[var-annotated]
        self._sound = True
        return observations, rewards.astype(np.float32), *ends_and_infos

    def close_extras(self, **kwargs: Any) -> None:
        """Part with the environments: this batch cannot be stepped any more."""
        columns, self.envs = getattr(self, "envs", []), []
        if self._sound:
            self._give_back(columns)
        else:
            _close(columns)


class Column(gymnasium.Wrapper[NDArray[np.float32], Any, Any, Any]):
    """One environment as the policy meets it: vectors, clipped actions, no infos, and its task at every reset.

    Args:
        env: with a time limit.
        observation_space, action_space: of the policy, see ``_vector_space`` and ``_action_space``.
        assign: called with the environment and the task before every reset.
        again: after it, too, in case that resetting put something else there.

    Attributes:
        task: what is played from the next reset on.
    """

    task: Task

    def __init__(
        self,
        env: gymnasium.Env[Any, Any],
        observation_space: gymnasium.Space[Any],
        action_space: gymnasium.Space[Any],
        assign: Callable[[gymnasium.Env[Any, Any], Task], None],
        *,
        again: bool,
    ) -> None:
        super().__init__(env)
        self._vector = _vector_of(env.observation_space)
        self._action = _action_of(env.action_space)
        self.observation_space = observation_space
        self.action_space = action_space
        self.metadata = dict(env.metadata)  # a copy: the vector environment writes into it
        self._assign = assign
        self._again = again

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Apply the task and start an episode."""
        self._assign(self.env, self.task)
        observation, _ = self.env.reset(seed=seed, options=options)
        if self._again:
            self._assign(self.env, self.task)
        return self._vector(observation), {}

    def step(self, action: Any) -> tuple[NDArray[np.float32], Any, bool, bool, dict[str, Any]]:
        """Take a step with an action of the policy's."""
        observation, reward, terminated, truncated, _ = self.env.step(self._action(action))
        return self._vector(observation), reward, terminated, truncated, {}


def policy_env(env: gymnasium.Env[Any, Any], horizon: int | None = None) -> tuple[Column, int]:
    """An environment as a policy meets it, whatever its task is, and the most steps of its episodes.

    Args:
        env: of any supported spaces, with or without a time limit.
        horizon: most steps of an episode; None: the environment's own.

    Raises:
        ValueError: for a space that is not supported, or a horizon that is missing; one sentence.
    """
    name = type(env.unwrapped).__name__
    limit = _checked_horizon(name, _own_horizon(name, env) if horizon is None else horizon)
    spaces = _vector_space(name, env.observation_space), _action_space(name, env.action_space)
    limited: gymnasium.Env[Any, Any] = gymnasium.wrappers.TimeLimit(env, limit)
    column = Column(limited, *spaces, lambda env, task: None, again=False)
    column.task = {}
    return column, limit


def _set_task(env: gymnasium.Env[Any, Any], task: Task) -> None:
    env.get_wrapper_attr("set_task")(copy.deepcopy(task))  # columns share the task, and an environment may change it


def _itself(column: Column) -> Column:
    return column


def _close(columns: Sequence[Column]) -> None:
    for column in columns:
        column.close()


def _played(column: Column, task: Task, seed: int) -> NDArray[Any]:
    """All that a column returns in ``PROBE_STEPS`` steps of random actions, in one row."""
    column.task = task
    actions = copy.deepcopy(column.action_space)
    actions.seed(seed)
    seen = [column.reset(seed=seed)[0]]
    for _ in range(PROBE_STEPS):
        observation, reward, terminated, truncated, _ = column.step(actions.sample())
        seen += [observation, np.array([reward, terminated, truncated], np.float64)]
        if terminated or truncated:
            seen.append(column.reset()[0])
    return np.concatenate(seen)


# --- Spaces -----------------------------------------------------------------------------------------------


def _vector_space(name: str, space: gymnasium.Space[Any]) -> Box:
    """The space of float32 vectors that stands for an environment's observations."""
    if isinstance(space, Box):
        if len(space.shape) != 1 and math.prod(space.shape) > MAX_FLAT:
            raise ValueError(
                f"{name}: observations of the shape {space.shape} are too large for a vector of up to {MAX_FLAT} "
                "numbers: reduce such images to features in a wrapper."
            )
        return _float32_box(space)
    if isinstance(space, Discrete | MultiDiscrete):
        length = sum(_sizes(space).tolist())
        if length > MAX_FLAT:
            raise ValueError(f"{name}: {length} values are too many for one-hot observations ({MAX_FLAT} at most).")
        return Box(0.0, 1.0, (length,), np.float32)
    raise ValueError(f"{name}: observations must be a Box, Discrete or MultiDiscrete, not {space}.")


def _vector_of(space: gymnasium.Space[Any]) -> Callable[[Any], NDArray[np.float32]]:
    """What turns an environment's observation into a new vector."""
    if not isinstance(space, Discrete | MultiDiscrete):
        return lambda observation: np.array(observation, np.float32).ravel()
    sizes = _sizes(space)
    length = int(sizes.sum())
    first = np.cumsum(sizes) - sizes - np.asarray(space.start).ravel()

    def one_hot(observation: Any) -> NDArray[np.float32]:
        vector = np.zeros(length, np.float32)
        vector[first + np.asarray(observation).ravel()] = 1.0
        return vector

    return one_hot


def _sizes(space: Discrete[Any] | MultiDiscrete) -> NDArray[Any]:
    return np.ravel(space.n if isinstance(space, Discrete) else space.nvec)


def _action_space(name: str, space: gymnasium.Space[Any]) -> Box | Discrete[np.int64]:
    """The space of the policy's actions that stands for an environment's."""
    if isinstance(space, Discrete):
        return Discrete(int(space.n))
    if isinstance(space, Box) and len(space.shape) == 1 and space.dtype is not None and space.dtype.kind == "f":
        return _float32_box(space)
    raise ValueError(f"{name}: actions must be Discrete or a Box of real numbers with one axis, not {space}.")


def _action_of(space: Any) -> Callable[[NDArray[Any]], Any]:
    """What turns a policy's action into an environment's."""
    if isinstance(space, Discrete):
        start = int(space.start)
        return lambda action: int(action) + start
    low, high, kind = space.low, space.high, space.dtype
    return lambda action: np.clip(action, low, high).astype(kind, copy=False)


def _float32_box(space: Box) -> Box:
    with np.errstate(over="ignore"):  # float64's largest number, often written where there is no bound
        return Box(space.low.astype(np.float32).ravel(), space.high.astype(np.float32).ravel(), dtype=np.float32)


# --- Names and numbers of a gymnasium environment -----------------------------------------------------------


def _with_attributes(creator: Any, attributes: Mapping[str, float]) -> Callable[..., Any]:
    """A function that makes an instance of a class in which some attributes have other values from the start.

    While the constructor runs, whatever it assigns to these attributes is replaced: what it derives from them is
    derived from the new values. The instance is then of the class itself.
    """

    def assign(self: Any, name: str, value: Any) -> None:
        creator.__setattr__(self, name, attributes.get(name, value))

    constants = {key: value for key, value in attributes.items() if _is_number(getattr(creator, key, None))}
    preset = type(creator)(creator.__name__, (creator,), {**constants, "__setattr__": assign})

    def create(**arguments: Any) -> Any:
        env = preset(**arguments)
        env.__class__ = creator
        return env

    return create


def _check_number(env: Any, env_id: str, key: str, arguments: Sequence[str]) -> None:
    """Raise ValueError, with the nearest name, unless the attribute or path `key` of `env` is a number."""
    owner, path = env, env_id
    *parents, last = key.split(".")
    for part in parents:
        owner = lookup(_parts(owner), part, f"{path} attribute")
        path = f"{path}.{part}"
    valid = [part for part, value in _parts(owner).items() if _is_number(value)]
    lookup(dict.fromkeys([*valid, *(() if parents else arguments)]), last, f"numeric {path} attribute")


def _parts(owner: Any) -> dict[str, Any]:
    """What a name in a path can be after this object: its indices, or its public attributes that are no methods."""
    if isinstance(owner, np.ndarray | list):
        return {str(index): value for index, value in enumerate(owner)}
    parts = {}
    for part in set(dir(owner)) - set(dir(gymnasium.Env)):
        with contextlib.suppress(Exception):  # a property may be unable to say what it is
            value = getattr(owner, part)
            if not part.startswith("_") and not callable(value):
                parts[part] = value
    return parts


def _set_number(env: Any, key: str, value: float) -> None:
    *parents, last = key.split(".")
    for part in parents:
        env = env[int(part)] if part.isdigit() else getattr(env, part)
    if last.isdigit():
        env[int(last)] = value
    else:
        setattr(env, last, value)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _checked_range(name: str, key: str, value: Any) -> tuple[float, float]:
    pair = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
    if len(pair) != 2 or not all(_is_number(x) and math.isfinite(x) for x in pair) or pair[0] > pair[1]:
        raise ValueError(
            f"{name}: the range of {key!r} must be [low, high], finite numbers with low <= high, not {value!r}."
        )
    return float(pair[0]), float(pair[1])


def _checked_horizon(name: str, horizon: Any) -> int:
    if not isinstance(horizon, int | np.integer) or isinstance(horizon, bool) or horizon < 1:
        raise ValueError(f"{name}: the horizon must be a whole number of steps, 1 or more, not {horizon!r}.")
    return int(horizon)


def _own_horizon(name: str, env: gymnasium.Env[Any, Any]) -> Any:
    """The time limit that an environment has."""
    if env.spec is not None and env.spec.max_episode_steps is not None:
        return env.spec.max_episode_steps
    for attribute in ("horizon", "max_episode_length"):  # the second is POPGym's
        if env.has_wrapper_attr(attribute):
            return env.get_wrapper_attr(attribute)
    raise ValueError(f"{name} has no time limit of its own: give a horizon, the most steps of an episode.")


# --- Modules and tasks of the user's ------------------------------------------------------------------------


def _load(name: str, directory: str) -> Any:
    """What ``module:attribute`` names."""
    module, _, path = name.partition(":")
    entry = _import(module, directory)
    for part in path.split("."):
        if not hasattr(entry, part):
            lookup(dict.fromkeys(_offered(entry)), part, f"attribute of {module}")
        entry = getattr(entry, part)
    return entry


def _offered(owner: Any) -> list[str]:
    """Names of the classes and functions that a module defines itself, and of its families."""
    home = getattr(owner, "__name__", None)
    return [
        name
        for name, value in vars(owner).items()
        if isinstance(value, TaskDistribution)
        or (callable(value) and getattr(value, "__module__", None) == home and not name.startswith("_"))
    ]


def _import(module: str, directory: str) -> types.ModuleType:
    """Import from the Python path, else from a directory, which then joins the path."""
    top = module.partition(".")[0]
    if top not in sys.modules and importlib.util.find_spec(top) is None:
        if importlib.machinery.PathFinder.find_spec(top, [directory]) is None:
            raise ValueError(f"There is no module {top!r}, neither installed nor in {directory}.")
        sys.path.append(directory)
    try:
        return importlib.import_module(module)
    except Exception as error:
        raise ValueError(f"{module} cannot be imported: {_one_line(error)}") from error


def _call(name: str, entry: Any) -> Any:
    """Make what a class or a function without arguments makes."""
    if not callable(entry):
        raise ValueError(f"{name} must be a class or a function without arguments, not {entry!r}.")
    try:
        return entry()
    except Exception as error:
        raise ValueError(f"{name} cannot be made: {_one_line(error)}") from error


def _argument_names(function: Any) -> set[str]:
    try:
        return set(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # not written in Python
        return set()


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


def _one_line(error: Exception) -> str:
    """What an exception says, in a line."""
    message = " ".join(str(error).split())
    known = isinstance(error, gymnasium.error.Error | ValueError)
    return message if known else f"{type(error).__name__}: {message}"
