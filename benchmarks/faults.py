"""Processes killed and connections cut at random moments: does a run end like one that is left alone?

    python benchmarks/faults.py --show driver > benchmarks/results/faults-driver.json

A show repeats a small run of the command line until there were enough faults, each time with faults at other moments.
Every run is compared with an undisturbed one, to the last bit: the metrics of each iteration without seconds and
restarts, the names of the checkpoints, all files of the last checkpoint, and the evaluation.

`driver`: `train` gets SIGKILL, half of the time soon after its first iteration, otherwise at any moment from its start
on. Then it is resumed. The newest checkpoint must never be older than before the kill.

`workers`: one of two rollout workers gets SIGKILL about every second. No task may be lost.

`learners`: one of two learners or two rollout workers gets SIGKILL every few seconds. No task may be lost.

`members`: a member of `evolve` gets SIGKILL every few seconds, whether it has something to do or not. Compared are the
policy that is handed over, and the log of decisions without the failures themselves. By default three failures in a row
end a run of `evolve`. Here they are so frequent that `--max-failures` is set higher.

`connections`: a connection of `train --storage` to its storage is cut a few times a second, with a request under way or
idle. At the end the copy must have the bytes of every file of the run's folder. Then the folder is deleted, and the run
resumed from the copy for more iterations. The storage is moto's server (`pip install -e '.[test]'`).

Runs that are done are read from `--out`, so that an interrupted benchmark resumes; delete the folder of a show to
measure it anew. The folder of a run that differs stays there.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from _report import log, report
from scaling import WORKER_NAMES, Process, descendants

from ssm_metarl.seeds import seed_for
from ssm_metarl.storage.checkpoint import load_checkpoint
from ssm_metarl.storage.contents import CheckpointError
from ssm_metarl.storage.remote import Remote
from ssm_metarl.storage.run_folder import checkpoints, resolve_checkpoint
from ssm_metarl.storage.uri import join
from ssm_metarl.tuning.records import Decision
from ssm_metarl.tuning.store import RunStore, read_state

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

Show = Literal["driver", "workers", "learners", "members", "connections"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Disturb runs, and compare each with one that is left alone.

    Attributes:
        show: what is killed or cut.
        kills: over all runs, at least.
        seed: of the moments and the victims.
        out: folder of the runs.
    """

    show: Show = "driver"
    kills: int = 100
    seed: int = 0
    out: Path = Path("runs/faults")


# --- Commands ---------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"task": "navigation-2d", "hidden_dim": 8, "state_dim": 4, "meta_batch": 4, "episodes": 2}
SMALL |= {"epochs": 2, "num_workers": 0}
TRAIN = {**SMALL, "iterations": 60, "checkpoint_every": 2, "eval_tasks": 2}
TRAIN |= {"learner_threads": 1, "lr_schedule": "constant"}


def words(command: str, options: Mapping[str, Any]) -> list[str]:
    """A command line of `ssm-metarl`."""
    return [command, *(f"--{name.replace('_', '-')}={value}" for name, value in options.items())]


class Command:
    """A command of `ssm-metarl` in a process of its own.

    Args:
        folder: that it runs in, where its run is the folder `run`.
        line: its words.
    """

    def __init__(self, folder: Path, line: Sequence[str]) -> None:
        self._log = folder / "log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ssm_metarl", *line, "--run-dir=run"],
                cwd=folder,
                env={**os.environ, "XDG_STATE_HOME": str(folder.resolve() / "state")},
                stdout=log,
                stderr=log,
            )

    def output(self) -> str:
        """All that it has printed so far."""
        return self._log.read_text(errors="replace")

    def has_ended(self, within_s: float) -> bool:
        """Whether the process ends by itself within so many seconds."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(within_s)
        return self.process.returncode is not None

    def failure(self) -> list[str]:
        """Of a process that has ended, what was wrong; empty where nothing was."""
        if self.process.returncode == 0:
            return []
        said = self.output().strip().splitlines()
        return [f"exit code {self.process.returncode}: {said[-1] if said else ''}"]


@contextmanager
def running(folder: Path, line: Sequence[str]) -> Iterator[Command]:
    """Start a command; it has ended when the block has."""
    command = Command(folder, line)
    try:
        yield command
    finally:
        if command.process.poll() is None:
            command.process.terminate()
        command.process.wait()


@dataclass
class Disturbed:
    """A run with faults.

    Attributes:
        kills: how many of its faults hit it at which moment.
        noticed: faults that the run has counted itself.
        wrong: what is not as it should be, a few words each.
    """

    kills: Counter[str] = field(default_factory=Counter)
    noticed: int | None = None
    wrong: list[str] = field(default_factory=list)


# --- What is compared -------------------------------------------------------------------------------------


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one in each line."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder but hidden ones, by their path in it."""
    paths = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {name.as_posix(): path.read_bytes() for name, path in paths.items() if not name.name.startswith(".")}


