"""A training run in a folder: metrics, checkpoints, interruption and resume; and evaluation of its checkpoints."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from tensorboardX import SummaryWriter

from ..algorithms.collect import seed_for
from ..algorithms.evaluation import Evaluation, evaluate
from ..algorithms.inference import PolicySpec, check_count
from ..algorithms.policy import SSMPolicy
from ..algorithms.rollouts import Array, Rollouts
from ..tasks import TaskDistribution, make
from .checkpoint import Checkpoint, checkpoints, load_checkpoint, mark_best, prune, resolve_checkpoint
from .config import TrainConfig, available_cores
from .learner import check_device
from .pool import Pool
from .storage import Mirror
from .trainer import EVALUATION, MetaTrainer, check_resources, check_sizes, play

SPLIT_BRANCHES = {"train": 0, "validation": 1, "test": 2, "shifted": 3, "shifted-test": 4}
"""Branches of the seed tree for the splits' tasks: validation and test never meet the tasks of training."""


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
    resume: bool = False,
    on_iteration: Callable[[dict[str, Any]], None] | None = None,
    distribution: TaskDistribution | None = None,
    mirror: str | None = None,
) -> TrainResult:
    """Meta-train in a folder: checkpoints, ``metrics.jsonl`` and TensorBoard events.

    SIGINT and SIGTERM end the run after the current iteration, with a checkpoint; a second one ends it at once.

    Args:
        config: of the run. With ``num_workers`` above 0, Ray is started in this process unless it already is.
        run_dir: folder of the run, new or empty unless ``resume``.
        resume: go on from the folder's last checkpoint, exactly as if the run had not stopped.
        on_iteration: called with each iteration's metrics.
        distribution: the family itself, instead of the registered one that ``config.task`` names.
        mirror: URI at which the folder is copied with every checkpoint; a run is resumed from the copy if there is one.

    Raises:
        ValueError: the folder is not empty or cannot be made, or has no run to resume; or no storage is at the URI.
        CheckpointError: the checkpoint to resume is damaged or of other sizes.
        EnvironmentFailure: the environment spoils more than a tenth of the episodes.
    """
    begin = time.perf_counter()
    run = Path(run_dir)
    check_device(config.device)
    spec = config.policy_spec(distribution or config.family())
    copy = Mirror(run, mirror) if mirror else None
    if copy and resume:
        copy.pull()
    last = _prepare(run, resume, spec)
    start_ray(config.num_workers)
    trainer = MetaTrainer({**config.to_dict(), "task_distribution": distribution})
    metrics: dict[str, Any] = {}
    try:
        if last:
            trainer.load_checkpoint(str(last))
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


def _save(trainer: MetaTrainer, run: Path, recent: list[float]) -> Path:
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


