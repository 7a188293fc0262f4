"""Rollouts of a pool, with a limit on invalid ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from ssm_metarl.algorithms.rollouts import Array, Rollouts
from ssm_metarl.distributed.pool import EnvironmentFailure, Pool
from ssm_metarl.tasks import Task

INVALID_EPISODES_ALLOWED = 0.1
"""Share of a collection's episodes that may be invalid before the run stops."""


class StageCollector:
    """`Collect` with a pool: plays the tasks of a meta-batch or of an evaluation, stage by stage of adaptation.

    A task that a stage brought no episode of is not played any more, and has an empty record from then on.

    Args:
        pool: that plays.
        tasks: M.
        seeds: of the tasks at a stage.
        label: of a stage, for errors.
        deterministic: take the most likely actions.

    Attributes:
        invalid_episodes: that were invalid so far.
        given: records of the first stages that were played elsewhere with the same weights and seeds.
        collected: the record of every stage so far.
    """

    def __init__(
        self,
        pool: Pool,
        tasks: Sequence[Task],
        seeds: Callable[[int], Sequence[np.random.SeedSequence]],
        label: Callable[[int], str],
        *,
        deterministic: bool = False,
    ) -> None:
        self._pool, self._tasks = pool, tasks
        self._seeds, self._label, self._deterministic = seeds, label, deterministic
        self._played = np.ones(len(tasks), bool)
        self.invalid_episodes = 0
        self.given: Sequence[Rollouts] = ()
        self.collected: list[Rollouts] = []

    def __call__(self, weights: Mapping[str, Array], episodes: int, step: int) -> Rollouts:
        """The record of all M tasks.

        Args:
            weights: shared, or [M, ...] each; the tasks' own once a task is not played any more.
            episodes: a task.
            step: stage of adaptation, from 0.

        Raises:
            EnvironmentFailure: too many episodes are invalid.
        """
        rollouts = self.given[step] if step < len(self.given) else self._play(weights, episodes, step)
        self._played &= rollouts.kept().any(1)
        self.collected.append(rollouts)
        return rollouts

    def _play(self, weights: Mapping[str, Array], episodes: int, step: int) -> Rollouts:
        """The tasks that were not dropped, the others empty."""
        index = np.flatnonzero(self._played).tolist()
        everything = len(index) == len(self._tasks)
        pool, seeds = self._pool, self._seeds(step)
        lost = len(pool.dropped) + pool.timed_out
        rollouts = pool.collect(
            weights if everything else {name: value[index] for name, value in weights.items()},
            [self._tasks[i] for i in index],
            [seeds[i] for i in index],
            episodes,
            label=self._label(step),
            deterministic=self._deterministic,
        )
        # A task that the pool lost has a sentence in errors, but not the environment's.
        bad = len(rollouts.errors) - (len(pool.dropped) + pool.timed_out - lost)
        if bad > INVALID_EPISODES_ALLOWED * len(index) * episodes:
            first = max(rollouts.errors, key=lambda error: "Traceback" in error)
            share = f"{bad} of {len(index) * episodes} episodes ({self._label(step)})"
            raise EnvironmentFailure(f"{share} were lost; the first error:\n{first}")
        self.invalid_episodes += bad
        if not everything:
            parts = [Rollouts.empty([task], episodes, rollouts) for task in self._tasks]
            for row, i in enumerate(index):
                parts[i] = rollouts.select(slice(row, row + 1))
            rollouts = replace(Rollouts.concatenate(parts), errors=rollouts.errors)
        return rollouts
