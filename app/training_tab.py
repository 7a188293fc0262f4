"""Tab Meta-training: a run as a job, and its curves while it runs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import pandas as pd
from gradio.components import FormComponent

from ssm_metarl.algorithms.registry import ALGORITHMS
from ssm_metarl.app.forms import AGAIN, command_line, remember
from ssm_metarl.app.view import (
    JOBS,
    LOOK,
    POLL,
    Show,
    follow,
    job_words,
    line_html,
    numbers,
    option_words,
    readable,
    run_controls,
    start_job,
    table_html,
)
from ssm_metarl.app.workspace import Workspace
from ssm_metarl.checks import lookup
from ssm_metarl.cli.tables import evaluation_table
from ssm_metarl.config import TrainConfig
from ssm_metarl.distributed import jobs
from ssm_metarl.storage.checkpoint import load_checkpoint
from ssm_metarl.storage.contents import CheckpointError
from ssm_metarl.storage.run_folder import checkpoints
from ssm_metarl.storage.run_log import EVALUATION, read_evaluation, read_metrics
from ssm_metarl.tasks import names

OPTIONS = {
    "iterations": "Iterations",
    "meta_batch": "Tasks an iteration (meta_batch)",
    "episodes": "Episodes a task",
    "inner_lr": "Inner learning rate",
    "inner_steps": "Inner steps",
    "outer_lr": "Outer learning rate",
    "hidden_dim": "Width (hidden_dim)",
    "state_dim": "State variables (state_dim)",
    "num_layers": "SSM layers",
    "replay_episodes": "Episodes kept for replay",
    "seed": "Seed",
}
"""Options of `train` that the page offers, and what their boxes are called; the others are the task's own."""

POINTS = 400
"""Most points of a curve; a longer one is thinned out."""

COLOURS = ("#7f8c8d", "#0b6fa4", "#c0392b", "#27ae60", "#8e44ad", "#d68910")
"""Of the stages of adaptation, as in a run's own pictures."""

STAGES = 12
"""Stages that the plot tells apart."""

PHASES = ("sample", "adapt", "update", "ray")


class Controls(NamedTuple):
    """What a person sets and presses; `boxes` are those of `OPTIONS`, in their order."""

    task: gr.Dropdown
    algorithm: gr.Dropdown
    boxes: list[FormComponent]
    start: gr.Button
    command: gr.Column


class Shown(NamedTuple):
    """What shows the chosen run."""

    curve: gr.LinePlot
    speed: gr.LinePlot
    phases: gr.LinePlot
    evaluation: gr.HTML
    stages: gr.State


def build(page: gr.Blocks, tab: gr.Tab, workspace: Workspace, store: gr.BrowserState) -> None:
    """Lay the tab out and wire it; called within it."""
    do = Handlers(workspace)
    with gr.Row():
        with gr.Column(scale=1):
            new = lay_out_controls()
        with gr.Column(scale=2):
            old = run_controls("train", new.start, "Stop with a checkpoint", "Go on for more iterations")
            shown = lay_out_run()
            place = gr.Column()
    form = {"task": new.task, "algorithm": new.algorithm, **dict(zip(OPTIONS, new.boxes, strict=True))}
    what, asked = [new.task, new.algorithm], list(form.values())
    # What a person chose, not what a reload put back: that has its own values.
    defaulted = gr.on([new.task.input, new.algorithm.input], defaults, what, [new.algorithm, *new.boxes], **LOOK)
    restored = remember(page, store, form, [defaulted])
    new.start.click(do.start, asked, old.run, show_progress_on=old.status, **JOBS)
    old.stop.click(do.stop, old.run, old.status, **JOBS)
    old.resume.click(do.go_on, [old.run, new.boxes[0]], old.status, **JOBS)
    with new.command:
        command_line(do.start_command, asked, restored, elem_id="train-command")
    with place:
        again = [old.run, new.boxes[0]]
        command_line(do.run_command, again, None, old.status.change, label=AGAIN, elem_id="train-run-command")
    named = gr.State([])
    # After the data: a plot that gets other data and another legend at once may show the data of before.
    old.status.change(legend, [shown.stages, named], [shown.curve, named], **POLL)
    follow(page, workspace, "train", old, shown._asdict(), look)


