"""Tab Pretrained: a model's card, its sizes, and its returns on held-out tasks."""

from __future__ import annotations

import base64
import io
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
from PIL import Image

from ssm_metarl import pretrained
from ssm_metarl.app.forms import command_line, remember
from ssm_metarl.app.view import (
    COMPUTE,
    LOOK,
    facts_html,
    line_html,
    model_choice,
    offer_models,
    option_words,
    readable,
    sentence,
    table_html,
    text_html,
)
from ssm_metarl.app.workspace import Workspace
from ssm_metarl.cli.tables import evaluation_table, modes_table
from ssm_metarl.config import TrainConfig
from ssm_metarl.evaluation.evaluate import evaluate_checkpoint
from ssm_metarl.storage.checkpoint import load_checkpoint
from ssm_metarl.storage.contents import MANIFEST, Checkpoint
from ssm_metarl.storage.run_log import CARD, EVALUATION, read_card, read_evaluation

SPLITS = ["test", "shifted-test", "validation", "shifted", "train"]

NO_MODEL = "<p>Choose a model: one that comes with the package, or a run of your own.</p>"

OTHER_EVALUATION = "The evaluation in this run's folder is of another checkpoint; Evaluate measures this one."

SHOWN_FIRST, ANIMATION = "cartpole", Path(__file__).with_name("adaptation.gif")
"""The shipped model that is seen when the page opens, and its episodes before and after adaptation, made by
`adapt pretrained:cartpole`."""


class Choices(NamedTuple):
    """What a person sets."""

    model: gr.Dropdown
    split: gr.Dropdown
    num_tasks: gr.Slider
    steps: gr.Slider


def build(page: gr.Blocks, tab: gr.Tab, workspace: Workspace, store: gr.BrowserState) -> None:
    """Lay the tab out and wire it; called within it."""
    gr.HTML(animation_html(), elem_id="first")
    with gr.Row():
        with gr.Column(scale=1):
            choices = lay_out_choices()
            evaluate = gr.Button("Evaluate", variant="primary", elem_id="evaluate")
            place = gr.Column()
        with gr.Column(scale=2):
            evaluation = gr.HTML(elem_id="evaluation")
            card = gr.HTML(NO_MODEL, label="Card", elem_id="card")
    do, asked = Handlers(workspace), list(choices)
    restored = remember(page, store, choices._asdict())
    choices.model.change(do.show, choices.model, [card, evaluation, evaluate], **LOOK)
    evaluate.click(do.assess, asked, evaluation, **COMPUTE)
    with place:
        command_line(do.command, asked, restored, elem_id="evaluate-command")
    offer_models(restored, tab, workspace, choices.model)


def lay_out_choices() -> Choices:
    """The boxes."""
    return Choices(
        model_choice("Model", elem_id="model"),
        gr.Dropdown(SPLITS, value="test", label="Held-out tasks", info="shifted: outside of training"),
        gr.Slider(5, 200, 40, step=1, label="Number of tasks"),
        gr.Slider(0, 5, 3, step=1, label="Most adaptation steps"),
    )


class Handlers(NamedTuple):
    """What the tab does, in its workspace; without a page, too."""

    workspace: Workspace

    def show(self, name: str | None) -> tuple[str, str, Any]:
        """A model's card, no evaluation yet, and whether the model can be evaluated; an error stands in the card."""
        try:
            card = describe(self.workspace, name) if name else NO_MODEL
            return card, "", gr.update(interactive=bool(name and self.workspace.playable(name)))
        except Exception as error:
            return line_html(sentence(error)), "", gr.update(interactive=False)

    @readable
    def assess(self, name: str | None, split: str, num_tasks: int, steps: int) -> str:
        """A model's returns on held-out tasks; one that has no inner steps is not adapted."""
        path = self.workspace.playable(name)
        report = evaluate_checkpoint(path, split=split, num_tasks=int(num_tasks), steps=self._steps(name, steps))
        return table_html(evaluation_table(report.summary()))

    def command(self, name: str | None, split: str, num_tasks: int, steps: int) -> list[list[str]]:
        """The command that does the same."""
        options = {"split": split, "num_tasks": int(num_tasks), "steps": self._steps(name, steps)}
        return [["evaluate", self.workspace.place(name), *option_words(options)]]

    def _steps(self, name: str | None, steps: int) -> int:
        config = TrainConfig.from_checkpoint(load_checkpoint(self.workspace.playable(name)).config)
        return int(steps) if config.meta.inner_steps else 0


