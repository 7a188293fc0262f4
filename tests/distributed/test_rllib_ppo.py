"""RLlib's PPO: the policy in its module, the tasks in its environment, and runs that meta-training can go on from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner

from builders import make_policy, make_spec
from faulty_tasks import FaultyNavigation
from ssm_metarl.algorithms.inputs import policy_inputs
from ssm_metarl.algorithms.numpy_policy import NumpyPolicy
from ssm_metarl.algorithms.policy import SSMPolicy
from ssm_metarl.algorithms.rollouts import Rollouts
from ssm_metarl.algorithms.spec import PolicySpec
from ssm_metarl.config import TrainConfig
from ssm_metarl.distributed.collection import EnvironmentFailure
from ssm_metarl.distributed.learner import Learner
from ssm_metarl.distributed.rllib.env import TaskEnv
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

Array = np.ndarray[Any, Any]

SMALL = {"meta_batch": 4, "hidden_dim": 8, "state_dim": 4, "epochs": 2, "minibatches": 2, "learner_threads": 1}


def config(task: str = "navigation-2d", **changes: Any) -> TrainConfig:
    return TrainConfig.for_task(task, **{"algorithm": "policy-gradient", **SMALL, **changes})


# --- The environment --------------------------------------------------------------------------------------


class Noting:
    """A family that remembers the tasks that it was asked for."""

    def __init__(self, family: TaskDistribution) -> None:
        self.family, self.tasks = family, list[Task]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.family, name)

    def sample(self, n: int, rng: np.random.Generator, split: str = "train") -> list[Task]:
        assert split == "train"
        self.tasks += self.family.sample(n, rng, split)
        return self.tasks[-n:]


def task_env(family: Any, columns: int = 3, inputs: str = "full") -> TaskEnv:
    spec = TrainConfig(inputs=inputs).policy_spec(family)  # type: ignore[arg-type]
    return TaskEnv({"distribution": family, "spec": spec, "num_envs": columns})


def wander(env: TaskEnv, steps: int, seed: int) -> list[tuple[Array, ...]]:
    """Inputs, actions, rewards, terminated and truncated of each step, with actions that do not fit in the space."""
    rng = np.random.default_rng(0)
    record, inputs = [], env.reset(seed=seed)[0]
    for _ in range(steps):
        if hasattr(env.single_action_space, "n"):
            actions = rng.integers(env.single_action_space.n, size=env.num_envs)
        else:
            actions = rng.normal(size=(env.num_envs, *env.single_action_space.shape)).astype(np.float32)
        after, rewards, terminated, truncated, _ = env.step(actions)
        record.append((inputs, actions, rewards, terminated, truncated))
        inputs = after
    return record


@pytest.mark.parametrize("task", ["cartpole", "navigation-2d", "bandit"])
def test_the_policy_reads_what_it_reads_in_our_own_rollouts(task: str) -> None:
    family = make(task)
    env = task_env(family)
    spec: PolicySpec = env._spec
    played = 0
    for column in range(env.num_envs):
        steps = [[part[column] for part in step] for step in wander(env, 230, seed=5)]
        ends = [i for i, step in enumerate(steps) if step[3] or step[4]]
        begin = 0
        for end in ends:
            inputs, actions, rewards, *_ = (np.stack(part)[None, :, None] for part in zip(*steps[begin : end + 1]))
            starts = np.zeros(rewards.shape, bool)
            starts[:, 0] = True
            zero = np.zeros(rewards.shape, np.float32)
            observations = inputs[..., : spec.observation_size]
            record = Rollouts(
                observations, actions, rewards, zero, starts, starts, zero > 0, zero < 1, observations[:, -1], ({},)
            )
            np.testing.assert_array_equal(inputs, policy_inputs(spec, record))
            begin = end + 2  # the step after an episode's last one is the reset
            played += 1
    assert played >= 6


def test_equal_seeds_give_equal_experience_and_every_column_and_worker_has_its_own() -> None:
    seen: dict[int, list[Task]] = {}
    for seed in (7, 8, 9):  # RLlib gives a worker its seed plus the worker's index
        family = Noting(make("cartpole"))
        first = wander(task_env(family, 4), 60, seed)
        seen[seed] = family.tasks
        again = wander(task_env(make("cartpole"), 4), 60, seed)
        for one, other in zip(first, again, strict=True):
            for part, same in zip(one, other, strict=True):
                np.testing.assert_array_equal(part, same)
    everything = [str(task) for tasks in seen.values() for task in tasks]
    assert len(set(everything)) == len(everything) > 3 * 4 * 2


def test_a_new_task_begins_whatever_the_action_after_an_episodes_end() -> None:
    env = task_env(make("cartpole"), 2)
    for before, after in zip(record := wander(env, 200, 0), record[1:]):
        done = before[3] | before[4]
        assert not (after[2][done]).any(), "the reset has no reward"
        ready = after[0][~done]
        assert (ready.shape[1], env._spec.input_size) == (8, 8)


def test_an_episode_is_cut_at_the_horizon_where_the_environment_goes_on() -> None:
    env = task_env(FaultyNavigation(), 2)  # whose horizon is 20, and its environments' 100
    ends = [i for i, step in enumerate(wander(env, 63, 0)) if step[4].all()]
    assert ends == [19, 40, 61]


@pytest.mark.parametrize("fault", ["raise", "nan"])
def test_an_episode_that_the_environment_spoils_is_cut_at_its_last_good_step(fault: str) -> None:
    class Faulty(FaultyNavigation):
        def sample(self, n: int, rng: np.random.Generator, split: str = "train") -> list[Task]:
            return [{**task, "fault": fault} for task in super().sample(n, rng, split)]

    env = task_env(Faulty(), 2)
    env.reset(seed=0)
    still = np.zeros((2, 2), np.float32)
    for step in range(8):
        inputs, rewards, terminated, truncated, infos = env.step(still)
        assert np.isfinite(inputs).all()
        assert np.isfinite(rewards).all()
        assert not terminated.any()
        assert truncated.all() == (step == 5)
        if step == 5:
            assert infos["length"].tolist() == [5, 5]
            assert all(("fell over" if fault == "raise" else "not finite") in error for error in infos["error"])


# --- The module -------------------------------------------------------------------------------------------

SPECS = {
    "continuous": make_spec(num_layers=2),
    "discrete": make_spec(discrete=True, gated=True, action_size=3),
    "normalised": make_spec(normalize_observations=True, scale_rewards=True),
    "observation": make_spec(inputs="observation", discrete=True),
    "memory slots": make_spec(num_layers=2, memory_slots=3),
    "memoryless": make_spec(num_layers=0),
}


def module_of(policy: SSMPolicy) -> SSMModule:
    spec = {"spec": policy.spec.to_dict(), "max_seq_len": 50}
    module = SSMModule(observation_space=None, action_space=None, inference_only=False, model_config=spec)
    module.set_state(policy.numpy_weights())
    return module


def normalised(policy: SSMPolicy) -> SSMPolicy:
    """With a normaliser that does something."""
    for name, buffer in policy.named_buffers():
        buffer += torch.rand(buffer.shape, generator=torch.Generator().manual_seed(len(name)))
    return policy


def states(module: SSMModule, columns: int) -> dict[str, Any]:
    """What RLlib puts in a batch at the first step of ``columns`` episodes."""
    initial = module.get_initial_state()
    return {Columns.STATE_IN: {name: value.expand(columns, *value.shape) for name, value in initial.items()}}


@pytest.mark.parametrize("form", SPECS)
def test_step_by_step_chunk_by_chunk_and_at_once_the_module_is_the_policy(form: str) -> None:
    policy = normalised(make_policy(SPECS[form]))
    module, columns, steps = module_of(policy), 5, 23
    inputs = torch.randn(columns, steps, policy.spec.input_size, generator=torch.Generator().manual_seed(0))
    expected = policy(inputs.transpose(0, 1))
    values = expected.values.T * policy.reward_scaling
    if policy.spec.discrete:
        logits = expected.actions.logits.transpose(0, 1)
    else:
        normal = expected.actions.base_dist
        logits = torch.cat([normal.loc, normal.scale.log()], -1).transpose(0, 1)
    acting = NumpyPolicy(policy.spec, policy.numpy_weights())
    for size in (1, 4, steps):
        batch = states(module, columns)
        state = acting.initial_state(1, columns)
        for begin in range(0, steps, size):
            part = inputs[:, begin : begin + size]
            obs = part if module.is_stateful() else part.flatten(0, 1)
            found = module.forward_exploration({Columns.OBS: obs, **batch})
            dist = found[Columns.ACTION_DIST_INPUTS].reshape(columns, -1, logits.shape[-1])
            torch.testing.assert_close(dist, logits[:, begin : begin + size], atol=1e-5, rtol=1e-5)
            batch = {Columns.STATE_IN: found.get(Columns.STATE_OUT, {})}
            for i in range(part.shape[1]):
                head, state = acting.head(part[None, :, i].numpy(), state)
            mean = dist[:, -1] if policy.spec.discrete else dist[:, -1, : policy.spec.action_size]
            if policy.spec.discrete:
                head = head - np.log(np.exp(head).sum(-1, keepdims=True))
            np.testing.assert_allclose(mean.detach(), head[0], atol=1e-5, rtol=1e-5)
    if module.is_stateful():
        train = {Columns.OBS: inputs, **states(module, columns)}
        torch.testing.assert_close(module.compute_values(train), values, atol=1e-5, rtol=1e-5)
        for i, after in enumerate(expected.state):
            torch.testing.assert_close(batch[Columns.STATE_IN][state_name(i)], after, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("form", "padding"), [("discrete", torch.nan), ("memory slots", -1e6)])
def test_padding_changes_nothing(form: str, padding: float) -> None:
    """Nor what is not finite, but in a memory's products of matrices."""
    module = module_of(make_policy(SPECS[form]))
    lengths = torch.tensor([3, 7, 1])
    inputs = torch.randn(3, 7, module.ssm.spec.input_size)
    padded = torch.cat([inputs, torch.full((3, 5, inputs.shape[-1]), 1e6)], 1)
    for row, length in enumerate(lengths):
        padded[row, length:] = padding if row else 0.0
    found = module.forward_train({Columns.OBS: padded, Columns.SEQ_LENS: lengths, **states(module, 3)})
    for row, length in enumerate(lengths):
        alone = module.forward_train({Columns.OBS: inputs[row : row + 1, :length], **states(module, 1)})
        for name in (Columns.ACTION_DIST_INPUTS, Columns.EMBEDDINGS):
            assert found[name].shape[:2] == (3, 12)
            torch.testing.assert_close(found[name][row, :length], alone[name][0], atol=1e-6, rtol=1e-6)


