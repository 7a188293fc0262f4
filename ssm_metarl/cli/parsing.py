"""The only parser of a command line, and the way back to words."""

from __future__ import annotations

import functools
import inspect
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Required, TypedDict, Union, get_type_hints

import tyro
from tyro.constructors import PrimitiveConstructorSpec

import ssm_metarl
from ssm_metarl.algorithms.registry import MetaConfig
from ssm_metarl.checks import no_such
from ssm_metarl.cli.console import RUNS, folded, own_stdout, say
from ssm_metarl.cli.options import COMMANDS, Command, Evolve, Run, Train
from ssm_metarl.config import OPTIONS, TrainConfig, available_cores
from ssm_metarl.distributed.schedule import Schedule
from ssm_metarl.storage.checkpoint import load_checkpoint
from ssm_metarl.storage.documents import CheckpointError
from ssm_metarl.storage.lock import hold
from ssm_metarl.storage.mirror import Mirror, copy_place, local_position
from ssm_metarl.storage.options_file import CONFIG, read_options
from ssm_metarl.storage.run_folder import resolve_checkpoint
from ssm_metarl.storage.run_record import checkpoint_to_resume, read_record
from ssm_metarl.storage.trust import check_task, is_own
from ssm_metarl.storage.uri import is_uri, shown
from ssm_metarl.tasks import names_code
from ssm_metarl.tuning.config import WITHOUT_EFFECT
from ssm_metarl.tuning.store import NOT_COPIED, read_state


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
        if given.get("resume") and given.get("seeds"):
            saved = read_options(self._run() / CONFIG, self.command, option_names(COMMANDS[self.command]))
            self._check_task(self._run(), saved, show)
            return saved
        if given.get("resume"):
            run = self._run()
            evolved = self.command == "evolve"
            found = _of_evolution(run) if evolved else _of_training(run, given.get("resume_from"))
            if given.get("task", found["task"]) != found["task"]:
                raise ValueError(
                    f"The run in {run} is of the task {found['task']}, which --resume does not change: start a new run "
                    f"of {given['task']} with --from {run}."
                )
            self._check_task(self._run(), found, show)
            return found if is_own(self._run(), found["task"]) else _of_this_machine(found)
        if self.command == "train" and (path := given.get("schedule")):
            found = Schedule.read(path).config.to_dict()
            self._check_task(path, found, show)
            return {**_of_this_machine(found), "num_workers": "auto"}
        origin = {name: given[name] for name in ("task", "task_options", "task_ranges", "algorithm") if name in given}
        if start := given.get("start"):
            config = TrainConfig.from_checkpoint(load_checkpoint(resolve_checkpoint(start)).config)
            self._check_task(start, config.to_dict(), show)
            other = origin.get("algorithm", config.meta.algorithm) != config.meta.algorithm
            if self.command == "train" and other and not (show and names_code(config.task)):
                kept = {name: value for name, value in config.to_dict().items() if OPTIONS[name] in ("", "policy")}
                config = TrainConfig.for_task(**{**kept, **origin})
            config = config.replace(**{**_of_this_machine(config.to_dict()), "num_workers": 0, "num_learners": 0})
        else:
            config = TrainConfig.for_task(**{"task": TrainConfig.task, **origin})
        if self.command == "train":
            return {**config.to_dict(), "num_workers": "auto", "device": "auto"}
        # A member is one process on one processor, so that a race fits a laptop.
        single = {"num_workers": 0, "num_learners": 0, "device": "cpu"}
        endless = {"cycles": 0} if given.get("budget") else {}
        return {**config.to_dict(), **single, **endless}

    def _refuse_uris(self) -> None:
        """Refuse a URI where a folder of this machine is meant."""
        for name, instead in _FOLDERS.items():
            value = self.given.get(name)
            if value is not None and is_uri(value):
                option = name.upper() if name == "run" else f"--{name.replace('_', '-')}"
                raise ValueError(f"{option} is a folder of this machine, not {shown(str(value))}: {instead}.")

    def _check_task(self, path: Path | str, found: Mapping[str, Any], show: bool) -> None:
        if not show and "task" not in self.given:
            options = {} if "task_options" in self.given else found.get("task_options")
            trusted = self.given.get("trust_checkpoint_code", False)
            check_task(path, found["task"], options=options, trusted=trusted)

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
    kept = {name: value for name, value in read_record(run).items() if name in ("eval_tasks", "log", "elastic")}
    counted = {"num_workers": "auto"} if kept.get("elastic") else {}  # the cluster may be another one by now
    return {**config.to_dict(), **kept, **counted}


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
        "num_learners": min(options["num_learners"], cores),
        "learner_threads": min(options["learner_threads"], cores),
        "device": device if device == "cpu" else "auto",
    }


