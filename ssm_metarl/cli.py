"""The command line: ``train`` (the default), ``evolve``, ``evaluate``, ``adapt``, ``plot``, ``job`` and ``app``."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ssm_metarl.adapt_cli import Adapt, JsonObject, evaluation_table, json_object, modes_table, run_adapt
from ssm_metarl.algorithms.inference import PolicyConfig
from ssm_metarl.algorithms.maml import ALGORITHMS
from ssm_metarl.distributed.checkpoint import CheckpointError, checkpoints, load_checkpoint, resolve_checkpoint
from ssm_metarl.distributed.config import TrainConfig
from ssm_metarl.distributed.evaluation import AdaptOptions, TaskSource, compare_modes, evaluate_checkpoint
from ssm_metarl.distributed.jobs import JobError
from ssm_metarl.distributed.learner import check_device
from ssm_metarl.distributed.run import auto_workers, train
from ssm_metarl.distributed.storage import Mirror, is_uri
from ssm_metarl.distributed.trainer import EnvironmentFailure
from ssm_metarl.job_cli import COMMANDS, JobCommand, run_job, run_name
from ssm_metarl.plots import plot_evolution, plot_run
from ssm_metarl.population_view import PopulationView, evolution_summary
from ssm_metarl.tuning.population import EvolveConfig, all_generations
from ssm_metarl.tuning.run import EvolutionFailure, evolve
from ssm_metarl.tuning.store import read_state, request_rollback

console = Console(stderr=True)

RUNS = "runs"
"""Parent of the run folders."""


@dataclass(frozen=True, kw_only=True)
class UncheckedConfig(TrainConfig):
    """A ``TrainConfig`` that is checked when the command runs, where a mistake becomes one sentence of ours.

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
        resume: go on from the last checkpoint in --run-dir, with the options it was started with unless given anew.
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
    """An ``EvolveConfig`` that is checked when the command runs."""

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
        resume: go on from the last decision in --run-dir.
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
        run: the run's folder, of a run that goes on or that will be resumed.
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; exit code 0, 1 after a failure, 2 for bad input, 130 or 143 when interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or (given[0].startswith("-") and given[0] not in ("-h", "--help")):
        given.insert(0, "train")
    if " ".join(given[:2]) in ("evolve rollback", *COMMANDS):
        given[:2] = [" ".join(given[:2])]
    command: list[str] = []
    if given[0] == "job start" and "--" in given:
        given, command = given[: given.index("--")], given[given.index("--") + 1 :]
    try:
        options = _parse(given)
        if isinstance(options, JobCommand):
            _check(command)
            return run_job(options, command, console)
        if isinstance(options, Train | Evolve | Evaluate | Adapt) and options.address:
            os.environ["RAY_ADDRESS"] = options.address
        if isinstance(options, Train):
            return _train(options)
        if isinstance(options, Evaluate):
            return _evaluate(options)
        if isinstance(options, Adapt):
            return run_adapt(options, console, RUNS)
        if isinstance(options, Evolve):
            return _evolve(options)
        if isinstance(options, Rollback):
            return _rollback(options)
        if isinstance(options, App):
            return _app(options)
        return _plot(options)
    except (ValueError, CheckpointError) as error:
        _complain(error)
        return 2
    except (EnvironmentFailure, EvolutionFailure, FloatingPointError, JobError, OSError) as error:
        _complain(error)
        return 1
    except KeyboardInterrupt:
        return 130
    except SystemExit as end:
        if end.code == signal.SIGTERM:  # from the handler that ray.init leaves behind
            return 128 + signal.SIGTERM
        raise


def _check(command: Sequence[str]) -> None:
    """Refuse a job's command that would be refused when it runs; what only the cluster knows is not looked at."""
    if not command:
        return
    if command[0] not in ("train", "evolve", "evaluate"):
        raise ValueError(f"A job can train, evolve or evaluate, not {command[0]!r}.")
    if "--resume" not in command and not any(word.startswith("--from") for word in command):
        options = _parse(command)
        if isinstance(options, Train | Evolve):
            TrainConfig(**{**asdict(options.config), "num_workers": 0})
        if isinstance(options, Evolve):
            EvolveConfig(**asdict(options.evolution))


