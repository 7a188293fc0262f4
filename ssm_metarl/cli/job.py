"""`job`: commands of this package in the background, as Ray Jobs."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import shlex
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ssm_metarl import pretrained
from ssm_metarl.cli.console import answer
from ssm_metarl.cli.options import JobCommand, JobList, JobLogs, JobShutdown, JobStart, JobStatus
from ssm_metarl.cli.parsing import Line, parse
from ssm_metarl.cli.population import population_view
from ssm_metarl.cli.tables import COMPACT, change_words
from ssm_metarl.config import TrainConfig
from ssm_metarl.distributed import jobs
from ssm_metarl.distributed.cluster import WAY_IN
from ssm_metarl.storage.contents import CheckpointError
from ssm_metarl.storage.mirror import Mirror
from ssm_metarl.storage.run_folder import resolve_checkpoint
from ssm_metarl.storage.run_log import read_metrics
from ssm_metarl.storage.run_record import read_record
from ssm_metarl.storage.uri import below, is_uri, shown
from ssm_metarl.tuning.store import NOT_COPIED, RunStore, read_state

PACE = 10
"""Iterations from whose time that of the rest is told."""


def run_job(options: JobCommand, command: Sequence[str], console: Console) -> int:
    """Carry out one of the commands; for `job start`, `command` is what the job is to do.

    Raises:
        JobError: see `distributed.jobs`.
    """
    if isinstance(options, JobStart):
        return _start(options, list(command), console)
    if isinstance(options, JobShutdown):
        return _shutdown(console)
    client = jobs.connect(options.address)
    if isinstance(options, JobList):
        return _list([job_view(job) for job in jobs.jobs(client)], options.json, console)
    job = jobs.choose(client, options.job)
    name = job.submission_id or ""
    if isinstance(options, JobStatus):
        return _status(job_view(job), options.json, console)
    if isinstance(options, JobLogs):
        return _logs(client, name, options.follow)
    client.stop_job(name)
    console.print(f"Waiting for {name} to write a checkpoint …", highlight=False)
    console.print(f"{name}: {jobs.await_end(client, name)}", highlight=False)
    return 0


def prepared(command: Sequence[str], storage: str) -> tuple[list[str], str | None]:
    """A command as a job runs it: paths absolute, and a run folder that is known from the start.

    Args:
        command: arguments of the command line; empty for self-improvement without end.
        storage: parent of the run folders.

    Returns:
        The command, and its run folder if it makes one.

    Raises:
        ValueError: a job cannot do it, or it would be refused when it runs; what only the cluster knows is not looked
            at.
    """
    words = list(command) or _improve(storage)
    if words[0] not in ("train", "evolve", "evaluate"):
        raise ValueError(f"A job can train, evolve or evaluate, not {words[0]!r}.")
    line = parse(words)
    if not (line.given.get("resume") or "start" in line.given):
        line.options()
    # A job runs in a folder of its own.
    given = {name: _absolute(value) if isinstance(value, Path) else value for name, value in line.given.items()}
    if "storage" in given:
        given["storage"] = _absolute(given["storage"])
    if line.command == "evaluate":
        return Line(line.command, given).words(), None
    run_dir = given.get("run_dir")
    if run_dir is None:
        parent = given.get("storage", _absolute(storage))
        name = run_name(given.get("task", TrainConfig.task), line.command)
        run_dir = below(parent, name)
        given |= {"storage": parent, "run_dir": name} if is_uri(parent) else {"run_dir": run_dir}
    return Line(line.command, given).words(), run_dir


def run_name(task: str, kind: str) -> str:
    """Name of a new run's folder: its task, without what a path could not have, what it does, the time, and letters
    that tell two runs of the same second apart.
    """
    moment = time.strftime("%Y%m%d-%H%M%S")
    return f"{re.sub('[^A-Za-z0-9._-]+', '-', task)}-{kind}-{moment}-{secrets.token_hex(2)}"


def _improve(storage: str) -> list[str]:
    """`evolve` without end, from the best there is."""
    for run in sorted(Path(storage).glob("*/"), key=lambda run: run.stat().st_mtime, reverse=True):
        if _resumable(run):
            return ["evolve", "--resume", "--run-dir", str(run), "--cycles", "0", "--budget", "0"]
        if (run / "best.json").is_file():
            return ["evolve", "--from", str(resolve_checkpoint(run)), "--cycles", "0"]
    return ["evolve", "--cycles", "0"]


def _resumable(run: Path) -> bool:
    """Whether a folder has a self-improving run, and one of this version."""
    try:
        read_state(run)
    except ValueError:
        return False
    return True


def _absolute(path: str | Path) -> str:
    return str(path) if is_uri(path) or str(path).startswith(pretrained.PREFIX) else str(Path(path).absolute())


def _start(options: JobStart, command: list[str], console: Console) -> int:
    command, run_dir = prepared(command, options.storage)
    had = jobs.recorded_head()
    name = jobs.submit(command, run_dir, options.address)
    head = jobs.recorded_head()
    if head is not None and head != had:
        console.print(f"Started a Ray head; dashboard: {head.dashboard} ({WAY_IN})", highlight=False, soft_wrap=True)
    console.print(shown(f"{name}: {shlex.join(command)}"), markup=False, highlight=False, soft_wrap=True)
    if options.json:
        said = {"command": [shown(word) for word in command], "run_dir": run_dir and shown(run_dir)}
        answer(json.dumps({"job": name, **said}))
    return 0


def _shutdown(console: Console) -> int:
    head = jobs.recorded_head()
    if head is None:
        raise jobs.JobError("No head of this machine is running.")
    client = jobs.connect(head.dashboard)
    running = [job.submission_id or "" for job in jobs.jobs(client) if str(job.status.value) not in jobs.ENDED]
    for name in running:
        client.stop_job(name)
    for name in running:
        console.print(f"{name}: {jobs.await_end(client, name)}", highlight=False)
    jobs.end_head(head)
    console.print("The head has ended.")
    return 0


def _logs(client: Any, name: str, follow: bool) -> int:
    async def tail() -> None:
        async for text in jobs.follow(client, name):
            answer(text, end="")

    if follow:
        asyncio.run(tail())
    else:
        answer(client.get_job_logs(name), end="")
    return 0


def job_view(job: Any) -> dict[str, Any]:
    """A job as JSON values: id, status, command, run folder, times and message."""
    run_dir = (job.metadata or {}).get(jobs.MARK) or None
    return {
        "job": job.submission_id,
        "status": str(job.status.value),
        "command": shown(job.entrypoint.partition(" -m ssm_metarl ")[2]),
        "run_dir": run_dir,
        "started": _time(job.start_time),
        "ended": _time(job.end_time),
        "message": job.message,
    }


def _time(milliseconds: int | None) -> str | None:
    return datetime.fromtimestamp(milliseconds / 1000).isoformat(" ", "seconds") if milliseconds else None


def _list(views: list[dict[str, Any]], as_json: bool, console: Console) -> int:
    if as_json:
        answer(json.dumps(views))
        return 0
    table = Table(expand=True, **COMPACT)
    for heading in ("job", "status", "started"):
        table.add_column(heading, no_wrap=True)
    table.add_column("command", no_wrap=True, overflow="ellipsis", ratio=1)  # what is left of the line
    for view in views:
        table.add_row(view["job"], view["status"], (view["started"] or "")[5:16], view["command"])
    console.print(table)
    return 0


def _progress(place: str) -> tuple[dict[str, Any] | None, list[dict[str, Any]], dict[str, Any] | None]:
    """State and decisions of a self-improving run, or else the last iteration, as far as this machine can read it.

    The last iteration also has "of" and "eta_s", the iterations of the run and about how long the rest takes.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder if is_uri(place) else place)
        try:
            if is_uri(place):
                with closing(Mirror(run, place, NOT_COPIED)) as copy:
                    copy.fetch()
            return read_state(run), RunStore(run).events(), None
        except (OSError, ValueError):
            return None, [], _last_metrics(run)


