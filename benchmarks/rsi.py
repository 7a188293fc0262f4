"""What self-improvement brings against the same experience spent otherwise.

    python benchmarks/rsi.py --show random-starts --processes 2
    python benchmarks/rsi.py --show recommended
    python benchmarks/rsi.py --show bad-size
    python benchmarks/rsi.py --show changed-world
    python benchmarks/rsi.py --show wall-time

Every method gets the same number of environment steps, all members, losers and assessments counted; the policy that it
hands over is played on test tasks, as deployed. A job (family, start, method) that is done is read from `--runs`, with
the commit that did it, so that an interrupted benchmark resumes; delete its line to measure it anew. But for
`wall-time`, members take turns in one process: decisions do not depend on the order of their reports.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import tyro
from _report import commit, keep_run, kept_runs, log, report

from ssm_metarl.algorithms.rollouts import Rollouts
from ssm_metarl.algorithms.statistics import (
    confidence_interval,
    interquartile_mean,
    interval_values,
    percentile_interval,
)
from ssm_metarl.config import TrainConfig, available_cores
from ssm_metarl.distributed.train import train
from ssm_metarl.distributed.trainer import MetaTrainer
from ssm_metarl.evaluation.evaluate import evaluate_checkpoint
from ssm_metarl.storage.checkpoint import load_checkpoint
from ssm_metarl.storage.run_folder import resolve_checkpoint
from ssm_metarl.tasks import TaskDistribution, make
from ssm_metarl.tuning.config import EvolveConfig
from ssm_metarl.tuning.evolve import evolve
from ssm_metarl.tuning.member_trainer import MemberTrainer
from ssm_metarl.tuning.metrics import normalise
from ssm_metarl.tuning.run import MACHINE, Run, open_run

TEST_TASKS = 40

RANDOM = {"outer_lr": (1e-5, 3e-2), "inner_lr": (0.005, 1.0), "epochs": (1, 8)}
"""Ranges of a random start, log-uniform."""

SIZES = ("state_dim", "hidden_dim", "num_layers")


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of tasks, and how long a run of it is.

    Attributes:
        task, options: of `TrainConfig.for_task`.
        steps: environment steps of a run.
    """

    task: str
    steps: float
    options: Mapping[str, Any] = field(default_factory=dict)

    def config(self, seed: int, **options: Any) -> TrainConfig:
        """The recommended options of a run in one process, with a constant learning rate."""
        single = {"num_workers": 0, "learner_threads": 1, "device": "cpu", "lr_schedule": "constant", "seed": seed}
        return TrainConfig.for_task(self.task, **{**single, **self.options, **options})


FAMILIES = {
    "navigation-2d": Family(task="navigation-2d", steps=2.9e6),
    "cartpole": Family(task="cartpole", steps=1.5e6),
    "pendulum": Family(
        task="gym:Pendulum-v1",
        steps=1.2e6,
        options={"task_ranges": {"g": [5.0, 15.0]}, "meta_batch": 10, "episodes": 10},
    ),
    "repeat-previous": Family(task="repeat-previous", steps=4e6, options={"task_options": {"difficulty": "medium"}}),
}


STEPS = {("bad-size", "navigation-2d"): 3.2e6}
"""Environment steps of a run where they are other than the family's."""


def steps_of(show: str, family: str) -> float:
    """Environment steps of a run."""
    return STEPS.get((show, family), FAMILIES[family].steps)


@dataclass(frozen=True)
class World:
    """A trained policy, and the tasks that it meets from now on.

    Attributes:
        start: its checkpoint.
        family: of the tasks.
    """

    start: str
    family: TaskDistribution


