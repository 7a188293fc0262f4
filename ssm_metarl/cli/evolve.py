"""`evolve` and `evolve rollback`."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace

from ssm_metarl.cli.console import console, say
from ssm_metarl.cli.job import run_name
from ssm_metarl.cli.options import Evolve, Rollback, copy_of
from ssm_metarl.cli.plots import plot_evolution
from ssm_metarl.cli.population import PopulationView, evolution_summary
from ssm_metarl.cli.train import checked_config, run_place
from ssm_metarl.tuning.evolve import evolve
from ssm_metarl.tuning.population import all_generations
from ssm_metarl.tuning.store import request_rollback


def run_evolve(options: Evolve) -> int:
    """Carry out `evolve`; returns the exit code."""
    rules = options.evolution
    if options.cycles is not None:
        if options.proposals < 1:
            raise ValueError(f"proposals must be 1 or more, not {options.proposals}.")
        rules = replace(rules, population=options.proposals + 1, generations=options.cycles, survivors=1)
    config = checked_config(options, trials=rules.population)
    name = run_name(config.task, "evolve")
    run_dir, mirror = run_place(options, name)
    with PopulationView(run_dir, console):
        result = evolve(config, rules, run_dir, start=options.start, resume=options.resume, mirror=mirror)
    summary = evolution_summary(result)
    if result.checkpoint is not None:
        summary["pictures"] = [str(path) for path in plot_evolution(run_dir, config.task)]
        say(f"Best checkpoint: {result.checkpoint}")
    for path in summary["pictures"]:
        say(f"Picture: {path}")
    if result.state["finished"]:
        say(f"Ended: {result.state['finished']}")
    if options.json:
        print(json.dumps(summary))
    if result.signal is not None:
        say(f"Interrupted; resume with: evolve --resume --run-dir {shlex.quote(str(run_dir))}")
        return 128 + result.signal
    return 0 if result.state["finished"] == all_generations(result.state["config"]["generations"]) else 1


def run_rollback(options: Rollback) -> int:
    """Carry out `evolve rollback`; returns the exit code."""
    request_rollback(options.run, options.checkpoint, copy_of(options.storage, options.run))
    say(f"{options.checkpoint} will be the best and the only parent from the next generation of {options.run} on.")
    return 0
