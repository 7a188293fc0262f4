"""Tables of results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rich.table import Table


def parameter_words(parameters: Any) -> str:
    """A task's parameters as short JSON: numbers with four significant digits."""
    return json.dumps(json.loads(json.dumps(parameters), parse_float=lambda text: float(f"{float(text):.4g}")))


def modes_table(report: Mapping[str, Any]) -> Table:
    """The modes of adaptation side by side; `ModeComparison.summary()` as a table."""
    table = Table(title=_title(report))
    gain = f"gain over {report['compared_with']}"
    table.caption = "in brackets 95 % intervals over tasks"
    for column in ("mode", "IQM", "mean", gain, "P(better)", "unchanged", "steps/task"):
        table.add_column(column, justify="right")
    for mode, row in report["modes"].items():
        cells = [f"{row[name]['value']:.2f} ({interval_words(row[name], 2)})" for name in ("iqm", "mean", "gain")]
        more = (f"{row['probability_of_improvement']:.2f}", f"{row['unchanged_tasks']:.0%}")
        table.add_row(mode, *cells, *more, f"{row['environment_steps_per_task']:.0f}")
    return table


def evaluation_table(report: Mapping[str, Any]) -> Table:
    """Returns by inner step; `Evaluation.summary()` as a table."""
    table = Table(title=_title(report))
    for column in ("inner steps", "return", "95 % over tasks", "episode length"):
        table.add_column(column, justify="right")
    rows = zip(report["return"], report["ci_low"], report["ci_high"], report["episode_length"], strict=True)
    for step, (mean, low, high, length) in enumerate(rows):
        interval = interval_words({"ci_low": low, "ci_high": high}, 2)
        table.add_row(str(step), f"{mean:.2f}", interval, f"{length:.1f}")
    return table


def interval_words(values: Mapping[str, float | None], digits: int) -> str:
    """ "low … high" of `ci_low` and `ci_high`; "–" where there is no interval."""
    low, high = values["ci_low"], values["ci_high"]
    return "–" if low is None or high is None else f"{low:.{digits}f} … {high:.{digits}f}"


def _title(report: Mapping[str, Any]) -> str:
    count = report["num_tasks"]
    return f"{report['task']}: {count} task{'s' * (count != 1)} of split {report['split']}"
