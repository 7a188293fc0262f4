"""Tab Self-improvement: a self-improving run as a job, its races and stretches, and a rollback by hand."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
from gradio.components import FormComponent

from ssm_metarl.app.forms import AGAIN, command_line, remember
from ssm_metarl.app.guard import is_number
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
    text_html,
)
from ssm_metarl.app.workspace import Workspace
from ssm_metarl.cli.plots import has_lineage, plot_evolution
from ssm_metarl.cli.population import (
    decisions_table,
    incumbent_table,
    phase_words,
    race_table,
    spent_words,
    stretch_progress,
)
from ssm_metarl.config import TrainConfig
from ssm_metarl.storage.checkpoint import load_checkpoint
from ssm_metarl.storage.contents import MANIFEST
from ssm_metarl.storage.run_folder import resolve_checkpoint
from ssm_metarl.tasks import names
from ssm_metarl.tuning.config import EvolveConfig
from ssm_metarl.tuning.options import OPTIONS as MOVABLE
from ssm_metarl.tuning.store import RunStore, read_state, request_rollback

PICTURES = {
    "lineage.png": "Lineage: the incumbent's returns, a branch for every challenger, an arrow for every roll back",
    "evolution.png": "The five metrics of the incumbent and their composite at the end of every stretch",
}

INITIAL = "initial weights"

WAITING = "<p>The first decision comes at the end of the first race.</p>"
MORE_TO_COME = '<p class="legend">The five metrics are drawn from the second assessed stretch on.</p>'

OPTIONS = {
    "cycles": "Cycles",
    "proposals": "Proposals a cycle",
    "budget": "Environment steps in all",
    "seed": "Seed",
}
"""Options of `evolve` that the page offers as numbers, and what their boxes are called."""


class Controls(NamedTuple):
    """What a person sets and presses; `boxes` are those of `OPTIONS`, in their order."""

    model: gr.Dropdown
    task: gr.Dropdown
    boxes: list[FormComponent]
    evolve: gr.Dropdown
    start: gr.Button
    command: gr.Column


class Shown(NamedTuple):
    """What shows the chosen run; `checkpoint` lists what it can be rolled back to by `rollback`."""

    population: gr.HTML
    pictures: gr.HTML
    decisions: gr.HTML
    checkpoint: gr.Dropdown
    rollback: gr.Button


def build(page: gr.Blocks, tab: gr.Tab, workspace: Workspace, store: gr.BrowserState) -> None:
    """Lay the tab out and wire it; called within it."""
    do = Handlers(workspace)
    with gr.Row():
        with gr.Column(scale=1):
            new = lay_out_controls()
        with gr.Column(scale=2):
            old = run_controls("evolve", new.start, "Stop", "Go on for more cycles")
            shown, answer = lay_out_run()
            place = gr.Column()
    asked = [new.model, new.task, new.evolve, *new.boxes]
    form = {"model": new.model, "task": new.task, "evolve": new.evolve, **dict(zip(OPTIONS, new.boxes, strict=True))}
    restored = remember(page, store, form)
    new.start.click(do.start, asked, old.run, show_progress_on=old.status, **JOBS)
    old.stop.click(do.stop, old.run, old.status, **JOBS)
    again, back = [old.run, new.boxes[0], new.boxes[2]], [old.run, shown.checkpoint]
    old.resume.click(do.go_on, again, old.status, **JOBS)
    shown.rollback.click(do.back, back, answer, **JOBS)
    with new.command:
        command_line(do.start_command, asked, restored, elem_id="evolve-command")
    with place:
        command_line(do.run_command, again, None, old.status.change, label=AGAIN, elem_id="evolve-run-command")
        command_line(do.back_command, back, None, label="Roll back from the command line", elem_id="rollback-command")
    offer_models(restored, tab, workspace, new.model, before=[INITIAL])
    follow(page, workspace, "evolve", old, shown._asdict(), look)


def lay_out_controls() -> Controls:
    """The column that starts a run."""
    label = OPTIONS
    model = model_choice("Start from", elem_id="evolve-model")
    task = gr.Dropdown(list(names()), value="navigation-2d", label="Task", info="of a policy with initial weights")
    cycles = gr.Slider(0, 50, 6, step=1, label=label["cycles"], info="races; 0: no bound", elem_id="cycles")
    proposals = gr.Slider(1, 6, 4, step=1, label=label["proposals"], info="challengers of the first race, then half")
    budget = gr.Number(0, label=label["budget"], info="0: no bound", minimum=0, precision=0)
    with gr.Accordion("Options that may change, and seed", open=False):
        evolve = gr.Dropdown(list(MOVABLE), value=list(MOVABLE), multiselect=True, label="Options that may change")
        seed = gr.Number(0, label=label["seed"], minimum=0, precision=0)
    start = gr.Button("Start self-improvement", variant="primary", elem_id="evolve-start")
    return Controls(model, task, [cycles, proposals, budget, seed], evolve, start, gr.Column())


def lay_out_run() -> tuple[Shown, gr.HTML]:
    """What shows a run, below its controls, and what answers a rollback."""
    population = gr.HTML(elem_id="population")
    pictures = gr.HTML(elem_id="evolution-pictures")
    decisions = gr.HTML(elem_id="decisions")
    with gr.Row():
        checkpoint = gr.Dropdown(
            [],
            label="Kept checkpoint",
            info="accepted ones first, then others that were assessed",
            elem_id="kept",
            allow_custom_value=True,
            min_width=280,
        )
        rollback = gr.Button("Roll back to it", elem_id="rollback", interactive=False)
    return Shown(population, pictures, decisions, checkpoint, rollback), gr.HTML(elem_id="rollback-answer")


class Handlers(NamedTuple):
    """What the tab's buttons do, in its workspace; without a page, too."""

    workspace: Workspace

    @readable
    def start(
        self,
        model: str | None,
        task: str,
        evolve: list[str],
        *values: float | None,
        progress: Any = gr.Progress(),  # noqa: B008
    ) -> Any:
        """Start a run in which some options may change, with the values of `OPTIONS`, and choose it."""
        name = start_job(self.workspace, self.started(model, task, evolve, values), progress)
        return gr.update(choices=self.workspace.list_runs("evolve", self.workspace.jobs()), value=name)

    def started(self, model: str | None, task: str, evolve: list[str], values: Sequence[float | None]) -> list[str]:
        """The words of `evolve` with the values of `OPTIONS`.

        Raises:
            ValueError: see `numbers` and `evolve_command`.
        """
        place = None if model == INITIAL else self.workspace.place(model)
        return evolve_command(place, task, evolve, *map(int, numbers(OPTIONS.values(), values)))

    def start_command(self, model: str | None, task: str, evolve: list[str], *values: float | None) -> list[list[str]]:
        """The command that does the same."""
        return [self.workspace.as_job(self.started(model, task, evolve, values))]

    @readable
    def stop(self, name: str | None) -> str:
        """End a run's job."""
        return line_html(name, f"job {self.workspace.stop(name)} ends; every decision that has fallen is kept")

    @readable
    def go_on(
        self,
        name: str | None,
        cycles: float | None,
        budget: float | None,
        progress: Any = gr.Progress(),  # noqa: B008
    ) -> str:
        """Start a job that resumes a run for so many cycles and environment steps more than it has had; 0: no bound."""
        words = self.resumed(name, cycles, budget)
        total = int(words[words.index("--cycles") + 1])
        start_job(self.workspace, words, progress)
        return line_html(name, f"resumes, to cycle {total}" if total else "resumes")

    def resumed(self, name: str | None, cycles: float | None, budget: float | None) -> list[str]:
        """The words of `evolve` that resume a run for so many cycles and environment steps more; 0: no bound.

        Raises:
            ValueError: it cannot be resumed; one sentence.
        """
        run = self.workspace.folder(name)
        state = read_state(run)
        self.workspace.check_code(name, state["base"]["task"])
        done = state["progress"]
        more, steps = map(int, numbers((OPTIONS["cycles"], OPTIONS["budget"]), (cycles, budget)))
        words = option_words(
            {
                "cycles": done["cycle"] + more if more else 0,
                "budget": done["spent"]["total"] + steps if steps else 0,
            }
        )
        return ["evolve", "--resume", "--run-dir", str(run), *words]

    def run_command(self, name: str | None, cycles: float | None, budget: float | None) -> list[list[str]]:
        """The command of the button that can be pressed: to stop the run, or to go on with it."""
        if not name:
            return []
        return [self.workspace.stop_words(name) or self.workspace.as_job(self.resumed(name, cycles, budget))]

    @readable
    def back(self, name: str | None, checkpoint: str | None) -> str:
        """Ask a run to go on from one of its checkpoints."""
        run = self.workspace.folder(name)
        if not checkpoint:
            raise ValueError("Choose a checkpoint first.")
        request_rollback(run, checkpoint)
        return line_html(f"{checkpoint} will be the incumbent of {name} from its next decision on")

    def back_command(self, name: str | None, checkpoint: str | None) -> list[list[str]]:
        """The command that does the same."""
        return [["evolve", "rollback", str(self.workspace.folder(name)), checkpoint]] if name and checkpoint else []


