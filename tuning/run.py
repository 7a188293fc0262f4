"""The folder of a self-improving run: opened new or to resume, and the policy that it hands over."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssm_metarl.algorithms.registry import ALGORITHMS, META_TRAINER
from ssm_metarl.config import TrainConfig
from ssm_metarl.distributed.learner import check_device
from ssm_metarl.distributed.schedule import SCHEDULE
from ssm_metarl.distributed.trainer import with_critic
from ssm_metarl.storage.atomic import replace_file
from ssm_metarl.storage.checkpoint import load_checkpoint, save_checkpoint
from ssm_metarl.storage.mirror import write_folder
from ssm_metarl.storage.options_file import CONFIG, save_options
from ssm_metarl.storage.run_copy import RunCopy
from ssm_metarl.storage.run_folder import mark_best, prepare_run, prune, resolve_checkpoint
from ssm_metarl.storage.uri import below
from ssm_metarl.tasks import TaskDistribution
from ssm_metarl.tuning.config import WITHOUT_EFFECT, EvolveConfig
from ssm_metarl.tuning.metrics import normalise
from ssm_metarl.tuning.population import Population
from ssm_metarl.tuning.records import START
from ssm_metarl.tuning.store import RunStore, read_state

MACHINE = ("num_workers", "num_learners", "learner_threads", "device", "sample_timeout_s", "min_tasks")
"""Options that say where members run, not what they do."""


@dataclass(frozen=True)
class Run:
    """An open run.

    Attributes:
        folder: of the run.
        config: of the incumbent at first.
        family: of tasks.
        population: its decisions.
    """

    folder: Path
    config: TrainConfig
    family: TaskDistribution
    population: Population

    def export(self) -> Path | None:
        """Copy the policy to hand over into the run's folder as an ordinary checkpoint; see `export_best`."""
        return export_best(self.folder, self.population.store)


def open_run(
    config: TrainConfig,
    rules: EvolveConfig,
    run_dir: Path,
    start: str | Path | None = None,
    resume: bool = False,
    distribution: TaskDistribution | None = None,
    mirror: str | RunCopy | None = None,
) -> Run:
    """A new run in a folder, or the one that is there; see `RecursiveSelfImprovement.for_config` for arguments.

    Raises:
        ValueError: the folder is not empty or cannot be made, or has no run to resume, or one with other options;
            `start` acts on other spaces.
        CheckpointError: `start` is damaged.
    """
    folder = run_dir.resolve()
    check_device(config.machine.device, config.machine.num_learners)
    family = distribution or config.family()
    reference = getattr(family, "reference", None)
    if reference is None:
        raise ValueError(f"evolve compares returns with those of a random policy: {family.name!r} needs a reference.")
    normalise(np.zeros(1), reference)
    algorithm = config.meta.algorithm
    if ALGORITHMS[algorithm].trainer != META_TRAINER:
        raise ValueError(f"evolve meta-trains: algorithm cannot be {algorithm}, which only train runs.")
    config = config.replace(lr_schedule="constant", learner_threads=1)  # see `WITHOUT_EFFECT`
    store = RunStore(folder, mirror)
    if resume:
        with ExitStack() as failed:
            failed.callback(store.close)  # lets other processes in
            store.pull()
            population = Population.resume(store, reference, **_changes(folder, config, rules))
            failed.pop_all()
        return Run(folder, config, family, population)
    spec = config.policy_spec(family)
    checkpoint = None if start is None else with_critic(load_checkpoint(resolve_checkpoint(start)), spec)
    if checkpoint and checkpoint.spec != spec:
        raise ValueError(f"The policy of {start} does not have the sizes asked for, or the spaces of {family.name!r}.")
    prepare_run(folder)
    with ExitStack() as failed:
        failed.callback(store.close)
        store.create()
        kept = {name: value for name, value in rules.to_dict().items() if name != "race"}
        begun = {} if start is None else {"start": str(start)}
        save_options(folder / CONFIG, "evolve", {**_with_effect(config), **kept, **begun})
        if checkpoint:
            write_folder(below(store.archive, START), lambda place: save_checkpoint(place, checkpoint))
        population = Population(rules, config.to_dict(), reference, store, START if checkpoint else None)
        if checkpoint:
            progress = checkpoint.progress
            population.incumbent.iteration = int(progress["iteration"])
            population.incumbent.env_steps = int(progress["env_steps"])
            population.incumbent.path[0][0] = population.incumbent.iteration
        population.commit()
        failed.pop_all()
    return Run(folder, config, family, population)


def _with_effect(config: TrainConfig) -> dict[str, Any]:
    """The options on which the run depends."""
    return {name: value for name, value in config.to_dict().items() if name not in WITHOUT_EFFECT}


def _changes(run: Path, config: TrainConfig, rules: EvolveConfig) -> dict[str, Any]:
    """Rules that differ from those that a run began with.

    Raises:
        ValueError: an option of the policy in training would change, or what a running race depends on.
    """
    state = read_state(run)
    for name, value in _with_effect(config).items():
        if name not in MACHINE and value != state["base"].get(name, value):
            raise ValueError(f"{name} cannot change on resume: it is {state['base'][name]} in {run}, not {value}.")
    changes = {name: value for name, value in rules.to_dict().items() if value != state["config"][name]}
    changes.pop("race", None)  # the run's own: the command line does not know it
    for name in ("proposals", "mutate"):
        if name in changes:
            raise ValueError(f"{name} cannot change on resume: it is {state['config'][name]} in {run}.")
    return changes


def export_best(run: Path, store: RunStore) -> Path | None:
    """Copy the policy that the run hands over into its folder as an ordinary checkpoint, and mark it as the best.

    Beside it stands the schedule of options that led there, which `train --schedule` replays.

    Returns:
        The checkpoint; None before the first.
    """
    state = read_state(run)
    best = state["progress"]["best"]
    if best is None or best not in state["archive"]:
        return None
    record = state["archive"][best]
    name = f"{best}_mean" if record["handed_over"] == "mean" else best
    path = run / f"checkpoint_{record['iteration']:06d}"
    save_checkpoint(path, store.checkpoint(name))
    mark_best(run, path, record["level"] or 0.0, "level")
    schedule = {"iterations": record["iteration"], "weights": record["handed_over"], "options": record["path"]}
    replace_file(run / SCHEDULE, json.dumps(schedule, indent=1).encode())
    prune(run)
    return path
