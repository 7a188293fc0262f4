"""A training run in a folder: metrics, checkpoints, interruption and resume."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from ray.tune.logger import LoggerCallback

from ssm_metarl.algorithms.registry import ALGORITHMS, META_TRAINER
from ssm_metarl.algorithms.spec import PolicySpec
from ssm_metarl.config import TrainConfig
from ssm_metarl.core import Trainer
from ssm_metarl.distributed.cluster import Elastic, start_ray
from ssm_metarl.distributed.learner import check_device
from ssm_metarl.distributed.loggers import LoggerName, needs_ray, open_loggers, tune_loggers
from ssm_metarl.distributed.metrics import log_line
from ssm_metarl.distributed.schedule import SCHEDULE, Schedule, schedule_file
from ssm_metarl.distributed.signals import interrupts
from ssm_metarl.distributed.trainer import MetaTrainer, check_sizes, with_critic
from ssm_metarl.storage.atomic import naming, replace_file
from ssm_metarl.storage.checkpoint import load_checkpoint
from ssm_metarl.storage.contents import Checkpoint
from ssm_metarl.storage.lock import RunLock, hold
from ssm_metarl.storage.options_file import CONFIG, save_options
from ssm_metarl.storage.run_copy import WAIT, WAIT_INTERRUPTED, RunCopy
from ssm_metarl.storage.run_folder import best_return, check_new, mark_best, prepare_run, prune, resolve_checkpoint
from ssm_metarl.storage.run_log import cut_metrics
from ssm_metarl.storage.run_record import checkpoint_to_resume, set_aside_later, write_record
from ssm_metarl.storage.trust import remember
from ssm_metarl.tasks import TaskDistribution, names_code
from ssm_metarl.tasks.external.hints import new_hints

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What a training run left behind.

    Attributes:
        run_dir: its folder.
        checkpoint: the last checkpoint.
        metrics: of the last iteration, as in `metrics.jsonl`; empty if none was run.
        seconds: wall time of this call.
        signal: number of the signal that ended the run early, or None.
    """

    run_dir: Path
    checkpoint: Path
    metrics: dict[str, Any]
    seconds: float
    signal: int | None


def train(
    config: TrainConfig,
    run_dir: str | Path,
    *,
    start: str | Path | None = None,
    resume: bool = False,
    on_start: Callable[[], None] | None = None,
    on_iteration: Callable[[dict[str, Any]], None] | None = None,
    distribution: TaskDistribution | None = None,
    mirror: str | RunCopy | None = None,
    schedule: str | Path | None = None,
    resume_from: str | None = None,
    loggers: Sequence[LoggerName | LoggerCallback] = ("tensorboard",),
    elastic: bool = False,
) -> TrainResult:
    """Train in a folder: checkpoints, `metrics.jsonl` and TensorBoard events.

    SIGINT, SIGTERM and SIGHUP end the run after the current iteration, with a checkpoint; a second one ends it at once.

    Args:
        config: of the run. With `num_workers` above 0, Ray is started in this process unless it already is.
        run_dir: folder of the run, new or empty unless `resume`.
        start: a checkpoint, a run for its best one, or pretrained:NAME, whose weights the run begins with, whatever the
            algorithm that made them; None: initial weights.
        resume: resume from the folder's last checkpoint, exactly as if the run had not stopped.
        on_start: called when all is checked and the folder is the run's, before Ray starts.
        on_iteration: called with each iteration's metrics.
        distribution: the family itself, instead of the registered one that `config.task` names.
        mirror: URI at which the folder is copied with every checkpoint, beside training; a run is resumed from the copy
            if it has come further than the folder. The end waits up to a minute for it. A `RunCopy` stays open.
        schedule: a `schedule.json` of `evolve`, or a run that has one: options change before the meta-iterations that
            it names, sizes of the policy among them. `Schedule.read(schedule).config` has the options at first, with
            which the run reproduces the weights of evolve's incumbent. A run keeps its schedule, and is resumed with
            it. If evolve began with a checkpoint, `start` must be the same.
        resume_from: name of the checkpoint to resume from, where the newest is damaged; later ones are set aside.
        loggers: of metrics, beside `metrics.jsonl`: names of `LOGGERS`, or loggers of Ray Tune (the run is its trial).
        elastic: between iterations, start a worker for each processor that has joined the cluster and end one for each
            that has left. No number of the run depends on it.

    Raises:
        RunInUse, StorageError: another process has the folder or the copy; the copy is of another run, or not writable.
        ValueError: the folder is not empty or cannot be made, or has no run to resume; no storage is at the URI; or the
            schedule is damaged or does not fit.
        CheckpointError: the checkpoint to resume or to start from is damaged or of other sizes.
        EnvironmentFailure: more than a tenth of the episodes are invalid.
    """
    begin, run = time.perf_counter(), Path(run_dir)
    check_device(config.machine.device, config.machine.num_learners)
    if elastic and not (config.machine.num_workers and ALGORITHMS[config.meta.algorithm].trainer == META_TRAINER):
        raise ValueError("elastic needs a meta-learning algorithm with workers: num_workers of 1 or more.")
    callbacks = tune_loggers(loggers, run)
    copy = RunCopy(run, mirror) if isinstance(mirror, str) else mirror
    result: TrainResult | None = None
    with ExitStack() as held:
        lock: RunLock | None = None
        if resume and (copy or run.is_dir()):
            lock = held.enter_context(hold(run))
        try:
            if resume:
                if copy:
                    copy.open(resume=True)
                if resume_from is not None:
                    set_aside_later(run, resume_from)
            setup = _setup(config, run, start, resume, distribution, schedule)
            if not resume:
                lock = held.enter_context(hold(run))
                prepare_run(run)
                if copy:
                    copy.open(resume=False)
            _begin(config, run, start, resume, distribution, schedule)
            assert lock is not None
            if on_start:
                on_start()
            result = _train(setup, run, lock, copy, on_iteration, distribution, schedule, callbacks, elastic)
        finally:
            if copy and copy is not mirror:
                copy.close(WAIT if result is not None and result.signal is None else WAIT_INTERRUPTED)
    return replace(result, seconds=time.perf_counter() - begin)


