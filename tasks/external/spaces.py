"""Spaces of an environment, and the vectors and actions of a policy that stand for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from numpy.typing import NDArray

MAX_FLAT = 1024  # numbers of a one-hot vector, or of a Box with several axes: beyond it is an image or a hash


def vector_space(name: str, space: gymnasium.Space[Any]) -> Box:
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


def vector_of(space: gymnasium.Space[Any]) -> Callable[[Any], NDArray[np.float32]]:
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


def action_space(name: str, space: gymnasium.Space[Any]) -> Box | Discrete[np.int64]:
    """The space of the policy's actions that stands for an environment's."""
    if isinstance(space, Discrete):
        return Discrete(int(space.n))
    if isinstance(space, Box) and len(space.shape) == 1 and space.dtype is not None and space.dtype.kind == "f":
        return _float32_box(space)
    raise ValueError(f"{name}: actions must be Discrete or a Box of real numbers with one axis, not {space}.")


def action_of(space: Any) -> Callable[[NDArray[Any]], Any]:
    """What turns a policy's action into an environment's."""
    if isinstance(space, Discrete):
        start = int(space.start)
        return lambda action: int(action) + start
    low, high, kind = space.low, space.high, space.dtype
    return lambda action: np.clip(action, low, high).astype(kind, copy=False)


def _float32_box(space: Box) -> Box:
    with np.errstate(over="ignore"):  # float64's largest number, often written where there is no bound
        return Box(space.low.astype(np.float32).ravel(), space.high.astype(np.float32).ravel(), dtype=np.float32)
