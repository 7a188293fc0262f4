"""What a run writes beside its checkpoints: metrics.jsonl, a line an iteration, and evaluation.json at the end."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from typing import Any

from ssm_metarl.storage.atomic import replace_file
from ssm_metarl.storage.documents import (
    CheckpointError,
    any_number,
    list_of,
    map_of,
    maybe,
    number,
    read_lines,
    read_object,
    record,
    text,
    whole,
)

METRICS, EVALUATION = "metrics.jsonl", "evaluation.json"

_SECONDS = record({"total": number(above=0.0)}, dict.fromkeys(("sample", "adapt", "update", "ray"), number(low=0.0)))

METRICS_FORM = record(
    {
        "iteration": whole(1),
        "env_steps": whole(),
        "return_by_step": list_of(any_number, 1),
        "seconds": _SECONDS,
    },
    others=True,
)
"""Of a line of metrics; what else is in it is an algorithm's own."""

EVALUATION_FORM = record(
    {
        "task": text,
        "split": text,
        "return": list_of(any_number, 1),
        "ci_low": list_of(maybe(number()), 1),
        "ci_high": list_of(maybe(number()), 1),
        "episode_length": list_of(any_number, 1),
        "num_tasks": whole(1),
    },
    {
        "checkpoint": text,
        "return_by_episode": list_of(list_of(maybe(number()), 1), 1),
        "success_by_episode": list_of(list_of(maybe(number(0.0)), 1), 1),
    },
    others=True,
)
"""Of `Evaluation.summary()`; a run's own also names its "checkpoint"."""

_INTERVAL = record({"value": any_number, "ci_low": maybe(number()), "ci_high": maybe(number())}, others=True)

MODES_FORM = record(
    {
        "task": text,
        "split": text,
        "num_tasks": whole(1),
        "compared_with": text,
        "modes": map_of(
            record(
                {
                    **dict.fromkeys(("mean", "iqm", "gain"), _INTERVAL),
                    "probability_of_improvement": any_number,
                    "unchanged_tasks": any_number,
                    "environment_steps_per_task": any_number,
                },
                others=True,
            )
        ),
    },
    others=True,
)
"""Of `ModeComparison.summary()`."""


CARD = "card.json"

_FACTS = record(
    {},
    {
        "about": text,
        "command": text,
        "date": text,
        "training_seconds": number(low=0.0),
        "evaluation": EVALUATION_FORM,
        "modes": MODES_FORM,
    },
    others=True,
)
"""Of a card, which stands beside a shipped model's checkpoint."""


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`; a last one that is not complete (yet) is left out.

    Raises:
        ValueError: there is none, or it holds no iteration.
        CheckpointError: a line is damaged or foreign.
    """
    path = run / METRICS
    if not os.path.lexists(path):
        raise ValueError(f"{run} is not the folder of a run: it has no {METRICS}.")
    lines = [values for _, values in _lines(path)]
    if not lines:
        raise ValueError(f"{path} holds no iteration yet.")
    return lines


def cut_metrics(path: Path, iteration: int) -> list[float]:
    """Drop lines after `iteration`, of a run that died before its next checkpoint; return adapted returns left.

    Raises:
        CheckpointError: a line is damaged or foreign; nothing is dropped.
    """
    if not os.path.lexists(path):
        return []
    kept = [(line, values) for line, values in _lines(path) if values["iteration"] <= iteration]
    replace_file(path, "".join(line + "\n" for line, _ in kept).encode())
    return [float(values["return_by_step"][-1]) for _, values in kept]


def read_evaluation(path: Path) -> dict[str, Any] | None:
    """The evaluation of a run, or None where it has none.

    Raises:
        CheckpointError: it is damaged or foreign.
    """
    return check_evaluation(path, read_object(path, EVALUATION_FORM, constants=True)) if os.path.lexists(path) else None


def read_card(path: Path) -> dict[str, Any]:
    """What a card says of the model beside it, which no checksum vouches for; empty where there is none.

    Raises:
        CheckpointError: it is damaged or foreign.
    """
    card = read_object(path, _FACTS, constants=True) if os.path.lexists(path) else {}
    if "evaluation" in card:
        check_evaluation(path, card["evaluation"])
    return card


def check_evaluation(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """The values of `EVALUATION_FORM`, if there are equally many for each step.

    Raises:
        CheckpointError: there are not.
    """
    counts = {len(values[name]) for name in ("return", "ci_low", "ci_high", "episode_length")}
    if len(counts) > 1:
        raise CheckpointError(f"{path} is damaged or foreign: it has other numbers of returns, bounds and lengths.")
    return values


def _lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Lines of metrics, if they are of one run: iterations ascend, and each has as many returns."""
    lines = list(read_lines(path, METRICS_FORM, constants=True))
    for line, ((_, before), (_, after)) in enumerate(pairwise(lines), 2):
        if after["iteration"] <= before["iteration"] or after["env_steps"] < before["env_steps"]:
            raise CheckpointError(f"{path}, line {line} is damaged or foreign: iterations and steps must ascend.")
        if len(after["return_by_step"]) != len(before["return_by_step"]):
            raise CheckpointError(f"{path}, line {line} is damaged or foreign: it has another number of returns.")
    return lines
