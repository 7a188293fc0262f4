"""benchmarks/tables.py: figures on the same trials, goals met and missed, Markdown, and going on where it stopped."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("tables")


@pytest.fixture
def table(tables: ModuleType) -> ModuleType:
    return importlib.import_module("_table")


SMALL = {"hidden_dim": 4, "state_dim": 2, "num_layers": 1, "meta_batch": 2, "episodes": 1, "iterations": 3}


def test_what_is_done_is_read_and_ours_stand_beside_the_players_on_the_same_trials(
    table: ModuleType, tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**SMALL, "algorithm": "rl2", "minibatches": 1, "task_options": {"pulls": 5}}
    target = tables.Target(claim="Tiny.", task="bandit", options=options, num_tasks=4, episodes=1, after=0, steps=0)
    tiny = table.Table(
        title="Tiny",
        columns=("return", "seconds"),
        rows=(
            table.Row("theirs", table.published((2.0, 0.5), None)),
            table.Row("uniform", (table.played("uniform", "tiny"), None)),
            table.Row(
                "ours", (table.ours("tiny", table.returns(0)), table.ours("tiny", table.seconds)), table.most(5, 0)
            ),
            table.Row("less", (table.paired("tiny", "uniform"), None)),
        ),
        curves={"training": table.in_training("tiny")},
        curve_columns=("return",),
    )

    def make() -> dict[str, Any]:
        made: dict[str, Any] = tiny.make(table.Bench({"tiny": target}, (0, 1), tmp_path, tmp_path / "runs.jsonl"))
        return made

    made = make()
    (theirs, _), (uniform, none), (own, _), (less, _) = (row["cells"] for row in made["rows"])
    assert theirs == {"mean": 2.0, "ci_low": 1.5, "ci_high": 2.5}
    assert none is None
    assert less["mean"] == pytest.approx(own["mean"] - uniform["mean"])
    assert [goal["met"] for goal in made["goals"]] == [True, False]
    assert not made["goals_met"]
    assert [point["env_steps"] for point in made["curves"]["training"]] == [10, 10, 20, 30]

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(importlib.import_module("learning"), "train", refuse)
    assert make() == made
    assert json.loads(json.dumps(made)) == made


def test_a_run_whose_line_was_cut_short_is_done_again(tables: ModuleType, tmp_path: Path) -> None:
    report, path = importlib.import_module("_report"), tmp_path / "kept" / "runs.jsonl"
    assert report.kept_runs(path) == {}
    one = report.keep_run(path, "one", "abc", {"value": 1.0})
    with path.open("a") as file:
        file.write('{"job": "two", "val')
    assert report.kept_runs(path) == {"one": one}
    two = report.keep_run(path, "two", None, {"value": 2.0})
    assert report.kept_runs(path) == {"one": one, "two": two}
    assert len(path.read_text().splitlines()) == 2


def test_workers_and_threads_are_no_other_run(tables: ModuleType, tmp_path: Path) -> None:
    learning = importlib.import_module("learning")
    options = {**SMALL, "algorithm": "rl2", "minibatches": 1, "task_options": {"pulls": 5}}
    target = tables.Target(claim="Tiny.", task="bandit", options=options, num_tasks=4, episodes=1, after=0, steps=0)
    runs = tmp_path / "runs.jsonl"
    (first,), _ = learning.run_target("tiny", target, (0,), tmp_path, runs, 0, 1)
    (again,), _ = learning.run_target("tiny", target, (0,), tmp_path, runs, 0, 2)
    assert again == first


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((-23.427482588881322,) * 3, ["-23.43"] * 3),
        ((443.92000000000002, 443.91999999999996, 443.92000000000007), ["443.9"] * 3),
        ((0.0, 0.0, 0.0), ["0"] * 3),
        ((0.25, 0.25, 0.25), ["0.25"] * 3),
        ((0.1161, 0.1131, 0.1191), ["0.1161", "0.1131", "0.1191"]),
        ((498.8, 497.4, 500.2), ["498.8", "497.4", "500.2"]),
        ((12345.6, 12000.0, 12700.0), ["12,346", "12,000", "12,700"]),
    ],
)
def test_figures_have_as_many_digits_as_their_interval_bears(
    tables: ModuleType, values: tuple[float, ...], expected: list[str]
) -> None:
    assert importlib.import_module("render").with_bounds(*values) == expected


def test_a_section_shows_intervals_goals_and_what_was_never_reached(tables: ModuleType) -> None:
    never = {"mean": None, "ci_low": None, "ci_high": None}
    reached = {"mean": -1234.56, "ci_low": -1235.56, "ci_high": -1233.56}
    shown = importlib.import_module("render").section(
        "two",
        {
            "title": "Two columns",
            "notes": ["A note."],
            "columns": ["first", "second"],
            "rows": [{"name": "theirs", "cells": [None, reached]}, {"name": "ours", "cells": [never, reached]}],
            "goals": [
                {"row": "ours", "column": "first", "bound": 26.0, "most": True, **never, "met": False},
                {"row": "ours", "column": "second", "bound": -2000.0, "most": False, **reached, "met": True},
            ],
            "curve_columns": ["return"],
            "curves": {"way": [{"env_steps": 2000.0, "seconds": 90.0, "returns": [0.25]}]},
            "took": {"target": {"seed": [0, 1], "env_steps": [1000, 2000], "seconds": [1.0, 9.0]}},
            "command": "python benchmarks/two.py",
            "seeds": [0, 1],
        },
    )
    assert shown == (
        "## Two columns {#two}\n\n"
        "|  | first | second |\n| --- | --- | --- |\n"
        "| theirs |  | -1,234.6 (-1,235.6 … -1,233.6) |\n| ours | never | -1,234.6 (-1,235.6 … -1,233.6) |\n\n"
        "| goal | limit | reached | met |\n| --- | --- | --- | --- |\n"
        "| ours: first | ≤ 26 | never | **no** |\n"
        "| ours: second | ≥ -2,000 | -1,234.6 (-1,235.6 … -1,233.6) | yes |\n\n"
        "| on the way | steps | seconds | return |\n| --- | --- | --- | --- |\n| way | 2,000 | 90 | 0.25 |\n\n"
        "| trained | steps a seed, at most | seconds a seed, at most |\n| --- | --- | --- |\n"
        "| `target` | 2,000 | 9 |\n\n"
        "- A note.\n\n```bash\npython benchmarks/two.py\n```\n\nseeds 0 1"
    )


def test_a_claim_about_an_interval_is_not_met_by_one_task(tables: ModuleType) -> None:
    """Its gain is large, but has no interval."""
    learning = importlib.import_module("learning")
    target = tables.Target(claim="Tiny.", task="bandit", goal=5.0, min_gain=1.0, after=1, steps=1)
    result = {"returns": [[0.0, 9.0]], "env_steps": 1, "seconds": 1.0, "untrained": 0.0, "deviation": 0.5, "seed": 0}
    found = json.loads(json.dumps(learning.summarise(target, [result]), allow_nan=False))
    assert found["gain"] == {"mean": 9.0, "ci_low": None, "ci_high": None}
    assert (found["value"], found["ci_low"], found["ci_high"]) == (9.0, None, None)
    assert found["checks"]["return"]
    assert not found["checks"]["gain_ci_low"]
    assert not found["goal_met"]


@pytest.mark.parametrize(("returns", "expected"), [((-30, -10, -10, -10), 4.0), ((-30, -20, -20, -20), np.inf)])
def test_the_threshold_is_passed_by_the_mean_of_three_iterations(
    table: ModuleType, returns: tuple[float, ...], expected: float
) -> None:
    curve = [{"return_by_step": [0.0, value], "seconds": 1.0} for value in returns]
    read = table.seconds_to(-16.0)({"curve": curve})
    assert read == expected
    assert (table.across([read])["mean"] is None) == np.isinf(expected)


def test_every_row_has_a_figure_a_column(tables: ModuleType) -> None:
    for table in tables.TABLES.values():
        for row in table.rows:
            assert len(row.figures) == len(table.columns)
            if row.goals:
                assert len(row.goals) == len(table.columns)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bandits", "navigation-2d"])
def test_quick_tables_end_to_end(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "tables.py"), "--table", name, "--quick", "--out", str(tmp_path)]
    made = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    assert made["quick"]
    assert made["goals"]
    written = (tmp_path / "quick" / "tables" / f"{name}.md").read_text()
    assert all(f"| {row['name']} |" in written for row in made["rows"])