def load_policy(path: str | Path) -> tuple[SSMPolicy, Checkpoint]:
    """The policy of a checkpoint, or of a run's best one, and the checkpoint itself.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    checkpoint = load_checkpoint(resolve_checkpoint(path))
    policy = SSMPolicy(checkpoint.spec)
    policy.load_state_dict({name: torch.from_numpy(value) for name, value in checkpoint.policy.items()})
    return policy, checkpoint


def evaluate_checkpoint(
    path: str | Path,
    *,
    task: str | None = None,
    task_options: Mapping[str, Any] | None = None,
    task_ranges: Mapping[str, Any] | None = None,
    split: str = "test",
    num_tasks: int = 100,
    steps: int | None = None,
    episodes: int | None = None,
    seed: int = 0,
    num_workers: int = 0,
    deterministic: bool = False,
    distribution: TaskDistribution | None = None,
    inner_lr: float | None = None,
) -> Evaluation:
    """Returns of a checkpoint's policy on held-out tasks before adaptation and after 1..``steps`` inner steps.

    Args:
        path: a checkpoint, or a run folder for its best one.
        task: family of the tasks; None: the one it was trained on.
        task_options, task_ranges: of the family; None: as in training if it is the same one, else none.
        split: of that family.
        num_tasks: how many tasks.
        steps: adaptation steps S; None: 3, or 0 for a policy that was trained without.
        episodes: episodes a task and step; None: as in training.
        seed: of tasks and rollouts: equal seeds give equal tasks and common random numbers.
        num_workers: Ray actors; 0: in process.
        deterministic: take the most likely actions.
        distribution: the family itself, instead of a registered one.
        inner_lr: step size; None: as in training.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
        ValueError: an unknown task or split, an impossible number, or a family whose spaces the policy does not fit.
        EnvironmentFailure: the environment spoils more than a tenth of a step's episodes.
    """
    policy, checkpoint = load_policy(path)
    config = TrainConfig.from_dict({**checkpoint.config, **({} if inner_lr is None else {"inner_lr": inner_lr})})
    family = distribution or _family(config, task, task_options, task_ranges)
    steps = (3 if config.inner_steps else 0) if steps is None else steps
    for name, value, least in (("num_tasks", num_tasks, 1), ("steps", steps, 0), ("seed", seed, 0)):
        check_count(name, value, least)
    check_count("num_workers", num_workers, 0)
    spec = config.policy_spec(family)
    if spec != policy.spec:
        raise ValueError(
            f"The policy acts on observations of size {policy.spec.observation_size} with {policy.spec.action_size} "
            f"{'discrete' if policy.spec.discrete else 'continuous'} actions, which {family.name!r} does not have."
        )
    columns = config.episodes if episodes is None else episodes
    check_count("episodes", columns, 1)
    family.sample(0, np.random.default_rng(), split)  # refuses an unknown split, before Ray starts
    start_ray(num_workers)
    check_resources(num_workers)
    with Pool(
        family,
        policy.spec,
        num_workers=num_workers,
        trial_episodes=config.trial_episodes,
        name=f"ssm-metarl/evaluate/{time.time_ns()}",
    ) as pool:
        return evaluate_policy(
            policy,
            config,
            family,
            pool,
            split=split,
            num_tasks=num_tasks,
            steps=steps,
            episodes=columns,
            seed=seed,
            deterministic=deterministic,
        )


def _family(
    config: TrainConfig, task: str | None, options: Mapping[str, Any] | None, ranges: Mapping[str, Any] | None
) -> TaskDistribution:
    """The family of an evaluation: that of training but for what is given."""
    if task is not None and task != config.task:
        return make(task, options or {}, ranges or {})
    same = {"options": config.task_options, "ranges": config.task_ranges}
    given = {"options": options, "ranges": ranges}
    return make(config.task, **{**same, **{name: value for name, value in given.items() if value is not None}})


def evaluate_policy(
    policy: SSMPolicy,
    config: TrainConfig,
    family: TaskDistribution,
    pool: Pool,
    *,
    split: str,
    num_tasks: int,
    steps: int,
    episodes: int,
    seed: int,
    deterministic: bool = False,
) -> Evaluation:
    """:func:`evaluate_checkpoint` for a policy in memory and a pool of its sizes; see there.

    Raises:
        ValueError: an unknown split.
        EnvironmentFailure: the environment spoils more than a tenth of a step's episodes.
    """
    branch = SPLIT_BRANCHES.get(split, len(SPLIT_BRANCHES))
    rng = np.random.default_rng(seed_for(seed, EVALUATION, branch))
    tasks = family.sample(num_tasks, rng, split)
    played = np.ones(num_tasks, bool)

    def collect(weights: Mapping[str, Array], step: int) -> Rollouts:
        seeds = [seed_for(seed, EVALUATION, branch, step, task) for task in range(num_tasks)]
        label = f"evaluation, step {step}"
        return play(pool, weights, tasks, seeds, episodes, played, label=label, deterministic=deterministic)[0]

    return replace(evaluate(policy, config, collect, steps), task=family.name, split=split)
