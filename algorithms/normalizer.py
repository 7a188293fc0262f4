"""Running moments of observations, rewards and returns: the scales of a policy's inputs and of its critic's rewards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ssm_metarl.algorithms.inputs import task_numbers
from ssm_metarl.algorithms.returns import discounted_returns
from ssm_metarl.algorithms.rollouts import Array, Rollouts
from ssm_metarl.algorithms.spec import PolicySpec

SMALLEST = 1e-6
"""Below this a standard deviation is taken for rounding: what does not vary is not scaled."""


class RunningMoments:
    """Mean and standard deviation of all samples so far, in float64 (Chan et al. 1979, eq. 2.1).

    Args:
        size: numbers of a sample.
    """

    def __init__(self, size: int) -> None:
        self.count, self.mean, self._squares = 0, np.zeros(size), np.zeros(size)

    def update(self, samples: Array) -> None:
        """Take in samples [n, size]."""
        if not len(samples):
            return
        samples = samples.astype(np.float64)
        mean = samples.mean(0)
        self._add(len(samples), mean, np.square(samples - mean).sum(0))

    def merge(self, other: RunningMoments) -> None:
        """Take in the samples that other moments are of."""
        if other.count:
            self._add(other.count, other.mean, other._squares)

    def _add(self, count: int, mean: Array, squares: Array) -> None:
        total = self.count + count
        difference = mean - self.mean
        self._squares += squares + difference**2 * self.count * count / total
        self.mean = self.mean + difference * count / total
        self.count = total

    @property
    def deviation(self) -> Array:
        """Standard deviation [size]."""
        return np.asarray(np.sqrt(self._squares / max(self.count, 1)))

    @property
    def scale(self) -> Array:
        """Standard deviation [size]; 1 where there is none."""
        return np.where(self.deviation > SMALLEST, self.deviation, 1.0)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"count": self.count, "mean": self.mean.tolist(), "squares": self._squares.tolist()}

    def load(self, values: Mapping[str, Any]) -> None:
        """The inverse of `to_dict`."""
        self.count = int(values["count"])
        self.mean, self._squares = np.array(values["mean"]), np.array(values["squares"])


class Normalizer:
    """What a policy's normaliser is set to: moments of the observations, of the discounted returns, and of the tasks.

    The learner updates it after every iteration; at test time a policy keeps what it was trained with.

    Args:
        spec: says what is normalised.
        discount: of the returns, a step.
    """

    def __init__(self, spec: PolicySpec, discount: float) -> None:
        self._spec, self._discount = spec, discount
        self._observations = RunningMoments(spec.observation_size)
        self._rewards, self._returns = RunningMoments(1), RunningMoments(1)
        self._tasks = RunningMoments(spec.task_size)

    def update(self, rollouts: Rollouts) -> None:
        """Take in the valid steps of a record."""
        self.merge(self.of(rollouts))

    def of(self, rollouts: Rollouts) -> dict[str, RunningMoments]:
        """The moments of a record alone, by name."""
        spec, valid = self._spec, rollouts.valid
        found = {name: RunningMoments(moments.mean.size) for name, moments in self._moments().items()}
        if spec.task_size:
            found["tasks"].update(task_numbers(rollouts.tasks))
        if spec.normalizes:
            found["observations"].update(rollouts.observations[valid])
            found["rewards"].update(rollouts.rewards[valid][:, None])
            returns = discounted_returns(rollouts.rewards, valid, self._discount)
            found["returns"].update(returns[valid][:, None])
        return found

    def merge(self, others: Mapping[str, RunningMoments]) -> None:
        """Take in the samples that other moments are of, as of `of`."""
        for name, moments in self._moments().items():
            moments.merge(others[name])

    def arrays(self) -> dict[str, Array]:
        """`input_mean` and `input_scale` [I], `reward_scale` [1], `task_mean` and `task_scale` [P]."""
        spec = self._spec
        tasks = {"task_mean": self._tasks.mean, "task_scale": self._tasks.scale} if spec.task_size else {}
        found = {**(self._of_steps() if spec.normalizes else {}), **tasks}
        return {name: value.astype(np.float32) for name, value in found.items()}

    def _of_steps(self) -> dict[str, Array]:
        spec = self._spec
        mean, scale = np.zeros(spec.input_size), np.ones(spec.input_size)
        if spec.normalize_observations:
            mean[: spec.observation_size] = self._observations.mean
            scale[: spec.observation_size] = self._observations.scale
        reward_scale = self._returns.scale if spec.scale_rewards else np.ones(1)
        if spec.inputs == "full":
            # What the policy reads is one reward, not a return: divided by a long return's spread it would be lost.
            scale[-2] = self._rewards.scale[0] if spec.scale_rewards else 1.0
        return {"input_mean": mean, "input_scale": scale, "reward_scale": reward_scale}

    def to_dict(self) -> dict[str, Any]:
        """JSON values; empty where nothing is normalised."""
        return {name: moments.to_dict() for name, moments in self._moments().items()}

    def load(self, values: Mapping[str, Any]) -> None:
        """The inverse of `to_dict`.

        Raises:
            ValueError: moments are missing, as in what an older version wrote.
        """
        if values:
            if missing := sorted(set(self._moments()) - set(values)):
                raise ValueError(f"The checkpoint has no moments of {', '.join(missing)}: an older version wrote it.")
            for name, moments in self._moments().items():
                moments.load(values[name])

    def _moments(self) -> dict[str, RunningMoments]:
        steps = {"observations": self._observations, "rewards": self._rewards, "returns": self._returns}
        return {**(steps if self._spec.normalizes else {}), **({"tasks": self._tasks} if self._spec.task_size else {})}