def without(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """All entries but some."""
    return {name: value for name, value in values.items() if name not in names}


def trained(run: Path) -> dict[str, Any]:
    """What must not depend on faults in the folder of `train`."""
    found = checkpoints(run)
    return {
        "metrics": [without(line, "seconds", "restarts") for line in lines(run / "metrics.jsonl")],
        "names of checkpoints": [path.name for path in found],
        "last checkpoint": contents(found[-1]),
        "best.json": (run / "best.json").read_bytes(),
        "evaluation": without(json.loads((run / "evaluation.json").read_text()), "seconds"),
    }


def evolved(run: Path) -> dict[str, Any]:
    """What must not depend on faults in the folder of `evolve`."""
    decided = [event for event in RunStore(run).events() if event["decision"] != Decision.FAILED]
    return {
        "decisions": [without(event, "time") for event in decided],
        "names of checkpoints": [path.name for path in checkpoints(run)],
        "policy handed over": contents(resolve_checkpoint(run)),
        "best.json": (run / "best.json").read_bytes(),
        "schedule.json": (run / "schedule.json").read_bytes(),
    }


# --- The driver -------------------------------------------------------------------------------------------

ANY_S, TRAINING_S = 8.0, 1.0
"""Seconds within which the driver is killed: after its start, and after its first iteration."""


def kill_driver(folder: Path, rng: np.random.Generator) -> Disturbed:
    """Train with a driver that is killed and resumed until the run is over."""
    run, found, newest = folder / "run", Disturbed(), -1
    while True:
        if newest < 0:  # killed before the first checkpoint: there is nothing to resume
            shutil.rmtree(run, ignore_errors=True)
        with running(folder, [*words("train", TRAIN), *["--resume"] * (newest >= 0)]) as driver:
            longest = ANY_S
            if rng.random() < 0.5:
                longest = TRAINING_S
                while "iteration " not in driver.output() and not driver.has_ended(0.01):
                    pass
            if driver.has_ended(rng.uniform(0.0, longest)):
                found.wrong += driver.failure()
                return found
            driver.process.kill()
            driver.process.wait()
            found.kills[moment_of(driver)] += 1
        before, newest = newest, newest_iteration(run)
        if newest < before:
            found.wrong.append(f"the newest checkpoint was {before}, and is {newest}")


def moment_of(driver: Command) -> str:
    """What `train` was doing."""
    said = driver.output()
    doing = {"Evaluating on": "while it evaluates", "iteration ": "while it trains"}
    return next((moment for text, moment in doing.items() if text in said), "while it starts")


def newest_iteration(run: Path) -> int:
    """Of the newest checkpoint, which is whole; -1: there is none."""
    found = checkpoints(run)
    try:
        return int(load_checkpoint(found[-1]).progress["iteration"]) if found else -1
    except CheckpointError:
        return -1


# --- Workers and members ----------------------------------------------------------------------------------

WORKERS_EVERY_S, LEARNERS_EVERY_S, MEMBERS_EVERY_S = 1.0, 4.0, 6.0
"""Seconds from a kill to the next, on average: a learner's or member's process takes some to start."""

LEARNER_NAMES = ("ray::LearnerAct",)
"""How Ray names a learner's process, cut to 15 characters."""

MEMBER_NAMES = ("ray::MemberTrai",)
"""How Ray names a member's process, cut to 15 characters."""

WITH_WORKERS = {**TRAIN, "num_workers": 2, "trial_episodes": 10}  # most of the time is the workers'
WITH_LEARNERS = {**TRAIN, "num_workers": 2, "num_learners": 2, "hidden_dim": 64, "meta_batch": 16, "episodes": 20}
EVOLVE = {**SMALL, "checkpoint_every": 1, "proposals": 2, "warm_up": 6, "stretch": 6, "assess_tasks": 4, "cycles": 5}
EVOLVE |= {"max_failures": 1000}


def kill_workers(folder: Path, rng: np.random.Generator) -> Disturbed:
    """Train with workers that are killed."""

    def moment(worker: Process) -> str:
        return "while it plays" if worker.name.startswith("ray::collect") else "while it waits or starts"

    found = kill_processes(folder, words("train", WITH_WORKERS), WORKER_NAMES, WORKERS_EVERY_S, moment, rng)
    found.noticed = lines(folder / "run" / "metrics.jsonl")[-1]["restarts"]
    return without_losses(found, folder)


def kill_learners(folder: Path, rng: np.random.Generator) -> Disturbed:
    """Train with learners and workers that are killed."""

    def moment(process: Process) -> str:
        return "a learner" if process.name.startswith(LEARNER_NAMES) else "a rollout worker"

    names = (*LEARNER_NAMES, *WORKER_NAMES)
    return without_losses(
        kill_processes(folder, words("train", WITH_LEARNERS), names, LEARNERS_EVERY_S, moment, rng), folder
    )


def without_losses(found: Disturbed, folder: Path) -> Disturbed:
    """The same, and wrong where tasks or episodes were lost."""
    metrics = lines(folder / "run" / "metrics.jsonl")
    lost = sum(len(line["dropped_tasks"]) + line["timed_out_tasks"] + line["invalid_episodes"] for line in metrics)
    found.wrong += [f"{lost} tasks or episodes lost"] if lost else []
    return found


def kill_members(folder: Path, rng: np.random.Generator) -> Disturbed:
    """Evolve with members that are killed."""
    run = folder / "run"

    def moment(member: Process) -> str:
        return "in a race" if read_state(run)["live"]["race"] else "between races"

    found = kill_processes(folder, words("evolve", EVOLVE), MEMBER_NAMES, MEMBERS_EVERY_S, moment, rng)
    found.noticed = sum(event["decision"] == Decision.FAILED for event in RunStore(run).events())
    return found


def kill_processes(
    folder: Path,
    line: Sequence[str],
    names: tuple[str, ...],
    every_s: float,
    moment: Callable[[Process], str],
    rng: np.random.Generator,
) -> Disturbed:
    """Run a command while a random process below it with one of these names is killed, again and again."""
    found, killed = Disturbed(), set[int]()
    with running(folder, line) as command:
        while not command.has_ended(rng.uniform(0.0, 2 * every_s)):
            alive = [each for each in descendants() if each.name.startswith(names) and each.number not in killed]
            if alive:
                victim = alive[rng.integers(len(alive))]
                now = moment(victim)
                with suppress(ProcessLookupError):
                    os.kill(victim.number, signal.SIGKILL)
                    killed.add(victim.number)  # it has its name until its parent has noticed
                    found.kills[now] += 1
        found.wrong += command.failure()
    return found


# --- Connections ------------------------------------------------------------------------------------------

CUT_EVERY_S = 0.3
"""Seconds from a cut to the next, on average."""

DELAY_S = 0.02
"""Seconds that the way to the storage takes."""

COPIED = {**TRAIN, "checkpoint_every": 1}
FIRST = 40
"""Iterations before the folder is deleted."""


@dataclass(eq=False)
class Connection:
    """A connection through the relay.

    Attributes:
        near, far: to the client, and to the server.
        asked: whether the last bytes were the client's: a request is under way.
    """

    near: asyncio.StreamWriter
    far: asyncio.StreamWriter
    asked: bool = False


class Relay:
    """A port on the loopback address that leads to another one, and whose connections can be cut.

    Args:
        target: the other port.

    Attributes:
        port: its own.
    """

    def __init__(self, target: int) -> None:
        self._target, self._loop = target, asyncio.new_event_loop()
        self._live: list[Connection] = []
        ready = threading.Event()
        threading.Thread(target=self._run, args=(ready,), daemon=True).start()
        ready.wait()

    def cut(self, rng: np.random.Generator) -> str | None:
        """End one of the connections that are open, without a word to either side.

        Returns:
            At which moment; None where no connection is open.
        """
        return asyncio.run_coroutine_threadsafe(self._cut(rng), self._loop).result()

    def close(self) -> None:
        """End."""
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _run(self, ready: threading.Event) -> None:
        server = self._loop.run_until_complete(self._listen())
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        self._loop.run_forever()

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._serve, "127.0.0.1", 0)

    async def _cut(self, rng: np.random.Generator) -> str | None:
        if not self._live:
            return None
        connection = self._live[rng.integers(len(self._live))]
        for end in (connection.near, connection.far):
            end.transport.abort()
        return "with a request under way" if connection.asked else "idle"

    async def _serve(self, reader: asyncio.StreamReader, near: asyncio.StreamWriter) -> None:
        answers, far = await asyncio.open_connection("127.0.0.1", self._target)
        connection = Connection(near, far)
        self._live.append(connection)
        try:
            await asyncio.gather(self._pass(reader, connection, True), self._pass(answers, connection, False))
        finally:
            self._live.remove(connection)

    async def _pass(self, reader: asyncio.StreamReader, connection: Connection, asked: bool) -> None:
        """Hand on what one side sends, until it ends."""
        to = connection.far if asked else connection.near
        with suppress(OSError):
            while content := await reader.read(2**16):
                connection.asked = asked
                if asked:
                    await asyncio.sleep(DELAY_S)
                to.write(content)
                await to.drain()
        to.close()