def animation_html() -> str:
    """A shipped policy before and after adaptation, which plays at once, and what it shows.

    Whoever asked the system for less motion sees its last picture, and anyone can fold it away.
    """
    evaluation = read_card(pretrained.folder(SHOWN_FIRST) / CARD).get("evaluation")
    measured = ""
    if evaluation and len(evaluation["return"]) > 1:
        before, after = (f"{value:.0f}" for value in evaluation["return"][:2])
        measured = f"<p><b>Return {before} → {after}</b> over {evaluation['num_tasks']} tasks it has never met.</p>"
    with Image.open(ANIMATION) as film:
        film.seek(film.n_frames - 1)  # type: ignore[attr-defined]
        still = io.BytesIO()
        film.convert("RGB").save(still, "PNG")
    first, last = (base64.b64encode(content).decode() for content in (ANIMATION.read_bytes(), still.getvalue()))
    words = "A cart-pole that falls before adaptation and stands after one gradient step"
    return (
        f"<details open><summary>A policy that adapts: pretrained:{SHOWN_FIRST}</summary><div class='first figures'>"
        f"<picture><source media='(prefers-reduced-motion: reduce)' srcset='data:image/png;base64,{last}'>"
        f"<img alt='{words}' src='data:image/gif;base64,{first}'></picture>"
        "<div><p>A cart whose weight, pole and gravity it does not know, and whose pushes may go the other way round: "
        "left, it plays as it was trained and falls; right, after one gradient step on a few episodes, it stands.</p>"
        f"{measured}<p>Below, evaluate a model; in the next tabs train one, set it a task, let it improve.</p></div>"
        "</div></details>"
    )


def describe(workspace: Workspace, name: str) -> str:
    """What is known of a model: its card or its config, and its returns; everything in it is verified first.

    Raises:
        ValueError: there is no such model, or it is damaged.
    """
    path = workspace.checkpoint(name)
    checkpoint = load_checkpoint(path)
    TrainConfig.from_checkpoint(checkpoint.config)
    card = read_card(path / CARD)
    facts = _sizes(checkpoint) | {
        key.replace("_", " "): card[key] for key in ("training_seconds", "date", "command") if key in card
    }
    parts = [f"<h3>{text_html(name)}</h3>", f"<p>{text_html(card.get('about', ''))}</p>", facts_html(facts)]
    evaluation = card.get("evaluation") or own_evaluation(path)
    if evaluation:
        parts.append(table_html(evaluation_table(evaluation)))
    elif os.path.lexists(path.parent / EVALUATION):
        parts.append(f'<p class="legend">{OTHER_EVALUATION}</p>')
    if "modes" in card:
        parts.append(table_html(modes_table(card["modes"])))
    return "".join(parts)


def own_evaluation(checkpoint: Path) -> dict[str, Any] | None:
    """The evaluation of the checkpoint's run, if it is of this checkpoint: it is made of the one that a run ends with.

    Raises:
        CheckpointError: it is damaged or foreign.
    """
    evaluation = read_evaluation(checkpoint.parent / EVALUATION)
    if evaluation is None or evaluation.get("checkpoint") != checkpoint.name:
        return None
    since, made = ((path.lstat().st_mtime) for path in (checkpoint / MANIFEST, checkpoint.parent / EVALUATION))
    return evaluation if made >= since else None


def _sizes(checkpoint: Checkpoint) -> dict[str, Any]:
    spec, config, progress = checkpoint.spec, checkpoint.config, checkpoint.progress
    layers = f"{spec.num_layers} SSM layer{'s' * (spec.num_layers != 1)}{', gated' if spec.gated else ''}"
    if spec.memory_slots and spec.num_layers:
        layers += f", {spec.memory_slots} memory slots each"
    facts = {
        "task": config.get("task"),
        "algorithm": config.get("algorithm"),
        "policy": f"{layers}, hidden_dim {spec.hidden_dim}, state_dim {spec.state_dim}",
        "parameters": f"{sum(array.size for array in checkpoint.policy.values()):,}",
        "iterations": progress.get("iteration"),
        "environment steps": f"{progress.get('env_steps', 0):,}",
        "inner steps": f"{config.get('inner_steps')} of size {config.get('inner_lr')}",
        "episodes for replay": len(checkpoint.replay) if checkpoint.replay else 0,
    }
    return facts | ({"adapted to": json.dumps(progress["adapted_to"])} if "adapted_to" in progress else {})
