"""Runs side by side: their curves on common axes, those that differ in their seed alone as one group with its mean."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from rich.table import Table

from ssm_metarl.algorithms.rollouts import Array
from ssm_metarl.algorithms.statistics import confidence_interval, interquartile_mean, probability_of_improvement
from ssm_metarl.cli.tables import decimals, interval_words, number_words
from ssm_metarl.evaluation.groups import on_common_steps
from ssm_metarl.storage.checkpoint import load_checkpoint
from ssm_metarl.storage.run_folder import checkpoints
from ssm_metarl.storage.run_log import read_metrics

COLOURS = ("#0b6fa4", "#c0392b", "#27ae60", "#8e44ad", "#d68910", "#7f8c8d")

MACHINE = ("seed", "num_workers", "learner_threads", "device", "checkpoint_every", "sample_timeout_s")
"""Options in which the runs of a group may differ."""

TOLD_FIRST = ("task", "algorithm")
"""Options that a group's name tells before others."""

NAMED = 3
"""Most options that the name of a group tells."""

TAIL = 0.1
"""Share of a run, its last, over which its return is averaged."""


@dataclass(frozen=True)
class HeldOut:
    """Returns after adaptation on held-out tasks, of the checkpoints that a run has kept.

    Attributes:
        steps: [C], environment steps of training.
        mean, low, high: [C], the mean over tasks and its 95 % interval.
    """

    steps: Array
    mean: Array
    low: Array
    high: Array


@dataclass(frozen=True)
class Curve:
    """A run.

    Attributes:
        name: of its folder.
        config: of its last checkpoint.
        steps: [N], environment steps at the end of each iteration.
        before, after: [N], mean returns of the meta-batch before and after adaptation.
        held_out: where it was measured.
    """

    name: str
    config: Mapping[str, Any]
    steps: Array
    before: Array
    after: Array
    held_out: HeldOut | None = None

    @property
    def final(self) -> float:
        """Mean return after adaptation over its last iterations."""
        return float(self.after[-max(1, round(TAIL * len(self.after))) :].mean())


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed and the machine."""

    label: str
    runs: list[Curve] = field(default_factory=list)

    def mean(self) -> tuple[Array, Array, Array, Array]:
        """Steps that all runs have had, and over the runs the mean return at them with its 95 % interval, [G] each."""
        steps, returns = on_common_steps([(run.steps, run.after) for run in self.runs], points=200)
        return steps, *confidence_interval(returns)


def read_curve(name: str, run: Path) -> Curve:
    """A run's curve.

    Raises:
        ValueError: it has no iteration or no checkpoint yet, or its files are damaged.
    """
    lines, saved = read_metrics(run), checkpoints(run)
    if not saved:
        raise ValueError(f"{name} has no checkpoint yet.")
    returns = np.array([line["return_by_step"] for line in lines], float)
    steps = np.array([line["env_steps"] for line in lines], float)
    return Curve(name, load_checkpoint(saved[-1]).config, steps, returns[:, 0], returns[:, -1])


def grouped(curves: Iterable[Curve]) -> list[Group]:
    """Runs by all options but `MACHINE`, each group named by the options in which it differs from the others."""
    found: dict[str, list[Curve]] = {}
    for curve in curves:
        same = {name: value for name, value in curve.config.items() if name not in MACHINE}
        found.setdefault(json.dumps(same, sort_keys=True, default=str), []).append(curve)
    configs = [runs[0].config for runs in found.values()]
    names = [name for name in dict.fromkeys((*TOLD_FIRST, *configs[0])) if name not in MACHINE] if configs else []
    differ = [name for name in names if len({str(config.get(name)) for config in configs}) > 1]
    labels = [f"{config.get('task')}, {config.get('algorithm')}" for config in configs]
    for count in range(1, min(NAMED, len(differ)) + 1):  # no more than tells them apart
        labels = [", ".join(f"{name} {config.get(name)}" for name in differ[:count]) for config in configs]
        if len(set(labels)) == len(labels):
            break
    counts = [f" ({len(runs)} seed{'s' * (len(runs) > 1)})" for runs in found.values()]
    return [Group(label + count, runs) for label, count, runs in zip(labels, counts, found.values(), strict=True)]


def draw(groups: Sequence[Group], path: Path) -> Path:
    """Returns after adaptation by environment steps: thin lines are runs, thick ones the mean of a group's.

    Below them, where they were measured, the returns on held-out tasks of the checkpoints that each run has kept.
    """
    measured = any(run.held_out for group in groups for run in group.runs)
    figure = Figure(figsize=(7.6, 7.4 if measured else 4.2), layout="constrained")
    panels = figure.subplots(1 + measured, 1, squeeze=False, sharex=True)[:, 0]
    for number, group in enumerate(groups):
        colour, many = COLOURS[number % len(COLOURS)], len(group.runs) > 1
        for run in group.runs:
            thin = {"alpha": 0.35, "linewidth": 0.9} if many else {"label": group.label, "linewidth": 1.8}
            panels[0].plot(run.steps, run.after, color=colour, marker="" if len(run.steps) > 1 else "o", **thin)
        if many:
            steps, mean, low, high = group.mean()
            panels[0].plot(steps, mean, color=colour, linewidth=2.2, label=group.label)
            panels[0].fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
        for run in group.runs:
            if found := run.held_out:
                spread = np.abs(np.stack([found.mean - found.low, found.high - found.mean]))
                style: dict[str, Any] = {"color": colour, "marker": "o", "markersize": 4, "capsize": 2}
                panels[1].errorbar(found.steps, found.mean, np.nan_to_num(spread), linewidth=1, alpha=0.8, **style)
    titles = ("Mean return of the meta-batch after adaptation", "Return after adaptation on held-out tasks")
    for panel, title in zip(panels, titles, strict=False):
        panel.set(title=title, ylabel="return")
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_xlim(left=0)
    panels[-1].set_xlabel("environment steps")
    panels[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.legend(frameon=False, fontsize=8, loc="outside lower center")
    FigureCanvasAgg(figure).print_png(str(path))
    return path


def aggregates_table(groups: Sequence[Group]) -> Table:
    """Groups by their runs' last returns: mean over seeds with an interval, IQM, and the chance to beat the first."""
    table = Table(title=f"Return after adaptation over the last {TAIL:.0%} of each run")
    table.caption = "intervals are over seeds; P(better): of a run against one of the first group"
    heads = ("mean", "95 % over seeds", "IQM", "P(better)", "held-out mean", "95 % over seeds")
    measured = any(run.held_out for group in groups for run in group.runs)
    table.add_column("group")
    for head in heads if measured else heads[:4]:
        table.add_column(head, justify="right")
    first = np.array([[run.final for run in groups[0].runs]])
    for group in groups:
        values = np.array([[run.final for run in group.runs]])
        better = "–" if group is groups[0] else f"{probability_of_improvement(values, first):.2f}"
        cells = [*_mean_words(values[0]), number_words(interquartile_mean(values)), better]
        last = np.array([run.held_out.mean[-1] for run in group.runs if run.held_out])
        if measured:
            cells += _mean_words(last) if len(last) else ("–", "–")
        table.add_row(group.label, *cells)
    return table


def _mean_words(values: Array) -> tuple[str, str]:
    mean, low, high = (float(each) for each in confidence_interval(values))
    known = {"ci_low": low, "ci_high": high} if np.isfinite(low) else {"ci_low": None, "ci_high": None}
    return number_words(mean), interval_words(known, decimals(mean))