def look(name: str, folder: Path, job: dict[str, Any] | None, seen: Mapping[str, Any]) -> tuple[dict[str, Any], Show]:
    """See `view.Look`: a run has news when its state was written anew, or other checkpoints are kept."""
    state = _state(folder)
    kept = [name for name in _kept(state) if (folder / "rsi" / "checkpoints" / name / MANIFEST).is_file()]
    choice: dict[str, Any] = {"rollback": gr.update(interactive=bool(kept))}
    if kept != seen.get("kept"):  # a choice is left alone until the list has others
        named = [(kept_words(state["archive"][name]), name) for name in kept] if state else []
        choice["checkpoint"] = gr.update(choices=named, value=next(iter(kept), None))
    stamp = {"time": state and state["time"], "kept": kept, "resumable": state is not None}
    return stamp, lambda: show(name, folder, job, state) | choice


def show(name: str, folder: Path, job: dict[str, Any] | None, state: dict[str, Any] | None) -> dict[str, Any]:
    """How a run stands, by the names of `Shown`, and its status; but for the choice of a checkpoint."""
    if state is None:
        return {
            "status": line_html(name, *job_words(job, begun=False)),
            "population": WAITING,
            "pictures": "",
            "decisions": "",
        }
    events = RunStore(folder).events()
    return {
        "status": _status(name, job, state),
        "population": _population(state),
        "pictures": _pictures(folder, len(events)) if has_lineage(events) else WAITING,
        "decisions": table_html(decisions_table(events)),
    }


