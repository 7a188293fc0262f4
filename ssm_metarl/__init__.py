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
    "AdaptOptions": ".distributed.evaluation",
    "EvolveConfig": ".tuning.population",
    "HybridAdapter": ".algorithms.adaptation",
    "MetaTrainer": ".distributed.trainer",
    "Player": ".distributed.player",
    "PolicySpec": ".algorithms.inference",
    "ReplayBuffer": ".algorithms.replay",
    "Rollouts": ".algorithms.rollouts",
    "SSMPolicy": ".algorithms.policy",
    "StandardAdapter": ".algorithms.adaptation",
    "TaskDistribution": ".tasks",
    "TaskSource": ".distributed.evaluation",
    "TrainConfig": ".distributed.config",
    "adapt_checkpoint": ".distributed.evaluation",
    "compare_modes": ".distributed.evaluation",
    "evaluate_checkpoint": ".distributed.evaluation",
    "export_onnx": ".algorithms.export",
    "export_step": ".algorithms.export",
    "evolve": ".tuning.run",
    "load_player": ".distributed.player",
    "load_policy": ".distributed.checkpoint",
    "load_pretrained": ".distributed.checkpoint",
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
