"""Replay: whole episodes of meta-training, and how likely each of them is under another task."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from ssm_metarl.algorithms.inference import PolicySpec, check_count
from ssm_metarl.algorithms.rollouts import Array, Rollouts

MODEL_STEPS = 64
"""Steps of a stored episode, evenly spread, at which it is compared with a task: consecutive ones are alike."""

_FLAT = ("observations", "actions", "rewards", "log_probs", "starts", "terminated")


class ReplayBuffer:
    """The last episodes of meta-training, with their tasks and the log-probabilities that they were acted with.

    The trainer offers it every query record; it takes the first episode of each task, so that a buffer of N episodes
    holds N tasks::

        replay = ReplayBuffer(256)
        replay.add(query)
        adapter = HybridAdapter(policy, config, replay)

    Args:
        capacity: most episodes; the oldest one makes room.

    Raises:
        ValueError: the capacity is no positive number.
    """

    def __init__(self, capacity: int) -> None:
        check_count("replay_episodes", capacity, 1)
        self.capacity = capacity
        self._episodes: deque[Rollouts] = deque(maxlen=capacity)

    def __len__(self) -> int:
        return len(self._episodes)

    @property
    def nbytes(self) -> int:
        """Bytes of the episodes held; at most :meth:`bound`."""
        return sum(getattr(episode, f.name).nbytes for episode in self._episodes for f in fields(Rollouts)[:9])

    @staticmethod
    def bound(spec: PolicySpec, capacity: int, horizon: int) -> int:
        """Most bytes that ``capacity`` episodes of at most ``horizon`` steps can take."""
        action = 8 if spec.discrete else 4 * spec.action_size
        step = 4 * spec.observation_size + action + 2 * 4 + 4  # reward and log-probability; four flags of a byte
        return capacity * (horizon * step + 4 * spec.observation_size)

    def add(self, rollouts: Rollouts) -> None:
        """Take the first episode of each task of a record that was not dropped."""
        kept = rollouts.kept()
        for task in np.flatnonzero(kept.any(1)).tolist():
            column = int(kept[task].argmax())
            length = int(rollouts.valid[task, :, column].sum())
            arrays = {
                f.name: getattr(rollouts, f.name)[task : task + 1, :length, column : column + 1].copy()
                for f in fields(Rollouts)[:8]
            }
            last = rollouts.last_observations[task : task + 1, column : column + 1].copy()
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
        """What ``replay.safetensors`` holds: the steps of all episodes one after the other, and each one's length.

        S steps and N episodes: ``observations`` [S, O], ``actions`` [S, A] or [S], ``rewards``, ``log_probs``,
        ``starts`` and ``terminated`` [S], ``lengths`` [N], ``last_observations`` [N, O], ``capacity`` [1], and
        ``tasks``, the UTF-8 bytes of a JSON list. Empty where no episode is held.
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
        """The inverse of :meth:`arrays`.

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
        action = ((steps,), np.dtype(np.int64)) if spec.discrete else ((steps, spec.action_size), number)
        forms = {
            "observations": ((steps, spec.observation_size), number),
            "actions": action,
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
        if spec.discrete and not ((arrays["actions"] >= 0) & (arrays["actions"] < spec.action_size)).all():
            raise ValueError(f"'actions' are not all in 0..{spec.action_size - 1}")
        try:
            tasks = json.loads(arrays["tasks"].tobytes().decode())
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


def as_columns(episodes: Rollouts, index: Array) -> Rollouts:
    """Stored episodes as the columns of tasks.

    Args:
        episodes: N of them, [N, T, 1, ...].
        index: [M, R] of episodes.

    Returns:
        A record [M, T, R, ...]; what stands for its tasks is empty, since each column is of another one.
    """
    arrays: dict[str, Any] = {
        f.name: np.moveaxis(getattr(episodes, f.name)[:, :, 0][index], 1, 2) for f in fields(Rollouts)[:8]
    }
    longest = max(1, int(arrays["valid"].any((0, 2)).sum()))
    arrays = {name: np.ascontiguousarray(array[:, :longest]) for name, array in arrays.items()}
    last = episodes.last_observations[:, 0][index]
    return Rollouts(**arrays, last_observations=last, tasks=({},) * len(index))


class TaskModel:
    """How likely stored episodes are under each of M tasks, of which a few episodes were played.

    A task shows in what follows an observation and an action: the change of the observation, and the reward r and
    r |r|. These outputs are regressed on quadratic features of observation and action, first over all stored episodes
    together and then, what is left, over each task's own episodes (ridge regression: a task of which little was seen is
    taken for an average one). A stored episode whose steps this predicts as well as the task's own is as likely as they
    are and has propensity 1; one that it predicts worse has

        exp(-½ Σ_j max(0, mean_t e²_tj / σ²_tj - 1)),    σ²_tj = (v_j + (tolerance s_j)²) (1 + φ_t' A⁻¹ φ_t),

    with e_tj the error of output j at step t, v_j the mean square of the task's own errors, s_j the deviation of the
    task's own outputs, φ_t the features and A = Φ'Φ + ridge of the task's own steps, whose last factor is the variance
    of a prediction where the task was not tried. It is a Gaussian likelihood ratio of a step, and at most 1, so that it
    needs no other clipping.

    MQL (Fakoor et al. 2020, arXiv 1910.00125, sec. 3.2) estimates the propensity with a logistic regression of the
    task's transitions against the stored ones. With one or a few episodes of a deterministic task, which such a
    regression separates perfectly, predictive errors tell near tasks from far ones, and a classifier does not.

    Args:
        episodes: the stored ones, [N, T, 1, ...].
        spec: sizes of observation and action.
        tolerance: error, in units of an output's own deviation, up to which two tasks count as alike.
        ridge: precision of a task's difference from the average, in units of one step's.
    """

    def __init__(self, episodes: Rollouts, spec: PolicySpec, tolerance: float = 0.25, ridge: float = 1.0) -> None:
        self._spec, self._tolerance, self._ridge = spec, tolerance, ridge
        observations = episodes.observations[episodes.valid].astype(np.float64)
        self._centre = observations.mean(0)
        self._scale = _spread(observations)
        chosen = np.zeros_like(episodes.valid)
        for row, length in enumerate(episodes.lengths()[:, 0].tolist()):
            chosen[row, np.unique(np.linspace(0, length - 1, min(MODEL_STEPS, length)).astype(int))] = True
        features, outputs, self._episode = self._steps(episodes, chosen)
        self._output_centre, self._output_scale = outputs.mean(0), _spread(outputs)
        outputs = (outputs - self._output_centre) / self._output_scale
        size = features.shape[1]
        self._average = np.linalg.solve(features.T @ features + 1e-3 * np.eye(size), features.T @ outputs)
        self._features, self._errors = features, outputs - features @ self._average
        self._count = len(episodes.valid)
        self._seen: list[tuple[Array, Array]] = []

    def observe(self, rollouts: Rollouts) -> None:
        """Take in episodes that the M tasks themselves were just played for."""
        for task in range(rollouts.num_tasks):
            own = rollouts.select(slice(task, task + 1))
            features, outputs, _ = self._steps(own, own.valid)
            outputs = (outputs - self._output_centre) / self._output_scale
            if task == len(self._seen):
                self._seen.append((features, outputs))
            else:
                before = self._seen[task]
                self._seen[task] = (np.concatenate([before[0], features]), np.concatenate([before[1], outputs]))

    def propensities(self) -> Array:
        """Of each stored episode under each task: [M, N] float64 in [0, 1]."""
        result = np.zeros((len(self._seen), self._count))
        identity = self._ridge * np.eye(self._features.shape[1])
        counts = np.bincount(self._episode, minlength=self._count)
        for task, (features, outputs) in enumerate(self._seen):
            if not len(features):
                continue
            errors = outputs - features @ self._average
            inverse = np.linalg.inv(features.T @ features + identity)
            own = inverse @ (features.T @ errors)
            variance = np.mean((errors - features @ own) ** 2, 0) + (self._tolerance * _spread(outputs)) ** 2
            unknown = 1 + ((self._features @ inverse) * self._features).sum(1, keepdims=True)
            left = (self._errors - self._features @ own) ** 2 / (variance * unknown)
            per_episode = np.stack([np.bincount(self._episode, column, self._count) for column in left.T], 1)
            excess = np.maximum(per_episode / np.maximum(counts, 1)[:, None] - 1, 0).sum(1)
            result[task] = np.where(counts > 0, np.exp(-0.5 * excess), 0.0)
        return result

    def _steps(self, record: Rollouts, chosen: Array) -> tuple[Array, Array, Array]:
        """Features [n, F], outputs [n, O + 2] and the task's index [n] of the chosen steps of a record.

        A step that a new episode of the same trial follows is left out: what was observed next is not known.
        """
        following = np.concatenate([record.observations[:, 1:], record.observations[:, :1]], 1)
        task, column = np.indices(record.lengths().shape)
        following[task, np.maximum(record.lengths() - 1, 0), column] = record.last_observations
        ends = np.zeros_like(record.valid)
        ends[:, :-1] = record.starts[:, 1:]
        chosen = chosen & ~ends
        before = (record.observations[chosen] - self._centre) / self._scale
        if self._spec.discrete:
            actions = np.eye(self._spec.action_size)[record.actions[chosen]]
        else:
            actions = record.actions[chosen].astype(np.float64)
        parts = [np.ones((len(before), 1)), before, before**2, actions]
        if before.shape[1] * actions.shape[1] <= 256:
            parts.append(
                (before[:, :, None] * actions[:, None]).reshape(len(before), before.shape[1] * actions.shape[1])
            )
        reward = record.rewards[chosen][:, None]
        # A reward that is a distance is a polynomial only in its square.
        rewards = np.concatenate([reward, reward * np.abs(reward)], 1)
        outputs = np.concatenate([following[chosen] - record.observations[chosen], rewards], 1)
        features = np.clip(np.concatenate(parts, 1), -10, 10)
        return features, outputs.astype(np.float64), np.nonzero(chosen)[0]


def effective_sample_size(weights: Array) -> Array:
    """Number of equally weighted episodes that are worth as much as these: (Σw)² / Σw², 0 without weight.

    Args:
        weights: [..., R], at least 0.

    Returns:
        [...] float64, in [0, R] (Kish 1965).
    """
    squares = np.square(weights).sum(-1)
    return np.where(squares > 0, np.square(weights.sum(-1)) / np.where(squares > 0, squares, 1.0), 0.0)


def _spread(values: Array) -> Array:
    """Standard deviation over the first axis; 1 for what does not vary."""
    std = values.std(0)
    return np.where(std > 1e-6, std, 1.0)
