"""Pictures of a run: every curve that there is, from whatever a run has written so far."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from ssm_metarl import AdaptOptions, adapt_checkpoint
from ssm_metarl.cli import plots
from ssm_metarl.cli.plots import plot_run, plot_task, read_metrics
from ssm_metarl.tasks.cartpole import TIME_STEP


def write_metrics(run: Path, iterations: int, stages: int) -> list[dict[str, Any]]:
    """A run's metrics, with other returns after each inner step and iteration."""
    lines = [
        {
            "iteration": i,
            "env_steps": 1000 * i,
            "return_by_step": [10.0 * i + step for step in range(stages)],
            "seconds": {"sample": 0.1, "adapt": 0.1, "update": 0.1, "ray": 0.0, "total": 0.3},
        }
        for i in range(1, iterations + 1)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def write_evaluation(run: Path) -> dict[str, Any]:
    evaluation = {"return": [1.0, 2.0, 4.0], "ci_low": [0.5, 1.5, 3.0], "ci_high": [1.5, 2.5, 5.0]}
    evaluation |= {"num_tasks": 40, "split": "test", "task": "navigation-2d"}
    evaluation |= {"episode_length": [100.0, 100.0, 100.0], "environment_steps": 1000, "seconds": 1.0}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    return evaluation


def ticks(axes: Any) -> list[float]:
    """Places on the horizontal axis that bear a number."""
    low, high = axes.get_xlim()
    return [tick for tick in axes.get_xticks().tolist() if low <= tick <= high]


@pytest.mark.parametrize(("iterations", "stages"), [(1, 2), (3, 2), (4, 8)])
def test_the_learning_curve_has_a_line_for_every_inner_step(
    tmp_path: Path, figures: dict[str, Figure], iterations: int, stages: int
) -> None:
    lines = write_metrics(tmp_path, iterations, stages)
    assert plot_run(tmp_path, "a task") == [tmp_path / "learning_curve.png"]
    (axes,) = figures["learning_curve.png"].axes
    assert "a task" in axes.get_title()
    curves = axes.get_lines()
    assert len(curves) == stages
    for step, curve in enumerate(curves):
        assert curve.get_xdata().tolist() == [line["env_steps"] / 1e6 for line in lines]
        assert curve.get_ydata().tolist() == [line["return_by_step"][step] for line in lines]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels[:2] == ["before adaptation", "after 1 inner step"]
    assert labels[2:] == [f"after {step} inner steps" for step in range(2, stages)]
    assert len({(curve.get_color(), curve.get_linestyle()) for curve in curves}) == stages, "they can be told apart"


def test_an_evaluated_run_has_an_adaptation_curve_with_its_interval(tmp_path: Path, figures: dict[str, Figure]) -> None:
    write_metrics(tmp_path, 2, 2)
    evaluation = write_evaluation(tmp_path)
    files = plot_run(tmp_path, "a task")
    assert files == [tmp_path / "learning_curve.png", tmp_path / "adaptation_curve.png"]
    (axes,) = figures["adaptation_curve.png"].axes
    assert axes.get_lines()[0].get_ydata().tolist() == evaluation["return"]
    assert ticks(axes) == [0, 1, 2]
    corners = axes.collections[0].get_paths()[0].vertices
    for step, (low, high) in enumerate(zip(evaluation["ci_low"], evaluation["ci_high"], strict=True)):
        at = corners[corners[:, 0] == step, 1]
        assert (at.min(), at.max()) == (low, high)
    assert "40 held-out tasks of a task (test)" in axes.get_title()
    for file in files:
        image = matplotlib.image.imread(file)
        assert min(image.shape[:2]) > 300
        assert np.ptp(image) > 0.5, "not blank"


def test_where_there_is_no_interval_none_is_drawn(tmp_path: Path, figures: dict[str, Figure]) -> None:
    write_metrics(tmp_path, 2, 2)
    evaluation = write_evaluation(tmp_path)
    none = {bound: [None] * 3 for bound in ("ci_low", "ci_high")}
    (tmp_path / "evaluation.json").write_text(json.dumps({**evaluation, **none}))
    plot_run(tmp_path, "a task")
    (axes,) = figures["adaptation_curve.png"].axes
    assert axes.get_lines()[0].get_ydata().tolist() == evaluation["return"]
    assert not any(len(path.vertices) for band in axes.collections for path in band.get_paths())


def test_pictures_are_drawn_anew(tmp_path: Path) -> None:
    write_metrics(tmp_path, 2, 2)
    (picture,) = plot_run(tmp_path, "a task")
    before = picture.read_bytes()
    write_metrics(tmp_path, 9, 2)
    plot_run(tmp_path, "a task")
    assert picture.read_bytes() != before


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    lines = write_metrics(tmp_path, 3, 2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 4, "return_by')
    assert read_metrics(tmp_path) == lines
    assert plot_run(tmp_path, "a task")


@pytest.mark.parametrize("content", [None, "", '{"iteration": 1, "retu'])
def test_without_an_iteration_there_is_nothing_to_draw(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    reason = "has no metrics.jsonl" if content is None else "holds no iteration yet"
    with pytest.raises(ValueError, match=rf"^{tmp_path}.* {reason}\.$"):
        plot_run(tmp_path, "a task")
    assert not list(tmp_path.glob("*.png"))


def test_the_animation_shows_the_longest_episode_in_real_time(tmp_path: Path, figures: dict[str, Figure]) -> None:
    """The pole that falls is shown again and again beside it, so that both panels move."""
    report = adapt_checkpoint("pretrained:cartpole", {"direction": -1}, options=AdaptOptions(test_episodes=2))
    longest = max(int(record.lengths().max()) for record in (report.before, report.after))
    *_, path = plot_task(tmp_path, report.summary(), report.before, report.after)
    seconds, left = 0.0, set()
    with Image.open(path) as picture:
        for frame in range(picture.n_frames):  # type: ignore[attr-defined]
            picture.seek(frame)
            seconds += picture.info["duration"] / 1000
            left.add(picture.convert("L").crop((0, 60, picture.width // 2, 230)).tobytes())
    assert seconds == pytest.approx(longest * TIME_STEP, abs=1.0)
    assert seconds > longest * TIME_STEP, "and its end is held"
    assert len(left) > int(report.before.lengths()[0, 0]) / plots._STRIDE, "more than one episode"
    assert path.stat().st_size < 600_000
    assert ticks(figures["adaptation_curve.png"].axes[0]) == [0, 1], "there is no half of a step"
