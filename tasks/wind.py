"""`wind-v0`: reach a goal that is known in a wind that is not.

The task of Dorfman et al. (2021, arXiv 2008.02598) as the recurrent baselines of Ni et al. (2022, arXiv 2110.05038)
play it: a point starts at the origin, sees its position, and moves by up to .1 along each axis and by the wind. The
reward is 1 within .03 of the goal (0, 1) after the move, else 0, and an episode has 75 steps. Winds are uniform over
±.08 along each axis. A trial is one episode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.spaces import Box
from numpy.typing import NDArray

from ssm_metarl import presets
from ssm_metarl.checks import lookup
from ssm_metarl.core import ReferenceReturns, Task, TaskDistribution
from ssm_metarl.tasks.batched import BatchedEnv
from ssm_metarl.tasks.parameters import Parameter, stack_parameters
from ssm_metarl.tasks.registry import register

HORIZON = 75
MAX_STEP = 0.1  # along each axis
WIND = 0.08
GOAL, RADIUS = np.array([0.0, 1.0]), 0.03

OBSERVATION_SPACE = Box(-np.inf, np.inf, (2,), np.float32)
ACTION_SPACE = Box(-MAX_STEP, MAX_STEP, (2,), np.float32)
PARAMETERS = {"wind": Parameter(-1.0, 1.0, size=2)}

_LOW, _HIGH = np.float32(-MAX_STEP), np.float32(MAX_STEP)


class WindEnv(BatchedEnv):
    """N points, each in a wind of its own.

    Args:
        winds: [N, 2], moved by it at every step.
    """

    def __init__(self, winds: NDArray[np.floating[Any]]) -> None:
        super().__init__(OBSERVATION_SPACE, ACTION_SPACE, len(winds), HORIZON)
        self._winds = winds.astype(np.float64)
        self._positions = np.zeros_like(self._winds)

    def _start(self, slots: NDArray[np.intp]) -> None:
        self._positions[slots] = 0.0

    def _advance(self, actions: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        self._positions += actions.astype(np.float32, copy=False).clip(_LOW, _HIGH) + self._winds
        squares = np.square(self._positions - GOAL)
        # Written out over the two axes: a reduction's order of additions could depend on the layout.
        distance = np.sqrt(squares[:, 0] + squares[:, 1])
        rewards = np.where(np.isnan(distance), np.nan, distance <= RADIUS)
        return rewards.astype(np.float32), np.zeros(self.num_envs, dtype=np.bool_)

    def _observe(self) -> NDArray[np.float32]:
        return self._positions.astype(np.float32)


class Wind(TaskDistribution):
    """Winds on the plane; a task is `{"wind": [x, y]}`."""

    name = "wind-v0"
    horizon = HORIZON
    observation_space = OBSERVATION_SPACE
    action_space = ACTION_SPACE
    splits = ("train", "validation", "test")
    # Printed by `python tests/tasks/test_meta_mujoco.py`. oracle: knows the wind and moves each axis to the goal by at
    # most .1 a step, 200,000 winds.
    reference = ReferenceReturns(random=0.0, random_sd=0.09, oracle=62.18)
    recommended = presets.of_task("wind-v0")
    in_context = presets.of_task("wind-v0", "rl2")

    def sample(self, n: int, rng: np.random.Generator, split: str = "train") -> list[Task]:
        """Draw n winds, in all splits of the same range; see `TaskDistribution.sample`."""
        lookup(dict.fromkeys(self.splits), split, "split")
        return [{"wind": wind} for wind in rng.uniform(-WIND, WIND, (n, 2)).tolist()]

    def make_vector_env(self, tasks: Sequence[Task], num_episodes: int) -> WindEnv:
        """Build the environments of `tasks`; see `TaskDistribution.make_vector_env`."""
        return WindEnv(stack_parameters(tasks, PARAMETERS, num_episodes)["wind"])


register(Wind.name, Wind)