def _parse(arguments: Sequence[str]) -> Train | Evolve | Rollback | Evaluate | Adapt | Plot | App | JobCommand:
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
        raise ValueError("--resume needs --run-dir, the folder of the run to go on with.")
    if known.resume and known.run_dir is not None and is_uri(known.storage):
        Mirror(known.run_dir, _copy(known.storage, known.run_dir) or "").pull()
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
    """Options of ``train``: the task's own, those of a checkpoint to start from or a run to resume."""
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


def _checked(config: UncheckedConfig, trials: int) -> TrainConfig:
    """The options of a run, checked before the workers of "auto" are counted, for which Ray may have to be started."""
    values = asdict(config)
    automatic = values["num_workers"] == "auto"
    checked = TrainConfig(**{**values, **({"num_workers": 0} if automatic else {})})
    check_device(checked.device)
    return replace(checked, num_workers=auto_workers(trials)) if automatic else checked


def _place(options: Train | Evolve, name: str) -> tuple[Path, str | None]:
    """A run's folder, and the URI of its copy if it is to have one."""
    parent = RUNS if is_uri(options.storage) else options.storage
    run_dir = options.run_dir or Path(parent) / name
    return run_dir, _copy(options.storage, run_dir)


def _copy(storage: str, run: Path) -> str | None:
    """The URI of a run's copy, if storage is a URI."""
    return f"{storage.rstrip('/')}/{run.name}" if is_uri(storage) else None


def _train(options: Train) -> int:
    if options.eval_tasks < 1:
        raise ValueError(f"eval_tasks must be 1 or more, not {options.eval_tasks}.")
    config = _checked(options.config, trials=1)
    name = run_name(config.task, config.algorithm)
    run_dir, mirror = _place(options, name)
    with _progress() as progress:
        bar = progress.add_task(config.task, total=config.iterations, returns="", speed="")

        def show(metrics: dict[str, Any]) -> None:
            if show.steps is None:  # type: ignore[attr-defined]
                _say(f"Run folder: {run_dir}")
            before, after = metrics["return_by_step"][0], metrics["return_by_step"][-1]
            steps = metrics["env_steps"] - show.steps if show.steps is not None else 0  # type: ignore[attr-defined]
            show.steps = metrics["env_steps"]  # type: ignore[attr-defined]
            rate = steps / metrics["seconds"]["total"] / 1000
            speed = f"{rate:.{0 if rate > 10 else 1}f}k steps/s" if steps else ""
            returns = f"return {before:.1f} → {after:.1f}" if config.inner_steps else f"return {after:.1f}"
            progress.update(bar, completed=metrics["iteration"], returns=returns, speed=speed)
            if not console.is_terminal:
                console.print(f"iteration {metrics['iteration']}/{config.iterations}: {returns} {speed}")

        show.steps = None  # type: ignore[attr-defined]
        result = train(config, run_dir, start=options.start, resume=options.resume, on_iteration=show, mirror=mirror)
    summary: dict[str, Any] = {
        "run_dir": str(run_dir),
        "checkpoint": str(result.checkpoint),
        "seconds": result.seconds,
        "interrupted": result.signal is not None,
        "metrics": result.metrics,
    }
    if result.signal is None:
        console.print(f"Evaluating on {options.eval_tasks} held-out tasks …")
        report = evaluate_checkpoint(
            result.checkpoint, num_tasks=options.eval_tasks, seed=config.seed, num_workers=config.num_workers
        ).summary()
        summary["evaluation"] = report
        (run_dir / "evaluation.json").write_text(json.dumps(summary["evaluation"], indent=1))
        console.print(evaluation_table(summary["evaluation"]))
    if (run_dir / "metrics.jsonl").stat().st_size:
        summary["pictures"] = [str(path) for path in plot_run(run_dir, config.task)]
    if mirror:
        Mirror(run_dir, mirror).push()
    _say(f"Checkpoint: {result.checkpoint}")
    for path in summary.get("pictures", []):
        _say(f"Picture: {path}")
    if options.json:
        print(json.dumps(summary))
    if result.signal is not None:
        _say(f"Interrupted; go on with: train --resume --run-dir {shlex.quote(str(run_dir))}")
        return 128 + result.signal
    return 0