def lay_out_controls() -> Controls:
    """The column that starts a run, with the first task's own options."""
    label, first = OPTIONS, TrainConfig.for_task("navigation-2d").to_dict()

    def slider(name: str, low: int, high: int, step: int = 1, **more: Any) -> gr.Slider:
        return gr.Slider(low, high, first[name], step=step, label=OPTIONS[name], **more)

    task = gr.Dropdown(list(names()), value="navigation-2d", label="Task", elem_id="train-task")
    algorithm = gr.Dropdown(list(ALGORITHMS), value="promp", label="Algorithm")
    iterations = slider("iterations", 1, 500, elem_id="iterations")
    with gr.Accordion("Experience and learning", open=False):
        learning = [
            slider("meta_batch", 2, 200),
            slider("episodes", 1, 100, elem_id="episodes"),
            gr.Number(first["inner_lr"], label=label["inner_lr"], minimum=0.001, maximum=10, step=0.01),
            slider("inner_steps", 0, 3, info="0: rl2, policy-gradient"),
            gr.Number(first["outer_lr"], label=label["outer_lr"], minimum=1e-6, maximum=0.1, step=1e-4),
        ]
    with gr.Accordion("Policy, replay and seed", open=False):
        words = "hybrid adaptation needs some"
        policy = [
            slider("hidden_dim", 4, 256),
            slider("state_dim", 2, 256, step=2),
            slider("num_layers", 0, 4, info="0: a policy without memory"),
            gr.Slider(0, 512, 64, step=1, label=label["replay_episodes"], info=words),
            gr.Number(0, label=label["seed"], minimum=0, precision=0),
        ]
    start = gr.Button("Start meta-training", variant="primary", elem_id="train-start")
    return Controls(task, algorithm, [iterations, *learning, *policy], start, gr.Column())


def lay_out_run() -> Shown:
    """What shows a run, below its controls.

    All curves are over environment steps, from 0: a few iterations would get marks between them.
    """
    common: dict[str, Any] = {"x": "environment steps", "x_axis_format": "~s", "x_lim": [0, None]}
    curve = gr.LinePlot(
        y="return",
        color="stage",
        color_map={stage_name(step): COLOURS[step % len(COLOURS)] for step in range(STAGES)},
        title="Mean return of the meta-batch",
        height=280,
        elem_id="curve",
        **common,
    )
    small: dict[str, Any] = {**common, "height": 220, "min_width": 280}
    with gr.Row():
        speed = gr.LinePlot(y="steps/s", title="Steps a second", y_axis_format="~s", **small)
        phases = gr.LinePlot(y="seconds", color="phase", title="Time by phase", **small)
    return Shown(curve, speed, phases, gr.HTML(elem_id="train-evaluation"), gr.State([]))


class Handlers(NamedTuple):
    """What the tab's buttons do, in its workspace; without a page, too."""

    workspace: Workspace

    @readable
    def start(self, task: str, algorithm: str, *values: float | None, progress: Any = gr.Progress()) -> Any:  # noqa: B008
        """Start a run with the values of `OPTIONS`, and choose it."""
        name = start_job(self.workspace, started(task, algorithm, values), progress)
        return gr.update(choices=self.workspace.list_runs("train", self.workspace.jobs()), value=name)

    @readable
    def stop(self, name: str | None) -> str:
        """End a run's job."""
        return line_html(name, f"job {self.workspace.stop(name)} ends its iteration and writes a checkpoint")

    @readable
    def go_on(self, name: str | None, iterations: float, progress: Any = gr.Progress()) -> str:  # noqa: B008
        """Start a job that resumes a run for so many iterations more than its last checkpoint has."""
        words = self.resumed(name, iterations)
        start_job(self.workspace, words, progress)
        return line_html(name, f"resumes, to iteration {words[-1]}")

    def resumed(self, name: str | None, iterations: float) -> list[str]:
        """The words of `train` that resume a run for so many iterations more.

        Raises:
            ValueError: it cannot be resumed; one sentence.
        """
        run = self.workspace.folder(name)
        saved = checkpoints(run)
        if not saved:
            raise ValueError(f"There is no checkpoint in {name} to go on from.")
        checkpoint = load_checkpoint(saved[-1])
        self.workspace.check_code(name, checkpoint.config.get("task"))
        total = checkpoint.progress["iteration"] + int(iterations)
        return ["train", "--resume", "--run-dir", str(run), "--iterations", str(total)]

    def start_command(self, task: str, algorithm: str, *values: float | None) -> list[list[str]]:
        """The command that does the same."""
        return [self.workspace.as_job(started(task, algorithm, values))]

    def run_command(self, name: str | None, iterations: float) -> list[list[str]]:
        """The command of the button that can be pressed: to stop the run, or to go on with it."""
        if not name:
            return []
        return [self.workspace.stop_words(name) or self.workspace.as_job(self.resumed(name, iterations))]


@readable
def defaults(task: str, algorithm: str | None) -> list[Any]:
    """The algorithm and the values of `OPTIONS` that a task has of its own; None: the task's algorithm, too."""
    lookup(dict.fromkeys(names()), task, "task family")
    config = TrainConfig.for_task(task, **({"algorithm": algorithm} if algorithm else {})).to_dict()
    return [config[name] for name in ("algorithm", *OPTIONS)]


def legend(stages: list[str], named: list[str]) -> tuple[Any, Any]:
    """The curve with the names of its stages, and those names; nothing where they are named already."""
    return (gr.skip(), gr.skip()) if stages == named else (gr.LinePlot(colors_in_legend=stages), stages)


