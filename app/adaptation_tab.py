"""Tab Test-time adaptation: a policy meets a task that a person sets, and the modes of adaptation side by side."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from ssm_metarl.app.forms import command_line, remember
from ssm_metarl.app.pretrained_tab import SPLITS
from ssm_metarl.app.view import (
    COMPUTE,
    LOOK,
    line_html,
    model_choice,
    numbers,
    offer_models,
    option_words,
    pictures_html,
    readable,
    sentence,
    table_html,
    text_html,
)
from ssm_metarl.app.workspace import Workspace
from ssm_metarl.cli.adapt import write_report
from ssm_metarl.cli.job import run_name
from ssm_metarl.cli.parsing import json_object
from ssm_metarl.cli.tables import interval_words, modes_table, parameter_words
from ssm_metarl.evaluation.adapt import adapt_checkpoint
from ssm_metarl.evaluation.compare import compare_modes
from ssm_metarl.evaluation.config import MODES
from ssm_metarl.storage.checkpoint import load_checkpoint
from ssm_metarl.tasks import cartpole, navigation

LABELS = {
    "gravity": "Gravity (m/s²)",
    "masscart": "Mass of the cart (kg)",
    "masspole": "Mass of the pole (kg)",
    "length": "Half the pole's length (m)",
    "force_mag": "Force of a push (N)",
}

PICTURES = {
    "before_after.gif": "Episodes before and after adaptation, as an animation",
    "trajectories.png": "Paths to the goal before and after adaptation",
    "adaptation_curve.png": "Return by adaptation step",
}
"""What the pictures show, in the order in which they stand."""


READY = "<p>Set a task and press Adapt.</p>"

NO_REPLAY = "Hybrid adaptation needs a model that was trained with episodes kept for replay."


class Task(NamedTuple):
    """What sets the task: a group of boxes for each family, of which the model's own is in sight, and all the boxes."""

    cart: gr.Group
    plane: gr.Group
    other: gr.Group
    boxes: list[Any]


class Controls(NamedTuple):
    """What a person sets and presses, and where the answers stand."""

    model: gr.Dropdown
    task: Task
    mode: gr.Radio
    steps: gr.Slider
    episodes: gr.Slider
    seed: gr.Number
    keep: gr.Checkbox
    adapt: gr.Button
    result: gr.HTML
    pictures: gr.HTML
    command: gr.Column

    @property
    def boxes(self) -> list[Any]:
        """What `Handlers.adapt` takes."""
        return [self.model, self.mode, self.steps, self.episodes, self.seed, self.keep, *self.task.boxes]


class Comparison(NamedTuple):
    """What compares the modes, below them."""

    split: gr.Dropdown
    num_tasks: gr.Slider
    compare: gr.Button
    table: gr.HTML


def build(page: gr.Blocks, tab: gr.Tab, workspace: Workspace, store: gr.BrowserState) -> None:
    """Lay the tab out and wire it; called within it."""
    do, it = Handlers(workspace), lay_out_controls()
    below = lay_out_comparison()
    compared = [it.model, below.split, below.num_tasks, it.steps, it.episodes]
    form = {f"box {number}": box for number, box in enumerate([*it.boxes, below.split, below.num_tasks])}
    restored = remember(page, store, form)
    answers = [*it.task[:3], it.mode, it.result, it.pictures, it.adapt, below.compare]
    it.model.change(do.choose, [it.model, it.mode], answers, **LOOK)
    it.adapt.click(do.adapt, it.boxes, [it.result, it.pictures], show_progress_on=it.result, **COMPUTE)
    below.compare.click(do.compare, compared, below.table, **COMPUTE)
    with it.command:
        command_line(do.adapt_command, it.boxes, restored, elem_id="adapt-command")
    command_line(do.compare_command, compared, restored, elem_id="compare-command")
    offer_models(restored, tab, workspace, it.model)


