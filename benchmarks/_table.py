"""What a table of `tables.py` is made of: where figures come from, rows, goals, curves, and Markdown."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from _report import log
from learning import Target, mean_interval, run_target
from players import play_held_out

from ssm_metarl.algorithms.rollouts import Array

Cell = dict[str, Any]
"""`mean`, `ci_low`, `ci_high`: bounds are None without an interval, and the mean of what was never reached."""

Result = Mapping[str, Any]
"""Of a seed's training, see `learning.run_seed`."""

Reading = Callable[[Result], Any]
"""What a cell shows of a seed: a number, or one for each held-out task [n]."""

SMOOTHED = 3
"""Iterations whose mean stands for the return in training."""

QUICK_TASKS = 8
QUICK: Mapping[str, Any] = {"iterations": SMOOTHED, "meta_batch": 8, "episodes": 2}
"""Instead of a target's own, where the code is tried and not the learning."""


# --- What is read of a seed ---------------------------------------------------------------------------------


def returns(after: int) -> Reading:
    """Of the held-out tasks after inner steps."""
    return lambda result: np.array(result["returns"])[:, after]


def episode(number: int) -> Reading:
    """Of one episode of the trials that are played before any inner step, 0 the first, mean over the tasks."""
    return lambda result: result["evaluation"]["return_by_episode"][0][number]


def success(after: int, where: str = "evaluation") -> Reading:
    """Percent of the trials' last episodes that succeed after inner steps, of held-out or, `on_train`, other tasks."""
    return lambda result: 100 * result[where]["success_by_episode"][after][-1]


def seconds(result: Result) -> float:
    """Of training."""
    return float(result["seconds"])


def seconds_to(level: float) -> Reading:
    """Wall seconds of training until the return after the last inner step is above a level; infinite: it never is.

    It is above once the mean of the last `SMOOTHED` iterations' returns in training is; the seconds are those of all
    iterations up to there.
    """

    def read(result: Result) -> float:
        iterations = result["curve"]
        adapted = np.array([each["return_by_step"][-1] for each in iterations])
        for end in range(SMOOTHED, len(adapted) + 1):
            if adapted[end - SMOOTHED : end].mean() > level:
                return float(sum(each["seconds"] for each in iterations[:end]))
        return np.inf

    return read


def across(seeds: Sequence[Any]) -> Cell:
    """Mean, and its 95 % interval over seeds; of a single seed, over its held-out tasks.

    Args:
        seeds: what was read of each, a number or the tasks' [n].
    """
    read = np.array([np.atleast_1d(each) for each in seeds], float)  # [seeds, n]
    if np.isinf(read).any():
        return {"mean": None, "ci_low": None, "ci_high": None}
    return mean_interval(np.nanmean(read, 1) if len(read) > 1 else read[0])


# --- Where figures come from --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Script:
    """Another benchmark, whose JSON is read.

    Attributes:
        file: beside this one.
        quick: its arguments where the code is tried.
        seeded: it takes `--seeds` and keeps results under `--out`.
    """

    file: str
    quick: tuple[str, ...] = ()
    seeded: bool = False


