"""Options of every command, and the only parser."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Required, TypedDict, Union, get_type_hints

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from ssm_metarl.algorithms.registry import MetaConfig
from ssm_metarl.cli.console import RUNS, say
from ssm_metarl.config import OPTIONS, TrainConfig, available_cores
from ssm_metarl.distributed.schedule import Schedule
from ssm_metarl.evaluation.adapt import AdaptOptions, Mode
from ssm_metarl.evaluation.tasks import EvaluationConfig
from ssm_metarl.storage.checkpoint import load_checkpoint
from ssm_metarl.storage.lock import hold
from ssm_metarl.storage.mirror import Mirror, copy_place, local_position
from ssm_metarl.storage.run_folder import resolve_checkpoint
from ssm_metarl.storage.run_record import checkpoint_to_resume, read_record
from ssm_metarl.storage.trust import check_task, is_own
from ssm_metarl.storage.uri import is_uri, shown
from ssm_metarl.tasks import names_code
from ssm_metarl.tuning.config import EvolveConfig
from ssm_metarl.tuning.store import NOT_COPIED, read_state

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

# --- Commands ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Run:
    """The options that train and evolve have in common.

    Attributes:
        config: of the run, or of its first incumbent.
        num_workers: Ray actors that collect rollouts, of each member; 0 collects in process; auto: the free processors
            of the cluster that is joined, or this machine's cores, less one for each learner.
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


@dataclass(frozen=True, kw_only=True)
class Train(Run):
    """Meta-train a policy, evaluate it on held-out tasks and draw the curves.

    Attributes:
        eval_tasks: held-out tasks of the final evaluation.
        schedule: a schedule.json of evolve, or a run that has one: its options at first are the defaults, and change
            before the iterations that it names, which reproduces evolve's incumbent without a population.
        resume_from: the checkpoint of the run to resume from, such as checkpoint_000120, where the newest is damaged;
            later ones are set aside.
    """

    eval_tasks: int = 40
    schedule: Folder | None = None
    resume_from: str | None = None


@dataclass(frozen=True, kw_only=True)
class Evolve(Run):
    """Let a policy improve itself: in short races it is challenged by copies with one option changed.

    With --budget it goes on until the budget is spent, unless --cycles says otherwise.

    Attributes:
        evolution: the rules.
    """

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
        config: which tasks, how and where.
        address: of a Ray cluster to join; by default RAY_ADDRESS, else Ray starts in this process.
        json: print one JSON object.
    """

    checkpoint: tyro.conf.Positional[Place]
    config: EvaluationConfig
    modes: tuple[Mode, ...] = ()
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
    json: bool = False


@dataclass(frozen=True)
class Plot:
    """Draw the learning curve and the adaptation curve of a run into its folder.

    Attributes:
        run: the run's folder.
    """

    run: tyro.conf.Positional[Folder]


@dataclass(frozen=True)
class App:
    """Open the web interface: pretrained models, meta-training, adaptation and self-improvement in a browser.

    Attributes:
        host: address to listen on; whoever reaches it can start work on this machine.
        port: to listen on.
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
Command = Train | Evolve | Rollback | Evaluate | Adapt | Plot | App | JobCommand

COMMANDS: Mapping[str, Any] = {
    "train": Train,
    "evolve": Evolve,
    "evolve rollback": Rollback,
    "evaluate": Evaluate,
    "adapt": Adapt,
    "plot": Plot,
    "app": App,
    "job start": JobStart,
    "job status": JobStatus,
    "job logs": JobLogs,
    "job stop": JobStop,
    "job list": JobList,
    "job shutdown": JobShutdown,
}

