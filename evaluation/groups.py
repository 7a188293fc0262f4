"""Groups of runs side by side, with the statistics of rliable (Agarwal et al. 2021, arXiv 2108.13264)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ssm_metarl.algorithms.rollouts import Array
from ssm_metarl.algorithms.statistics import (
    interquartile_mean,
    interval_values,
    percentile_interval,
    probability_of_improvement,
)
from ssm_metarl.storage.mirror import STATE
from ssm_metarl.storage.run_log import EVALUATION, METRICS, read_evaluation, read_metrics

RESAMPLES = 2000
"""Bootstrap resamples of an interval."""

POINTS = 60
"""Of a curve over environment steps, or of a profile over scores."""


@dataclass(frozen=True)
class Run:
    """What is compared of a run.

    Attributes:
        folder: of the run.
        task: family that it was evaluated on.
        score: mean return over held-out tasks after the last inner step.
        steps: [E] environment steps, after each iteration.
        returns: [E] mean return after adaptation of each iteration's meta-batch.
    """

    folder: Path
    task: str
    score: float
    steps: Array
    returns: Array


@dataclass(frozen=True)
class Group:
    """Runs that differ in the seed, of one task or of several.

    Attributes:
        name: of the group.
        runs: at least one.
        missing: folders of runs that were not evaluated, which no statistic counts.
    """

    name: str
    runs: Sequence[Run]
    missing: Sequence[Path] = ()

    @cached_property
    def tasks(self) -> list[str]:
        """Their task families, sorted."""
        return sorted({run.task for run in self.runs})

    def scores(self, task: str) -> Array:
        """[R], of the runs of a task."""
        return np.array([run.score for run in self.runs if run.task == task])


def read_group(words: str) -> Group:
    """The runs of one argument of a comparison.

    Args:
        words: a run's folder, or one that holds runs; with NAME= before it, under that name.

    Raises:
        ValueError: there is no run that was evaluated, one whose return is no number, or one of evolve; one sentence.
        CheckpointError: a file of a run is damaged.
    """
    name, _, place = words.rpartition("=")
    folder = Path(place)
    if (folder / STATE).is_file():
        raise ValueError(
            f"{folder} is a run of evolve, which evaluates no return: train --schedule {folder} repeats it as a run "
            "that does."
        )
    inside = sorted({path.parents[mark.count("/")] for mark in (METRICS, STATE) for path in folder.glob(f"*/{mark}")})
    found = [folder] if (folder / METRICS).is_file() else inside
    evaluated = [folder for folder in found if (folder / EVALUATION).is_file()]
    runs = [_read_run(folder) for folder in evaluated]
    if not runs:
        raise ValueError(f"{folder} holds no run that was evaluated: a run of train has {METRICS} and {EVALUATION}.")
    return Group(name or folder.resolve().name, runs, [folder for folder in found if folder not in evaluated])


def _read_run(folder: Path) -> Run:
    evaluation, lines = read_evaluation(folder / EVALUATION), read_metrics(folder)
    assert evaluation is not None
    score = float(evaluation["return"][-1])
    if not np.isfinite(score):  # to leave it out would count the better runs alone
        raise ValueError(f"{folder} cannot be compared: its evaluation has no return.")
    steps, returns = ([line["env_steps"] for line in lines], [line["return_by_step"][-1] for line in lines])
    return Run(folder, evaluation["task"], score, np.array(steps), np.array(returns, float))


def on_common_steps(curves: Sequence[tuple[Array, Array]], points: int = POINTS) -> tuple[Array, Array]:
    """Curves at the steps that all of them have.

    Args:
        curves: steps [E] and values [E] of each of R curves.
        points: number of steps G.

    Returns:
        Steps [G] and values [R, G], interpolated.
    """
    first, last = max(steps[0] for steps, _ in curves), min(steps[-1] for steps, _ in curves)
    grid = np.linspace(first, max(first, last), points)
    return grid, np.stack([np.interp(grid, steps, values) for steps, values in curves])


def resampled(
    scores: Mapping[str, Array], statistic: Callable[[list[Array]], float], rng: np.random.Generator
) -> dict[str, float | None]:
    """A statistic of runs with its 95 % interval: runs are drawn with replacement within each task (the strata).

    Args:
        scores: [R] by task; the number of runs may differ.
        statistic: of one array a task.
        rng: equal generators give equal intervals.

    Returns:
        `value`, `ci_low` and `ci_high`; None for bounds where a task has a single run.
    """
    values = list(scores.values())
    value, fewest = statistic(values), min(map(len, values))
    if fewest < 2:
        return interval_values(value, np.nan, np.nan)
    drawn = [statistic([each[rng.integers(len(each), size=len(each))] for each in values]) for _ in range(RESAMPLES)]
    count = sum(map(len, values)) - len(values) + 1
    return interval_values(value, *percentile_interval(np.array(drawn), value, max(count, 2)))


def compare_groups(groups: Sequence[Group], seed: int = 0) -> dict[str, Any]:
    """Aggregates of groups, and how likely a run of each does better than one of the first.

    Scores are returns. Over several tasks they are put on a scale from 0, the worst run of all groups on a task, to 1,
    the best one.

    Returns:
        JSON values: `tasks`; `normalised`; and by group `runs`, `iqm` and `mean` with intervals, `profile` (share of
        runs with a score above each of `thresholds`), `curve` (IQM of training returns over environment steps with
        bounds, of a single task), and `improvement` over the first group.

    Raises:
        ValueError: the groups have other tasks.
    """
    tasks = groups[0].tasks
    for group in groups[1:]:
        if group.tasks != tasks:
            raise ValueError(
                f"{group.name} has runs of {', '.join(group.tasks)}, {groups[0].name} of {', '.join(tasks)}: only runs "
                "of the same tasks compare."
            )
    scores = {group.name: {task: group.scores(task) for task in tasks} for group in groups}
    if len(tasks) > 1:
        scores = _normalised(scores, tasks)
    every = np.concatenate([each for by_task in scores.values() for each in by_task.values()])
    thresholds = np.linspace(every.min(), every.max(), POINTS)
    found: dict[str, Any] = {}
    for group in groups:
        own, rng = scores[group.name], np.random.default_rng(seed)
        flat = np.concatenate(list(own.values()))
        found[group.name] = {
            "runs": len(group.runs),
            "iqm": resampled(own, lambda values: interquartile_mean(np.concatenate(values)), rng),
            "mean": resampled(own, lambda values: float(np.mean([each.mean() for each in values])), rng),
            "profile": [float(np.mean(flat > threshold)) for threshold in thresholds],
            "curve": _curve(group, rng) if len(tasks) == 1 else None,
        }
        if group is not groups[0]:
            found[group.name]["improvement"] = _improvement(own, scores[groups[0].name], rng)
    return {
        "tasks": tasks,
        "normalised": len(tasks) > 1,
        "thresholds": thresholds.tolist(),
        "groups": found,
    }


def _normalised(scores: Mapping[str, Mapping[str, Array]], tasks: Sequence[str]) -> dict[str, dict[str, Array]]:
    found: dict[str, dict[str, Array]] = {name: {} for name in scores}
    for task in tasks:
        every = np.concatenate([by_task[task] for by_task in scores.values()])
        low, span = every.min(), np.ptp(every) or 1.0
        for name in scores:
            found[name][task] = (scores[name][task] - low) / span
    return found


def _improvement(
    scores: Mapping[str, Array], others: Mapping[str, Array], rng: np.random.Generator
) -> dict[str, float | None]:
    """The chance that a run is better than one of the other group on the same task, ties count half."""
    half = len(scores)
    both = {**{f"own {task}": each for task, each in scores.items()}, **{f"other {t}": e for t, e in others.items()}}

    def chance(values: list[Array]) -> float:
        pairs = zip(values[:half], values[half:])
        return float(np.mean([probability_of_improvement(one[None], other[None]) for one, other in pairs]))

    found = resampled(both, chance, rng)
    return {name: None if value is None else min(max(value, 0.0), 1.0) for name, value in found.items()}


def _curve(group: Group, rng: np.random.Generator) -> dict[str, list[float]]:
    """IQM over runs of training returns after adaptation, by environment steps that all of them have."""
    steps, returns = on_common_steps([(run.steps, run.returns) for run in group.runs])
    middle = np.array([interquartile_mean(column) for column in returns.T])
    low, high = middle, middle
    if len(returns) > 1:
        drawn = np.stack(
            [
                [interquartile_mean(column) for column in returns[rng.integers(len(returns), size=len(returns))].T]
                for _ in range(RESAMPLES // 10)
            ]
        )
        low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    names = ("steps", "iqm", "low", "high")
    return {name: values.tolist() for name, values in zip(names, (steps, middle, low, high))}