class Shifted:
    """A family whose tasks are all from the ranges of its split "shifted-test", far outside those of its training."""

    def __init__(self, name: str) -> None:
        self._family = make(name)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._family, name)

    def sample(self, count: int, rng: np.random.Generator, split: str = "train") -> list[Any]:
        """Other tasks for each split, by its random numbers."""
        return self._family.sample(count, rng, "shifted-test")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of one method."""

    show: str
    family: str
    start: int
    method: str

    @property
    def key(self) -> str:
        """Its name in the file of results."""
        return f"{self.show} {self.family} {self.start} {self.method}"


# --- Methods: each uses up `steps` and leaves a checkpoint -------------------------------------------------


class _Exchange:
    """Members of one process hand each other rollouts."""

    def __init__(self) -> None:
        self._offered: tuple[str, Sequence[Rollouts]] = ("", ())

    def __deepcopy__(self, memo: object) -> _Exchange:
        return self  # Trainable copies its config

    def threads(self, member: int) -> int | None:
        return None

    def offer(self, key: str, rollouts: Sequence[Rollouts]) -> None:
        self._offered = (key, list(rollouts))

    def fetch(self, key: str) -> Sequence[Rollouts]:
        return self._offered[1] if self._offered[0] == key else ()


def improve(run: Run) -> None:
    """Play a population to its end in this process, member after member."""
    population, exchange, members = run.population, _Exchange(), dict[int, MemberTrainer]()
    machine = {name: value for name, value in run.config.to_dict().items() if name in MACHINE}
    population.begin()
    while not population.finished:
        works = {}
        for member, assignment in dict(population.assignments).items():
            if member not in members:
                members[member] = MemberTrainer(
                    {
                        "member": member,
                        "exchange": exchange,
                        "archive": population.store.archive,
                        "mean_iterations": population.config.mean_iterations,
                        "machine": machine,
                        "task_distribution": run.family,
                    }
                )
            works[member] = members[member].carry_out(assignment)
        for member, work in works.items():
            for each in work:
                population.report(member, each)
    for trainer in members.values():
        trainer.cleanup()


def evolved(
    config: TrainConfig, steps: float, folder: Path, world: World | None = None, **rules: Any
) -> dict[str, Any]:
    """Self-improvement with the whole budget."""
    start, family = (world.start, world.family) if world else (None, None)
    run = open_run(config, EvolveConfig(budget=steps, cycles=0, **rules), folder, start, distribution=family)
    improve(run)
    spent, path = run.population.progress.spent, run.population.incumbent.path
    return {
        "checkpoint": run.export(),
        "spent": spent["total"],
        "losers": spent["losers"] / spent["total"],
        "assessments": spent["assessments"] / spent["total"],
        "races": run.population.progress.cycle,
        "path": path[1:],
    }


def single(config: TrainConfig, steps: float, folder: Path, world: World | None = None) -> dict[str, Any]:
    """One run with all steps."""
    trainer = MetaTrainer.of_run(config, world.family if world else None)
    if world:
        trainer.start_from(load_checkpoint(resolve_checkpoint(world.start)))
    while trainer.env_steps < steps:
        try:
            trainer.step()
        except FloatingPointError:  # it diverged: what it has is what it hands over
            break
        # The learning rate's schedule ends with the steps, whatever an iteration turns out to play.
        allowed = round(steps / trainer.env_steps * trainer.meta_iteration)
        trainer.train_config = trainer.train_config.replace(iterations=max(allowed, trainer.meta_iteration))
    trainer.save_checkpoint(str(folder))
    trainer.cleanup()
    return {"checkpoint": folder, "spent": trainer.env_steps}


def single_linear(config: TrainConfig, steps: float, folder: Path, world: World | None = None) -> dict[str, Any]:
    """One run with all steps whose learning rate falls to 0, as the recommended options have it."""
    return single(config.replace(lr_schedule="linear"), steps, folder, world)


def unchanged(config: TrainConfig, steps: float, folder: Path, world: World) -> dict[str, Any]:
    """The policy as it was before the world changed."""
    return {"checkpoint": resolve_checkpoint(world.start), "spent": 0}


def asha(config: TrainConfig, steps: float, folder: Path) -> dict[str, Any]:
    """Random search with Tune's ASHA: as many random configurations as the steps allow."""
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    scheduler = ASHAScheduler(time_attr="env_steps", max_t=int(steps / 3), grace_period=int(steps / 27))
    space = {
        "outer_lr": tune.loguniform(*RANDOM["outer_lr"]),
        "inner_lr": tune.loguniform(*RANDOM["inner_lr"]),
        "epochs": tune.qloguniform(*RANDOM["epochs"], 1),
    }
    return _tuned(config, steps, folder, scheduler, space, num_samples=1000)


