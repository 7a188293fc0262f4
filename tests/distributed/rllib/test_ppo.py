"""Runs of RLlib's PPO: its rollouts, its checkpoints, what it refuses, and that it learns."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner

from builders import (
    assert_equal_arrays,
    make_policy,
)
from faulty_tasks import FaultyNavigation
from ssm_metarl.algorithms.numpy_policy import NumpyPolicy
from ssm_metarl.config import TrainConfig
from ssm_metarl.distributed.learner import Learner
from ssm_metarl.distributed.play import EnvironmentFailure
from ssm_metarl.distributed.rllib.module import SSMModule, state_name
from ssm_metarl.distributed.rllib.ppo import ppo_config
from ssm_metarl.distributed.rllib.trainer import PolicyGradientTrainer
from ssm_metarl.distributed.train import train
from ssm_metarl.distributed.trainer import MetaTrainer
from ssm_metarl.evaluation.evaluate import evaluate_checkpoint
from ssm_metarl.storage.checkpoint import load_checkpoint
from ssm_metarl.storage.contents import CheckpointError
from ssm_metarl.storage.run_folder import resolve_checkpoint
from ssm_metarl.tasks import Task, TaskDistribution, make

SMALL = {"meta_batch": 4, "hidden_dim": 8, "state_dim": 4, "epochs": 2, "minibatches": 2, "learner_threads": 1}


def config(task: str = "navigation-2d", **changes: Any) -> TrainConfig:
    return TrainConfig.for_task(task, **{"algorithm": "policy-gradient", **SMALL, **changes})


# --- The module -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["cartpole", "navigation-2d"])
def test_rllibs_own_rollouts_are_those_of_our_inference(task: str) -> None:
    """Through whole episodes, with resets between them, RLlib acts as the policy does in a worker of ours."""
    family = make(task)
    settings = config(task, meta_batch=2, num_layers=2)
    policy = make_policy(settings.policy_spec(family))
    model = {"spec": policy.spec.to_dict(), "max_seq_len": family.horizon + 1}
    runner_config = ppo_config(settings, family)
    runner_config.rl_module(rl_module_spec=RLModuleSpec(module_class=SSMModule, model_config=model))
    runner = SingleAgentEnvRunner(config=runner_config, worker_index=0)
    assert runner.module is not None
    runner.module.set_state(policy.numpy_weights())
    acting = NumpyPolicy(policy.spec, policy.numpy_weights())
    states_of: dict[str, Any] = {}
    done = cut = 0
    for _ in range(3):
        for episode in runner.sample(num_timesteps=130):
            done, cut = done + episode.is_done, cut + (episode.t_started > 0)
            state = states_of.get(episode.id_, acting.initial_state(1, 1))
            actions, log_probs = episode.get_actions(), episode.get_extra_model_outputs(Columns.ACTION_LOGP)
            for t, inputs in enumerate(episode.get_observations(slice(0, len(episode)))):
                head, state = acting.head(inputs[None, None], state)
                if policy.spec.discrete:
                    expected = head[0, 0, actions[t]] - np.log(np.exp(head).sum())
                else:
                    log_std = policy.policy.log_std.detach().numpy()
                    away = (actions[t] - head[0, 0]) / np.exp(log_std)
                    expected = (-0.5 * away**2 - log_std - 0.5 * np.log(2 * np.pi)).sum()
                np.testing.assert_allclose(log_probs[t], expected, atol=1e-5, rtol=1e-5)
            kept = episode.get_extra_model_outputs(Columns.STATE_OUT)
            for layer, h in enumerate(state):
                np.testing.assert_allclose(kept[state_name(layer)][-1].T, h[0, 0], atol=1e-5, rtol=1e-5)
            states_of[episode.id_] = state
    runner.stop()
    assert done >= 2
    assert cut >= 2


# --- The trainer ------------------------------------------------------------------------------------------


@contextmanager
def training(settings: TrainConfig, family: TaskDistribution | None = None) -> Iterator[PolicyGradientTrainer]:
    trainer = PolicyGradientTrainer(settings, family)
    try:
        yield trainer
    finally:
        trainer.stop()


@pytest.mark.usefixtures("ray_session")
def test_a_checkpoint_goes_to_the_central_learner_and_back_to_the_last_bit(tmp_path: Path) -> None:
    settings = config(meta_batch=2)
    with training(settings) as trainer:
        trainer.step()
        trainer.save_checkpoint(str(tmp_path / "rllib"))
        weights, moments = trainer.weights(), trainer.optimizer_arrays()
    assert len(moments) == 3 * len(weights)
    assert any(moments[f"{name}.exp_avg"].any() for name in weights)
    checkpoint = load_checkpoint(tmp_path / "rllib")
    options = TrainConfig.for_task("navigation-2d", algorithm="rl2")
    learner = Learner(checkpoint.spec, options.meta, options.machine, seed=3, horizon=20)
    learner.load(checkpoint.policy, checkpoint.optimizer)
    assert_equal_arrays(learner.weights(), weights)
    assert_equal_arrays(learner.optimizer_arrays(), moments)
    with training(settings) as trainer:
        trainer.load_checkpoint(str(tmp_path / "rllib"))
        trainer._ppo = trainer._build()
        assert_equal_arrays(trainer.weights(), learner.weights())
        assert_equal_arrays(trainer.optimizer_arrays(), learner.optimizer_arrays())
        assert_equal_arrays(trainer._ppo.env_runner.module.get_state(), learner.weights())
        trainer.save_checkpoint(str(tmp_path / "again"))
    again = load_checkpoint(tmp_path / "again")
    assert again.progress == checkpoint.progress
    assert_equal_arrays(again.policy, checkpoint.policy)
    assert_equal_arrays(again.optimizer, checkpoint.optimizer)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_run_goes_on_is_evaluated_and_gives_and_takes_the_weights_of_meta_training(tmp_path: Path) -> None:
    settings = config(iterations=1)
    result = train(settings, tmp_path / "rllib")
    assert result.metrics["iteration"] == 1
    assert not [path for path in (tmp_path / "rllib").rglob("*") if "pkl" in path.name]
    train(settings.replace(iterations=2), tmp_path / "rllib", resume=True)
    lines = [json.loads(line) for line in (tmp_path / "rllib" / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2]
    for line in lines:
        assert 400 <= line["env_steps"] / line["iteration"] < 410
        assert len(line["return_by_step"]) == len(line["episode_length_by_step"]) == 1
        assert 0 < line["episode_length_by_step"][0] <= 100
        assert {"sample", "adapt", "update", "ray", "total"} == set(line["seconds"])
    assert lines[0]["return_by_step"] != lines[1]["return_by_step"]
    report = evaluate_checkpoint(tmp_path / "rllib", num_tasks=3)
    assert report.returns.shape == (3, 1)

    form = {name: getattr(settings.policy, name) for name in ("hidden_dim", "state_dim", "num_layers")}
    meta = TrainConfig.for_task(
        "navigation-2d", meta_batch=2, episodes=2, iterations=1, outer_lr=1e-12, learner_threads=1, **form
    )
    result = train(meta, tmp_path / "meta", start=tmp_path / "rllib")
    last = load_checkpoint(resolve_checkpoint(tmp_path / "rllib"))
    for name, value in load_checkpoint(result.checkpoint).policy.items():
        np.testing.assert_allclose(value, last.policy[name], atol=1e-6)
    back = config(iterations=1, outer_lr=1e-12, value_weight=0.0)
    result = train(back, tmp_path / "back", start=tmp_path / "meta")
    for name, value in load_checkpoint(result.checkpoint).policy.items():
        np.testing.assert_allclose(value, last.policy[name], atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_equal_seeds_give_equal_runs_and_a_normaliser_stays_as_loaded(tmp_path: Path) -> None:
    form = {"normalize_observations": True, "scale_rewards": True, "num_layers": 1}
    meta = TrainConfig.for_task("cartpole", **{**SMALL, **form, "episodes": 2, "iterations": 1, "algorithm": "rl2"})
    start = train(meta, tmp_path / "meta").checkpoint
    settings = config("cartpole", **form, iterations=1, meta_batch=2)
    runs = [train(settings, tmp_path / str(i), start=start).checkpoint for i in range(2)]
    one, other, before = (load_checkpoint(path) for path in (*runs, start))
    assert_equal_arrays(one.policy, other.policy)
    assert one.progress["normalizer"] == before.progress["normalizer"]
    assert before.policy["reward_scale"] != 1
    for name, value in before.policy.items():
        assert np.array_equal(one.policy[name], value) == (name in ("input_mean", "input_scale", "reward_scale")), name


@pytest.mark.usefixtures("ray_session")
@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "sizes",
    [
        {"meta_batch": 1},
        {"minibatches": 50, "num_layers": 0, "inputs": "observation"},
        pytest.param({"minibatches": 50, "lr_schedule": "constant", "num_workers": 1}, marks=pytest.mark.slow),
    ],
)
def test_few_episodes_many_minibatches_no_memory_and_workers_are_possible(sizes: dict[str, Any]) -> None:
    with training(config("bandit", **sizes)) as trainer:
        before = trainer.weights()
        metrics = trainer.step()
        assert 1 <= metrics["env_steps"] / (100 * trainer.train_config.experience.meta_batch) < 1.1
        after = trainer.weights()
        for name in ("policy.bias", "value.bias"):
            assert (after[name] != before[name]).all(), name


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
@pytest.mark.timeout(240)
def test_a_worker_that_stands_still_is_told_and_replaced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = PolicyGradientTrainer(config(num_workers=2, iterations=400))
    monkeypatch.setattr("ssm_metarl.distributed.watch.LEAST_SILENCE", 15.0)
    monkeypatch.setattr("ssm_metarl.distributed.watch.SILENCES", 0.0)
    try:
        first = trainer.step()
        assert trainer._ppo
        assert trainer._ppo._sampler
        process = trainer._ppo._sampler._pids[2]
        os.kill(process, signal.SIGSTOP)
        second = trainer.step()  # the other one plays all of it
        last = second
        while trainer._ppo._sampler._pids[2] == process:  # Ray is starting another
            last = trainer.step()
    finally:
        trainer.stop()
    assert [line["restarts"] for line in (first, second, last)] == [0, 0, 1]
    assert 400 <= second["env_steps"] - first["env_steps"] < 600
    told = f"RLlib's worker 2 (process {process}) has given no sign of life since "
    assert any(line.startswith(told) for line in caplog.messages)
    assert "RLlib's worker 2 is replaced." in caplog.messages


@pytest.mark.usefixtures("ray_session")
def test_a_family_that_spoils_its_episodes_stops_the_run() -> None:
    class Faulty(FaultyNavigation):
        often = 0.5

        def sample(self, n: int, rng: np.random.Generator, split: str = "train") -> list[Task]:
            tasks = super().sample(n, rng, split)
            return [{**task, **({"fault": "raise"} if rng.random() < self.often else {})} for task in tasks]

    class Seldom(Faulty):
        often = 0.03

    with training(config(meta_batch=20, seed=2), Seldom()) as trainer:
        bad = sum(trainer.step()["invalid_episodes"] for _ in range(3))
        assert 0 < bad < 6
    with training(config(meta_batch=20), Faulty()) as trainer, pytest.raises(EnvironmentFailure, match="fell over"):
        trainer.step()


# --- Bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"inner_steps": 1}, "inner_steps must be 0 for policy-gradient, not 1."),
        ({"baseline": "linear"}, "baseline must be 'critic' for policy-gradient"),
        ({"trial_episodes": 2}, "trial_episodes must be 1 for policy-gradient"),
        ({"learned_step_sizes": True}, "learned_step_sizes must be False for policy-gradient"),
        ({"replay_episodes": 3}, "replay_episodes must be 0"),
        ({"kl_penalty": 0.1}, "kl_penalty must be 0.0"),
        ({"max_kl": 1.0}, "max_kl must be 0.5"),
        ({"sample_timeout_s": 3.0}, "sample_timeout_s must be 'auto'"),
    ],
)
def test_what_rllib_does_not_follow_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        config(**changes)


def test_what_cannot_be_is_refused_before_ray_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssm_metarl.distributed.train.start_ray", lambda *args, **kwargs: pytest.fail("Ray starts"))
    with pytest.raises(ValueError, match="learns none"):
        train(config(normalize_observations=True), tmp_path / "a")
    with pytest.raises(CheckpointError, match="hidden_dim 64 instead of 8"):
        train(config("cartpole"), tmp_path / "b", start="pretrained:cartpole")
    with pytest.raises(ValueError, match="only train runs it"):
        MetaTrainer(config().to_dict())
    assert not list(tmp_path.iterdir())


# --- Learning ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ray_session")
def test_cartpole_is_learned(tmp_path: Path) -> None:
    settings = TrainConfig.for_task("cartpole", algorithm="policy-gradient", iterations=15, learner_threads=1)
    result = train(settings, tmp_path / "run")
    assert result.metrics["env_steps"] < 152_000
    untrained = PolicyGradientTrainer(settings)
    untrained.save_checkpoint(str(tmp_path / "untrained"))
    before, after = (
        np.nanmean(evaluate_checkpoint(path, num_tasks=100).returns)
        for path in (tmp_path / "untrained", result.checkpoint)
    )
    assert before < 35
    assert after > 120


def test_actions_of_several_integers(tmp_path: Path) -> None:
    """RLlib samples, learns and hands over a policy with three heads."""
    begun = PolicyGradientTrainer(settings := config("habits:Bits", iterations=1, inputs="observation")).weights()
    trained = load_checkpoint(train(settings, tmp_path / "run").checkpoint)
    assert trained.spec.action_heads == (2, 2, 2)
    assert trained.policy["policy.weight"].shape == (8, 6)
    assert (trained.policy["policy.weight"] != begun["policy.weight"]).all()