def _last_metrics(run: Path) -> dict[str, Any] | None:
    """Of the last iteration of a run; None before the first."""
    try:
        lines = read_metrics(run)
        done = int(lines[-1]["iteration"])
        total = max(int(read_record(run).get("iterations", done)), done)
        pace = statistics.median(line["seconds"]["total"] for line in lines[-PACE:])
        return {**lines[-1], "of": total, "eta_s": pace * (total - done)}
    except CheckpointError:
        raise
    except ValueError:
        return None


def _status(view: dict[str, Any], as_json: bool, console: Console) -> int:
    state, events, metrics = _progress(view["run_dir"]) if view["run_dir"] else (None, [], None)
    if as_json:
        place = view["run_dir"] and shown(view["run_dir"])
        answer(json.dumps({**view, "run_dir": place, "state": state, "metrics": metrics}))
        return 0
    for key, value in view.items():
        if value and (key != "message" or view["status"] == "FAILED"):
            console.print(shown(f"{key}: {value}"), markup=False, highlight=False, soft_wrap=True)
    if state is not None:
        console.print(population_view(state, events))
    if metrics is not None:
        before, after = metrics["return_by_step"][0], metrics["return_by_step"][-1]
        done, words = f"iteration {metrics['iteration']} of {metrics['of']}", f"return {change_words(before, after)}"
        eta = f", ETA {timedelta(seconds=round(metrics['eta_s']))}" if metrics["eta_s"] and not view["ended"] else ""
        console.print(f"{done}: {words}{eta}", highlight=False)
    return 0
