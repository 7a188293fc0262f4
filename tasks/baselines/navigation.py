"""Baseline policies of `navigation-2d`."""

from __future__ import annotations

import numpy as np

from ssm_metarl.tasks.baselines.policy import Actions, BaselinePolicy, Observations, Trials


class StayPut(BaselinePolicy):
    """Never moves."""

    def act(self, observations: Observations) -> Actions:
        """See `BaselinePolicy.act`."""
        return np.zeros_like(observations)


class ClairvoyantNavigation(BaselinePolicy):
    """Knows the goal and moves each axis to it as fast as it may, which no player can better."""

    def __init__(self, trials: Trials) -> None:
        super().__init__(trials)
        goals = np.array([task["goal"] for task in trials.tasks], dtype=np.float32)
        self._goals = goals.repeat(trials.num_episodes, axis=0)

    def act(self, observations: Observations) -> Actions:
        """See `BaselinePolicy.act`; the environment clips."""
        return self._goals - observations
