"""Options of every command, and the only parser."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import tyro

from ssm_metarl.algorithms.registry import ALGORITHMS
from ssm_metarl.algorithms.spec import PolicyConfig
from ssm_metarl.cli.console import RUNS
from ssm_metarl.config import TrainConfig
from ssm_metarl.evaluation.adapt import AdaptOptions
from ssm_metarl.storage.checkpoint import load_checkpoint
from ssm_metarl.storage.mirror import Mirror, is_uri
from ssm_metarl.storage.run_folder import checkpoints, resolve_checkpoint
from ssm_metarl.tuning.population import EvolveConfig
from ssm_metarl.tuning.store import read_state


def json_object(text: str) -> dict[str, Any]:
    """A JSON object of the command line.

    Raises:
        ValueError: it is none.
    """
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{text!r} is not a JSON object, such as '{{\"gravity\": [5, 15]}}'.")
    return value


JsonObject = Annotated[
    Mapping[str, Any],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="JSON",
        instance_from_str=lambda words: json_object(words[0]),
        is_instance=lambda value: isinstance(value, Mapping),
        str_from_instance=lambda value: [json.dumps(value)],
    ),
]


@dataclass(frozen=True, kw_only=True)
class Adapt:
    """Adapt a policy to one task with a few episodes, and play it before and after.

    Into --out go adaptation.json, the adaptation curve as a picture, trajectories (navigation-2d) or an animation
    (cartpole) before and after, and the adapted policy as a checkpoint, policy/.

    Attributes:
        checkpoint: a checkpoint's folder, a run's for its best checkpoint, or pretrained:NAME.
        params: the task's parameters, such as '{"direction": -1}'; the others are as in a task drawn from --split.
        mode: none, standard (this task's episodes), hybrid (and replayed ones, by propensity), or replay (any replayed
            ones, the control).
        options: of the adaptation.
        task: family of the task; by default the one of training.
        task_options: of the family; by default as in training.
        task_ranges: of gym:ID; by default as in training.
        split: that the task is drawn from.
        seed: of the task and the episodes.
        num_workers: Ray actors that collect rollouts; 0: in process.
        address: of a Ray cluster to join; by default RAY_ADDRESS, else Ray starts in this process.
        out: folder of the results, new or empty; by default a new one in runs.
        json: print one JSON object.
    """

    checkpoint: tyro.conf.Positional[Path]
    params: JsonObject = field(default_factory=dict)
    mode: str = "standard"
    options: tyro.conf.OmitArgPrefixes[AdaptOptions] = field(default_factory=AdaptOptions)
    task: str | None = None
    task_options: JsonObject | None = None
    task_ranges: JsonObject | None = None
    split: str = "test"
    seed: int = 0
    num_workers: int = 0
    address: str | None = None
    out: Path | None = None
    json: bool = False


@dataclass(frozen=True)
class JobStart:
    """Start a command in the background; it outlives the terminal.

    Usage: `job start [options] [-- train … | evolve …]`.

    Without a command, self-improvement resumes from the best checkpoint until it is stopped: the newest run of evolve
    in --storage is resumed, or a new one starts from the newest trained run, or from initial weights. Without a
    cluster, a Ray head is started on this machine's loopback address.

    Attributes:
        address: of the cluster's job server, such as http://head:8265; by default RAY_API_SERVER_ADDRESS, RAY_ADDRESS,
            or the head of this machine.
        storage: parent of the run folders on the cluster; a path that its machines share, or a URI.
        json: print one JSON object.
    """

    address: str | None = None
    storage: str = "runs"
    json: bool = False


@dataclass(frozen=True)
class JobStatus:
    """Show a job and its run: the newest one, by default.

    Attributes:
        job: its id.
        address: of the cluster's job server.
        json: print one JSON object.
    """

    job: tyro.conf.Positional[str | None] = None
    address: str | None = None
    json: bool = False


@dataclass(frozen=True)
class JobLogs:
    """Print a job's output: the newest one's, by default.

    Attributes:
        job: its id.
        follow: go on printing until the job ends.
        address: of the cluster's job server.
    """

    job: tyro.conf.Positional[str | None] = None
    follow: bool = False
    address: str | None = None


@dataclass(frozen=True)
class JobStop:
    """Stop a job, the newest one by default: it ends its iteration and writes a checkpoint first.

    Attributes:
        job: its id.
        address: of the cluster's job server.
    """

    job: tyro.conf.Positional[str | None] = None
    address: str | None = None


@dataclass(frozen=True)
class JobList:
    """List the jobs that were started.

    Attributes:
        address: of the cluster's job server.
        json: print one JSON object a job, in a list.
    """

    address: str | None = None
    json: bool = False


@dataclass(frozen=True)
class JobShutdown:
    """End the Ray head that `job start` started on this machine, after stopping its jobs."""


JobCommand = JobStart | JobStatus | JobLogs | JobStop | JobList | JobShutdown

COMMANDS = {
    "job start": JobStart,
    "job status": JobStatus,
    "job logs": JobLogs,
    "job stop": JobStop,
    "job list": JobList,
    "job shutdown": JobShutdown,
}


@dataclass(frozen=True, kw_only=True)
class UncheckedConfig(TrainConfig):
    """A `TrainConfig` that is checked when the command runs, where a mistake becomes one sentence of ours.

    Attributes:
        num_workers: Ray actors that collect rollouts; 0 collects in process; auto: the free processors of the cluster
            that is joined, less one for the learner, or this machine's cores.
    """

    num_workers: int | Literal["auto"] = "auto"  # type: ignore[assignment]
    task_options: JsonObject = field(default_factory=dict)
    task_ranges: JsonObject = field(default_factory=dict)

    def __post_init__(self) -> None:
        pass


@dataclass(frozen=True)
class Train:
    """Meta-train a policy, evaluate it on held-out tasks and draw the curves.

    Attributes:
        config: the run's options.
        start: a checkpoint, a run for its best one, or pretrained:NAME, whose weights the run begins with; its task,
            policy and, for the same algorithm, all other options are the defaults.
        run_dir: folder of the run; by default a new one in --storage.
        storage: parent of the run folders; or a URI such as s3://bucket/runs, where they are copied with every
            checkpoint and resumed from.
        address: of a Ray cluster to join, such as auto; by default RAY_ADDRESS, else Ray starts in this process.
        resume: resume from the last checkpoint in --run-dir, with the options it was started with unless given anew.
        eval_tasks: held-out tasks of the final evaluation.
        json: print the final summary as one JSON object.
    """

    config: tyro.conf.OmitArgPrefixes[UncheckedConfig]
    start: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    run_dir: Path | None = None
    storage: str = RUNS
    address: str | None = None
    resume: bool = False
    eval_tasks: int = 40
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class UncheckedEvolution(EvolveConfig):
    """An `EvolveConfig` that is checked when the command runs."""

    def __post_init__(self) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class Evolve:
    """Let a population of policies improve itself: sizes and learning rates evolve, and what does not help is undone.

    Attributes:
        config: options of the first generation's trials.
        evolution: the rules.
        start: a checkpoint, or a run for its best one, that all trials start from; by default initial weights.
        run_dir: folder of the run; by default a new one in --storage.
        storage: parent of the run folders, on a cluster a path that its machines share; or a URI such as
            s3://bucket/runs, where they are copied with every decision and resumed from.
        address: of a Ray cluster to join, such as auto; by default RAY_ADDRESS, else Ray starts in this process.
        resume: resume from the last decision in --run-dir.
        cycles: instead of --population and --generations: as many cycles of one incumbent and its challengers.
        proposals: challengers of a cycle.
        json: print the final summary as one JSON object.
    """

    config: tyro.conf.OmitArgPrefixes[UncheckedConfig]
    evolution: tyro.conf.OmitArgPrefixes[UncheckedEvolution]
    start: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    run_dir: Path | None = None
    storage: str = RUNS
    address: str | None = None
    resume: bool = False
    cycles: int | None = None
    proposals: int = 3
    json: bool = False


@dataclass(frozen=True)
class Rollback:
    """Make a kept checkpoint the best and the parent of a self-improving run's next generation.

    Attributes:
        run: the run's folder, of a run that is running or will be resumed.
        checkpoint: name of a folder in its rsi/checkpoints.
        storage: the URI that was given to evolve, if one was.
    """

    run: tyro.conf.Positional[Path]
    checkpoint: tyro.conf.Positional[str]
    storage: str = RUNS


@dataclass(frozen=True)
class Evaluate:
    """Evaluate a checkpoint on held-out tasks before adaptation and after 1..steps inner steps.

    With --modes, ways of adapting are compared instead, each with the episodes given and judged on fresh ones.

    Attributes:
        checkpoint: a checkpoint's folder, a run's for its best checkpoint, or pretrained:NAME.
        modes: of none, standard, replay and hybrid (see adapt); the others are compared with the first.
        task: family of the tasks; by default the one of training.
        task_options: of the family; by default as in training.
        task_ranges: of gym:ID; by default as in training.
        split: train, validation, test, or outside the training range shifted and shifted-test.
        num_tasks: number of tasks.
        steps: inner steps; by default as many as the policy was trained for.
        episodes: episodes a task and step; by default as in training.
        inner_lr: step size of the inner steps; by default as in training.
        seed: of tasks and rollouts.
        num_workers: Ray actors that collect rollouts; 0: in process.
        address: of a Ray cluster to join; by default RAY_ADDRESS, else Ray starts in this process.
        deterministic: take the most likely actions instead of sampling.
        json: print one JSON object.
    """

    checkpoint: tyro.conf.Positional[Path]
    modes: tuple[str, ...] = ()
    task: str | None = None
    task_options: JsonObject | None = None
    task_ranges: JsonObject | None = None
    split: str = "test"
    num_tasks: int = 100
    steps: int | None = None
    episodes: int | None = None
    inner_lr: float | None = None
    seed: int = 0
    num_workers: int = 0
    address: str | None = None
    deterministic: bool = False
    json: bool = False


@dataclass(frozen=True)
class Plot:
    """Draw the learning curve and the adaptation curve of a run into its folder.

    Attributes:
        run: the run's folder.
    """

    run: tyro.conf.Positional[Path]


@dataclass(frozen=True)
class App:
    """Open the web interface: pretrained models, meta-training, adaptation and self-improvement in a browser.

    Attributes:
        host: address to listen on; whoever reaches it can start work on this machine.
        port: to listen on.
        storage: parent of the run folders; the page reads and writes nothing else.
        address: of the job server of a cluster, such as http://head:8265; by default RAY_API_SERVER_ADDRESS,
            RAY_ADDRESS, or a head of this machine, started with the first job.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    storage: Path = Path(RUNS)
    address: str | None = None


