"""Rollouts of a pool, with a limit on invalid ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ssm_metarl.algorithms.rollouts import Array, Rollouts
from ssm_metarl.distributed.play import EnvironmentFailure
from ssm_metarl.distributed.pool import Pool
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
        min_tasks: see `MachineConfig`.
        shards: of the tasks, whose rollouts are to stay where they were played; empty: they are brought here.

    Attributes:
        shards: as given.
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
        min_tasks: float = 1.0,
    ) -> None:
        self._pool, self._tasks, self.shards = pool, tasks, shards
        self._seeds, self._label, self._deterministic = seeds, label, deterministic
        self._enough = None if min_tasks == 1.0 else math.ceil(min_tasks * len(tasks))
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

    def overlapped(
        self, weights: Mapping[str, Array], episodes: int, steps: int, adapt: Callable[[int, int, Any], Any]
    ) -> list[Any]:
        """`RemoteRollouts` of all M tasks for stages 0 to `steps`.

        A task adapts, and plays on, while others still play.

        Args:
            weights: of stage 0.
            episodes: a task.
            adapt: see `Pool.collect_stages`.

        Raises:
            EnvironmentFailure: too many episodes are invalid.
        """
        stages = range(steps + 1)
        plays = self._pool.collect_stages(
            weights,
            self._tasks,
            [self._seeds(stage) for stage in stages],
            episodes,
            labels=[self._label(stage) for stage in stages],
            shards=self.shards,
            adapt=adapt,
            enough=self._enough,
        )
        for stage, play in enumerate(plays):
            rollouts = play.joined()
            self._check(rollouts.errors, len(play.lost), int(self._played.sum()), episodes, stage)
            self._played &= rollouts.kept().any(1)
            self.collected.append(rollouts)
        return self.collected

    @property
    def can_overlap(self) -> bool:
        """Whether `overlapped` can be called."""
        return bool(self.shards and self._pool.num_workers and not self.given)

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
            enough=self._enough,
        )
        self._check(rollouts.errors, len(pool.dropped) + pool.timed_out - lost, len(index), episodes, step)
        return rollouts if everything else self._with_others(rollouts, index, episodes)

    def _check(self, errors: Sequence[str], lost: int, tasks: int, episodes: int, step: int) -> None:
        """Count a stage's invalid episodes, and refuse too many.

        Args:
            errors: of the stage.
            lost: tasks that the pool lost: each has a sentence in errors, but not the environment's.
            tasks: that were played.
            episodes: a task.
            step: the stage.
        """
        bad = len(errors) - lost
        if bad > INVALID_EPISODES_ALLOWED * tasks * episodes:
            first = max(errors, key=lambda error: "Traceback" in error)
            share = f"{bad} of {tasks * episodes} episodes ({self._label(step)})"
            raise EnvironmentFailure(f"{share} were lost; the first error:\n{first}")
        self.invalid_episodes += bad

    def _cuts(self, index: Sequence[int]) -> list[int]:
        """Before which of the tasks of `index` the record is to be cut: a piece has consecutive tasks of one shard."""
        borders = {shard.start for shard in self.shards}
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
