"""What a run tells Prometheus through Ray; the dashboard and Grafana show it.

Ray puts `ray_` before the names and offers them on every node's metrics port some seconds later.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.util import metrics as ray_metrics

from ssm_metarl.distributed.metrics import DETAILS

COUNTERS = {
    "ssm_metarl_iterations": "meta-iterations",
    "ssm_metarl_env_steps": "environment steps of training",
    "ssm_metarl_worker_restarts": "rollout workers that died or were replaced",
    "ssm_metarl_lost_tasks": "tasks dropped or timed out",
    "ssm_metarl_invalid_episodes": "invalid episodes",
    "ssm_metarl_accepted": "races of a self-improving run that a challenger won",
    "ssm_metarl_rejected": "races that the incumbent won",
    "ssm_metarl_rollbacks": "returns of the incumbent to an earlier checkpoint",
    "ssm_metarl_failures": "failures of members",
}
"""Names and what they count."""

GAUGES = {
    "ssm_metarl_return": "mean undiscounted return of training by adaptation step",
    "ssm_metarl_phase_seconds": "seconds of the last meta-iteration by phase",
    "ssm_metarl_cycle": "races of a self-improving run so far",
    "ssm_metarl_level": "normalised return after adaptation of its incumbent at the last assessment",
}
"""Names and what they show."""

DECISIONS = {
    "ssm_metarl_accepted": "accepted",
    "ssm_metarl_rejected": "rejected",
    "ssm_metarl_rollbacks": "rolled back",
    "ssm_metarl_failures": "failed",
}
"""Counters of decisions, and what a decision of their kind is called."""

_TAGS = {"ssm_metarl_return": ("adaptation_step",), "ssm_metarl_phase_seconds": ("phase",)}


class Telemetry:
    """Metrics of one trainer or one population; without Ray it does nothing.

    `MetaTrainer` calls `iteration` after every meta-iteration, a self-improving run `decisions` whenever something was
    decided.

    Args:
        trial: which trainer it is, a tag of every metric.
        task: family of its tasks, another tag.
    """

    def __init__(self, trial: str, task: str) -> None:
        self._tags = {"trial": trial, "task": task}
        self._metrics: dict[str, Any] = {}
        self._restarts = 0

    def iteration(self, metrics: Mapping[str, Any], env_steps: int) -> None:
        """Report a meta-iteration.

        Args:
            metrics: as `MetaTrainer.step` returns them.
            env_steps: of this iteration.
        """
        if not ray.is_initialized():
            return
        self._count("ssm_metarl_iterations", 1)
        self._count("ssm_metarl_env_steps", env_steps)
        self._count("ssm_metarl_worker_restarts", metrics["restarts"] - self._restarts)
        self._restarts = metrics["restarts"]
        self._count("ssm_metarl_lost_tasks", len(metrics[DETAILS]["dropped_tasks"]) + metrics["timed_out_tasks"])
        self._count("ssm_metarl_invalid_episodes", metrics["invalid_episodes"])
        for step, value in enumerate(metrics[DETAILS]["return_by_step"]):
            self._show("ssm_metarl_return", value, adaptation_step=str(step))
        for phase, seconds in metrics["seconds"].items():
            self._show("ssm_metarl_phase_seconds", seconds, phase=phase)

    def decisions(self, cycle: int, level: float | None, events: Sequence[Mapping[str, Any]]) -> None:
        """Report what a self-improving run decided.

        Args:
            cycle: races so far.
            level: of the incumbent at its last assessment, in [0, 1]; None before the first.
            events: decisions since the last call, as in `rsi/events.jsonl`.
        """
        if not ray.is_initialized():
            return
        found = Counter(event["decision"] for event in events)
        for name, decision in DECISIONS.items():
            self._count(name, found[decision])
        self._show("ssm_metarl_cycle", cycle)
        if level is not None:
            self._show("ssm_metarl_level", level)

    def _count(self, name: str, by: float) -> None:
        if name not in self._metrics:
            self._metrics[name] = ray_metrics.Counter(name, description=COUNTERS[name], tag_keys=("trial", "task"))
        if by > 0:  # Ray refuses 0
            self._metrics[name].inc(by, tags=self._tags)

    def _show(self, name: str, value: float, **tags: str) -> None:
        if name not in self._metrics:
            keys = ("trial", "task", *_TAGS.get(name, ()))
            self._metrics[name] = ray_metrics.Gauge(name, description=GAUGES[name], tag_keys=keys)
        self._metrics[name].set(value, tags={**self._tags, **tags})