def _begin(
    config: TrainConfig,
    run: Path,
    start: str | Path | None,
    resume: bool,
    distribution: TaskDistribution | None,
    schedule: str | Path | None,
) -> None:
    """Note a run in its folder and with this user; a new one with its options, and hints on a foreign environment."""
    write_record(run, iterations=config.experience.iterations)
    if distribution is None:
        remember(run, config.task)
    if resume:
        return
    given = {"start": start and str(start), "schedule": schedule and str(schedule)}
    begun = {name: value for name, value in given.items() if value}
    save_options(run / CONFIG, "train", {**config.to_dict(), **begun})
    if distribution is None and names_code(config.task):
        for hint in new_hints(config.task, config.task_options, config.task_ranges):
            _log.warning(hint)


@dataclass(frozen=True)
class _Setup:
    """What a run is to do, checked.

    Attributes:
        config: of the trainer at first.
        plan: options that change later.
        first: the checkpoint whose weights the run begins with.
        last: the checkpoint that the run goes on from.
    """

    config: TrainConfig
    plan: Schedule | None
    first: Checkpoint | None
    last: Path | None


def _setup(
    config: TrainConfig,
    run: Path,
    start: str | Path | None,
    resume: bool,
    distribution: TaskDistribution | None,
    schedule: str | Path | None,
) -> _Setup:
    """Check what a run is to do; nothing is written."""
    kind = trainer_class(config)
    if not resume:
        check_new(run)
    plan = _plan(run, config, schedule, resume)
    if plan and resume:
        config = plan.before(config, _last_iteration(run))
    spec = config.policy_spec(distribution or config.family())
    first = None if start is None or resume else _first(start, spec)
    if plan and not resume and plan.start != (int(first.progress["iteration"]) if first else 0):
        raise ValueError(
            f"The schedule begins at meta-iteration {plan.start}: start must be the checkpoint that evolve began with."
        )
    if not (first or resume or kind.learns_normalizer) and spec.normalizes:
        raise ValueError(
            f"{config.meta.algorithm} keeps the normaliser of the checkpoint that it starts from and learns none: "
            "normalize_observations and scale_rewards must be False without one."
        )
    return _Setup(config, plan, first, _to_resume(run, spec) if resume else None)


def _train(
    setup: _Setup,
    run: Path,
    lock: RunLock,
    copy: RunCopy | None,
    on_iteration: Callable[[dict[str, Any]], None] | None,
    distribution: TaskDistribution | None,
    schedule: str | Path | None,
    callbacks: Sequence[LoggerCallback | None],
    elastic: bool,
) -> TrainResult:
    """Train in a folder that is held."""
    config, plan, first, last = setup.config, setup.plan, setup.first, setup.last
    machine, kind = config.machine, trainer_class(config)
    if schedule is not None and not last:
        replace_file(run / SCHEDULE, schedule_file(schedule).read_bytes())
    start_ray(machine.num_workers, machine.num_learners, always=kind.always_ray or needs_ray(callbacks))
    trainer = kind.of_run(config, distribution)
    metrics: dict[str, Any] = {}
    checkpoint = last
    try:
        follow = Elastic(trainer) if elastic and isinstance(trainer, MetaTrainer) else None
        if last:
            trainer.load_checkpoint(str(last))
        elif first and isinstance(trainer, MetaTrainer) and plan:
            trainer.go_on_from(first)
        elif first:
            trainer.start_from(first)
        checkpoint = checkpoint or _save(trainer, run, [])
        saved = trainer.meta_iteration
        with (
            interrupts("The iteration is being finished") as interrupted,
            _RunLog(run, saved, config, callbacks) as log,
        ):
            while trainer.meta_iteration < config.experience.iterations and not interrupted:
                if plan and (changes := plan.changes.get(trainer.meta_iteration)):
                    assert isinstance(trainer, MetaTrainer)
                    trainer.change(changes)
                if follow:
                    follow()
                metrics = log.add(trainer.step())
                if on_iteration:
                    on_iteration(metrics)
                if trainer.meta_iteration % machine.checkpoint_every == 0:
                    lock.check()
                    checkpoint, saved = _save(trainer, run, log.recent), trainer.meta_iteration
                    if copy:
                        copy.update()
            if saved < trainer.meta_iteration:
                lock.check()
                checkpoint = _save(trainer, run, log.recent)
        if copy:
            copy.update()
    except OSError as error:
        if checkpoint:
            error.add_note(f"{checkpoint} and the checkpoints before it are safe: --resume goes on from there.")
        raise
    finally:
        trainer.stop()
    return TrainResult(run, checkpoint, metrics, 0.0, interrupted[0] if interrupted else None)


