"""Rollouts of a pool, with a limit on how many of them an environment may spoil."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from ssm_metarl.algorithms.rollouts import Array, Rollouts
from ssm_metarl.distributed.pool import Pool
from ssm_metarl.tasks import Task

BAD_EPISODES_ALLOWED = 0.1
"""Share of a collection's episodes that may be lost to a faulty environment before the run stops."""


class EnvironmentFailure(RuntimeError):
    """Too many episodes were lost to the environment; the message carries its own traceback."""


def play(
    pool: Pool,
    weights: Mapping[str, Array],
    tasks: Sequence[Task],
    seeds: Sequence[np.random.SeedSequence],
    episodes: int,
    played: Array,
    *,
    label: str,
    deterministic: bool = False,
) -> tuple[Rollouts, int]:
    """Collect one stage of adaptation with what is left of a batch of tasks; the trainer and the evaluator call it.

    Args:
        pool, weights, tasks, seeds, episodes, label, deterministic: as for ``Pool.collect``; where a task is not
            played, weights must be the tasks' own.
        played: [M] bool, the tasks of which every stage so far brought an episode. The others are not played, and
            have an empty record. Those that this stage lost are taken out in place.

    Returns:
        The record of all M tasks, and the number of episodes that the environment spoiled.

    Raises:
        EnvironmentFailure: the environment spoiled too many episodes.
    """
    index = np.flatnonzero(played).tolist()
    everything = len(index) == len(tasks)
    lost = len(pool.dropped) + pool.missing
    rollouts = pool.collect(
        weights if everything else {name: value[index] for name, value in weights.items()},
        [tasks[i] for i in index],
        [seeds[i] for i in index],
        episodes,
        label=label,
        deterministic=deterministic,
    )
    # A task that the pool lost has a sentence in errors, but not the environment's.
    bad = len(rollouts.errors) - (len(pool.dropped) + pool.missing - lost)
    if bad > BAD_EPISODES_ALLOWED * len(index) * episodes:
        first = max(rollouts.errors, key=lambda error: "Traceback" in error)
        share = f"{bad} of {len(index) * episodes} episodes ({label})"
        raise EnvironmentFailure(f"{share} were lost; the first error:\n{first}")
    if not everything:
        parts = [Rollouts.empty([task], episodes, rollouts) for task in tasks]
        for row, i in enumerate(index):
            parts[i] = rollouts.select(slice(row, row + 1))
        rollouts = replace(Rollouts.concatenate(parts), errors=rollouts.errors)
    played &= rollouts.kept().any(1)
    return rollouts, bad
