"""A family of tasks written for speed: hold a point near the origin against a wind that is not observed.

python examples/windy.py train --task windy --iterations 10 --num-workers 0
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from gymnasium.spaces import Box

from ssm_metarl.tasks import BatchedEnv, ReferenceReturns, Task, TaskDistribution, register

HORIZON = 50
WINDS = {
    "train": (0.0, 0.6),
    "validation": (0.0, 0.6),
    "test": (0.0, 0.6),
    "shifted": (0.6, 0.7),
    "shifted-test": (0.7, 0.8),
}


class WindyEnv(BatchedEnv):
    """N points on a line, each with a wind of its own, [N]."""

    def __init__(self, wind: np.ndarray) -> None:
        super().__init__(Windy.observation_space, Windy.action_space, len(wind), HORIZON)
        self._wind = wind.astype(np.float32)
        self._position = np.zeros(len(wind), np.float32)

    def _start(self, slots: np.ndarray) -> None:
        self._position[slots] = [self._generator(slot).uniform(-0.5, 0.5) for slot in slots.tolist()]

    def _advance(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self._position += np.float32(0.1) * (actions[:, 0].clip(-1, 1) + self._wind)
        return -np.abs(self._position), np.zeros(self.num_envs, bool)  # rewards, terminated

    def _observe(self) -> np.ndarray:
        return self._position[:, None].copy()


class Windy(TaskDistribution):
    """Winds; a task is {"wind": w}."""

    name = "windy"
    horizon = HORIZON
    observation_space = Box(-np.inf, np.inf, (1,), np.float32)
    action_space = Box(-1.0, 1.0, (1,), np.float32)
    splits = tuple(WINDS)
    # 20,000 episodes of normal actions with standard deviation 0.3, an untrained policy's
    reference = ReferenceReturns(random=-41.1, random_sd=23.7, oracle=None)
    recommended: ClassVar = {"episodes": 10, "initial_std": 0.3}

    def sample(self, n: int, rng: np.random.Generator, split: str = "train") -> list[Task]:
        """Draw n winds of a split, to the left or to the right."""
        if split not in WINDS:
            raise ValueError(f"There is no split {split!r} (valid: {', '.join(WINDS)}).")
        winds = rng.uniform(*WINDS[split], n) * rng.choice([-1, 1], n)
        return [{"wind": wind} for wind in winds.tolist()]

    def make_vector_env(self, tasks: Sequence[Task], num_episodes: int) -> WindyEnv:
        """Build the environments: number m * num_episodes + k is slot k of task m."""
        return WindyEnv(np.repeat([task["wind"] for task in tasks], num_episodes))


register("windy", Windy)

if __name__ == "__main__":
    from ssm_metarl.cli.main import main

    raise SystemExit(main())
