"""The metrics of an iteration: numbers by name, which Tune's schedulers and searchers compare, and lists beneath."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

DETAILS = "details"
"""Entry of an iteration's metrics that holds the lists."""

BY_STEP = ("return_step_", "episode_length_step_")
"""What the names of numbers begin with that the lists hold, too."""


def returns_metrics(
    returns: Sequence[float],
    lengths: Sequence[float],
    dropped_tasks: Sequence[Any] = (),
    successes: Sequence[float] = (),
) -> dict[str, Any]:
    """What was played in an iteration.

    Args:
        returns: mean undiscounted return after 0..S inner steps.
        lengths: mean length of an episode after 0..S inner steps, environment steps.
        dropped_tasks: the tasks that were given up, JSON values.
        successes: share of trials that succeeded after 0..S inner steps; none where the environment does not tell.

    Returns:
        `return_before`, `return_after`, and `episode_return_mean`, which is the latter under the name that RLlib's
        users know; `return_step_0` … and `episode_length_step_0` …; and under `details` the lists `return_by_step`,
        `episode_length_by_step` and `dropped_tasks`. With successes also `success_after` and the list
        `success_by_step`.
    """
    found: dict[str, Any] = {
        "return_before": returns[0],
        "return_after": returns[-1],
        "episode_return_mean": returns[-1],
    }
    for prefix, values in zip(BY_STEP, (returns, lengths)):
        found |= {f"{prefix}{step}": value for step, value in enumerate(values)}
    found[DETAILS] = {
        "return_by_step": list(returns),
        "episode_length_by_step": list(lengths),
        "dropped_tasks": list(dropped_tasks),
    }
    if successes:
        found["success_after"] = successes[-1]
        found[DETAILS]["success_by_step"] = list(successes)
    return found


def log_line(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """An iteration's metrics as a line of `metrics.jsonl`: the lists at the top, and no number twice."""
    twice = ("return_before", "return_after", "episode_return_mean", "success_after", DETAILS)
    line = {name: value for name, value in metrics.items() if name not in twice and not name.startswith(BY_STEP)}
    return {**line, **metrics[DETAILS]}
