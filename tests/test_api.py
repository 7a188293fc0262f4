"""The Python interface as the README shows it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssm_metarl import (
    MetaTrainer,
    PolicySpec,
    Rollouts,
    SSMPolicy,
    TaskDistribution,
    TrainConfig,
    evaluate_checkpoint,
    load_policy,
    register,
    train,
)
from ssm_metarl.distributed.metrics import log_line
from ssm_metarl.tasks import Task, make
from ssm_metarl.tasks import registry as base

SMALL: dict[str, Any] = {"meta_batch": 4, "episodes": 3, "hidden_dim": 16, "state_dim": 8, "epochs": 1}

README = Path(__file__).resolve().parents[1] / "README.md"

AFTERWARDS = """
import ray
assert not ray.is_initialized()
assert policy.spec == checkpoint.spec
assert result.metrics["iteration"] == 2
"""


def test_the_readmes_example_runs_in_a_fresh_process_without_ray(tmp_path: Path) -> None:
    example, acting = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert "player.act(observation, reward=reward)" in acting
    smaller = ", ".join(f"{name}={value}" for name, value in {"iterations": 2, **SMALL}.items())
    program, replaced = re.subn(r"iterations=\d+", smaller, example)
    assert replaced == 1
    (tmp_path / "tmp").mkdir()
    result = subprocess.run(
        [sys.executable, "-c", program + AFTERWARDS + acting],
        cwd=tmp_path,
        env={**os.environ, "HOME": str(tmp_path), "TMPDIR": str(tmp_path / "tmp")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout
    assert not (tmp_path / "tmp" / "ray").exists()
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")} == {"tmp", "runs"}


def test_a_trainer_stepped_by_hand_is_the_run_that_train_makes(tmp_path: Path) -> None:
    config = TrainConfig().replace(iterations=2, **SMALL)
    trainer = MetaTrainer(config.to_dict())
    by_hand = [trainer.train() for _ in range(2)]
    trainer.save_checkpoint(str(tmp_path / "by hand"))
    trainer.stop()
    seen: list[dict[str, Any]] = []
    result = train(config, tmp_path / "run", on_iteration=seen.append)
    for mine, theirs in zip(by_hand, seen, strict=True):
        line = log_line(mine)
        assert {name: line[name] for name in theirs if name != "seconds"} == {
            name: value for name, value in theirs.items() if name != "seconds"
        }
    mine, theirs = load_policy(tmp_path / "by hand")[1], load_policy(result.checkpoint)[1]
    assert mine.progress == theirs.progress
    for name, value in mine.policy.items():
        np.testing.assert_array_equal(value, theirs.policy[name])


def test_a_family_of_the_users_own_is_trained_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_FACTORIES", dict(base._FACTORIES))
    navigation = make("navigation-2d")

    class Corner(TaskDistribution):
        name = "corner"
        horizon = navigation.horizon
        observation_space = navigation.observation_space
        action_space = navigation.action_space
        splits = ("train", "test")
        reference = navigation.reference
        recommended = {"episodes": 2, "inner_lr": 0.25}  # noqa: RUF012

        def sample(self, n: int, rng: np.random.Generator, split: str = "train") -> list[Task]:
            return [{"goal": goal} for goal in rng.uniform(0.4, 0.5, (n, 2)).tolist()]

        def make_vector_env(self, tasks: Sequence[Task], num_episodes: int) -> Any:
            return navigation.make_vector_env(tasks, num_episodes)

    register("corner", Corner)
    config = TrainConfig.for_task("corner", iterations=1, **{**SMALL, "episodes": 3})
    assert (config.meta.inner_lr, config.experience.episodes) == (0.25, 3)
    run = train(config, tmp_path).run_dir
    report = evaluate_checkpoint(run, num_tasks=2, steps=1)
    assert (report.task, report.returns.shape) == ("corner", (2, 2))


def test_a_loaded_policy_acts_and_its_parts_have_their_public_types(tmp_path: Path) -> None:
    import torch

    result = train(TrainConfig().replace(iterations=1, **SMALL), tmp_path)
    policy, checkpoint = load_policy(result.run_dir)
    assert isinstance(policy, SSMPolicy)
    assert isinstance(policy.spec, PolicySpec)
    assert checkpoint.spec == policy.spec
    output = policy(torch.zeros(3, 5, 2, policy.spec.input_size)[0])
    assert torch.isfinite(output.actions.mean).all()
    assert {"observations", "valid", "tasks"} <= set(Rollouts.__dataclass_fields__)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"inner_lrr": 0.1}, r"^Unknown option key 'inner_lrr': did you mean 'inner_lr'\?$"),
        ({"iterations": 0}, r"^iterations must be an integer of 1 or more, not 0\.$"),
        ({"iterations": 2.5}, r"^iterations must be an integer of 1 or more, not 2\.5\.$"),
        ({"seed": -1}, r"^seed must be an integer of 0 or more, not -1\.$"),
        ({"outer_lr": float("inf")}, r"^outer_lr must be a number above 0, not inf\.$"),
        ({"sample_timeout_s": 0}, r"^sample_timeout_s must be a number above 0, not 0\.$"),
        ({"step_weights": [0, 0]}, r"^step_weights must have a positive sum"),
    ],
)
def test_a_config_is_checked_when_it_is_built(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        TrainConfig.for_task("cartpole", **options)


def test_an_unknown_family_is_refused_with_the_valid_ones() -> None:
    sentence = r"^There is no task family 'cart-pole', did you mean 'cartpole'\? \(valid: ant-dir, .*cartpole, .*\)\.$"
    for build in (TrainConfig.for_task, lambda task: TrainConfig(task=task).family()):
        with pytest.raises(ValueError, match=sentence):
            build("cart-pole")


def test_a_config_survives_json() -> None:
    config = TrainConfig.for_task("cartpole", inner_steps=2, step_weights=(1, 0, 3), seed=4)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