class _RunLog:
    """A run's metrics, iteration by iteration: metrics.jsonl, the other loggers, and the last returns.

    Args:
        run: the folder.
        iteration: of the checkpoint that the run resumes from; what was logged after it is taken back.
        config: of the run.
        callbacks: the other loggers, see `tune_loggers`.
    """

    def __init__(
        self, run: Path, iteration: int, config: TrainConfig, callbacks: Sequence[LoggerCallback | None]
    ) -> None:
        path = run / "metrics.jsonl"
        self._window = config.machine.checkpoint_every
        self.recent = cut_metrics(path, iteration)[-self._window :]
        self._loggers = open_loggers(callbacks, run, iteration, config)
        self._lines = path.open("a")

    def __enter__(self) -> _RunLog:
        return self

    def __exit__(self, *failure: object) -> None:
        for close in (*(logger.close for logger in self._loggers), self._lines.close):
            with suppress(OSError) if failure[0] else nullcontext():  # what failed first counts
                close()

    def add(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Write an iteration's metrics; returns them as a line of metrics.jsonl."""
        line = log_line(metrics)
        with naming(Path(self._lines.name)):
            self._lines.write(json.dumps(line) + "\n")
            self._lines.flush()
            for logger in self._loggers:
                logger.add(metrics, line)
        self.recent = [*self.recent, line["return_by_step"][-1]][-self._window :]
        return line


def trainer_class(config: TrainConfig) -> type[Trainer]:
    """The trainer that the registry names for a run's algorithm."""
    module, _, name = ALGORITHMS[config.meta.algorithm].trainer.partition(":")
    found: type[Trainer] = getattr(import_module(module), name)
    return found


def _plan(run: Path, config: TrainConfig, schedule: str | Path | None, resume: bool) -> Schedule | None:
    """The schedule of a new run or of the one that is in the folder; None where it has none.

    Raises:
        ValueError: it is damaged; or it is another one than the run's, or for an algorithm that cannot change options.
    """
    if resume and schedule is not None:
        raise ValueError("A run is resumed with its own schedule: none can be given.")
    if resume:
        schedule = run if (run / SCHEDULE).is_file() else None
    if schedule is None:
        return None
    if ALGORITHMS[config.meta.algorithm].trainer != META_TRAINER:
        raise ValueError(f"A schedule is one of meta-training: algorithm cannot be {config.meta.algorithm}.")
    return Schedule.read(schedule)


def _last_iteration(run: Path) -> int:
    """Of the checkpoint to resume from."""
    return int(load_checkpoint(checkpoint_to_resume(run)).progress["iteration"])


def _first(start: str | Path, spec: PolicySpec) -> Checkpoint:
    """The checkpoint whose weights a run begins with, with a critic as the run's baseline has it.

    Raises:
        CheckpointError: there is none, or it is damaged or of other sizes.
    """
    checkpoint = with_critic(load_checkpoint(resolve_checkpoint(start)), spec)
    check_sizes(str(start), checkpoint.spec, spec)
    return checkpoint


def _to_resume(run: Path, spec: PolicySpec) -> Path:
    """The checkpoint to resume from.

    Raises:
        ValueError: there is none.
        CheckpointError: it is damaged or of other sizes.
    """
    found = checkpoint_to_resume(run)
    check_sizes(found, load_checkpoint(found).spec, spec)
    return found


def _save(trainer: Trainer, run: Path, recent: list[float]) -> Path:
    """Checkpoint now; it is the best if the mean return after adaptation of the iterations since the last one is."""
    path = run / f"checkpoint_{trainer.meta_iteration:06d}"
    trainer.save_checkpoint(str(path))
    best, value = best_return(run), float(np.mean(recent)) if recent else -np.inf
    if np.isfinite(value) and (best is None or value > best):
        mark_best(run, path, value)
    prune(run)
    return path
