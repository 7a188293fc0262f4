"""`cartpole`: balance a pole on a cart whose physics, and even the direction of a push, are hidden.

The dynamics are those of gymnasium's CartPole-v1 (Barto, Sutton and Anderson 1983, as in its
`classic_control/cartpole.py`), operation for operation, so that a task with CartPole-v1's values is that
environment bit by bit. State, in this order: position (m), velocity (m/s), angle (rad), angular velocity
(rad/s), kept in float64 and observed in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium.spaces import Box, Discrete
from numpy.typing import NDArray

from ssm_metarl import presets
from ssm_metarl.checks import lookup
from ssm_metarl.core import ReferenceReturns, Task, TaskDistribution
from ssm_metarl.tasks.batched import BatchedEnv
from ssm_metarl.tasks.parameters import Parameter, stack_parameters
from ssm_metarl.tasks.registry import register

HORIZON = 500
TIME_STEP = 0.02  # s
MAX_POSITION = 2.4  # m
MAX_ANGLE = 12 * 2 * math.pi / 360  # rad
START = 0.05  # every state variable starts within this of 0

_BOUND = np.array([2 * MAX_POSITION, np.inf, 2 * MAX_ANGLE, np.inf], dtype=np.float32)
OBSERVATION_SPACE = Box(-_BOUND, _BOUND, dtype=np.float32)
ACTION_SPACE: Discrete[np.int64] = Discrete(2)

PARAMETERS = {
    "gravity": Parameter(0.0, 100.0),  # m/s²
    "masscart": Parameter(0.01, 100.0),  # kg
    "masspole": Parameter(0.001, 100.0),  # kg
    "length": Parameter(0.01, 100.0),  # m, half the pole's
    "force_mag": Parameter(0.0, 1000.0),  # N
    "direction": Parameter(-1, 1, choices=(-1, 1)),  # -1: action 1 pushes to the left
}

CARTPOLE_V1: Task = {
    "gravity": 9.8,
    "masscart": 1.0,
    "masspole": 0.1,
    "length": 0.5,
    "force_mag": 10.0,
    "direction": 1,
}

_TRAIN = {
    "gravity": (5.0, 15.0),
    "masscart": (0.5, 2.0),
    "masspole": (0.05, 0.3),
    "length": (0.25, 1.0),
    "force_mag": (6.0, 14.0),
}
# split -> parameter -> range of a uniform draw; the direction is always ±1 with equal chance.
RANGES = {
    "train": _TRAIN,
    "validation": _TRAIN,
    "test": _TRAIN,
    "shifted": _TRAIN | {"gravity": (15.0, 18.0), "length": (1.0, 1.25)},
    "shifted-test": _TRAIN | {"gravity": (18.0, 20.0), "length": (1.25, 1.5)},
}


@dataclass(frozen=True)
class Physics:
    """Constants of N carts, each [N], in the units of `PARAMETERS`; `push` is the force of action 1."""

    gravity: NDArray[np.float64]
    masspole: NDArray[np.float64]
    total_mass: NDArray[np.float64]
    length: NDArray[np.float64]
    polemass_length: NDArray[np.float64]
    push: NDArray[np.float64]

    @classmethod
    def of(cls, parameters: Mapping[str, NDArray[np.float64]]) -> Physics:
        """Derive the constants from arrays [N] of the task parameters."""
        return cls(
            gravity=parameters["gravity"],
            masspole=parameters["masspole"],
            total_mass=parameters["masspole"] + parameters["masscart"],
            length=parameters["length"],
            polemass_length=parameters["masspole"] * parameters["length"],
            push=parameters["direction"] * parameters["force_mag"],
        )


def derivative(state: NDArray[np.float64], force: NDArray[np.float64], physics: Physics) -> NDArray[np.float64]:
    """Time derivative of the state.

    Args:
        state: [4, N].
        force: [N], N, positive to the right.
        physics: constants of the N carts.

    Returns:
        [4, N]: velocity, acceleration, angular velocity, angular acceleration.

    Source: https://coneural.org/florian/papers/05_cart_pole.pdf, in gymnasium's order of operations.
    """
    _, velocity, angle, angular_velocity = state
    cos, sin = np.cos(angle), np.sin(angle)
    thrust = (force + physics.polemass_length * np.square(angular_velocity) * sin) / physics.total_mass
    angular_acceleration = (physics.gravity * sin - cos * thrust) / (
        physics.length * (4.0 / 3.0 - physics.masspole * np.square(cos) / physics.total_mass)
    )
    acceleration = thrust - physics.polemass_length * angular_acceleration * cos / physics.total_mass
    return np.array((velocity, acceleration, angular_velocity, angular_acceleration))


class CartPoleEnv(BatchedEnv):
    """N carts, each with physics of its own.

    Args:
        physics: constants of the N carts.
        observation_space: of one cart; another one is for a subclass that observes something else.
        horizon: most steps of an episode.
    """

    def __init__(self, physics: Physics, observation_space: Box = OBSERVATION_SPACE, horizon: int = HORIZON) -> None:
        num_envs = len(physics.gravity)
        super().__init__(observation_space, ACTION_SPACE, num_envs, horizon)
        self._physics = physics
        self._state = np.zeros((4, num_envs))

    def _start(self, slots: NDArray[np.intp]) -> None:
        draws = [self._generator(slot).uniform(-START, START, 4) for slot in slots.tolist()]
        self._state[:, slots] = np.transpose(draws)

    def _advance(self, actions: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        right = actions == 1
        if np.count_nonzero(right) != np.count_nonzero(actions):
            raise ValueError("An action of cartpole must be 0 or 1.")
        force = np.where(right, self._physics.push, -self._physics.push)
        self._state += TIME_STEP * derivative(self._state, force, self._physics)
        position, _, angle, _ = self._state
        terminated = (np.abs(position) > MAX_POSITION) | (np.abs(angle) > MAX_ANGLE)
        return np.ones(self.num_envs, dtype=np.float32), terminated

    def _observe(self) -> NDArray[np.float32]:
        return self._state.T.astype(np.float32, order="C")


class CartPole(TaskDistribution):
    """Carts with poles of unknown physics; a task has the keys of `PARAMETERS`."""

    name = "cartpole"
    horizon = HORIZON
    observation_space = OBSERVATION_SPACE
    action_space = ACTION_SPACE
    splits = tuple(RANGES)
    # Printed by `python tests/tasks/test_reference.py`: 1,000,000 episodes, each on its own training task.
    # random: both actions with equal chance. oracle: a reward of 1 at each of 500 steps, the most there is.
    reference = ReferenceReturns(random=27.12, random_sd=15.90, oracle=float(HORIZON))
    recommended = presets.of_task("cartpole")
    in_context = presets.of_task("cartpole", "rl2")

    def sample(self, n: int, rng: np.random.Generator, split: str = "train") -> list[Task]:
        """Draw the physics of n carts; see `TaskDistribution.sample`."""
        ranges = lookup(RANGES, split, "split")
        values = {key: rng.uniform(low, high, n).tolist() for key, (low, high) in ranges.items()}
        values["direction"] = rng.choice([-1, 1], n).tolist()
        return [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]

    def make_vector_env(self, tasks: Sequence[Task], num_episodes: int) -> CartPoleEnv:
        """Build the environments of `tasks`; see `TaskDistribution.make_vector_env`."""
        return CartPoleEnv(Physics.of(stack_parameters(tasks, PARAMETERS, num_episodes)))


register(CartPole.name, CartPole)
