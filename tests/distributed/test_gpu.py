"""On a GPU a run takes the course that it takes on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ssm_metarl.config import TrainConfig
from ssm_metarl.distributed.trainer import MetaTrainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")]

SMALL = {"meta_batch": 8, "episodes": 4, "epochs": 2, "learner_threads": 1}


def weights_after(iterations: int, task: str, **options: Any) -> dict[str, Any]:
    trainer = MetaTrainer.of_run(TrainConfig.for_task(task, **{**SMALL, **options}))
    try:
        for _ in range(iterations):
            trainer.step()
        return trainer.learner.weights()
    finally:
        trainer.stop()


@pytest.mark.parametrize("learners", [0, 1])
@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("navigation-2d", {"algorithm": "promp"}),
        ("navigation-2d", {"algorithm": "maml"}),
        # Continuous actions: one integer that falls on another side would make another run of it.
        ("navigation-2d", {"algorithm": "rl2", "memory_slots": 4, "separate_critic": True}),
    ],
)
def test_a_run_on_a_gpu_follows_that_on_the_cpu(
    ray_session: None, task: str, options: dict[str, Any], learners: int
) -> None:
    expected = weights_after(3, task, **options, device="cpu")
    found = weights_after(3, task, **options, device="cuda", num_learners=learners)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-4, err_msg=name)
