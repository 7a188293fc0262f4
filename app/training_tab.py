"""Tab Meta-training: a run as a job, and its curves while it runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd

from ssm_metarl.algorithms.registry import ALGORITHMS
from ssm_metarl.app.view import (
    JOBS,
    LOOK,
    Show,
    follow,
    job_words,
    line_html,
    numbers,
    option_words,
    readable,
    run_choice,
    start_job,
    table_html,
)
from ssm_metarl.app.workspace import Workspace
from ssm_metarl.cli.plots import read_metrics
from ssm_metarl.cli.tables import evaluation_table
from ssm_metarl.config import TrainConfig
from ssm_metarl.distributed import jobs
from ssm_metarl.storage.checkpoint import load_checkpoint
from ssm_metarl.storage.run_folder import checkpoints
from ssm_metarl.tasks import names

OPTIONS = (
    "iterations",
    "meta_batch",
    "episodes",
    "inner_lr",
    "inner_steps",
    "outer_lr",
    "hidden_dim",
    "state_dim",
    "num_layers",
    "replay_episodes",
    "seed",
)
"""Options of `train` that the page offers; the others are the task's own."""

POINTS = 400
"""Most points of a curve; a longer one is thinned out."""

PHASES = ("sample", "adapt", "update", "ray")


def build(page: gr.Blocks, tab: gr.Tab, workspace: Workspace) -> None:
    """Lay the tab out; called within it."""

    @readable
    def defaults(task: str, algorithm: str | None) -> list[Any]:
        config = TrainConfig.for_task(task, **({"algorithm": algorithm} if algorithm else {}))
        return [config.algorithm, *(getattr(config, name) for name in OPTIONS)]

    @readable
    def start(task: str, algorithm: str, *values: float | None, progress: Any = gr.Progress()) -> Any:  # noqa: B008
        command = train_command(task, algorithm, dict(zip(OPTIONS, numbers(boxes, values), strict=True)))
        name = start_job(workspace, command, progress)
        return gr.update(choices=workspace.list_runs("train", workspace.jobs()), value=name)

    @readable
    def stop(name: str | None) -> str:
        return line_html(name, f"job {workspace.stop(name)} ends its iteration and writes a checkpoint")

    @readable
    def go_on(name: str | None, iterations: float, progress: Any = gr.Progress()) -> str:  # noqa: B008
        run = workspace.folder(name)
        saved = checkpoints(run)
        if not saved:
            raise ValueError(f"There is no checkpoint in {name} to go on from.")
        total = load_checkpoint(saved[-1]).progress["iteration"] + int(iterations)
        start_job(workspace, ["train", "--resume", "--run-dir", str(run), "--iterations", str(total)], progress)
        return line_html(name, f"resumes, to iteration {total}")

    with gr.Row():
        with gr.Column(scale=1):
            task = gr.Dropdown(list(names()), value="navigation-2d", label="Task", elem_id="train-task")
            algorithm = gr.Dropdown(list(ALGORITHMS), value="promp", label="Algorithm")
            first = TrainConfig.for_task("navigation-2d")
            iterations = gr.Slider(1, 500, first.iterations, step=1, label="Iterations", elem_id="iterations")
            with gr.Accordion("Experience and learning", open=False):
                boxes = [
                    iterations,
                    gr.Slider(2, 200, first.meta_batch, step=1, label="Tasks an iteration (meta_batch)"),
                    gr.Slider(1, 100, first.episodes, step=1, label="Episodes a task", elem_id="episodes"),
                    gr.Number(first.inner_lr, label="Inner learning rate", minimum=0.001, maximum=10, step=0.01),
                    gr.Slider(0, 3, first.inner_steps, step=1, label="Inner steps", info="0: rl2, policy-gradient"),
                    gr.Number(first.outer_lr, label="Outer learning rate", minimum=1e-6, maximum=0.1, step=1e-4),
                ]
            with gr.Accordion("Policy, replay and seed", open=False):
                boxes += [
                    gr.Slider(4, 256, first.hidden_dim, step=1, label="Width (hidden_dim)"),
                    gr.Slider(2, 256, first.state_dim, step=2, label="State variables (state_dim)"),
                    gr.Slider(0, 4, first.num_layers, step=1, label="SSM layers", info="0: a policy without memory"),
                    gr.Slider(
                        0, 512, 64, step=1, label="Episodes kept for replay", info="hybrid adaptation needs some"
                    ),
                    gr.Number(0, label="Seed", minimum=0, precision=0),
                ]
            begin = gr.Button("Start meta-training", variant="primary", elem_id="train-start")
        with gr.Column(scale=2):
            run = run_choice(elem_id="train-run")
            status = gr.HTML(line_html("No run yet."), elem_id="train-status")
            with gr.Row(equal_height=True):
                end = gr.Button("Stop with a checkpoint", variant="stop", elem_id="train-stop")
                resume = gr.Button("Go on for more iterations", elem_id="train-resume")
            curve = gr.LinePlot(
                x="environment steps",
                y="return",
                color="stage",
                title="Mean return of the meta-batch",
                x_axis_format="~s",
                height=280,
            )
            with gr.Row():
                speed = gr.LinePlot(
                    x="iteration",
                    y="steps/s",
                    title="Steps a second",
                    x_axis_format="~s",
                    y_axis_format="~s",
                    height=220,
                    min_width=280,
                )
                phases = gr.LinePlot(
                    x="iteration",
                    y="seconds",
                    color="phase",
                    title="Time by phase",
                    x_axis_format="~s",
                    height=220,
                    min_width=280,
                )
            evaluation = gr.HTML(elem_id="train-evaluation")

    def look(name: str, folder: Path, job: dict[str, Any] | None, _: object) -> tuple[dict[str, Any], Show]:
        lines = _lines(folder)

        def show() -> dict[Any, Any]:
            held_out = folder / "evaluation.json"
            table = table_html(evaluation_table(json.loads(held_out.read_text()))) if held_out.is_file() else ""
            plots = dict(zip((curve, speed, phases), curves(lines), strict=True))
            return {status: _status(folder, name, job, lines), **plots, evaluation: table}

        return {"lines": len(lines)}, show

    gr.on([task.change, algorithm.input], defaults, [task, algorithm], [algorithm, *boxes], **LOOK)
    begin.click(start, [task, algorithm, *boxes], run, show_progress_on=status, **JOBS)
    end.click(stop, run, status, **JOBS)
    resume.click(go_on, [run, iterations], status, **JOBS)
    follow(page, workspace, "train", run, status, [curve, speed, phases, evaluation], look)


def train_command(task: str, algorithm: str, options: dict[str, float]) -> list[str]:
    """The words of `train`, checked as the command would check them.

    Raises:
        ValueError: an impossible option; one sentence.
    """
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
        (line["env_steps"], value, "before adaptation" if step == 0 else f"after {step} inner step{'s' * (step > 1)}")
        for line, _ in points
        for step, value in enumerate(line["return_by_step"])
    ]
    speeds = [(line["iteration"], round(speed)) for line, speed in points]
    seconds = [(line["iteration"], line["seconds"][phase], phase) for line, _ in points for phase in PHASES]
    return (
        pd.DataFrame(returns, columns=["environment steps", "return", "stage"]),
        pd.DataFrame(speeds, columns=["iteration", "steps/s"]),
        pd.DataFrame(seconds, columns=["iteration", "seconds", "phase"]),
    )


def _lines(run: Path) -> list[dict[str, Any]]:
    try:
        return read_metrics(run)
    except ValueError:  # not there yet
        return []


def _status(run: Path, name: str, job: dict[str, Any] | None, lines: list[dict[str, Any]]) -> str:
    if not lines:
        return line_html(name, *job_words(job))
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
