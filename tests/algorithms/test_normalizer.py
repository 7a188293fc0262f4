"""Normalisation of observations and rewards: moments, and policies that use them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from builders import make_policy, make_spec, seeds, toy_rollouts, uneven
from ssm_metarl.algorithms.inner_loop import adapt_weights, batch_for
from ssm_metarl.algorithms.inputs import policy_inputs
from ssm_metarl.algorithms.normalizer import Normalizer, RunningMoments
from ssm_metarl.algorithms.numpy_policy import NumpyPolicy
from ssm_metarl.algorithms.policy import SSMPolicy
from ssm_metarl.algorithms.registry import MetaConfig


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
        expected = policy(torch.from_numpy(seen)[:, None]).actions.mean[:, 0].numpy()
    np.testing.assert_allclose(head, expected, atol=1e-5)
    # By hand: a policy without a normaliser that reads normalised inputs.
    same = SSMPolicy(plain)
    same.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items() if name not in arrays})
    scaled = (seen - arrays["input_mean"]) / arrays["input_scale"]
    with torch.no_grad():
        by_hand = same(torch.from_numpy(scaled)[:, None]).actions.mean[:, 0].numpy()
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
