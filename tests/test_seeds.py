"""No two draws of a run come from the same node of the seed tree."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ssm_metarl import seeds
from ssm_metarl.config import TrainConfig
from ssm_metarl.distributed.resizing import resized
from ssm_metarl.distributed.trainer import MetaTrainer
from ssm_metarl.evaluation.evaluate import evaluate_policy
from ssm_metarl.seeds import Branch, child, seed_for

SMALL: dict[str, Any] = {
    "meta_batch": 3, "episodes": 2, "epochs": 1, "hidden_dim": 8, "state_dim": 4, "minibatches": 3, "seed": 5,
    "learner_threads": 1, "lr_schedule": "constant",
}  # fmt: skip


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Entropy and path of every node that is made."""
    made: list[tuple[Any, ...]] = []

    class Recorded(np.random.SeedSequence):
        def __init__(self, entropy: Any = None, *, spawn_key: Any = (), **options: Any) -> None:
            super().__init__(entropy, spawn_key=spawn_key, **options)
            made.append((entropy, *spawn_key))

    monkeypatch.setattr(np.random, "SeedSequence", Recorded)
    return made


def test_branches_have_numbers_of_their_own() -> None:
    assert len({int(branch) for branch in Branch}) == len(Branch.__members__)


def test_equal_paths_are_equal_nodes_and_others_are_not() -> None:
    assert seed_for(1, Branch.TASKS, 2).spawn_key == (1, 2)
    draws = {tuple(seed_for(1, *path).generate_state(4)) for path in [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)]}
    assert len(draws) == 6
    node = seed_for(1, 3)
    assert tuple(child(node, 0).generate_state(4)) == tuple(child(node, 0).generate_state(4))
    assert tuple(child(node, 0).generate_state(4)) == tuple(seed_for(1, 3, 0).generate_state(4))


def test_no_two_paths_of_a_run_are_equal(nodes: list[tuple[Any, ...]]) -> None:
    trainer = MetaTrainer(TrainConfig.for_task("navigation-2d", inner_steps=2, **SMALL).to_dict())
    for _ in range(4):
        trainer.step()
    evaluate_policy(
        trainer.learner.policy, trainer.train_config, trainer.distribution, trainer.pool, split="test", num_tasks=3,
        steps=2, episodes=2, seed=5,
    )  # fmt: skip
    trainer.stop()
    twice = {path for path, count in Counter(nodes).items() if count > 1}
    assert not twice
    assert {path[1] for path in nodes} >= {
        Branch.ROLLOUTS, Branch.TASKS, Branch.INITIAL_WEIGHTS, Branch.EVALUATION, Branch.MINIBATCHES,
    }  # fmt: skip


def test_a_resize_draws_from_a_node_of_its_own(nodes: list[tuple[Any, ...]]) -> None:
    """At an iteration whose number is that of the initial weights' branch, too."""
    trainer = MetaTrainer(TrainConfig.for_task("navigation-2d", **SMALL).to_dict())
    trainer.meta_iteration = int(Branch.INITIAL_WEIGHTS)
    checkpoint, experience = trainer.checkpoint(), trainer.train_config.experience
    trainer.stop()
    nodes.clear()
    grown, _ = resized(checkpoint, replace(trainer.spec, hidden_dim=12), experience, trainer.distribution)
    assert grown.spec.hidden_dim == 12
    assert (5, Branch.INITIAL_WEIGHTS) not in nodes
    assert (5, Branch.RESIZE, trainer.meta_iteration) in nodes
    assert all(path[1] == Branch.RESIZE for path in nodes if path[0] == 5 and len(path) > 1)
    assert seeds.seed_for is seed_for
