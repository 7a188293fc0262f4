"""benchmarks/rsi.py: what `evolve` is to reach, and whether it did."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def rsi(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("rsi")


def found(rsi: ModuleType, options: Any, **by_method: tuple[float, float, float]) -> dict[str, Any]:
    """Results of all jobs: by method the return, the normalised return and the share of losers."""
    results = {}
    for job in rsi.jobs(options):
        value, normalised, losers = by_method[job.method.replace(", ", "_").replace(" ", "_")]
        results[job.key] = {"returns": [-99.0, value], "normalised": [normalised - 0.1, normalised + 0.1]}
        results[job.key] |= {"losers": losers} if job.method.startswith("evolve") else {}
    return results


def met(goals: list[dict[str, Any]]) -> dict[tuple[str, str], bool]:
    return {(goal["row"], goal["column"]): goal["met"] for goal in goals}


def test_from_the_recommended_options_leads_and_losers_are_judged(rsi: ModuleType) -> None:
    options = rsi.Options(show="recommended", families=("cartpole",), starts=(0, 1, 2))
    results = found(rsi, options, evolve=(490.0, 0.96, 0.25), single=(480.0, 0.98, 0.0), single_linear=(1.0, 1.0, 0.0))
    goals = rsi.goals_of(options, results)
    assert met(goals) == {
        ("`evolve` less single, normalised", "cartpole"): True,
        ("`evolve` less single, linear, normalised", "cartpole"): False,
        ("share of losers", "cartpole"): False,
    }
    assert goals[0]["value"] == pytest.approx(-0.02)
    results.pop("recommended cartpole 1 single")  # a start that is not complete counts for nothing
    assert rsi.goals_of(options, results)[0]["value"] == pytest.approx(-0.02)


@pytest.mark.parametrize(("value", "reached"), [(-15.4, True), (-15.6, False)])
def test_returns_are_judged_where_there_is_a_figure_to_reach(rsi: ModuleType, value: float, reached: bool) -> None:
    options = rsi.Options(show="random-starts", families=("navigation-2d", "cartpole"), starts=(0, 1))
    other = (-50.0, 0.1, 0.0)
    results = found(rsi, options, evolve=(value, 0.7, 0.2), single=other, asha=other, pbt=other)
    assert met(rsi.goals_of(options, results)) == {("`evolve`", "navigation-2d"): reached}


def test_an_aggregate_is_ahead_where_intervals_are_apart(rsi: ModuleType) -> None:
    good, poor = ([[0.80, 0.82, 0.84], [0.5, 0.52, 0.54]], [[0.60, 0.62, 0.64], [0.3, 0.32, 0.34]])
    rows = [{"name": name, "cells": [None, rsi._interquartile(each)]} for name, each in (("e", good), ("s", poor))]
    goal = rsi.apart(*rows)
    assert goal["met"]
    assert goal["bound"] == rows[1]["cells"][1]["ci_high"]
    assert not rsi.apart(rows[1], rows[0])["met"]
    assert not rsi.apart(rows[0], rows[0])["met"]
    assert rsi.apart(rows[0], {"name": "none", "cells": [None, rsi._interquartile([[], []])]}) is None
    # What differs between families is no noise: drawing over all runs would give three times the width.
    assert rows[0]["cells"][1]["ci_high"] - rows[0]["cells"][1]["ci_low"] < 0.12
