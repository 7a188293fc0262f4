"""Trials of several episodes, the critic, learned step sizes and normalisation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch.func import functional_call

from builders import ToyEnv, make_policy, make_spec, seeds, specs, task_weights, tensors, toy_rollouts, uneven
from ssm_metarl.algorithms.adapters import StandardAdapter
from ssm_metarl.algorithms.collect import collect
from ssm_metarl.algorithms.inner_loop import adapt_weights, batch_for, for_tasks, inner_step
from ssm_metarl.algorithms.inputs import critic_inputs, policy_inputs, task_numbers
from ssm_metarl.algorithms.normalizer import Normalizer, RunningMoments
from ssm_metarl.algorithms.numpy_policy import NumpyPolicy
from ssm_metarl.algorithms.objective import meta_loss
from ssm_metarl.algorithms.parameters import expected_shapes, step_size
from ssm_metarl.algorithms.policy import SSMPolicy
from ssm_metarl.algorithms.registry import MetaConfig
from ssm_metarl.algorithms.resize import resize
from ssm_metarl.algorithms.returns import advantages, discounted_returns, normalized, time_baseline
from ssm_metarl.algorithms.rollouts import Rollouts
from ssm_metarl.seeds import seed_for
from ssm_metarl.tasks import make

EPISODES, COLUMNS = 3, 4


def trials(name: str, seed: int = 0, **options: Any) -> tuple[Any, Any, Rollouts]:
    """Trials of a native family."""
    family = make(name)
    discrete = hasattr(family.action_space, "n")
    size = int(family.action_space.n) if discrete else family.action_space.shape[0]
    spec = make_spec(observation_size=family.observation_space.shape[0], action_size=size, discrete=discrete, **options)
    policy = make_policy(spec, seed)
    tasks = family.sample(2, np.random.default_rng(seed))
    env = family.make_vector_env(tasks, COLUMNS)
    nodes = [seed_for(seed, task) for task in range(2)]
    weights = policy.numpy_weights()
    return policy, family, collect(env, spec, weights, nodes, tasks, family.horizon, trial_episodes=EPISODES)


# --- Trials -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cartpole", "navigation-2d"])
def test_a_trial_has_its_episodes_and_one_reset(name: str) -> None:
    policy, family, record = trials(name)
    assert record.resets[:, 0].all()
    assert not record.resets[:, 1:].any()
    assert ((record.starts & record.valid).sum(1) == EPISODES).all()
    # An episode starts where the one before ended, and lasts no longer than the horizon.
    for task, column in np.ndindex(2, COLUMNS):
        length = record.lengths()[task, column]
        borders = [*np.flatnonzero(record.starts[task, :length, column]), length]
        assert (np.diff(borders) <= family.horizon).all()
        assert record.valid[task, :length, column].all()
    # The previous action and reward pass the border, with a start flag of 1.
    inputs = policy_inputs(policy.spec, record)
    later = record.starts & record.valid & ~record.resets
    task, step, column = np.nonzero(later)
    np.testing.assert_array_equal(inputs[task, step, column, -2], record.rewards[task, step - 1, column])
    assert (inputs[..., -1] == record.starts).all()


@pytest.mark.parametrize("name", ["cartpole", "navigation-2d"])
def test_the_state_passes_the_border_of_episodes(name: str) -> None:
    """The learner, which reads the record, finds the log-probabilities of the worker, which acted."""
    policy, _, record = trials(name)
    inputs = torch.from_numpy(policy_inputs(policy.spec, record))
    with torch.no_grad():
        output = policy(inputs, torch.from_numpy(record.resets))
        log_probs = output.actions.log_prob(torch.from_numpy(record.actions)).numpy()
    np.testing.assert_allclose(log_probs[record.valid], record.log_probs[record.valid], atol=2e-4)


def test_only_the_last_episode_ends_a_trial_truly() -> None:
    _, _, record = trials("cartpole")
    ended = record.terminated.sum(1)
    assert (ended <= 1).all()
    assert ended.any()
    for task, column in np.argwhere(ended):
        assert record.terminated[task, record.lengths()[task, column] - 1, column]


def test_a_trial_of_one_episode_is_an_episode() -> None:
    _, family, _ = trials("cartpole")
    spec = make_spec(observation_size=4, action_size=2, discrete=True)
    weights, tasks = make_policy(spec).numpy_weights(), family.sample(2, np.random.default_rng(0))
    nodes = [seed_for(0, task) for task in range(2)]
    whole = collect(family.make_vector_env(tasks, 3), spec, weights, nodes, tasks, family.horizon, trial_episodes=1)
    np.testing.assert_array_equal(whole.starts, whole.resets)
    assert whole.terminated.any()


def test_an_episode_that_begins_with_nan_spoils_its_trial() -> None:
    class Spoiled(ToyEnv):
        def step(self, actions: Any) -> Any:
            observations, *rest = super().step(actions)
            if rest[1].any() or rest[2].any():
                observations = np.array(observations)
                observations[0] = np.nan
            return observations, *rest

    spec = make_spec()
    tasks = [{"ends": [4, 4]}]
    env = Spoiled(tasks, 2)
    weights = make_policy(spec).numpy_weights()
    record = collect(env, spec, weights, [seed_for(0)], tasks, 8, trial_episodes=2)
    assert record.kept().tolist() == [[False, True]]
    assert len(record.errors) == 1


# --- The critic -------------------------------------------------------------------------------------------


def recorded(seed: int, **options: Any) -> tuple[SSMPolicy, dict[str, Any], Rollouts]:
    spec = make_spec(**options)
    policy = make_policy(spec, seed)
    weights = task_weights(spec, 3, seed)
    return policy, weights, toy_rollouts(spec, weights, uneven(3, 2, 9, seed), 2, 9, seed)


@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_the_critic_bootstraps_where_a_column_was_cut(seed: int) -> None:
    """Against the sum written out, with values of the step-by-step policy."""
    policy, weights, record = recorded(seed % 1000)
    discount, gae_lambda = 0.9, 0.7
    inputs, resets = critic_inputs(policy.spec, record)
    parameters = {name: torch.from_numpy(value) for name, value in weights.items()}
    with torch.no_grad():
        values = functional_call(
            policy, parameters, (torch.from_numpy(inputs), torch.from_numpy(resets))
        ).values.numpy()
    found, expected = advantages(record, discount, gae_lambda, "critic", values)
    for task, column in np.ndindex(3, 2):
        length = int(record.lengths()[task, column])
        value = values[task, : length + 1, column].astype(float)
        if record.terminated[task, :, column].any():
            value[length] = 0.0
        delta = record.rewards[task, :length, column] + discount * value[1:] - value[:-1]
        for t in range(length):
            powers = (discount * gae_lambda) ** np.arange(length - t)
            assert found[task, t, column] == pytest.approx((powers * delta[t:]).sum(), abs=1e-4)
        assert not found[task, length:, column].any()
        np.testing.assert_allclose(expected[task, :length, column], value[:length], atol=1e-6)


def test_the_extra_input_is_what_the_policy_would_have_read_next() -> None:
    policy, _, record = recorded(3)
    inputs, _ = critic_inputs(policy.spec, record)
    size = policy.spec.observation_size
    for task, column in np.ndindex(3, 2):
        length = int(record.lengths()[task, column])
        extra = inputs[task, length, column]
        np.testing.assert_array_equal(extra[:size], record.last_observations[task, column])
        np.testing.assert_array_equal(extra[size:-2], record.actions[task, length - 1, column])
        assert extra[-2] == record.rewards[task, length - 1, column]
        assert extra[-1] == 0.0


def test_scaled_rewards_scale_advantages() -> None:
    _, _, record = recorded(0)
    values = np.zeros((*record.rewards.shape[:1], record.rewards.shape[1] + 1, 2))
    plain = advantages(record, 0.9, 0.8, "critic", values)[0]
    scaled = advantages(record, 0.9, 0.8, "critic", values, 4.0)[0]
    np.testing.assert_allclose(scaled, plain / 4, atol=1e-6)


def test_the_time_baseline_is_the_mean_of_a_step_over_all() -> None:
    _, _, record = recorded(1)
    returns = discounted_returns(record.rewards, record.valid, 0.9)
    found = time_baseline(np.where(record.valid, returns, np.nan), record.valid)
    for t in range(record.valid.shape[1]):
        here = record.valid[:, t]
        np.testing.assert_allclose(found[:, t][here], returns[:, t][here].mean())
        assert not found[:, t][~here].any()


@pytest.mark.parametrize("baseline", ["critic", "time", "informed"])
def test_what_a_task_adapts_by_does_not_depend_on_the_other_tasks(baseline: str) -> None:
    policy, _, record = recorded(5)
    config = MetaConfig(algorithm="rl2", baseline=baseline, inner_steps=1)
    weights = policy.numpy_weights()
    together = adapt_weights(policy, weights, batch_for(policy, weights, record, config), config)
    for task in range(3):
        part = record.select(slice(task, task + 1))
        alone = adapt_weights(policy, weights, batch_for(policy, weights, part, config), config)
        for name, value in alone.items():
            np.testing.assert_allclose(value[0], together[name][task], atol=1e-5, err_msg=name)


def test_the_value_head_learns_what_the_critic_should_have_said() -> None:
    policy, _, _ = recorded(0)
    weights = policy.numpy_weights()
    record = toy_rollouts(policy.spec, weights, uneven(3, 2, 9), 2, 9)
    config = MetaConfig(algorithm="rl2", baseline="critic", inner_steps=0, value_weight=1.0)
    batch = batch_for(policy, weights, record, config)
    parameters = tensors(weights)
    loss = meta_loss(policy, parameters, [batch], config).losses.sum()
    # At the policy that acted the ratio is 1, so that all of this gradient is the squared error's.
    (gradient,) = torch.autograd.grad(loss, parameters["value.bias"])
    values = functional_call(policy, parameters, (batch.inputs, batch.resets)).values
    assert batch.targets is not None
    expected = (2 * (values - batch.targets) * batch.share).sum()
    torch.testing.assert_close(gradient[0], expected.detach(), rtol=1e-4, atol=1e-5)


# --- The critic that is told the task ---------------------------------------------------------------------


@pytest.mark.parametrize("own", [False, True])
def test_what_is_known_moves_values_and_no_action(own: bool) -> None:
    """V = hidden w + v + C · tanh(hidden W + known U + b), with shared weights and with weights a task."""
    spec = make_spec(task_size=4, discrete=True)
    policy = make_policy(spec)
    policy.task_mean += 0.5
    policy.task_scale *= 2.0
    weights = {name: value.astype(np.float64) for name, value in policy.numpy_weights().items()}
    parameters = {name: torch.tensor(value) for name, value in weights.items()}
    if own:
        parameters = for_tasks(parameters, 3)
    rng = np.random.default_rng(0)
    inputs, known = torch.tensor(rng.normal(size=(3, 7, 2, spec.input_size))), rng.normal(size=(3, 4))
    told = functional_call(policy.double(), parameters, (inputs, None, None, torch.tensor(known)))
    untold = functional_call(policy, parameters, (inputs,))
    torch.testing.assert_close(told.actions.logits, untold.actions.logits, rtol=0, atol=0)
    hidden = torch.tanh(inputs @ policy.encoder.weight + policy.encoder.bias)
    hidden, _ = policy.blocks[0](hidden)
    for output, read in ((told, (known - 0.5) / 2.0), (untold, np.zeros((3, 4)))):
        inner = hidden.detach().numpy() @ weights["critic.weight"] + weights["critic.bias"]
        inner = inner + (read @ weights["critic.task"])[:, None, None]
        expected = hidden.detach().numpy() @ weights["value.weight"] + weights["value.bias"]
        expected = expected + np.tanh(inner) @ weights["critic.out"]
        np.testing.assert_allclose(output.values.detach().numpy(), expected[..., 0], atol=1e-9)


def test_nobody_needs_to_know_the_task_to_adapt() -> None:
    """The inner step, in training and at test time, is that of the linear baseline."""
    spec = make_spec(discrete=True, task_size=2)
    policy = make_policy(spec)
    weights = policy.numpy_weights()
    tasks = [{**task, "best": i % 2} for i, task in enumerate(uneven(3, 2, 9))]
    record = toy_rollouts(spec, weights, tasks, 2, 9)
    record = replace(record, tasks=tuple({"goal": [0.1 * i, 1.0]} for i in range(3)))
    informed, linear = (MetaConfig(algorithm="rl2", baseline=baseline) for baseline in ("informed", "linear"))
    batch, plain = (batch_for(policy, weights, record, config) for config in (informed, linear))
    torch.testing.assert_close(batch.advantages, plain.advantages, rtol=0, atol=0)
    assert batch.known is not None
    assert batch.targets is not None
    assert (batch.outer_advantages != plain.outer_advantages).any()
    # At test time there may be nothing to be told.
    foreign = replace(record, tasks=("whatever",) * 3)
    adapted = StandardAdapter(policy, informed, steps=1).adapt(lambda *_: foreign, 2)
    expected = StandardAdapter(policy, linear, steps=1).adapt(lambda *_: record, 2)
    for name, value in expected.weights.items():
        np.testing.assert_array_equal(adapted.weights[name], value, err_msg=name)


def test_the_critic_bootstraps_on_what_it_is_told() -> None:
    """GAE of the informed values, whose targets the meta-loss then holds them to."""
    spec = make_spec(discrete=True, task_size=1)
    policy = make_policy(spec)
    weights = policy.numpy_weights()
    record = toy_rollouts(spec, weights, uneven(3, 2, 9), 2, 9)
    record = replace(record, tasks=tuple({"mass": float(i)} for i in range(3)))
    config = MetaConfig(algorithm="rl2", inner_steps=0, baseline="informed", value_weight=1.0)
    batch = batch_for(policy, weights, record, config)
    inputs, resets = (torch.from_numpy(array) for array in critic_inputs(spec, record))
    known = torch.tensor([[0.0], [1.0], [2.0]])
    values = policy(inputs, resets, None, known).values.detach().numpy()
    # What it says is meant beyond the mean return of the time step, which is 0 after the last.
    returns = discounted_returns(record.rewards, record.valid, config.discount)
    level = np.zeros_like(values)
    for t in range(values.shape[1] - 1):
        if (here := record.valid[:, t]).any():
            level[:, t] = returns[:, t][here].mean()
    raw, expected = advantages(record, config.discount, config.gae_lambda, "informed", values + level)
    np.testing.assert_allclose(batch.targets, raw + expected - level[:, :-1], atol=1e-5)
    np.testing.assert_allclose(batch.outer_advantages, normalized(raw, record.valid, (0, 1, 2)), atol=1e-5)
    parameters = tensors(weights)
    (gradient,) = torch.autograd.grad(
        meta_loss(policy, parameters, [batch], config).losses.sum(), parameters["value.bias"]
    )
    error = 2 * (torch.from_numpy(values[:, :-1]) - batch.targets) * batch.share
    torch.testing.assert_close(gradient[0], error.sum(), rtol=1e-4, atol=1e-5)


def test_the_numbers_of_a_task() -> None:
    tasks = [{"b": [1, 2.5], "a": {"y": 3, "x": True}}, {"a": {"x": 0, "y": 4}, "b": (5, 6)}]
    found = task_numbers(tasks)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, [[1, 3, 1, 2.5], [0, 4, 5, 6]])
    for wrong in ([{"seed": 1}], [{"kind": "door"}], [{}], [{"a": [1]}, {"a": [1, 2]}], ["goal"], [{"a": None}]):
        with pytest.raises(ValueError, match="informed baseline needs tasks that are numbers"):
            task_numbers(wrong)


# --- RL² as a member of the family ------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["promp", "maml", "fomaml"])
def test_only_rl2_learns_without_inner_steps(algorithm: str) -> None:
    with pytest.raises(ValueError, match=f"inner_steps must be 1 or more for {algorithm}"):
        MetaConfig(algorithm=algorithm, inner_steps=0)
    assert MetaConfig(algorithm="rl2", inner_steps=0).weights == (1.0,)
    with pytest.raises(ValueError, match="step_weights"):
        MetaConfig(algorithm="rl2", inner_steps=0, step_weights=(1.0, 1.0))


def test_without_inner_steps_the_meta_gradient_is_that_of_ppo() -> None:
    """The clipped surrogate over all tasks, written out."""
    policy, _, _ = recorded(2)
    weights = policy.numpy_weights()
    record = toy_rollouts(policy.spec, weights, uneven(3, 2, 9), 2, 9)
    config = MetaConfig(algorithm="rl2", inner_steps=0, baseline="time", kl_penalty=0.0)
    batch = batch_for(policy, weights, record, config)
    moved = {name: value + 0.01 for name, value in weights.items()}
    parameters = tensors(moved)
    loss = meta_loss(policy, parameters, [batch], config)
    found = torch.autograd.grad(loss.losses.sum(), list(parameters.values()), allow_unused=True)
    others = tensors(moved)
    actions = functional_call(policy, others, (batch.inputs, batch.resets)).actions
    ratio = torch.exp(actions.log_prob(batch.actions) - batch.log_probs)
    gain = torch.minimum(
        ratio * batch.outer_advantages, ratio.clamp(1 - config.clip, 1 + config.clip) * batch.outer_advantages
    )
    written = torch.autograd.grad(-(gain * batch.share).sum(), list(others.values()), allow_unused=True)
    for name, one, other in zip(weights, found, written, strict=True):
        if other is not None:
            torch.testing.assert_close(one, other, msg=name, rtol=1e-4, atol=1e-6)


# --- Learned step sizes -----------------------------------------------------------------------------------


def test_step_sizes_of_one_change_nothing_and_others_scale_the_step() -> None:
    spec = make_spec()
    policy, learned = make_policy(spec), SSMPolicy(replace(spec, learned_step_sizes=True))
    weights = policy.numpy_weights()
    record = toy_rollouts(spec, weights, uneven(3, 2, 9), 2, 9)
    config = MetaConfig(inner_lr=0.3)
    batch = batch_for(policy, weights, record, config)
    plain = adapt_weights(policy, weights, batch, config)
    factors = {name: value for name, value in learned.numpy_weights().items() if name.startswith("step_sizes.")}
    same = adapt_weights(learned, weights | factors, batch, config)
    for name, value in plain.items():
        np.testing.assert_array_equal(same[name], value, err_msg=name)
    halved = adapt_weights(learned, weights | {name: value / 2 for name, value in factors.items()}, batch, config)
    for name, value in plain.items():
        np.testing.assert_allclose(halved[name], weights[name] + (value - weights[name]) / 2, atol=1e-6, err_msg=name)
    assert step_size("value.weight") not in factors


def test_the_meta_gradient_reaches_step_sizes() -> None:
    """Against a finite difference, in float64."""
    spec = make_spec(learned_step_sizes=True)
    policy = make_policy(spec).double()
    weights = {name: value.astype(np.float64) for name, value in make_policy(spec).numpy_weights().items()}
    record = toy_rollouts(spec, make_policy(spec).numpy_weights(), uneven(3, 2, 9), 2, 9)
    config = MetaConfig(inner_lr=0.3, algorithm="maml")
    single = batch_for(make_policy(spec), make_policy(spec).numpy_weights(), record, config)
    batch = type(single)(*(x.double() if x is not None and x.is_floating_point() else x for x in single))

    def loss(parameters: Any) -> torch.Tensor:
        return meta_loss(policy, parameters, [batch, batch], config).losses.sum()

    parameters = tensors(weights, torch.float64)
    name = step_size("policy.weight")
    (gradient,) = torch.autograd.grad(loss(parameters), parameters[name])
    values = []
    for sign in (1, -1):
        moved = {key: value.copy() for key, value in weights.items()}
        moved[name][0, 0] += sign * 1e-5
        values.append(float(loss(tensors(moved, torch.float64)).detach()))
    assert float(gradient[0, 0]) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4, abs=1e-10)
    assert abs(float(gradient[0, 0])) > 1e-8


def test_step_sizes_do_not_adapt() -> None:
    spec = make_spec(learned_step_sizes=True)
    policy = make_policy(spec)
    weights = policy.numpy_weights()
    record = toy_rollouts(spec, weights, uneven(3, 2, 9), 2, 9)
    config = MetaConfig()
    batch = batch_for(policy, weights, record, config)
    adapted, _ = inner_step(policy, for_tasks(tensors(weights), 3), batch, config, differentiable=False)
    for name, value in weights.items():
        if name.startswith("step_sizes."):
            np.testing.assert_array_equal(adapted[name].numpy(), np.stack([value] * 3))


# --- Normalisation ----------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_running_moments_are_those_of_all_samples(seed: int) -> None:
    rng = np.random.default_rng(seed)
    samples = rng.normal(3.0, [1.0, 100.0, 0.0], (rng.integers(1, 50), 3))
    moments = RunningMoments(3)
    for part in np.array_split(samples, rng.integers(1, 6)):
        moments.update(part)
    np.testing.assert_allclose(moments.mean, samples.mean(0))
    std = samples.std(0)
    np.testing.assert_allclose(moments.scale, np.where(std > 1e-6, std, 1.0))
    again = RunningMoments(3)
    again.load(moments.to_dict())
    np.testing.assert_array_equal(again.scale, moments.scale)


@pytest.mark.parametrize("inputs", ["full", "observation"])
def test_a_normalised_policy_acts_alike_in_numpy_and_torch(inputs: str) -> None:
    spec = make_spec(normalize_observations=True, scale_rewards=True, inputs=inputs)
    plain = make_spec(inputs=inputs)
    record = toy_rollouts(plain, make_policy(plain).numpy_weights(), uneven(3, 2, 9), 2, 9)
    normalizer = Normalizer(spec, 0.9)
    normalizer.update(record)
    arrays = normalizer.arrays()
    weights = make_policy(spec).numpy_weights() | arrays
    policy = SSMPolicy(spec)
    policy.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    seen = policy_inputs(spec, record)[:, 0]
    head, _ = NumpyPolicy(spec, weights).head(seen, NumpyPolicy(spec, weights).initial_state(3, 2))
    with torch.no_grad():
        expected = policy.step(torch.from_numpy(seen), policy.initial_state(3, 2)).actions.mean.numpy()
    np.testing.assert_allclose(head, expected, atol=1e-5)
    # By hand: a policy without a normaliser that reads normalised inputs.
    same = SSMPolicy(plain)
    same.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items() if name not in arrays})
    scaled = (seen - arrays["input_mean"]) / arrays["input_scale"]
    with torch.no_grad():
        by_hand = same.step(torch.from_numpy(scaled), same.initial_state(3, 2)).actions.mean.numpy()
    np.testing.assert_allclose(by_hand, expected, atol=1e-6)
    observations = record.observations[record.valid]
    np.testing.assert_allclose(arrays["input_mean"][:3], observations.mean(0), rtol=1e-5)
    np.testing.assert_allclose(arrays["input_scale"][:3], observations.std(0), rtol=1e-4)


def test_a_previous_reward_is_scaled_by_rewards_and_the_critic_s_by_returns() -> None:
    """Divided by a long return's spread, what a single action paid would hardly reach the policy."""
    spec = make_spec(discrete=True, scale_rewards=True)
    record = toy_rollouts(make_spec(discrete=True), make_policy(spec).numpy_weights(), [{"best": 0}] * 4, 5, 40)
    normalizer = Normalizer(spec, 1.0)
    for part in (record.select(slice(0, 1)), record.select(slice(1, 4))):
        normalizer.update(part)
    arrays = normalizer.arrays()
    returns = record.rewards[:, ::-1].cumsum(1)[:, ::-1]
    np.testing.assert_allclose(arrays["input_scale"][-2], record.rewards.std(), rtol=1e-4)
    np.testing.assert_allclose(arrays["reward_scale"], returns.std(), rtol=1e-4)
    assert arrays["reward_scale"] > 5 * arrays["input_scale"][-2]
    np.testing.assert_array_equal(arrays["input_mean"], 0)


