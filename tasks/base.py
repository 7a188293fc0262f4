"""What every family of tasks shares: the interface, the registry and the batched environment.

From a name to experience; the trainer writes the first two lines, a rollout worker the others::

    distribution = make("navigation-2d")
    tasks = distribution.sample(20, rng, split="train")  # JSON values: sent to workers, logged with the data
    envs = distribution.make_vector_env(tasks, columns=20)  # 400 environments, index = task * 20 + column
    observations, _ = envs.reset(seed=seeds)  # one seed a column
    observations, rewards, terminated, truncated, infos = envs.step(actions)
"""

from __future__ import annotations

import abc
import difflib
import functools
import importlib
import inspect
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

import gymnasium
import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.utils.seeding import np_random
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

Task = dict[str, Any]
"""Parameters of one task: JSON values only."""

Step = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]
"""Observations [N, O], rewards [N], terminated [N], truncated [N], infos."""

Value = TypeVar("Value")


# --- The interface ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReferenceReturns:
    """Undiscounted episode returns on the training tasks between which metrics are normalised.

    Attributes:
        random: mean over tasks and episodes of a policy that has learned nothing.
        random_sd: standard deviation of that policy's return from episode to episode, over tasks and chance.
        oracle: mean of the best player, one that knows the task; None where no best is known.
    """

    random: float
    random_sd: float
    oracle: float | None


class TaskDistribution(abc.ABC):
    """A family of tasks: draws task parameters and builds the environments that play them.

    The trainer makes one by name and ships it to its workers: it must be picklable and hold no environment.

    Attributes:
        name: name in the registry.
        horizon: most steps of an episode; an episode of that length is truncated.
        observation_space, action_space: spaces of one environment.
        splits: what ``sample`` takes. `train`, `validation` and `test` are one distribution, kept apart by
            the seeds of the callers; `shifted` and `shifted-test` lie outside of it and of each other.
        enumerable: the family is finite, so that the splits share tasks and differ in seeds only.
        reference: the returns of a random and of the best player.
        recommended: training options that learn on this family, where they differ from the defaults. A family that
            nobody tuned can have inputs and rewards of any size, which would saturate a fresh policy's units.
        in_context: options that the algorithm "rl2" starts from on this family.
    """

    name: str
    horizon: int
    observation_space: gymnasium.Space[Any]
    action_space: gymnasium.Space[Any]
    splits: tuple[str, ...]
    enumerable: bool = False
    reference: ReferenceReturns
    recommended: Mapping[str, Any] = MappingProxyType({"normalize_observations": True, "scale_rewards": True})
    in_context: Mapping[str, Any] = recommended

    @abc.abstractmethod
    def sample(self, n: int, rng: np.random.Generator, split: str = "train") -> list[Task]:
        """Draw the tasks of a meta-batch or of an evaluation; the trainer and the evaluator call this.

        Args:
            n: how many, 0 or more.
            rng: the only source of chance: equal generators give equal tasks.
            split: one of ``splits``.

        Returns:
            n tasks.

        Raises:
            ValueError: there is no such split; the sentence lists the valid ones.
        """

    @abc.abstractmethod
    def make_vector_env(self, tasks: Sequence[Task], columns: int) -> VectorEnv[Any, Any, Any]:
        """Build the environments of M tasks, K columns each; a rollout worker calls this for every batch.

        Args:
            tasks: M tasks, as from ``sample``.
            columns: K, the episodes of a task that run side by side.

        Returns:
            M*K environments with ``AutoresetMode.SAME_STEP``; number m*K + k is column k of task m. ``reset``
            takes a list of M*K seeds; ``step`` takes [M*K, A] float32 actions, which it clips itself, or
            [M*K] int64. What a column experiences depends on its task, seed and actions alone.

        Raises:
            ValueError: a task's parameters are missing, unknown or impossible, or the batch is empty.
        """


# --- The registry -----------------------------------------------------------------------------------------

_FACTORIES: dict[str, Callable[..., TaskDistribution]] = {}
_PREFIXES: dict[str, Callable[..., TaskDistribution]] = {}


def register_prefix(prefix: str, factory: Callable[..., TaskDistribution]) -> None:
    """Let ``make`` call `factory` with the rest of a name that begins with `prefix`.

    Args:
        prefix: ends with a colon; ":" itself is for all other names with a colon, which are passed whole.
        factory: its other arguments are the family's options, and the task ranges if it has an argument ``ranges``.
    """
    _PREFIXES[prefix] = factory


