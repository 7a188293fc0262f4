"""What recursive self-improvement is worth, against the same experience spent otherwise.

    python benchmarks/rsi.py --show navigation-2d --seeds 0 1 2 3 4 5

Every job (a condition and a seed) leaves a `result.json` under `--out` and is not repeated while its settings are
the same; to measure one anew, delete its folder. Jobs without Ray Tune run the same decisions in process, `--jobs` at
a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import random  # Tune's own PBT draws from it  # noqa: TID251
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

# One thread a process, before NumPy and torch are loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import tyro
from _report import log, report
from ray import tune
from ray.tune import CheckpointConfig, RunConfig, TuneConfig, Tuner
from ray.tune.schedulers import PopulationBasedTraining

from ssm_metarl.algorithms.inputs import policy_inputs
from ssm_metarl.algorithms.policy import SSMPolicy
from ssm_metarl.algorithms.resize import resize
from ssm_metarl.algorithms.rollouts import Array
from ssm_metarl.algorithms.spec import PolicySpec
from ssm_metarl.algorithms.statistics import confidence_interval, interval_values
from ssm_metarl.config import TrainConfig
from ssm_metarl.distributed.cluster import start_ray
from ssm_metarl.distributed.train import train
from ssm_metarl.distributed.trainer import MetaTrainer
from ssm_metarl.evaluation.evaluate import evaluate_checkpoint
from ssm_metarl.storage.checkpoint import load_checkpoint, save_checkpoint
from ssm_metarl.storage.contents import Checkpoint
from ssm_metarl.tuning.evolution import Evolution
from ssm_metarl.tuning.evolve import evolve
from ssm_metarl.tuning.member_trainer import EvolvingTrainer
from ssm_metarl.tuning.metrics import Assessment, composite, metrics
from ssm_metarl.tuning.population import EvolveConfig, Report
from ssm_metarl.tuning.store import RunStore

TEST_TASKS = 100
"""Held-out tasks on which every snapshot is evaluated; not counted as experience."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A comparison: the family, the split that is reported, and how the population is run.

    Attributes:
        options: changes to `TrainConfig.for_task`.
        rules: of `EvolveConfig`.
    """

    task: str
    split: str
    options: Mapping[str, Any]
    rules: Mapping[str, Any]


# Small policies and small meta-batches, so that a generation is several iterations of a run that six seeds can afford.
COMPARISONS = {
    "navigation-2d": Setting(
        task="navigation-2d",
        split="test",
        options={"hidden_dim": 32, "state_dim": 16, "epochs": 3, "meta_batch": 8},
        rules={"population": 4, "generations": 6, "generation_steps": 160_000, "validation_episodes": 5},
    ),
    "cartpole": Setting(
        task="cartpole",
        split="shifted-test",
        options={"hidden_dim": 32, "state_dim": 16, "epochs": 3, "meta_batch": 8, "episodes": 4},
        rules={
            "population": 4,
            "generations": 4,
            "generation_steps": 100_000,
            "validation_tasks": 10,
            "validation_episodes": 3,
        },
    ),
}
CONTROL = Setting(
    task="navigation-2d",
    split="test",
    options={"state_dim": 2, "hidden_dim": 8, "outer_lr": 1e-3 / 30, "meta_batch": 8},
    rules={"population": 4, "generations": 10, "generation_steps": 160_000},
)
CYCLES = Setting(
    task="cartpole",
    split="test",
    options={"hidden_dim": 32, "state_dim": 16, "epochs": 3, "meta_batch": 8, "episodes": 4},
    rules={
        "population": 4,
        "generations": 3,
        "generation_steps": 120_000,
        "survivors": 1,
        "validation_episodes": 3,
    },
)
SHOWS = (*COMPARISONS, "control", "cycles", "resize", "overhead")


@dataclass(frozen=True)
class Options:
    """Compare recursive self-improvement with other uses of the same experience.

    Attributes:
        show: a comparison (navigation-2d, cartpole); control: from too small sizes and learning rate, with and
            without mutation; cycles: three cycles from an untrained policy, with and without mutation; resize: return
            just before and after each resize; overhead: share of wall time beside training, in the default run.
        seeds: of the runs.
        out: folder of jobs and results.
        jobs: at once, of those without Ray.
    """

    show: Annotated[str, tyro.conf.arg(constructor=tyro.extras.literal_type_from_choices(SHOWS))]
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    out: Path = Path("runs/benchmarks/rsi")
    jobs: int = 2


# --- Conditions ---------------------------------------------------------------------------------------------
# Each returns a curve: after every generation (environment steps of the whole population so far, mean test return of
# the policy that the condition would hand over then). That policy is by one rule for all: the best composite so far.

Curve = list[tuple[int, float]]


def base(setting: Setting, seed: int) -> TrainConfig:
    return TrainConfig.for_task(setting.task, **{**setting.options, "seed": seed, "learner_threads": 1})


def rules(setting: Setting) -> EvolveConfig:
    return EvolveConfig(**setting.rules)


def test_return(setting: Setting, checkpoint: Path) -> float:
    """After one inner step, on tasks equal for all conditions and seeds."""
    evaluation = evaluate_checkpoint(checkpoint, split=setting.split, num_tasks=TEST_TASKS, steps=1)
    return float(np.nanmean(evaluation.returns[:, 1]))


def drive(evolution: Evolution, at_border: Callable[[], None]) -> None:
    """The population in this process, one trial after the other: the same decisions as under Tune."""
    while not evolution.finished:
        for slot in evolution.living:
            while not (slot.ended or evolution.finished):
                trainer = EvolvingTrainer({**slot.config, "assignment": evolution.assignment(slot.id)})
                if path := evolution.start_path(slot.id):
                    trainer.load_checkpoint(str(path))
                answer = "continue"
                while answer == "continue":
                    answer = evolution.report(slot.id, Report(**trainer.step()["report"][0]))
                trainer.stop()
        if evolution.ready():
            evolution.advance()
            at_border()


def run_rsi(setting: Setting, seed: int, folder: Path, *, mutate: bool = True) -> dict[str, Any]:
    store = RunStore(folder)
    store.create()
    config = replace(rules(setting), mutate=mutate)
    evolution = Evolution(config, base(setting, seed).to_dict(), store)
    curve: Curve = []

    def snapshot() -> None:
        assert evolution.best
        steps = sum(slot.lifetime_steps for slot in evolution.slots)
        curve.append((steps, test_return(setting, store.checkpoints / evolution.best)))

    drive(evolution, snapshot)
    assert evolution.best
    events = store.events()
    initial = [e["composite"] for e in events if e["kind"] == "training" and e["generation"] == 0]
    kept = [event["after"] for event in events if event["decision"] == "kept"]
    best = evolution.archive[evolution.best]
    return {
        "curve": curve,
        "finished": evolution.finished,
        "kept": kept,
        "rolled_back": sum(event["decision"] == "rolled back" for event in events),
        "failures": sum(event["kind"] == "failure" for event in events),
        "first_composite": max(initial),
        "composite": best.composite,
        "config": {
            name: best.config[name] for name in ("state_dim", "hidden_dim", "num_layers", "inner_lr", "outer_lr")
        },
    }


def run_without_mutation(setting: Setting, seed: int, folder: Path) -> dict[str, Any]:
    return run_rsi(setting, seed, folder, mutate=False)


def run_single(setting: Setting, seed: int, folder: Path) -> dict[str, Any]:
    """No scheduler: one run with the whole budget."""
    return run_apart(setting, seed, folder, runs=1)


def run_best_of(setting: Setting, seed: int, folder: Path) -> dict[str, Any]:
    """No scheduler: P runs with other seeds, each with an equal share of the budget."""
    return run_apart(setting, seed, folder, runs=rules(setting).population)


def run_apart(setting: Setting, seed: int, folder: Path, runs: int) -> dict[str, Any]:
    """Runs that know nothing of each other, together as many steps a generation as a population.

    They are assessed after every generation for the rule that picks, but pay for only one round of assessments:
    without a scheduler nobody needs more.
    """
    config = rules(setting)
    store = RunStore(folder)
    store.create()
    evolution = Evolution(config, base(setting, seed).to_dict(), store)  # for its seeds and assignments
    budget = config.generation_steps * config.population // runs
    trainers = []
    for slot in evolution.slots[:runs]:
        work = {**evolution.assignment(slot.id), "budget": 0}
        trainers.append(EvolvingTrainer({**slot.config, "assignment": work}))
    curve: Curve = []
    best, trained, picked = -1.0, 0, store.checkpoints
    for generation in range(config.generations + 1):
        round_of_assessments = 0
        for trial, trainer in enumerate(trainers):
            answer = next_generation(trainer, trial, generation, budget if generation else 0)
            trained += answer["trained"]
            round_of_assessments += answer["spent"] - answer["trained"]
            value = 0.0 if answer["failure"] else _value(answer)
            if value > best:
                best, picked = value, store.checkpoints / answer["checkpoint"]
        curve.append((trained + round_of_assessments, test_return(setting, picked)))
    return {"curve": curve}


def next_generation(trainer: EvolvingTrainer, trial: int, generation: int, budget: int) -> dict[str, Any]:
    """Train a trainer on by a budget, assess it and write its checkpoint; its last report."""
    carry = trainer.assignment.budget - trainer._trained
    trainer.assignment = replace(trainer.assignment, generation=generation, trial=trial, budget=budget + carry)
    trainer._trained = trainer._spent = trainer._last = 0
    answer: dict[str, Any] = {"ended": False, "failure": None}
    while not (answer["ended"] or answer["failure"]):
        answer = EvolvingTrainer.step(trainer)["report"][0]
    return answer


class GenerationTrainer(EvolvingTrainer):
    """A trial of Tune's own PBT: a step is a generation, and what changes size is copied slice by slice."""

    def setup(self, config: dict[str, Any]) -> None:
        config = dict(config)
        # A trial that takes another's config keeps tasks of its own: PBT copies the whole config.
        config["seed"] = config.pop("seeds")[self._number()]
        super().setup(config)
        self._budget = self.assignment.budget
        self.assignment = replace(self.assignment, budget=0)

    def _number(self) -> int:
        return int(self.trial_id.rsplit("_", 1)[-1])

    def step(self) -> dict[str, Any]:
        generation, trial = self.training_iteration, self._number()
        answer = next_generation(self, trial, generation, self._budget if generation else 0)
        value = 0.0 if answer["failure"] else _value(answer)
        entry = {"generation": generation, "composite": value, "spent": answer["spent"], "name": answer["checkpoint"]}
        path = Path(self.assignment.checkpoints) / f"{generation:03d}-{trial}.json"
        path.write_text(json.dumps(entry))
        return {"composite": value}

    def _resized(self, loaded: Checkpoint) -> Checkpoint:
        policy, optimizer = slice_copy(loaded, self.spec, self.train_config.experience.seed)
        return Checkpoint(self.spec, loaded.config, loaded.progress, policy, optimizer)