# --- Parsing ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A command line that was read, but not carried out: nothing is checked but the form.

    Attributes:
        command: a key of `COMMANDS`.
        given: the options that it gives, by name, those of the parts of a command on one level with its own.
    """

    command: str
    given: Mapping[str, Any]

    def options(self) -> Command:
        """The command with all of its options, checked; a run to resume is fetched from its copy first.

        Raises:
            ValueError: an impossible value, or no run to resume; one sentence.
            CheckpointError: a checkpoint to start from is not there, or damaged.
        """
        self._refuse_uris()
        if self.given.get("resume") and (mirror := copy_of(self.given.get("storage", RUNS), self._run())):
            with hold(self._run()), closing(Mirror(self._run(), mirror, NOT_COPIED)) as copy:
                had, sentence = local_position(self._run()), copy.pull()
                if sentence and local_position(self._run()) != had:
                    say(sentence)
                if not sentence and not had:
                    raise ValueError(f"There is no run to resume, neither in {self._run()} nor at {shown(mirror)}.")
        command: Command = _nested(COMMANDS[self.command], {**self.defaults(), **self.given})
        return command

    def words(self) -> list[str]:
        """The command line again."""
        kind, positional, named = COMMANDS[self.command], list[str](), list[str]()
        required = {f.name for f in fields(kind) if _required(f)}
        for name, value in self.given.items():
            option = "--" + ("from" if name == "start" else name.replace("_", "-"))
            if name in required:
                positional.append(str(value))
            elif isinstance(value, bool):
                named.append(option if value else f"--no-{option[2:]}")
            elif isinstance(value, tuple):
                named += [option, *map(str, value)]
            else:
                named += [option, json.dumps(value) if isinstance(value, Mapping) else str(value)]
        return [*self.command.split(), *positional, *named]

    def defaults(self, *, show: bool = False) -> dict[str, Any]:
        """Options that are not given: the task's own, those of a checkpoint to start from or of a run to resume.

        Args:
            show: they are only shown: no code that a file names is asked for, or run.

        Raises:
            CheckpointError: a checkpoint is damaged, or its task is code that nobody wants.
        """
        given = self.given
        if self.command not in ("train", "evolve"):
            return {}
        if given.get("resume"):
            run = self._run()
            evolved = self.command == "evolve"
            found = _of_evolution(run) if evolved else _of_training(run, given.get("resume_from"))
            if given.get("task", found["task"]) != found["task"]:
                raise ValueError(
                    f"The run in {run} is of the task {found['task']}, which --resume does not change: start a new run "
                    f"of {given['task']} with --from {run}."
                )
            self._check_task(self._run(), found["task"], show)
            return found if is_own(self._run(), found["task"]) else _of_this_machine(found)
        if self.command == "train" and (path := given.get("schedule")):
            found = Schedule.read(path).config.to_dict()
            self._check_task(path, found["task"], show)
            return {**_of_this_machine(found), "num_workers": "auto"}
        origin = {name: given[name] for name in ("task", "task_options", "task_ranges", "algorithm") if name in given}
        if start := given.get("start"):
            config = TrainConfig.from_checkpoint(load_checkpoint(resolve_checkpoint(start)).config)
            self._check_task(start, config.task, show)
            other = origin.get("algorithm", config.meta.algorithm) != config.meta.algorithm
            if self.command == "train" and other and not (show and names_code(config.task)):
                kept = {name: value for name, value in config.to_dict().items() if OPTIONS[name] in ("", "policy")}
                config = TrainConfig.for_task(**{**kept, **origin})
            config = config.replace(**{**_of_this_machine(config.to_dict()), "num_workers": 0})
        else:
            config = TrainConfig.for_task(**{"task": TrainConfig.task, **origin})
        if self.command == "train":
            return {**config.to_dict(), "num_workers": "auto", "device": "auto"}
        # A member is one process on one processor, so that a race fits a laptop.
        single = {"num_workers": 0, "learner_threads": 1, "device": "cpu"}
        endless = {"cycles": 0} if given.get("budget") else {}
        return {**config.to_dict(), **single, **endless}

    def _refuse_uris(self) -> None:
        """Refuse a URI where a folder of this machine is meant."""
        for name, instead in _FOLDERS.items():
            value = self.given.get(name)
            if value is not None and is_uri(value):
                option = name.upper() if name == "run" else f"--{name.replace('_', '-')}"
                raise ValueError(f"{option} is a folder of this machine, not {shown(str(value))}: {instead}.")

    def _check_task(self, path: Path | str, task: str, show: bool) -> None:
        if not show and "task" not in self.given:
            check_task(path, task, trusted=self.given.get("trust_checkpoint_code", False))

    def _run(self) -> Path:
        if self.given.get("run_dir") is None:
            raise ValueError("--resume needs --run-dir, the folder of the run to resume.")
        return Path(self.given["run_dir"])


_FOLDERS = {
    "run_dir": "a copy at a URI is asked for with --storage, its parent",
    "run": "name the folder, or fetch it first",
    "out": "name a folder",
    "schedule": "fetch it first",
}
"""Options that take no URI, and what to do instead."""


def _of_training(run: Path, name: str | None) -> dict[str, Any]:
    """Options of a run of train, as its checkpoint to resume from has them."""
    config = TrainConfig.from_checkpoint(load_checkpoint(checkpoint_to_resume(run, name)).config)
    kept = {name: value for name, value in read_record(run).items() if name == "eval_tasks"}
    return {**config.to_dict(), **kept}


def _of_evolution(run: Path) -> dict[str, Any]:
    """Options of a run of evolve."""
    state = read_state(run)
    return {**TrainConfig.from_checkpoint(state["base"]).to_dict(), **state["config"]}


def _of_this_machine(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, of which those that say where and with how much do not exceed what this machine has: a file from
    elsewhere does not say what is used here.
    """
    cores, device = available_cores(), options["device"]
    return {
        **options,
        "num_workers": options["num_workers"] if options["num_workers"] <= cores else "auto",
        "learner_threads": min(options["learner_threads"], cores),
        "device": device if device == "cpu" else "auto",
    }