def register(name: str, factory: Callable[..., TaskDistribution]) -> None:
    """Let ``make(name, options)`` call `factory`; a module does this for its own family when it is imported.

    Registering a name again replaces its factory. The registry belongs to the process: workers receive a
    distribution, not its name.
    """
    _FACTORIES[name] = factory


def names() -> tuple[str, ...]:
    """All registered names, sorted."""
    return tuple(sorted(_FACTORIES))


def make(name: str, options: Mapping[str, Any] = {}, ranges: Mapping[str, Any] = {}) -> TaskDistribution:
    """Make a new instance of the family registered under `name`, or of one that a name with a colon describes.

    Args:
        name: registered; or ``gym:ID``, ``module:attribute``, see ``tasks.adapter``.
        options: keyword arguments of the family.
        ranges: for ``gym:ID``, the attributes that differ between tasks.

    Raises:
        ValueError: nothing has that name (the sentence gives the nearest and lists all), or there is no such option.
    """
    if isinstance(name, str) and ":" in name and name not in _FACTORIES:
        prefix = name.partition(":")[0] + ":"
        if prefix in _PREFIXES:
            factory: Callable[..., TaskDistribution] = functools.partial(_PREFIXES[prefix], name.removeprefix(prefix))
        else:
            factory = functools.partial(_PREFIXES[":"], name)
    else:
        factory = lookup(_FACTORIES, name, "task family")
    known = dict(inspect.signature(factory).parameters) if options or ranges else {}
    if ranges and "ranges" not in known:
        raise ValueError(f"Only gym:ID takes task ranges, not {name!r}, whose options are its own.")
    known.pop("ranges", None)
    for key in options:
        lookup(known, key, f"option of {name!r}")
    return factory(**options, **({"ranges": ranges} if ranges else {}))


def lookup(entries: Mapping[str, Value], key: str, noun: str) -> Value:
    """Take an entry by a name that a person may have mistyped.

    Args:
        entries: what can be asked for, by name.
        key: what was asked for.
        noun: what an entry is called in the error's sentence.

    Raises:
        ValueError: there is no such entry; the sentence gives the nearest name and lists all.
    """
    try:
        return entries[key]
    except (KeyError, TypeError):
        raise ValueError(f"There is {_unknown(noun, key, entries)}") from None


def _unknown(noun: str, key: object, valid: Iterable[str]) -> str:
    """The rest of a sentence that begins with "There is": which name is wrong and which are right."""
    valid = sorted(valid)
    nearest = difflib.get_close_matches(str(key).lower(), valid, n=1, cutoff=0.5)
    hint = f", did you mean {nearest[0]!r}?" if nearest else ""
    return f"no {noun} {key!r}{hint} (valid: {', '.join(valid)})."


