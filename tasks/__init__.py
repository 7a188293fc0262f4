"""Task distributions: families of related environments behind one interface and a registry of names.

Importing this package registers the built-in families. It needs gymnasium and NumPy, nothing else.
"""

from __future__ import annotations

from ssm_metarl.core import ReferenceReturns, Task, TaskDistribution
from ssm_metarl.tasks import bandit, cartpole, meta_mujoco, metaworld, mujoco, navigation, popgym, tabular_mdp, wind
from ssm_metarl.tasks.batched import BatchedEnv
from ssm_metarl.tasks.external.names import from_name, names_code
from ssm_metarl.tasks.registry import make, names, register, register_prefix

__all__ = [
    "BatchedEnv",
    "ReferenceReturns",
    "Task",
    "TaskDistribution",
    "bandit",
    "cartpole",
    "make",
    "meta_mujoco",
    "metaworld",
    "mujoco",
    "names",
    "names_code",
    "navigation",
    "popgym",
    "register",
    "tabular_mdp",
    "wind",
]

register_prefix(":", from_name)
register_prefix(metaworld.ML1_PREFIX, metaworld.ML1)
register("ml10", metaworld.ML10)
for _family in (*mujoco.FAMILIES, *meta_mujoco.FAMILIES):
    register(_family.name, _family)
