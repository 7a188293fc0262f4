"""Metrics for Prometheus: what is counted, what is shown, and that the Grafana dashboard asks for these."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ssm_metarl.distributed import telemetry as telemetry_module
from ssm_metarl.distributed.telemetry import COUNTERS, GAUGES, Telemetry

GRAFANA = Path(__file__).resolve().parents[2] / "docs" / "grafana_dashboard.json"


class Recorded:
    """Stands for Ray's metrics; keeps what they are told."""

    values: dict[tuple[str, ...], float]

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self.name, self.keys = name, tag_keys
        assert description

    def inc(self, by: float, tags: dict[str, str]) -> None:
        assert by > 0
        key = self._key(tags)
        self.values[key] = self.values.get(key, 0.0) + by

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.values[self._key(tags)] = value

    def _key(self, tags: dict[str, str]) -> tuple[str, ...]:
        assert set(tags) == set(self.keys)
        return (self.name, *(tags[key] for key in self.keys[2:]))


@pytest.fixture
def values(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, ...], float]:
    found: dict[tuple[str, ...], float] = {}
    monkeypatch.setattr(Recorded, "values", found, raising=False)
    monkeypatch.setattr(telemetry_module.ray_metrics, "Counter", Recorded)
    monkeypatch.setattr(telemetry_module.ray_metrics, "Gauge", Recorded)
    monkeypatch.setattr(telemetry_module.ray, "is_initialized", lambda: True)
    return found


def metrics(restarts: int, **changes: Any) -> dict[str, Any]:
    details = {"dropped_tasks": [], "return_by_step": [-40.0, -20.0]}
    details |= {name: changes.pop(name) for name in list(changes) if name in details}
    quiet = {"timed_out_tasks": 0, "invalid_episodes": 0, "seconds": {"sample": 0.5, "update": 2.0}}
    return {**quiet, "details": details, "restarts": restarts, **changes}


def test_an_iteration_counts_what_is_new(values: dict[tuple[str, ...], float]) -> None:
    telemetry = Telemetry("trial", "task")
    telemetry.iteration(metrics(1), 800)
    telemetry.iteration(metrics(3, dropped_tasks=["a"], timed_out_tasks=2, invalid_episodes=5), 700)
    telemetry.iteration(metrics(3, return_by_step=[-39.0, -18.0]), 600)
    assert values[("ssm_metarl_env_steps",)] == 2100
    assert values[("ssm_metarl_iterations",)] == 3
    assert values[("ssm_metarl_worker_restarts",)] == 3
    assert values[("ssm_metarl_lost_tasks",)] == 3
    assert values[("ssm_metarl_invalid_episodes",)] == 5
    assert values[("ssm_metarl_return", "1")] == -18.0
    assert values[("ssm_metarl_phase_seconds", "update")] == 2.0


def test_decisions_are_counted_by_kind(values: dict[tuple[str, ...], float]) -> None:
    telemetry = Telemetry("evolve", "task")
    telemetry.decisions(1, None, [{"decision": decision} for decision in ("accepted", "rejected", "rejected")])
    assert ("ssm_metarl_level",) not in values
    telemetry.decisions(2, 0.5, [{"decision": decision} for decision in ("rolled back", "failed", "continued")])
    assert values[("ssm_metarl_accepted",)] == 1
    assert values[("ssm_metarl_rejected",)] == 2
    assert values[("ssm_metarl_rollbacks",)] == 1
    assert values[("ssm_metarl_failures",)] == 1
    assert values[("ssm_metarl_cycle",)] == 2
    assert values[("ssm_metarl_level",)] == 0.5


def test_the_grafana_dashboard_asks_for_metrics_that_there_are() -> None:
    dashboard = json.loads(GRAFANA.read_text())
    asked: set[str] = set()
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            asked |= set(re.findall(r"ray_(ssm_metarl_\w+)", target["expr"]))
    assert {name.removesuffix("_total") for name in asked} == {*COUNTERS, *GAUGES}
