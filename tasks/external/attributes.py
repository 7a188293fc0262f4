"""Numbers of an environment that differ from task to task."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import gymnasium
import numpy as np

from ssm_metarl.checks import lookup


def with_attributes(creator: Any, attributes: Mapping[str, float]) -> Callable[..., Any]:
    """A subclass in which some attributes have other values from the start.

    While its constructor runs, whatever is assigned to these attributes is replaced, so that what the constructor
    derives from them is derived from the new values. Afterwards they can be set as any others.

    Args:
        creator: class of the environment.
        attributes: values by name.
    """

    class Preset(creator):
        def __init__(self, **arguments: Any) -> None:
            object.__setattr__(self, "_preset", attributes)
            super().__init__(**arguments)
            object.__setattr__(self, "_preset", {})

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, self._preset.get(name, value))

    for name, value in attributes.items():
        if is_number(getattr(creator, name, None)):  # a constant of the class
            setattr(Preset, name, value)
    for name in ("__module__", "__name__", "__qualname__", "__doc__"):
        setattr(Preset, name, getattr(creator, name))
    return Preset


def check_attribute(env: Any, env_id: str, key: str, arguments: Sequence[str]) -> None:
    """Raise ValueError, with the nearest name, unless the attribute or path `key` of `env` is a number."""
    owner, path = env, env_id
    *parents, last = key.split(".")
    for part in parents:
        owner = lookup(_parts(owner), part, f"{path} attribute")
        path = f"{path}.{part}"
    valid = [part for part, value in _parts(owner).items() if is_number(value)]
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


def set_attribute(env: Any, key: str, value: float) -> None:
    """Give a number of an environment, by its path such as `model.opt.gravity.2`, another value."""
    *parents, last = key.split(".")
    for part in parents:
        env = env[int(part)] if part.isdigit() else getattr(env, part)
    if last.isdigit():
        env[int(last)] = value
    else:
        setattr(env, last, value)


def is_number(value: object) -> bool:
    """Whether a value is a real number and no truth value."""
    return isinstance(value, Real) and not isinstance(value, bool)


def checked_range(name: str, key: str, value: Any) -> tuple[float, float]:
    """The two bounds of a range.

    Raises:
        ValueError: they are not [low, high], finite and in order.
    """
    pair = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
    if len(pair) != 2 or not all(is_number(x) and math.isfinite(x) for x in pair) or pair[0] > pair[1]:
        raise ValueError(
            f"{name}: the range of {key!r} must be [low, high], finite numbers with low <= high, not {value!r}."
        )
    return float(pair[0]), float(pair[1])
