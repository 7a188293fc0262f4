"""`train`."""

from __future__ import annotations

import json
import re
import shlex
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from ssm_metarl.cli.console import RUNS, answer, console, progress_bar, say
from ssm_metarl.cli.job import run_name
from ssm_metarl.cli.options import Run, Train
from ssm_metarl.cli.parsing import copy_of, kept_options, program
from ssm_metarl.cli.plots import plot_run
from ssm_metarl.cli.tables import change_words, evaluation_table, number_words
from ssm_metarl.config import TrainConfig
from ssm_metarl.distributed.cluster import auto_workers, left_workers
from ssm_metarl.distributed.learner import check_device
from ssm_metarl.distributed.loggers import Board
from ssm_metarl.distributed.train import TrainResult, train
from ssm_metarl.evaluation.evaluate import evaluate_checkpoint
from ssm_metarl.storage.lock import hold
from ssm_metarl.storage.options_file import CONFIG, save_options
from ssm_metarl.storage.run_copy import WAIT, WAIT_INTERRUPTED, RunCopy
from ssm_metarl.storage.run_folder import checkpoints
from ssm_metarl.storage.run_record import read_record, write_record
from ssm_metarl.storage.trust import remember
from ssm_metarl.storage.uri import is_uri, shown


def checked_config(options: Run, trials: int) -> TrainConfig:
    """The options of a run; the workers of "auto" are counted last, for Ray may have to be started for that."""
    options.config.family()  # refuses an unknown task, or impossible options of one
    check_device(options.config.machine.device, options.config.machine.num_learners)
    automatic, learners = options.num_workers == "auto", options.config.machine.num_learners
    return options.config.replace(num_workers=auto_workers(trials, learners) if automatic else options.num_workers)


def run_place(options: Run, name: str) -> tuple[Path, str | None]:
    """A run's folder, and the URI of its copy if it is to have one."""
    parent = RUNS if is_uri(options.storage) else options.storage
    run_dir = Path(options.run_dir or Path(parent) / name)
    if options.resume or not (run_dir.is_dir() and any(run_dir.iterdir())):
        remember(run_dir, options.config.task)
    mirror = copy_of(options.storage, run_dir)
    if options.resume and mirror is None and (place := read_record(run_dir).get("copy")):
        say(f"The copy of this run at {place} stays as it is: --storage, its parent, would bring it up to date.")
    return run_dir, mirror


def copy_end(copy: RunCopy | None, summary: dict[str, Any], interrupted: bool) -> bool:
    """Wait for a run's copy to catch up, for a stated time at most, and enter in the summary how it stands.

    Returns:
        Whether it is complete; True where there is none.
    """
    if copy is None:
        return True
    copy.update()
    complete = copy.close(WAIT_INTERRUPTED if interrupted else WAIT)
    summary["copy"] = copy.summary()
    return complete


def resume_words(command: str, run_dir: Path, copy: RunCopy | None, storage: str) -> str:
    """The command that goes on with a run."""
    where = f" --storage {shlex.quote(shown(storage))}" if copy else ""
    return f"{program()} {command} --resume --run-dir {shlex.quote(str(run_dir))}{where}"


def saved_options(options: Run, command: str) -> bool:
    """Write the options into the file that is asked for, if one is; returns whether one was."""
    if options.save_config is None:
        return False
    options.config.family()
    save_options(options.save_config, command, kept_options(options))
    say(f"Options: {options.save_config}")
    return True


def run_train(options: Train) -> int:
    """Carry out `train`; returns the exit code."""
    if saved_options(options, "train"):
        return 0
    if options.eval_tasks < 1:
        raise ValueError(f"eval_tasks must be 1 or more, not {options.eval_tasks}.")
    name = run_name(options.config.task, options.config.meta.algorithm)
    if options.seeds:
        from ssm_metarl.cli.seeds import run_seeds  # only here: it draws

        options.config.family()
        if is_uri(options.storage):
            raise ValueError("Runs of --seeds are not copied: --storage must be a folder.")
        if options.elastic:
            raise ValueError("Runs of --seeds share this machine's processors: --elastic is for a run alone.")
        return run_seeds(options, Path(options.run_dir or Path(options.storage) / name))
    config = checked_config(options, trials=1)
    run_dir, mirror = run_place(options, name)
    if options.resume_from and not options.resume:
        raise ValueError("--resume-from names the checkpoint that --resume goes on from.")
    with ExitStack() as stack:
        copy = stack.enter_context(RunCopy(run_dir, mirror, say=say)) if mirror else None
        return _run_train(options, config, run_dir, copy, stack)