def parse(arguments: Sequence[str]) -> Train | Evolve | Rollback | Evaluate | Adapt | Plot | App | JobCommand:
    """Options of one command; they show the chosen task's own defaults, or those of the run to resume."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    # A missing value is left for tyro to complain about.
    peek.add_argument("--task", nargs="?", default="navigation-2d", const="navigation-2d")
    peek.add_argument("--task-options", "--task_options", nargs="?", default="{}", const="{}")
    peek.add_argument("--task-ranges", "--task_ranges", nargs="?", default="{}", const="{}")
    peek.add_argument("--algorithm", nargs="?")
    peek.add_argument("--run-dir", "--run_dir", nargs="?", type=Path)
    peek.add_argument("--storage", nargs="?", default=RUNS, const=RUNS)
    peek.add_argument("--resume", action="store_true")
    peek.add_argument("--from", nargs="?", type=Path, dest="start")
    known, _ = peek.parse_known_args(arguments)
    if arguments[0] in ("train", "evolve") and known.resume and known.run_dir is None:
        raise ValueError("--resume needs --run-dir, the folder of the run to resume.")
    if known.resume and known.run_dir is not None and is_uri(known.storage):
        Mirror(known.run_dir, copy_of(known.storage, known.run_dir) or "").pull()
    config = TrainConfig()
    if arguments[0] == "train":
        config = _default_config(known)
    trials, rules = _default_evolution(known) if arguments[0] == "evolve" else (config, EvolveConfig())
    options = {**asdict(config), **({} if known.resume else {"num_workers": "auto", "device": "auto"})}
    default = Train(config=UncheckedConfig(**options))
    population = Evolve(config=UncheckedConfig(**asdict(trials)), evolution=UncheckedEvolution(**asdict(rules)))
    commands = [
        Annotated[Train, tyro.conf.subcommand("train", default=default)],
        Annotated[Evolve, tyro.conf.subcommand("evolve", default=population)],
        Annotated[Rollback, tyro.conf.subcommand("evolve rollback")],
        Annotated[Evaluate, tyro.conf.subcommand("evaluate")],
        Annotated[Adapt, tyro.conf.subcommand("adapt")],
        Annotated[Plot, tyro.conf.subcommand("plot")],
        Annotated[App, tyro.conf.subcommand("app")],
        *(Annotated[job, tyro.conf.subcommand(name)] for name, job in COMMANDS.items()),
    ]
    union: Any = Union[tuple(commands)]  # noqa: UP007 (of a list)
    return tyro.cli(union, args=arguments, prog="run_local.py", description=__doc__)


def _default_config(known: argparse.Namespace) -> TrainConfig:
    """Options of `train`: the task's own, those of a checkpoint to start from or a run to resume."""
    if known.start is not None and not known.resume:
        return _from_checkpoint(known)
    if not known.resume:
        return TrainConfig.for_task(known.task, **_family_options(known))
    found = checkpoints(known.run_dir) if known.run_dir.is_dir() else []
    if not found:
        raise ValueError(f"There is no checkpoint in {known.run_dir} to resume from.")
    return TrainConfig.from_dict(load_checkpoint(found[-1]).config)