def parse(arguments: Sequence[str]) -> Line:
    """Read a command line; it ends the process where the form is wrong, or help is asked for.

    Help shows the chosen task's own defaults, or those of a checkpoint to start from or of a run to resume.
    """
    command, default = arguments[0], dict[str, Any]()
    helps = not {"-h", "--help"}.isdisjoint(arguments)
    if command in COMMANDS and helps:
        with own_stdout():  # environments print
            found = _defaults_for_help(arguments)
        default = {"default": _nested(COMMANDS[command], found, make=False)}
    if command in COMMANDS:  # it alone, so that what is said of a mistake is about it
        kind, prog = COMMANDS[command], f"{program()} {command}"
        described = (inspect.getdoc(kind) or "").partition("\n\nAttributes:")[0]
        with folded() if helps else nullcontext():
            values: Any = tyro.cli(_asked(kind), args=arguments[1:], prog=prog, description=described, **default)
        return _with_file(Line(command, _flat(kind, values)))
    if not command.startswith("-"):
        raise ValueError(f"There is {no_such('command', command, COMMANDS)}")
    commands = [Annotated[_asked(kind), tyro.conf.subcommand(name)] for name, kind in COMMANDS.items()]
    union: Any = Union[tuple(commands)]  # noqa: UP007 (of a list)
    described = (inspect.getdoc(ssm_metarl) or "").partition("\n\n")[0]
    with folded() if helps else nullcontext():
        tyro.cli(union, args=arguments, prog=program(), description=described)
    raise SystemExit(2)


def program() -> str:
    """The program as it was called, for a shell."""
    script = Path(sys.argv[0])
    if script.name == "__main__.py":
        return "python -m ssm_metarl"
    return f"python {shlex.quote(str(script))}" if script.suffix == ".py" else script.name


NOT_SAVED = frozenset(
    ("run_dir", "storage", "address", "trust_checkpoint_code", "resume", "resume_from", "json", "config_file")
) | {"save_config"}
"""Options that say where a run is and how it is watched, not what it does: no file holds them."""


def option_names(kind: Any) -> set[str]:
    """The options of a command that a file may hold."""
    own, parts = _split(kind, frozenset())
    names = {f.name for f in own}
    for _, part, hidden in parts:
        names |= option_names(part) - hidden
    return names - NOT_SAVED


def kept_options(options: Run) -> dict[str, Any]:
    """All options of a run that a file may hold, as `--config` reads them."""
    own = {f.name: getattr(options, f.name) for f in _split(type(options), frozenset())[0]}
    found = {**options.config.to_dict(), **(options.evolution.to_dict() if isinstance(options, Evolve) else {}), **own}
    kept = {name: found[name] for name in found if name in option_names(type(options)) and found[name] is not None}
    return {name: str(value) if isinstance(value, Path) else value for name, value in kept.items()}


def _with_file(line: Line, *, show: bool = False) -> Line:
    """The line with the options of the file that it names, which those that it gives win over."""
    given = dict(line.given)
    path = given.pop("config_file", None)
    if path is None:
        return Line(line.command, given)
    names = set(option_names(COMMANDS[line.command]))
    # Files of evolve named options without effect until version 0.2.
    found = read_options(path, line.command, names | set(WITHOUT_EFFECT if line.command == "evolve" else ()))
    found = {name: value for name, value in found.items() if name in names}
    if "task" in found:
        try:
            trusted = given.get("trust_checkpoint_code", False)
            options = {} if "task_options" in given else found.get("task_options")
            check_task(path, str(found["task"]), options=options, given=given.get("task"), trusted=trusted)
        except CheckpointError:
            if not show:
                raise
            del found["task"]  # nothing of it runs to be shown
    cores, joined = available_cores(), bool(given.get("address", found.get("address")) or os.environ.get("RAY_ADDRESS"))
    for name in ("num_workers", "learner_threads", *(() if joined else ("num_learners",))):
        if isinstance(found.get(name), int) and found[name] > cores:  # of another machine
            del found[name]
    return Line(line.command, {**found, **given})


def _defaults_for_help(arguments: Sequence[str]) -> dict[str, Any]:
    """`Line.defaults` of a command line that asks for help; of the others' options it may be wrong."""
    command, *words = arguments
    if command not in ("train", "evolve"):
        return {}
    hints = {**_hints(MetaConfig), **_hints(TrainConfig), **_hints(Train)}
    names = (
        "config_file",
        "task",
        "task_options",
        "task_ranges",
        "algorithm",
        "start",
        "run_dir",
        "storage",
        "resume",
        "schedule",
    )
    origin = _typed_dict("Origin", {name: hints[name] for name in names}, total=False)
    words = [word for word in words if word not in ("-h", "--help")]
    found, _ = tyro.cli(origin, args=words, return_unknown_args=True)
    given = _flat(Train, found)
    if is_uri(given.get("storage", RUNS)):
        given.pop("resume", None)  # nothing is fetched to be shown
    line = _with_file(Line(command, given), show=True)
    return {**line.defaults(show=True), **line.given}


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


def _number(kind: type, name: str, metavar: str) -> PrimitiveConstructorSpec[Any]:
    """How tyro reads a number, so that a mistake is a sentence."""

    def read(words: list[str]) -> Any:
        try:
            return kind(words[0])
        except ValueError:
            raise ValueError(f"{name} is wanted, not {words[0]!r}") from None

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, int | kind) and not isinstance(value, bool),
        str_from_instance=lambda value: [str(value)],
    )


_WHOLE, _REAL = _number(int, "a whole number", "INT"), _number(float, "a number", "FLOAT")


def _hints(kind: Any) -> dict[str, Any]:
    """Types of a dataclass's fields as tyro is to know them."""
    hints = get_type_hints(kind, include_extras=True)
    mapping = Annotated[Mapping[str, Any], _JSON]
    known: list[tuple[Any, Any]] = [(Mapping[str, Any], mapping), (Mapping[str, Any] | None, mapping | None)]
    known += [(int, Annotated[int, _WHOLE]), (float, Annotated[float, _REAL])]
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
