"""Modules of the user's, and what can be said of their errors."""

from __future__ import annotations

import copy
import importlib.machinery
import importlib.util
import inspect
import sys
import types
from collections.abc import Mapping
from typing import Any

import gymnasium

from ssm_metarl.checks import lookup
from ssm_metarl.core import TaskDistribution


def load_entry(name: str, directory: str) -> Any:
    """What `module:attribute` names."""
    module, _, path = name.partition(":")
    entry = import_module(module, directory)
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


def import_module(module: str, directory: str) -> types.ModuleType:
    """Import from the Python path, else from a directory, which then joins the path."""
    if module.endswith(".py"):
        raise ValueError(f"A module is named without .py: {module.removesuffix('.py')}, not {module}.")
    top = module.partition(".")[0]
    if top not in sys.modules and importlib.util.find_spec(top) is None:
        if importlib.machinery.PathFinder.find_spec(top, [directory]) is None:
            place = f"neither installed nor in {directory}; go where it is, or set PYTHONPATH"
            raise ValueError(f"There is no module {top!r}, {place}.")
        sys.path.append(directory)
    try:
        return importlib.import_module(module)
    except Exception as error:
        raise ValueError(f"{module} cannot be imported: {one_line(error)}") from error


def call(name: str, entry: Any, arguments: Mapping[str, Any] = {}) -> Any:
    """Make what a class or a function makes of these arguments.

    Raises:
        ValueError: it is neither, has no such argument, or fails; one sentence.
    """
    if not callable(entry):
        raise ValueError(f"{name} must be a class or a function, not {entry!r}.")
    check_arguments(name, entry, arguments)
    try:
        return entry(**copy.deepcopy(arguments))
    except Exception as error:
        raise ValueError(f"{name} cannot be made: {one_line(error)}") from error


def check_arguments(name: str, entry: Any, arguments: Mapping[str, Any]) -> None:
    """Raise ValueError, with the nearest name, for an argument that a class or function does not have."""
    try:
        parameters = inspect.signature(entry).parameters
    except (TypeError, ValueError):  # not written in Python
        return
    if not any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        named = [each.name for each in parameters.values() if each.kind is not each.VAR_POSITIONAL]
        for key in arguments:
            lookup(dict.fromkeys(["horizon", *named]), key, f"option of {name!r}")


def argument_names(function: Any) -> set[str]:
    """Names of a function's arguments; none where it is not written in Python."""
    try:
        return set(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # not written in Python
        return set()


def one_line(error: Exception) -> str:
    """What an exception says, in a line."""
    message = " ".join(str(error).split())
    known = isinstance(error, gymnasium.error.Error | ValueError)
    return message if known else f"{type(error).__name__}: {message}"
