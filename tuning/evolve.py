"""A self-improving run in a folder: start, resume, interruption, and what it leaves behind."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from ray import tune
from ray.tune import CheckpointConfig, FailureConfig, RunConfig, TuneConfig, Tuner
from ray.tune.error import TuneError
from ray.tune.experiment import Trial
from ray.tune.stopper import Stopper

from ssm_metarl.algorithms.registry import ALGORITHMS, META_TRAINER
from ssm_metarl.config import TrainConfig
from ssm_metarl.distributed.cluster import check_resources, start_ray
from ssm_metarl.distributed.learner import check_device
from ssm_metarl.distributed.signals import interrupts
from ssm_metarl.distributed.telemetry import Telemetry
from ssm_metarl.distributed.trainer import with_critic
from ssm_metarl.storage.checkpoint import load_checkpoint, save_checkpoint
from ssm_metarl.storage.mirror import write_folder
from ssm_metarl.storage.run_folder import mark_best, prepare_run, prune, resolve_checkpoint
from ssm_metarl.tasks import TaskDistribution
from ssm_metarl.tuning.evolution import Evolution
from ssm_metarl.tuning.member_trainer import EvolvingTrainer
from ssm_metarl.tuning.metrics import normalise
from ssm_metarl.tuning.population import EvolveConfig
from ssm_metarl.tuning.scheduler import RecursiveSelfImprovement
from ssm_metarl.tuning.store import RunStore, read_state

START = "start"
"""Name in the archive of the checkpoint that a run was started from."""

MACHINE = ("num_workers", "learner_threads", "device", "sample_timeout_s")
"""Options of the trials that say where they run, not what they do."""

MAX_FAILURES = 3
"""Times that a trial's process is started again."""


@dataclass(frozen=True)
class EvolveResult:
    """What a self-improving run left behind.

    Attributes:
        run_dir: its folder.
        checkpoint: the best policy as an ordinary checkpoint; None before the first generation ended.
        state: as in `rsi/state.json`.
        seconds: wall time of this call.
        signal: number of the signal that ended the run early, or None.
    """

    run_dir: Path
    checkpoint: Path | None
    state: dict[str, Any]
    seconds: float
    signal: int | None


class _Stop(Stopper):
    """Ends the experiment when the evolution is over or a signal came; Tune asks at every turn of its loop."""

    def __init__(self, evolution: Evolution, interrupted: list[int]) -> None:
        self._evolution, self._interrupted = evolution, interrupted

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return bool(self._evolution.finished or self._interrupted)


def evolve(
    config: TrainConfig,
    evolution_config: EvolveConfig,
    run_dir: str | Path,
    *,
    start: str | Path | None = None,
    resume: bool = False,
    distribution: TaskDistribution | None = None,
    trainable: type[tune.Trainable] = EvolvingTrainer,
    mirror: str | None = None,
) -> EvolveResult:
    """Evolve a population in a folder; see `EvolveConfig` for the rules.

    SIGINT and SIGTERM end the run: every generation that ended is on disk.

    Args:
        config: of the first generation's trials, whose `lr_schedule` counts as constant. Each trial takes
            `1 + num_workers` CPUs. On resume only what says where it runs may differ, see `MACHINE`.
        evolution_config: rules; on resume those that differ from the run's replace them, but for the population and the
            validation, which cannot change.
        run_dir: folder of the run, new or empty unless `resume`.
        start: a checkpoint, or a run for its best one, that all trials start from; None: initial weights.
        resume: resume from the last decision on disk.
        distribution: the family itself, instead of the registered one that `config.task` names.
        trainable: the trial's class.
        mirror: URI of storage that all nodes reach, where the run is copied with every decision and resumed from;
            without it `run_dir` must be a folder that all nodes share, unless there is only one.

    Raises:
        ValueError: the folder is not empty or cannot be made, or has no run to resume, or one with other options;
            `start` acts on other spaces.
        CheckpointError: `start` is damaged.
    """
    begin = time.perf_counter()
    run = Path(run_dir).resolve()
    check_device(config.machine.device)
    family = distribution or config.family()
    store = RunStore(run, mirror)
    check_reference(family)
    algorithm = config.meta.algorithm
    if ALGORITHMS[algorithm].trainer != META_TRAINER:
        raise ValueError(f"A population meta-trains: algorithm cannot be {algorithm}, which only train runs.")
    config = config.replace(lr_schedule="constant")  # there is no last iteration, at which a schedule could end
    if resume:
        store.pull()
        evolution = Evolution.resume(store, **_changes(run, config, evolution_config))
    else:
        if not evolution_config.generation_steps:
            evolution_config = replace(evolution_config, generation_steps=default_generation_steps(config, family))
        spec = config.policy_spec(family)
        checkpoint = None if start is None else with_critic(load_checkpoint(resolve_checkpoint(start)), spec)
        if checkpoint and checkpoint.spec != spec:
            raise ValueError(
                f"The policy of {start} does not have the sizes asked for, or the spaces of {family.name!r}."
            )
        prepare_run(run)
        store.create()
        if checkpoint:
            write_folder(f"{store.archive}/{START}", lambda folder: save_checkpoint(folder, checkpoint))
        evolution = Evolution(evolution_config, config.to_dict(), store, START if checkpoint else None)
        evolution.commit()
    start_ray(config.machine.num_workers, always=True)
    check_resources(config.machine.num_workers)
    constants = {name: getattr(config.machine, name) for name in MACHINE}
    with interrupts() as interrupted:
        _fit(evolution, run, {**constants, "task_distribution": family}, trainable, interrupted)
    seconds = time.perf_counter() - begin
    evolution.seconds["wall"] = evolution.seconds.get("wall", 0.0) + seconds
    evolution.commit()
    exported = export_best(run, store)
    store.push()
    return EvolveResult(run, exported, evolution.state(), seconds, interrupted[0] if interrupted else None)


