"""`plot`."""

from __future__ import annotations

from ssm_metarl.cli.console import answer
from ssm_metarl.cli.options import Plot
from ssm_metarl.cli.plots import plot_evolution, plot_run
from ssm_metarl.config import TrainConfig
from ssm_metarl.storage.checkpoint import load_checkpoint
from ssm_metarl.storage.run_folder import checkpoints
from ssm_metarl.tuning.store import read_state


def run_plot(options: Plot) -> int:
    """Carry out `plot`; returns the exit code."""
    if (options.run / "rsi").is_dir():
        for path in plot_evolution(options.run, read_state(options.run)["base"]["task"]):
            answer(str(path))
        return 0
    found = checkpoints(options.run) if options.run.is_dir() else []
    title = TrainConfig.from_checkpoint(load_checkpoint(found[-1]).config).task if found else options.run.name
    for path in plot_run(options.run, title):
        answer(str(path))
    return 0
