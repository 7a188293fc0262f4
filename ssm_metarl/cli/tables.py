"""Tables of results."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table


def parameter_words(parameters: Any) -> str:
    """A task's parameters as short JSON: numbers with four significant digits."""
    return json.dumps(json.loads(json.dumps(parameters), parse_float=lambda text: float(f"{float(text):.4g}")))


COMPACT: Any = {"box": SIMPLE_HEAD, "padding": 0, "pad_edge": False, "show_edge": False}
"""Of tables that fit 60 columns."""

NARROW = 80
"""Columns of a terminal below which a table leaves out what is of less use."""


def modes_table(report: Mapping[str, Any], width: int | None = None) -> Table:
    """The modes of adaptation side by side; `ModeComparison.summary()` as a table.

    Args:
        report: the summary.
        width: columns of the terminal; None: as many as it takes.
    """
    narrow = width is not None and width < NARROW
    table = Table(title=_title(report), **COMPACT)
    table.caption = f"gain over {report['compared_with']}; steps: of the environment, a task; below: 95 % over tasks"
    numbers = ("iqm", "gain") if narrow else ("iqm", "mean", "gain")
    rest = ("P(better)", "steps") if narrow else ("P(better)", "unchanged", "steps")
    for column in ("mode", *("IQM" if name == "iqm" else name for name in numbers), *rest):
        table.add_column(column, justify="left" if column == "mode" else "right", no_wrap=True)
    rows = report["modes"]
    digits = decimals(*(row[name]["value"] for row in rows.values() for name in numbers))
    for mode, row in rows.items():
        intervals = [interval_words(row[name], digits).replace(" ", "") for name in numbers]
        cells = [f"{row[name]['value']:.{digits}f}\n{words}" for name, words in zip(numbers, intervals, strict=True)]
        unchanged = () if narrow else (f"{row['unchanged_tasks']:.0%}",)
        better, steps = f"{row['probability_of_improvement']:.2f}", f"{row['environment_steps_per_task']:.0f}"
        table.add_row(mode, *cells, better, *unchanged, steps)
    return table


def evaluation_table(report: Mapping[str, Any]) -> Table:
    """Returns by inner step; `Evaluation.summary()` as a table."""
    table = Table(title=_title(report))
    for column in ("inner steps", "return", "95 % over tasks", "episode length"):
        table.add_column(column, justify="right")
    digits = decimals(*report["return"])
    rows = zip(report["return"], report["ci_low"], report["ci_high"], report["episode_length"], strict=True)
    for step, (mean, low, high, length) in enumerate(rows):
        interval = interval_words({"ci_low": low, "ci_high": high}, digits)
        table.add_row(str(step), f"{mean:.{digits}f}", interval, f"{length:.1f}")
    # Files of earlier versions have none.
    for step, episodes in enumerate(report.get("return_by_episode", [])):
        if len(episodes) > 1:
            words = " ".join("–" if value is None else f"{value:.{digits}f}" for value in episodes)
            after = f" after {step} step{'s' * (step != 1)}" if len(report["return"]) > 1 else ""
            table.caption = f"{table.caption or ''}\nReturn of each episode of a trial{after}: {words}".strip()
    if rates := report.get("success_by_episode"):
        steps = ", then ".join(" ".join("–" if rate is None else f"{rate:.0%}" for rate in step) for step in rates)
        table.caption = f"{table.caption or ''}\nSuccessful episodes: {steps}".strip()
    return table


def adaptation_table(report: Mapping[str, Any]) -> Table:
    """Returns of a task's own episodes by adaptation step; `TaskReport.summary()` as a table."""
    table = Table(title=f"{report['task']}\n{report['mode']} adaptation", **COMPACT)
    digits = decimals(*report["curve"], report["before"]["return"], report["after"]["return"])
    replayed = report["effective_replay_episodes"] if any(report["effective_replay_episodes"]) else None
    for heading in ("step", "return of its\nown episodes", *(["effective\nreplayed episodes"] if replayed else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    for step, value in enumerate(report["curve"]):
        mark = " (best)" if step == report["best_step"] else ""
        cells = ["" if step == 0 else f"{replayed[step - 1]:.1f}"] if replayed else []
        table.add_row(str(step), f"{value:.{digits}f}{mark}", *cells)
    return table


def decimals(*values: float | None) -> int:
    """Digits after the point that numbers of a scale bear: none from 1000 on, one from 100, two from 1, up to four."""
    most = max((abs(value) for value in values if value is not None and math.isfinite(value)), default=0.0)
    return sum(most < bound for bound in (1000.0, 100.0, 1.0, 0.1)) if most else 2


def number_words(value: float) -> str:
    """A number with the digits of its scale."""
    return f"{value:.{decimals(value)}f}"


def change_words(before: float, after: float) -> str:
    """Two returns with an arrow between them."""
    digits = decimals(before, after)
    return f"{before:.{digits}f} → {after:.{digits}f}"


def interval_words(values: Mapping[str, float | None], digits: int) -> str:
    """ "low … high" of `ci_low` and `ci_high`; "–" where there is no interval."""
    low, high = values["ci_low"], values["ci_high"]
    return "–" if low is None or high is None else f"{low:.{digits}f} … {high:.{digits}f}"


def _title(report: Mapping[str, Any]) -> str:
    count = report["num_tasks"]
    return f"{report['task']}: {count} task{'s' * (count != 1)} of split {report['split']}"
