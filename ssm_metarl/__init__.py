"""Meta-reinforcement learning with state space model policies: MAML inner loops on Ray actors.

The names below are loaded on first use (PEP 562), so that importing `ssm_metarl` costs neither torch nor Ray:
rollout workers live on NumPy alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

# Public name -> the module that defines it.
_EXPORTS: dict[str, str] = {
    "AdaptOptions": "ssm_metarl.evaluation.adapt",
    "EvaluationConfig": "ssm_metarl.evaluation.tasks",
    "EvolveConfig": "ssm_metarl.tuning.config",
    "HybridAdapter": "ssm_metarl.algorithms.adapters",
    "MetaTrainer": "ssm_metarl.distributed.trainer",
    "Player": "ssm_metarl.evaluation.player",
    "PolicySpec": "ssm_metarl.algorithms.spec",
    "RecursiveSelfImprovement": "ssm_metarl.tuning.scheduler",
    "ReplayBuffer": "ssm_metarl.algorithms.replay",
    "Rollouts": "ssm_metarl.algorithms.rollouts",
    "SSMPolicy": "ssm_metarl.algorithms.policy",
    "StandardAdapter": "ssm_metarl.algorithms.adapters",
    "TaskDistribution": "ssm_metarl.tasks",
    "TrainConfig": "ssm_metarl.config",
    "adapt_checkpoint": "ssm_metarl.evaluation.adapt",
    "compare_modes": "ssm_metarl.evaluation.compare",
    "evaluate_checkpoint": "ssm_metarl.evaluation.evaluate",
    "export_onnx": "ssm_metarl.algorithms.export",
    "export_step": "ssm_metarl.algorithms.export",
    "evolve": "ssm_metarl.tuning.evolve",
    "load_player": "ssm_metarl.evaluation.player",
    "load_policy": "ssm_metarl.storage.checkpoint",
    "load_pretrained": "ssm_metarl.storage.checkpoint",
    "register": "ssm_metarl.tasks",
    "train": "ssm_metarl.distributed.train",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
