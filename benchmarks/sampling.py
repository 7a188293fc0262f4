"""Environment steps a second that the pool collects, in process and with one and two workers.

One call of the pool is a meta-batch as in training, the family's default policy at its initial weights. In
the headline all tasks act with the same weights, as for support rollouts; under ``own_weights`` each has its
own, as for query rollouts; under ``large_batch`` there are four times as many tasks with the same weights, so
that what a call costs whatever its size weighs less.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count

import numpy as np
import tyro
from _report import log, report, timings

from ssm_metarl.algorithms.collect import seed_for
from ssm_metarl.algorithms.policy import SSMPolicy
from ssm_metarl.algorithms.rollouts import Array
from ssm_metarl.distributed.config import TrainConfig
from ssm_metarl.distributed.pool import Pool
from ssm_metarl.distributed.run import start_ray
from ssm_metarl.tasks import Task, make

WORKERS = (0, 1, 2)


@dataclass(frozen=True)
class Options:
    """Measure sampling.

    Attributes:
        task: the family.
        meta_batch: tasks of a call.
        episodes: a task.
        repetitions: measured turns.
    """

    task: str = "navigation-2d"
    meta_batch: int = 20
    episodes: int = 20
    repetitions: int = 15


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
    log("starting Ray …")
    start_ray(sum(WORKERS))
    results = {}
    with ExitStack() as stack:
        pools = {n: Pool(family, spec, num_workers=n, name=f"sampling/{n}") for n in WORKERS}
        for pool in pools.values():
            stack.enter_context(pool)
        for kind, weights, played in (("shared", shared, batch), ("own", own, batch), ("large", shared, tasks)):
            log(f"{len(played)} tasks of {options.episodes} episodes, {kind} …")
            samplings = {n: Sampling(pool, weights, played, options.episodes) for n, pool in pools.items()}
            results[kind] = rates(samplings, options.repetitions)
    facts = {"task": options.task, "meta_batch": options.meta_batch, "episodes": options.episodes}
    others = {"own_weights": figures(results["own"]), "large_batch": figures(results["large"])}
    report("sampling", {**figures(results["shared"]), **others, **facts})


def figures(rate: Mapping[int, Mapping[str, float]]) -> dict[str, object]:
    """The headline and the ratios."""
    return {
        "steps_per_second": rate[2]["median"],
        "steps_per_second_by_workers": {n: rate[n]["median"] for n in WORKERS},
        "best_steps_per_second_by_workers": {n: rate[n]["max"] for n in WORKERS},
        "two_vs_one": rate[2]["median"] / rate[1]["median"],
        "one_vs_in_process": rate[1]["median"] / rate[0]["median"],
    }


if __name__ == "__main__":
    main(tyro.cli(Options))
