"""RL² end to end: a trial whose optimum needs memory across its episodes, and returns over the whole of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

from ssm_metarl.config import TrainConfig
from ssm_metarl.distributed.train import train
from ssm_metarl.distributed.trainer import MetaTrainer
from ssm_metarl.evaluation.evaluate import evaluate_checkpoint
from ssm_metarl.seeds import seed_for
from ssm_metarl.storage.checkpoint import load_checkpoint
from ssm_metarl.tasks import BatchedEnv, Task, TaskDistribution
from ssm_metarl.tasks import registry as base
from ssm_metarl.tasks.baselines.play import play_baseline
from ssm_metarl.tasks.parameters import Parameter, stack_parameters

SAFE, GOOD, BAD = 0.3, 1.0, -1.0


class LookEnv(BatchedEnv):
    """Episodes of one step: action 0 is safe, of the others one wins and one loses."""

    def __init__(self, winning: Any) -> None:
        super().__init__(Look.observation_space, Look.action_space, len(winning), Look.horizon)
        self._winning = winning.astype(np.int64)

    def _start(self, slots: Any) -> None:
        pass

    def _advance(self, actions: Any) -> Any:
        rewards = np.where(actions == 0, SAFE, np.where(actions == self._winning, GOOD, BAD))
        return rewards.astype(np.float32), np.ones(self.num_envs, bool)

    def _observe(self) -> Any:
        return np.zeros((self.num_envs, 1), np.float32)


class Look(TaskDistribution):
    """Over one episode the safe action is best (0.3); over two it is to try an action and to do the right one then.

    Over two episodes, safe play brings 0.6; whoever tries first wins or loses 1 and then wins 1: 1 on average.
    """

    name = "look"
    horizon = 1
    observation_space = Box(0.0, 0.0, (1,), np.float32)
    action_space = Discrete(3)
    splits = ("train", "test")
    parameters = {"winning": Parameter(1.0, 2.0, choices=(1.0, 2.0))}  # noqa: RUF012

    def sample(self, n: int, rng: np.random.Generator, split: str = "train") -> list[Task]:
        return [{"winning": int(winning)} for winning in rng.integers(1, 3, n)]

    def make_vector_env(self, tasks: Sequence[Task], num_episodes: int) -> LookEnv:
        return LookEnv(stack_parameters(tasks, self.parameters, num_episodes)["winning"])


@pytest.fixture
def look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(base._FACTORIES, "look", Look)


def options(**changes: Any) -> TrainConfig:
    return TrainConfig.for_task(
        "look",
        **{
            "algorithm": "rl2",
            "iterations": 60,
            "meta_batch": 40,
            "episodes": 5,
            "trial_episodes": 2,
            "hidden_dim": 16,
            "state_dim": 8,
            "num_layers": 1,
            "minibatches": 2,
            "outer_lr": 1e-2,
            "entropy_bonus": 0.02,
            "discount": 1.0,
            "learner_threads": 1,
            **changes,
        },
    )


def returns(run: Path, config: TrainConfig) -> float:
    result = train(config, run)
    assert result.checkpoint is not None
    evaluation = evaluate_checkpoint(result.checkpoint, num_tasks=200, steps=0, deterministic=True)
    return float(evaluation.returns.mean())


@pytest.mark.slow
@pytest.mark.usefixtures("look")
@pytest.mark.parametrize("baseline", ["privileged", "critic", "time"])
def test_a_trial_is_played_for_its_whole_return(tmp_path: Path, baseline: str) -> None:
    assert returns(tmp_path / "run", options(baseline=baseline)) > 0.9


@pytest.mark.slow
@pytest.mark.usefixtures("look")
def test_episodes_apart_are_played_safely(tmp_path: Path) -> None:
    assert returns(tmp_path / "run", options(trial_episodes=1)) == pytest.approx(SAFE, abs=0.05)


@pytest.mark.slow
@pytest.mark.usefixtures("look")
def test_a_policy_without_memory_cannot_do_it(tmp_path: Path) -> None:
    config = options(num_layers=0, inputs="observation")
    assert returns(tmp_path / "run", config) == pytest.approx(2 * SAFE, abs=0.1)


def changed(**options: Any) -> dict[str, Any]:
    small = {
        "algorithm": "rl2",
        "meta_batch": 6,
        "episodes": 2,
        "trial_episodes": 2,
        "hidden_dim": 8,
        "state_dim": 4,
        "num_layers": 1,
        "minibatches": 3,
        "epochs": 2,
        "learner_threads": 1,
        "normalize_observations": True,
        "scale_rewards": True,
    }
    return TrainConfig.for_task("cartpole", **{**small, **options}).to_dict()


@pytest.mark.parametrize(("inner_steps", "baseline"), [(0, "critic"), (1, "critic"), (1, "privileged")])
def test_going_on_from_a_checkpoint_is_going_on(tmp_path: Path, inner_steps: int, baseline: str) -> None:
    """Normaliser, learned step sizes and minibatches included, to the bit."""
    config = changed(inner_steps=inner_steps, learned_step_sizes=bool(inner_steps), baseline=baseline)
    trainer, other = MetaTrainer(config), MetaTrainer(config)
    for _ in range(2):
        trainer.step()
    trainer.save_checkpoint(str(tmp_path / "checkpoint_000002"))
    other.load_checkpoint(str(tmp_path / "checkpoint_000002"))
    metrics = [dict(each.step()) for each in (trainer, other)]
    for each in metrics:
        each.pop("seconds")
        assert each["ratio_error"] < 1e-3
    assert metrics[0] == metrics[1]
    for name, value in trainer.learner.weights().items():
        np.testing.assert_array_equal(value, other.learner.weights()[name], err_msg=name)
    assert load_checkpoint(tmp_path / "checkpoint_000002").policy["input_scale"][0] != 1.0
    moved = [value for name, value in trainer.learner.weights().items() if name.startswith("step_sizes.")]
    assert bool(moved) == bool(inner_steps)
    assert all((value != 1).any() for value in moved if value.size)


def test_in_context_experience_does_not_depend_on_workers(ray_session: None) -> None:
    found = []
    for workers in (0, 2):
        trainer = MetaTrainer(changed(num_workers=workers))
        metrics = [trainer.step() for _ in range(2)]
        found.append([{name: value for name, value in each.items() if name != "seconds"} for each in metrics])
        trainer.stop()
    assert found[0] == found[1]


def test_one_policy_before_and_after_adaptation() -> None:
    """In-context learning and gradient steps on top of it, weighed by step_weights."""
    trainer = MetaTrainer(changed(inner_steps=1, step_weights=[1.0, 1.0]))
    metrics = trainer.step()
    assert len(metrics["details"]["return_by_step"]) == 2
    assert np.isfinite(metrics["loss"])


def test_a_policy_goes_on_with_another_critic(tmp_path: Path) -> None:
    """From one that is told the task to one that is not, and back, with the normaliser."""
    small = {name: value for name, value in changed().items() if name != "iterations"}
    last = None
    for baseline, told in (("privileged", True), ("critic", False), ("privileged", True)):
        config = TrainConfig.from_dict({**small, "baseline": baseline, "iterations": 1, "outer_lr": 1e-12})
        checkpoint = train(config, tmp_path / f"{len(list(tmp_path.iterdir()))}", start=last).checkpoint
        found = load_checkpoint(checkpoint)
        assert ("critic.task" in found.policy) == told == ("tasks" in found.progress["normalizer"])
        if last is not None:
            before = load_checkpoint(last)
            for name in ("encoder.weight", "blocks.0.B", "policy.weight", "value.weight"):
                np.testing.assert_allclose(found.policy[name], before.policy[name], atol=1e-6, err_msg=name)
            assert found.progress["normalizer"]["rewards"]["count"] > before.progress["normalizer"]["rewards"]["count"]
        last = checkpoint


# --- Imitation --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_policy_that_imitates_comes_to_play_as_the_player() -> None:
    """Twelve iterations, then reward alone: from there on nothing is demonstrated."""
    options = {"task_options": {"arms": 3, "pulls": 20}, "meta_batch": 60, "iterations": 16, "learner_threads": 1}
    config = TrainConfig.for_task("bandit", **options, imitate="index", imitate_iterations=12, outer_lr=3e-3)
    trainer = MetaTrainer.of_run(config)
    assert trainer.imitations == 12
    found = [trainer.step() for _ in range(13)]
    assert found[0]["return_after"] == pytest.approx(10.0, abs=1.0)
    player = np.mean(play_baseline("index", *held_out(trainer), num_episodes=1))
    assert found[12]["return_after"] > 10.0 + 0.7 * (player - 10.0)
    # The negative log-likelihood of three equal chances, and then of what is nearly always right.
    assert found[0]["loss"] - found[11]["loss"] > 0.4
    trainer.stop()


def test_every_stage_that_counts_imitates(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {
        "task_options": {"arms": 3, "pulls": 6},
        "algorithm": "promp",
        "inner_steps": 1,
        "step_weights": (1.0, 1.0),
    }
    config = TrainConfig.for_task("bandit", **options, imitate="index", imitate_iterations=1, meta_batch=4, episodes=2)
    trainer, shown = MetaTrainer.of_run(config), list[list[bool]]()
    update = trainer.learner.update

    def seen(stages: Any, **how: Any) -> Any:
        of_stages = [torch.cat([batch.demonstrated for batch in stage.batches]) for stage in stages if stage.imitates]
        shown.append([demonstrated.shape == (4, 6, 2) for demonstrated in of_stages])
        return update(stages, **how)

    monkeypatch.setattr(trainer.learner, "update", seen)
    trainer.step()
    trainer.step()
    assert shown == [[True, True], []]
    trainer.stop()


def held_out(trainer: MetaTrainer) -> Any:
    tasks = trainer.distribution.sample(500, np.random.default_rng(0), "test")
    return trainer.distribution, tasks, [np.random.SeedSequence([0, i]) for i in range(500)]


def test_continuous_actions_are_shown_in_the_policys_unit() -> None:
    """A hundredth of the plane is a tenth of the longest step, which the player takes as often as it can."""
    options = {"algorithm": "rl2", "imitate": "clairvoyant", "meta_batch": 3, "episodes": 2, "learner_threads": 1}
    trainer = MetaTrainer.of_run(TrainConfig.for_task("navigation-2d", **options))
    tasks, seeds = trainer.distribution.sample(3, np.random.default_rng(0)), [seed_for(0, m) for m in range(3)]
    rollouts = trainer.pool.collect(trainer.learner.weights(), tasks, seeds, 2)
    shown = trainer._demonstrations(0, rollouts)
    goals = np.array([task["goal"] for task in tasks], np.float32)[:, None, None]
    np.testing.assert_allclose(shown, np.clip((goals - rollouts.observations) / 0.1, -1, 1), atol=1e-5)
    assert shown.dtype == rollouts.actions.dtype
    before = trainer.step()["loss"]
    assert [trainer.step()["loss"] for _ in range(4)][-1] < before - 0.1
    trainer.stop()


def test_who_cannot_be_imitated() -> None:
    with pytest.raises(ValueError, match="There is no bandit player 'psrl'"):
        MetaTrainer.of_run(TrainConfig.for_task("bandit", imitate="psrl"))
