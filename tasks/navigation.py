"""`navigation-2d`: find a hidden goal on a plane, from rewards alone.

The 2D navigation of MAML (Finn et al. 2017, section 5.3, arXiv 1703.03400): a point starts at the origin,
sees its position and moves by up to 0.1 along each axis; the reward is the negative Euclidean distance to the
goal after the move. The episode terminates within 0.01 of the goal along both axes and is truncated after 100
steps.
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

HORIZON = 100
MAX_STEP = 0.1  # along each axis
TOLERANCE = 0.01  # along each axis

OBSERVATION_SPACE = Box(-np.inf, np.inf, (2,), np.float32)
ACTION_SPACE = Box(-MAX_STEP, MAX_STEP, (2,), np.float32)

# As arrays: NumPy would convert a Python number at every step, which takes as long as the operation.
_LOW, _HIGH, _TOLERANCE = (np.array(bound, dtype=np.float32) for bound in (-MAX_STEP, MAX_STEP, TOLERANCE))

REACH = HORIZON * MAX_STEP
PARAMETERS = {"goal": Parameter(-REACH, REACH, size=2)}

# split -> (inner, outer): goals are uniform over the points with inner < max-norm <= outer.
GOALS = {
    "train": (0.0, 0.5),
    "validation": (0.0, 0.5),
    "test": (0.0, 0.5),
    "shifted": (0.5, 0.6),
    "shifted-test": (0.6, 0.75),
}


def draw_goals(n: int, inner: float, outer: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw n goals, [n, 2], uniformly over the points whose max-norm is above `inner` and at most `outer`."""
    goals = rng.uniform(-outer, outer, (n, 2))
    while (inside := np.abs(goals).max(axis=1, initial=0.0) <= inner).any():
        goals[inside] = rng.uniform(-outer, outer, (np.count_nonzero(inside), 2))
    return goals


class NavigationEnv(BatchedEnv):
    """N points on the plane, each with a goal of its own.

    Args:
        goals: [N, 2].
    """

    def __init__(self, goals: NDArray[np.floating[Any]]) -> None:
        super().__init__(OBSERVATION_SPACE, ACTION_SPACE, len(goals), HORIZON)
        self._goals = goals.astype(np.float32)
        self._positions = np.zeros_like(self._goals)

    def _start(self, slots: NDArray[np.intp]) -> None:
        self._positions[slots] = 0.0

    def _advance(self, actions: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        self._positions += actions.astype(np.float32, copy=False).clip(_LOW, _HIGH)
        errors = self._positions - self._goals
        near = np.abs(errors) < _TOLERANCE
        squares = np.square(errors)
        # Written out over the two axes: a reduction's order of additions could depend on the layout.
        return -np.sqrt(squares[:, 0] + squares[:, 1]), near[:, 0] & near[:, 1]

    def _observe(self) -> NDArray[np.float32]:
        return self._positions.copy()


class Navigation2D(TaskDistribution):
    """Goals on the plane; a task is `{"goal": [x, y]}`."""

    name = "navigation-2d"
    horizon = HORIZON
    observation_space = OBSERVATION_SPACE
    action_space = ACTION_SPACE
    splits = tuple(GOALS)
    # Printed by `python tests/tasks/test_reference.py`: 1,000,000 episodes, each on its own training task.
    # random: actions of mean 0 and standard deviation 0.5 of the largest, an untrained Gaussian policy's.
    # oracle: knows the goal and moves each axis to it by at most 0.1 a step, which no player can better.
    reference = ReferenceReturns(random=-55.28, random_sd=23.33, oracle=-0.507)
    recommended = presets.of_task("navigation-2d")
    in_context = presets.of_task("navigation-2d", "rl2")

    def sample(self, n: int, rng: np.random.Generator, split: str = "train") -> list[Task]:
        """Draw n goals of a split; see `TaskDistribution.sample`."""
        inner, outer = lookup(GOALS, split, "split")
        return [{"goal": goal} for goal in draw_goals(n, inner, outer, rng).tolist()]

    def make_vector_env(self, tasks: Sequence[Task], num_episodes: int) -> NavigationEnv:
        """Build the environments of `tasks`; see `TaskDistribution.make_vector_env`."""
        return NavigationEnv(stack_parameters(tasks, PARAMETERS, num_episodes)["goal"])


register(Navigation2D.name, Navigation2D)
