"""Tab Self-improvement: a population as a job, its decisions while they fall, and a rollback by hand."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from ssm_metarl.app.view import (
    JOBS,
    Show,
    follow,
    job_words,
    line_html,
    model_choice,
    numbers,
    offer_models,
    option_words,
    pictures_html,
    readable,
    run_choice,
    start_job,
    table_html,
)
from ssm_metarl.app.workspace import Workspace
from ssm_metarl.cli.plots import plot_evolution
from ssm_metarl.cli.population import decisions_table, population_table
from ssm_metarl.config import TrainConfig
from ssm_metarl.storage.checkpoint import load_checkpoint
from ssm_metarl.storage.contents import MANIFEST
from ssm_metarl.tasks import names
from ssm_metarl.tuning.population import EvolveConfig
from ssm_metarl.tuning.store import RunStore, read_state, request_rollback

PICTURES = {
    "lineage.png": "Lineage: every trial of every generation, where it came from and what became of it",
    "evolution.png": "The five metrics and the composite of each generation's best trial",
}

INITIAL = "initial weights"

WAITING = "<p>The first decision comes when the first policies are assessed.</p>"


def build(page: gr.Blocks, tab: gr.Tab, workspace: Workspace) -> None:
    """Lay the tab out; called within it."""

    @readable
    def start(
        model: str | None,
        task: str,
        *values: float | None,
        progress: Any = gr.Progress(),  # noqa: B008
    ) -> Any:
        path = None if model == INITIAL else workspace.checkpoint(model)
        command = evolve_command(path, task, *map(int, numbers(boxes, values)))
        name = start_job(workspace, command, progress)
        return gr.update(choices=workspace.list_runs("evolve", workspace.jobs()), value=name)

    @readable
    def stop(name: str | None) -> str:
        return line_html(name, f"job {workspace.stop(name)} ends; every decision that has fallen is kept")

    @readable
    def go_on(name: str | None, cycles: float, progress: Any = gr.Progress()) -> str:  # noqa: B008
        run = workspace.folder(name)
        generations = read_state(run)["generation"] + int(cycles)
        command = ["evolve", "--resume", "--run-dir", str(run), "--generations", str(generations)]
        start_job(workspace, command, progress)
        return line_html(name, f"resumes, to cycle {generations}")

    @readable
    def back(name: str | None, checkpoint: str | None) -> str:
        run = workspace.folder(name)
        if not checkpoint:
            raise ValueError("Choose a checkpoint first.")
        request_rollback(run, checkpoint)
        return line_html(f"{checkpoint} will be the best and the only parent from the next generation of {name} on")

    with gr.Row():
        with gr.Column(scale=1):
            model = model_choice("Start from", elem_id="evolve-model")
            task = gr.Dropdown(
                list(names()), value="navigation-2d", label="Task", info="of a policy with initial weights"
            )
            cycles = gr.Slider(1, 10, 3, step=1, label="Cycles", elem_id="cycles")
            proposals = gr.Slider(1, 6, 3, step=1, label="Proposals a cycle", elem_id="proposals")
            with gr.Accordion("Length of a cycle, and seed", open=False):
                more = [
                    gr.Number(
                        0,
                        label="Environment steps a cycle and trial",
                        info="0: five iterations",
                        minimum=0,
                        precision=0,
                    ),
                    gr.Slider(2, 100, 20, step=1, label="Validation tasks"),
                    gr.Slider(1, 50, 10, step=1, label="Episodes a validation task"),
                    gr.Number(0, label="Seed", minimum=0, precision=0),
                ]
            begin = gr.Button("Start self-improvement", variant="primary", elem_id="evolve-start")
        with gr.Column(scale=2):
            run = run_choice(elem_id="evolve-run")
            status = gr.HTML(line_html("No run yet."), elem_id="evolve-status")
            with gr.Row(equal_height=True):
                end = gr.Button("Stop", variant="stop", elem_id="evolve-stop")
                resume = gr.Button("Go on for more cycles", elem_id="evolve-resume")
            population = gr.HTML(elem_id="population")
            pictures = gr.HTML(elem_id="evolution-pictures")
            decisions = gr.HTML(elem_id="decisions")
            with gr.Row():
                checkpoint = gr.Dropdown(
                    [],
                    label="Kept checkpoint",
                    info="best first",
                    elem_id="kept",
                    allow_custom_value=True,
                    min_width=280,
                )
                rollback = gr.Button("Roll back to it", elem_id="rollback")
            answer = gr.HTML(elem_id="rollback-answer")

    def look(
        name: str, folder: Path, job: dict[str, Any] | None, seen: Mapping[str, Any]
    ) -> tuple[dict[str, Any], Show]:
        state = _state(folder)
        kept = [name for name in _by_composite(state) if (folder / "rsi" / "checkpoints" / name / MANIFEST).is_file()]

        def show() -> dict[Any, Any]:
            # A choice is left alone until the list has others.
            best = next(iter(kept), None)
            choice = {checkpoint: gr.update(choices=kept, value=best)} if kept != seen.get("kept") else {}
            if state is None:
                line = line_html(name, *job_words(job))
                return {status: line, population: WAITING, pictures: "", decisions: "", **choice}
            events = RunStore(folder).events()
            ended = sum(event["kind"] in ("training", "probation") for event in events)
            return {
                status: _status(name, job, state),
                population: table_html(population_table(state)),
                pictures: _pictures(folder, ended) if ended else WAITING,
                decisions: table_html(decisions_table(events)),
                **choice,
            }

        return {"time": state and state["time"], "kept": kept}, show

    boxes = [cycles, proposals, *more]
    begin.click(start, [model, task, *boxes], run, show_progress_on=status, **JOBS)
    end.click(stop, run, status, **JOBS)
    resume.click(go_on, [run, cycles], status, **JOBS)
    rollback.click(back, [run, checkpoint], answer, **JOBS)
    offer_models([page.load, tab.select], workspace, model, before=[INITIAL])
    follow(page, workspace, "evolve", run, status, [population, pictures, decisions, checkpoint], look)


def evolve_command(
    start: Path | None,
    task: str,
    cycles: int,
    proposals: int,
    generation_steps: int,
    validation_tasks: int,
    validation_episodes: int,
    seed: int,
) -> list[str]:
    """The words of `evolve`, checked as the command would check them.

    Args:
        start: a checkpoint; None: initial weights for `task`.

    Raises:
        ValueError: an impossible option; one sentence.
    """
    rules: dict[str, Any] = {
        "generation_steps": generation_steps,
        "validation_tasks": validation_tasks,
        "validation_episodes": validation_episodes,
    }
    EvolveConfig(population=proposals + 1, generations=cycles, survivors=1, **rules)
    if start:
        load_checkpoint(start)
    else:
        TrainConfig.for_task(task)
    origin = ["--from", str(start)] if start else ["--task", task]
    words = option_words({"cycles": cycles, "proposals": proposals, **rules, "seed": seed})
    # A self-improving run has no last iteration for which a learning rate could fall.
    return ["evolve", *origin, "--lr-schedule", "constant", *words]


def _state(run: Path) -> dict[str, Any] | None:
    try:
        return read_state(run)
    except ValueError:
        if (run / "rsi" / "state.json").is_file():
            raise
        return None  # not there yet


def _by_composite(state: dict[str, Any] | None) -> list[str]:
    return [] if state is None else sorted(state["archive"], key=lambda name: -state["archive"][name]["composite"])


def _status(name: str, job: dict[str, Any] | None, state: dict[str, Any]) -> str:
    best = state["archive"].get(state["best"] or "")
    total = state["config"]["generations"]
    return line_html(
        name,
        *job_words(job),
        f"cycle {state['generation']}" + (f" of {total}" if total else ""),
        f"best composite {best['composite']:.3f}" if best else "assessing the first policies",
        f"ended: {state['finished']}" if state["finished"] else "",
    )


@functools.lru_cache(maxsize=8)
def _pictures(run: Path, ended: int) -> str:
    """Drawn once for all pages whenever a trial has ended its generation; `ended` counts them."""
    task = str(read_state(run)["base"]["task"])
    with tempfile.TemporaryDirectory() as folder:
        drawn = plot_evolution(run, task, Path(folder))
        return pictures_html((path, PICTURES[path.name]) for path in drawn)
