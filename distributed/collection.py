"""Rollouts of a pool, with a limit on invalid ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ssm_metarl.algorithms.rollouts import Rollouts
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
        shards: of the tasks, whose rollouts are to stay where they were played; empty: they are brought here.

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
        shards: Sequence[slice] = (),
    ) -> None:
        self._pool, self._tasks, self._shards = pool, tasks, shards
        self._seeds, self._label, self._deterministic = seeds, label, deterministic
        self._played = np.ones(len(tasks), bool)
        self.invalid_episodes = 0
        self.given: Sequence[Rollouts] = ()
        self.collected: list[Any] = []

    def __call__(self, weights: Any, episodes: int, step: int) -> Any:
        """The record of all M tasks, or `RemoteRollouts` of them.

        Args:
            weights: shared, or [M, ...] each, here or remote; the tasks' own once a task is not played any more.
            episodes: a task.
            step: stage of adaptation, from 0.

        Raises:
            EnvironmentFailure: too many episodes are invalid.
        """
        rollouts = self.given[step] if step < len(self.given) else self._play(weights, episodes, step)
        self._played &= rollouts.kept().any(1)
        self.collected.append(rollouts)
        return rollouts

    def _play(self, weights: Any, episodes: int, step: int) -> Any:
        """The tasks that were not dropped, the others empty."""
        index = np.flatnonzero(self._played).tolist()
        everything = len(index) == len(self._tasks)
        pool, seeds = self._pool, self._seeds(step)
        lost = len(pool.dropped) + pool.timed_out
        rollouts = pool.collect(
            weights if everything else of_some(weights, index),
            [self._tasks[i] for i in index],
            [seeds[i] for i in index],
            episodes,
            label=self._label(step),
            deterministic=self._deterministic,
            cuts=self._cuts(index),
        )
        # A task that the pool lost has a sentence in errors, but not the environment's.
        bad = len(rollouts.errors) - (len(pool.dropped) + pool.timed_out - lost)
        if bad > INVALID_EPISODES_ALLOWED * len(index) * episodes:
            first = max(rollouts.errors, key=lambda error: "Traceback" in error)
            share = f"{bad} of {len(index) * episodes} episodes ({self._label(step)})"
            raise EnvironmentFailure(f"{share} were lost; the first error:\n{first}")
        self.invalid_episodes += bad
        return rollouts if everything else self._with_others(rollouts, index, episodes)

    def _cuts(self, index: Sequence[int]) -> list[int]:
        """Before which of the tasks of `index` the record is to be cut: a piece has consecutive tasks of one shard."""
        borders = {shard.start for shard in self._shards}
        if not borders:
            return []
        return [row for row, i in enumerate(index) if i in borders or row == 0 or index[row - 1] != i - 1]

    def _with_others(self, rollouts: Any, index: Sequence[int], episodes: int) -> Any:
        """The record of the tasks of `index`, with empty ones in the places of all others."""
        others = set(range(len(self._tasks))).difference(index)
        empty = {i: self._pool.blank([self._tasks[i]], episodes) for i in others}
        if isinstance(rollouts, Rollouts):
            parts = empty | {i: rollouts.select(slice(row, row + 1)) for row, i in enumerate(index)}
            return replace(Rollouts.concatenate([parts[i] for i in sorted(parts)]), errors=rollouts.errors)
        return rollouts.spread(index, {i: type(rollouts).put(record, range(i, i + 1)) for i, record in empty.items()})


def of_some(weights: Any, index: Sequence[int]) -> Any:
    """The weights of some tasks, here or remote."""
    if isinstance(weights, Mapping):
        return {name: value[index] for name, value in weights.items()}
    return weights.select(index)
