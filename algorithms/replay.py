"""Replay: whole episodes of meta-training, and how likely each of them is under another task."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np

from ssm_metarl.algorithms.rollouts import TIMED, Array, Rollouts
from ssm_metarl.algorithms.spec import PolicySpec
from ssm_metarl.checks import check_count

MOST_EPISODES = 100_000
"""Of a buffer: each is an object of kilobytes beside its numbers."""

MOST_VALUES = 5_000_000
"""Of a buffer's tasks in a file, as JSON: read, each takes many times its text."""

_FLAT = ("observations", "actions", "rewards", "log_probs", "starts", "terminated")


class ReplayBuffer:
    """The last episodes of meta-training, with their tasks and the log-probabilities that they were acted with.

    The trainer offers it every query record; it takes the first episode of each task, so that a buffer of N episodes
    holds N tasks:

        replay = ReplayBuffer(256)
        replay.add(query)
        adapter = HybridAdapter(policy, config, replay)

    Args:
        capacity: most episodes; the oldest one makes room.

    Raises:
        ValueError: the capacity is no number from 1 to `MOST_EPISODES`.
    """

    def __init__(self, capacity: int) -> None:
        check_count("replay_episodes", capacity, 1, MOST_EPISODES)
        self.capacity = capacity
        self._episodes: deque[Rollouts] = deque(maxlen=capacity)

    def __len__(self) -> int:
        return len(self._episodes)

    @property
    def nbytes(self) -> int:
        """Bytes of the episodes held; at most `bound`."""
        names = (*TIMED, "last_observations")
        return sum(getattr(episode, name).nbytes for episode in self._episodes for name in names)

    @staticmethod
    def bound(spec: PolicySpec, capacity: int, horizon: int) -> int:
        """Most bytes that `capacity` episodes of at most `horizon` steps can take."""
        action = np.dtype(spec.action_type).itemsize * math.prod(spec.action_shape)
        step = 4 * spec.observation_size + action + 2 * 4 + 4  # reward and log-probability; four flags of a byte
        return capacity * (horizon * step + 4 * spec.observation_size)

    def add(self, rollouts: Rollouts) -> None:
        """Take the first episode of each task of a record that was not dropped."""
        kept = rollouts.kept()
        for task in np.flatnonzero(kept.any(1)).tolist():
            slot = int(kept[task].argmax())
            length = int(rollouts.valid[task, :, slot].sum())
            arrays = {name: getattr(rollouts, name)[task : task + 1, :length, slot : slot + 1].copy() for name in TIMED}
            last = rollouts.last_observations[task : task + 1, slot : slot + 1].copy()
            self._episodes.append(Rollouts(**arrays, last_observations=last, tasks=(rollouts.tasks[task],)))

    def extend(self, other: ReplayBuffer) -> None:
        """Take the episodes of another buffer, as of a checkpoint."""
        self._episodes.extend(other._episodes)

    def rollouts(self) -> Rollouts:
        """All episodes, oldest first, as the tasks of one record: [N, T, 1, ...].

        Raises:
            ValueError: there is none.
        """
        if not self._episodes:
            raise ValueError("The replay holds no episode.")
        return Rollouts.concatenate(list(self._episodes))

    def arrays(self) -> dict[str, Array]:
        """What `replay.safetensors` holds: the steps of all episodes one after the other, and each one's length.

        S steps and N episodes: `observations` [S, O], `actions` [S, A], [S] or [S, D], `rewards`, `log_probs`,
        `starts` and `terminated` [S], `lengths` [N], `last_observations` [N, O], `capacity` [1], and
        `tasks`, the UTF-8 bytes of a JSON list. Empty where no episode is held.
        """
        if not self._episodes:
            return {}
        flat = {name: np.concatenate([getattr(e, name)[0, :, 0] for e in self._episodes]) for name in _FLAT}
        tasks = json.dumps([episode.tasks[0] for episode in self._episodes]).encode()
        return flat | {
            "lengths": np.array([episode.num_steps for episode in self._episodes], np.int64),
            "last_observations": np.concatenate([episode.last_observations[0] for episode in self._episodes]),
            "capacity": np.array([self.capacity], np.int64),
            "tasks": np.frombuffer(tasks, np.uint8),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array], spec: PolicySpec) -> ReplayBuffer:
        """The inverse of `arrays`.

        Args:
            arrays: as read from a file, of which nothing is taken for granted.
            spec: of the policy whose episodes they are.

        Raises:
            ValueError: they are not such episodes; the sentence says what is wrong.
        """
        expected = {*_FLAT, "lengths", "last_observations", "capacity", "tasks"}
        if set(arrays) != expected:
            raise ValueError(f"arrays {', '.join(sorted(set(arrays) ^ expected))} are missing or unknown")
        lengths, capacity = arrays["lengths"], arrays["capacity"]
        if lengths.dtype != np.int64 or lengths.ndim != 1 or not len(lengths) or (lengths < 1).any():
            raise ValueError("'lengths' are not positive numbers of steps")
        if capacity.dtype != np.int64 or capacity.shape != (1,) or capacity[0] < len(lengths):
            raise ValueError("'capacity' is not a number of at least as many episodes as there are")
        steps, episodes = sum(lengths.tolist()), len(lengths)
        number, flag = np.dtype(np.float32), np.dtype(bool)
        forms = {
            "observations": ((steps, spec.observation_size), number),
            "actions": ((steps, *spec.action_shape), np.dtype(spec.action_type)),
            "rewards": ((steps,), number),
            "log_probs": ((steps,), number),
            "starts": ((steps,), flag),
            "terminated": ((steps,), flag),
            "last_observations": ((episodes, spec.observation_size), number),
        }
        for name, (shape, dtype) in forms.items():
            array = arrays[name]
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(
                    f"{name!r} is {array.dtype} {list(array.shape)} instead of {dtype} {list(shape)}: "
                    "it is of another policy, or damaged"
                )
            if dtype == number and not np.isfinite(array).all():
                raise ValueError(f"{name!r} holds NaN or infinite numbers")
        if spec.discrete:
            most = np.array(spec.action_heads or spec.action_size) - 1
            if not ((arrays["actions"] >= 0) & (arrays["actions"] <= most)).all():
                raise ValueError(f"'actions' are not all in 0..{most.tolist()}")
        if episodes > MOST_EPISODES:
            raise ValueError(f"{episodes:,} episodes are more than {MOST_EPISODES:,}")
        text = arrays["tasks"].tobytes()
        if sum(map(text.count, (b"[", b"{", b","))) > MOST_VALUES:
            raise ValueError(f"'tasks' are of more than {MOST_VALUES:,} values")
        try:
            tasks = json.loads(text.decode())
        except ValueError:
            tasks = None
        if not isinstance(tasks, list) or len(tasks) != episodes:
            raise ValueError("'tasks' is not a JSON list of one task an episode")
        buffer = cls(int(capacity[0]))
        ends = np.cumsum(lengths).tolist()
        for i, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
            parts: dict[str, Any] = {name: arrays[name][begin:end][None, :, None] for name in _FLAT}
            resets = np.zeros((1, end - begin, 1), bool)
            resets[:, 0] = True
            valid = np.ones_like(resets)
            last = arrays["last_observations"][i][None, None]
            buffer._episodes.append(
                Rollouts(**parts, resets=resets, valid=valid, last_observations=last, tasks=(tasks[i],))
            )
        return buffer


def as_slots(episodes: Rollouts, index: Array) -> Rollouts:
    """Stored episodes as the episode slots of tasks.

    Args:
        episodes: N of them, [N, T, 1, ...].
        index: [M, R] of episodes.

    Returns:
        A record [M, T, R, ...]; what stands for its tasks is empty, since each slot is of another one.
    """
    arrays: dict[str, Any] = {name: np.moveaxis(getattr(episodes, name)[:, :, 0][index], 1, 2) for name in TIMED}
    longest = max(1, int(arrays["valid"].any((0, 2)).sum()))
    arrays = {name: np.ascontiguousarray(array[:, :longest]) for name, array in arrays.items()}
    last = episodes.last_observations[:, 0][index]
    return Rollouts(**arrays, last_observations=last, tasks=({},) * len(index))