def cut_connections(folder: Path, rng: np.random.Generator) -> Disturbed:
    """Train with a copy whose connections are cut; resume from it without the folder, for more iterations."""
    from object_store import object_store  # only here: moto is an extra

    found, run = Disturbed(), folder / "run"
    with object_store() as store:
        logging.getLogger("werkzeug").setLevel(logging.CRITICAL)  # a request that is cut is an error of the server's
        relay = Relay(store.port)
        try:
            storage = store.uri(folder.name, relay.port)
            first = words("train", {**COPIED, "storage": storage, "iterations": FIRST})
            for line in (first, [*words("train", {**COPIED, "storage": storage}), "--resume"]):
                shutil.rmtree(run, ignore_errors=True)
                with running(folder, line) as command:
                    while not command.has_ended(rng.uniform(0.0, 2 * CUT_EVERY_S)):
                        if moment := relay.cut(rng):
                            found.kills[moment] += 1
                    found.noticed = (found.noticed or 0) + command.output().count("The copy is behind since")
                    found.wrong += command.failure()
                local, there = contents(run), copied(join(store.uri(folder.name), "run"))
                names = sorted(name for name in {*local, *there} if local.get(name) != there.get(name))
                found.wrong += [f"the copy has {name} otherwise" for name in names]
        finally:
            relay.close()
    return found


