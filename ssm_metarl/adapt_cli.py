"""``adapt``: a policy meets one new task; and the tables of ``evaluate``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from ssm_metarl.distributed.checkpoint import save_checkpoint
from ssm_metarl.distributed.evaluation import AdaptOptions, TaskReport, TaskSource, adapt_checkpoint
from ssm_metarl.job_cli import run_name
from ssm_metarl.plots import plot_task


def json_object(text: str) -> dict[str, Any]:
    """A JSON object of the command line.

    Raises:
        ValueError: it is none.
    """
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{text!r} is not a JSON object, such as '{{\"gravity\": [5, 15]}}'.")
    return value


JsonObject = Annotated[
    Mapping[str, Any],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="JSON",
        instance_from_str=lambda words: json_object(words[0]),
        is_instance=lambda value: isinstance(value, Mapping),
        str_from_instance=lambda value: [json.dumps(value)],
    ),
]


@dataclass(frozen=True, kw_only=True)
class Adapt:
    """Adapt a policy to one task with a few episodes, and play it before and after.

    Into --out go adaptation.json, the adaptation curve as a picture, trajectories (navigation-2d) or an animation
    (cartpole) before and after, and the adapted policy as a checkpoint, policy/.

    Attributes:
        checkpoint: a checkpoint's folder, a run's for its best checkpoint, or pretrained:NAME.
        params: the task's parameters, such as '{"direction": -1}'; the others are as in a task drawn from --split.
        mode: none, standard (this task's episodes), hybrid (and replayed ones, by propensity), or replay (any replayed
            ones, the control).
        options: of the adaptation.
        task: family of the task; by default the one of training.
        task_options: of the family; by default as in training.
        task_ranges: of gym:ID; by default as in training.
        split: that the task is drawn from.
        seed: of the task and the episodes.
        num_workers: Ray actors that collect rollouts; 0: in process.
        address: of a Ray cluster to join; by default RAY_ADDRESS, else Ray starts in this process.
        out: folder of the results, new or empty; by default a new one in runs.
        json: print one JSON object.
    """

    checkpoint: tyro.conf.Positional[Path]
    params: JsonObject = field(default_factory=dict)
    mode: str = "standard"
    options: tyro.conf.OmitArgPrefixes[AdaptOptions] = field(default_factory=AdaptOptions)
    task: str | None = None
    task_options: JsonObject | None = None
    task_ranges: JsonObject | None = None
    split: str = "test"
    seed: int = 0
    num_workers: int = 0
    address: str | None = None
    out: Path | None = None
    json: bool = False


def run_adapt(options: Adapt, console: Console, runs: str) -> int:
    """Adapt, show and write the result; returns the exit code.

    Args:
        runs: parent of the default folder.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
        ValueError: bad input, in one sentence.
    """
    out = options.out
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty; choose another folder.")
    source = TaskSource(options.task, options.task_options, options.task_ranges, options.split)
    report = adapt_checkpoint(
        options.checkpoint,
        options.params,
        mode=options.mode,
        options=options.options,
        source=source,
        seed=options.seed,
        num_workers=options.num_workers,
    )
    summary = write_report(report, out or Path(runs) / run_name(report.task, f"adapt-{options.mode}"))
    _show(summary, console)
    for path in summary["pictures"]:
        console.print(f"Picture: {path}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"Adapted policy: {summary['checkpoint']}", markup=False, highlight=False, soft_wrap=True)
    if options.json:
        print(json.dumps(summary))
    return 0


def write_report(report: TaskReport, out: Path) -> dict[str, Any]:
    """Write adaptation.json, the pictures and the adapted policy.

    Args:
        report: what adapting gave.
        out: folder of the results, made where it is not there.

    Returns:
        The report as JSON values, with the paths of the "checkpoint" and the "pictures".
    """
    summary = report.summary()
    out.mkdir(parents=True, exist_ok=True)
    summary["checkpoint"] = str(save_checkpoint(out / "policy", report.checkpoint))
    (out / "adaptation.json").write_text(json.dumps(summary, indent=1))
    summary["pictures"] = [str(path) for path in plot_task(out, summary, report.before, report.after)]
    return summary


def parameter_words(parameters: Any) -> str:
    """A task's parameters as short JSON: numbers with four significant digits."""
    return json.dumps(json.loads(json.dumps(parameters), parse_float=lambda text: float(f"{float(text):.4g}")))


def _show(summary: Mapping[str, Any], console: Console) -> None:
    replayed = [f"{count:.1f}" for count in summary["effective_replay_episodes"]]
    console.print(f"Task: {parameter_words(summary['parameters'])}", markup=False, highlight=False, soft_wrap=True)
    table = Table(title=f"{summary['task']}: {summary['mode']} adaptation")
    columns = ["step", "return of its own episodes"]
    columns += ["effective replayed episodes"] if any(summary["effective_replay_episodes"]) else []
    for column in columns:
        table.add_column(column, justify="right")
    for step, value in enumerate(summary["curve"]):
        mark = " (best)" if step == summary["best_step"] else ""
        table.add_row(str(step), f"{value:.2f}{mark}", *(["", *replayed][step : step + 1] if len(columns) > 2 else []))
    console.print(table)
    before, after = summary["before"], summary["after"]
    interval = interval_words(after, 2)
    cost = f"{summary['environment_steps']} environment steps, {summary['seconds']:.1f} s"
    console.print(
        f"Fresh episodes: {before['return']:.2f} before, {after['return']:.2f} ({interval}) after; {cost}.",
        highlight=False,
    )
    if summary["best_step"] == 0 and len(summary["curve"]) > 1:
        console.print("No step did better on its own episodes: the policy is the meta-trained one.")


def modes_table(report: Mapping[str, Any]) -> Table:
    """The modes of adaptation side by side; ``ModeComparison.summary()`` as a table."""
    table = Table(title=_title(report))
    gain = f"gain over {report['compared_with']}"
    table.caption = "in brackets 95 % intervals over tasks"
    for column in ("mode", "IQM", "mean", gain, "P(better)", "unchanged", "steps/task"):
        table.add_column(column, justify="right")
    for mode, row in report["modes"].items():
        cells = [f"{row[name]['value']:.2f} ({interval_words(row[name], 2)})" for name in ("iqm", "mean", "gain")]
        more = (f"{row['probability_of_improvement']:.2f}", f"{row['unchanged_tasks']:.0%}")
        table.add_row(mode, *cells, *more, f"{row['environment_steps_per_task']:.0f}")
    return table


def evaluation_table(report: Mapping[str, Any]) -> Table:
    """Returns by inner step; ``Evaluation.summary()`` as a table."""
    table = Table(title=_title(report))
    for column in ("inner steps", "return", "95 % over tasks", "episode length"):
        table.add_column(column, justify="right")
    rows = zip(report["return"], report["ci_low"], report["ci_high"], report["episode_length"], strict=True)
    for step, (mean, low, high, length) in enumerate(rows):
        interval = interval_words({"ci_low": low, "ci_high": high}, 2)
        table.add_row(str(step), f"{mean:.2f}", interval, f"{length:.1f}")
    return table


def interval_words(values: Mapping[str, float | None], digits: int) -> str:
    """ "low … high" of ``ci_low`` and ``ci_high``; "–" where there is no interval."""
    low, high = values["ci_low"], values["ci_high"]
    return "–" if low is None or high is None else f"{low:.{digits}f} … {high:.{digits}f}"


def _title(report: Mapping[str, Any]) -> str:
    count = report["num_tasks"]
    return f"{report['task']}: {count} task{'s' * (count != 1)} of split {report['split']}"
