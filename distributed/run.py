"""A training run in a folder: metrics, checkpoints, interruption and resume."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from tensorboardX import SummaryWriter

from ssm_metarl.algorithms.inference import PolicySpec
from ssm_metarl.distributed.checkpoint import checkpoints, load_checkpoint, mark_best, prune, resolve_checkpoint
from ssm_metarl.distributed.config import TrainConfig, available_cores
from ssm_metarl.distributed.learner import check_device
from ssm_metarl.distributed.storage import Mirror
from ssm_metarl.distributed.trainer import MetaTrainer, check_sizes, with_critic
from ssm_metarl.tasks import TaskDistribution

if TYPE_CHECKING:
    from ssm_metarl.distributed.rllib_ppo import PolicyGradientTrainer


@dataclass(frozen=True)
class TrainResult:
    """What a training run left behind.

    Attributes:
        run_dir: its folder.
        checkpoint: the last checkpoint.
        metrics: of the last iteration, as in ``metrics.jsonl``; empty if none was run.
        seconds: wall time of this call.
        signal: number of the signal that ended the run early, or None.
    """

    run_dir: Path
    checkpoint: Path
    metrics: dict[str, Any]
    seconds: float
    signal: int | None


def start_ray(num_workers: int, *, always: bool = False) -> None:
    """Have Ray in this process if it is wanted: join the cluster of ``RAY_ADDRESS``, or start one on loopback.

    Usage reporting is off, and the dashboard's address is printed to stderr.

    Args:
        num_workers: workers of one trainer; 0: Ray is not needed.
        always: it is needed without workers, too, for the trials of Tune.
    """
    if not (num_workers or always) or ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address := os.environ.get("RAY_ADDRESS"):
        context = _join(address)
    else:
        context = ray.init(
            address="local",
            num_cpus=max(available_cores(), 1 + num_workers),
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            _node_ip_address="127.0.0.1",
            logging_level="ERROR",
            log_to_driver=False,
        )
    if context.dashboard_url:
        print(f"Ray dashboard: http://{context.dashboard_url}", file=sys.stderr)


def _join(address: str) -> Any:
    """Connect to a running cluster.

    Raises:
        ValueError: none answers, or one of another version; one sentence.
    """
    try:
        return ray.init(logging_level="ERROR", log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"The Ray cluster at {address} (--address, RAY_ADDRESS) cannot be joined: {reason}") from None


def auto_workers(trials: int = 1) -> int:
    """Workers for each of as many trials: the free processors of the cluster that is joined, less one a learner.

    Without a cluster to join (``RAY_ADDRESS``), this machine's cores: there the learner and its workers take turns.
    """
    if not (os.environ.get("RAY_ADDRESS") or ray.is_initialized()):
        return available_cores() if trials == 1 else 0
    if not ray.is_initialized():
        start_ray(0, always=True)
    return max(int(ray.available_resources().get("CPU", 0.0)) // trials - 1, 0)


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
    """Train in a folder: checkpoints, ``metrics.jsonl`` and TensorBoard events.

    SIGINT and SIGTERM end the run after the current iteration, with a checkpoint; a second one ends it at once.

    Args:
        config: of the run. With ``num_workers`` above 0, Ray is started in this process unless it already is.
        run_dir: folder of the run, new or empty unless ``resume``.
        start: a checkpoint, a run for its best one, or pretrained:NAME, whose weights the run begins with, whatever the
            algorithm that made them; None: initial weights.
        resume: go on from the folder's last checkpoint, exactly as if the run had not stopped.
        on_iteration: called with each iteration's metrics.
        distribution: the family itself, instead of the registered one that ``config.task`` names.
        mirror: URI at which the folder is copied with every checkpoint; a run is resumed from the copy if there is one.

    Raises:
        ValueError: the folder is not empty or cannot be made, or has no run to resume; or no storage is at the URI.
        CheckpointError: the checkpoint to resume or to start from is damaged or of other sizes.
        EnvironmentFailure: the environment spoils more than a tenth of the episodes.
    """
    begin = time.perf_counter()
    run = Path(run_dir)
    check_device(config.device)
    spec = config.policy_spec(distribution or config.family())
    copy = Mirror(run, mirror) if mirror else None
    if copy and resume:
        copy.pull()
    first = None if start is None or resume else with_critic(load_checkpoint(resolve_checkpoint(start)), spec)
    if first:
        check_sizes(str(start), first.spec, spec)
    elif config.algorithm == "policy-gradient" and spec.normalizes and not resume:
        raise ValueError(
            "policy-gradient keeps the normaliser of the checkpoint that it starts from and learns none: "
            "normalize_observations and scale_rewards must be False without one."
        )
    last = _prepare(run, resume, spec)
    start_ray(config.num_workers, always=config.algorithm == "policy-gradient")
    trainer = make_trainer(config, distribution)
    metrics: dict[str, Any] = {}
    try:
        if last:
            trainer.load_checkpoint(str(last))
        elif first:
            trainer.start_from(first)
        checkpoint = last or _save(trainer, run, [])
        saved = trainer.meta_iteration
        recent = _cut_metrics(run / "metrics.jsonl", saved)[-config.checkpoint_every :]
        with (
            interrupts() as interrupted,
            (run / "metrics.jsonl").open("a") as log,
            SummaryWriter(str(run), purge_step=saved + 1, filename_suffix=f".{saved}") as board,
        ):
            while trainer.meta_iteration < config.iterations and not interrupted:
                metrics = trainer.step()
                log.write(json.dumps(metrics) + "\n")
                log.flush()
                for name, value in _scalars(metrics):
                    board.add_scalar(name, value, trainer.meta_iteration)
                recent.append(metrics["return_by_step"][-1])
                if on_iteration:
                    on_iteration(metrics)
                if trainer.meta_iteration % config.checkpoint_every == 0:
                    checkpoint, saved = _save(trainer, run, recent[-config.checkpoint_every :]), trainer.meta_iteration
                    if copy:
                        copy.push()
            if saved < trainer.meta_iteration:
                checkpoint = _save(trainer, run, recent[-config.checkpoint_every :])
        if copy:
            copy.push()
    finally:
        trainer.stop()
    return TrainResult(run, checkpoint, metrics, time.perf_counter() - begin, interrupted[0] if interrupted else None)


def make_trainer(config: TrainConfig, distribution: TaskDistribution | None) -> MetaTrainer | PolicyGradientTrainer:
    """The trainer of a run's algorithm."""
    if config.algorithm == "policy-gradient":
        from ssm_metarl.distributed.rllib_ppo import PolicyGradientTrainer  # only here: RLlib takes seconds to load

        return PolicyGradientTrainer(config, distribution)
    return MetaTrainer({**config.to_dict(), "task_distribution": distribution})


