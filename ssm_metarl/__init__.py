"""Meta-reinforcement learning with state space model policies: MAML inner loops on Ray actors.

The names below are loaded on first use (PEP 562), so that importing `ssm_metarl` costs neither torch nor Ray:
rollout workers live on NumPy alone.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

# In a checkout the parts of the package stand beside this folder. An editable install finds them; with this, so does a
# checkout that is not installed, as on the nodes of a cluster to which Ray copied it.
if not (Path(__file__).parent / "algorithms").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

# Public name -> the module of this package that defines it.
_EXPORTS: dict[str, str] = {
    "EvolveConfig": ".tuning.population",
    "MetaTrainer": ".distributed.trainer",
    "PolicySpec": ".algorithms.inference",
    "Rollouts": ".algorithms.rollouts",
    "SSMPolicy": ".algorithms.policy",
    "TaskDistribution": ".tasks",
    "TrainConfig": ".distributed.config",
    "evaluate_checkpoint": ".distributed.run",
    "evolve": ".tuning.run",
    "load_policy": ".distributed.run",
    "register": ".tasks",
    "train": ".distributed.run",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_EXPORTS[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
