"""Tab Self-improvement: a population as a job, its decisions while they fall, and a rollback by hand."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
from gradio.components import FormComponent

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
    run_controls,
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


OPTIONS = {
    "cycles": "Cycles",
    "proposals": "Proposals a cycle",
    "generation_steps": "Environment steps a cycle and trial",
    "validation_tasks": "Validation tasks",
    "validation_episodes": "Episodes a validation task",
    "seed": "Seed",
}
"""Options of `evolve` that the page offers, and what their boxes are called."""


class Controls(NamedTuple):
    """What a person sets and presses; `boxes` are those of `OPTIONS`, in their order."""

    model: gr.Dropdown
    task: gr.Dropdown
    boxes: list[FormComponent]
    start: gr.Button


class Shown(NamedTuple):
    """What shows the chosen run; `checkpoint` lists what it can be rolled back to."""

    population: gr.HTML
    pictures: gr.HTML
    decisions: gr.HTML
    checkpoint: gr.Dropdown


def build(page: gr.Blocks, tab: gr.Tab, workspace: Workspace) -> None:
    """Lay the tab out and wire it; called within it."""
    do = Handlers(workspace)
    with gr.Row():
        with gr.Column(scale=1):
            new = lay_out_controls()
        with gr.Column(scale=2):
            old = run_controls("evolve", "Stop", "Go on for more cycles")
            shown, rollback, answer = lay_out_run()
    new.start.click(do.start, [new.model, new.task, *new.boxes], old.run, show_progress_on=old.status, **JOBS)
    old.stop.click(do.stop, old.run, old.status, **JOBS)
    old.resume.click(do.go_on, [old.run, new.boxes[0]], old.status, **JOBS)
    rollback.click(do.back, [old.run, shown.checkpoint], answer, **JOBS)
    offer_models([page.load, tab.select], workspace, new.model, before=[INITIAL])
    follow(page, workspace, "evolve", old, shown._asdict(), look)


def lay_out_controls() -> Controls:
    """The column that starts a run."""
    label = OPTIONS
    model = model_choice("Start from", elem_id="evolve-model")
    task = gr.Dropdown(list(names()), value="navigation-2d", label="Task", info="of a policy with initial weights")
    cycles = gr.Slider(1, 10, 3, step=1, label=label["cycles"], elem_id="cycles")
    proposals = gr.Slider(1, 6, 3, step=1, label=label["proposals"], elem_id="proposals")
    with gr.Accordion("Length of a cycle, and seed", open=False):
        more = [
            gr.Number(0, label=label["generation_steps"], info="0: five iterations", minimum=0, precision=0),
            gr.Slider(2, 100, 20, step=1, label=label["validation_tasks"]),
            gr.Slider(1, 50, 10, step=1, label=label["validation_episodes"]),
            gr.Number(0, label=label["seed"], minimum=0, precision=0),
        ]
    start = gr.Button("Start self-improvement", variant="primary", elem_id="evolve-start")
    return Controls(model, task, [cycles, proposals, *more], start)


def lay_out_run() -> tuple[Shown, gr.Button, gr.HTML]:
    """What shows a run, below its controls, then the button that rolls back and what answers it."""
    population = gr.HTML(elem_id="population")
    pictures = gr.HTML(elem_id="evolution-pictures")
    decisions = gr.HTML(elem_id="decisions")
    with gr.Row():
        checkpoint = gr.Dropdown(
            [], label="Kept checkpoint", info="best first", elem_id="kept", allow_custom_value=True, min_width=280
        )
        rollback = gr.Button("Roll back to it", elem_id="rollback")
    return Shown(population, pictures, decisions, checkpoint), rollback, gr.HTML(elem_id="rollback-answer")


class Handlers(NamedTuple):
    """What the tab's buttons do, in its workspace; without a page, too."""

    workspace: Workspace

    @readable
    def start(
        self,
        model: str | None,
        task: str,
        *values: float | None,
        progress: Any = gr.Progress(),  # noqa: B008
    ) -> Any:
        """Start a run with the values of `OPTIONS`, and choose it."""
        path = None if model == INITIAL else self.workspace.checkpoint(model)
        command = evolve_command(path, task, *map(int, numbers(OPTIONS.values(), values)))
        name = start_job(self.workspace, command, progress)
        return gr.update(choices=self.workspace.list_runs("evolve", self.workspace.jobs()), value=name)

    @readable
    def stop(self, name: str | None) -> str:
        """End a run's job."""
        return line_html(name, f"job {self.workspace.stop(name)} ends; every decision that has fallen is kept")

    @readable
    def go_on(self, name: str | None, cycles: float, progress: Any = gr.Progress()) -> str:  # noqa: B008
        """Start a job that resumes a run for so many cycles more than it has had."""
        run = self.workspace.folder(name)
        generations = read_state(run)["generation"] + int(cycles)
        command = ["evolve", "--resume", "--run-dir", str(run), "--generations", str(generations)]
        start_job(self.workspace, command, progress)
        return line_html(name, f"resumes, to cycle {generations}")

    @readable
    def back(self, name: str | None, checkpoint: str | None) -> str:
        """Ask a run to go on from one of its checkpoints."""
        run = self.workspace.folder(name)
        if not checkpoint:
            raise ValueError("Choose a checkpoint first.")
        request_rollback(run, checkpoint)
        return line_html(f"{checkpoint} will be the best and the only parent from the next generation of {name} on")


def look(name: str, folder: Path, job: dict[str, Any] | None, seen: Mapping[str, Any]) -> tuple[dict[str, Any], Show]:
    """See `view.Look`: a run has news when its state was written anew, or other checkpoints are kept."""
    state = _state(folder)
    kept = [name for name in _by_composite(state) if (folder / "rsi" / "checkpoints" / name / MANIFEST).is_file()]
    # A choice is left alone until the list has others.
    choice = {} if kept == seen.get("kept") else {"checkpoint": gr.update(choices=kept, value=next(iter(kept), None))}
    return {"time": state and state["time"], "kept": kept}, lambda: show(name, folder, job, state) | choice


def show(name: str, folder: Path, job: dict[str, Any] | None, state: dict[str, Any] | None) -> dict[str, Any]:
    """How a run stands, by the names of `Shown`, and its status; but for the choice of a checkpoint."""
    if state is None:
        return {"status": line_html(name, *job_words(job)), "population": WAITING, "pictures": "", "decisions": ""}
    events = RunStore(folder).events()
    ended = sum(event["kind"] in ("training", "probation") for event in events)
    return {
        "status": _status(name, job, state),
        "population": table_html(population_table(state)),
        "pictures": _pictures(folder, ended) if ended else WAITING,
        "decisions": table_html(decisions_table(events)),
    }


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