def test_moments_of_an_older_version_are_refused() -> None:
    spec = make_spec(scale_rewards=True)
    kept = Normalizer(spec, 0.9).to_dict()
    del kept["rewards"]
    with pytest.raises(ValueError, match="no moments of rewards: an older version wrote it"):
        Normalizer(spec, 0.9).load(kept)


def test_a_task_adapts_with_the_normaliser_that_it_was_given() -> None:
    spec = make_spec(normalize_observations=True)
    policy = make_policy(spec)
    with torch.no_grad():
        policy.input_mean += 1.0
        policy.input_scale *= 3.0
    weights = policy.numpy_weights()
    record = toy_rollouts(spec, weights, uneven(3, 2, 9), 2, 9)
    config = MetaConfig(algorithm="rl2", baseline="critic")
    adapted = adapt_weights(policy, weights, batch_for(policy, weights, record, config), config)
    for name in ("input_mean", "input_scale", "reward_scale"):
        np.testing.assert_array_equal(adapted[name], np.stack([weights[name]] * 3))
    again = toy_rollouts(spec, adapted, uneven(3, 2, 9), 2, 9, seed=1)  # own weights a task
    batch_for(policy, adapted, again, config)


# --- Resizing ---------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(seed=seeds, spec=specs(observation_size=3, action_size=2, discrete=False))
def test_growing_keeps_what_learned_step_sizes_adapt_to(seed: int, spec: Any) -> None:
    """New entries start with a step size of 0: the adapted policies are the same functions, too."""
    seed %= 10_000
    spec = replace(spec, learned_step_sizes=True, normalize_observations=True)
    rng = np.random.default_rng(seed)
    policy = make_policy(spec, seed)
    weights = policy.numpy_weights()
    target = replace(spec, hidden_dim=spec.hidden_dim + 2, state_dim=spec.state_dim + 2, num_layers=spec.num_layers + 1)
    probe = rng.normal(size=(3, 9, 2, spec.input_size)).astype(np.float32)
    grown = resize(spec, weights, {}, target, probe, seed)
    assert {name: value.shape for name, value in grown.policy.items()} == expected_shapes(target)
    record = toy_rollouts(spec, weights, uneven(3, 2, 9, seed), 2, 9, seed)
    config = MetaConfig(inner_lr=0.05)
    heads = []
    for sizes, arrays in ((spec, weights), (target, grown.policy)):
        own = SSMPolicy(sizes)
        own.load_state_dict({name: torch.tensor(value) for name, value in arrays.items()})
        adapted = adapt_weights(own, arrays, batch_for(own, arrays, record, config), config)
        inputs = torch.from_numpy(policy_inputs(sizes, record))
        with torch.no_grad():
            parameters = {name: torch.from_numpy(value) for name, value in adapted.items()}
            heads.append(functional_call(own, parameters, (inputs,)).actions.mean.numpy())
    scale = max(1.0, float(np.abs(heads[0]).max()))
    np.testing.assert_allclose(heads[1], heads[0], atol=2e-5 * scale)


