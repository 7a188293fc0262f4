"""The learner group: the same metrics and weights to the bit as with the learner in the driver, whoever dies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest

from builders import SMALL, assert_equal_arrays
from ssm_metarl.config import TrainConfig
from ssm_metarl.distributed import learner as learner_module
from ssm_metarl.distributed import trainer as trainer_module
from ssm_metarl.distributed.trainer import MetaTrainer

pytestmark = pytest.mark.usefixtures("ray_session", "enough_processors")

NORMALIZED = {"normalize_observations": True, "scale_rewards": True}

CASES: dict[str, dict[str, Any]] = {
    "promp": {"task": "navigation-2d", "epochs": 2, "replay_episodes": 3},
    "two steps, normalised": {
        "task": "cartpole",
        "inner_steps": 2,
        "step_weights": (1, 0, 2),
        "epochs": 2,
        **NORMALIZED,
    },
    "time": {"task": "cartpole", "baseline": "time", "epochs": 2},
    "critic in minibatches": {"task": "cartpole", "algorithm": "rl2", "baseline": "critic", "minibatches": 2},
    "privileged": {
        "task": "navigation-2d",
        "algorithm": "rl2",
        "baseline": "privileged",
        "minibatches": 2,
        "trial_episodes": 2,
        **NORMALIZED,
    },
    "maml": {"task": "navigation-2d", "algorithm": "maml", "baseline": "critic"},
}

Run = tuple[list[dict[str, Any]], dict[str, Any]]
"""What must not depend on the machine: metrics, and all that a checkpoint has."""


@pytest.fixture
def enough_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' Ray has a CPU for each of four actors, but none for the trainer."""
    monkeypatch.setattr(trainer_module, "check_resources", lambda *needed: None)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """One task a shard, or two in minibatches, so that there is something to share."""

    def shards(shape: Any, minibatches: int) -> list[slice]:
        size = 1 if minibatches == 1 else 2
        return [slice(i, min(i + size, shape[0])) for i in range(0, shape[0], size)]

    monkeypatch.setattr(learner_module, "task_shards", shards)


@contextmanager
def running(distribution: Any = None, **options: Any) -> Iterator[MetaTrainer]:
    config = TrainConfig.for_task(options.pop("task"), **{**SMALL, "meta_batch": 8, **options}).to_dict()
    trainer = MetaTrainer({**config, "task_distribution": distribution})
    try:
        yield trainer
    finally:
        trainer.stop()


def result(trainer: MetaTrainer, iterations: int = 2, before: Callable[[int], None] = lambda iteration: None) -> Run:
    metrics = []
    for iteration in range(iterations):
        before(iteration)
        line = trainer.step()
        metrics.append({name: value for name, value in line.items() if name not in ("seconds", "restarts")})
    checkpoint = trainer.checkpoint()
    arrays = {**checkpoint.policy, **checkpoint.optimizer}
    arrays |= {f"replay {name}": array for name, array in (trainer.replay.arrays() if trainer.replay else {}).items()}
    moments = checkpoint.progress.get("normalizer", {})
    arrays |= {f"{name} {part}": np.array(value) for name, own in moments.items() for part, value in own.items()}
    return metrics, arrays


@cache
def in_driver(case: str) -> Run:
    with running(**CASES[case]) as trainer:
        return result(trainer)


def assert_same_run(run: Run, expected: Run) -> None:
    assert run[0] == expected[0]
    assert_equal_arrays(run[1], expected[1])


@pytest.mark.parametrize("learners", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES)
def test_the_result_depends_neither_on_learners_nor_on_workers(case: str, workers: int, learners: int) -> None:
    with running(**CASES[case], num_workers=workers, num_learners=learners) as trainer:
        assert_same_run(result(trainer), in_driver(case))
