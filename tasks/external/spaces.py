"""Spaces of an environment, and the vectors and actions of a policy that stand for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from gymnasium.spaces.utils import flatten, flatten_space
from numpy.typing import NDArray

from ssm_metarl.tasks.external.reading import reader

MAX_FLAT = 4096
"""Most numbers of a Box with several axes: beyond is an image, which needs convolutions."""

MAX_ONE_HOT = 1024
"""Most values of discrete observations: beyond is a hash."""

MAX_VALUES = 256
"""Most integers that a number of an action can be, a logit each."""

MAX_LOGITS = 4096
"""Most logits of several integers together."""


def vector_space(name: str, space: gymnasium.Space[Any]) -> Box:
    """The space of float32 vectors that stands for an environment's observations.

    Raises:
        ValueError: it has none; one sentence.
    """
    leaves = _leaves("observations", space)
    for path, leaf in leaves:
        _check_leaf(name, path, leaf)
    values = sum(int(np.sum(_sizes(leaf))) for _, leaf in leaves if isinstance(leaf, Discrete | MultiDiscrete))
    if values > MAX_ONE_HOT:
        raise ValueError(f"{name}: {values} values are too many for one-hot observations ({MAX_ONE_HOT} at most).")
    if not leaves or not sum(math.prod(leaf.shape or ()) for _, leaf in leaves):
        raise ValueError(f"{name}: observations of {space} hold no number.")
    flat = flatten_space(_with_float32_boxes(space))
    assert isinstance(flat, Box)
    return _float32_box(flat)


def vector_of(space: gymnasium.Space[Any]) -> Callable[[Any], NDArray[np.float32]]:
    """What turns an environment's observation into a new vector, with gymnasium's `flatten`; it raises `NotInSpace`."""
    read = reader(space)
    if isinstance(space, Box):
        return lambda observation: read(observation).ravel()
    same = _with_float32_boxes(space)
    return lambda observation: np.asarray(flatten(same, read(observation)), np.float32)


def _leaves(path: str, space: Any) -> list[tuple[str, Any]]:
    """The spaces that an observation is put together from, each with its place."""
    if isinstance(space, Dict):
        parts = [(f"{path}[{key!r}]", part) for key, part in space.spaces.items()]
    elif isinstance(space, Tuple):
        parts = [(f"{path}[{number}]", part) for number, part in enumerate(space.spaces)]
    else:
        return [(path, space)]
    return [leaf for place, part in parts for leaf in _leaves(place, part)]


def _check_leaf(name: str, path: str, space: Any) -> None:
    if not isinstance(space, Box | Discrete | MultiDiscrete | MultiBinary):
        raise ValueError(
            f"{name}: {path} must be a Box, Discrete, MultiDiscrete or MultiBinary, or a Dict or Tuple of such, "
            f"not {space}: a vector of fixed length cannot hold it; turn it into numbers in a wrapper."
        )
    if isinstance(space, Box) and len(space.shape) > 1 and math.prod(space.shape) > MAX_FLAT:
        raise ValueError(
            f"{name}: {path} of the shape {space.shape} are too large for a vector of up to {MAX_FLAT} numbers, and "
            "there is no encoder for images, because convolutions in the workers would take most of a run's time: "
            "reduce them with gymnasium.wrappers.GrayscaleObservation and ResizeObservation, or to features in a "
            "wrapper of your own."
        )


def _with_float32_boxes(space: Any) -> Any:
    """The same space with Boxes of float32: flattening casts to a Box's own type, which would cut numbers off."""
    if isinstance(space, Dict):
        return Dict({key: _with_float32_boxes(part) for key, part in space.spaces.items()})
    if isinstance(space, Tuple):
        return Tuple([_with_float32_boxes(part) for part in space.spaces])
    return _float32_box(space) if isinstance(space, Box) else space


def _sizes(space: Discrete[Any] | MultiDiscrete) -> NDArray[Any]:
    return np.ravel(space.n if isinstance(space, Discrete) else space.nvec)


def action_space(name: str, space: gymnasium.Space[Any]) -> Box | Discrete[np.int64] | MultiDiscrete:
    """The space of the policy's actions that stands for an environment's: one integer, several integers, or numbers.

    Raises:
        ValueError: it has none; one sentence.
    """
    if isinstance(space, Discrete):
        return Discrete(int(space.n))
    if isinstance(space, Box) and space.dtype is not None and space.dtype.kind == "f" and space.low.size:
        flat = flatten_space(_float32_box(space))
        assert isinstance(flat, Box)
        return flat
    sizes = _integer_sizes(name, space)
    if sum(sizes) > MAX_LOGITS:
        raise ValueError(f"{name}: actions of {space} have {sum(sizes)} values, {MAX_LOGITS} at most are supported.")
    return MultiDiscrete(sizes)


def _integer_sizes(name: str, space: Any) -> list[int]:
    """Number of values of each integer of an action."""
    sizes: list[int] = []
    if isinstance(space, MultiDiscrete):
        sizes = np.ravel(space.nvec).tolist()
    elif isinstance(space, MultiBinary):
        sizes = [2] * math.prod(space.shape or ())
    elif isinstance(space, Box) and space.dtype is not None and space.dtype.kind in "iu":
        lows, highs = space.low.ravel().tolist(), space.high.ravel().tolist()
        sizes = [high - low + 1 for low, high in zip(lows, highs, strict=True)]
        if max(sizes, default=0) > MAX_VALUES:
            raise ValueError(
                f"{name}: actions of {space} are integers of {max(sizes)} values, {MAX_VALUES} at most are supported: "
                "declare a Box of real numbers and round in the environment."
            )
    elif not isinstance(space, Box):
        raise ValueError(
            f"{name}: actions must be a Box, Discrete, MultiDiscrete or MultiBinary, not {space}: "
            "turn them into one of these in a gymnasium.ActionWrapper."
        )
    if not sizes:
        raise ValueError(f"{name}: actions of {space} hold no number.")
    return sizes


def action_of(space: Any) -> Callable[[NDArray[Any]], Any]:
    """What turns a policy's action into an environment's."""
    if isinstance(space, Discrete):
        least = int(space.start)
        return lambda action: int(action) + least
    kind, shape = space.dtype, space.shape
    if isinstance(space, Box) and kind.kind == "f":
        low, high = space.low, space.high
        if len(shape) == 1:
            return lambda action: np.clip(action, low, high).astype(kind, copy=False)
        return lambda action: np.asarray(np.clip(np.reshape(action, shape), low, high), kind)
    start: Any = space.low if isinstance(space, Box) else getattr(space, "start", 0)
    first = np.ravel(start).astype(np.int64)
    return lambda action: np.asarray(action + first, kind).reshape(shape)


def _float32_box(space: Box) -> Box:
    with np.errstate(over="ignore"):  # float64's largest number, often written where there is no bound
        return Box(space.low.astype(np.float32), space.high.astype(np.float32), dtype=np.float32)