def lay_out_controls() -> Controls:
    """What sets a task and adapts to it; the button stands above its answer, which is seen with it."""
    with gr.Row():
        with gr.Column(scale=1):
            model = model_choice("Model", elem_id="adapt-model")
            task = lay_out_task()
            mode = gr.Radio(["none", "standard", "hybrid"], value="standard", label="Adaptation", elem_id="mode")
            steps = gr.Slider(1, 10, 3, step=1, label="Adaptation steps")
            episodes = gr.Slider(1, 50, 5, step=1, label="Episodes a step")
            seed = gr.Number(0, label="Seed", minimum=0, precision=0)
            keep = gr.Checkbox(label="Keep the adapted policy in the runs folder")
        with gr.Column(scale=2):
            adapt = gr.Button("Adapt", variant="primary", elem_id="adapt")
            result = gr.HTML(READY, elem_id="adapt-result")
            pictures = gr.HTML(elem_id="adapt-pictures")
            command = gr.Column()
    return Controls(model, task, mode, steps, episodes, seed, keep, adapt, result, pictures, command)


def lay_out_task() -> Task:
    """The boxes of a task, in the order of `task_parameters`."""
    with gr.Group(visible=False) as cart:
        sliders = [_slider(name) for name in LABELS]
        direction = gr.Radio([("right", 1), ("left", -1)], value=-1, label="Action 1 pushes to the")
    with gr.Group(visible=False) as plane:
        reach = max(outer for _, outer in navigation.GOALS.values())
        goal = [
            gr.Slider(-reach, reach, value, step=0.01, label=f"Hidden goal, {axis}", info="in training ± 0.5")
            for axis, value in (("x", 0.3), ("y", -0.4))
        ]
    with gr.Group(visible=False) as other:
        text = gr.Textbox("{}", label="Task parameters as JSON", info="what is left out is drawn by the seed")
    return Task(cart, plane, other, [*sliders, direction, *goal, text])


def lay_out_comparison() -> Comparison:
    """What compares the modes."""
    gr.Markdown("## The modes side by side, on the same held-out tasks")
    with gr.Row():
        split = gr.Dropdown(SPLITS, value="test", label="Held-out tasks")
        num_tasks = gr.Slider(5, 100, 20, step=1, label="Number of tasks")
        compare = gr.Button("Compare", elem_id="compare")
    return Comparison(split, num_tasks, compare, gr.HTML(elem_id="modes"))