def default_generation_steps(config: TrainConfig, family: TaskDistribution) -> int:
    """Five meta-iterations with episodes of full length: trials then differ by a tenth of a generation at most."""
    experience, trial = config.experience, config.experience.trial_episodes * family.horizon
    return 5 * experience.meta_batch * experience.episodes * trial * (config.meta.inner_steps + 1)


def check_reference(family: TaskDistribution) -> None:
    """Refuse a family whose returns cannot be normalised.

    Raises:
        ValueError: it has no reference returns, or impossible ones.
    """
    reference = getattr(family, "reference", None)
    if reference is None:
        raise ValueError(f"evolve compares returns with those of a random player: {family.name!r} needs a reference.")
    normalise(np.zeros(1), reference)


def _changes(run: Path, config: TrainConfig, rules: EvolveConfig) -> dict[str, Any]:
    """Rules that differ from those that a run began with.

    Raises:
        ValueError: what makes earlier assessments worthless would change, or an option of the trials, which evolve.
    """
    state = read_state(run)
    begun = {**state["config"], **state["base"]}
    wanted = {**asdict(rules), **config.to_dict()}
    wanted["generation_steps"] = rules.generation_steps or begun["generation_steps"]
    changes = {name: value for name, value in wanted.items() if value != begun[name]}
    fixed = {"population", *(name for name in asdict(rules) if name.startswith("validation_")), *state["base"]}
    for name in changes:
        if name in fixed.difference(MACHINE):
            raise ValueError(f"{name} cannot change on resume: it is {begun[name]} in {run}, not {changes[name]}.")
    return {name: value for name, value in changes.items() if name in asdict(rules)}


def _fit(
    evolution: Evolution,
    run: Path,
    constants: Mapping[str, Any],
    trainable: type[tune.Trainable],
    interrupted: list[int],
) -> None:
    """Run Tune until the evolution is over."""
    if evolution.finished:
        return
    # Tune's own table, logs and handler of Ctrl-C stand back for ours.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    telemetry = Telemetry("population", str(evolution.base["task"]))

    def at_border() -> None:
        export_best(run, evolution.store)
        best = evolution.archive.get(evolution.best or "")
        telemetry.generation(evolution.generation, best.composite if best else None, evolution.store.events())

    tuning = run / "rsi" / "tune"
    shutil.rmtree(tuning, ignore_errors=True)  # of the process before: nothing in it is read again
    tuner = Tuner(
        trainable,
        param_space={
            "slot": tune.grid_search([slot.id for slot in evolution.slots]),
            **{name: constants[name] for name in MACHINE},  # what a trial needs of the cluster follows from them
        },
        tune_config=TuneConfig(
            scheduler=RecursiveSelfImprovement(evolution, constants, on_border=at_border),
            reuse_actors=True,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=RunConfig(
            name="tune",
            storage_path=str(tuning.parent),
            stop=_Stop(evolution, interrupted),
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
            checkpoint_config=CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    except TuneError as error:  # its text is a traceback, the last line of which says what it was
        last = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise EvolutionFailure(
            f"Ray Tune broke down: {last[0]}; what was decided is kept, go on with resume."
        ) from error


class EvolutionFailure(RuntimeError):
    """Ray Tune itself failed, not a trial."""


def _trial_name(trial: Trial) -> str:
    return f"trial-{trial.config['slot']}"


def export_best(run: Path, store: RunStore) -> Path | None:
    """Copy the best policy of the archive into the run folder as an ordinary checkpoint, and mark it as the best."""
    state = read_state(run)
    if state["best"] is None:
        return None
    record = state["archive"][state["best"]]
    checkpoint = store.checkpoint(record["name"])
    path = run / f"checkpoint_{record['generation']:06d}"
    save_checkpoint(path, checkpoint)
    mark_best(run, path, record["composite"])
    prune(run)
    return path
