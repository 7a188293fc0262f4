"""A training run in a folder: metrics, checkpoints, interruption and resume."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter

from ssm_metarl.algorithms.registry import ALGORITHMS
from ssm_metarl.algorithms.spec import PolicySpec
from ssm_metarl.config import TrainConfig
from ssm_metarl.core import Trainer
from ssm_metarl.distributed.cluster import start_ray
from ssm_metarl.distributed.learner import check_device
from ssm_metarl.distributed.signals import interrupts
from ssm_metarl.distributed.trainer import check_sizes, with_critic
from ssm_metarl.storage.checkpoint import load_checkpoint
from ssm_metarl.storage.contents import Checkpoint
from ssm_metarl.storage.mirror import Mirror
from ssm_metarl.storage.run_folder import checkpoints, cut_metrics, mark_best, prepare_run, prune, resolve_checkpoint
from ssm_metarl.tasks import TaskDistribution


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
    on_iteration: Callable[[dict[str, Any]], None] | None = None,
    distribution: TaskDistribution | None = None,
    mirror: str | None = None,
) -> TrainResult:
    """Train in a folder: checkpoints, `metrics.jsonl` and TensorBoard events.

    SIGINT and SIGTERM end the run after the current iteration, with a checkpoint; a second one ends it at once.

    Args:
        config: of the run. With `num_workers` above 0, Ray is started in this process unless it already is.
        run_dir: folder of the run, new or empty unless `resume`.
        start: a checkpoint, a run for its best one, or pretrained:NAME, whose weights the run begins with, whatever the
            algorithm that made them; None: initial weights.
        resume: resume from the folder's last checkpoint, exactly as if the run had not stopped.
        on_iteration: called with each iteration's metrics.
        distribution: the family itself, instead of the registered one that `config.task` names.
        mirror: URI at which the folder is copied with every checkpoint; a run is resumed from the copy if there is one.

    Raises:
        ValueError: the folder is not empty or cannot be made, or has no run to resume; or no storage is at the URI.
        CheckpointError: the checkpoint to resume or to start from is damaged or of other sizes.
        EnvironmentFailure: more than a tenth of the episodes are invalid.
    """
    begin = time.perf_counter()
    run = Path(run_dir)
    machine = config.machine
    check_device(machine.device)
    kind = trainer_class(config)
    spec = config.policy_spec(distribution or config.family())
    copy = Mirror(run, mirror) if mirror else None
    if copy and resume:
        copy.pull()
    first = None if start is None or resume else _first(start, spec)
    if not (first or resume or kind.learns_normalizer) and spec.normalizes:
        raise ValueError(
            f"{config.meta.algorithm} keeps the normaliser of the checkpoint that it starts from and learns none: "
            "normalize_observations and scale_rewards must be False without one."
        )
    last = _prepare(run, resume, spec)
    start_ray(machine.num_workers, always=kind.always_ray)
    trainer = kind.of_run(config, distribution)
    metrics: dict[str, Any] = {}
    try:
        if last:
            trainer.load_checkpoint(str(last))
        elif first:
            trainer.start_from(first)
        checkpoint = last or _save(trainer, run, [])
        saved = trainer.meta_iteration
        with interrupts() as interrupted, _RunLog(run, saved, machine.checkpoint_every) as log:
            while trainer.meta_iteration < config.experience.iterations and not interrupted:
                metrics = trainer.step()
                log.add(metrics)
                if on_iteration:
                    on_iteration(metrics)
                if trainer.meta_iteration % machine.checkpoint_every == 0:
                    checkpoint, saved = _save(trainer, run, log.recent), trainer.meta_iteration
                    if copy:
                        copy.push()
            if saved < trainer.meta_iteration:
                checkpoint = _save(trainer, run, log.recent)
        if copy:
            copy.push()
    finally:
        trainer.stop()
    return TrainResult(run, checkpoint, metrics, time.perf_counter() - begin, interrupted[0] if interrupted else None)


class _RunLog:
    """A run's metrics, iteration by iteration: metrics.jsonl, TensorBoard's events, and the last returns.

    Args:
        run: the folder.
        iteration: of the checkpoint that the run resumes from; what was logged after it is taken back.
        window: iterations whose returns are kept.
    """

    def __init__(self, run: Path, iteration: int, window: int) -> None:
        path = run / "metrics.jsonl"
        self._window = window
        self.recent = cut_metrics(path, iteration)[-window:]
        self._lines = path.open("a")
        self._board = SummaryWriter(str(run), purge_step=iteration + 1, filename_suffix=f".{iteration}")

    def __enter__(self) -> _RunLog:
        return self

    def __exit__(self, *failure: object) -> None:
        self._board.close()
        self._lines.close()

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Write an iteration's metrics."""
        self._lines.write(json.dumps(metrics) + "\n")
        self._lines.flush()
        for name, value in _scalars(metrics):
            self._board.add_scalar(name, value, metrics["iteration"])
        self.recent = [*self.recent, metrics["return_by_step"][-1]][-self._window :]


def trainer_class(config: TrainConfig) -> type[Trainer]:
    """The trainer that the registry names for a run's algorithm."""
    module, _, name = ALGORITHMS[config.meta.algorithm].trainer.partition(":")
    found: type[Trainer] = getattr(import_module(module), name)
    return found


def _first(start: str | Path, spec: PolicySpec) -> Checkpoint:
    """The checkpoint whose weights a run begins with, with a critic as the run's baseline has it.

    Raises:
        CheckpointError: there is none, or it is damaged or of other sizes.
    """
    checkpoint = with_critic(load_checkpoint(resolve_checkpoint(start)), spec)
    check_sizes(str(start), checkpoint.spec, spec)
    return checkpoint


def _prepare(run: Path, resume: bool, spec: PolicySpec) -> Path | None:
    """Make the run's folder, unless it is there; return the checkpoint to resume from, None for a new run.

    Raises:
        ValueError: nothing to resume, a folder that is not empty otherwise, or one that cannot be made.
        CheckpointError: the checkpoint is damaged or of other sizes.
    """
    if resume:
        found = checkpoints(run)
        if not found:
            raise ValueError(f"There is no checkpoint in {run} to resume from.")
        check_sizes(found[-1], load_checkpoint(found[-1]).spec, spec)
        return found[-1]
    prepare_run(run)
    return None


def _save(trainer: Trainer, run: Path, recent: list[float]) -> Path:
    """Checkpoint now; it is the best if the mean return after adaptation of the iterations since the last one is."""
    path = run / f"checkpoint_{trainer.meta_iteration:06d}"
    trainer.save_checkpoint(str(path))
    best = run / "best.json"
    value = float(np.mean(recent)) if recent else -np.inf
    if np.isfinite(value) and (not best.exists() or value > json.loads(best.read_text())["return"]):
        mark_best(run, path, value)
    prune(run)
    return path


def _scalars(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a metrics line by TensorBoard tag; lists of numbers by index."""
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, list):
            yield from _scalars(
                {str(i): x for i, x in enumerate(value) if isinstance(x, int | float)}, f"{prefix}{name}/"
            )
        elif isinstance(value, int | float):
            yield prefix + name, float(value)
