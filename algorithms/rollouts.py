"""The one record of experience: what a worker returns, a learner consumes and an evaluator reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

TIMED = ("observations", "actions", "rewards", "log_probs", "starts", "resets", "terminated", "valid")
"""Arrays of `Rollouts` with a time axis."""


@dataclass(frozen=True)
class Rollouts:
    """Experience of M tasks, T time steps and K episode slots (one episode or RL² trial each) a task.

    `collect` makes it, `Pool` joins the parts of several workers with `concatenate`, the learner reads it:

        rollouts = pool.collect(weights, tasks, num_episodes=20, key=(iteration, stage))
        batch = make_batch(policy.spec, rollouts, config)

    Attributes:
        observations: [M, T, K, O] float32, before the step.
        actions: [M, T, K, A] float32, or int64 [M, T, K] or with several heads [M, T, K, D], as sampled: see
            `PolicySpec.env_actions` for what the environment got.
        rewards: [M, T, K] float32, after the step.
        log_probs: [M, T, K] float32, of the action under the policy that acted.
        starts: [M, T, K] bool, first step of an episode: an input feature only.
        resets: [M, T, K] bool, where recurrent state, previous action and previous reward are zeroed.
        terminated: [M, T, K] bool, the return's unit truly ended at this step; a cut at the horizon is not an end.
        valid: [M, T, K] bool, false after the last step collected. What is not valid enters no loss, mean or return.
        last_observations: [M, K, O] float32, after the last valid step and before any autoreset.
        tasks: M JSON values, the tasks' parameters.
        errors: tracebacks or descriptions of what went wrong in episodes that were dropped. A dropped episode is a
            slot without a single valid step.
        successes: [M, K, E] bool, whether the environment said `success` in an episode of the trial, see `collect`;
            None: it says nothing of it.
    """

    observations: Array
    actions: Array
    rewards: Array
    log_probs: Array
    starts: Array
    resets: Array
    terminated: Array
    valid: Array
    last_observations: Array
    tasks: tuple[Any, ...]
    errors: tuple[str, ...] = ()
    successes: Array | None = None

    @property
    def num_tasks(self) -> int:
        """Number of tasks M."""
        return self.valid.shape[0]

    @property
    def num_steps(self) -> int:
        """Number of valid environment steps over all tasks and episode slots."""
        return int(self.valid.sum())

    def kept(self) -> Array:
        """Columns that hold an episode, [M, K] bool; the others were dropped."""
        return np.logical_or.reduce(self.valid, axis=1)

    def returns(self) -> Array:
        """Undiscounted return of each slot, [M, K] float64; NaN where the slot was dropped."""
        # Step by step: how NumPy groups the terms of a sum depends on how many zeros stand behind them.
        total = np.where(self.valid, self.rewards, 0.0).cumsum(axis=1, dtype=np.float64)[:, -1]
        return np.where(self.kept(), total, np.nan)

    def returns_by_episode(self) -> Array:
        """Undiscounted return of each episode of each slot's trial, [M, K, E] float64.

        E is the most that a slot has; NaN where one was dropped, or has fewer.
        """
        number = (self.starts & self.valid).cumsum(axis=1)  # [M, T, K], from 1 on
        found = []
        for episode in range(1, max(int(number.max(initial=0)), 1) + 1):
            own = self.valid & (number == episode)
            total = np.where(own, self.rewards, 0.0).cumsum(axis=1, dtype=np.float64)[:, -1]
            found.append(np.where(own.any(1), total, np.nan))
        return np.stack(found, -1)

    def success_rates(self) -> Array | None:
        """Share of each episode of a trial in which the environment said `success`, [E] float64 over tasks and slots.

        NaN where no trial has so many episodes; None where the environment says nothing of it.
        """
        if self.successes is None:
            return None
        played = np.isfinite(self.returns_by_episode())
        played = np.pad(played, ((0, 0), (0, 0), (0, self.successes.shape[2] - played.shape[2])))
        count = played.sum((0, 1))
        return np.divide((self.successes & played).sum((0, 1)), count, out=np.full(len(count), np.nan), where=count > 0)

    def succeeded(self) -> Array | None:
        """Slots in whose trial any episode succeeded, [M, K] bool; None where the environment says nothing of it."""
        return None if self.successes is None else np.asarray(self.successes.any(-1))

    def arrays(self) -> dict[str, Any]:
        """All arrays that it has, by name."""
        named = ((f.name, getattr(self, f.name)) for f in fields(self) if f.name not in ("tasks", "errors"))
        return {name: array for name, array in named if array is not None}

    def lengths(self) -> Array:
        """Number of valid steps of each slot, [M, K] int64; 0 where the slot was dropped."""
        return self.valid.sum(axis=1)

    def masked(self) -> Rollouts:
        """The record with zeros for every number and flag that is not `valid`, whatever stood there."""
        arrays: dict[str, Any] = {}
        for name in TIMED[:-1]:
            array = getattr(self, name)
            mask = self.valid[..., None] if array.ndim == 4 else self.valid
            arrays[name] = np.where(mask, array, np.zeros((), array.dtype))
        return replace(self, **arrays)

    def select(self, index: slice) -> Rollouts:
        """The tasks of `index` (a slice over M), as views."""
        arrays = {name: array[index] for name, array in self.arrays().items()}
        return replace(self, **arrays, tasks=self.tasks[index])

    def trimmed(self) -> Rollouts:
        """The record without the steps that no episode took, in writable arrays of C order.

        Ray's arrays are read-only, and the order of an array in memory decides the last bits of a sum over it.
        """
        longest = max(1, int(self.valid.any((0, 2)).sum()))
        arrays = self.arrays()
        arrays |= {name: arrays[name][:, :longest] for name in TIMED}
        return replace(self, **{name: np.require(a, requirements=["C", "W"]) for name, a in arrays.items()})

    @staticmethod
    def concatenate(parts: Sequence[Rollouts]) -> Rollouts:
        """Join parts along the tasks; shorter ones are padded in time with steps that are not valid.

        Args:
            parts: one or more records with equal K, O and A.

        Raises:
            ValueError: without any part.
        """
        if not parts:
            raise ValueError("Rollouts.concatenate needs at least one part.")
        if len(parts) == 1:
            return parts[0]
        longest = max(part.valid.shape[1] for part in parts)
        joined: dict[str, Any] = {}
        for name in TIMED:
            first = getattr(parts[0], name)
            total = sum(part.num_tasks for part in parts)
            joined[name] = np.zeros((total, longest, *first.shape[2:]), first.dtype)
            row = 0
            for part in parts:
                array = getattr(part, name)
                joined[name][row : row + array.shape[0], : array.shape[1]] = array
                row += array.shape[0]
        return Rollouts(
            **joined,
            last_observations=np.concatenate([part.last_observations for part in parts]),
            tasks=tuple(task for part in parts for task in part.tasks),
            errors=tuple(error for part in parts for error in part.errors),
            successes=joined_successes([part.successes for part in parts], [part.kept().shape for part in parts]),
        )

    def beside(self, other: Rollouts) -> Rollouts:
        """The same tasks with the episodes of `other` after their own, padded in time with steps that are not valid.

        Args:
            other: a record of as many tasks; its parameters and errors are left out, and successes of both.
        """
        longest = max(self.valid.shape[1], other.valid.shape[1])
        joined: dict[str, Any] = {}
        for name in TIMED:
            pair = [getattr(self, name), getattr(other, name)]
            padding = [[(0, 0), (0, longest - x.shape[1]), *[(0, 0)] * (x.ndim - 2)] for x in pair]
            joined[name] = np.concatenate([np.pad(x, width) for x, width in zip(pair, padding, strict=True)], 2)
        last = np.concatenate([self.last_observations, other.last_observations], 1)
        return replace(self, **joined, last_observations=last, successes=None)


def joined_successes(successes: Sequence[Array | None], shapes: Sequence[tuple[int, ...]]) -> Array | None:
    """Those [M, K, ...] of several records of [M, K] slots; one that says nothing, as of dropped tasks, has none."""
    said = [own for own in successes if own is not None]
    if not said:
        return None
    blank = [np.zeros((*shape, *said[0].shape[2:]), bool) for shape in shapes]
    return np.concatenate([none if own is None else own for own, none in zip(successes, blank, strict=True)])
