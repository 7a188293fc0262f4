"""The meta-objective is of the adaptation that was played, and of its valid steps alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import kl_divergence

from builders import (
    make_policy,
    make_spec,
    seeds,
    spoil,
    toy_rollouts,
    uneven,
)
from ssm_metarl.algorithms.batch import Batch
from ssm_metarl.algorithms.inner_loop import adapt_weights, batch_for
from ssm_metarl.algorithms.inputs import task_numbers
from ssm_metarl.algorithms.objective import MetaLoss, detached, meta_loss
from ssm_metarl.algorithms.policy import SSMPolicy
from ssm_metarl.algorithms.registry import ALGORITHMS, BASELINES, MetaConfig
from ssm_metarl.algorithms.spec import PolicySpec

TASKS, NUM_EPISODES, HORIZON = 2, 3, 6


def toy_tasks(seed: int) -> list[dict[str, Any]]:
    """Tasks that are numbers, as a critic that is told them needs."""
    tasks = uneven(TASKS, NUM_EPISODES, HORIZON, seed)
    return [{key: value for key, value in task.items() if not isinstance(value, str)} for task in tasks]


def played(spec: PolicySpec, policy: SSMPolicy, config: MetaConfig, seed: int) -> list[Batch]:
    """The batches of all stages, each played with the weights that the step before gave."""
    weights, stages = policy.numpy_weights(), []
    for stage in range(config.inner_steps + 1):
        rollouts = toy_rollouts(spec, weights, toy_tasks(seed), NUM_EPISODES, HORIZON, seed + stage)
        stages.append(batch_for(policy, weights, rollouts, config))
        if stage < config.inner_steps:
            weights = adapt_weights(policy, weights, stages[-1], config)
    return stages


def differentiated(policy: SSMPolicy, stages: list[Batch], config: MetaConfig) -> tuple[MetaLoss, list[torch.Tensor]]:
    """The meta-loss and its gradient."""
    parameters = dict(policy.named_parameters())
    loss = meta_loss(policy, parameters, stages, config)
    gradients = torch.autograd.grad(loss.losses.sum(), list(parameters.values()), allow_unused=True)
    return loss, [gradient for gradient in gradients if gradient is not None]


@st.composite
def cases(draw: Any) -> tuple[PolicySpec, MetaConfig]:
    algorithm = draw(st.sampled_from([name for name in ALGORITHMS if name != "policy-gradient"]))
    baseline = draw(st.sampled_from(BASELINES))
    config = MetaConfig(
        algorithm=algorithm,
        inner_steps=draw(st.integers(0 if algorithm == "rl2" else 1, 4)),
        inner_lr=draw(st.sampled_from([0.01, 0.1])),
        baseline=baseline,
        entropy_bonus=draw(st.sampled_from([0.0, 0.1])),
    )
    spec = make_spec(
        discrete=draw(st.booleans()),
        learned_step_sizes=draw(st.booleans()),
        gated=draw(st.booleans()),
        num_layers=draw(st.integers(0, 2)),
        normalize_observations=draw(st.booleans()),
        scale_rewards=draw(st.booleans()),
        memory_slots=draw(st.sampled_from([0, 2])),
    )
    rollouts = toy_rollouts(spec, SSMPolicy(spec).numpy_weights(), toy_tasks(0), NUM_EPISODES, HORIZON)
    return replace(spec, task_size=task_numbers(rollouts.tasks).shape[1] if baseline == "privileged" else 0), config


@settings(max_examples=80)
@given(case=cases(), seed=seeds)
def test_the_ratio_to_the_policy_that_acted_is_1_in_the_first_epoch(case: Any, seed: int) -> None:
    spec, config = case
    policy = make_policy(spec, seed % 1000, noise=0.1)  # larger weights make larger rounding
    for name, buffer in policy.named_buffers():
        buffer.add_(0.3 if name.endswith("mean") else 0.5)
    stages = played(spec, policy, config, seed)
    assert float(meta_loss(policy, dict(policy.named_parameters()), stages, config).log_ratio) < 1e-4


@pytest.mark.parametrize("algorithm", ["promp", "maml", "fomaml"])
def test_step_sizes_do_not_adapt(algorithm: str) -> None:
    """From the second step on they have a gradient: a task's parameters depend on them."""
    spec = make_spec(learned_step_sizes=True)
    policy = make_policy(spec, noise=0.1)
    config = MetaConfig(algorithm=algorithm, inner_steps=3, inner_lr=0.2)
    stages = played(spec, policy, config, 0)
    loss = meta_loss(policy, dict(policy.named_parameters()), stages, config)
    assert float(loss.log_ratio) < 1e-4
    sizes = {name: value for name, value in policy.named_parameters() if name.startswith("step_sizes.")}
    gradients = torch.autograd.grad(loss.losses.sum(), list(sizes.values()))
    assert all(gradient.abs().max() > 0 for gradient in gradients)


@settings(max_examples=40)
@given(case=cases(), seed=seeds)
def test_what_stands_where_no_step_was_taken_changes_neither_value_nor_gradient(case: Any, seed: int) -> None:
    spec, config = case
    policy = make_policy(spec, seed % 1000)
    weights, clean, garbled = policy.numpy_weights(), [], []
    for stage in range(config.inner_steps + 1):
        rollouts = toy_rollouts(spec, weights, toy_tasks(seed), NUM_EPISODES, HORIZON, seed + stage)
        clean.append(batch_for(policy, weights, rollouts, config))
        garbled.append(batch_for(policy, weights, spoil(rollouts, seed), config))
        if stage < config.inner_steps:
            weights = adapt_weights(policy, weights, clean[-1], config)
    (loss, gradients), (other, others) = (differentiated(policy, stages, config) for stages in (clean, garbled))
    torch.testing.assert_close(loss.losses, other.losses, rtol=0, atol=0)
    for gradient, another in zip(gradients, others, strict=True):
        torch.testing.assert_close(gradient, another, rtol=0, atol=0)


@pytest.mark.parametrize("algorithm", ["promp", "maml", "rl2"])
@pytest.mark.parametrize("minibatches", [1, 2])
def test_a_density_that_overflows_where_no_step_was_taken_harms_no_other(algorithm: str, minibatches: int) -> None:
    """30 numbers of deviation .02 have a density of 10^41 at their mean, which is no float32."""
    spec = make_spec(action_size=30, initial_std=0.02)
    policy = SSMPolicy(spec, 0)
    config = MetaConfig(algorithm=algorithm, minibatches=minibatches, entropy_bonus=0.1)
    stages = played(spec, policy, config, 1)
    assert all((stage.share == 0).any() for stage in stages)
    with torch.no_grad():
        first = stages[0]
        log_probs = policy(first.inputs, first.resets).actions.log_prob(first.actions)
        assert torch.exp(log_probs[first.share == 0]).isinf().any()
    loss, gradients = differentiated(policy, stages, config)
    for number in (loss.losses, loss.kl_before, loss.log_ratio, loss.entropy, *gradients):
        assert number.isfinite().all()
    for value in adapt_weights(policy, policy.numpy_weights(), first, config).values():
        assert np.isfinite(value).all()


@pytest.mark.parametrize("discrete", [False, True])
def test_a_detached_distribution_is_the_same_without_a_graph(discrete: bool) -> None:
    policy = make_policy(make_spec(discrete=discrete))
    actions = policy(torch.randn(2, 3, 7)).actions
    copy = detached(actions)
    assert kl_divergence(actions, copy).abs().max() < 1e-6
    assert not copy.entropy().requires_grad
