"""A run whose actions are several integers, from training to acting."""

from __future__ import annotations

import numpy as np
import pytest

import habits
from ssm_metarl import load_player
from ssm_metarl.config import TrainConfig
from ssm_metarl.distributed.train import TrainResult, train
from ssm_metarl.evaluation.evaluate import evaluate_checkpoint
from ssm_metarl.storage.checkpoint import load_checkpoint

RUN = {"meta_batch": 20, "episodes": 10, "hidden_dim": 16, "state_dim": 4, "outer_lr": 0.01, "learner_threads": 1}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    folder = tmp_path_factory.mktemp("several") / "run"
    return train(TrainConfig.for_task("habits:Bits", iterations=5, **RUN), folder)


def test_it_learns_to_set_the_bits_that_a_task_wants(run: TrainResult) -> None:
    """Of 12 that are right at best in four steps, chance has 6."""
    before, after = run.metrics["return_by_step"]
    assert before == pytest.approx(6, abs=1)
    assert after > 10


def test_a_checkpoint_keeps_the_heads_and_is_evaluated(run: TrainResult) -> None:
    checkpoint = load_checkpoint(run.checkpoint)
    assert checkpoint.spec.action_heads == (2, 2, 2)
    found = evaluate_checkpoint(run.checkpoint, num_tasks=6, num_workers=0, trust_checkpoint_code=True).summary()
    assert found["task"] == "habits:Bits"
    resumed = train(
        TrainConfig.from_checkpoint(checkpoint.config).replace(iterations=6), run.checkpoint.parent, resume=True
    )
    assert resumed.metrics["iteration"] == 6


def test_a_player_acts_and_adapts_in_an_environment_of_ones_own(run: TrainResult) -> None:
    player = load_player(run.checkpoint, seed=1)
    action = player.act(np.zeros(1))
    assert (action.dtype, action.shape) == (np.int64, (3,))
    assert player.act(np.zeros(1), reward=2.0) in habits.Bits.action_space
    player.reset()
    assert player.act(np.zeros((5, 1))).shape == (5, 3)
    env = habits.Bits()
    env.set_task({"bits": [1, 0, 1]})
    adapted = player.adapt(env, episodes=20, steps=1)
    assert adapted.adaptation is not None
    returns = adapted.adaptation.returns[0]
    assert returns[1] > returns[0] + 2
