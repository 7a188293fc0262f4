"""`adapt`: a policy and one task."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssm_metarl.cli.console import RUNS, answer, console
from ssm_metarl.cli.job import run_name
from ssm_metarl.cli.options import Adapt, check_gif
from ssm_metarl.cli.plots import plot_task, write_video
from ssm_metarl.cli.tables import adaptation_table, decimals, interval_words, parameter_words
from ssm_metarl.evaluation.adapt import TaskReport, adapt_checkpoint
from ssm_metarl.evaluation.film import film_report
from ssm_metarl.storage.checkpoint import save_checkpoint


def run_adapt(options: Adapt) -> int:
    """Adapt, show and write the result; returns the exit code.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
        ValueError: bad input, in one sentence.
    """
    out = options.out
    check_gif(options.video)
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty; choose another folder.")
    report = adapt_checkpoint(
        options.checkpoint, options.params, mode=options.mode, options=options.adaptation, config=options.config
    )
    films = film_report(report, options.config.seed) if options.video else {}  # first: it may be refused
    summary = write_report(report, out or Path(RUNS) / run_name(report.task, f"adapt-{options.mode}"))
    if options.video:
        summary["pictures"].append(str(write_video(films, options.video)))
    _show(summary)
    for path in summary["pictures"]:
        console.print(f"Picture: {path}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"Adapted policy: {summary['checkpoint']}", markup=False, highlight=False, soft_wrap=True)
    if options.json:
        answer(json.dumps(summary))
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


def _show(summary: Mapping[str, Any]) -> None:
    console.print(f"Task: {parameter_words(summary['parameters'])}", markup=False, highlight=False, soft_wrap=True)
    console.print(adaptation_table(summary))
    before, after = summary["before"], summary["after"]
    digits = decimals(*summary["curve"], before["return"], after["return"])
    interval = interval_words(after, digits)
    cost = f"{summary['environment_steps']} environment steps, {summary['seconds']:.1f} s"
    first, last = (f"{each['return']:.{digits}f}" for each in (before, after))
    console.print(f"Fresh episodes: {first} before, {last} ({interval}) after; {cost}.", highlight=False)
    if summary["best_step"] == 0 and len(summary["curve"]) > 1:
        console.print("No step did better on its own episodes: the policy is the meta-trained one.")
