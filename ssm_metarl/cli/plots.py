"""Pictures of a run: learning curve and adaptation curve, how a population evolved, or how a policy met a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from ssm_metarl.cli.tables import decimals
from ssm_metarl.evaluation.film import Film
from ssm_metarl.storage.run_log import EVALUATION, read_evaluation, read_metrics
from ssm_metarl.tasks.cartpole import MAX_ANGLE, MAX_POSITION, TIME_STEP
from ssm_metarl.tuning.metrics import METRICS, composite
from ssm_metarl.tuning.store import RunStore

LISTED = 12
"""Changes that are listed beside a lineage, the last ones that were accepted."""

_COLOURS = ("#7f8c8d", "#0b6fa4", "#c0392b", "#27ae60", "#8e44ad")

_LEGEND: Mapping[str, Mapping[str, Any]] = {
    "incumbent": {"color": _COLOURS[1], "linewidth": 1.5, "zorder": 2},
    "challenger that won": {"color": _COLOURS[3], "linewidth": 2, "marker": "^", "markersize": 6, "zorder": 3},
    "contender that lost": {"color": _COLOURS[0], "linewidth": 1, "alpha": 0.6, "zorder": 1},
}
"""The lines of a lineage."""

# Of an animation: two panels side by side, in pixels, drawn larger and then reduced, which smooths the edges.
_WIDTH, _HEIGHT, _SCALE = 380, 280, 2
_GROUND, _METRE, _CART = 222, 68, 0.25  # the ground's place in a panel, pixels a metre, and a cart's height in metres
_STRIDE, _PAUSE = 3, 10  # steps a frame, and frames for which the end of an episode is held

VIDEO_WIDTH, VIDEO_BAR, VIDEO_HOLD = 320, 24, 1500
"""Of a film: pixels of its greatest width and of the line above it, and milliseconds for which its end is held."""


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
    evaluation = read_evaluation(run / EVALUATION)
    if evaluation and len(evaluation["return"]) > 1:
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
    """Draw `lineage.png` from the races and stretches of a self-improving run, and `evolution.png` from its metrics.

    Args:
        run: the run's folder.
        title: above the pictures, such as the task's name.
        folder: where to; None: into the run's.

    Returns:
        The files written; without `evolution.png` before the end of the first stretch.

    Raises:
        ValueError: the run's folder holds neither a race nor a stretch.
    """
    events = RunStore(run).events()
    if not has_lineage(events):
        raise ValueError(f"{run} holds no race of a self-improving run, and no stretch either: nothing can be drawn.")
    folder = folder or run
    files = [_lineage(events, folder / "lineage.png", title)]
    if stretches := [event for event in events if event["phase"] == "stretch" and event.get("metrics")]:
        files.append(_metrics_by_stretch(stretches, folder / "evolution.png", title))
    return files


def has_lineage(events: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a self-improving run has come so far that `plot_evolution` can draw it."""
    return any("contenders" in event or event.get("metrics") for event in events)


