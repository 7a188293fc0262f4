"""A self-improving run in a folder: start, resume, interruption, and what it leaves behind."""

from __future__ import annotations

import os
import shutil
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune import CheckpointConfig, FailureConfig, RunConfig, TuneConfig, Tuner
from ray.tune.error import TuneError
from ray.tune.experiment import Trial
from ray.tune.stopper import Stopper

from ssm_metarl.config import TrainConfig
from ssm_metarl.distributed.cluster import start_ray
from ssm_metarl.distributed.signals import interrupts
from ssm_metarl.storage.run_copy import RunCopy
from ssm_metarl.tasks import TaskDistribution
from ssm_metarl.tuning.config import EvolveConfig
from ssm_metarl.tuning.member_trainer import MemberTrainer
from ssm_metarl.tuning.run import export_best, open_run
from ssm_metarl.tuning.scheduler import RecursiveSelfImprovement
from ssm_metarl.tuning.store import read_state


@dataclass(frozen=True)
class EvolveResult:
    """What a self-improving run left behind.

    Attributes:
        run_dir: its folder.
        checkpoint: the policy that it hands over as an ordinary checkpoint; None before the first one.
        state: as in `rsi/state.json`.
        seconds: wall time of this call.
        signal: number of the signal that ended the run early, or None.
    """

    run_dir: Path
    checkpoint: Path | None
    state: dict[str, Any]
    seconds: float
    signal: int | None


class EvolutionFailure(RuntimeError):
    """Ray Tune itself failed, not a member."""


class _Stop(Stopper):
    """Ends the experiment when a signal came; Tune asks at every turn of its loop."""

    def __init__(self, scheduler: RecursiveSelfImprovement, interrupted: list[int]) -> None:
        self._scheduler, self._interrupted = scheduler, interrupted

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        if self._interrupted:
            self._scheduler.close()  # a member that waits would keep Tune waiting
        return bool(self._interrupted)


def evolve(
    config: TrainConfig,
    rules: EvolveConfig,
    run_dir: str | Path,
    *,
    start: str | Path | None = None,
    resume: bool = False,
    distribution: TaskDistribution | None = None,
    trainable: type[tune.Trainable] = MemberTrainer,
    mirror: str | RunCopy | None = None,
) -> EvolveResult:
    """Let a policy improve itself in a folder; see `EvolveConfig` for the rules.

    SIGINT, SIGTERM and SIGHUP end the run; it resumes from the incumbent's last checkpoint.

    Args:
        config: of the incumbent at first; `iterations`, `lr_schedule` and `learner_threads` have no effect. Each member
            takes `1 + num_workers + num_learners` processors, or a share of them where there are fewer. On resume only
            what says where it runs may differ.
        rules: of the run; on resume those that differ from the run's replace them.
        run_dir: folder of the run, new or empty unless `resume`.
        start: a checkpoint, or a run for its best one, to start from; None: initial weights.
        resume: go on with the run in the folder.
        distribution: the family itself, instead of the registered one that `config.task` names.
        trainable: class of the members.
        mirror: URI of storage that all nodes reach, where the run is copied with every decision and resumed from;
            without it `run_dir` must be a folder that all nodes share, unless there is only one.

    Raises:
        ValueError: the folder is not empty or cannot be made, or has no run to resume, or one with other options;
            `start` acts on other spaces.
        CheckpointError: `start` is damaged.
        EvolutionFailure: Ray Tune broke down.
    """
    begin = time.perf_counter()
    opened = open_run(config, rules, Path(run_dir), start, resume, distribution, mirror)
    population, run = opened.population, opened.folder
    try:
        start_ray(config.machine.num_workers, config.machine.num_learners, always=True)
        scheduler = RecursiveSelfImprovement.of_run(opened, trainable)
        with interrupts("The members end") as interrupted:
            _fit(scheduler, run, interrupted)
        seconds = time.perf_counter() - begin
        population.add_seconds("wall", seconds)
        exported = export_best(run, population.store)
    finally:
        population.store.finish()
    return EvolveResult(run, exported, read_state(run), seconds, interrupted[0] if interrupted else None)


def _fit(scheduler: RecursiveSelfImprovement, run: Path, interrupted: list[int]) -> None:
    """Run Tune until the run is over."""
    # Tune's own table, logs and handler of Ctrl-C stand back for ours.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    folder = run / "rsi" / "tune"
    shutil.rmtree(folder, ignore_errors=True)  # of the process before: nothing in it is read again
    tuner = Tuner(
        scheduler.trainable,
        param_space=scheduler.param_space,
        tune_config=TuneConfig(scheduler=scheduler, trial_name_creator=_trial_name, trial_dirname_creator=_trial_name),
        run_config=RunConfig(
            name="tune",
            storage_path=str(folder.parent),
            stop=_Stop(scheduler, interrupted),
            failure_config=FailureConfig(max_failures=-1),  # the population counts them
            checkpoint_config=CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            verbose=0,
        ),
    )
    try:
        with warnings.catch_warnings():
            # Tune advises to reuse actors; members are not made anew.
            warnings.filterwarnings("ignore", "Consider boosting PBT", UserWarning)
            tuner.fit()
    except TuneError as error:  # its text is a traceback, the last line of which says what it was
        last = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise EvolutionFailure(
            f"Ray Tune broke down: {last[0]}; what was decided is kept, go on with resume."
        ) from error


def _trial_name(trial: Trial) -> str:
    return f"member-{trial.config['member']}"
