"""Meta-train a policy on a gymnasium environment of your own, in a few seconds.

python examples/own_family.py
"""

from __future__ import annotations

import time
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box

from ssm_metarl import TrainConfig, evaluate_checkpoint, train


class HiddenGoal(gymnasium.Env[Any, Any]):
    """Reach a goal on a line that the observation, the own position, does not show."""

    horizon = 20
    observation_space = Box(-np.inf, np.inf, (1,), np.float32)
    action_space = Box(-0.2, 0.2, (1,), np.float32)

    def sample_tasks(self, n: int) -> list[dict[str, float]]:
        return [{"goal": goal} for goal in self.np_random.uniform(-1, 1, n)]

    def set_task(self, task: dict[str, float]) -> None:
        self.goal = task["goal"]

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.position = np.zeros(1, np.float32)
        return self.position, {}

    def step(self, action: Any) -> Any:
        self.position = self.position + action
        return self.position, -abs(float(self.position[0]) - self.goal), False, False, {}


def main(run: str, iterations: int = 10) -> list[float]:
    """Train without Ray, and return the returns on held-out goals after 0 and 1 inner steps."""
    config = TrainConfig.for_task("own_family:HiddenGoal", iterations=iterations, meta_batch=20, episodes=8, seed=1)
    result = train(config, run)
    report = evaluate_checkpoint(result.checkpoint, split="test", num_tasks=40, steps=1).summary()
    print(f"return on held-out goals after 0 and 1 inner steps: {np.round(report['return'], 1)}")
    return report["return"]


if __name__ == "__main__":
    main(time.strftime("runs/own-family-%Y%m%d-%H%M%S"))