def _evolve(options: Evolve) -> int:
    rules = EvolveConfig(**asdict(options.evolution))
    if options.cycles is not None:
        if options.proposals < 1:
            raise ValueError(f"proposals must be 1 or more, not {options.proposals}.")
        rules = replace(rules, population=options.proposals + 1, generations=options.cycles, survivors=1)
    config = _checked(options.config, trials=rules.population)
    name = run_name(config.task, "evolve")
    run_dir, mirror = _place(options, name)
    with PopulationView(run_dir, console):
        result = evolve(config, rules, run_dir, start=options.start, resume=options.resume, mirror=mirror)
    summary = evolution_summary(result)
    if result.checkpoint is not None:
        summary["pictures"] = [str(path) for path in plot_evolution(run_dir, config.task)]
        _say(f"Best checkpoint: {result.checkpoint}")
    for path in summary["pictures"]:
        _say(f"Picture: {path}")
    if result.state["finished"]:
        _say(f"Ended: {result.state['finished']}")
    if options.json:
        print(json.dumps(summary))
    if result.signal is not None:
        _say(f"Interrupted; go on with: evolve --resume --run-dir {shlex.quote(str(run_dir))}")
        return 128 + result.signal
    return 0 if result.state["finished"] == all_generations(result.state["config"]["generations"]) else 1


def _rollback(options: Rollback) -> int:
    request_rollback(options.run, options.checkpoint, _copy(options.storage, options.run))
    _say(f"{options.checkpoint} will be the best and the only parent from the next generation of {options.run} on.")
    return 0


def _evaluate(options: Evaluate) -> int:
    if options.modes:
        report = _compare(options)
        console.print(modes_table(report))
    else:
        report = evaluate_checkpoint(
            options.checkpoint,
            task=options.task,
            task_options=options.task_options,
            task_ranges=options.task_ranges,
            split=options.split,
            num_tasks=options.num_tasks,
            steps=options.steps,
            episodes=options.episodes,
            inner_lr=options.inner_lr,
            seed=options.seed,
            num_workers=options.num_workers,
            deterministic=options.deterministic,
        ).summary()
        console.print(evaluation_table(report))
    if options.json:
        print(json.dumps(report))
    return 0


def _compare(options: Evaluate) -> dict[str, Any]:
    if options.deterministic:
        raise ValueError("--modes compares policies that sample their actions; leave --deterministic out.")
    adapting = AdaptOptions(episodes=options.episodes, step_size=options.inner_lr)
    if options.steps is not None:
        adapting = replace(adapting, steps=options.steps)
    return compare_modes(
        options.checkpoint,
        options.modes,
        options=adapting,
        source=TaskSource(options.task, options.task_options, options.task_ranges, options.split),
        num_tasks=options.num_tasks,
        seed=options.seed,
        num_workers=options.num_workers,
    ).summary()


def _plot(options: Plot) -> int:
    if (options.run / "rsi").is_dir():
        for path in plot_evolution(options.run, read_state(options.run)["trials"][0]["config"]["task"]):
            print(path)
        return 0
    found = checkpoints(options.run) if options.run.is_dir() else []
    title = load_checkpoint(found[-1]).config["task"] if found else options.run.name
    for path in plot_run(options.run, title):
        print(path)
    return 0


def _app(options: App) -> int:
    try:
        import gradio  # noqa: F401
    except ModuleNotFoundError:
        raise ValueError("The web interface needs Gradio: pip install -e '.[app]'") from None
    from ssm_metarl.app.server import serve  # only here: Gradio takes seconds to load

    serve(options.host, options.port, options.storage, options.address, _say)
    return 0


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[returns]}"),
        TextColumn("{task.fields[speed]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def _say(line: str) -> None:
    """A line to stderr as it is: paths may be long and hold brackets."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _complain(error: Exception) -> None:
    console.print(f"error: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True)
