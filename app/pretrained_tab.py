"""Tab Pretrained: a model's card, its sizes, and its returns on held-out tasks."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import gradio as gr

from ssm_metarl.app.view import COMPUTE, LOOK, facts_html, model_choice, offer_models, readable, table_html, text_html
from ssm_metarl.app.workspace import Workspace
from ssm_metarl.cli.tables import evaluation_table, modes_table
from ssm_metarl.config import TrainConfig
from ssm_metarl.evaluation.evaluate import evaluate_checkpoint
from ssm_metarl.storage.checkpoint import load_checkpoint
from ssm_metarl.storage.contents import Checkpoint
from ssm_metarl.storage.run_log import CARD, EVALUATION, read_card, read_evaluation

SPLITS = ["test", "shifted-test", "validation", "shifted", "train"]


NO_MODEL = "<p>Choose a model: one that comes with the package, or a run of your own.</p>"


class Controls(NamedTuple):
    """What a person sets, and where the answers stand."""

    model: gr.Dropdown
    split: gr.Dropdown
    num_tasks: gr.Slider
    steps: gr.Slider
    evaluate: gr.Button
    card: gr.HTML
    evaluation: gr.HTML


def build(page: gr.Blocks, tab: gr.Tab, workspace: Workspace) -> None:
    """Lay the tab out and wire it; called within it."""
    it, do = lay_out(), Handlers(workspace)
    it.model.change(do.show, it.model, [it.card, it.evaluation], **LOOK)
    it.evaluate.click(do.assess, [it.model, it.split, it.num_tasks, it.steps], it.evaluation, **COMPUTE)
    offer_models([page.load, tab.select], workspace, it.model)


def lay_out() -> Controls:
    """The tab's components."""
    with gr.Row():
        with gr.Column(scale=1):
            model = model_choice("Model", elem_id="model")
            split = gr.Dropdown(SPLITS, value="test", label="Held-out tasks", info="shifted: outside of training")
            num_tasks = gr.Slider(5, 200, 40, step=1, label="Number of tasks")
            steps = gr.Slider(0, 5, 3, step=1, label="Most adaptation steps")
            evaluate = gr.Button("Evaluate", variant="primary")
        with gr.Column(scale=2):
            card = gr.HTML(NO_MODEL, label="Card", elem_id="card")
            evaluation = gr.HTML(label="Evaluation", elem_id="evaluation")
    return Controls(model, split, num_tasks, steps, evaluate, card, evaluation)


class Handlers(NamedTuple):
    """What the tab does, in its workspace; without a page, too."""

    workspace: Workspace

    @readable
    def show(self, name: str | None) -> tuple[str, str]:
        """A model's card, and no evaluation yet."""
        return (describe(self.workspace, name) if name else NO_MODEL), ""

    @readable
    def assess(self, name: str | None, split: str, num_tasks: int, steps: int) -> str:
        """A model's returns on held-out tasks; one that has no inner steps is not adapted."""
        path = self.workspace.playable(name)
        inner = TrainConfig.from_checkpoint(load_checkpoint(path).config).meta.inner_steps
        report = evaluate_checkpoint(path, split=split, num_tasks=int(num_tasks), steps=int(steps) if inner else 0)
        return table_html(evaluation_table(report.summary()))


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
    evaluation = card.get("evaluation") or read_evaluation(path.parent / EVALUATION)
    if evaluation:
        parts.append(table_html(evaluation_table(evaluation)))
    if "modes" in card:
        parts.append(table_html(modes_table(card["modes"])))
    return "".join(parts)


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
