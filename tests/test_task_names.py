"""Families by name, from training to evaluation: gymnasium's environments, one's own class, options and ranges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssm_metarl.cli.main import main
from ssm_metarl.config import TrainConfig
from ssm_metarl.distributed.train import train
from ssm_metarl.evaluation.evaluate import evaluate_checkpoint
from ssm_metarl.storage.checkpoint import load_checkpoint
from ssm_metarl.tasks import make

SMALL = {
    "iterations": 1,
    "meta_batch": 3,
    "episodes": 2,
    "epochs": 1,
    "hidden_dim": 8,
    "state_dim": 4,
    "learner_threads": 1,
}
PENDULUM = {"task_ranges": {"g": [8.0, 12.0], "l": [0.5, 1.5]}, "task_options": {"horizon": 30}}

OWN = '''
import gymnasium
import numpy as np


class Reach(gymnasium.Env):
    """Come near to a number."""

    observation_space = gymnasium.spaces.Box(-10.0, 10.0, (1,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
    max_episode_steps = 12

    def __init__(self):
        self.goal, self.at = 0.0, 0.0

    def sample_tasks(self, n, rng):
        return [{"goal": goal} for goal in rng.uniform(-3, 3, n).tolist()]

    def set_task(self, task):
        self.goal = task["goal"]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at = 0.0
        return np.array([self.at], np.float32), {}

    def step(self, action):
        self.at += float(action[0])
        return np.array([self.at], np.float32), -abs(self.at - self.goal), False, False, {}
'''


def test_a_pendulum_of_unknown_gravity_and_length(tmp_path: Path, ray_session: None) -> None:
    """Trained in process and on workers alike; the checkpoint knows the ranges."""
    found = []
    for workers in (0, 2):
        config = TrainConfig.for_task("gym:Pendulum-v1", **{**SMALL, **PENDULUM}, num_workers=workers)
        result = train(config, tmp_path / str(workers))
        assert result.checkpoint is not None
        found.append(load_checkpoint(result.checkpoint).policy)
    for name, value in found[0].items():
        np.testing.assert_array_equal(value, found[1][name], err_msg=name)
    assert load_checkpoint(result.checkpoint).config["task_ranges"] == PENDULUM["task_ranges"]
    evaluation = evaluate_checkpoint(result.checkpoint, num_tasks=3, steps=1)
    assert evaluation.returns.shape == (3, 2)
    assert (evaluation.returns < 0).all()
    assert (evaluation.lengths == 30).all()
    heavy = evaluate_checkpoint(result.checkpoint, num_tasks=3, steps=0, task_ranges={"g": [30.0, 30.0]})
    assert (heavy.returns != evaluation.returns[:, :1]).all()


def test_a_class_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_reach.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "own"
    sizes = [word for name, value in SMALL.items() for word in ("--" + name.replace("_", "-"), str(value))]
    arguments = ["train", "--task", "own_reach:Reach", "--task-options", '{"horizon": 12}', *sizes]
    assert main([*arguments, "--num-workers", "0", "--eval-tasks", "3", "--run-dir", str(run)]) == 0
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["task"] == "own_reach:Reach"
    assert evaluation["episode_length"] == [12.0] * 2
    assert main(["evaluate", str(run), "--num-tasks", "2", "--steps", "1"]) == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--task-ranges", "gravity"], "is not a JSON object"),
        (["--task-ranges", '{"gravity": [5, 15]}'], "Only gym:ID takes task ranges"),
        (["--task-options", '{"armz": 3}', "--task", "bandit"], "did you mean 'arms'"),
        (["--task", "gym:Pendulm-v1"], "Pendul"),
        (["--task", "gym:Pendulum-v1", "--task-ranges", '{"gravity": [5, 15]}'], "gravity"),
        (["--task", "gym:Pendulum-v1", "--task-options", '{"horizn": 3}'], "did you mean 'horizon'"),
        (["--task", "nowhere:Env"], "nowhere"),
    ],
)
def test_what_a_family_does_not_have_is_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["train", *arguments, "--num-workers", "0", "--run-dir", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("task", "options"), [("bandit", {"arms": 3, "pulls": 7}), ("tabular-mdp", {"states": 4})])
def test_options_reach_the_family(task: str, options: dict[str, Any]) -> None:
    family = make(task, options)
    assert all(getattr(family, {"pulls": "horizon"}.get(name, name)) == value for name, value in options.items())
    config = TrainConfig.for_task(task, task_options=options, **SMALL)
    assert config.meta.algorithm == "rl2"
    assert TrainConfig.from_dict(config.to_dict()).family().horizon == family.horizon
