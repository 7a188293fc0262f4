"""The command line: one of `COMMANDS`, by default `train`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import ssm_metarl
from ssm_metarl.cli.console import answer, complain, console, log_said, own_stdout, say
from ssm_metarl.cli.options import (
    COMMANDS,
    Adapt,
    App,
    Compare,
    Evaluate,
    Evolve,
    JobCommand,
    Plot,
    Rollback,
    Run,
    Sweep,
    Train,
)
from ssm_metarl.cli.parsing import Line, parse
from ssm_metarl.distributed.signals import loading
from ssm_metarl.storage.contents import CheckpointError


def main(arguments: Sequence[str] | None = None, *, end: Callable[[int], int] = int) -> int:
    """Run one command; exit code 0, 1 after a failure, 2 for bad input, 128 and its number after a signal.

    Args:
        arguments: of the command line; by default this process's own.
        end: is given the exit code where a signal cut the command short, and returns it or ends the process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["--version"]:
        answer(f"ssm-metarl {ssm_metarl.__version__}")
        return 0
    if not given or (given[0].startswith("-") and given[0] not in ("-h", "--help")):
        given.insert(0, "train")
    if " ".join(given[:2]) in COMMANDS:
        given[:2] = [" ".join(given[:2])]
    _keep_to_ourselves()
    command: list[str] = []
    if given[0] == "job start" and "--" in given:
        given, command = given[: given.index("--")], given[given.index("--") + 1 :]
    try:
        line = _parsed(given)
        with own_stdout(), log_said():
            options = line.options()
            if isinstance(options, App):
                return _app(options)
            if isinstance(options, JobCommand):
                with loading():
                    from ssm_metarl.cli.job import run_job
                return run_job(options, command, console)
            if isinstance(options, Run | Evaluate | Adapt) and options.address:
                os.environ["RAY_ADDRESS"] = options.address
            return _command(options)(options)
    except (ValueError, CheckpointError) as error:
        complain(error)
        return 2
    except KeyboardInterrupt:
        return end(128 + signal.SIGINT)
    except SystemExit as ended:
        if ended.code == signal.SIGTERM:  # from the handler that ray.init leaves behind
            return end(128 + signal.SIGTERM)
        raise
    except _failures() as error:
        complain(error)
        return 1


def _failures() -> tuple[type[Exception], ...]:
    """What ends a command that was asked for rightly; looked up when something has failed, for it loads Ray."""
    from ssm_metarl.distributed.jobs import JobError
    from ssm_metarl.distributed.play import EnvironmentFailure

    return EnvironmentFailure, FloatingPointError, JobError, OSError


def _command(options: Any) -> Callable[[Any], int]:
    """The function that carries out a command."""
    module, _, function = RUN[type(options)].partition(":")
    with loading():
        found: Callable[[Any], int] = getattr(import_module(f"ssm_metarl.cli.{module}"), function)
    return found


def _keep_to_ourselves() -> None:
    """Requests to this machine go to no proxy, whatever the environment says."""
    for name in ("no_proxy", "NO_PROXY"):
        others = [host for host in os.environ.get(name, "").split(",") if host]
        os.environ[name] = ",".join([*others, *(host for host in LOOPBACK if host not in others)])


def _parsed(given: Sequence[str]) -> Line:
    try:
        return parse(given)
    except BrokenPipeError:  # nobody reads the help
        raise SystemExit(128 + signal.SIGPIPE) from None


def _app(options: App) -> int:
    with loading():
        try:
            import gradio  # noqa: F401
        except ModuleNotFoundError:
            raise ValueError("The web interface needs Gradio: pip install 'ssm-metarl[app]'.") from None
        from ssm_metarl.app.server import serve  # only here: Gradio takes seconds to load

    serve(options.host, options.port, options.storage, options.address, say, options.names)
    return 0


LOOPBACK = ("localhost", "127.0.0.1", "::1")

RUN: Mapping[type, str] = {
    Train: "train:run_train",
    Evolve: "evolve:run_evolve",
    Rollback: "evolve:run_rollback",
    Evaluate: "evaluate:run_evaluate",
    Adapt: "adapt:run_adapt",
    Plot: "plot:run_plot",
    Compare: "compare:run_compare",
    Sweep: "sweep:run_sweep",
}
"""Module and function of a command, but for `app` and those of `job`: only what a command needs is loaded, for torch,
Ray Tune and matplotlib take seconds."""
