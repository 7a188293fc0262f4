"""Tab Comparison: runs of meta-training on common axes, aggregates over seeds, and returns on held-out tasks."""

from __future__ import annotations

import dataclasses
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import gradio as gr
import numpy as np

from ssm_metarl.app.forms import command_line, remember
from ssm_metarl.app.overlay import Curve, HeldOut, aggregates_table, draw, grouped, read_curve
from ssm_metarl.app.pretrained_tab import SPLITS
from ssm_metarl.app.view import (
    COMPUTE,
    LOOK,
    POLL,
    line_html,
    option_words,
    pictures_html,
    readable,
    sentence,
    table_html,
)
from ssm_metarl.app.workspace import Workspace
from ssm_metarl.config import TrainConfig
from ssm_metarl.evaluation.evaluate import evaluate_checkpoint
from ssm_metarl.storage.checkpoint import load_checkpoint
from ssm_metarl.storage.contents import MANIFEST
from ssm_metarl.storage.run_folder import checkpoints

MOST = 12
"""Runs that are drawn at once."""

NO_RUNS = "<p>Choose runs of meta-training: those that differ in their seed alone are drawn as one group.</p>"

PICTURE = "Return after adaptation by environment steps, a line for every run, a thick one with an interval for a group"


class Controls(NamedTuple):
    """What a person sets and presses, and where the answers stand."""

    runs: gr.Dropdown
    split: gr.Dropdown
    num_tasks: gr.Slider
    measure: gr.Button
    picture: gr.HTML
    table: gr.HTML


def build(page: gr.Blocks, tab: gr.Tab, workspace: Workspace, store: gr.BrowserState) -> None:
    """Lay the tab out and wire it; called within it."""
    do = Handlers(workspace)
    with gr.Row():
        with gr.Column(scale=1):
            runs = gr.Dropdown(
                [],
                value=[],
                multiselect=True,
                allow_custom_value=True,
                max_choices=MOST,
                label="Runs",
                elem_id="compared",
            )
            split = gr.Dropdown(SPLITS, value="test", label="Held-out tasks", info="of the checkpoints that are kept")
            num_tasks = gr.Slider(5, 100, 20, step=1, label="Number of tasks")
            measure = gr.Button("Measure on held-out tasks", variant="primary", elem_id="measure", interactive=False)
            place = gr.Column()
        with gr.Column(scale=2):
            picture = gr.HTML(NO_RUNS, elem_id="overlay")
            table = gr.HTML(elem_id="aggregates")
    it = Controls(runs, split, num_tasks, measure, picture, table)
    asked = [it.runs, it.split, it.num_tasks]
    restored = remember(page, store, dict(zip(Controls._fields, asked, strict=False)))
    shown = [it.picture, it.table, it.measure]
    # One after the other: a look that began before the returns were there must not end after the one that has them.
    look = {**LOOK, "concurrency_id": "curves", "concurrency_limit": 1}
    it.runs.change(do.show, asked, shown, **look)
    it.measure.click(do.measure, asked, shown[:2], **COMPUTE).then(do.show, asked, shown, **look)
    with place:
        command_line(do.command, asked, restored, elem_id="measure-command")
    restored.then(do.offer, it.runs, it.runs, **POLL)
    tab.select(do.offer, it.runs, it.runs, **POLL)


Row: TypeAlias = tuple[float, ...]
"""Of a checkpoint: environment steps, mean return after adaptation on held-out tasks, low and high of its interval."""