def parse(arguments: Sequence[str]) -> Line:
    """Read a command line; it ends the process where the form is wrong, or help is asked for.

    Help shows the chosen task's own defaults, or those of a checkpoint to start from or of a run to resume.
    """
    command, default = arguments[0], dict[str, Any]()
    if command in COMMANDS and {"-h", "--help"}.intersection(arguments):
        default = {"default": _nested(COMMANDS[command], _defaults_for_help(arguments), make=False)}
    commands = [
        Annotated[_asked(kind), tyro.conf.subcommand(name, **(default if name == command else {}))]
        for name, kind in COMMANDS.items()
    ]
    union: Any = Union[tuple(commands)]  # noqa: UP007 (of a list)
    found = tyro.cli(union, args=arguments, prog="run_local.py", description=__doc__)
    return Line(command, _flat(COMMANDS[command], found))


def _defaults_for_help(arguments: Sequence[str]) -> dict[str, Any]:
    """`Line.defaults` of a command line that asks for help; of the others' options it may be wrong."""
    command, *words = arguments
    if command not in ("train", "evolve"):
        return {}
    hints = {**_hints(MetaConfig), **_hints(TrainConfig), **_hints(Train)}
    names = ("task", "task_options", "task_ranges", "algorithm", "start", "run_dir", "storage", "resume", "schedule")
    origin = _typed_dict("Origin", {name: hints[name] for name in names}, total=False)
    words = [word for word in words if word not in ("-h", "--help")]
    found, _ = tyro.cli(origin, args=words, return_unknown_args=True)
    given = _flat(Train, found)
    if is_uri(given.get("storage", RUNS)):
        given.pop("resume", None)  # nothing is fetched to be shown
    return Line(command, given).defaults(show=True)


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


_typed_dict: Any = TypedDict
"""As a function: mypy wants the keys of a TypedDict in the source."""


class _JsonText(str):
    """A mapping on the command line."""


_JSON = PrimitiveConstructorSpec(
    nargs=1,
    metavar="JSON",
    instance_from_str=lambda words: _JsonText(words[0]),
    is_instance=lambda value: isinstance(value, Mapping),
    str_from_instance=lambda value: [json.dumps(value)],
)
"""How tyro reads a mapping: it is checked afterwards, where a mistake becomes one sentence of ours."""


