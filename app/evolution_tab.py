"""Tab Self-improvement: a population as a job, its decisions while they fall, and a rollback by hand."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import gradio as gr

from ..distributed.checkpoint import MANIFEST, load_checkpoint
from ..distributed.config import TrainConfig
from ..plots import plot_evolution
from ..population_view import decisions_table, population_table
from ..tasks import names
from ..tuning.population import EvolveConfig
from ..tuning.store import RunStore, read_state, request_rollback
from .view import (
    JOBS,
    POLL,
    POLL_SECONDS,
    job_words,
    line_html,
    model_choice,
    offer_models,
    option_words,
    pictures_html,
    polled,
    readable,
    run_choice,
    run_update,
    table_html,
)
from .workspace import Workspace, job_of

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
        *values: float,
        progress: Any = gr.Progress(),  # noqa: B008
    ) -> Any:
        path = None if model == INITIAL else workspace.checkpoint(model)
        command = evolve_command(path, task, *(int(value) for value in values))
        progress(0.3, desc="Starting the job, and Ray where it does not run yet")
        name = workspace.start(command)
        return gr.update(choices=workspace.list_runs("evolve", workspace.jobs()), value=name)

    @readable
    def stop(name: str | None) -> str:
        return line_html(name, f"job {workspace.stop(name)} ends; every decision that has fallen is kept")

    @readable
    def go_on(name: str | None, cycles: float, progress: Any = gr.Progress()) -> str:  # noqa: B008
        run = workspace.folder(name)
        generations = read_state(run)["generation"] + int(cycles)
        progress(0.3, desc="Starting the job, and Ray where it does not run yet")
        workspace.start(["evolve", "--resume", "--run-dir", str(run), "--generations", str(generations)])
        return line_html(name, "goes on")

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
            with gr.Row():
                end = gr.Button("Stop", variant="stop", elem_id="evolve-stop")
                resume = gr.Button("Go on for more cycles", elem_id="evolve-resume")
            population = gr.HTML(elem_id="population")
            pictures = gr.HTML(elem_id="evolution-pictures")
            decisions = gr.HTML(elem_id="decisions")
            with gr.Row():
                checkpoint = gr.Dropdown(
                    [], label="Kept checkpoint", info="best first", elem_id="kept", allow_custom_value=True
                )
                rollback = gr.Button("Roll back to it", elem_id="rollback")
            answer = gr.HTML(elem_id="rollback-answer")

    def watch(name: str | None, seen: dict[str, Any]) -> tuple[Any, ...]:
        same = gr.skip()
        found = workspace.jobs()
        runs = workspace.list_runs("evolve", found)
        chosen = name or next(iter(runs), None)
        if chosen is None:
            return same, line_html("No run yet."), same, same, same, same, seen
        folder = workspace.folder(chosen)
        job = job_of(found, folder)
        state = _state(folder)
        now = {"runs": runs, "run": chosen, "time": state and state["time"], "status": job and job["status"]}
        choice = run_update(name, chosen, runs, seen)
        if {**now, "runs": 0} == {**seen, "runs": 0}:
            return choice, same, same, same, same, same, now
        if state is None:
            return choice, line_html(chosen, *job_words(job)), WAITING, "", "", gr.update(choices=[], value=None), now
        events = RunStore(folder).events()
        ended = sum(event["kind"] in ("training", "probation") for event in events)
        kept = [name for name in _by_composite(state) if (folder / "rsi" / "checkpoints" / name / MANIFEST).is_file()]
        return (
            choice,
            _status(chosen, job, state),
            table_html(population_table(state)),
            _pictures(folder, ended) if ended else WAITING,
            table_html(decisions_table(events)),
            same if kept == seen.get("kept") else gr.update(choices=kept, value=next(iter(kept), None)),
            {**now, "kept": kept},
        )

    seen = gr.State({})
    outputs = [run, status, population, pictures, decisions, checkpoint, seen]
    inputs = [model, task, cycles, proposals, *more]
    begin.click(start, inputs, run, show_progress_on=status, **JOBS)
    end.click(stop, run, status, **JOBS)
    resume.click(go_on, [run, cycles], status, **JOBS)
    rollback.click(back, [run, checkpoint], answer, **JOBS)
    offer_models([page.load, tab.select], workspace, model, before=[INITIAL])
    gr.on(
        [page.load, run.change, gr.Timer(POLL_SECONDS).tick],
        polled(watch, 1, len(outputs)),
        [run, seen],
        outputs,
        **POLL,
    )


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
    """The words of ``evolve``, checked as the command would check them.

    Args:
        start: a checkpoint; None: initial weights for ``task``.

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


def _by_composite(state: dict[str, Any]) -> list[str]:
    return sorted(state["archive"], key=lambda name: -state["archive"][name]["composite"])


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
    """Drawn once for all pages whenever a trial has ended its generation; ``ended`` counts them."""
    task = str(read_state(run)["base"]["task"])
    with tempfile.TemporaryDirectory() as folder:
        drawn = plot_evolution(run, task, Path(folder))
        return pictures_html((path, PICTURES[path.name]) for path in drawn)