def test_a_density_that_overflows_in_the_padding_leaves_gradients_finite() -> None:
    """RLlib takes the ratio of padded steps, too, before it leaves them out: 30 actions of deviation .02."""
    module = module_of(SSMPolicy(make_spec(action_size=30, initial_std=0.02)))
    batch = {Columns.OBS: torch.zeros(2, 5, module.ssm.spec.input_size), Columns.SEQ_LENS: torch.tensor([5, 2])}
    logits = module.forward_train({**batch, **states(module, 2)})[Columns.ACTION_DIST_INPUTS]
    mean, log_std = logits.chunk(2, -1)
    taken = torch.arange(5) < torch.tensor([[5], [2]])
    actions = torch.where(taken[..., None], mean.detach() + 0.02, 0.0)
    log_probs = torch.distributions.Normal(mean, log_std.exp()).log_prob(actions).sum(-1)
    ratio = torch.exp(log_probs - torch.where(taken, log_probs, 0.0).detach())
    ratio[taken].mean().backward()
    gradients = [parameter.grad for parameter in module.ssm.parameters() if parameter.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


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


def assert_equal_arrays(one: dict[str, Array], other: dict[str, Array]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)


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
    learner = Learner(checkpoint.spec, TrainConfig.for_task("navigation-2d", algorithm="rl2"), seed=3)
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


@pytest.mark.usefixtures("ray_session")
def test_a_run_goes_on_is_evaluated_and_gives_and_takes_the_weights_of_meta_training(tmp_path: Path) -> None:
    settings = config(iterations=1)
    result = train(settings, tmp_path / "rllib")
    assert result.metrics["iteration"] == 1
    assert not [path for path in (tmp_path / "rllib").rglob("*") if "pkl" in path.name]
    train(TrainConfig.from_dict({**settings.to_dict(), "iterations": 2}), tmp_path / "rllib", resume=True)
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

    form = {name: getattr(settings, name) for name in ("hidden_dim", "state_dim", "num_layers")}
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
        assert 100 * trainer.train_config.meta_batch <= metrics["env_steps"] < 110 * trainer.train_config.meta_batch
        after = trainer.weights()
        for name in ("policy.bias", "value.bias"):
            assert (after[name] != before[name]).all(), name


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
        bad = sum(trainer.step()["bad_episodes"] for _ in range(3))
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
        ({"sample_timeout_s": 3.0}, "sample_timeout_s must be None"),
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