def _value(answer: Mapping[str, Any]) -> float:
    """The composite without meta-efficiency, of which a trial that took another's checkpoint has no record."""
    values = metrics(Assessment.from_dict(answer["assessment"]))
    return composite({name: value for name, value in values.items() if name != "meta_efficiency"})


def slice_copy(loaded: Checkpoint, spec: PolicySpec, seed: int) -> tuple[dict[str, Array], dict[str, Array]]:
    """What AgileRL did to change a size: a new network, with the entries that both have copied; moments anew."""
    policy = SSMPolicy(spec, seed).numpy_weights()
    for name, value in policy.items():
        if name in loaded.policy:
            both = tuple(slice(min(sizes)) for sizes in zip(value.shape, loaded.policy[name].shape, strict=True))
            value[both] = loaded.policy[name][both]
    return policy, {}


def run_pbt(setting: Setting, seed: int, folder: Path, mutations: Mapping[str, Any]) -> dict[str, Any]:
    """Tune's own scheduler, synchronous, on the same composite."""
    config, snapshots = rules(setting), folder.resolve() / "snapshots"
    snapshots.mkdir(parents=True)
    store = RunStore(folder)
    evolution = Evolution(config, base(setting, seed).to_dict(), store)
    work = {**evolution.assignment(0), "budget": config.generation_steps, "checkpoints": str(snapshots)}
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (Tune's samplers)
    tuner = Tuner(
        GenerationTrainer,
        param_space={
            **evolution.slots[0].config,
            "slot": tune.grid_search([slot.id for slot in evolution.slots]),
            "seeds": [slot.config["seed"] for slot in evolution.slots],
            "assignment": work,
        },
        tune_config=TuneConfig(
            scheduler=PopulationBasedTraining(
                time_attr="training_iteration",
                metric="composite",
                mode="max",
                perturbation_interval=1,
                hyperparam_mutations=dict(mutations),
                synch=True,
                log_config=False,
            ),
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=RunConfig(
            name="tune",
            storage_path=str(folder.resolve()),
            stop={"training_iteration": config.generations + 1},
            checkpoint_config=CheckpointConfig(num_to_keep=None),
            verbose=0,
        ),
    )
    with contextlib.redirect_stdout(sys.stderr):  # Tune's table
        tuner.fit()
    entries = [json.loads(path.read_text()) for path in snapshots.glob("*.json")]
    curve: Curve = []
    for generation in range(config.generations + 1):
        past = [entry for entry in entries if entry["generation"] <= generation]
        best = max(past, key=lambda entry: entry["composite"])
        steps = sum(entry["spent"] for entry in past)
        curve.append((steps, test_return(setting, snapshots / best["name"])))
    return {"curve": curve}


RATES = {"inner_lr": tune.loguniform(1e-3, 10.0), "outer_lr": tune.loguniform(1e-6, 0.1)}
LADDERS = {
    "hidden_dim": [16, 24, 32, 48, 64, 80, 96, 128],
    "state_dim": [8, 16, 24, 32, 40, 48, 64],
    "num_layers": [1, 2],
}


def run_pbt_rates(setting: Setting, seed: int, folder: Path) -> dict[str, Any]:
    return run_pbt(setting, seed, folder, RATES)


def run_pbt_slices(setting: Setting, seed: int, folder: Path) -> dict[str, Any]:
    return run_pbt(setting, seed, folder, {**RATES, **LADDERS})


Job = Callable[[Setting, int, Path], dict[str, Any]]
CONDITIONS: Mapping[str, Job] = {
    "rsi": run_rsi,
    "single": run_single,
    "best_of_p": run_best_of,
    "pbt_rates": run_pbt_rates,
    "pbt_slices": run_pbt_slices,
    "no_mutation": run_without_mutation,
}
ON_RAY = ("pbt_rates", "pbt_slices")


# --- Jobs ---------------------------------------------------------------------------------------------------


def fingerprint(setting: Setting, seed: int) -> str:
    """Of everything that decides a result beside the code: a result with another one is measured again."""
    options = [base(setting, seed).to_dict(), asdict(rules(setting)), setting.split, TEST_TASKS]
    return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:16]


def perform(name: str, setting: Setting, seed: int, folder: Path) -> dict[str, Any]:
    """Do a job, unless its result is there."""
    done = folder / "result.json"
    key = fingerprint(setting, seed)
    if not done.exists() or json.loads(done.read_text())["fingerprint"] != key:
        torch.set_num_threads(1)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        begin = time.perf_counter()
        result = {"fingerprint": key, **CONDITIONS[name](setting, seed, folder)}
        result["seconds"] = time.perf_counter() - begin
        fresh = done.with_suffix(".tmp")
        fresh.write_text(json.dumps(result))
        fresh.replace(done)
        log(f"{name}, seed {seed}: {result['curve'][-1]}, {result['seconds']:.0f} s")
    return json.loads(done.read_text())


def perform_all(names: Sequence[str], setting: Setting, options: Options) -> dict[str, list[dict[str, Any]]]:
    """Results by condition, in the order of the seeds."""
    out = options.out / options.show
    jobs = [(name, setting, seed, out / name / f"seed-{seed}") for name in names for seed in options.seeds]
    apart = [job for job in jobs if job[0] not in ON_RAY]
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        pool.starmap(perform, apart, chunksize=1)
    if len(apart) < len(jobs):
        start_ray(0, always=True)
    return {name: [perform(*job) for job in jobs if job[0] == name] for name in names}


def interval(samples: Sequence[float]) -> dict[str, float | None]:
    found = interval_values(*confidence_interval(np.array(samples, np.float64)))
    return {"mean": found.pop("value"), **found}


def area(curve: Curve, steps: int) -> tuple[float, float]:
    """Mean height under a curve from 0 to `steps`, and its height there."""
    xs, ys = np.array(curve, np.float64).T
    grid = np.linspace(0, steps, 1001)
    heights = np.interp(grid, xs, ys)
    return float(heights.mean()), float(heights[-1])


def compare(setting: Setting, options: Options) -> dict[str, Any]:
    names = list(CONDITIONS)
    results = perform_all(names, setting, options)
    summary: dict[str, Any] = {"split": setting.split, "rules": dict(setting.rules), "seeds": list(options.seeds)}
    areas: dict[str, list[float]] = {name: [] for name in names}
    finals: dict[str, list[float]] = {name: [] for name in names}
    for i in range(len(options.seeds)):
        # A run that was stopped early hands over what it has: its curve goes on level.
        whole = [n for n in names if len(results[n][i]["curve"]) == rules(setting).generations + 1]
        common = min(results[name][i]["curve"][-1][0] for name in whole)
        for name in names:
            under, final = area([tuple(point) for point in results[name][i]["curve"]], common)
            areas[name].append(under)
            finals[name].append(final)
    for name in names:
        summary[name] = {
            "env_steps": [result["curve"][-1][0] for result in results[name]],
            "final": interval(finals[name]),
            "area": interval(areas[name]),
        }
    summary["rsi"] |= decisions(results["rsi"])
    summary["rsi_less"] = {
        name: {
            "final": interval(np.subtract(finals["rsi"], finals[name]).tolist()),
            "area": interval(np.subtract(areas["rsi"], areas[name]).tolist()),
        }
        for name in names[1:]
    }
    return summary


def decisions(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    sizes = ("state_dim", "hidden_dim", "num_layers")
    return {
        "kept": [len(result["kept"]) for result in results],
        "kept_size_changes": [sum(any(n in sizes for n in after) for after in result["kept"]) for result in results],
        "kept_rate_changes": [sum(any("lr" in n for n in after) for after in result["kept"]) for result in results],
        "rolled_back": [result["rolled_back"] for result in results],
        "failures": [result["failures"] for result in results],
        "finished": [result["finished"] for result in results],
        "config": [result["config"] for result in results],
    }


def with_and_without(setting: Setting, options: Options) -> dict[str, Any]:
    """The same command with mutation and without."""
    results = perform_all(("rsi", "no_mutation"), setting, options)
    summary: dict[str, Any] = {"split": setting.split, "rules": dict(setting.rules), "seeds": list(options.seeds)}
    measures: Mapping[str, Callable[[Mapping[str, Any]], float]] = {
        "final": lambda result: result["curve"][-1][1],
        "composite": lambda result: result["composite"],
        "composite_raised_by": lambda result: result["composite"] - result["first_composite"],
    }
    for name, measure in measures.items():
        ours, theirs = ([measure(result) for result in results[condition]] for condition in results)
        summary[name] = {
            "with_mutation": interval(ours),
            "without": interval(theirs),
            "difference": interval(np.subtract(ours, theirs).tolist()),
        }
    return {**summary, **decisions(results["rsi"])}


# --- Resizes ------------------------------------------------------------------------------------------------

RESIZES: Mapping[str, Mapping[str, int]] = {
    "state +25 %": {"state_dim": 40},
    "width +25 %": {"hidden_dim": 80},
    "depth +1": {"num_layers": 2},
    "state -25 %": {"state_dim": 24},
    "state -33 %": {"state_dim": 22},
    "state -50 %": {"state_dim": 16},
    "width -25 %": {"hidden_dim": 48},
    "width -33 %": {"hidden_dim": 42},
    "width -50 %": {"hidden_dim": 32},
}


def resizes(options: Options) -> dict[str, Any]:
    """Return just before and just after each resize of a trained policy, by three ways to do it."""
    rows: dict[str, dict[str, list[list[float]]]] = {}
    for seed in options.seeds:
        folder = options.out / "resize" / f"seed-{seed}"
        config = TrainConfig.for_task("navigation-2d", seed=seed, iterations=12)
        if not (folder / "run" / "checkpoint_000012").is_dir():
            shutil.rmtree(folder, ignore_errors=True)
            train(config, folder / "run")
        loaded = load_checkpoint(folder / "run" / "checkpoint_000012")
        rows.setdefault("before", {}).setdefault("", []).append(returns(folder / "run" / "checkpoint_000012"))
        probe, starts = probe_inputs(config, loaded)
        for label, change in RESIZES.items():
            spec = replace(loaded.spec, **change)
            ways = {
                "function-preserving": resize(
                    loaded.spec, loaded.policy, loaded.optimizer, spec, probe, seed, starts
                ).policy,
                "slice copy": slice_copy(loaded, spec, seed + 1)[0],
                "re-initialised": SSMPolicy(spec, seed + 1).numpy_weights(),
            }
            for way, policy in ways.items():
                path = save_checkpoint(
                    folder / "resized", Checkpoint(spec, {**loaded.config, **change}, loaded.progress, policy, {})
                )
                rows.setdefault(label, {}).setdefault(way, []).append(returns(path))
                log(f"seed {seed}, {label}, {way}: {rows[label][way][-1]}")
    return {
        label: {way: [interval(slot) for slot in np.array(values).T] for way, values in ways.items()}
        for label, ways in rows.items()
    }


def returns(checkpoint: Path) -> list[float]:
    """Mean test return before and after one inner step."""
    evaluation = evaluate_checkpoint(checkpoint, num_tasks=TEST_TASKS, steps=1)
    return [float(value) for value in np.nanmean(evaluation.returns, 0)]


def probe_inputs(config: TrainConfig, loaded: Checkpoint) -> tuple[Array, Array]:
    trainer = MetaTrainer(config.to_dict())
    tasks = trainer.distribution.sample(10, np.random.default_rng(0))
    rollouts = trainer.pool.collect(loaded.policy, tasks, [np.random.SeedSequence(i) for i in range(10)], 2)
    trainer.stop()
    return policy_inputs(loaded.spec, rollouts), rollouts.resets


def overhead(options: Options) -> dict[str, Any]:
    """The default run of `evolve`: where its wall time goes."""
    folder = options.out / "overhead"
    shutil.rmtree(folder, ignore_errors=True)
    config = TrainConfig.for_task("navigation-2d", learner_threads=1)
    seconds = evolve(config, EvolveConfig(), folder).state["seconds"]
    processors = min(EvolveConfig().population, os.cpu_count() or 1)
    available = seconds["wall"] * processors
    return {
        "seconds": seconds,
        "assessment_and_checkpoints_share": seconds["assessment"] / (seconds["assessment"] + seconds["training"]),
        "scheduling_and_waiting_share": 1 - (seconds["training"] + seconds["assessment"]) / available,
        "beside_training_share": 1 - seconds["training"] / available,
    }


def main(options: Options) -> None:
    if options.show in COMPARISONS:
        result = compare(COMPARISONS[options.show], options)
    elif options.show == "control":
        result = with_and_without(CONTROL, options)
    elif options.show == "cycles":
        result = with_and_without(CYCLES, options)
    else:
        result = resizes(options) if options.show == "resize" else overhead(options)
    report("rsi", {"show": options.show, **result})


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
