"""Families of tasks by name.

From a name to experience; the trainer writes the first two lines, a rollout worker the others:

    distribution = make("navigation-2d")
    tasks = distribution.sample(20, rng, split="train")  # JSON values: sent to workers, logged with the data
    envs = distribution.make_vector_env(tasks, num_episodes=20)  # 400 environments, index = task * 20 + slot
    observations, _ = envs.reset(seed=seeds)  # one seed an episode slot
    observations, rewards, terminated, truncated, infos = envs.step(actions)
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any

from ssm_metarl.checks import lookup
from ssm_metarl.core import TaskDistribution

_FACTORIES: dict[str, Callable[..., TaskDistribution]] = {}
_PREFIXES: dict[str, Callable[..., TaskDistribution]] = {}


def register_prefix(prefix: str, factory: Callable[..., TaskDistribution]) -> None:
    """Let `make` call `factory` with the rest of a name that begins with `prefix`.

    Args:
        prefix: ends with a colon; ":" itself is for all other names with a colon, which are passed whole.
        factory: its other arguments are the family's options, and the task ranges if it has an argument `ranges`.
    """
    _PREFIXES[prefix] = factory


def register(name: str, factory: Callable[..., TaskDistribution], *, replace: bool = False) -> None:
    """Let `make(name, options)` call `factory`; a module does this for its own family when it is imported.

    The registry belongs to the process: workers receive a distribution, not its name.

    Args:
        name: of the family.
        factory: its arguments are the family's options.
        replace: take the place of another factory of that name, as in a notebook whose cell runs again.

    Raises:
        ValueError: the name belongs to another factory, and `replace` is false.
    """
    if not replace and _FACTORIES.get(name, factory) is not factory:
        raise ValueError(f"The task family {name!r} is registered already; replace=True takes its place.")
    _FACTORIES[name] = factory


def names() -> tuple[str, ...]:
    """All registered names, sorted."""
    return tuple(sorted(_FACTORIES))


def is_registered(name: str) -> bool:
    """Whether a name, or what it begins with, was registered; the rest with a colon is described by the name alone."""
    prefix = name.partition(":")[0] + ":"
    return name in _FACTORIES or (prefix != ":" and prefix in _PREFIXES and ":" in name)


def make(name: str, options: Mapping[str, Any] = {}, ranges: Mapping[str, Any] = {}) -> TaskDistribution:
    """Make a new instance of the family registered under `name`, or of one that a name with a colon describes.

    Args:
        name: registered; or `gym:ID`, `module:attribute`, see `tasks.adapter`.
        options: keyword arguments of the family; of `gym:ID` and `module:attribute` also those of the constructor.
        ranges: for `gym:ID`, the attributes that differ between tasks.

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
        module = name.removesuffix(".py") if isinstance(name, str) else ""
        if module and name not in _FACTORIES and os.path.isfile(f"{module}.py"):
            raise ValueError(f"{module}.py is here: name what is in it, too, as {module}:CLASS.")
        factory = lookup(_FACTORIES, name, "task family")
    known = dict(inspect.signature(factory).parameters) if options or ranges else {}
    if ranges and "ranges" not in known:
        raise ValueError(f"Only gym:ID takes task ranges, not {name!r}, whose options are its own.")
    known.pop("ranges", None)
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):  # else it checks them itself
        for key in options:
            lookup(known, key, f"option of {name!r}")
    return factory(**options, **({"ranges": ranges} if ranges else {}))


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
