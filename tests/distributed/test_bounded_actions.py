"""Actions in whatever unit a Box has: a policy acts in [-1, 1], which is mapped to the Box."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box

from ssm_metarl.config import TrainConfig
from ssm_metarl.distributed.trainer import MetaTrainer


class Reach(gymnasium.Env[Any, Any]):
    """Say the hidden number of the upper half of a Box far from 0."""

    horizon = 5
    observation_space = Box(-1, 1, (1,), np.float32)
    action_space = Box(5.0, 7.0, (1,), np.float32)

    def sample_tasks(self, n: int) -> list[dict[str, float]]:
        return [{"goal": float(goal)} for goal in self.np_random.uniform(6, 7, n)]

    def set_task(self, task: dict[str, float]) -> None:
        self.goal = task["goal"]

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        return np.zeros(1, np.float32), -abs(float(action[0]) - self.goal), False, False, {}


class Unit(Reach):
    """The same problem around 0."""

    action_space = Box(-1.0, 1.0, (1,), np.float32)

    def step(self, action: Any) -> Any:
        return super().step(np.asarray(action) + 6)


def test_a_box_far_from_0_is_learnt_as_one_around_it() -> None:
    returns = {}
    for name in ("Reach", "Unit"):
        options = {"num_workers": 0, "learner_threads": 1, "meta_batch": 10, "episodes": 10}
        trainer = MetaTrainer(TrainConfig.for_task(f"{__name__}:{name}", **options).to_dict())
        returns[name] = [trainer.step()["return_after"] for _ in range(8)]
        trainer.cleanup()
    assert returns["Reach"] == pytest.approx(returns["Unit"], rel=0.05)
    assert returns["Reach"][-1] > returns["Reach"][0]
