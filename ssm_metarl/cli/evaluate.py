"""`evaluate`."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from ssm_metarl.cli.console import console
from ssm_metarl.cli.options import Evaluate
from ssm_metarl.cli.tables import evaluation_table, modes_table
from ssm_metarl.evaluation.adapt import AdaptOptions
from ssm_metarl.evaluation.compare import compare_modes
from ssm_metarl.evaluation.evaluate import evaluate_checkpoint
from ssm_metarl.evaluation.tasks import TaskSource


def run_evaluate(options: Evaluate) -> int:
    """Carry out `evaluate`; returns the exit code."""
    if options.modes:
        report = _compare(options)
        console.print(modes_table(report))
    else:
        report = evaluate_checkpoint(
            options.checkpoint,
            task=options.task,
            task_options=options.task_options,
            task_ranges=options.task_ranges,
            split=options.split,
            num_tasks=options.num_tasks,
            steps=options.steps,
            episodes=options.episodes,
            inner_lr=options.inner_lr,
            seed=options.seed,
            num_workers=options.num_workers,
            deterministic=options.deterministic,
        ).summary()
        console.print(evaluation_table(report))
    if options.json:
        print(json.dumps(report))
    return 0


def _compare(options: Evaluate) -> dict[str, Any]:
    if options.deterministic:
        raise ValueError("--modes compares policies that sample their actions; leave --deterministic out.")
    adapting = AdaptOptions(episodes=options.episodes, step_size=options.inner_lr)
    if options.steps is not None:
        adapting = replace(adapting, steps=options.steps)
    return compare_modes(
        options.checkpoint,
        options.modes,
        options=adapting,
        source=TaskSource(options.task, options.task_options, options.task_ranges, options.split),
        num_tasks=options.num_tasks,
        seed=options.seed,
        num_workers=options.num_workers,
    ).summary()