def pbt(config: TrainConfig, steps: float, folder: Path) -> dict[str, Any]:
    """Tune's PBT: four members, the first with the start's options, the others random."""
    from ray import tune
    from ray.tune.schedulers import PopulationBasedTraining

    rng = np.random.default_rng(config.experience.seed)
    drawn = [{name: config.to_dict()[name] for name in RANDOM}, *(random_options(rng) for _ in range(3))]
    mutations = {
        "outer_lr": tune.loguniform(*RANDOM["outer_lr"]),
        "inner_lr": tune.loguniform(*RANDOM["inner_lr"]),
        "epochs": list(range(1, 9)),
    }
    scheduler = PopulationBasedTraining(
        time_attr="env_steps", perturbation_interval=int(steps / 24), hyperparam_mutations=mutations
    )
    return _tuned(config, steps, folder, scheduler, {"drawn": tune.grid_search(drawn)}, num_samples=1)


def _tuned(
    config: TrainConfig, steps: float, folder: Path, scheduler: Any, space: Mapping[str, Any], num_samples: int
) -> dict[str, Any]:
    import ray
    from ray import tune

    spent: dict[str, int] = {}

    # Within the function: a job's process is not the one whose main module Ray's workers could load it from.
    class Tuned(MetaTrainer):
        """A `MetaTrainer` whose drawn options are in one entry or each in its own."""

        def setup(self, config: dict[str, Any]) -> None:
            config = {**config}
            config |= config.pop("drawn", {})
            super().setup({**config, "epochs": int(config["epochs"])})

    class Spent(tune.Stopper):
        def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
            spent[trial_id] = max(spent.get(trial_id, 0), int(result["env_steps"]))
            return False

        def stop_all(self) -> bool:
            return sum(spent.values()) >= steps

    os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0"}
    if not ray.is_initialized():
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    base = {name: value for name, value in config.to_dict().items() if name not in space}
    results = tune.Tuner(
        Tuned,
        param_space={**base, **space},
        tune_config=tune.TuneConfig(
            scheduler=scheduler, metric="return_after", mode="max", num_samples=num_samples, reuse_actors=True
        ),
        run_config=tune.RunConfig(
            name="tuned",
            storage_path=str(folder),
            stop=Spent(),
            verbose=0,
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=True),
        ),
    ).fit()
    done = [result for result in results if result.checkpoint is not None and result.metrics]
    most = max(result.metrics["env_steps"] for result in done)
    # Of those that came far: a lucky first iteration is no measure.
    far = [result for result in done if result.metrics["env_steps"] >= most / 3]
    best = max(far, key=lambda result: result.metrics["return_after"])
    return {"checkpoint": Path(best.checkpoint.path), "spent": sum(spent.values()), "trials": len(results)}


# --- Shows ------------------------------------------------------------------------------------------------


def random_options(rng: np.random.Generator) -> dict[str, Any]:
    """A draw from `RANDOM`."""
    drawn = {name: float(np.exp(rng.uniform(*np.log(bounds)))) for name, bounds in RANDOM.items()}
    return {**drawn, "epochs": round(drawn["epochs"])}