def copied(uri: str) -> dict[str, bytes]:
    """All files of a run's copy but hidden ones."""
    with Remote(uri) as remote:
        return remote.get(name for name in remote.files() if not Path(name).name.startswith("."))


# --- Shows ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A run and its faults.

    Attributes:
        title: of the result.
        fault: what is counted.
        alone: the command line of the run without faults.
        disturb: makes such a run with faults.
        told: what is compared, by name.
        noticed: what the run itself counts, with a capital letter.
    """

    title: str
    fault: str = "kills"
    alone: list[str]
    disturb: Callable[[Path, np.random.Generator], Disturbed]
    told: Callable[[Path], dict[str, Any]] = trained
    noticed: str | None = None


SCENES: Mapping[Show, Scene] = {
    "driver": Scene(
        title="Faults: the driver of `train` is killed and resumed",
        alone=words("train", TRAIN),
        disturb=kill_driver,
    ),
    "workers": Scene(
        title="Faults: rollout workers are killed",
        alone=words("train", WITH_WORKERS),
        disturb=kill_workers,
        noticed="Restarts of workers that the runs counted",
    ),
    "learners": Scene(
        title="Faults: learners and rollout workers are killed",
        alone=words("train", WITH_LEARNERS),
        disturb=kill_learners,
    ),
    "members": Scene(
        title="Faults: members of `evolve` are killed",
        alone=words("evolve", EVOLVE),
        disturb=kill_members,
        told=evolved,
        noticed="Failures of busy members that the runs counted",
    ),
    "connections": Scene(
        title="Faults: connections to a copy in object storage are cut",
        fault="cuts",
        alone=words("train", COPIED),
        disturb=cut_connections,
        noticed="Times that a copy fell behind for longer than the retries of a request take",
    ),
}


def new_folder(path: Path) -> Path:
    """An empty folder."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def undisturbed(scene: Scene, folder: Path) -> tuple[dict[str, Any], float]:
    """What a run that is left alone tells, and its seconds.

    Raises:
        RuntimeError: it failed.
    """
    begin = time.perf_counter()
    with running(new_folder(folder), scene.alone) as command:
        command.process.wait()
        if wrong := command.failure():
            raise RuntimeError(f"A run without faults failed. {wrong[0]}")
    return scene.told(folder / "run"), time.perf_counter() - begin


