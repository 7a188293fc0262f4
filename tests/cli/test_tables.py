"""Tables of the terminal: they fit it, with as many digits as their numbers bear."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from ssm_metarl import pretrained
from ssm_metarl.cli.tables import change_words, decimals, evaluation_table, modes_table


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
