"""`sweep`: a search over options with Ray Tune."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ssm_metarl.checks import brief, no_such
from ssm_metarl.cli.console import answer, console, say
from ssm_metarl.cli.job import run_name
from ssm_metarl.cli.options import Sweep, Train
from ssm_metarl.cli.parsing import Line, option_names
from ssm_metarl.cli.tables import COMPACT, decimals
from ssm_metarl.config import OPTIONS, TrainConfig
from ssm_metarl.distributed.cluster import start_ray
from ssm_metarl.distributed.ray_shim import trial_levels
from ssm_metarl.storage.options_file import read_options, save_options
from ssm_metarl.storage.trust import check_task

if TYPE_CHECKING:
    from ray.tune import Result, ResultGrid

METRIC, SCOPE = "return_after", "last-5-avg"
"""What is searched for: the mean over the last five iterations."""

KINDS = ("uniform", "loguniform", "quniform", "qloguniform", "randint", "lograndint", "choice", "grid_search")
"""Functions of `ray.tune` that a search space may name."""

SHOWN = 10
"""Trials in the table."""


def run_sweep(options: Sweep) -> int:
    """Carry out `sweep`; returns the exit code."""
    given, space = sweep_file(options.file)
    given = {"num_workers": 0, "num_learners": 0, "learner_threads": 1, "device": "cpu", **given}
    command = Line("train", given).options()
    assert isinstance(command, Train)
    base = command.config
    param_space = {name: domain(name, spec) for name, spec in space.items()}
    base.family()
    folder = Path(options.run_dir or Path(options.storage) / run_name(base.task, "sweep"))
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty.")
    say(f"Run folder: {folder}")
    results = _fit(options, base, param_space, folder)
    best = results.get_best_result(METRIC, "max", SCOPE) if any(not each.error for each in results) else None
    if best is None or best.config is None or best.metrics is None:
        say("No trial was finished.")
        return 1
    found = {name: best.config[name] for name in space}
    console.print(trials_table(results, trial_levels(results, METRIC, SCOPE), list(space)))
    kept = TrainConfig.from_dict({**base.to_dict(), **found})
    save_options(folder / "best.yaml", "train", {**kept.to_dict(), "num_workers": "auto", "device": "auto"})
    say(f"The best options, for train --config: {folder / 'best.yaml'}")
    if options.json:
        summary = {"run_dir": str(folder), "trials": len(results), "best": found, METRIC: best.metrics[METRIC]}
        answer(json.dumps(summary))
    return 0


def sweep_file(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A search's options of train, and the space of those to search over.

    Raises:
        ValueError: the file is damaged, has no space, or names an option that there is not; one sentence.
        CheckpointError: its task is code, which a file does not start.
    """
    names = option_names(Train)
    found = read_options(path, "train", {*names, SPACE})
    space = found.pop(SPACE, None)
    if not isinstance(space, Mapping) or not space:
        raise ValueError(f"{path} has no {SPACE}: the options to search over.")
    for name in space:
        if name not in SEARCHED:
            raise ValueError(f"{path}: there is {no_such('option to search over', str(name), SEARCHED)}")
    check_task(path, str(found.get("task", TrainConfig.task)), options=found.get("task_options"))
    return found, dict(space)


SPACE = "space"
"""Entry of a search's file."""

SEARCHED = [name for name, part in OPTIONS.items() if part != "machine" and name != "task"]
"""Options that may be searched over: not what code runs, and not where."""


def domain(name: str, spec: Any) -> Any:
    """What Tune draws an option from.

    Args:
        name: of the option.
        spec: values to choose from, or a function of `ray.tune` with its arguments: {"loguniform": [1e-4, 1e-2]}.

    Raises:
        ValueError: it is neither; one sentence.
    """
    from ray import tune  # only here: it takes seconds to load

    if isinstance(spec, list | tuple) and spec:
        return tune.choice(list(spec))
    if not isinstance(spec, Mapping) or len(spec) != 1:
        raise ValueError(
            f"The space of {name} must be a list of values, or one of {', '.join(KINDS)} with its arguments, not "
            f"{brief(spec)}."
        )
    ((kind, arguments),) = spec.items()
    if kind not in KINDS:
        raise ValueError(f"The space of {name}: there is {no_such('function', str(kind), KINDS)}")
    values = list(arguments) if isinstance(arguments, list | tuple) else [arguments]
    try:
        return getattr(tune, kind)(values) if kind in ("choice", "grid_search") else getattr(tune, kind)(*values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"The space of {name}, {kind}: {str(error).splitlines()[0]}") from None


def _fit(options: Sweep, base: TrainConfig, space: Mapping[str, Any], folder: Path) -> ResultGrid:
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search import BasicVariantGenerator

    from ssm_metarl.distributed.trainer import MetaTrainer

    iterations = base.experience.iterations
    scheduler = None
    if options.scheduler == "asha":
        scheduler = ASHAScheduler(max_t=iterations, grace_period=max(iterations // 9, 1), reduction_factor=3)
    searcher: Any = BasicVariantGenerator(random_state=base.experience.seed)
    if options.search == "optuna":
        try:
            from ray.tune.search.optuna import OptunaSearch

            searcher = OptunaSearch(seed=base.experience.seed)
        except (ImportError, AssertionError):
            raise ValueError("--search optuna needs a package: pip install 'ssm-metarl[tune]'.") from None
    start_ray(base.machine.num_workers, base.machine.num_learners, always=True)
    return tune.Tuner(
        MetaTrainer,
        param_space={**base.to_dict(), **space},
        tune_config=tune.TuneConfig(
            metric=METRIC, mode="max", num_samples=options.samples, scheduler=scheduler, search_alg=searcher
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(folder.resolve()),
            stop={"training_iteration": iterations},
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=True, num_to_keep=1),
            verbose=1 if console.is_terminal else 0,
        ),
    ).fit()


def trials_table(results: Iterable[Result], levels: Sequence[float], names: Sequence[str]) -> Table:
    """The best trials, the best one first: return, iterations, and the options that were searched over.

    Args:
        results: of all trials.
        levels: what trials are compared by, see `SCOPE`; NaN where a trial has reported nothing.
        names: of the options.
    """
    table = Table(title=f"{len(levels)} trials, the best {min(len(levels), SHOWN)} of them", **COMPACT)
    table.caption = "return: after adaptation, mean of the last five iterations"
    for column in ("return", "iterations"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("options", overflow="fold")
    rows = [(value, each) for value, each in zip(levels, results, strict=True) if math.isfinite(value)]
    digits = decimals(*(value for value, _ in rows))
    for value, each in sorted(rows, key=lambda row: -row[0])[:SHOWN]:
        metrics, config = each.metrics or {}, each.config or {}
        values = [f"{config[name]:.3g}" if isinstance(config[name], float) else str(config[name]) for name in names]
        words = " · ".join(f"{name} {value}" for name, value in zip(names, values))
        table.add_row(f"{value:.{digits}f}", str(metrics["training_iteration"]), words)
    return table
