"""Groups of runs as pictures, as a page of HTML and as a table."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from datetime import date
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from rich.table import Table

import ssm_metarl
from ssm_metarl.cli.tables import COMPACT, decimals, interval_words
from ssm_metarl.evaluation.groups import Group
from ssm_metarl.storage.atomic import replace_file

_COLOURS = ("#0b6fa4", "#c0392b", "#27ae60", "#8e44ad", "#e67e22", "#16a085", "#7f8c8d")

_STYLE = "body{font:16px/1.5 sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}img{max-width:100%}" + (
    "td,th{padding:.2rem .8rem;text-align:right}th:first-child,td:first-child{text-align:left}"
)

_WORDS = {
    "Aggregates": "Score of a run: mean return on held-out tasks after adaptation. Intervals of 95 %, from a bootstrap "
    "over runs within each task, widened for few runs as Student's t is.",
    "Sample efficiency": "Return after adaptation on training tasks: interquartile mean over runs, with an interval.",
    "Performance profile": "Share of runs with a score above a threshold.",
}


def groups_table(found: Mapping[str, Any]) -> Table:
    """The comparison as a table; `compare_groups` has the numbers."""
    first, *others = found["groups"]
    table = Table(title=_title(found), **COMPACT)
    table.add_column("group", overflow="fold")
    for column in ("runs", "IQM", "mean", *(["P(better)"] if others else [])):
        table.add_column(column, justify="right", no_wrap=True)
    for name, runs, *numbers in _rows(found):
        cells = (cell.replace(" … ", "…").replace(" (", "\n").removesuffix(")") for cell in numbers)
        table.add_row(name, runs, *cells)
    table.caption = f"{f'P(better): than {first}; ' if others else ''}below: 95 % over runs"
    return table


def _rows(found: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    known = [group["mean"]["value"] for group in found["groups"].values()]
    digits = 3 if found["normalised"] else decimals(*known)
    for name, group in found["groups"].items():
        row = [name, str(group["runs"])]
        row += [f"{group[key]['value']:.{digits}f} ({interval_words(group[key], digits)})" for key in ("iqm", "mean")]
        if len(found["groups"]) > 1:
            better = group.get("improvement")
            row.append(f"{better['value']:.2f} ({interval_words(better, 2)})" if better else "")
        rows.append(row)
    return rows


def write_report(found: Mapping[str, Any], groups: Sequence[Group], path: Path) -> Path:
    """A page without anything outside of it: table, pictures, and what it was made of.

    Args:
        found: of `compare_groups`.
        groups: that were compared.
        path: of the page.
    """
    pictures = {"Aggregates": _aggregates(found)}
    if all(group["curve"] for group in found["groups"].values()):
        pictures["Sample efficiency"] = _curves(found)
    pictures["Performance profile"] = _profile(found)
    first, *others = found["groups"]
    heads = ["group", "runs", "IQM", "mean", *([f"P(better than {first})"] if others else [])]
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in _rows(found))
    parts = [
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(_title(found))}</title>",
        f"<style>{_STYLE}</style><h1>{html.escape(_title(found))}</h1>",
        "<table><tr>" + "".join(f"<th>{html.escape(head)}</th>" for head in heads) + f"</tr>{rows}</table>",
    ]
    for title, figure in pictures.items():
        parts.append(f"<h2>{title}</h2><p>{_WORDS[title]}</p><img alt='{title}' src='{_embedded(figure)}'>")
    runs = [f"{group.name}: {', '.join(str(run.folder) for run in group.runs)}" for group in groups]
    made = f"ssm-metarl {ssm_metarl.__version__}, {date.today().isoformat()}"
    parts += [f"<p>{html.escape(line)}</p>" for line in (*runs, made)]
    replace_file(path, "\n".join([*parts, "</html>\n"]).encode())
    return path


def _title(found: Mapping[str, Any]) -> str:
    scale = ", scores from 0 (worst run) to 1 (best run)" if found["normalised"] else ""
    return f"Runs of {', '.join(found['tasks'])}{scale}"


def _figure(height: float = 3.6) -> tuple[Figure, Any]:
    figure = Figure(figsize=(7.2, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    return figure, axes


def _aggregates(found: Mapping[str, Any]) -> Figure:
    figure, axes = _figure(1.2 + 0.45 * len(found["groups"]))
    for place, (group, colour) in enumerate(zip(found["groups"].values(), cycle(_COLOURS))):
        for offset, key, marker in ((-0.12, "iqm", "o"), (0.12, "mean", "D")):
            values = group[key]
            low, high = (values[bound] if values[bound] is not None else values["value"] for bound in _BOUNDS)
            axes.plot([low, high], [place + offset] * 2, color=colour, linewidth=3, alpha=0.35)
            axes.plot(values["value"], place + offset, marker, color=colour, label=key if not place else None)
    axes.set_yticks(range(len(found["groups"])), list(found["groups"]))
    axes.set_ylim(len(found["groups"]) - 0.5, -0.5)
    axes.set_xlabel("score: interquartile mean (circle) and mean (diamond)")
    return figure


_BOUNDS = ("ci_low", "ci_high")


def _curves(found: Mapping[str, Any]) -> Figure:
    figure, axes = _figure()
    for (name, group), colour in zip(found["groups"].items(), cycle(_COLOURS)):
        curve = group["curve"]
        steps = curve["steps"]
        axes.plot(steps, curve["iqm"], color=colour, label=f"{name} ({group['runs']})")
        axes.fill_between(steps, curve["low"], curve["high"], color=colour, alpha=0.2, linewidth=0)
    axes.set(xlabel="environment steps", ylabel="return after adaptation")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.legend(frameon=False)
    return figure


def _profile(found: Mapping[str, Any]) -> Figure:
    figure, axes = _figure()
    for (name, group), colour in zip(found["groups"].items(), cycle(_COLOURS)):
        axes.step(found["thresholds"], group["profile"], where="post", color=colour, label=name)
    axes.set(xlabel="threshold", ylabel="share of runs with a higher score", ylim=(-0.02, 1.02))
    axes.legend(frameon=False)
    return figure


def _embedded(figure: Figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
