"""Task distributions: families of related environments behind one interface and a registry of names.

Importing this package registers the built-in families. It needs gymnasium and NumPy, nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import bandit, cartpole, metaworld, mujoco, navigation, tabular_mdp
from .adapter import from_name
from .base import BatchedEnv, ReferenceReturns, Task, TaskDistribution, lookup, make, names, register, register_prefix

__all__ = [
    "BatchedEnv",
    "ReferenceReturns",
    "Task",
    "TaskDistribution",
    "bandit",
    "cartpole",
    "make",
    "metaworld",
    "mujoco",
    "names",
    "navigation",
    "register",
    "tabular_mdp",
]


def _adapted(name: str, options: Mapping[str, Any], ranges: Mapping[str, Any]) -> TaskDistribution:
    for key in options:
        lookup({"horizon": None}, key, f"option of {name!r}")
    return from_name(name, ranges, **options)


for _prefix in ("gym:", ":"):
    register_prefix(_prefix, _adapted)


def _ml1(name: str, options: Mapping[str, Any], ranges: Mapping[str, Any]) -> TaskDistribution:
    if ranges:
        raise ValueError(f"Only gym:ID takes task ranges, not {name!r}.")
    for key in options:
        lookup({"horizon": None}, key, f"option of {name!r}")
    return metaworld.ML1(name.removeprefix("ml1:"), **options)


register_prefix("ml1:", _ml1)
for _family in (mujoco.HalfCheetahDir, mujoco.HalfCheetahVel, mujoco.AntDir):
    register(_family.name, _family)
register("ml10", metaworld.ML10)
