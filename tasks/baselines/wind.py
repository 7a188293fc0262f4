"""Baseline policies of `wind-v0`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ssm_metarl.tasks.baselines.policy import Actions, BaselinePolicy, Floats, Observations, Trials
from ssm_metarl.tasks.wind import GOAL, MAX_STEP


class ClairvoyantWind(BaselinePolicy):
    """Knows the wind and moves each axis to the goal as fast as it may, which no player can better."""

    def __init__(self, trials: Trials) -> None:
        super().__init__(trials)
        winds = np.array([task["wind"] for task in trials.tasks], dtype=np.float32)
        self.winds = winds.repeat(trials.num_episodes, axis=0)

    def act(self, observations: Observations) -> Actions:
        """See `BaselinePolicy.act`; the environment clips."""
        return (GOAL - observations - self.winds).astype(np.float32)


class DeadReckoning(ClairvoyantWind):
    """Takes the wind for calm before it has moved, and then for what its last move cannot explain."""

    def __init__(self, trials: Trials) -> None:
        super().__init__(trials)
        self.winds = np.zeros_like(self.winds)
        self._before = np.zeros_like(self.winds)

    def act(self, observations: Observations) -> Actions:
        """See `BaselinePolicy.act`."""
        self._before = observations.copy()
        return super().act(observations)

    def learn(self, actions: Actions, rewards: Floats, observations: Observations, starts: NDArray[np.bool_]) -> None:
        """See `BaselinePolicy.learn`; a step that ends an episode shows nothing of its last place."""
        winds = observations - self._before - actions.clip(-MAX_STEP, MAX_STEP)
        self.winds = np.where(starts[:, None], self.winds, winds).astype(np.float32)