def _hints(kind: Any) -> dict[str, Any]:
    """Types of a dataclass's fields as tyro is to know them."""
    hints = get_type_hints(kind, include_extras=True)
    mapping = Annotated[Mapping[str, Any], _JSON]
    known = [(Mapping[str, Any], mapping), (Mapping[str, Any] | None, mapping | None)]
    return {name: next((own for each, own in known if each == hint), hint) for name, hint in hints.items()}


def _split(kind: Any, without: frozenset[str]) -> tuple[list[Field[Any]], list[tuple[Field[Any], Any, frozenset[str]]]]:
    """The options of a dataclass, and the dataclasses in it, each with the names of options that it is not to have."""
    hints = get_type_hints(kind)
    own = [f for f in fields(kind) if not is_dataclass(hints[f.name]) and f.name not in without]
    taken = without.union(f.name for f in own)
    parts = [f for f in fields(kind) if is_dataclass(hints[f.name])]
    return own, [(f, hints[f.name], taken.union(f.metadata.get("without", ()))) for f in parts]


@functools.cache
def _asked(kind: Any, without: frozenset[str] = frozenset(), aliases: tuple[str, ...] = ()) -> Any:
    """A command as tyro asks for it: a dictionary of what is given, with one for each part.

    Args:
        kind: the dataclass.
        without: options that are left out.
        aliases: an option's name, and another one for it.
    """
    hints, (own, parts), table = _hints(kind), _split(kind, without), dict[str, Any]()
    for f in own:
        hint = hints[f.name]
        table[f.name] = Required[hint] if _required(f) else hint
    if aliases:
        name, other = aliases
        table[name] = Annotated[table[name], tyro.conf.arg(aliases=[other])]
    for f, part, hidden in parts:
        inner = _asked(part, hidden, f.metadata.get("aliases", ()))
        table[f.name] = Annotated[inner, tyro.conf.OmitArgPrefixes]
    asked = _typed_dict(kind.__name__, table, total=False)
    inherited = [inspect.getdoc(base) or "" for base in kind.__mro__[1:] if is_dataclass(base)]
    asked.__doc__ = "\n".join([inspect.getdoc(kind) or "", *(doc.partition("Attributes:\n")[2] for doc in inherited)])
    return asked


def _required(f: Field[Any]) -> bool:
    return f.default is MISSING and f.default_factory is MISSING


def _flat(kind: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """A dictionary as of `_asked` on one level."""
    parts = {f.name: part for f, part, _ in _split(kind, frozenset())[1]}
    flat = {
        name: json_object(value) if isinstance(value, _JsonText) else value
        for name, value in values.items()
        if name not in parts
    }
    for name, part in parts.items():
        flat |= _flat(part, values.get(name, {}))
    return flat


def _nested(kind: Any, values: Mapping[str, Any], without: frozenset[str] = frozenset(), make: bool = True) -> Any:
    """A dataclass of the values and its defaults, or a dictionary of both as `_asked` takes for its default.

    Args:
        kind: the dataclass.
        values: on one level; a list stands for a tuple.
        without: options that keep their defaults, and that the dictionary does not have.
        make: the dataclass, not the dictionary.
    """
    own, parts = _split(kind, without)
    found = {f.name: values[f.name] for f in own if f.name in values}
    found = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
    found |= {f.name: _nested(part, values, hidden, make) for f, part, hidden in parts}
    if make:
        return kind(**found)
    defaults = {f.name: f.default for f in own if f.default is not MISSING}
    made = {f.name: f.default_factory() for f in own if f.default_factory is not MISSING}
    return {**defaults, **made, **found}


def copy_of(storage: str, run: Path) -> str | None:
    """The URI of a run's copy, if storage is a URI."""
    return copy_place(storage, run.resolve().name)