def look(name: str, folder: Path, job: dict[str, Any] | None, _: object) -> tuple[dict[str, Any], Show]:
    """See `view.Look`: a run has news when its metrics have another line."""
    lines = _lines(folder)
    return {"lines": len(lines), "resumable": bool(checkpoints(folder))}, partial(show, name, folder, job, lines)


def show(name: str, folder: Path, job: dict[str, Any] | None, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """How a run stands, by the names of `Shown`, and its status."""
    held_out = read_evaluation(folder / EVALUATION)
    table = table_html(evaluation_table(held_out)) if held_out else ""
    plots: dict[str, Any] = dict(zip(("curve", "speed", "phases"), curves(lines), strict=True))
    stages = list(dict.fromkeys(plots["curve"]["stage"]))
    plots |= {"curve": with_all_stages(plots["curve"]), "stages": stages}
    return {"status": _status(folder, name, job, lines), **plots, "evaluation": table}


def started(task: str, algorithm: str, values: Sequence[float | None]) -> list[str]:
    """The words of `train` with the values of `OPTIONS`.

    Raises:
        ValueError: see `numbers` and `train_command`.
    """
    return train_command(task, algorithm, dict(zip(OPTIONS, numbers(OPTIONS.values(), values), strict=True)))


def stage_name(step: int) -> str:
    """The stage after so many inner steps."""
    return "before adaptation" if step == 0 else f"after {step} inner step{'s' * (step > 1)}"


def with_all_stages(returns: pd.DataFrame) -> pd.DataFrame:
    """A run's curve with an empty line for every stage that it does not have.

    The plot keeps the colours of the first data that it gets: stages that were not there would never be drawn.
    """
    missing = [stage for stage in map(stage_name, range(STAGES)) if stage not in set(returns["stage"])]
    rows = [(0, None, stage) for stage in missing]
    whole = pd.concat([returns, pd.DataFrame(rows, columns=returns.columns, dtype=object)], ignore_index=True)
    return whole.astype({"return": float, "environment steps": int})


def train_command(task: str, algorithm: str, options: dict[str, float]) -> list[str]:
    """The words of `train`, checked as the command would check them.

    Raises:
        ValueError: an impossible option; one sentence.
    """
    lookup(dict.fromkeys(names()), task, "task family")
    whole = {name: value if name.endswith("_lr") else int(value) for name, value in options.items()}
    TrainConfig.for_task(task, algorithm=algorithm, **whole)
    return ["train", "--task", task, "--algorithm", algorithm, *option_words(whole)]


def curves(lines: list[dict[str, Any]]) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """A run's metrics as the three plots take them: returns by stage, steps a second, and seconds by phase."""
    before = [0, *(line["env_steps"] for line in lines)]
    points = [
        (line, (line["env_steps"] - start) / line["seconds"]["total"])
        for line, start in zip(lines, before, strict=False)
    ]
    every = -(-len(points) // POINTS) or 1
    points = points[::-every][::-1]  # the last one is always there
    returns = [
        (line["env_steps"], value, stage_name(step))
        for line, _ in points
        for step, value in enumerate(line["return_by_step"])
    ]
    speeds = [(line["env_steps"], round(speed)) for line, speed in points]
    seconds = [(line["env_steps"], line["seconds"].get(phase, 0.0), phase) for line, _ in points for phase in PHASES]
    return (
        pd.DataFrame(returns, columns=["environment steps", "return", "stage"]),
        pd.DataFrame(speeds, columns=["environment steps", "steps/s"]),
        pd.DataFrame(seconds, columns=["environment steps", "seconds", "phase"]),
    )


def _lines(run: Path) -> list[dict[str, Any]]:
    try:
        return read_metrics(run)
    except CheckpointError:
        raise
    except ValueError:  # not there yet
        return []


def _status(run: Path, name: str, job: dict[str, Any] | None, lines: list[dict[str, Any]]) -> str:
    if not lines:
        return line_html(name, *job_words(job, begun=False))
    last = lines[-1]
    steps = last["env_steps"] - (lines[-2]["env_steps"] if len(lines) > 1 else 0)
    saved = checkpoints(run)
    # A running run may have a new goal before it has a checkpoint that knows it.
    asked = re.search(r"--iterations[ =](\d+)", job["command"]) if job else None
    total = asked[1] if asked else load_checkpoint(saved[-1]).config.get("iterations") if saved else None
    returns = " → ".join(f"{value:.1f}" for value in last["return_by_step"])
    done = job is not None and job["status"] in jobs.ENDED
    return line_html(
        name,
        *job_words(job),
        f"iteration {last['iteration']}" + (f" of {total}" if total else ""),
        f"return {returns}",
        f"{steps / last['seconds']['total'] / 1000:.0f}k steps/s",
        f"checkpoint of iteration {int(saved[-1].name.rpartition('_')[2])}" if saved and done else "",
    )
