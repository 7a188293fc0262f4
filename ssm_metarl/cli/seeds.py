"""`train --seeds`: the same run with several seeds, side by side where there are processors for it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ssm_metarl.cli.compare import show_groups
from ssm_metarl.cli.console import answer, console, progress_bar, say
from ssm_metarl.cli.options import Train
from ssm_metarl.cli.parsing import kept_options
from ssm_metarl.cli.train import resume_words
from ssm_metarl.config import available_cores
from ssm_metarl.distributed.signals import interrupts
from ssm_metarl.evaluation.groups import read_group
from ssm_metarl.storage.options_file import CONFIG, save_options
from ssm_metarl.storage.run_folder import checkpoints
from ssm_metarl.storage.run_log import EVALUATION, METRICS


def run_seeds(options: Train, folder: Path) -> int:
    """Train with every seed in a folder of its own, then report on all; returns the exit code.

    Args:
        options: of the runs; `seeds` has no seed twice.
        folder: parent of the runs, new or empty unless they are resumed.
    """
    if len(set(options.seeds)) < len(options.seeds) or min(options.seeds) < 0:
        raise ValueError(
            f"seeds must be whole numbers of 0 or more, none twice, not {' '.join(map(str, options.seeds))}."
        )
    if not options.resume and folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: --resume goes on with the runs in it.")
    folder.mkdir(parents=True, exist_ok=True)
    save_options(
        folder / CONFIG, "train", {k: v for k, v in kept_options(options).items() if k not in ("seed", "seeds")}
    )
    say(f"Run folders: {folder}")
    number = 0 if options.num_workers == "auto" else options.num_workers
    assert isinstance(number, int)
    together = max(available_cores() // (1 + number + options.config.machine.num_learners), 1)
    waiting, running, codes = list(options.seeds), dict[int, subprocess.Popen[bytes]](), dict[int, int]()
    with progress_bar() as progress, interrupts("The iterations are being finished") as interrupted:
        total = options.config.experience.iterations
        begun = {seed: _iterations(folder / f"seed-{seed}") for seed in options.seeds}  # where they are resumed
        bars = {s: progress.add_task(f"seed {s}", start=False, total=total, completed=begun[s]) for s in options.seeds}
        told = False
        while running or (waiting and not interrupted):
            while waiting and len(running) < together and not interrupted:
                seed = waiting.pop(0)
                running[seed] = _start(options, folder / f"seed-{seed}", seed, number)
                progress.start_task(bars[seed])
            time.sleep(0.3)
            if interrupted and not told:
                told = True
                for process in running.values():
                    process.send_signal(signal.SIGTERM)
            for seed, process in list(running.items()):
                progress.update(bars[seed], completed=_iterations(folder / f"seed-{seed}"))
                if (code := process.poll()) is not None:
                    codes[seed] = code
                    if not console.is_terminal:
                        say(f"seed {seed}: {_iterations(folder / f'seed-{seed}')} of {total} iterations")
                    del running[seed]
    return _end(options, folder, codes, interrupted[0] if interrupted else None)


def _start(options: Train, run: Path, seed: int, num_workers: int) -> subprocess.Popen[bytes]:
    words = ["train", "--config", str(run.parent / CONFIG), "--seed", str(seed), "--run-dir", str(run)]
    words += ["--task", options.config.task, "--num-workers", str(num_workers)]
    words += ["--learner-threads", "1"] if not num_workers else []
    words += ["--address", options.address] if options.address else []
    words += ["--resume"] if options.resume and run.is_dir() and checkpoints(run) else []
    with (run.parent / f"seed-{seed}.log").open("ab") as log:
        # In a session of its own: Ctrl-C at the terminal is passed on once, by this process.
        return subprocess.Popen(
            [sys.executable, "-m", "ssm_metarl", *words], stdout=log, stderr=log, start_new_session=True
        )


def _iterations(run: Path) -> int:
    try:
        return (run / METRICS).read_bytes().count(b"\n")
    except OSError:
        return 0


def _end(options: Train, folder: Path, codes: dict[int, int], number: int | None) -> int:
    """Report on the runs that were evaluated."""
    summary: dict[str, Any] = {"run_dir": str(folder), "exit_codes": codes, "interrupted": number is not None}
    failed = {seed: code for seed, code in codes.items() if code and number is None}
    for seed, code in failed.items():
        say(f"Seed {seed} ended with {code}; see {folder / f'seed-{seed}.log'}.")
    if any((folder / f"seed-{seed}" / EVALUATION).is_file() for seed in options.seeds):
        summary["comparison"] = show_groups([read_group(str(folder))], folder / "report.html")
    if options.json:
        answer(json.dumps(summary))
    if number is not None:
        words = resume_words("train", folder, None, options.storage)
        say(f"Interrupted; resume with: {words} --seeds {' '.join(map(str, options.seeds))}")
        return 128 + number
    return 1 if failed else 0