def disturbed(scene: Scene, folder: Path, rng: np.random.Generator, expected: Mapping[str, Any]) -> dict[str, Any]:
    """A run with faults, compared, as JSON values."""
    begin = time.perf_counter()
    found = scene.disturb(new_folder(folder), rng)
    seconds = time.perf_counter() - begin
    if not found.wrong:
        told = scene.told(folder / "run")
        found.wrong += [f"{name}: other than undisturbed" for name, value in expected.items() if told[name] != value]
    if not found.wrong:
        shutil.rmtree(folder)
    return {**vars(found), "seconds": seconds}


def carry_out(options: Options) -> dict[str, Any]:
    """Runs until there were enough faults, those of an earlier call among them, as a table."""
    scene, folder = SCENES[options.show], options.out / options.show
    expected, alone_s = undisturbed(scene, folder / "alone")
    log(f"undisturbed: {alone_s:.0f} s")
    path = folder / "runs.jsonl"
    runs = lines(path) if path.exists() else []
    while sum(sum(run["kills"].values()) for run in runs) < options.kills:
        rng = np.random.default_rng(seed_for(options.seed, len(runs)))
        runs.append(disturbed(scene, folder / f"{len(runs)}", rng, expected))
        with path.open("a") as file:
            file.write(json.dumps(runs[-1]) + "\n")
        log(f"run {len(runs)}: {runs[-1]}")
    return table(options, scene, runs, alone_s)


def table(options: Options, scene: Scene, runs: Sequence[Mapping[str, Any]], alone_s: float) -> dict[str, Any]:
    """A row a moment, and one for all."""
    kills = sum((Counter(run["kills"]) for run in runs), Counter[str]())
    equal = sum(not run["wrong"] for run in runs)
    columns = [scene.fault, "runs", "runs as undisturbed", "seconds", "seconds of the undisturbed run"]
    total = [kills.total(), len(runs), equal, sum(run["seconds"] for run in runs), alone_s]
    rows = [{"name": name, "cells": [count, None, None, None, None]} for name, count in kills.most_common()]
    rows.append({"name": "all", "cells": total})
    bounds = {scene.fault: (options.kills, kills.total()), "runs as undisturbed": (len(runs), equal)}
    goals = [
        {"row": "all", "column": column, "bound": bound, "most": False, "mean": reached, "met": reached >= bound}
        for column, (bound, reached) in bounds.items()
    ]
    notes = [f"`ssm-metarl {' '.join(scene.alone)}`"]
    if scene.noticed:
        notes.append(f"{scene.noticed}: {sum(run['noticed'] for run in runs)}.")
    return {"title": scene.title, "columns": columns, "rows": rows, "goals": goals, "notes": notes, "each": list(runs)}


if __name__ == "__main__":
    chosen = tyro.cli(Options, description=__doc__)
    report("faults", {"show": chosen.show, "kills": chosen.kills, "seed": chosen.seed, **carry_out(chosen)})