@dataclass(frozen=True)
class Handlers:
    """What the tab does, in its workspace; without a page, too.

    Attributes:
        workspace: whose runs they are.
        measured: what was measured since the app began, by checkpoint, when it was written, split and tasks.
    """

    workspace: Workspace
    measured: dict[tuple[Path, int, str, int], Row] = field(default_factory=dict)

    @readable
    def offer(self, chosen: list[str] | None) -> Any:
        """The runs that there are; of those chosen, the ones that still are."""
        names = self.workspace.list_runs("train", [])
        return gr.update(choices=names, value=[name for name in chosen or [] if name in names])

    def show(self, names: list[str] | None, split: str, num_tasks: int) -> tuple[str, str, Any]:
        """Curves, aggregates, and the returns on held-out tasks that were measured; an error is the answer.

        The third is whether there is anything to measure.
        """
        try:
            curves = [self.with_held_out(curve, split, int(num_tasks)) for curve in self.curves(names)]
            return *self.drawn(curves), gr.update(interactive=bool(names))
        except Exception as error:
            return line_html(sentence(error)), "", gr.update(interactive=False)

    @readable
    def measure(self, names: list[str] | None, split: str, num_tasks: int) -> tuple[Any, Any]:
        """Have the runs' kept checkpoints play held-out tasks; `show` shows their returns.

        Raises:
            ValueError: a checkpoint is damaged or cannot play; one sentence.
        """
        for curve in self.curves(names):
            self.workspace.check_code(curve.name, curve.config.get("task"))
            for path, key in self.keys(curve.name, split, int(num_tasks)):
                if key not in self.measured:
                    self.measured[key] = play(path, split, int(num_tasks))
        return gr.skip(), gr.skip()

    def keys(self, name: str, split: str, num_tasks: int) -> list[tuple[Path, tuple[Path, int, str, int]]]:
        """The checkpoints that a run has kept, and under what their returns are found."""
        found = []
        for path in checkpoints(self.workspace.folder(name)):
            with suppress(FileNotFoundError):  # a run that trains deletes old ones
                found.append((path, (path, (path / MANIFEST).lstat().st_mtime_ns, split, num_tasks)))
        return found

    def with_held_out(self, curve: Curve, split: str, num_tasks: int) -> Curve:
        """The curve with what was measured of its run."""
        keys = [key for _, key in self.keys(curve.name, split, num_tasks)]
        rows = [self.measured[key] for key in keys if key in self.measured]
        return dataclasses.replace(curve, held_out=HeldOut(*np.array(rows, float).T)) if rows else curve

    def command(self, names: list[str] | None, split: str, num_tasks: int) -> list[list[str]]:
        """The commands that do the same: one for each checkpoint."""
        options = option_words({"split": split, "num_tasks": int(num_tasks)})
        folders = [self.workspace.folder(name) for name in names or []]
        return [["evaluate", str(path), *options] for folder in folders for path in checkpoints(folder)]

    def curves(self, names: list[str] | None) -> list[Curve]:
        """The runs' curves.

        Raises:
            ValueError: too many runs, or one that has no curve; one sentence.
        """
        if names and len(names) > MOST:
            raise ValueError(f"{len(names)} runs are too many for one picture: choose at most {MOST}.")
        return [read_curve(name, self.workspace.folder(name)) for name in names or []]

    def drawn(self, curves: list[Curve]) -> tuple[str, str]:
        """Picture and table."""
        if not curves:
            return NO_RUNS, ""
        groups = grouped(curves)
        with tempfile.TemporaryDirectory() as folder:
            shown = pictures_html([(draw(groups, Path(folder) / "overlay.png"), PICTURE)])
        return shown, table_html(aggregates_table(groups))


def play(path: Path, split: str, num_tasks: int) -> Row:
    """Of a checkpoint: environment steps, mean return after adaptation on held-out tasks, and the mean's interval.

    Raises:
        ValueError: it is damaged or cannot play; one sentence.
    """
    checkpoint = load_checkpoint(path)
    TrainConfig.from_checkpoint(checkpoint.config)
    report = evaluate_checkpoint(path, split=split, num_tasks=num_tasks).summary()
    found = [report[name][-1] for name in ("return", "ci_low", "ci_high")]
    return float(checkpoint.progress.get("env_steps", 0)), *(np.nan if each is None else each for each in found)