def _prepare(run: Path, resume: bool, spec: PolicySpec) -> Path | None:
    """Make the run's folder, unless it is there; return the checkpoint to go on from, None for a new run.

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


def prepare_run(run: Path) -> None:
    """Make the folder of a new run.

    Raises:
        ValueError: it is not empty, or cannot be made.
    """
    if run.is_dir() and any(not path.name.startswith(".") for path in run.iterdir()):
        raise ValueError(f"{run} is not empty; resume the run in it, or choose another folder.")
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{run} cannot be made: {error.strerror}.") from None


def _save(trainer: MetaTrainer | PolicyGradientTrainer, run: Path, recent: list[float]) -> Path:
    """Checkpoint now; it is the best if the mean return after adaptation of the iterations since the last one is."""
    path = run / f"checkpoint_{trainer.meta_iteration:06d}"
    trainer.save_checkpoint(str(path))
    best = run / "best.json"
    value = float(np.mean(recent)) if recent else -np.inf
    if np.isfinite(value) and (not best.exists() or value > json.loads(best.read_text())["return"]):
        mark_best(run, path, value)
    prune(run)
    return path


def _cut_metrics(path: Path, iteration: int) -> list[float]:
    """Drop lines after ``iteration``, of a run that died before its next checkpoint; return adapted returns left."""
    if not path.exists():
        return []
    kept = []
    for line in path.read_text().splitlines():
        try:
            metrics = json.loads(line)
        except json.JSONDecodeError:
            break  # torn by a crash
        if metrics["iteration"] > iteration:
            break
        kept.append(metrics)
    fresh = path.with_suffix(".tmp")
    fresh.write_text("".join(json.dumps(metrics) + "\n" for metrics in kept))
    fresh.replace(path)
    return [metrics["return_by_step"][-1] for metrics in kept]


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


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """A list that gets the number of the first SIGINT or SIGTERM; the second raises. Works in the main thread only."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, _frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
