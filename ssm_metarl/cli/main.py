"""The command line: `train` (the default), `evolve`, `evaluate`, `adapt`, `plot`, `job` and `app`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict

from ssm_metarl.cli.adapt import run_adapt
from ssm_metarl.cli.console import RUNS, console, say
from ssm_metarl.cli.evaluate import run_evaluate
from ssm_metarl.cli.evolve import run_evolve, run_rollback
from ssm_metarl.cli.job import run_job
from ssm_metarl.cli.options import (
    COMMANDS,
    Adapt,
    App,
    Evaluate,
    Evolve,
    JobCommand,
    Rollback,
    Train,
    parse,
)
from ssm_metarl.cli.plot import run_plot
from ssm_metarl.cli.train import run_train
from ssm_metarl.config import TrainConfig
from ssm_metarl.distributed.collection import EnvironmentFailure
from ssm_metarl.distributed.jobs import JobError
from ssm_metarl.storage.contents import CheckpointError
from ssm_metarl.tuning.evolve import EvolutionFailure
from ssm_metarl.tuning.population import EvolveConfig


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
        options = parse(given)
        if isinstance(options, JobCommand):
            check_command(command)
            return run_job(options, command, console)
        if isinstance(options, Train | Evolve | Evaluate | Adapt) and options.address:
            os.environ["RAY_ADDRESS"] = options.address
        if isinstance(options, Train):
            return run_train(options)
        if isinstance(options, Evaluate):
            return run_evaluate(options)
        if isinstance(options, Adapt):
            return run_adapt(options, console, RUNS)
        if isinstance(options, Evolve):
            return run_evolve(options)
        if isinstance(options, Rollback):
            return run_rollback(options)
        if isinstance(options, App):
            return _app(options)
        return run_plot(options)
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


def check_command(command: Sequence[str]) -> None:
    """Refuse a job's command that would be refused when it runs; what only the cluster knows is not looked at."""
    if not command:
        return
    if command[0] not in ("train", "evolve", "evaluate"):
        raise ValueError(f"A job can train, evolve or evaluate, not {command[0]!r}.")
    if "--resume" not in command and not any(word.startswith("--from") for word in command):
        options = parse(command)
        if isinstance(options, Train | Evolve):
            TrainConfig(**{**asdict(options.config), "num_workers": 0})
        if isinstance(options, Evolve):
            EvolveConfig(**asdict(options.evolution))


def _app(options: App) -> int:
    try:
        import gradio  # noqa: F401
    except ModuleNotFoundError:
        raise ValueError("The web interface needs Gradio: pip install -e '.[app]'") from None
    from ssm_metarl.app.server import serve  # only here: Gradio takes seconds to load

    serve(options.host, options.port, options.storage, options.address, say)
    return 0


def _complain(error: Exception) -> None:
    console.print(f"error: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True)
