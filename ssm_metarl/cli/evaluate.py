"""`evaluate`."""

from __future__ import annotations

import json

from ssm_metarl.cli.console import answer, console, say
from ssm_metarl.cli.options import Evaluate, check_gif
from ssm_metarl.cli.tables import evaluation_table, modes_table
from ssm_metarl.evaluation.adapt import adapt_checkpoint
from ssm_metarl.evaluation.compare import compare_modes
from ssm_metarl.evaluation.evaluate import evaluate_checkpoint
from ssm_metarl.evaluation.film import Film, film_report


def run_evaluate(options: Evaluate) -> int:
    """Carry out `evaluate`; returns the exit code."""
    check_gif(options.video)
    films: dict[str, Film] = {}
    if options.video:  # first: it may be refused
        films = film_report(adapt_checkpoint(options.checkpoint, config=options.config), options.config.seed)
    if options.modes:
        report = compare_modes(options.checkpoint, options.modes, config=options.config).summary()
        console.print(modes_table(report, console.width))
    else:
        report = evaluate_checkpoint(options.checkpoint, options.config).summary()
        console.print(evaluation_table(report))
    if options.video:
        from ssm_metarl.cli.plots import write_video  # matplotlib's

        say(f"Video: {write_video(films, options.video)}")
    if options.json:
        answer(json.dumps(report))
    return 0