def _lineage(events: list[dict[str, Any]], path: Path, title: str) -> Path:
    """One line of incumbents, with a short branch for every challenger, and an arrow for every way back."""
    figure, axes = _axes()
    steps = _steps_by_iteration(events)
    line: dict[int, float] = {}  # level by meta-iteration, since the last time that the run went back
    accepted, went_back = list[str](), False
    for event in events:
        if event["decision"] == "rolled back":
            to, went_back = event["iteration"], True
            _draw_line(axes, steps, {at: level for at, level in line.items() if at <= to})
            _draw_line(axes, steps, {at: level for at, level in line.items() if at >= to}, alpha=0.35)
            _draw_way_back(axes, steps, line, to)
            line = {at: level for at, level in line.items() if at == to}
        for contender in event.get("contenders", ()):
            won = _won(contender, event)
            _draw_branch(axes, steps, line, event["iteration"], contender, won)
        if "contenders" in event:
            winner = next((c for c in event["contenders"] if _won(c, event)), event["contenders"][0])
            line |= dict(enumerate(winner.get("curve", ()), event["iteration"] + 1))
            for change in event["accepted"]:
                accepted.append(f"{change['option']} {change['before']:.3g} → {change['after']:.3g}")
                # A number here and the text beside the picture: races follow each other closely.
                y = line.get(event["iteration"] + len(winner.get("curve", ())), 0.0)
                x = steps(event["iteration"] + len(winner.get("curve", ())))
                side = 8 if len(accepted) % 2 else -13
                axes.annotate(
                    str(len(accepted)), (x, y), xytext=(0, side), textcoords="offset points", fontsize=8, ha="center"
                )
        curve = event.get("curve", ())
        line |= dict(enumerate(curve, event["iteration"] - len(curve) + 1))
    _draw_line(axes, steps, line)
    for label, style in _LEGEND.items():
        axes.plot([], [], label=label, **style)
    if went_back:
        axes.plot([], [], label="given up", **{**_LEGEND["incumbent"], "alpha": 0.35})
        axes.plot([], [], label="rolled back", color=_COLOURS[2])
    axes.set(
        xlabel="environment steps of the incumbent (millions)",
        ylabel="normalised return after adaptation",
        title=f"Lineage of a policy on {title}",
    )
    axes.margins(y=0.1)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    if accepted:
        figure.set_size_inches(9, 4.2)
        numbers = range(1, len(accepted) + 1)
        texts = [f"{number}  {change}" for number, change in zip(numbers, accepted, strict=True)][-LISTED:]
        handles = [Line2D([], [], linestyle="", label=text) for text in texts]
        figure.legend(
            handles=handles, loc="outside right upper", title="accepted", fontsize=7, frameon=False, handlelength=0
        )
    return _write(figure, path)


def _won(contender: Mapping[str, Any], event: Mapping[str, Any]) -> bool:
    """Whether a contender of a race won it: the first change accepted is the winner's."""
    first = event["accepted"][:1]
    return (contender["option"], contender["value"]) in [(change["option"], change["after"]) for change in first]


def _steps_by_iteration(events: list[dict[str, Any]]) -> Callable[[float], float]:
    """Millions of environment steps that a meta-iteration of the incumbent ended with, as far as events tell."""
    known = {event["iteration"]: event["env_steps"] / 1e6 for event in events}
    at = np.array(sorted(known), float)
    steps = np.array([known[iteration] for iteration in at])
    rate = steps[-1] / max(at[-1], 1.0)

    def millions(iteration: float) -> float:
        beyond = max(iteration - at[-1], 0.0) * rate - max(at[0] - iteration, 0.0) * rate
        return float(np.interp(iteration, at, steps) + beyond)

    return millions


def _draw_line(axes: Any, steps: Callable[[float], float], line: Mapping[int, float], alpha: float = 1.0) -> None:
    at = sorted(line)
    axes.plot([steps(i) for i in at], [line[i] for i in at], **_LEGEND["incumbent"], alpha=alpha)


def _draw_way_back(axes: Any, steps: Callable[[float], float], line: Mapping[int, float], to: int) -> None:
    """An arrow from the end of a line to the meta-iteration from which the run went on."""
    if not line:
        return
    last, nearest = max(line), min(line, key=lambda at: abs(at - to))
    arrow = {"arrowstyle": "->", "color": _COLOURS[2], "alpha": 0.8, "connectionstyle": "arc3,rad=.2"}
    axes.annotate("", xy=(steps(to), line[nearest]), xytext=(steps(last), line[last]), arrowprops=arrow)


