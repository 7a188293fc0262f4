"""What a group of learners costs and saves: the jobs of `scaling.py --show learners`, each a process of its own.

- `update`: meta-iterations of `navigation-2d` with the options that train it, with so many learners of one thread.
- `whole`: whole meta-iterations in process, in one thread, and with two workers and a learner.
- `bound`: what two learners could save at best here: two trainings of half as many tasks that know nothing of each
  other, beside each other and one after the other. Cores share caches and memory.
- `simulated`: an Adam step on learners that sleep `SLEEP` seconds a task instead of computing: what messages, sums and
  waiting add to the ideal, in which a learner sleeps for its tasks and nothing else. A task is a shard.
- `driver`: processor, memory and messages of the driver of such meta-iterations. Bytes are those of what it puts into
  the object store, gets from there and calls actors with, as pickles.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np
import ray
import ray.actor
from _report import log

from ssm_metarl.algorithms.rollouts import Array
from ssm_metarl.algorithms.shard import ShardLoss, tree_nodes
from ssm_metarl.config import TrainConfig
from ssm_metarl.distributed.learner import Stage
from ssm_metarl.distributed.learner_group import LearnerGroup
from ssm_metarl.distributed.references import Kept
from ssm_metarl.distributed.trainer import MetaTrainer

SLEEP = 0.18
"""Seconds of a task's share of a meta-update, five epochs, as measured on one core."""

TASK = "navigation-2d"
SHARD_STEPS = 20_000
"""Of a task that is a shard for itself."""


def start(cpus: int) -> None:
    """A Ray that takes this machine for one of so many processors; without its dashboard, which needs some of them."""
    ray.init(
        address="local",
        num_cpus=cpus,
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
    )


# --- A meta-iteration ---------------------------------------------------------------------------------------


def update(learners: int, tasks: int, iterations: int) -> dict[str, float]:
    """Median seconds of the phases of a meta-iteration; 0 learners: in the driver, with one thread."""
    config = TrainConfig.for_task(TASK, meta_batch=tasks, num_learners=learners, learner_threads=1, device="cpu")
    start(1 + learners)
    trainer = MetaTrainer(config.to_dict())
    try:
        initial, measured = trainer.learner.weights(), []
        for _ in range(1 + iterations):
            trainer.learner.load(initial, {})
            measured.append(trainer.step()["seconds"])
    finally:
        trainer.stop()
    return {phase: statistics.median(seconds[phase] for seconds in measured[1:]) for phase in measured[0]}


def whole(task: str, learners: int, workers: int, iterations: int) -> dict[str, float]:
    """Median seconds of a meta-iteration of a task family, with its own options."""
    machine = {"num_learners": learners, "num_workers": workers, "learner_threads": 1, "device": "cpu"}
    start(1 + learners + workers)
    trainer = MetaTrainer(TrainConfig.for_task(task, **machine).to_dict())
    try:
        initial, measured = trainer.learner.weights(), []
        for _ in range(1 + iterations):
            trainer.learner.load(initial, {})
            measured.append(trainer.step()["seconds"]["total"])
    finally:
        trainer.stop()
    return {"seconds": statistics.median(measured[1:])}


