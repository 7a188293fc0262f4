"""What 1 to 64 workers cost on environments that are slow: throughput, messages, a straggler, deaths. Linux only.

    python benchmarks/scaling.py --show throughput
    python benchmarks/scaling.py --show learners

The latter, see `_learners.py`, stands for itself, and goes on after an interruption with what is not in `--out`.

The benchmark's family sleeps in every vector step, however many environments it moves, as with simulators or robots
that run side by side elsewhere: so there can be more workers than cores. A worker plays one task. *Ideal* is a call
that lasts as long as the sleeps of one episode, with nothing for the policy, for messages and for waiting; at that
rate n workers make n times the steps of one. What a call takes beyond is split into the slowest worker's own sampling
(`policy_seconds`) and the rest (`pool_seconds`: Ray, messages, the driver). For the first the number of cores
matters: hence the processor time of driver, workers and Ray's own processes stands beside it.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

# One thread a process, before NumPy is loaded; the learner sets its own.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import _learners as learners
import numpy as np
import ray
import tyro
from _report import log, report, summary
from gymnasium.spaces import Box
from numpy.typing import NDArray

from ssm_metarl.algorithms.policy import SSMPolicy
from ssm_metarl.algorithms.rollouts import Array
from ssm_metarl.algorithms.spec import PolicyConfig, PolicySpec
from ssm_metarl.config import TrainConfig
from ssm_metarl.distributed.pool import Pool
from ssm_metarl.distributed.trainer import MetaTrainer
from ssm_metarl.seeds import seed_for
from ssm_metarl.tasks import BatchedEnv, Task, TaskDistribution, register
from ssm_metarl.tasks.parameters import Parameter, stack_parameters

HORIZON = 100
STRAGGLER = 10
"""How many times slower the straggler's steps are."""

# As little as can be for the policy and for the environment beside its sleep: 64 processes share the cores.
POLICY = PolicyConfig(hidden_dim=4, num_layers=0, inputs="observation")

PENDING = (1, 64, 1000)
"""Numbers of calls under way among which Ray is asked for the first that has ended."""

Part = Literal["throughput", "step", "ray", "iteration", "straggler", "deaths", "learners"]


@dataclass(frozen=True)
class Options:
    """Measure how the pool scales.

    Attributes:
        show: parts of the benchmark.
        workers: numbers of workers for `throughput`; the other parts take the largest.
        step_ms: sleep of a step, in milliseconds.
        slower_step_ms: other sleeps, for the largest number of workers: what is left when cores matter less.
        episodes: a task, side by side.
        repetitions: measured calls, after one that is not.
        iterations: measured meta-iterations of `iteration`, after one that is not.
        seconds: length of the run of `deaths`.
        death_every_s: seconds from one death to the next.
        tasks: numbers of tasks for `learners`.
        learners: numbers of simulated learners.
        out: file of the jobs of `learners` that are done.
    """

    show: tuple[Part, ...] = ("throughput", "step", "ray", "iteration", "straggler", "deaths")
    workers: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    step_ms: float = 10.0
    slower_step_ms: tuple[float, ...] = (20.0, 40.0)
    episodes: int = 4
    repetitions: int = 7
    iterations: int = 2
    seconds: float = 60.0
    death_every_s: float = 5.0
    tasks: tuple[int, ...] = (64, 256)
    learners: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    out: Path = Path("runs/scaling-learners.jsonl")

    @property
    def most_workers(self) -> int:
        return max(self.workers)


# --- Environments whose step takes its time ---------------------------------------------------------------


