"""Tables of the terminal: they fit it, with as many digits as their numbers bear."""

from __future__ import annotations

import io
import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from ssm_metarl import pretrained
from ssm_metarl.cli.report import groups_table
from ssm_metarl.cli.sweep import trials_table
from ssm_metarl.cli.tables import adaptation_table, change_words, decimals, evaluation_table, modes_table


def lines(table: Table, width: int) -> list[str]:
    text = io.StringIO()
    Console(file=text, width=width).print(table)
    return text.getvalue().splitlines()


@pytest.mark.parametrize(
    ("values", "digits"),
    [
        ((475.21, -3.0), 1),
        ((-12.3,), 2),
        ((9.99,), 2),
        ((0.5, None), 3),
        ((0.001,), 4),
        ((1234.5,), 0),
        ((12345.6,), 0),
        ((0.0,), 2),
        ((None, float("nan")), 2),
    ],
)
def test_the_scale_decides_the_digits(values: tuple[float | None, ...], digits: int) -> None:
    assert decimals(*values) == digits


def test_a_change_has_equal_digits() -> None:
    assert change_words(9.5, 475.25) == "9.5 → 475.2"


@pytest.fixture(params=["cartpole", "navigation-2d"])
def card(request: pytest.FixtureRequest) -> dict[str, Any]:
    """A shipped model's."""
    found: dict[str, Any] = json.loads((pretrained.folder(request.param) / "card.json").read_text())
    return found


@pytest.mark.parametrize("width", [200, 80, 60])
def test_the_modes_fit(card: dict[str, Any], width: int) -> None:
    shown = lines(modes_table(card["modes"], width), width)
    rows = [line.split() for line in shown if line.split()[:1] in (["none"], ["standard"], ["hybrid"])]
    assert [len(row) for row in rows] == [5 if width == 60 else 7] * 3
    assert sum(line.count("…") for line in shown) == 3 * (2 if width == 60 else 3), "of intervals alone"


def test_an_evaluation_fits(card: dict[str, Any]) -> None:
    shown = lines(evaluation_table(card["evaluation"]), 60)
    assert sum(line.count("…") for line in shown) == len(card["evaluation"]["return"])


def test_a_trials_episodes_stand_below_the_table(card: dict[str, Any]) -> None:
    report = {name: card["evaluation"][name][:1] for name in ("return", "ci_low", "ci_high", "episode_length")}
    report |= {"task": "tabular-mdp", "split": "test", "num_tasks": 3, "return_by_episode": [[1.23, 20.0, None]]}
    shown = " ".join(lines(evaluation_table(report), 60)).split()
    assert " ".join(shown).endswith("Return of each episode of a trial: 1.23 20.00 –")


def test_shares_of_success_stand_below_the_table(card: dict[str, Any]) -> None:
    report = {**card["evaluation"], "success_by_episode": [[0.0, 0.125], [1.0, None]]}
    shown = " ".join(lines(evaluation_table(report), 60)).split()
    assert " ".join(shown).endswith("Successful episodes: 0% 12%, then 100% –")


@pytest.mark.parametrize("width", [80, 60])
def test_the_steps_of_an_adaptation_fit(width: int) -> None:
    returns = {"return": -17364.5}
    report = {"task": "gym:Some/Environment-With-A-Long-Name-v0", "mode": "hybrid", "before": returns, "after": returns}
    report |= {"curve": [-17364.5, -99.5, -100.5], "best_step": 1, "effective_replay_episodes": [123.4, 5.0]}
    shown = lines(adaptation_table(report), width)
    steps = [line.split() for line in shown[-3:]]
    assert steps == [["0", "-17364"], ["1", "-100", "(best)", "123.4"], ["2", "-100", "5.0"]]
    assert all(heading in " ".join(shown) for heading in ("return of its", "own episodes", "replayed episodes"))


@pytest.mark.parametrize("width", [80, 60])
def test_groups_fit_with_an_interval_in_one_piece(width: int) -> None:
    interval = {"value": -12345.6, "ci_low": -117364.4, "ci_high": -12550.2}
    better = {"value": 0.5, "ci_low": 0.001, "ci_high": 1.0}
    name = "a group (with another adaptation and a long name)"
    group = {"runs": 10, "iqm": interval, "mean": interval}
    found = {"tasks": ["a"], "normalised": False, "groups": {"one": group, name: {**group, "improvement": better}}}
    shown = lines(groups_table(found), width)
    assert sum(line.split().count("-117364…-12550") for line in shown) == 4
    assert sum(line.split().count("0.00…1.00") for line in shown) == 1
    assert "than one" in " ".join(shown)
    assert "(with" in " ".join(shown)


@pytest.mark.parametrize("width", [80, 60])
def test_trials_fit_whatever_is_searched_over(width: int) -> None:
    config = {f"option_number_{number}": 10.0**-number for number in range(8)}
    metrics = {"return_after": -12345.6, "training_iteration": 1000}
    trials: Any = [SimpleNamespace(config=config, metrics=metrics)] * 2
    shown = lines(trials_table(trials, [-12345.6] * 2, list(config)), width)
    rows = [line.split()[:3] for line in shown if line.startswith("-12346")]
    assert rows == [["-12346", "1000", "option_number_0"]] * 2
    text = " ".join(word for line in shown for word in line.split())
    assert all(text.count(f"{name} {value:.3g}") == 2 for name, value in config.items())


def test_trials_are_ordered_by_what_the_best_is_chosen_by() -> None:
    levels = {"lucky": 2.0, "steady": 9.0, "silent": math.nan}
    trials: Any = [
        SimpleNamespace(config={"name": name}, metrics={"return_after": 10.0, "training_iteration": 6})
        for name in levels
    ]
    shown = [line.split() for line in lines(trials_table(trials, list(levels.values()), ["name"]), 80)]
    assert [line for line in shown if "name" in line] == [
        ["9.00", "6", "name", "steady"],
        ["2.00", "6", "name", "lucky"],
    ]
