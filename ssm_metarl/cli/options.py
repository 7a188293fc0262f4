"""Options of every command."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from ssm_metarl.cli.console import RUNS
from ssm_metarl.config import TrainConfig
from ssm_metarl.evaluation.config import AdaptOptions, EvaluationConfig, Mode
from ssm_metarl.storage.uri import is_uri
from ssm_metarl.tuning.config import WITHOUT_EFFECT, EvolveConfig

_PLACE = PrimitiveConstructorSpec(
    nargs=1,
    metavar="PATH",
    instance_from_str=lambda words: words[0] if is_uri(words[0]) else Path(words[0]),
    is_instance=lambda value: isinstance(value, Path | str),
    str_from_instance=lambda value: [str(value)],
)
Place = Annotated[Path | str, _PLACE]
"""A path, or a URI as text: as a path it would lose a slash."""

Folder = Annotated[Path, _PLACE]
"""A path; `Line.options` refuses a URI."""


def check_gif(path: Path | None) -> None:
    """Refuse, with ValueError, a --video of another kind."""
    if path is not None and path.suffix.lower() != ".gif":
        raise ValueError(f"--video writes an animated GIF: name it .gif, not {path.name!r}.")


@dataclass(frozen=True, kw_only=True)
class Run:
    """The options that train and evolve have in common.

    Attributes:
        config: of the run, or of its first incumbent.
        num_workers: Ray actors that collect rollouts, of each member; 0 collects in process; auto: of the cluster that
            is joined, the free processors less one for each trainer and learner; without one train takes as many as
            this machine has cores, and evolve none.
        start: a checkpoint, a run for its best one, either one's URI, or pretrained:NAME, whose weights the run begins
            with; its task, policy and, for the same algorithm, all other options are the defaults.
        run_dir: folder of the run; by default a new one in --storage.
        storage: parent of the run folders, on a cluster a path that its machines share; or a URI such as
            s3://bucket/runs, where they are copied with every checkpoint or decision and resumed from.
        address: of a Ray cluster to join, such as auto; by default RAY_ADDRESS, else Ray starts in this process.
        trust_checkpoint_code: run the code that the checkpoint or run names as its task, though --task does not; a run
            that was started here needs no such word.
        resume: resume from the last checkpoint or decision in --run-dir, with the options it was started with unless
            given anew.
        json: print the final summary as one JSON object.
        config_file: options from a .toml, .yaml or .json file, such as the config.yaml of a run; what is given beside
            it wins.
        save_config: write all options into a .yaml or .json file, and do nothing else.
    """

    config: TrainConfig
    num_workers: int | Literal["auto"] = "auto"
    start: Annotated[Place | None, tyro.conf.arg(name="from")] = None
    run_dir: Folder | None = None
    storage: str = RUNS
    address: str | None = None
    trust_checkpoint_code: bool = False
    resume: bool = False
    json: bool = False
    config_file: Annotated[Folder | None, tyro.conf.arg(name="config")] = None
    save_config: Folder | None = None


@dataclass(frozen=True, kw_only=True)
class Train(Run):
    """Meta-train a policy, evaluate it on held-out tasks and draw the curves.

    Attributes:
        eval_tasks: held-out tasks of the final evaluation.
        log: where metrics go beside metrics.jsonl; wandb and mlflow follow their own environment variables, such as
            WANDB_MODE=offline or MLFLOW_TRACKING_URI.
        seeds: seeds of several runs in a folder each, side by side where there are processors, with their statistics at
            the end.
        schedule: a schedule.json of evolve, or a run that has one: its options at first are the defaults, and change
            before the iterations that it names, which reproduces evolve's incumbent without a population.
        resume_from: the checkpoint of the run to resume from, such as checkpoint_000120, where the newest is damaged;
            later ones are set aside.
        elastic: between iterations, start a worker for each processor that has joined the cluster and end one for each
            that has left; the run's numbers do not depend on it.
    """

    eval_tasks: int = 40
    log: tuple[Literal["tensorboard", "csv", "wandb", "mlflow"], ...] = ("tensorboard",)
    seeds: tuple[int, ...] = ()
    schedule: Folder | None = None
    resume_from: str | None = None
    elastic: bool = False


@dataclass(frozen=True, kw_only=True)
class Evolve(Run):
    """Let a policy improve itself: in short races it is challenged by copies with one option changed.

    With --budget it goes on until the budget is spent, unless --cycles says otherwise.

    Attributes:
        evolution: the rules.
    """

    config: TrainConfig = field(metadata={"without": WITHOUT_EFFECT})
    evolution: EvolveConfig


@dataclass(frozen=True)
class Rollback:
    """Make a kept checkpoint the incumbent of a self-improving run again.

    Attributes:
        run: the run's folder, of a run that is running or will be resumed.
        checkpoint: name of a folder in its rsi/checkpoints.
        storage: the URI that was given to evolve, if one was.
    """

    run: tyro.conf.Positional[Folder]
    checkpoint: tyro.conf.Positional[str]
    storage: str = RUNS


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Evaluate a checkpoint on held-out tasks before adaptation and after 1..steps inner steps.

    With --modes, ways of adapting are compared instead, each with the episodes given and judged on fresh ones.

    Attributes:
        checkpoint: a checkpoint's folder, a run's for its best checkpoint, either one's URI, or pretrained:NAME.
        modes: of adaptation (see adapt); the others are compared with the first.
        video: an animated GIF of the first of the tasks before and after adaptation, where its environment renders.
        config: which tasks, how and where.
        address: of a Ray cluster to join; by default RAY_ADDRESS, else Ray starts in this process.
        json: print one JSON object.
    """

    checkpoint: tyro.conf.Positional[Place]
    config: EvaluationConfig
    modes: tuple[Mode, ...] = ()
    video: Folder | None = None
    address: str | None = None
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class Adapt:
    """Adapt a policy to one task with a few episodes, and play it before and after.

    Into --out go adaptation.json, the adaptation curve as a picture, trajectories (navigation-2d) or an animation
    (cartpole) before and after, and the adapted policy as a checkpoint, policy/.

    Attributes:
        checkpoint: a checkpoint's folder, a run's for its best checkpoint, either one's URI, or pretrained:NAME.
        params: the task's parameters, such as '{"direction": -1}'; the others are as in a task drawn from --split.
        mode: none, standard (this task's episodes), hybrid (and replayed ones, by propensity), or replay (any replayed
            ones, the control).
        config: where the task comes from, steps and episodes.
        adaptation: what the mode has beside.
        address: of a Ray cluster to join; by default RAY_ADDRESS, else Ray starts in this process.
        out: folder of the results, new or empty; by default a new one in runs.
        video: an animated GIF before and after, where the environment renders.
        json: print one JSON object.
    """

    checkpoint: tyro.conf.Positional[Place]
    config: EvaluationConfig = field(
        metadata={"without": ("num_tasks", "deterministic"), "aliases": ("inner_lr", "--step-size")}
    )
    adaptation: AdaptOptions
    params: Mapping[str, Any] = field(default_factory=dict)
    mode: Mode = "standard"
    address: str | None = None
    out: Folder | None = None
    video: Folder | None = None
    json: bool = False


