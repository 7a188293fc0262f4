"""Memory of a rollout worker, and seconds until a pool of two has answered its first call. Linux only.

Ray is up already. A worker's memory is read after it has played its share of a meta-batch, with shared
weights and with a set of weights a task: resident (`rss`, shared libraries and Ray's shared memory
included) and its own (`uss`, what ending it would free).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from _report import log, report, summary

from ssm_metarl.algorithms.policy import SSMPolicy
from ssm_metarl.config import TrainConfig
from ssm_metarl.distributed.cluster import start_ray
from ssm_metarl.distributed.pool import Pool
from ssm_metarl.seeds import seed_for
from ssm_metarl.tasks import make

MEMORY = {"rss": ("Rss",), "uss": ("Private_Clean", "Private_Dirty")}
"""Kind of memory → the lines of the kernel's smaps_rollup that add up to it."""


@dataclass(frozen=True)
class Options:
    """Measure the workers' memory and start.

    Attributes:
        task: the family that the workers play.
        num_workers: of the pool.
        starts: how often a pool is started.
    """

    task: str = "navigation-2d"
    num_workers: int = 2
    starts: int = 5


def memory_mib(process: int) -> dict[str, float]:
    """Resident and own memory of a process."""
    lines = [line.split() for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]]
    kib = {name.rstrip(":"): int(value) for name, value, *_ in lines}
    return {kind: sum(kib[name] for name in names) / 1024 for kind, names in MEMORY.items()}


def main(options: Options) -> None:
    family = make(options.task)
    config = TrainConfig.for_task(options.task)
    spec = config.policy_spec(family)
    tasks = family.sample(config.experience.meta_batch, np.random.default_rng(seed_for(0)))
    seeds = [seed_for(0, task) for task in range(len(tasks))]
    shared = SSMPolicy(spec).numpy_weights()
    own = {name: np.stack([value] * len(tasks)) for name, value in shared.items()}
    log("starting Ray …")
    start_ray(options.num_workers)
    starts = []
    workers: list[dict[str, float]] = []
    each = slice(options.num_workers)  # one task a worker
    for number in range(options.starts):
        begin = time.perf_counter()
        with Pool(family, spec, num_workers=options.num_workers, name=f"memory/{number}") as pool:
            pool.collect(shared, tasks[each], seeds[each], 1)
            starts.append(time.perf_counter() - begin)
            for weights in (shared, own):
                pool.collect(weights, tasks, seeds, config.experience.episodes)
            workers += [memory_mib(process) for process in pool.processes()]
        log(f"start {number + 1}: {starts[-1]:.2f} s, {workers[-1]['rss']:.0f} MiB a worker")
    result = {
        "rss_mib_per_worker": max(worker["rss"] for worker in workers),
        "uss_mib_per_worker": max(worker["uss"] for worker in workers),
        "start_seconds": summary(starts)["median"],
        "start_seconds_each": starts,
        "workers": workers,
        "num_workers": options.num_workers,
        "task": options.task,
    }
    report("memory", result)


if __name__ == "__main__":
    main(tyro.cli(Options))