def _from_checkpoint(known: argparse.Namespace) -> TrainConfig:
    """Options of a run that begins with a checkpoint's weights: its own, but for another algorithm that one's."""
    config = TrainConfig.from_dict(load_checkpoint(resolve_checkpoint(known.start)).config)
    if known.algorithm not in ALGORITHMS or known.algorithm == config.algorithm:
        return config
    kept = ("task", "task_options", "task_ranges", *(f.name for f in fields(PolicyConfig)))
    return TrainConfig.for_task(**{name: getattr(config, name) for name in kept}, algorithm=known.algorithm)


def _default_evolution(known: argparse.Namespace) -> tuple[TrainConfig, EvolveConfig]:
    """Options of the trials and the rules: the task's own, those of a checkpoint to start from or a run to resume."""
    # A trial is one process on one processor, so that a population fits a laptop.
    single = {"num_workers": 0, "learner_threads": 1, "device": "cpu"}
    if known.resume:
        state = read_state(known.run_dir)
        rules = {f.name: state["config"][f.name] for f in fields(EvolveConfig)}
        return TrainConfig.from_dict(state["base"]), EvolveConfig(**rules)
    if known.start is not None:
        config = load_checkpoint(resolve_checkpoint(known.start)).config
        trials = TrainConfig.from_dict({**config, **single})
    else:
        trials = TrainConfig.for_task(known.task, **_family_options(known), **single)
    return trials, EvolveConfig() if trials.inner_steps else EvolveConfig(validation_steps=0)


def _family_options(known: argparse.Namespace) -> dict[str, Any]:
    """What decides on the other options' defaults beside the task's name."""
    options = {"task_options": json_object(known.task_options), "task_ranges": json_object(known.task_ranges)}
    return options | ({"algorithm": known.algorithm} if known.algorithm in ALGORITHMS else {})


def copy_of(storage: str, run: Path) -> str | None:
    """The URI of a run's copy, if storage is a URI."""
    return f"{storage.rstrip('/')}/{run.name}" if is_uri(storage) else None