def _draw_branch(
    axes: Any,
    steps: Callable[[float], float],
    line: Mapping[int, float],
    fork: int,
    contender: Mapping[str, Any],
    won: bool,
) -> None:
    """A challenger's levels from the fork on; the incumbent's own, where another one won, look like a challenger's."""
    curve = contender.get("curve", ())
    if not curve:
        return
    places = [steps(fork + number) for number in range(1, len(curve) + 1)]
    levels = list(curve)
    if fork in line:
        places, levels = [steps(fork), *places], [line[fork], *levels]
    style = _LEGEND["challenger that won" if won else "contender that lost"]
    axes.plot(places, levels, **{**style, "marker": ""})
    if won:
        axes.plot(places[-1:], levels[-1:], **style)


def _metrics_by_stretch(stretches: list[dict[str, Any]], path: Path, title: str) -> Path:
    """The five metrics and the composite of the incumbent at the end of every stretch."""
    figure, axes = _axes()
    steps = [event["spent"]["total"] / 1e6 for event in stretches]
    for name, colour in zip(METRICS, cycle((*_COLOURS[1:], "#d68910"))):
        values = np.array([event["metrics"].get(name) for event in stretches], float)
        axes.plot(steps, values, label=name.replace("_", " "), color=colour, linewidth=1, marker="o", markersize=3)
        if name == "average_return":
            bounds = [event["intervals"].get(name) or (np.nan, np.nan) for event in stretches]  # NaN: no interval
            low, high = np.array(bounds, float).T
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, label="average return, 95 % over tasks")
    whole = [composite(event["metrics"]) for event in stretches]
    axes.plot(steps, whole, label="composite", color="black", linewidth=2, marker="o", markersize=3)
    for event, x in zip(stretches, steps, strict=True):
        if event["decision"] == "rolled back":
            axes.axvline(x, color=_COLOURS[2], linewidth=1, linestyle=":")
    axes.set(
        xlabel="environment steps of the whole run (millions)",
        ylabel="metric of the incumbent",
        ylim=(0, 1),
        title=f"Self-improvement on {title}",
    )
    figure.legend(frameon=False, fontsize=8, ncols=4, loc="outside lower center")
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
    return _write_gif(frames, path, round(1000 * TIME_STEP * _STRIDE), colours=64)


def _write_gif(frames: Sequence[Image.Image], path: Path, milliseconds: int | list[int], colours: int) -> Path:
    """Frames as an animated GIF, with the colours of a few of them for all."""
    some = Image.fromarray(np.concatenate([np.asarray(frame) for frame in frames[:: len(frames) // 8 + 1]]))
    palette = some.quantize(colours, Image.Quantize.FASTOCTREE)
    indexed = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    indexed[0].save(path, save_all=True, append_images=indexed[1:], duration=milliseconds, loop=0)
    return path


def write_video(films: Mapping[str, Film], path: Path) -> Path:
    """Films side by side as an animated GIF; the shorter one holds its last frame.

    Args:
        films: by title.
        path: of the GIF, written over.
    """
    count = max(len(film.frames) for film in films.values())
    first = next(iter(films.values()))
    height, width, _ = first.frames[0].shape
    milliseconds = max(round(1000 * first.seconds), 20)  # what readers of GIFs play at least
    digits = decimals(*(number for film in films.values() for number in film.returns))
    scale = min(1.0, VIDEO_WIDTH / width)
    size, frames = (round(width * scale), round(height * scale)), list[Image.Image]()
    for number in range(count):
        frame = Image.new("RGB", (size[0] * len(films), size[1] + VIDEO_BAR), "white")
        draw = ImageDraw.Draw(frame)
        for panel, (title, film) in enumerate(films.items()):
            at = min(number, len(film.frames) - 1)
            frame.paste(Image.fromarray(film.frames[at]).resize(size), (panel * size[0], VIDEO_BAR))
            words = f"{title}: return {film.returns[at]:.{digits}f}"
            draw.text(((panel + 0.5) * size[0], VIDEO_BAR / 2), words, "black", _font(7), anchor="mm")
        frames.append(frame)
    path.parent.mkdir(parents=True, exist_ok=True)
    return _write_gif(frames, path, [milliseconds] * (count - 1) + [VIDEO_HOLD], colours=128)


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