def half(tasks: int, iterations: int, answer: Any) -> None:
    """Median seconds of the update of a training in one thread, put into a queue."""
    config = TrainConfig.for_task(TASK, meta_batch=tasks // 2, learner_threads=1, device="cpu")
    trainer = MetaTrainer(config.to_dict())
    initial, measured = trainer.learner.weights(), []
    for _ in range(1 + iterations):
        trainer.learner.load(initial, {})
        measured.append(trainer.step()["seconds"]["update"])
    trainer.stop()
    answer.put(statistics.median(measured[1:]))


def bound(learners: int, tasks: int, iterations: int) -> dict[str, float]:
    """Seconds of one such training alone and beside another, in turns, and the ratio with which two would share."""
    context = multiprocessing.get_context("spawn")
    seconds: dict[int, list[float]] = {1: [], learners: []}
    for count in (1, learners, 1, learners):
        answers = context.Queue()
        processes = [context.Process(target=half, args=(tasks, iterations, answers)) for _ in range(count)]
        for process in processes:
            process.start()
        seconds[count] += [answers.get() for _ in processes]
        for process in processes:
            process.join()
    alone, beside = (statistics.mean(each) for each in seconds.values())
    return {"alone": alone, "beside": beside, "share": beside / alone / learners}


# --- Learners that sleep ------------------------------------------------------------------------------------


def simulated(learners: int, tasks: int, repetitions: int) -> dict[str, float]:
    """Median seconds of an Adam step, and the ideal."""

    class SleepingLearner:  # not of this module: it travels by value, and loads no torch
        def __init__(self, spec: Any, config: Any, device: str) -> None:
            self._gradient = [np.zeros(1000, np.float32) for _ in range(9)]

        def process(self) -> int:
            return os.getpid()

        def gradient(self, *arguments: Any) -> tuple[Any, ...]:
            _, place, weights, keep, *_ = arguments
            time.sleep(SLEEP * sum(map(len, weights)))
            losses = [ShardLoss(w, w, w, 0.0, 0.0) for w in weights]
            nodes = tree_nodes(place[0], place[1], place[1] + len(weights))
            return losses, Kept.of(dict.fromkeys(nodes, self._gradient)), *[Kept((), b"")] * keep * len(weights)

        def add(self, shards: int, *partial: Any) -> list[Array]:
            return [sum(arrays) for arrays in zip(*(value for each in partial for value in each.value.values()))]

    class SleepingGroup(LearnerGroup):
        actor_class = SleepingLearner

        def _set_gradient(self, gradient: Any) -> float:
            return 0.0

    config = TrainConfig.for_task(TASK, num_learners=learners, epochs=1, device="cpu")
    start(1 + learners)
    spec = config.policy_spec(config.family())
    group = SleepingGroup(spec, config.meta, config.machine, 0, SHARD_STEPS, "simulated")
    try:
        group.processes()
        shards = group.shards(tasks, 1)
        stage = Stage(shards, [ray.put(Kept((), b"")) for _ in shards], np.ones(tasks, bool))
        seconds = []
        for _ in range(1 + repetitions):
            begin = time.perf_counter()
            group.update([stage, stage])
            seconds.append(time.perf_counter() - begin)
    finally:
        group.close()
    ideal = SLEEP * tasks / learners
    return {
        "seconds": statistics.median(seconds[1:]),
        "ideal": ideal,
        "of_ideal": ideal / statistics.median(seconds[1:]),
    }


# --- The driver ---------------------------------------------------------------------------------------------


class Traffic:
    """Bytes that pass through this process on their way to and from Ray's object store and actors."""

    def __init__(self) -> None:
        self.bytes = 0

    def count(self, value: Any) -> None:
        """Add the pickle of a value; a reference has 28 bytes."""
        if isinstance(value, ray.ObjectRef):
            self.bytes += 28
        elif isinstance(value, list | tuple):
            for each in value:
                self.count(each)
        elif isinstance(value, Mapping):
            for name, each in value.items():
                self.count((name, each))
        else:
            self.bytes += value.nbytes if isinstance(value, np.ndarray) else len(ray.cloudpickle.dumps(value))

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count while this lasts."""
        get, put, call = ray.get, ray.put, ray.actor.ActorHandle._actor_method_call

        def counted_get(*arguments: Any, **options: Any) -> Any:
            found = get(*arguments, **options)
            self.count(found)
            return found

        def counted_put(value: Any, **options: Any) -> Any:
            self.count(value)
            return put(value, **options)

        def counted_call(actor: Any, method_name: str, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
            self.count((args, kwargs))
            return call(actor, method_name, args, kwargs, **options)

        ray.get, ray.put, ray.actor.ActorHandle._actor_method_call = counted_get, counted_put, counted_call
        try:
            yield
        finally:
            ray.get, ray.put, ray.actor.ActorHandle._actor_method_call = get, put, call


def driver(learners: int, workers: int, tasks: int, iterations: int) -> dict[str, float]:
    """What a meta-iteration costs the driver, and what a task does."""
    config = TrainConfig.for_task(
        TASK, meta_batch=tasks, num_learners=learners, num_workers=workers, learner_threads=1, device="cpu"
    )
    start(1 + learners + workers)
    trainer, traffic = MetaTrainer(config.to_dict()), Traffic()
    try:
        trainer.step()
        before = time.process_time()
        for _ in range(iterations):
            trainer.step()
        seconds = time.process_time() - before
        with traffic.counted():
            trainer.step()
    finally:
        trainer.stop()
    return {
        "cpu_ms_per_task": 1000 * seconds / iterations / tasks,
        "kb_per_task": traffic.bytes / 1000 / tasks,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
    }


# --- All of them --------------------------------------------------------------------------------------------

JOBS = {"update": update, "whole": whole, "bound": bound, "simulated": simulated, "driver": driver}


WHOLE = [(task, number, 2 * number) for task in ("navigation-2d", "halfcheetah-dir") for number in (0, 1)]
"""Families, learners and workers of whole meta-iterations."""


def plan(tasks: Sequence[int], learners: Sequence[int], iterations: int) -> list[dict[str, Any]]:
    """The jobs, in order."""
    jobs: list[dict[str, Any]] = [
        {"job": "update", "learners": count, "tasks": tasks[0], "iterations": iterations} for count in (0, 1, 2)
    ]
    jobs += [
        {"job": "whole", "task": task, "learners": learners, "workers": workers, "iterations": iterations}
        for task, learners, workers in WHOLE
    ]
    jobs.append({"job": "bound", "learners": 2, "tasks": tasks[0], "iterations": iterations})
    jobs += [
        {"job": "simulated", "learners": count, "tasks": number, "repetitions": iterations}
        for number in tasks
        for count in learners
    ]
    jobs += [
        {"job": "driver", "learners": 1, "workers": 1, "tasks": number, "iterations": iterations} for number in tasks
    ]
    return jobs


def results(out: Path, tasks: Sequence[int], learners: Sequence[int], iterations: int) -> dict[str, dict[str, float]]:
    """The results of all jobs by `key`; those that are done are read from the file `out`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = out.read_text().splitlines() if out.exists() else []
    done = {key(line["what"]): line["result"] for line in map(json.loads, lines)}
    for job in plan(tasks, learners, iterations):
        if key(job) in done:
            continue
        log(f"{key(job)} …")
        # A process of its own: peak memory is one of a process, and Ray starts with as many processors as it is told.
        answer = subprocess.run(
            [sys.executable, __file__, json.dumps(job)], stdout=subprocess.PIPE, text=True, check=True
        )
        done[key(job)] = json.loads(next(line for line in answer.stdout.splitlines() if line.startswith("{")))
        log(json.dumps(done[key(job)]))
        with out.open("a") as file:
            file.write(json.dumps({"what": job, "result": done[key(job)]}) + "\n")
    return done


def key(job: Mapping[str, Any]) -> str:
    """The name of a job."""
    return ", ".join(f"{name} {value}" for name, value in job.items())


def table(out: Path, tasks: Sequence[int], learners: Sequence[int], iterations: int) -> dict[str, Any]:
    """The result as `render.py` reads it."""
    found = results(out, tasks, learners, iterations)
    planned = plan(tasks, learners, iterations)
    jobs = {(job["job"], job["learners"], job["tasks"]): found[key(job)] for job in planned if "tasks" in job}
    seconds = {(job["task"], job["learners"]): found[key(job)]["seconds"] for job in planned if "task" in job}
    first, most = tasks[0], tasks[-1]
    one, two = (jobs["update", count, first]["update"] for count in (1, 2))
    rows: list[tuple[str, float, float | None, bool]] = [  # name, figure, goal, whether less is better
        (f"meta-update of {first} tasks, in the driver, s", jobs["update", 0, first]["update"], None, True),
        (f"meta-update of {first} tasks, one learner, s", one, None, True),
        (f"meta-update of {first} tasks, two learners, of the time of one", two / one, 0.55, True),
        ("two trainings that share nothing, the same", jobs["bound", 2, first]["share"], None, True),
    ]
    for family, count, _ in WHOLE:
        if count:
            ratio = seconds[family, count] / seconds[family, 0]
            rows.append((f"iteration of {family}, two workers and a learner, of the time in process", ratio, 1.0, True))
    rows += [
        (
            f"simulated learners, {number} tasks on {count}, of ideal",
            jobs["simulated", count, number]["of_ideal"],
            0.9,
            False,
        )
        for number in tasks
        for count in learners
    ]
    for name, unit, goal in (
        ("cpu_ms_per_task", "processor, ms a task", 1.5),
        ("kb_per_task", "messages, kB a task", 10.0),
        ("peak_mb", "peak memory, MB", 400.0),
    ):
        rows += [(f"driver's {unit}, {number} tasks", jobs["driver", 1, number][name], goal, True) for number in tasks]
    growth = jobs["driver", 1, most]["peak_mb"] / jobs["driver", 1, first]["peak_mb"]
    rows.append((f"driver's peak memory, {most} tasks by {first}", growth, 1.1, True))
    alone = jobs["update", 0, first]
    per_task, share = (alone["update"] + alone["adapt"]) / first, jobs["simulated", learners[-1], most]["of_ideal"]
    serial = jobs["driver", 1, most]["cpu_ms_per_task"]  # ms a task is s of 1,000 tasks
    rows += [
        (f"1,000 tasks on {learners[-1]} learners: learners, s", 1000 * per_task / learners[-1] / share, None, True),
        (f"1,000 tasks of {SLEEP} s: learners, s", 1000 * SLEEP / learners[-1] / share, None, True),
        ("1,000 tasks: driver, s", serial, None, True),
        (f"1,000 tasks of {SLEEP} s: both, s", 1000 * SLEEP / learners[-1] / share + serial, 10.0, True),
        ("10,000 tasks: driver, s", 10 * serial, None, True),
    ]
    return {
        "title": "Learners: Ray actors that share the learner's work",
        "columns": ["measured"],
        "rows": [{"name": name, "cells": [value]} for name, value, _, _ in rows],
        "goals": [
            {
                "row": name,
                "column": "measured",
                "bound": goal,
                "most": less,
                "mean": value,
                "met": value <= goal if less else value >= goal,
            }
            for name, value, goal, less in rows
            if goal is not None
        ],
        "notes": [
            f"`{TASK}` with the options that train it, one thread a learner; simulated learners sleep {SLEEP} s a task "
            "and a task is a shard.",
            "The rows of 1,000 and 10,000 tasks are computed from those above.",
        ],
    }


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    print(json.dumps(JOBS[arguments.pop("job")](**arguments)))
