"""How likely stored episodes are under the current task."""

from __future__ import annotations

import numpy as np

from ssm_metarl.algorithms.rollouts import Array, Rollouts
from ssm_metarl.algorithms.spec import PolicySpec

MODEL_STEPS = 64
"""Steps of a stored episode, evenly spread, at which it is compared with a task: consecutive ones are alike."""


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
        task, slot = np.indices(record.lengths().shape)
        following[task, np.maximum(record.lengths() - 1, 0), slot] = record.last_observations
        ends = np.zeros_like(record.valid)
        ends[:, :-1] = record.starts[:, 1:]
        chosen = chosen & ~ends
        before = (record.observations[chosen] - self._centre) / self._scale
        actions = self._spec.encoded(record.actions[chosen]).astype(np.float64)
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
