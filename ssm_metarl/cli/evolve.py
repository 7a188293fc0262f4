"""`evolve` and `evolve rollback`."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from pathlib import Path

from ssm_metarl.cli.console import answer, complain, console, say
from ssm_metarl.cli.job import run_name
from ssm_metarl.cli.options import Evolve, Rollback
from ssm_metarl.cli.parsing import copy_of
from ssm_metarl.cli.plots import has_lineage, plot_evolution
from ssm_metarl.cli.population import PopulationView, evolution_summary
from ssm_metarl.cli.train import checked_config, copy_end, resume_words, run_place, saved_options
from ssm_metarl.config import TrainConfig
from ssm_metarl.storage.run_copy import RunCopy
from ssm_metarl.tasks import names_code
from ssm_metarl.tasks.external.hints import new_hints
from ssm_metarl.tuning.config import EvolveConfig
from ssm_metarl.tuning.evolve import EvolutionFailure, evolve
from ssm_metarl.tuning.records import Decision
from ssm_metarl.tuning.rules import least_budget
from ssm_metarl.tuning.store import NOT_COPIED, REQUESTS, RunStore, request_rollback


def run_evolve(options: Evolve) -> int:
    """Carry out `evolve`; returns the exit code."""
    if saved_options(options, "evolve"):
        return 0
    rules = options.evolution
    config = checked_config(options, trials=rules.members)
    name = run_name(config.task, "evolve")
    run_dir, mirror = run_place(options, name)
    try:
        with ExitStack() as stack:
            copy = RunCopy(run_dir, mirror, NOT_COPIED, REQUESTS, say) if mirror else None
            return _run_evolve(options, config, run_dir, stack.enter_context(copy) if copy else None)
    except EvolutionFailure as error:
        complain(error)
        return 1


def _run_evolve(options: Evolve, config: TrainConfig, run_dir: Path, copy: RunCopy | None) -> int:
    rules = options.evolution
    if not options.resume and names_code(config.task):
        for hint in new_hints(config.task, config.task_options, config.task_ranges):
            say(hint)
    if not options.resume and (words := room_words(rules, config)):
        say(words)
    with PopulationView(run_dir, console):
        result = evolve(config, rules, run_dir, start=options.start, resume=options.resume, mirror=copy)
    summary = evolution_summary(result)
    events = RunStore(run_dir).events()
    if has_lineage(events):
        summary["pictures"] = [str(path) for path in plot_evolution(run_dir, config.task)]
    complete = copy_end(copy, summary, result.signal is not None)
    if result.checkpoint is not None:
        say(f"Best checkpoint: {result.checkpoint}")
        say(f"Its options by iteration, for train --schedule: {summary['schedule']}")
    for path in summary["pictures"]:
        say(f"Picture: {path}")
    finished = result.state["progress"]["finished"]
    if finished:
        say(f"Ended: {finished}")
    if options.json:
        answer(json.dumps(summary))
    if result.signal is not None:
        say(f"Interrupted; resume with: {resume_words('evolve', run_dir, copy, options.storage)}")
        return 128 + result.signal
    if not complete:
        return 1
    return 0 if finished and (not events or events[-1]["decision"] != Decision.FAILED) else 1


def room_words(rules: EvolveConfig, config: TrainConfig) -> str:
    """A sentence where a budget may have no room for a race."""
    if not rules.mutate or not rules.budget:
        return ""
    experience, meta = config.experience, config.meta
    episodes = experience.meta_batch * experience.episodes * experience.trial_episodes * (meta.inner_steps + 1)
    steps = episodes * config.family().horizon
    needed = least_budget(rules, steps)
    if rules.budget >= needed:
        return ""
    if math.isinf(needed):
        return "There will be no race: losers may cost nothing, or assessments everything."
    return (
        f"The budget may have no room for a race: at up to {steps:,} environment steps an iteration the first takes "
        f"{needed:,.0f}. A smaller --meta-batch or fewer --episodes take less."
    )


def run_rollback(options: Rollback) -> int:
    """Carry out `evolve rollback`; returns the exit code."""
    request_rollback(options.run, options.checkpoint, copy_of(options.storage, options.run))
    say(f"{options.checkpoint} will be the incumbent of {options.run} from its next decision on.")
    return 0