@dataclass(frozen=True)
class Plot:
    """Draw the learning curve and the adaptation curve of a run into its folder.

    Attributes:
        run: the run's folder.
    """

    run: tyro.conf.Positional[Folder]


@dataclass(frozen=True)
class Compare:
    """Compare runs that were evaluated, with the statistics of rliable (Agarwal et al. 2021).

    A group is a run, or a folder of runs that differ in the seed. For each there are the interquartile mean and the
    mean with intervals over runs, and the chance of doing better than the first group.

    Attributes:
        runs: folders of runs, or of several runs each; NAME=FOLDER names a group.
        out: a page with the pictures, too: aggregates, sample efficiency, performance profile.
        json: print one JSON object.
    """

    runs: tyro.conf.Positional[tuple[str, ...]]
    out: Folder | None = None
    json: bool = False


@dataclass(frozen=True)
class Sweep:
    """Search over options with Ray Tune, each trial on one processor.

    The file holds options of train, and under `space` those to search over, such as

        space: {outer_lr: {loguniform: [1e-4, 1e-2]}, epochs: [1, 2, 5]}

    with the functions of ray.tune. The best options are written to best.yaml, for train --config.

    Attributes:
        file: .toml, .yaml or .json.
        samples: trials; of a grid, times each of its points.
        search: how the next trial is chosen.
        scheduler: asha stops trials that are behind.
        run_dir: folder of the search; by default a new one in --storage.
        storage: parent of the run folders.
        json: print one JSON object.
    """

    file: tyro.conf.Positional[Folder]
    samples: int = 10
    search: Literal["random", "optuna"] = "random"
    scheduler: Literal["none", "asha"] = "none"
    run_dir: Folder | None = None
    storage: str = RUNS
    json: bool = False


@dataclass(frozen=True)
class App:
    """Open the web interface: pretrained models, meta-training, adaptation and self-improvement in a browser.

    Attributes:
        host: address to listen on; whoever reaches it can start work on this machine.
        port: to listen on; 0: a free one.
        storage: parent of the run folders; the page reads and writes nothing else.
        address: of the job server of a cluster, such as http://head:8265; by default RAY_API_SERVER_ADDRESS,
            RAY_ADDRESS, or a head of this machine, started with the first job.
        names: other names by which a browser may ask for the page, such as that of a proxy; whoever asks for any name
            but this machine's own is refused.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    storage: Path = Path(RUNS)
    address: str | None = None
    names: tuple[str, ...] = ()


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
Command = Train | Evolve | Rollback | Evaluate | Adapt | Plot | Compare | Sweep | App | JobCommand

COMMANDS: Mapping[str, Any] = {
    "train": Train,
    "evolve": Evolve,
    "evolve rollback": Rollback,
    "evaluate": Evaluate,
    "adapt": Adapt,
    "plot": Plot,
    "compare": Compare,
    "sweep": Sweep,
    "app": App,
    "job start": JobStart,
    "job status": JobStatus,
    "job logs": JobLogs,
    "job stop": JobStop,
    "job list": JobList,
    "job shutdown": JobShutdown,
}
