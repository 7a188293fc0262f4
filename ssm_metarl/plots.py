"""Pictures of a run: learning curve and adaptation curve."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import cycle, product
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_COLOURS = ("#7f8c8d", "#0b6fa4", "#c0392b", "#27ae60", "#8e44ad")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``; a last one that is not complete (yet) is left out.

    Raises:
        ValueError: there is none, or it holds no iteration.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{run} is not the folder of a run: it has no metrics.jsonl.")
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    if not lines:
        raise ValueError(f"{path} holds no iteration yet.")
    return lines


def plot_run(run: Path, title: str) -> list[Path]:
    """Draw ``learning_curve.png`` from a run's metrics and, where it was evaluated, ``adaptation_curve.png``.

    Args:
        run: the run's folder.
        title: above the pictures, such as the task's name.

    Returns:
        The files written.

    Raises:
        ValueError: the folder holds no metrics.
    """
    files = [_learning_curve(read_metrics(run), run / "learning_curve.png", title)]
    evaluation = run / "evaluation.json"
    if evaluation.is_file():
        files.append(_adaptation_curve(json.loads(evaluation.read_text()), run / "adaptation_curve.png", title))
    return files


def _learning_curve(metrics: list[dict[str, Any]], path: Path, title: str) -> Path:
    figure, axes = _axes()
    steps = [line["env_steps"] / 1e6 for line in metrics]
    styles = product(("-", "--", ":"), _COLOURS)
    for stage, (style, colour) in zip(range(len(metrics[0]["return_by_step"])), cycle(styles), strict=False):
        label = "before adaptation" if stage == 0 else f"after {stage} inner step{'s' * (stage > 1)}"
        returns = [line["return_by_step"][stage] for line in metrics]
        axes.plot(steps, returns, label=label, color=colour, linestyle=style, marker="o", markersize=3)
    axes.set(
        xlabel="environment steps (millions)", ylabel="mean return of the meta-batch", title=f"Meta-training on {title}"
    )
    axes.legend(frameon=False)
    return _write(figure, path)


def _adaptation_curve(evaluation: Mapping[str, Any], path: Path, title: str) -> Path:
    figure, axes = _axes()
    steps = range(len(evaluation["return"]))
    axes.plot(steps, evaluation["return"], color=_COLOURS[1], marker="o")
    axes.fill_between(
        steps, evaluation["ci_low"], evaluation["ci_high"], color=_COLOURS[1], alpha=0.2, label="95 % interval"
    )
    axes.set(
        xlabel="inner steps",
        ylabel="mean return",
        title=f"Adaptation to {evaluation['num_tasks']} held-out tasks of {title} ({evaluation['split']})",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    return _write(figure, path)


def _axes() -> tuple[Figure, Any]:
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    return figure, axes


def _write(figure: Figure, path: Path) -> Path:
    FigureCanvasAgg(figure).print_png(str(path))
    return path
