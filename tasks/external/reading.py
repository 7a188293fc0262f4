"""What an environment returned, checked against what its spaces and gymnasium's interface say."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from numpy.typing import NDArray

from ssm_metarl.checks import brief

OLD_INTERFACE = "as before Gym 0.26: wrap it in shimmy.GymV21CompatibilityV0 (pip install 'shimmy[gym-v21]')"

CONVERTER = "gymnasium.utils.step_api_compatibility.convert_to_terminated_truncated_step_api"


class NotInSpace(Exception):
    """An observation that its space does not have.

    Args:
        space: of it, or of the part of it that is wrong.
        value: what was there.
        path: place of that part in the observation.
    """

    def __init__(self, space: Any, value: Any, path: str = "") -> None:
        super().__init__(space, value, path)
        self.space, self.value, self.path = space, value, path

    def __str__(self) -> str:
        return f"observation{self.path} must be in {self.space}, not {shown(self.value)}"


def shown(value: Any) -> str:
    """A value on one line of bearable length."""
    array = f"an array of the shape {value.shape}, " if isinstance(value, np.ndarray) and value.ndim else ""
    return array + brief(value.tolist() if isinstance(value, np.ndarray | np.generic) else value)


def reader(space: Any) -> Callable[[Any], Any]:
    """What turns an observation into a valid one for `gymnasium.spaces.utils.flatten`, with new float32 arrays of
    Boxes; it raises `NotInSpace`."""
    if isinstance(space, Dict):
        return _dict_reader(space)
    if isinstance(space, Tuple):
        return _tuple_reader(space)
    if isinstance(space, Discrete):
        return _discrete_reader(space)
    if isinstance(space, Box):
        return _box_reader(space)
    return _integers_reader(space)


def _dict_reader(space: Dict) -> Callable[[Any], dict[str, Any]]:
    readers = {key: reader(part) for key, part in space.spaces.items()}

    def read(value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping) or value.keys() != readers.keys():
            raise NotInSpace(space, value)
        return {key: _read_part(part, value[key], key) for key, part in readers.items()}

    return read


def _tuple_reader(space: Tuple) -> Callable[[Any], tuple[Any, ...]]:
    readers = [reader(part) for part in space.spaces]

    def read(value: Any) -> tuple[Any, ...]:
        several = isinstance(value, tuple | list) or (isinstance(value, np.ndarray) and value.ndim > 0)
        if not several or len(value) != len(readers):
            raise NotInSpace(space, value)
        return tuple(_read_part(part, each, i) for i, (part, each) in enumerate(zip(readers, value, strict=True)))

    return read


def _read_part(read: Callable[[Any], Any], value: Any, key: str | int) -> Any:
    try:
        return read(value)
    except NotInSpace as error:
        raise NotInSpace(error.space, error.value, f"[{key!r}]{error.path}") from None


def _discrete_reader(space: Discrete[Any]) -> Callable[[Any], int]:
    first, end = int(space.start), int(space.start) + int(space.n)

    def read(value: Any) -> int:
        array = _array(space, value, "biu")
        if array.shape != () or not first <= int(array) < end:
            raise NotInSpace(space, value)
        return int(array)

    return read


def _integers_reader(space: MultiDiscrete | MultiBinary) -> Callable[[Any], NDArray[np.int64]]:
    if isinstance(space, MultiDiscrete):
        first = space.start.astype(np.int64)
        last = first + space.nvec.astype(np.int64) - 1
    else:
        first, last = np.zeros(space.shape, np.int64), np.ones(space.shape, np.int64)

    def read(value: Any) -> NDArray[np.int64]:
        array = _array(space, value, "biuf")
        if array.shape != first.shape or not ((array >= first) & (array <= last)).all():
            raise NotInSpace(space, value)
        integers = array.astype(np.int64)
        if array.dtype.kind == "f" and (integers != array).any():
            raise NotInSpace(space, value)
        return integers

    return read


def _box_reader(space: Box) -> Callable[[Any], NDArray[np.float32]]:
    shape = space.shape
    long = _long_axes(shape)

    def read(value: Any) -> NDArray[np.float32]:
        array = _array(space, value, "biuf")
        if array.shape != shape:
            if _long_axes(array.shape) != long:
                raise NotInSpace(space, value)
            array = array.reshape(shape)
        return np.array(array, np.float32)

    return read


def _long_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _array(space: Any, value: Any, kinds: str) -> NDArray[Any]:
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):  # rows of different lengths
        raise NotInSpace(space, value) from None
    if array.dtype.kind not in kinds:
        raise NotInSpace(space, value)
    return array


def reset_observation(result: Any) -> Any:
    """The observation of what `reset` returned.

    Raises:
        ValueError: it is not a pair of observation and info; half a sentence.
    """
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[1], Mapping | None):
        raise ValueError(f"reset must return observation and info, not {shown(result)}, {OLD_INTERFACE}")
    return result[0]


def step_results(result: Any) -> tuple[Any, float, bool, bool]:
    """Observation, reward, terminated and truncated of what `step` returned.

    Raises:
        ValueError: there are not five, the reward is no number, or an end is no flag; half a sentence.
    """
    if not isinstance(result, tuple | list) or len(result) != 5:
        what = f"{len(result)} results" if isinstance(result, tuple | list) else shown(result)
        if what == "4 results":
            what += f", {OLD_INTERFACE}, or convert the results with {CONVERTER}"
        raise ValueError(f"step must return observation, reward, terminated, truncated and info, not {what}")
    observation, reward, terminated, truncated, _ = result
    return observation, _number(reward), _flag("terminated", terminated), _flag("truncated", truncated)


def _number(reward: Any) -> float:
    """A reward, which may also be an array of one number."""
    only = reward
    if not isinstance(reward, Real):
        array = np.asarray(reward, None if hasattr(reward, "__array__") else object)
        only = array.ravel().tolist()[0] if array.size == 1 else None
    if isinstance(only, Real):
        with contextlib.suppress(OverflowError):  # of an integer
            return float(only)
    raise ValueError(f"the reward must be a number, not {shown(reward)}")


def _flag(name: str, value: Any) -> bool:
    if isinstance(value, bool | np.bool_):
        return bool(value)
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "biuf":
        raise ValueError(f"{name} must be true or false, not {shown(value)}")
    return bool(array.ravel()[0])


def check_interface(name: str, env: gymnasium.Env[Any, Any]) -> None:
    """Refuse an environment without spaces of gymnasium's, or whose `reset` takes no seed.

    Raises:
        ValueError: with one sentence.
    """
    for which in ("observation_space", "action_space"):
        space = getattr(env, which, None)
        if not isinstance(space, gymnasium.Space):
            raise ValueError(f"{name}: {which} must be a gymnasium.Space, not {shown(space)}.")
    try:
        parameters = inspect.signature(env.reset).parameters.values()
    except (TypeError, ValueError):  # not written in Python
        return
    if not any(each.name == "seed" or each.kind is each.VAR_KEYWORD for each in parameters):
        raise ValueError(
            f"{name}: reset takes no seed, {OLD_INTERFACE}, or write reset(self, *, seed=None, options=None)."
        )