def test_step_sizes_are_resized_with_their_parameters() -> None:
    spec = make_spec(num_layers=3, learned_step_sizes=True, scale_rewards=True)
    weights = make_policy(spec).numpy_weights()
    for name, value in weights.items():  # a step size that tells whose it is
        if name.startswith("step_sizes."):
            parameter = name.removeprefix("step_sizes.").replace("/", ".")
            weights[name] = weights[parameter].copy() if value.shape == weights[parameter].shape else value
    target = replace(spec, num_layers=2, hidden_dim=4, state_dim=2)
    probe = np.random.default_rng(0).normal(size=(2, 30, 3, spec.input_size)).astype(np.float32)
    smaller = resize(spec, weights, {}, target, probe, 0).policy
    assert list(smaller) == list(expected_shapes(target))
    assert {name: value.shape for name, value in smaller.items()} == expected_shapes(target)
    for name in ("encoder.weight", "encoder.bias", "blocks.0.D", "blocks.1.nu", "blocks.0.theta"):
        np.testing.assert_array_equal(smaller[step_size(name)], smaller[name], err_msg=name)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("discrete", [False, True])
def test_checkpoints_know_the_arrays_of_every_form(gated: bool, discrete: bool) -> None:
    step_sizes = {"learned_step_sizes": True}
    for flags in ({}, step_sizes, {"normalize_observations": True, **step_sizes}, {"task_size": 2, **step_sizes},
                  {"task_size": 2, "scale_rewards": True}):  # fmt: skip
        spec = make_spec(num_layers=2, gated=gated, discrete=discrete, **flags)
        arrays = SSMPolicy(spec).numpy_weights()
        assert list(arrays) == list(expected_shapes(spec))
        assert {name: value.shape for name, value in arrays.items()} == expected_shapes(spec)