def load_extra(module: str, title: str, family: str) -> Any:
    """The module of an extra with the module's name; loaded when a family is made, so that others do without it.

    Args:
        module: its name.
        title: what people call it, for the error.
        family: who needs it, for the error.

    Raises:
        ValueError: it is not installed; the sentence says how to get it.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(f"{family} needs {title}: pip install 'ssm-metarl[{module}]'") from None


# --- Options and actions ----------------------------------------------------------------------------------

SPLITS = ("train", "validation", "test")
"""Of a family that offers no tasks outside its training range."""


def check_option(name: str, value: object, least: int) -> int:
    """Return an option of a family that must be a whole number of at least `least`.

    Raises:
        ValueError: it is anything else.
    """
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of {least} or more, not {value!r}.")
    return int(value)


def check_actions(actions: NDArray[Any], count: int, family: str) -> NDArray[np.integer[Any]]:
    """Return actions [N] that must be whole numbers from 0 to `count` - 1: an index below 0 would not fail by itself.

    Raises:
        ValueError: one is anything else.
    """
    if not np.issubdtype(actions.dtype, np.integer) or actions.min() < 0 or actions.max() >= count:
        raise ValueError(f"An action of {family} must be a whole number from 0 to {count - 1}.")
    return actions


# --- Task parameters --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameter:
    """The values that one parameter of a task can take at all, whatever the splits draw.

    Attributes:
        low, high: least and greatest value, both included.
        size: None for a number, n for a list of n numbers.
        choices: the only valid values where these are few, else empty.
    """

    low: float
    high: float
    size: int | None = None
    choices: tuple[float, ...] = ()

    def allows(self, value: object) -> bool:
        """Whether `value` is one number, or a list of `size` of them, and every number is in the range."""
        if self.size is None:
            return self._allows_number(value)
        return isinstance(value, list) and len(value) == self.size and all(map(self._allows_number, value))

    def _allows_number(self, value: object) -> bool:
        return (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and self.low <= value <= self.high  # false for NaN
            and (not self.choices or value in self.choices)
        )

    def __str__(self) -> str:
        if self.choices:
            return " or ".join(f"{choice:g}" for choice in self.choices)
        number = "a number" if self.size is None else f"a list of {self.size} numbers"
        return f"{number} in [{self.low:g}, {self.high:g}]"


def stack_parameters(
    tasks: Sequence[Task], parameters: Mapping[str, Parameter], columns: int
) -> dict[str, NDArray[np.float64]]:
    """Check the parameters of M tasks and lay them out for M*K environments; ``make_vector_env`` calls this.

    Args:
        tasks: M tasks, each with exactly the keys of `parameters`.
        parameters: what each key may be.
        columns: K.

    Returns:
        For each key an array [M*K], or [M*K, size], float64, a task's value repeated K times.

    Raises:
        ValueError: there is no task or no column, or a key is missing, unknown or has an impossible value.
    """
    if not tasks or columns < 1:
        raise ValueError(f"At least one task and one column are needed, not {len(tasks)} and {columns}.")
    for number, task in enumerate(tasks):
        for key in task:
            if key not in parameters:
                raise ValueError(f"Task {number}: there is {_unknown('parameter', key, parameters)}")
        for key, parameter in parameters.items():
            if key not in task:
                raise ValueError(f"Task {number} lacks the parameter {key!r}, which is {parameter}.")
            if not parameter.allows(task[key]):
                raise ValueError(f"Task {number}: {key!r} must be {parameter}, not {task[key]!r}.")
    return {
        key: np.repeat(np.asarray([task[key] for task in tasks], dtype=np.float64), columns, axis=0)
        for key in parameters
    }


# --- The batched environment ------------------------------------------------------------------------------


class BatchedEnv(VectorEnv[NDArray[np.float32], NDArray[Any], NDArray[Any]], abc.ABC):
    """N environments whose state is a few arrays, stepped together; native families derive from it.

    It keeps what is the same everywhere: seeds, the horizon, ends and autoreset. A family adds its dynamics
    in ``_start``, ``_advance`` and ``_observe``, which must treat columns one by one (elementwise operations
    only), so that a column's experience is the same bits whatever runs beside it.

    Flags and infos are those of gymnasium's ``SyncVectorEnv`` in ``AutoresetMode.SAME_STEP``: the step that
    ends an episode returns its reward and flags with the next episode's first observation, and its last
    observation as ``infos["final_obs"][column]``, where ``infos["_final_obs"][column]`` is true. Where
    nothing ended, infos are empty. All arrays returned are the caller's to keep and to change.
    """

    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012 (gymnasium's type)

    def __init__(
        self,
        observation_space: gymnasium.Space[Any],
        action_space: gymnasium.Space[Any],
        num_envs: int,
        horizon: int,
    ) -> None:
        """Set up `num_envs` environments with these spaces (of one) and up to `horizon` steps an episode."""
        self.num_envs = num_envs
        self.single_observation_space = observation_space
        self.single_action_space = action_space
        self._actions_shape = (num_envs, *(action_space.shape or ()))
        self._horizon = horizon
        # Columns share one clock. A column is truncated at its deadline; before the next one no step looks.
        self._clock: int | None = None
        self._deadlines = np.zeros(num_envs, dtype=np.int64)
        self._next_deadline = 0
        self._seeds: list[int | None] = [None] * num_envs
        self._generators: list[np.random.Generator | None] = [None] * num_envs

    # Made when asked for: a rollout worker never asks, and making one takes as long as many steps.

    @functools.cached_property
    def observation_space(self) -> gymnasium.Space[Any]:  # type: ignore[override]
        """Space of the observations of all columns."""
        return batch_space(self.single_observation_space, self.num_envs)

    @functools.cached_property
    def action_space(self) -> gymnasium.Space[Any]:  # type: ignore[override]
        """Space of the actions of all columns."""
        return batch_space(self.single_action_space, self.num_envs)

    @abc.abstractmethod
    def _start(self, columns: NDArray[np.intp]) -> None:
        """Put these columns at the start of an episode; chance comes from ``_generator(column)``."""

    @abc.abstractmethod
    def _advance(self, actions: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Move every column one step; return new arrays: rewards [N] float32 and terminated [N] bool."""

    @abc.abstractmethod
    def _observe(self) -> NDArray[np.float32]:
        """Return the present observations in a new array [N, O] float32."""

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Start an episode in every column.

        Args:
            seed: N seeds; or one, for seed, seed + 1, ...; None, here or for a column, goes on with the
                column's present generator.
            options: none are known.

        Returns:
            Observations [N, O] float32 and an empty dict.

        Raises:
            ValueError: wrong number of seeds, a negative seed, or options.
        """
        if options:
            raise ValueError(f"{type(self).__name__} has no reset options, not {', '.join(options)}.")
        for column, column_seed in enumerate(_column_seeds(seed, self.num_envs)):
            if column_seed is not None:
                self._seeds[column] = column_seed
                self._generators[column] = None
        self._clock = 0
        self._begin(np.arange(self.num_envs))
        return self._observe(), {}

    def step(self, actions: NDArray[Any]) -> Step:
        """Move every column one step and start the next episode where one ended.

        Args:
            actions: [N, A] float32, or [N] integers.

        Returns:
            Observations [N, O] float32, rewards [N] float32, terminated and truncated [N] bool, and the infos
            described above. At the horizon both flags can be true.

        Raises:
            ResetNeeded: before the first ``reset``.
            ValueError: actions of another shape, or that a discrete family does not have.
        """
        if self._clock is None:
            raise ResetNeeded("Call reset before step.")
        actions = np.asarray(actions)
        if actions.shape != self._actions_shape:
            raise ValueError(f"Actions must have the shape {self._actions_shape}, not {actions.shape}.")
        rewards, terminated = self._advance(actions)
        observations = self._observe()
        self._clock += 1
        if self._clock < self._next_deadline:
            truncated = np.zeros(self.num_envs, dtype=np.bool_)
        else:
            truncated = self._deadlines <= self._clock
        ended = terminated | truncated
        if not np.count_nonzero(ended):
            return observations, rewards, terminated, truncated, {}
        columns = np.flatnonzero(ended)
        infos = _final_infos(observations, ended, columns)
        self._begin(columns)
        return self._observe(), rewards, terminated, truncated, infos

    def _begin(self, columns: NDArray[np.intp]) -> None:
        """Start an episode in these columns, at the present time."""
        assert self._clock is not None
        self._start(columns)
        self._deadlines[columns] = self._clock + self._horizon
        self._next_deadline = int(self._deadlines.min())

    def _generator(self, column: int) -> np.random.Generator:
        """The column's own generator, made when a start first draws from it: many families never do."""
        generator = self._generators[column]
        if generator is None:
            generator = self._generators[column] = np_random(self._seeds[column])[0]
        return generator


def _column_seeds(seed: int | Sequence[int | None] | None, num_envs: int) -> Sequence[int | None]:
    """One seed a column, as gymnasium's vector environments read ``reset(seed=...)``."""
    if seed is None:
        return [None] * num_envs
    if isinstance(seed, int | np.integer):
        seed = range(int(seed), int(seed) + num_envs)
    seeds = [None if column_seed is None else operator.index(column_seed) for column_seed in seed]
    if len(seeds) != num_envs:
        raise ValueError(f"{num_envs} environments need {num_envs} seeds, not {len(seeds)}.")
    if any(column_seed is not None and column_seed < 0 for column_seed in seeds):
        raise ValueError("A seed must be 0 or more.")
    return seeds


def _final_infos(
    observations: NDArray[np.float32], ended: NDArray[np.bool_], columns: NDArray[np.intp]
) -> dict[str, Any]:
    """The infos of gymnasium's ``SyncVectorEnv`` where these columns ended and no environment has its own."""
    final_obs = np.full(len(ended), None, dtype=object)
    for column in columns.tolist():
        final_obs[column] = observations[column]
    return {"final_obs": final_obs, "_final_obs": ended, "final_info": {}, "_final_info": ended.copy()}