def evolve_command(
    start: str | Path | None,
    task: str,
    evolve: Sequence[str],
    cycles: int,
    proposals: int,
    budget: int,
    seed: int,
) -> list[str]:
    """The words of `evolve`, checked as the command would check them.

    Args:
        start: a checkpoint; None: initial weights for `task`.

    Raises:
        ValueError: an impossible option; one sentence.
    """
    EvolveConfig(cycles=cycles, proposals=proposals, budget=budget, evolve=tuple(evolve))  # type: ignore[arg-type]
    if start:
        load_checkpoint(resolve_checkpoint(start))
    else:
        TrainConfig.for_task(task)
    origin = ["--from", str(start)] if start else ["--task", task]
    words = option_words({"cycles": cycles, "proposals": proposals, "budget": budget, "seed": seed})
    return ["evolve", *origin, *words, "--evolve", *evolve]


def _state(run: Path) -> dict[str, Any] | None:
    try:
        return read_state(run)
    except ValueError:
        if os.path.lexists(run / "rsi" / "state.json"):
            raise
        return None  # not there yet


def _kept(state: dict[str, Any] | None) -> list[str]:
    """Checkpoints to go back to: those since an accepted change, other assessed ones, the rest; each newest first."""
    archive = {} if state is None else state["archive"]
    assessed = {name: record["level"] is not None for name, record in archive.items()}

    def place(name: str) -> tuple[bool, bool, int]:
        return not (assessed[name] and accepted(archive[name])), not assessed[name], -archive[name]["iteration"]

    return sorted(archive, key=place)


def accepted(record: Mapping[str, Any]) -> dict[str, Any]:
    """The changes that races accepted on the path to a checkpoint, the last value of each option.

    A path begins with all options; a change that has a seed with it is no race's, but a way back.
    """
    found: dict[str, Any] = {}
    for _, changes in record["path"][1:]:
        found |= {} if "seed" in changes else changes
    return found


def kept_words(record: Mapping[str, Any]) -> str:
    """A kept checkpoint in a line: where it was, how good it was, and what had been accepted."""
    level = "" if record["level"] is None else f"level {record['level']:.3f}"
    changes = ", ".join(f"{name} {brief_number(value)}" for name, value in accepted(record).items())
    words = (f"iteration {record['iteration']}", level, changes and f"accepted {changes}")
    return " · ".join(filter(None, words))


def brief_number(value: object) -> str:
    """A number with three significant digits; anything else as it is."""
    return f"{value:.3g}" if is_number(value) else str(value)


def _status(name: str, job: dict[str, Any] | None, state: dict[str, Any]) -> str:
    best = state["archive"].get(state["progress"]["best"] or "")
    total = state["config"]["cycles"]
    return line_html(
        name,
        *job_words(job, begun=bool(state["live"]["spent"])),
        f"cycle {state['progress']['cycle']}" + (f" of {total}" if total else ""),
        f"level {best['level']:.3f}" if best and best["level"] is not None else "",
        phase_words(state),
    )


def _population(state: dict[str, Any]) -> str:
    """The incumbent, then the race or how far the stretch is, and what all has cost."""
    parts = [table_html(incumbent_table(state))]
    if state["live"]["race"]:
        parts.append(table_html(race_table(state)))
    elif not state["progress"]["finished"]:
        done, length = stretch_progress(state)
        words = text_html(phase_words(state))
        parts.append(f'<p>{words} <progress value="{done}" max="{length}" aria-label="{words}"></progress></p>')
    return "".join(parts) + f'<p class="legend">{text_html(spent_words(state))}</p>'


@functools.lru_cache(maxsize=8)
def _pictures(run: Path, ended: int) -> str:
    """Drawn once for all pages whenever something was decided; `ended` counts decisions.

    A picture of one point would be a dot amid an axis of its own making: it comes with the second one.
    """
    task = str(read_state(run)["base"]["task"])
    points = points_drawn(RunStore(run).events())
    with tempfile.TemporaryDirectory() as folder:
        drawn = [path for path in plot_evolution(run, task, Path(folder)) if points[path.name] > 1]
        shown = pictures_html((path, PICTURES[path.name]) for path in drawn)
    return shown if len(drawn) == len(PICTURES) else shown + MORE_TO_COME


def points_drawn(events: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many places along its axis each picture has."""
    stretches = [event for event in events if event["phase"] == "stretch" and event.get("metrics")]
    longest = [len(part.get("curve", ())) for event in events for part in (event, *event.get("contenders", ()))]
    return {"lineage.png": sum(longest), "evolution.png": len(stretches)}