class Handlers(NamedTuple):
    """What the tab does, in its workspace; without a page, too."""

    workspace: Workspace

    def choose(self, name: str | None, mode: str | None) -> tuple[Any, ...]:
        """Which groups of boxes a model needs, which modes it has, and whether it can play; an error is the answer."""
        try:
            checkpoint = load_checkpoint(self.workspace.playable(name))
        except Exception as error:
            off, same = gr.update(interactive=False), gr.skip()
            return same, same, same, same, line_html(sentence(error)) if name else READY, "", off, off
        task = checkpoint.config.get("task")
        modes = ["none", "standard", *(["hybrid"] if checkpoint.replay else [])]
        return (
            gr.update(visible=task == "cartpole"),
            gr.update(visible=task == "navigation-2d"),
            gr.update(visible=task not in ("cartpole", "navigation-2d")),
            gr.update(
                choices=modes,
                value=mode if mode in modes else "standard",
                info=None if checkpoint.replay else NO_REPLAY,
            ),
            READY,
            "",
            gr.update(interactive=True),
            gr.update(interactive=True),
        )

    @readable
    def adapt(
        self, name: str | None, mode: str, steps: int, episodes: int, start: float | None, keep: bool, *boxes: Any
    ) -> tuple[str, str]:
        """Adapt to the task that the boxes set: before and after, and the pictures."""
        path = self.workspace.playable(name)
        params = task_parameters(str(load_checkpoint(path).config.get("task")), *boxes)
        seed = int(*numbers(["Seed"], [start]))
        report = adapt_checkpoint(path, params, mode=mode, steps=int(steps), episodes=int(episodes), seed=seed)
        with tempfile.TemporaryDirectory() as folder:
            out = self.workspace.runs / run_name(report.task, f"adapt-{mode}") if keep else Path(folder)
            summary = write_report(report, out)
            pictures = [Path(picture) for picture in summary["pictures"]]
            pictures.sort(key=lambda picture: list(PICTURES).index(picture.name))
            shown = pictures_html((picture, PICTURES[picture.name]) for picture in pictures)
        return headline(summary) + (kept(out) if keep else ""), shown

    @readable
    def compare(self, name: str | None, split: str, num_tasks: int, steps: int, episodes: int) -> str:
        """The modes on the same held-out tasks, as a table."""
        path = self.workspace.playable(name)
        replay = load_checkpoint(path).replay
        report = compare_modes(
            path,
            MODES if replay else MODES[:2],
            split=split,
            num_tasks=int(num_tasks),
            steps=int(steps),
            episodes=int(episodes),
        )
        note = "" if replay else f'<p class="legend">{NO_REPLAY}</p>'
        return table_html(modes_table(report.summary())) + note

    def adapt_command(
        self, name: str | None, mode: str, steps: int, episodes: int, start: float | None, keep: bool, *boxes: Any
    ) -> list[list[str]]:
        """The command that does the same; it keeps the policy in any case."""
        place = self.workspace.place(name)
        params = task_parameters(str(load_checkpoint(self.workspace.playable(name)).config.get("task")), *boxes)
        options = {"mode": mode, "steps": int(steps), "episodes": int(episodes)}
        seed = int(*numbers(["Seed"], [start]))
        return [["adapt", place, "--params", json.dumps(params), *option_words({**options, "seed": seed})]]

    def compare_command(
        self, name: str | None, split: str, num_tasks: int, steps: int, episodes: int
    ) -> list[list[str]]:
        """The command that does the same."""
        place = self.workspace.place(name)
        modes = MODES if load_checkpoint(self.workspace.playable(name)).replay else MODES[:2]
        options = {"split": split, "num_tasks": int(num_tasks), "steps": int(steps), "episodes": int(episodes)}
        return [["evaluate", place, "--modes", *modes, *option_words(options)]]


def task_parameters(task: str, *values: Any) -> dict[str, Any]:
    """The task that the sliders set: those of the cart, the direction of its push, the goal, and JSON for others.

    Raises:
        ValueError: the JSON is no object.
    """
    if len(values) != len(LABELS) + 4 or not isinstance(values[-1], str | None):
        raise ValueError("The boxes of the task are not all there.")
    *physics, direction, x, y, text = values
    if task == "cartpole":
        return {**dict(zip(LABELS, physics, strict=True)), "direction": direction}
    return {"goal": [x, y]} if task == "navigation-2d" else json_object(text or "{}")


def headline(summary: Mapping[str, Any]) -> str:
    """Before and after in one line, and what it cost."""
    before, after = summary["before"], summary["after"]
    interval = interval_words(after, 1)
    cost = f"{summary['environment_steps']:,} environment steps, {summary['seconds']:.1f} s"
    unchanged = len(summary["curve"]) > 1 and summary["best_step"] == 0
    note = "No step did better on its own episodes: the policy is the meta-trained one." if unchanged else ""
    return (
        f'<p class="headline" role="status">Return <b id="before">{before["return"]:.1f}</b> before, '
        f'<b id="after">{after["return"]:.1f}</b> after</p>'
        f'<p class="legend">95 % interval {interval} on fresh episodes; {cost}. {note}<br>'
        f"Task: {text_html(parameter_words(summary['parameters']))}</p>"
    )


def kept(folder: Path) -> str:
    """Where an adapted policy is."""
    return f'<p class="legend">Kept as {text_html(folder / "policy")}</p>'


def _slider(name: str) -> gr.Slider:
    """Over all splits' values of one of the cart's constants."""
    low, high = cartpole.RANGES["train"][name]
    top = max(ranges[name][1] for ranges in cartpole.RANGES.values())
    step = 0.01 if top < 5 else 0.1
    return gr.Slider(
        low, top, cartpole.CARTPOLE_V1[name], step=step, label=LABELS[name], info=f"in training {low:g} … {high:g}"
    )