class SleepingLineEnv(BatchedEnv):
    """Points on a line, each with a hidden goal; a step of them all takes `seconds`."""

    def __init__(self, goals: NDArray[np.float64], seconds: float) -> None:
        super().__init__(SleepingLine.observation_space, SleepingLine.action_space, len(goals), HORIZON)
        self._goals = goals.astype(np.float32)[:, None]
        self._positions = np.zeros_like(self._goals)
        self._never = np.zeros(len(goals), bool)
        self._seconds = seconds

    def _start(self, slots: NDArray[np.intp]) -> None:
        self._positions[slots] = 0.0

    def _advance(self, actions: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        time.sleep(self._seconds)
        self._positions += actions
        return -np.abs(self._positions - self._goals)[:, 0], self._never

    def _observe(self) -> NDArray[np.float32]:
        return self._positions.copy()


class SleepingLine(TaskDistribution):
    """A task is `{"goal": x, "step_ms": sleep}`; of tasks that are played together the slowest sets the pace."""

    name = "sleeping-line"
    horizon = HORIZON
    observation_space = Box(-np.inf, np.inf, (1,), np.float32)
    action_space = Box(-np.inf, np.inf, (1,), np.float32)
    splits = ("train",)
    parameters: Mapping[str, Parameter] = {"goal": Parameter(-1.0, 1.0), "step_ms": Parameter(0.0, 1e6)}

    def __init__(self, step_ms: float) -> None:
        self.step_ms = step_ms

    def sample(self, n: int, rng: np.random.Generator, split: str = "train") -> list[Task]:
        return [{"goal": goal, "step_ms": self.step_ms} for goal in rng.uniform(-1.0, 1.0, n).tolist()]

    def make_vector_env(self, tasks: Sequence[Task], num_episodes: int) -> SleepingLineEnv:
        laid_out = stack_parameters(tasks, self.parameters, num_episodes)
        return SleepingLineEnv(laid_out["goal"], float(laid_out["step_ms"].max()) / 1000)


def family_and_spec(options: Options) -> tuple[SleepingLine, PolicySpec]:
    """The benchmark's family, registered, and its policy's sizes."""
    family = SleepingLine(options.step_ms)
    register(family.name, lambda: family)
    return family, TrainConfig(task=family.name, policy=POLICY).policy_spec(family)


# --- Processor time ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Process:
    """A process as the kernel sees it.

    Attributes:
        name: its first 15 characters.
        cpu_seconds: user and system time that it has used.
    """

    number: int
    parent: int
    name: str
    cpu_seconds: float

    @classmethod
    def read(cls, number: int) -> Process | None:
        """None if it has ended."""
        try:
            before, _, after = Path(f"/proc/{number}/stat").read_text().rpartition(")")
        except OSError:
            return None
        fields = after.split()
        ticks = int(fields[11]) + int(fields[12])
        return cls(number, int(fields[1]), before.partition("(")[2], ticks / os.sysconf("SC_CLK_TCK"))


def descendants() -> list[Process]:
    """This process's children, their children and so on: among them all of the Ray that it has started."""
    children: dict[int, list[Process]] = {}
    for path in Path("/proc").glob("[0-9]*"):
        if process := Process.read(int(path.name)):
            children.setdefault(process.parent, []).append(process)
    found = list(children.get(os.getpid(), []))
    for child in found:  # grows meanwhile
        found += children.get(child.number, [])
    return found


def cpu_seconds(numbers: Sequence[int]) -> float:
    """Processor time that these processes have used together, those left out that have ended."""
    return sum(process.cpu_seconds for process in map(Process.read, numbers) if process)


class Processors:
    """Processor time from now on of this process, of a pool's workers, and of whatever else Ray runs here."""

    def __init__(self, pool: Pool) -> None:
        workers = pool.processes()
        others = [process.number for process in descendants() if process.number not in workers]
        self._groups = {"driver": [os.getpid()], "workers": workers, "ray": others}
        self._before = self._now()

    def seconds(self) -> dict[str, float]:
        now = self._now()
        return {group: now[group] - self._before[group] for group in now}

    def _now(self) -> dict[str, float]:
        return {group: cpu_seconds(numbers) for group, numbers in self._groups.items()}


# --- Calls of the pool ------------------------------------------------------------------------------------


@dataclass
class Calls:
    """Calls of a pool with the same tasks and new seeds.

    Attributes:
        seconds: of each call so far.
        own_seconds: of each, the slowest worker's own sampling; in process the whole call.
        steps: of the last call.
    """

    pool: Pool
    weights: Mapping[str, Array]
    tasks: Sequence[Task]
    episodes: int
    seconds: list[float] = field(default_factory=list)
    own_seconds: list[float] = field(default_factory=list)
    steps: int = 0

    def __call__(self, times: int = 1) -> None:
        for _ in range(times):
            seeds = [seed_for(0, len(self.seconds), task) for task in range(len(self.tasks))]
            before, start = self.pool.ray_seconds, time.perf_counter()
            # The pool sends large weights only once while they stay the same mapping; in training they never do.
            rollouts = self.pool.collect(dict(self.weights), self.tasks, seeds, self.episodes)
            self.seconds.append(time.perf_counter() - start)
            self.own_seconds.append(self.seconds[-1] - (self.pool.ray_seconds - before))
            self.steps = rollouts.num_steps


def started(pool: Pool) -> dict[str, float]:
    """Seconds until all workers of a new pool run, and the processor time that one has used by then."""
    begin = time.perf_counter()
    numbers = pool.processes()
    seconds = time.perf_counter() - begin
    return {"start_seconds": seconds, "start_cpu_seconds_per_worker": cpu_seconds(numbers) / max(len(numbers), 1)}


def draw(family: SleepingLine, n: int, step_ms: float) -> list[Task]:
    """n tasks with this sleep."""
    return [{**task, "step_ms": step_ms} for task in family.sample(n, np.random.default_rng(seed_for(0)))]


# --- Throughput against ideal -----------------------------------------------------------------------------


def throughput(options: Options) -> list[dict[str, Any]]:
    """A row a number of workers, in process (0) first, and a row a slower step for the largest number."""
    family, spec = family_and_spec(options)
    weights = SSMPolicy(spec).numpy_weights()
    rows = []
    for workers in (0, *options.workers):
        with Pool(family, spec, num_workers=workers, name=f"scaling/throughput/{workers}") as pool:
            start = started(pool)
            slower = options.slower_step_ms if workers == options.most_workers else ()
            for step_ms in (options.step_ms, *slower):
                tasks = draw(family, max(workers, 1), step_ms)
                row = rates(Calls(pool, weights, tasks, options.episodes), step_ms, options.repetitions)
                rows.append({"workers": workers, "step_ms": step_ms, **row, **start})
                log(f"{workers} workers, steps of {step_ms:g} ms: {100 * row['of_ideal']:.1f} % of ideal")
    return rows


def rates(calls: Calls, step_ms: float, repetitions: int) -> dict[str, Any]:
    """Steps a second of some calls, and what they took beyond the sleeps."""
    calls()
    processors, begin = Processors(calls.pool), time.perf_counter()
    calls(repetitions)
    wall, cpu = time.perf_counter() - begin, processors.seconds()
    seconds, own_seconds = summary(calls.seconds[1:]), statistics.median(calls.own_seconds[1:])
    pool_seconds = seconds["median"] - own_seconds
    ideal = HORIZON * step_ms / 1000
    tasks = len(calls.tasks)
    return {
        "steps_per_second": calls.steps / seconds["median"],
        "ideal_steps_per_second": calls.steps / ideal,
        "of_ideal": ideal / seconds["median"],
        "of_ideal_best": ideal / seconds["min"],
        "call_seconds": seconds["median"],
        "policy_seconds": own_seconds - ideal,
        "pool_seconds": pool_seconds,
        "pool_ms_per_task": 1000 * pool_seconds / tasks,
        "driver_cpu_ms_per_task": 1000 * cpu["driver"] / repetitions / tasks,
        "worker_cpu_ms_per_step": 1000 * cpu["workers"] / repetitions / tasks / HORIZON,
        "cores": {group: value / wall for group, value in cpu.items()},
    }


def step(options: Options) -> dict[str, float]:
    """Processor time of a step in process: with no sleep in it, and with one, after which the caches are others'; and
    of the sleep alone.
    """
    family, spec = family_and_spec(options)
    weights = SSMPolicy(spec).numpy_weights()
    result = {}
    with Pool(family, spec, num_workers=0) as pool:
        for name, step_ms in (("without_sleep", 0.0), ("after_sleep", options.step_ms)):
            calls = Calls(pool, weights, draw(family, 1, step_ms), options.episodes)
            calls()
            begin = time.process_time()
            calls(options.repetitions)
            result[f"cpu_ms_{name}"] = 1000 * (time.process_time() - begin) / options.repetitions / HORIZON
    for name, seconds in (("no_sleep", 0.0), ("sleep", options.step_ms / 1000)):
        begin = time.process_time()
        for _ in range(HORIZON):
            time.sleep(seconds)
        result[f"cpu_ms_{name}_alone"] = 1000 * (time.process_time() - begin) / HORIZON
    return result


# --- Ray alone --------------------------------------------------------------------------------------------


class Echo:
    """Answers at once, or late."""

    def answer(self, after_s: float = 0.0) -> None:
        time.sleep(after_s)


def ray_alone(options: Options) -> dict[str, Any]:
    """Milliseconds of an empty call, and of asking which of n calls under way has ended."""
    ready, busy = (ray.remote(Echo).options(num_cpus=0).remote() for _ in range(2))
    ray.get([ready.answer.remote(), busy.answer.remote()])
    empty = []
    for _ in range(200):
        start = time.perf_counter()
        ray.get(ready.answer.remote())
        empty.append(time.perf_counter() - start)
    # The first blocks the others: all stay under way.
    under_way = [busy.answer.remote(600.0), *(busy.answer.remote() for _ in range(max(PENDING)))]
    waits = {n: statistics.median(_wait_seconds(ready, under_way[:n]) for _ in range(20)) for n in PENDING}
    for actor in (ready, busy):
        ray.kill(actor)
    return {
        "empty_call_ms": 1000 * statistics.median(empty),
        "wait_ms_by_calls_under_way": {n: 1000 * seconds for n, seconds in waits.items()},
    }


def _wait_seconds(ready: Any, under_way: list[Any]) -> float:
    """Seconds until Ray has found the one call that has ended among those under way."""
    ended = ready.answer.remote()
    ray.wait([ended])
    start = time.perf_counter()
    found, _ = ray.wait([*under_way, ended], num_returns=1)
    seconds = time.perf_counter() - start
    if found != [ended]:
        raise RuntimeError("A call that was to block has ended.")
    return seconds


# --- A meta-iteration -------------------------------------------------------------------------------------


def iteration(options: Options) -> dict[str, Any]:
    """Bytes and seconds of one meta-iteration of `navigation-2d` with the options that train it, a task a worker."""
    workers = options.most_workers
    config = TrainConfig.for_task("navigation-2d", meta_batch=workers, num_workers=workers)
    trainer = MetaTrainer(config.to_dict())
    try:
        measured = [trainer.step()["seconds"] for _ in range(1 + options.iterations)][1:]
        seconds = {phase: statistics.median(each[phase] for each in measured) for phase in measured[0]}
        messages = {"support": message_costs(trainer, False), "query": message_costs(trainer, True)}
        parameters = sum(array.size for array in trainer.learner.weights().values())
    finally:
        trainer.stop()
    total = sum(stage["bytes_out_per_task"] + stage["bytes_back_per_task"] for stage in messages.values())
    log(f"an iteration: {total * workers / 1e6:.1f} MB, update {seconds['update']:.1f} s")
    return {
        "tasks": workers,
        "episodes": config.experience.episodes,
        "parameters": parameters,
        "learner_threads": config.machine.learner_threads,
        "bytes_per_iteration": total * workers,
        "messages": messages,
        "seconds": seconds,
        "adapt_ms_per_task": 1000 * seconds["adapt"] / workers,
        "update_ms_per_task": 1000 * seconds["update"] / workers,
        "driver_peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def message_costs(trainer: MetaTrainer, own_weights: bool) -> dict[str, float]:
    """What one call costs the driver and the network a task.

    Bytes are those of the call's arguments and of its answer as Ray pickles them, without the headers of its
    protocol. Shared weights are small enough to travel with each call.
    """
    experience, pool = trainer.train_config.experience, trainer.pool
    tasks = trainer.distribution.sample(experience.meta_batch, np.random.default_rng(seed_for(0)))
    seeds = [seed_for(0, task) for task in range(len(tasks))]
    shared = trainer.learner.weights()
    weights = {name: np.stack([value] * len(tasks)) for name, value in shared.items()} if own_weights else shared
    begin = time.process_time()
    rollouts = pool.collect(weights, tasks, seeds, experience.episodes)
    cpu = time.process_time() - begin
    first = {name: value[:1] for name, value in weights.items()} if own_weights else weights
    sent = (first, tasks[:1], seeds[:1], experience.episodes, False)
    return {
        "bytes_out_per_task": pickled_bytes(sent),
        "bytes_back_per_task": pickled_bytes((rollouts.select(slice(0, 1)), 0.0)),
        "driver_cpu_ms_per_task": 1000 * cpu / len(tasks),
    }


def pickled_bytes(value: object) -> int:
    """Size of a message."""
    return len(ray.cloudpickle.dumps(value))


# --- A straggler ------------------------------------------------------------------------------------------


def straggler(options: Options) -> dict[str, Any]:
    """What a task costs whose steps are `STRAGGLER` times slower, in a share of one and of four tasks."""
    family, spec = family_and_spec(options)
    weights, workers = SSMPolicy(spec).numpy_weights(), options.most_workers
    with Pool(family, spec, num_workers=workers, name="scaling/straggler") as pool:
        started(pool)
        rows = [straggling(pool, weights, family, share * workers, options) for share in (1, 4)]
    limit = 3 * max(row["call_seconds"] for row in rows)
    log(f"the same with sample_timeout_s = {limit:.1f} …")
    with Pool(family, spec, num_workers=workers, name="scaling/timeout", sample_timeout_s=limit) as pool:
        started(pool)
        for row in rows:
            missing, restarts = pool.timed_out, pool.restarts
            late = straggling(pool, weights, family, row["tasks"], options)
            lost = {"timed_out_tasks": pool.timed_out - missing, "restarts": pool.restarts - restarts}
            row["with_timeout"] = {"sample_timeout_s": limit, **late, **lost}
    return {"times_slower": STRAGGLER, "rows": rows}


def straggling(
    pool: Pool, weights: Mapping[str, Array], family: SleepingLine, tasks: int, options: Options
) -> dict[str, Any]:
    """Seconds of a call without and with one slow task in the middle, and of the call after it."""
    even = draw(family, tasks, options.step_ms)
    uneven = list(even)
    uneven[tasks // 2] = {**even[tasks // 2], "step_ms": STRAGGLER * options.step_ms}
    without, slow = (Calls(pool, weights, batch, options.episodes) for batch in (even, uneven))
    without(1 + options.repetitions)
    median = statistics.median(without.seconds[1:])
    slow()
    without()
    log(f"{tasks} tasks: a call takes {median:.2f} s, with a straggler {slow.seconds[0]:.2f} s")
    return {
        "tasks": tasks,
        "call_seconds": median,
        "straggler_call_seconds": slow.seconds[0],
        "times_longer": slow.seconds[0] / median,
        "next_call_seconds": without.seconds[-1],
    }


# --- Deaths -----------------------------------------------------------------------------------------------

WORKER_NAMES = ("ray::collect", "ray::RolloutWor")
"""How Ray names a worker's process, which plays or is free."""


class Killer(threading.Thread):
    """Ends the process of a random worker of this process's Ray with SIGKILL, again and again.

    Attributes:
        kills: how many so far.
    """

    def __init__(self, every_s: float) -> None:
        super().__init__(daemon=True)
        self.kills = 0
        self._every_s = every_s
        self._rng = np.random.default_rng(seed_for(0))
        self._enough = threading.Event()

    def run(self) -> None:
        while not self._enough.wait(self._every_s):
            # By name: the pool, which knows their numbers, belongs to the main thread.
            workers = [process.number for process in descendants() if process.name.startswith(WORKER_NAMES)]
            if workers:
                os.kill(workers[self._rng.integers(len(workers))], signal.SIGKILL)
                self.kills += 1

    def stop(self) -> None:
        self._enough.set()
        self.join()


@dataclass(frozen=True)
class Run:
    """Training: its iterations' metrics, its final weights and its seconds without the workers' start."""

    metrics: list[dict[str, Any]]
    weights: dict[str, Array]
    seconds: float

    @property
    def steps_per_second(self) -> float:
        return self.metrics[-1]["env_steps"] / self.seconds


def deaths(options: Options) -> dict[str, Any]:
    """A training run in which a worker dies every few seconds, and as many iterations of one that is left alone."""
    log(f"training with a death every {options.death_every_s:g} s …")
    killer = Killer(options.death_every_s)
    disturbed = run_training(options, lambda iterations, seconds: seconds < options.seconds, killer)
    log(f"{len(disturbed.metrics)} iterations, {killer.kills} deaths; the same undisturbed …")
    undisturbed = run_training(options, lambda iterations, seconds: iterations < len(disturbed.metrics), None)
    durations = {
        name: [metrics["seconds"]["total"] for metrics in run.metrics]
        for name, run in (("disturbed", disturbed), ("undisturbed", undisturbed))
    }
    return {
        "workers": options.most_workers,
        "iterations": len(disturbed.metrics),
        "kills": killer.kills,
        "restarts": disturbed.metrics[-1]["restarts"],
        "metrics_equal": comparable(disturbed) == comparable(undisturbed),
        "weights_equal": all(
            value.tobytes() == undisturbed.weights[name].tobytes() for name, value in disturbed.weights.items()
        ),
        "lost_tasks": sum(
            len(each["details"]["dropped_tasks"]) + each["timed_out_tasks"] for each in disturbed.metrics
        ),
        "steps_per_second": {"disturbed": disturbed.steps_per_second, "undisturbed": undisturbed.steps_per_second},
        "throughput_ratio": undisturbed.seconds / disturbed.seconds,
        "seconds_per_death": (disturbed.seconds - undisturbed.seconds) / max(killer.kills, 1),
        "iteration_seconds": {name: summary(values) | {"max": max(values)} for name, values in durations.items()},
    }


def run_training(options: Options, go_on: Callable[[int, float], bool], killer: Killer | None) -> Run:
    """Meta-train on the sleeping family while `go_on(iterations, seconds)`."""
    family, _ = family_and_spec(options)
    config = TrainConfig(task=family.name, policy=POLICY).replace(
        iterations=1000,  # its schedule's, beyond the end of either run
        meta_batch=options.most_workers,
        episodes=options.episodes,
        num_workers=options.most_workers,
    )
    trainer = MetaTrainer({**config.to_dict(), "task_distribution": family})
    try:
        trainer.pool.processes()
        if killer:
            killer.start()
        metrics: list[dict[str, Any]] = []
        begin = time.perf_counter()
        while go_on(len(metrics), time.perf_counter() - begin):
            metrics.append(trainer.step())
        seconds = time.perf_counter() - begin
        if killer:
            killer.stop()
        return Run(metrics, trainer.learner.weights(), seconds)
    finally:
        trainer.stop()


def comparable(run: Run) -> list[str]:
    """All that must not depend on deaths, to the last digit: everything but times and the count of restarts."""
    return [
        json.dumps({name: value for name, value in metrics.items() if name not in ("seconds", "restarts")})
        for metrics in run.metrics
    ]


PARTS: Mapping[str, Callable[[Options], Any]] = {
    "throughput": throughput,
    "step": step,
    "ray": ray_alone,
    "iteration": iteration,
    "straggler": straggler,
    "deaths": deaths,
}


def main(options: Options) -> None:
    if "learners" in options.show:
        if len(options.show) > 1:
            raise SystemExit("error: learners stands for itself: show it alone.")
        report("scaling", learners.table(options.out, options.tasks, options.learners, options.iterations))
        return
    results: dict[str, Any] = {}
    with redirect_stdout(sys.stderr):  # Ray reports deaths on stdout, which is the result's alone
        log("starting Ray …")
        learners.start(1 + options.most_workers)
        for part in options.show:
            log(f"{part} …")
            results[part] = PARTS[part](options)
        ray.shutdown()
    report("scaling", {**results, "options": asdict(options)})


if __name__ == "__main__":
    main(tyro.cli(Options))
