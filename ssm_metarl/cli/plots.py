"""Pictures of a run: learning curve and adaptation curve, how a population evolved, or how a policy met a task."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from itertools import cycle, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import get_data_path
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

from ssm_metarl.algorithms.rollouts import Rollouts
from ssm_metarl.tasks.cartpole import MAX_ANGLE, MAX_POSITION, TIME_STEP

LISTED = 12
"""Mutations that are listed beside a lineage, the last ones that were kept."""

_COLOURS = ("#7f8c8d", "#0b6fa4", "#c0392b", "#27ae60", "#8e44ad")

# Of an animation: two panels side by side, in pixels, drawn larger and then reduced, which smooths the edges.
_WIDTH, _HEIGHT, _SCALE = 380, 280, 2
_GROUND, _METRE, _CART = 222, 68, 0.25  # the ground's place in a panel, pixels a metre, and a cart's height in metres
_STRIDE, _PAUSE = 3, 10  # steps a frame, and frames for which the end of an episode is held


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`; a last one that is not complete (yet) is left out.

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
    """Draw `learning_curve.png` from a run's metrics and, where adaptation was evaluated, `adaptation_curve.png`.

    Args:
        run: the run's folder.
        title: above the pictures, such as the task's name.

    Returns:
        The files written.

    Raises:
        ValueError: the folder holds no metrics.
    """
    files = [_learning_curve(read_metrics(run), run / "learning_curve.png", title)]
    path = run / "evaluation.json"
    evaluation = json.loads(path.read_text()) if path.is_file() else {"return": []}
    if len(evaluation["return"]) > 1:
        files.append(_adaptation_curve(evaluation, run / "adaptation_curve.png", title))
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
    low, high = (np.array(evaluation[bound], float) for bound in ("ci_low", "ci_high"))  # NaN: no interval
    axes.fill_between(steps, low, high, color=_COLOURS[1], alpha=0.2, label="95 % over tasks")
    axes.set(
        xlabel="inner steps",
        ylabel="mean return",
        title=f"Adaptation to {evaluation['num_tasks']} held-out tasks of {title} ({evaluation['split']})",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    return _write(figure, path)


def plot_evolution(run: Path, title: str, folder: Path | None = None) -> list[Path]:
    """Draw `lineage.png` and `evolution.png` from the decisions of a self-improving run.

    Args:
        run: the run's folder.
        title: above the pictures, such as the task's name.
        folder: where to; None: into the run's.

    Returns:
        The files written.

    Raises:
        ValueError: the run's folder holds no decision.
    """
    path = run / "rsi" / "events.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    ends = [event for event in map(json.loads, lines) if event["kind"] in ("training", "probation")]
    if not ends:
        raise ValueError(f"{run} holds no generation of a self-improving run: there is no decision in {path}.")
    folder = folder or run
    return [
        _lineage(ends, folder / "lineage.png", title),
        _metrics_by_generation(ends, folder / "evolution.png", title),
    ]


def _lineage(ends: list[dict[str, Any]], path: Path, title: str) -> Path:
    """Every trial of every generation: where it came from, where it got to, and what became of it."""
    figure, axes = _axes()
    kept: list[str] = []
    place = {event["checkpoint"]: (event["generation"], event["composite"]) for event in ends}
    styles = {"continued": (_COLOURS[0], "o"), "kept": (_COLOURS[3], "^"), "rolled back": (_COLOURS[2], "x")}
    for event in ends:
        colour, marker = styles[event["decision"]]
        x, y = place[event["checkpoint"]]
        if event["start"] in place:
            start_x, start_y = place[event["start"]]
            axes.plot([start_x, x], [start_y, y], color=colour, linewidth=1, alpha=0.6)
        axes.plot([x], [y], color=colour, marker=marker, linestyle="")
        if event["decision"] == "kept":
            # A number here and the text beside the picture: kept trials are close to each other.
            changes = [f"{name} {value:g} → {event['after'][name]:g}" for name, value in event["before"].items()]
            kept.append(f"{len(kept) + 1}  " + "\n     ".join(changes))
            side = 6 if len(kept) % 2 else -6  # two of one generation can be in the same place
            axes.annotate(str(len(kept)), (x, y), xytext=(side, 4), textcoords="offset points", fontsize=8, ha="center")
    for name, (colour, marker) in styles.items():
        axes.plot([], [], color=colour, marker=marker, label=name)
    axes.set(xlabel="generation", ylabel="composite on validation tasks", title=f"Lineage of a population on {title}")
    axes.margins(y=0.1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, loc="lower right")
    if kept:
        figure.set_size_inches(9, 4.2)
        texts = [Line2D([], [], linestyle="", label=text) for text in kept[-LISTED:]]
        figure.legend(handles=texts, loc="outside right upper", title="kept", fontsize=7, frameon=False, handlelength=0)
    return _write(figure, path)


def _metrics_by_generation(ends: list[dict[str, Any]], path: Path, title: str) -> Path:
    """The five metrics and the composite of each generation's best trial that was not rolled back."""
    best: dict[int, dict[str, Any]] = {}
    for event in ends:
        other = best.get(event["generation"])
        if event["decision"] != "rolled back" and (other is None or event["composite"] > other["composite"]):
            best[event["generation"]] = event
    generations = sorted(best)
    figure, axes = _axes()
    for name, colour in zip(best[generations[0]]["metrics"], cycle((*_COLOURS[1:], "#d68910"))):
        values = [best[generation]["metrics"].get(name) for generation in generations]
        axes.plot(
            generations, values, label=name.replace("_", " "), color=colour, linewidth=1, marker="o", markersize=3
        )
    axes.plot(generations, [best[g]["composite"] for g in generations], label="composite", color="black", linewidth=2)
    low, high = np.array([best[generation]["interval"] for generation in generations], float).T  # NaN: no interval
    axes.fill_between(generations, low, high, color="black", alpha=0.12, label="composite, 95 % over tasks")
    axes.set(xlabel="generation", ylabel="metric of the best trial", ylim=(0, 1), title=f"Self-improvement on {title}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=8, ncols=2)
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


def plot_task(folder: Path, summary: Mapping[str, Any], before: Rollouts, after: Rollouts) -> list[Path]:
    """Draw a policy's adaptation to one task: `adaptation_curve.png`, and what it did before and after.

    Args:
        folder: where to.
        summary: `TaskReport.summary()`.
        before, after: fresh episodes of the one task, [1, T, K, ...].

    Returns:
        The files written: the curve; `trajectories.png` for navigation-2d, `before_after.gif` for cartpole.
    """
    figure, axes = _axes()
    steps = range(len(summary["curve"]))
    axes.plot(steps, summary["curve"], color=_COLOURS[1], marker="o", label="its own episodes")
    best = summary["best_step"]
    axes.plot([best], [summary["curve"][best]], color=_COLOURS[3], marker="o", markersize=9, linestyle="", label="best")
    for name, colour in (("before", _COLOURS[0]), ("after", _COLOURS[3])):
        fresh = summary[name]
        axes.axhline(fresh["return"], color=colour, linestyle="--", linewidth=1, label=f"fresh episodes {name}")
        if fresh["ci_low"] is not None:
            axes.axhspan(fresh["ci_low"], fresh["ci_high"], color=colour, alpha=0.1)
    axes.set(xlabel="adaptation steps", ylabel="return", title=f"Adaptation ({summary['mode']}) on {summary['task']}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=8)
    files = [_write(figure, folder / "adaptation_curve.png")]
    if summary["task"] == "navigation-2d":
        files.append(_trajectories(before, after, summary["parameters"]["goal"], folder / "trajectories.png"))
    if summary["task"] == "cartpole":
        files.append(_animation(before, after, summary, folder / "before_after.gif"))
    return files


def _trajectories(before: Rollouts, after: Rollouts, goal: list[float], path: Path) -> Path:
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    for axes, record, name in zip(figure.subplots(1, 2), (before, after), ("before", "after"), strict=True):
        for slot, length in enumerate(record.lengths()[0].tolist()):
            steps = [record.observations[0, :length, slot], record.last_observations[0, slot][None]]
            x, y = np.concatenate(steps).T
            axes.plot(x, y, color=_COLOURS[1], linewidth=0.8, alpha=0.5)
        axes.plot([0], [0], color="black", marker="o", linestyle="", label="start")
        axes.plot(
            *[[number] for number in goal], color=_COLOURS[2], marker="*", markersize=13, linestyle="", label="goal"
        )
        axes.set(title=f"{name}: return {np.nanmean(record.returns()):.1f}", aspect="equal")
        axes.set_adjustable("datalim")
        axes.grid(alpha=0.3)
    figure.axes[0].legend(frameon=False, fontsize=8)
    return _write(figure, path)


class _Moment(NamedTuple):
    """A frame's cart: state [4], number of the episode, its steps so far, and whether it has just been lost."""

    state: np.ndarray
    episode: int
    steps: int
    lost: bool


def _animation(before: Rollouts, after: Rollouts, summary: Mapping[str, Any], path: Path) -> Path:
    """Fresh episodes of each, one after another in real time, for as long as the longest episode lasts."""
    steps, pole = summary["best_step"], 2 * summary["parameters"]["length"]  # the task's length is half the pole's
    titles = {"before": "before adaptation", "after": f"after {steps} gradient step{'s' * (steps != 1)}"}
    longest = max(int(record.lengths().max()) for record in (before, after))
    background = Image.new("RGB", (2 * _WIDTH * _SCALE, _HEIGHT * _SCALE), "white")
    draw = ImageDraw.Draw(background)
    for panel, (name, title) in enumerate(titles.items()):
        words = f"mean return {summary[name]['return']:.0f}"
        for text, size, y, colour in ((title, 17, 22, "black"), (words, 13, 46, _COLOURS[0])):
            draw.text(_point(panel, _WIDTH / 2, y), text, colour, _font(size), anchor="mm")
    frames = []
    for moments in zip(*(_film(record, longest) for record in (before, after)), strict=True):
        frame = background.copy()
        draw = ImageDraw.Draw(frame)
        for panel, moment in enumerate(moments):
            _draw_cart(draw, panel, moment, pole)
            _draw_clock(draw, panel, moment, longest)
        frames.append(frame.reduce(_SCALE))
    some = Image.fromarray(np.concatenate([np.asarray(frame) for frame in frames[:: len(frames) // 8 + 1]]))
    palette = some.quantize(64, Image.Quantize.FASTOCTREE)
    indexed = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    milliseconds = round(1000 * TIME_STEP * _STRIDE)
    indexed[0].save(path, save_all=True, append_images=indexed[1:], duration=milliseconds, loop=0)
    return path


def _film(record: Rollouts, longest: int) -> list[_Moment]:
    """As many frames as the longest episode has; the end of an episode is held, then the next one begins."""
    film: list[_Moment] = []
    count = -(-longest // _STRIDE) + _PAUSE
    for number, slot in enumerate(cycle(np.flatnonzero(record.lengths()[0]).tolist()), start=1):
        length = int(record.lengths()[0, slot])
        states = record.observations[0, :length, slot]
        film += [_Moment(states[step], number, step + 1, False) for step in range(0, length, _STRIDE)]
        lost = bool(record.terminated[0, length - 1, slot])
        film += [_Moment(record.last_observations[0, slot] if lost else states[-1], number, length, lost)] * _PAUSE
        if len(film) >= count:
            break
    return film[:count]


def _point(panel: int, x: float, y: float) -> tuple[float, float]:
    """A panel's point in the enlarged picture."""
    return (panel * _WIDTH + x) * _SCALE, y * _SCALE


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size * _SCALE)


def _draw_cart(draw: ImageDraw.ImageDraw, panel: int, moment: _Moment, pole: float) -> None:
    """Cart, pole of so many metres, and in grey the angles and places within which an episode goes on."""
    x, _, angle, _ = moment.state.tolist()

    def place(x: float, y: float) -> tuple[float, float]:
        return _point(panel, _WIDTH / 2 + x * _METRE, _GROUND - y * _METRE)

    def tip(angle: float) -> tuple[float, float]:
        return place(x + pole * np.sin(angle), _CART + pole * np.cos(angle))

    draw.polygon([place(x, _CART), tip(-MAX_ANGLE), tip(0), tip(MAX_ANGLE)], "#e8ecef")
    draw.line([place(-MAX_POSITION, 0), place(MAX_POSITION, 0)], _COLOURS[0], 2 * _SCALE)
    for side in (-MAX_POSITION, MAX_POSITION):
        draw.line([place(side, -0.07), place(side, 0.07)], _COLOURS[0], 2 * _SCALE)
    draw.rounded_rectangle([place(x - _CART, _CART), place(x + _CART, 0.02)], 3 * _SCALE, "#2c3e50")
    colour = _COLOURS[2] if moment.lost else _COLOURS[1]
    draw.line([place(x, _CART), tip(angle)], colour, 6 * _SCALE)
    for end in (place(x, _CART), tip(angle)):
        draw.circle(end, 3 * _SCALE, colour)


def _draw_clock(draw: ImageDraw.ImageDraw, panel: int, moment: _Moment, longest: int) -> None:
    """A bar of the episode's steps so far."""
    left, right, top, bottom = 28, _WIDTH - 168, _HEIGHT - 30, _HEIGHT - 22
    colour = _COLOURS[2] if moment.lost else _COLOURS[3]
    for end, fill in ((right, "#e8ecef"), (left + (right - left) * moment.steps / longest, colour)):
        draw.rectangle([_point(panel, left, top), _point(panel, end, bottom)], fill)
    words = f"episode {moment.episode}, step {moment.steps}"
    draw.text(_point(panel, right + 12, (top + bottom) / 2), words, "black", _font(13), anchor="lm")
