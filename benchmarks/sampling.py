"""Environment steps a second that the pool collects, in process and with one and two workers.

One call of the pool is a meta-batch as in training, the family's default policy at its initial weights. In
the headline all tasks act with the same weights, as for support rollouts; under `own_weights` each has its
own, as for query rollouts; under `large_batch` there are four times as many tasks with the same weights, so
that what a call costs whatever its size weighs less.

For a family that runs on MuJoCo, `mujoco_rollout` has the steps a second of the bare `mujoco.rollout`, measured
in turns with the pools: as many environments and threads, whole episodes of drawn actions in one call, so without
policy, observations, rewards or episode ends. `pool_vs_rollout` is what of it each pool reaches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from itertools import count
from typing import Any

import numpy as np
import tyro
from _report import log, report, timings

from ssm_metarl.algorithms.policy import SSMPolicy
from ssm_metarl.algorithms.rollouts import Array
from ssm_metarl.config import TrainConfig
from ssm_metarl.distributed.cluster import start_ray
from ssm_metarl.distributed.pool import Pool
from ssm_metarl.seeds import seed_for
from ssm_metarl.tasks import Task, make
from ssm_metarl.tasks.mujoco import MujocoFamily, load_model


@dataclass(frozen=True)
class Options:
    """Measure sampling.

    Attributes:
        task: the family.
        meta_batch: tasks of a call.
        episodes: a task.
        repetitions: measured turns.
        workers: of each pool; 0 is in process, and without any other there is no Ray.
    """

    task: str = "navigation-2d"
    meta_batch: int = 20
    episodes: int = 20
    repetitions: int = 15
    workers: tuple[int, ...] = (0, 1, 2)


class Sampling:
    """The same sequence of meta-batches for every pool, and the number of steps that it got from them.

    Args:
        pool: who collects.
        weights: to act with.
        tasks: a meta-batch.
        episodes: a task.
    """

    def __init__(self, pool: Pool, weights: Mapping[str, Array], tasks: list[Task], episodes: int) -> None:
        self.pool, self.weights, self.tasks, self.episodes = pool, weights, tasks, episodes
        self.turn = count()
        self.steps: list[int] = []

    def __call__(self) -> None:
        turn = next(self.turn)
        seeds = [seed_for(0, turn, task) for task in range(len(self.tasks))]
        # The pool sends a mapping only once while it stays the same one; in training it never does.
        weights = dict(self.weights)
        rollouts = self.pool.collect(weights, self.tasks, seeds, self.episodes, label=f"benchmark {turn}")
        self.steps.append(rollouts.num_steps)


def rates(samplings: Mapping[int, Sampling], repetitions: int) -> dict[int, dict[str, float]]:
    """Steps a second by number of workers: at the median and at the shortest time of a call."""
    works: dict[str, Callable[[], None]] = {str(workers): sampling for workers, sampling in samplings.items()}
    times = timings(works, repetitions)
    if len({tuple(sampling.steps) for sampling in samplings.values()}) > 1:
        raise RuntimeError("The pools collected different numbers of steps from equal seeds.")
    result = {}
    for workers, sampling in samplings.items():
        steps = float(np.mean(sampling.steps[1:]))
        seconds = times[str(workers)]
        result[workers] = {"median": steps / seconds["median"], "max": steps / seconds["min"]}
    return result


def main(options: Options) -> None:
    family = make(options.task)
    spec = TrainConfig.for_task(options.task).policy_spec(family)
    tasks = family.sample(4 * options.meta_batch, np.random.default_rng(seed_for(0)))
    batch = tasks[: options.meta_batch]
    shared = SSMPolicy(spec).numpy_weights()
    own = {name: np.stack([value] * options.meta_batch) for name, value in shared.items()}
    if any(options.workers):
        log("starting Ray …")
        start_ray(sum(options.workers))
    results = {}
    facts: dict[str, Any] = {"task": options.task, "meta_batch": options.meta_batch, "episodes": options.episodes}
    with ExitStack() as stack:
        pools = {n: Pool(family, spec, num_workers=n, name=f"sampling/{n}") for n in options.workers}
        for pool in pools.values():
            stack.enter_context(pool)
        for kind, weights, played in (("shared", shared, batch), ("own", own, batch), ("large", shared, tasks)):
            log(f"{len(played)} tasks of {options.episodes} episodes, {kind} …")
            samplings = {n: Sampling(pool, weights, played, options.episodes) for n, pool in pools.items()}
            results[kind] = rates(samplings, options.repetitions)
        if isinstance(family, MujocoFamily):
            found = []
            for played in (batch, tasks):
                log(f"{len(played)} tasks of {options.episodes} episodes against mujoco.rollout …")
                samplings = {n: Sampling(pool, shared, played, options.episodes) for n, pool in pools.items()}
                found.append(against_rollout(family, samplings, options.repetitions))
            facts |= rollout_table(options, found)
    others = {"own_weights": figures(results["own"]), "large_batch": figures(results["large"])}
    report("sampling", {**figures(results["shared"]), **others, **facts})


def figures(rate: Mapping[int, Mapping[str, float]]) -> dict[str, object]:
    """The headline, of most workers, and the ratios of the usual pools."""
    ratios = {"two_vs_one": (2, 1), "one_vs_in_process": (1, 0)}
    return {
        "steps_per_second": rate[max(rate)]["median"],
        "steps_per_second_by_workers": {n: rate[n]["median"] for n in rate},
        "best_steps_per_second_by_workers": {n: rate[n]["max"] for n in rate},
        **{name: rate[n]["median"] / rate[m]["median"] for name, (n, m) in ratios.items() if {n, m} <= rate.keys()},
    }


class BareRollout:
    """Episodes of `mujoco.rollout` with nothing around it.

    Args:
        family: whose robot and horizon.
        num_envs: episodes.
        threads: that share them.
    """

    def __init__(self, family: MujocoFamily, num_envs: int, threads: int) -> None:
        mujoco = import_module("mujoco")
        model = load_model(family.robot.file)
        self.steps = num_envs * family.horizon
        self.arguments = [model] * num_envs, [mujoco.MjData(model) for _ in range(threads)]
        self.rollout = import_module("mujoco.rollout").Rollout(nthread=0 if threads == 1 else threads)
        self.control = mujoco.mjtState.mjSTATE_CTRL.value
        rng = np.random.default_rng(0)
        self.start = np.zeros((num_envs, 1 + model.nq + model.nv))
        self.start[:, 1 : 1 + model.nq] = model.qpos0
        self.start[:, 1:] += rng.uniform(-0.1, 0.1, (num_envs, model.nq + model.nv))
        actions = rng.normal(0.0, 0.5, (num_envs, family.horizon, model.nu)).clip(-1, 1)
        self.controls = actions.repeat(family.robot.frame_skip, axis=1)
        self.states = np.empty((*self.controls.shape[:2], self.start.shape[1]))

    def __call__(self) -> None:
        self.rollout.rollout(
            *self.arguments,
            self.start,
            self.controls,
            control_spec=self.control,
            skip_checks=True,
            nstep=self.controls.shape[1],
            state=self.states,
        )


def against_rollout(
    family: MujocoFamily, samplings: Mapping[int, Sampling], repetitions: int
) -> dict[str, dict[int, float]]:
    """Steps a second of the bare simulator by its threads, and each pool's share of what its threads could do."""
    threads = {n: max(1, n) * family.threads for n in samplings}
    sampling = next(iter(samplings.values()))
    num_envs = len(sampling.tasks) * sampling.episodes
    bare = {t: BareRollout(family, num_envs, t) for t in sorted(set(threads.values()))}
    works: dict[str, Callable[[], object]] = {f"rollout/{t}": work for t, work in bare.items()}
    times = timings(works | {f"pool/{n}": sampling for n, sampling in samplings.items()}, repetitions)
    rollout = {t: work.steps / times[f"rollout/{t}"]["median"] for t, work in bare.items()}
    pool = {n: float(np.mean(s.steps[1:])) / times[f"pool/{n}"]["median"] for n, s in samplings.items()}
    return {
        "mujoco_rollout": rollout,
        "pool": pool,
        "pool_vs_rollout": {n: pool[n] / rollout[threads[n]] for n in samplings},
    }


def rollout_table(options: Options, found: Sequence[Mapping[str, Mapping[int, float]]]) -> dict[str, Any]:
    """What `against_rollout` found of a meta-batch and of one four times as large, as `render.py` reads it."""
    names = {n: f"{n} worker{'s' * (n > 1)}" if n else "in process, one thread" for n in options.workers}
    columns = [
        f"{part}{size * options.meta_batch * options.episodes} environments"
        for size in (1, 4)
        for part in ("steps/s, ", "of the bare simulator's, ")
    ]
    cells = {n: [each[part][n] for each in found for part in ("pool", "pool_vs_rollout")] for n in names}
    goals = [
        {"row": names[n], "column": column, "bound": 0.85, "most": False, "mean": value, "met": value >= 0.85}
        for n in names
        for column, value in zip(columns, cells[n], strict=True)
        if n > 1 and "bare" in column
    ]
    return {
        "title": f"Sampling on `{options.task}` against the bare simulator",
        "columns": columns,
        "rows": [{"name": name, "cells": cells[n]} for n, name in names.items()],
        "goals": goals,
        "notes": ["The bare `mujoco.rollout` plays as many whole episodes on as many threads, without a policy."],
    }


if __name__ == "__main__":
    main(tyro.cli(Options))
