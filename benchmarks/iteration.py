"""Seconds of one meta-iteration of `navigation-2d`, and what they are spent on.

The learning configuration: meta-batch 20, 20 episodes a task, horizon 100, one inner step, `promp` with 5
epochs; at random initial weights, which are put back before every iteration. The headline is for a policy of
one ungated block of width 64 and state 32; beside it, under `default_policy`, stands the policy that
`train` uses by default.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import tyro
from _report import log, report, summary

from ssm_metarl.algorithms.spec import PolicyConfig
from ssm_metarl.config import TrainConfig
from ssm_metarl.distributed.cluster import start_ray
from ssm_metarl.distributed.trainer import MetaTrainer

TASK = "navigation-2d"
LEARNING: Mapping[str, Any] = {
    "algorithm": "promp",
    "meta_batch": 20,
    "episodes": 20,
    "inner_steps": 1,
    "step_weights": (),
    "epochs": 5,
}
SMALL = PolicyConfig(num_layers=1, hidden_dim=64, state_dim=32, gated=False, inputs="full")

PHASES = {"sampling": "sample", "adaptation": "adapt", "update": "update", "ray": "ray"}
"""Phase by the name of its share in the result → its key in the trainer's metrics."""


@dataclass(frozen=True)
class Options:
    """Measure meta-iterations.

    Attributes:
        iterations: measured, after one that is not.
        num_workers: Ray actors that collect rollouts.
        learner_threads: threads of the learner.
        device: where the learner computes, such as "cuda".
    """

    iterations: int = 7
    num_workers: int = 2
    learner_threads: int = 2
    device: str = "cpu"


def step(trainer: MetaTrainer, initial: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics of one iteration from the initial weights."""
    trainer.learner.load(initial, {})
    return trainer.step()


def figures(trainer: MetaTrainer, iterations: list[dict[str, Any]]) -> dict[str, Any]:
    """Times, shares and sizes."""
    total = summary([metrics["seconds"]["total"] for metrics in iterations])
    phases = {
        phase: statistics.median(metrics["seconds"][key] for metrics in iterations) for phase, key in PHASES.items()
    }
    return {
        "seconds_per_iteration": total["median"],
        "seconds_per_iteration_min": total["min"],
        "shares": {phase: seconds / sum(phases.values()) for phase, seconds in phases.items()},
        "seconds": phases,
        "parameters": sum(parameter.numel() for parameter in trainer.learner.policy.parameters()),
        "sizes": asdict(trainer.train_config.policy),
        "env_steps_per_iteration": trainer.env_steps / trainer.meta_iteration,
    }


def main(options: Options) -> None:
    machine = {"num_workers": options.num_workers, "learner_threads": options.learner_threads, "device": options.device}
    learning = {**LEARNING, **machine}
    configs = {
        "small": TrainConfig.for_task(TASK, **{**learning, **asdict(SMALL)}),
        "default": TrainConfig.for_task(TASK, **learning),
    }
    log("starting Ray …")
    start_ray(len(configs) * options.num_workers)
    trainers = {name: MetaTrainer(config.to_dict()) for name, config in configs.items()}
    try:
        initial = {name: trainer.learner.weights() for name, trainer in trainers.items()}
        measured: dict[str, list[dict[str, Any]]] = {name: [] for name in trainers}
        for turn in range(1 + options.iterations):
            for name, trainer in trainers.items():
                metrics = step(trainer, initial[name])
                log(f"{name} policy: {metrics['seconds']['total']:.2f} s{'' if turn else ' (not counted)'}")
                if turn:
                    measured[name].append(metrics)
        results = {name: figures(trainer, measured[name]) for name, trainer in trainers.items()}
    finally:
        for trainer in trainers.values():
            trainer.stop()
    facts = {"task": TASK, **learning, "iterations": options.iterations}
    report("iteration", {**results["small"], "default_policy": results["default"], **facts})


if __name__ == "__main__":
    main(tyro.cli(Options))