def resumed_at(options: Train, run_dir: Path) -> int:
    """Iterations that a run has had, as far as its folder tells before it is opened."""
    if not options.resume or not run_dir.is_dir():
        return 0
    names = [options.resume_from or "", *(path.name for path in reversed(checkpoints(run_dir)))]
    return next((int(found[1]) for name in names if (found := re.search(r"checkpoint_(\d+)", name))), 0)


def _run_train(options: Train, config: TrainConfig, run_dir: Path, copy: RunCopy | None, held: ExitStack) -> int:
    with progress_bar("returns", "speed") as progress:
        total, done = config.experience.iterations, resumed_at(options, run_dir)
        bar = progress.add_task(config.task, total=total, completed=done, returns="", speed="")

        def begin() -> None:
            held.enter_context(hold(run_dir))  # until the evaluation is written
            write_record(run_dir, eval_tasks=options.eval_tasks, log=list(options.log), elastic=options.elastic)
            if not options.resume:
                save_options(run_dir / CONFIG, "train", kept_options(options))
            say(f"Run folder: {run_dir}")

        def show(metrics: dict[str, Any]) -> None:
            if show.steps is None and done < metrics["iteration"] - 1:  # type: ignore[attr-defined]
                # Fetched meanwhile; it says nothing of the pace.
                progress.reset(bar, completed=metrics["iteration"] - 1)
            before, after = metrics["return_by_step"][0], metrics["return_by_step"][-1]
            steps = metrics["env_steps"] - show.steps if show.steps is not None else 0  # type: ignore[attr-defined]
            show.steps = metrics["env_steps"]  # type: ignore[attr-defined]
            rate = steps / metrics["seconds"]["total"] / 1000
            speed = f"{rate:.{0 if rate > 10 else 1}f}k steps/s" if steps else ""
            returns = f"return {change_words(before, after) if config.meta.inner_steps else number_words(after)}"
            if restarts := metrics.get("restarts"):
                speed += f" · {restarts} worker{'s' * (restarts > 1)} restarted"
            progress.update(bar, completed=metrics["iteration"], returns=returns, speed=speed)
            if not console.is_terminal:
                console.print(f"iteration {metrics['iteration']}/{total}: {returns} {speed}".rstrip())

        show.steps = None  # type: ignore[attr-defined]
        result = train(
            config,
            run_dir,
            start=options.start,
            resume=options.resume,
            on_start=begin,
            on_iteration=show,
            mirror=copy,
            schedule=options.schedule,
            resume_from=options.resume_from,
            loggers=options.log,
            elastic=options.elastic,
        )
    summary: dict[str, Any] = {
        "run_dir": str(run_dir),
        "checkpoint": str(result.checkpoint),
        "seconds": result.seconds,
        "interrupted": result.signal is not None,
        "metrics": result.metrics,
    }
    held.enter_context(hold(run_dir))
    if result.signal is None and not result.metrics:
        count = config.experience.iterations
        say(f"Nothing is left to train: the run has its {count} iterations; --iterations N asks for more.")
    summary |= _results(options, config, result)
    complete = copy_end(copy, summary, result.signal is not None)
    say(f"Checkpoint: {result.checkpoint}")
    for path in summary.get("pictures", []):
        say(f"Picture: {path}")
    if options.json:
        answer(json.dumps(summary))
    if result.signal is not None:
        say(f"Interrupted; resume with: {resume_words('train', run_dir, copy, options.storage)}")
        return 128 + result.signal
    return 0 if complete else 1


def _results(options: Train, config: TrainConfig, result: TrainResult) -> dict[str, Any]:
    """Evaluate the run, unless it was interrupted, and draw it; returns what the summary says of both."""
    run_dir, found = result.run_dir, dict[str, Any]()
    if result.signal is None:
        console.print(f"Evaluating on {options.eval_tasks} held-out tasks …")
        found["evaluation"] = evaluate_checkpoint(
            result.checkpoint,
            num_tasks=options.eval_tasks,
            seed=config.experience.seed,
            num_workers=left_workers(config.machine.num_workers) if options.elastic else config.machine.num_workers,
            trust_checkpoint_code=True,  # this process wrote it
        ).summary()
        named = {"checkpoint": result.checkpoint.name, **found["evaluation"]}
        (run_dir / "evaluation.json").write_text(json.dumps(named, indent=1))
        console.print(evaluation_table(found["evaluation"]))
    if (run_dir / "metrics.jsonl").stat().st_size:
        pictures = plot_run(run_dir, config.task)
        found["pictures"] = [str(path) for path in pictures]
        if "tensorboard" in options.log and "evaluation" in found:
            with closing(Board(run_dir, int(result.checkpoint.name.rpartition("_")[2]))) as board:
                board.add_results(found["evaluation"], pictures)
    return found
