"""Families of tasks from gymnasium environments that exist already: `gym:<environment id>` and `module:attribute`.

The registry calls `from_name` for names that it does not have; what it gets is a family like any other:

    family = from_name("gym:Pendulum-v1", {"g": [8, 12], "l": [0.5, 1.5]})  # a task: {"g": 9.3, "l": 0.7}
    family = from_name("mymodule:MyEnv")  # tasks from its sample_tasks(n), applied by its set_task(task)

The environments are stepped one after another in Python: a family written as a `BatchedEnv` is much faster.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium

from ssm_metarl.core import TaskDistribution
from ssm_metarl.tasks.external.gym import GYM, GymFamily
from ssm_metarl.tasks.external.importing import call, load_entry
from ssm_metarl.tasks.external.lending import close_all
from ssm_metarl.tasks.external.own import TaskFamily
from ssm_metarl.tasks.registry import is_registered

OWN = "gymnasium.envs."
"""How the entry points of gymnasium's own environments begin."""

_MODULE_ATTRIBUTE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def from_name(
    name: str, /, ranges: Mapping[str, Sequence[float]] = {}, horizon: int | None = None, **arguments: Any
) -> TaskDistribution:
    """Make the family that a name with a colon means.

    Args:
        name: "gym:Pendulum-v1", or "package.module:attribute". Such an attribute is a gymnasium environment's class,
            or a function that makes one, with the methods of `TaskFamily`; or a `TaskDistribution` (class, instance,
            or a function that makes one), which is used as it is.
        ranges: for `gym:` only, see `GymFamily`.
        horizon: most steps of an episode; None: the environment's own. Not for a `TaskDistribution`.
        arguments: of the environment's constructor, or of the class or function; JSON values.

    Raises:
        ValueError: in one sentence, when the name is neither, or the family cannot be made.
    """
    if name.startswith(GYM):
        return GymFamily(name.removeprefix(GYM), ranges, horizon, arguments)
    if not _MODULE_ATTRIBUTE.fullmatch(name):
        raise ValueError(f"A task family is {GYM}<environment id> or module:attribute, not {name!r}.")
    if ranges:
        raise ValueError(f"Ranges are for {GYM} environments: {name} draws its tasks itself.")
    entry = load_entry(name, os.getcwd())
    if isinstance(entry, TaskDistribution) and arguments:
        raise ValueError(f"{name} is a family that was made already: it takes no {', '.join(arguments)}.")
    made = entry if isinstance(entry, TaskDistribution) else call(name, entry, arguments)
    if not isinstance(made, TaskDistribution):
        if isinstance(made, gymnasium.Env):
            close_all([made])
        return TaskFamily(name, horizon, arguments)
    if horizon is not None:
        raise ValueError(f"{name} has a horizon of its own, {made.horizon} steps: another cannot be given.")
    return made


def names_code(name: object) -> bool:
    """Whether making the family of a name imports what the name says: code that is neither ours nor gymnasium's.

    Such are `module:attribute`, `gym:module:ID`, and `gym:ID` of an environment that another package registered. A name
    that is registered in this process is not, for whoever registered it has run its code already.
    """
    if not isinstance(name, str) or ":" not in name or is_registered(name):
        return False
    if not name.startswith(GYM):
        return True
    try:
        spec = gymnasium.spec(name.removeprefix(GYM)) if name.count(":") == 1 else None
    except gymnasium.error.Error:
        spec = None
    return spec is None or not (isinstance(spec.entry_point, str) and spec.entry_point.startswith(OWN))
