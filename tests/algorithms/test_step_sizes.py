"""Learned step sizes: they scale the inner step, do not adapt, and follow a resized policy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch.func import functional_call

from builders import make_policy, make_spec, seeds, specs, tensors, toy_rollouts, uneven
from ssm_metarl.algorithms.inner_loop import adapt_weights, batch_for, for_tasks, inner_step
from ssm_metarl.algorithms.inputs import policy_inputs
from ssm_metarl.algorithms.objective import meta_loss
from ssm_metarl.algorithms.parameters import expected_shapes, step_size
from ssm_metarl.algorithms.policy import SSMPolicy
from ssm_metarl.algorithms.registry import MetaConfig
from ssm_metarl.algorithms.resize import resize

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