class Bench:
    """Makes the figures that rows ask for, each of them once.

    Args:
        targets: by name, which is that of a target's folder, too.
        seeds: of training.
        out: folder of trainings.
        runs: file with a line for each seed that is done.
        quick: next to no training.
        num_workers, learner_threads: of training.
    """

    def __init__(
        self,
        targets: Mapping[str, Target],
        seeds: Sequence[int],
        out: Path,
        runs: Path,
        *,
        quick: bool = False,
        num_workers: int = 0,
        learner_threads: int = 1,
    ) -> None:
        self._targets = {name: _quick(target) if quick else target for name, target in targets.items()}
        self._seeds, self._out, self._runs, self._quick = seeds, out, runs, quick
        self._how = num_workers, learner_threads
        self._made: dict[Any, Any] = {}
        self.took: dict[str, Any] = {}  # by target: what its trainings were, for the reader

    def results(self, target: str) -> list[dict[str, Any]]:
        """Of all seeds."""
        return self._once(target, lambda: self._train(target))

    def played(self, player: str, target: str) -> Array:
        """A player's returns [n] of the trials that a target's policies are evaluated on before any inner step."""
        return self._once((player, target), lambda: self._play(player, target))

    def report(self, script: Script) -> dict[str, Any]:
        """What another benchmark prints."""
        return self._once(script, lambda: self._run(script))

    def _once(self, key: object, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _train(self, name: str) -> list[dict[str, Any]]:
        results, config = run_target(name, self._targets[name], self._seeds, self._out, self._runs, *self._how)
        keys = ("seed", "env_steps", "seconds", "untrained")
        self.took[name] = {**{key: [result[key] for result in results] for key in keys}, "config": config}
        return results

    def _play(self, player: str, name: str) -> Array:
        target = self._targets[name]
        log(f"{name}: {player} plays {target.num_tasks:,} trials")
        options = target.options
        trials = (options.get("task_options", {}), target.num_tasks, options.get("trial_episodes", 1))
        return play_held_out(player, target.task, *trials)

    def _run(self, script: Script) -> dict[str, Any]:
        arguments = [*script.quick] if self._quick else []
        if script.seeded:
            arguments += ["--seeds", *map(str, self._seeds), "--out", str(self._out / Path(script.file).stem)]
        log(f"python benchmarks/{script.file} {' '.join(arguments)}")
        command = [sys.executable, str(Path(__file__).with_name(script.file)), *arguments]
        return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def _quick(target: Target) -> Target:
    return replace(target, options={**target.options, **QUICK}, num_tasks=QUICK_TASKS, max_env_steps=None)


# --- Rows ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """The least that a cell's mean may be, or with `most` the greatest."""

    bound: float
    most: bool = False

    def met(self, cell: Cell) -> bool:
        """Whether it is kept; what was never reached does not keep it."""
        mean = cell["mean"]
        return mean is not None and bool(mean <= self.bound if self.most else mean >= self.bound)


Goals = tuple[Goal | None, ...]
"""Of a row: one a column (None: none), or empty."""


def least(*bounds: float | None) -> Goals:
    """One a column."""
    return tuple(None if bound is None else Goal(bound) for bound in bounds)


def most(*bounds: float | None) -> Goals:
    """One a column."""
    return tuple(None if bound is None else Goal(bound, most=True) for bound in bounds)


@dataclass(frozen=True)
class Row:
    """A line of a table: a figure, or None, a column.

    Attributes:
        name: heading; of published figures it says whose they are.
        goals: of the figures.
    """

    name: str
    figures: tuple[Figure | None, ...]
    goals: Goals = ()


class Figure(Protocol):
    """Makes a cell."""

    def __call__(self, bench: Bench) -> Cell: ...


def published(*values: float | tuple[float, float] | None) -> tuple[Figure | None, ...]:
    """Others' figures, with half their interval where it is known; None: none."""

    def figure(mean: float, half: float | None = None) -> Figure:
        low, high = (None, None) if half is None else (mean - half, mean + half)
        return lambda bench: {"mean": mean, "ci_low": low, "ci_high": high}

    return tuple(
        None if value is None else figure(*(value if isinstance(value, tuple) else (value,))) for value in values
    )


def ours(target: str, read: Reading) -> Figure:
    """A reading of a target's trainings."""
    return lambda bench: across([read(result) for result in bench.results(target)])


def played(player: str, target: str) -> Figure:
    """A classical player on the trials that a target's policies are evaluated on; the interval is over trials."""
    return lambda bench: mean_interval(bench.played(player, target))


def paired(target: str, player: str) -> Figure:
    """Ours before any inner step, mean over seeds, less a player on the same trials; the interval is over trials."""

    def figure(bench: Bench) -> Cell:
        own = np.mean([returns(0)(result) for result in bench.results(target)], 0)
        return mean_interval(own - bench.played(player, target))

    return figure


def reported(script: Script, *path: str) -> Figure:
    """What another benchmark prints under keys: a number or a cell."""

    def figure(bench: Bench) -> Cell:
        found = _inside(bench.report(script), path)
        return found if isinstance(found, dict) else {"mean": found, "ci_low": None, "ci_high": None}

    return figure


def _inside(found: Any, path: tuple[str, ...]) -> Any:
    return functools.reduce(lambda outer, key: outer[key], path, found)


# --- Curves -------------------------------------------------------------------------------------------------

Point = dict[str, Any]
"""`env_steps`, `seconds`, and `returns`, a list."""

Curve = Callable[[Bench], list[Point]]
"""Returns at each quarter of a run, mean over seeds."""


def in_training(target: str) -> Curve:
    """Training returns of the last `SMOOTHED` iterations after 0..S inner steps."""

    def curve(bench: Bench) -> list[Point]:
        runs = [result["curve"] for result in bench.results(target)]
        return [_point([run[:end] for run, end in zip(runs, ends)]) for ends in zip(*map(_quarters, runs))]

    return curve


def _point(runs: list[list[dict[str, Any]]]) -> Point:
    adapted = [np.mean([each["return_by_step"] for each in run[-SMOOTHED:]], 0) for run in runs]
    return {
        "env_steps": float(np.mean([run[-1]["env_steps"] for run in runs])),
        "seconds": float(np.mean([sum(each["seconds"] for each in run) for run in runs])),
        "returns": np.mean(adapted, 0).tolist(),
    }


def reported_curve(script: Script, *path: str) -> Curve:
    """What another benchmark prints under keys: points of `env_steps`, `seconds` and `return`."""

    def curve(bench: Bench) -> list[Point]:
        found = _inside(bench.report(script), path)
        points = [found[end - 1] for end in _quarters(found)]
        return [
            {**{key: each[key] for key in ("env_steps", "seconds")}, "returns": [each["return"]]} for each in points
        ]

    return curve


def _quarters(entries: Sequence[Any]) -> list[int]:
    """How many entries there are at each quarter, at least one."""
    return [max(len(entries) * quarter // 4, 1) for quarter in (1, 2, 3, 4)]


# --- A table ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Table:
    """What stands beside what.

    Attributes:
        title: what the figures are.
        columns: headings.
        rows: figures, one a column.
        notes: what a reader has to know to compare the rows.
        curves: by name.
        curve_columns: headings of the curves' returns.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    curves: Mapping[str, Curve] = field(default_factory=dict)
    curve_columns: tuple[str, ...] = ()

    def make(self, bench: Bench) -> dict[str, Any]:
        """All of it as JSON values, for `render.section`."""
        rows = [(row, [figure and figure(bench) for figure in row.figures]) for row in self.rows]
        goals = [
            {"row": row.name, "column": column, "bound": goal.bound, "most": goal.most, **cell, "met": goal.met(cell)}
            for row, cells in rows
            for column, cell, goal in zip(self.columns, cells, row.goals)
            if goal and cell
        ]
        return {
            "title": self.title,
            "columns": list(self.columns),
            "rows": [{"name": row.name, "cells": cells} for row, cells in rows],
            "goals": goals,
            "goals_met": all(goal["met"] for goal in goals),
            "curve_columns": list(self.curve_columns),
            "curves": {name: curve(bench) for name, curve in self.curves.items()},
            "took": bench.took,
            "notes": list(self.notes),
        }