def run_job(job: Job) -> dict[str, Any]:
    """One job; its result as JSON values."""
    os.environ |= {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    family, begin = FAMILIES[job.family], time.perf_counter()
    steps, options, rules = steps_of(job.show, job.family), dict[str, Any](), dict[str, Any]()
    if job.show == "random-starts":
        options = random_options(np.random.default_rng(1000 + job.start))
    if job.show == "bad-size":
        options = {"state_dim": 2, "hidden_dim": 8}
        if job.family == "navigation-2d":
            options["outer_lr"] = family.config(0).meta.outer_lr / 30
    if job.method == "evolve, sizes frozen":
        rules["evolve"] = tuple(name for name in EvolveConfig().evolve if name not in SIZES)
    world = None
    if job.show == "changed-world":
        world = World(f"pretrained:{job.family}", cast(TaskDistribution, Shifted(job.family)))
        trained = load_checkpoint(resolve_checkpoint(world.start)).config
        kept = ("lr_schedule", "num_workers", "learner_threads", "device", "seed", "task", "iterations")
        options = {name: value for name, value in trained.items() if name not in kept}
        rules["world"] = world
    config = family.config(job.start, **options)
    others: dict[str, Callable[..., dict[str, Any]]] = {
        "single": single,
        "single, linear": single_linear,
        "asha": asha,
        "pbt": pbt,
        "unchanged": unchanged,
    }
    folder = Path(tempfile.mkdtemp())
    try:
        found = others.get(job.method, evolved)(config, steps, folder / "run", **rules)
        experience = config.experience
        evaluation = evaluate_checkpoint(
            found["checkpoint"],
            num_tasks=TEST_TASKS,
            steps=config.meta.inner_steps,
            episodes=experience.episodes,
            **({"distribution": world.family} if world else {}),
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found.pop("checkpoint")
    returns = evaluation.returns / experience.trial_episodes
    family_reference = config.family().reference
    return {
        "returns": np.nanmean(evaluation.returns, 0).tolist(),
        "normalised": [
            round(float(each), 4)
            for each in normalise(np.nan_to_num(returns[:, -1], nan=family_reference.random), family_reference)
        ],
        "options": {} if world else options,
        "seconds": time.perf_counter() - begin,
        **found,
    }


def jobs(options: Options) -> list[Job]:
    """The jobs of a comparison, those of one start after another."""
    plan: dict[str, tuple[Sequence[str], Sequence[str]]] = {
        "random-starts": (("navigation-2d", "cartpole", "pendulum"), ("evolve", "single", "asha", "pbt")),
        "recommended": (("navigation-2d", "cartpole", "pendulum"), ("evolve", "single", "single, linear")),
        "changed-world": (("navigation-2d", "cartpole"), ("evolve", "single", "unchanged")),
        "bad-size": (("repeat-previous", "navigation-2d"), ("evolve", "evolve, sizes frozen", "single")),
    }
    families, methods = plan[options.show]
    return [
        Job(show=options.show, family=family, start=start, method=method)
        for family in families
        if not options.families or family in options.families
        for start in options.starts
        for method in methods
        if not options.methods or method in options.methods
    ]


def carry_out(options: Options) -> dict[str, dict[str, Any]]:
    """All jobs that are not done, and the results of all, by key."""
    done, at = kept_runs(options.runs), commit()
    todo = [job for job in jobs(options) if job.key not in done]
    with ProcessPoolExecutor(
        options.processes, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1
    ) as pool:
        futures = {pool.submit(run_job, job): job for job in todo}
        for future in as_completed(futures):
            job = futures[future]
            try:
                result = future.result()
            except Exception as error:  # the others go on; it is tried again the next time
                log(f"{job.key}: {error!r}")
                continue
            done[job.key] = keep_run(options.runs, job.key, at, result)
            log(f"{job.key}: {result['returns'][-1]:.2f}, {result['seconds']:.0f} s")
    return {job.key: done[job.key] for job in jobs(options) if job.key in done}


TITLES = {
    "random-starts": "Random learning rates, step sizes and epochs: return after equal steps",
    "recommended": "From the recommended options: return after equal steps",
    "bad-size": "From a policy that is too small",
    "changed-world": "A trained policy meets other tasks",
}


GOALS = {
    ("random-starts", "navigation-2d"): -15.5,
    ("bad-size", "navigation-2d"): -16.0,
    ("bad-size", "repeat-previous"): 0.9,
}
"""Least mean return of `evolve`."""

LEAST_LEADS = {
    ("recommended", "single"): -0.03,
    ("recommended", "single, linear"): -0.03,
    ("changed-world", "single"): 0.0,
    ("changed-world", "unchanged"): 0.0,
}
"""By how much the normalised return of `evolve` must at least be above that of another method, on average over runs."""

MOST_LOSERS = 0.2
"""Share of all steps that losers may cost from the recommended options."""


def goals_of(options: Options, results: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What `evolve` was to reach, and whether it did; leads are of the same starts."""
    goals = list[dict[str, Any]]()

    def goal(row: str, column: str, values: list[float], bound: float, most: bool = False) -> None:
        if values:
            found, mean = _mean(values), float(np.mean(values))
            met = mean <= bound if most else mean >= bound
            goals.append({"row": row, "column": column, "bound": bound, "most": most, **(found or {}), "met": met})

    for family in dict.fromkeys(job.family for job in jobs(options)):
        done = {
            start: {job.method: results[job.key] for job in jobs(options) if (job.family, job.start) == (family, start)}
            for start in options.starts
            if all(job.key in results for job in jobs(options) if (job.family, job.start) == (family, start))
        }
        evolved_runs = [found["evolve"] for found in done.values() if "evolve" in found]
        if (bound := GOALS.get((options.show, family))) is not None:
            goal("`evolve`", family, [found["returns"][-1] for found in evolved_runs], bound)
        for (show, other), bound in LEAST_LEADS.items():
            pairs = [(found["evolve"], found[other]) for found in done.values() if {"evolve", other} <= set(found)]
            leads = [float(np.mean(one["normalised"]) - np.mean(two["normalised"])) for one, two in pairs]
            goal(f"`evolve` less {other}, normalised", family, leads if show == options.show else [], bound)
        if options.show == "recommended":
            goal("share of losers", family, [found["losers"] for found in evolved_runs], MOST_LOSERS, most=True)
    return goals


def compared(options: Options) -> dict[str, Any]:
    """A row a method: return by family, and the interquartile mean of normalised returns over all, with intervals."""
    results, plan = carry_out(options), jobs(options)
    families, methods = (list(dict.fromkeys(getattr(job, name) for job in plan)) for name in ("family", "method"))
    rows, costs = [], {}
    for method in methods:
        done = {job: results[job.key] for job in plan if job.method == method and job.key in results}
        cells = [_mean([each["returns"][-1] for job, each in done.items() if job.family == name]) for name in families]
        scores = [
            [float(np.mean(each["normalised"])) for job, each in done.items() if job.family == name]
            for name in families
        ]
        rows.append({"name": method, "cells": [*cells, _interquartile(scores)]})
        costs[method] = {
            key: round(float(np.mean([each[key] for each in done.values()])), 3)
            for key in ("losers", "assessments", "races", "seconds", "spent")
            if done and all(key in each for each in done.values())
        }
    each = {key: {"return": found["returns"][-1], "path": found.get("path", [])} for key, found in results.items()}
    columns = [f"{name} ({steps_of(options.show, name) / 1e6:g} M steps)" for name in families]
    ahead = [apart(rows[0], other) for other in rows[1:]] if options.show == "random-starts" else []
    return {
        "goals": goals_of(options, results) + [goal for goal in ahead if goal],
        "title": TITLES[options.show],
        "seeds": list(options.starts),
        "columns": [*columns, "all, normalised (IQM)"],
        "rows": rows,
        "costs": costs,
        "each": each,
        "notes": [f"Runs of commit {', '.join(sorted({each['commit'] for each in results.values()}))}."],
    }


def _mean(values: list[float]) -> dict[str, float | None] | None:
    """Mean over starts with Student's interval; None without any."""
    return interval_values(*confidence_interval(np.array(values))) if values else None


def _interquartile(families: Sequence[Sequence[float]]) -> dict[str, float | None] | None:
    """Interquartile mean over all runs; for its interval runs are drawn anew within each family (Agarwal et al. 2021,
    arXiv 2108.13264)."""
    scores, rng = [np.array(each) for each in families if each], np.random.default_rng(0)
    if not scores:
        return None
    drawn = [
        interquartile_mean(np.concatenate([rng.choice(each, len(each)) for each in scores])[:, None])
        for _ in range(2000)
    ]
    value = interquartile_mean(np.concatenate(scores)[:, None])
    return interval_values(value, *percentile_interval(np.array(drawn), value, max(2, *map(len, scores))))


def apart(row: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any] | None:
    """The goal that the aggregate of a row lies above that of another with disjoint intervals."""
    (*_, own), (*_, theirs) = row["cells"], other["cells"]
    if own is None or theirs is None:
        return None
    met = own["ci_low"] is not None and theirs["ci_high"] is not None and own["ci_low"] > theirs["ci_high"]
    name = f"`{row['name']}`, apart from `{other['name']}`"
    return {
        "row": name,
        "column": "all, normalised (IQM)",
        "bound": theirs["ci_high"],
        "most": False,
        **own,
        "met": met,
    }


class Sleeping:
    """Navigation where every step takes a while and no processor, as on a cluster with a processor for each member."""

    seconds = 0.01

    def __init__(self) -> None:
        self._family = make("navigation-2d")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._family, name)

    def make_vector_env(self, tasks: Sequence[Any], count: int) -> Any:
        """The family's, with a step that sleeps first."""
        env = self._family.make_vector_env(tasks, count)
        step = env.step

        def slow(actions: Any) -> Any:
            time.sleep(self.seconds)
            return step(actions)

        env.step = slow
        return env


MOST_TIMES = {"this machine": 1.4, "a processor for each member": 1.1}
"""Wall time of `evolve` as a multiple of that of one run, at most."""


def wall_time(options: Options) -> dict[str, Any]:
    """Wall time of a real `evolve` in Ray Tune against one run: on this machine, and with sleeping environments."""
    import ray

    seconds: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        steps, family = FAMILIES["navigation-2d"].steps / 2, FAMILIES["navigation-2d"]
        result = evolve(family.config(0), EvolveConfig(budget=steps, cycles=0), folder / "evolve")
        ray.shutdown()
        spent, begin = result.state["progress"]["spent"]["total"], time.perf_counter()
        config = TrainConfig.for_task("navigation-2d", lr_schedule="constant", num_workers=available_cores())
        iterations = round(spent / (spent_by_iteration(result.state)))
        train(config.replace(iterations=iterations), folder / "train")
        seconds["this machine"] = result.seconds, time.perf_counter() - begin
        ray.shutdown()
        log(str(seconds))
        ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
        slow = cast(TaskDistribution, Sleeping())
        config = family.config(0, meta_batch=2, episodes=2)
        result = evolve(config, EvolveConfig(cycles=6), folder / "slow", distribution=slow)
        own = int(result.state["incumbent"]["iteration"])
        begin = time.perf_counter()
        train(config.replace(iterations=own), folder / "slow-train", distribution=slow)
        seconds["a processor for each member"] = result.seconds, time.perf_counter() - begin
    times = {name: evolved / alone for name, (evolved, alone) in seconds.items()}
    return {
        "title": "Wall time of self-improvement, and of one run",
        "columns": ["`evolve`, s", "one run, s", "times"],
        "rows": [{"name": name, "cells": [*pair, times[name]]} for name, pair in seconds.items()],
        "goals": [
            {"row": "`evolve`, times one run", "column": name, "bound": bound, "most": True, "mean": times[name]}
            | {"met": times[name] <= bound}
            for name, bound in MOST_TIMES.items()
        ],
        "notes": [
            f"On this machine: {spent:,} steps of navigation-2d, one run with a worker for each core. "
            f"With a processor for each member: steps that sleep {Sleeping.seconds:g} s, {own} iterations of the "
            "incumbent's own in six races and stretches.",
        ],
    }


def spent_by_iteration(state: Mapping[str, Any]) -> float:
    """Environment steps of a meta-iteration of the incumbent."""
    return float(state["incumbent"]["env_steps"] / state["incumbent"]["iteration"])


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare self-improvement with other uses of the same experience.

    Attributes:
        show: which comparison.
        families: some of its families; none: all.
        methods: some of its methods; none: all.
        starts: seeds, and for random starts their numbers.
        processes: jobs side by side.
        runs: file with a line for each job that is done.
    """

    show: Literal["random-starts", "recommended", "bad-size", "changed-world", "wall-time"] = "random-starts"
    families: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    starts: tuple[int, ...] = tuple(range(10))
    processes: int = 2
    runs: Path = Path("benchmarks/results/rsi-runs.jsonl")


if __name__ == "__main__":
    chosen = tyro.cli(Options, description=__doc__)
    found = wall_time(chosen) if chosen.show == "wall-time" else compared(chosen)
    report("rsi", {"show": chosen.show, **found})
