"""The inner step: each task by itself, towards what is rewarded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import (
    TASKS,
    assert_close,
    difference,
    exact,
    experience,
    gradient,
    make_spec,
    norm,
    recorded,
    seeds,
    specs,
    task_weights,
    tensors,
    toy_rollouts,
)
from ssm_metarl.algorithms.batch import make_batch
from ssm_metarl.algorithms.inner_loop import adapt_weights, batch_for, for_tasks, inner_loss, inner_step, policy_outputs
from ssm_metarl.algorithms.policy import SSMPolicy
from ssm_metarl.algorithms.registry import ALGORITHMS, MetaConfig


@settings(max_examples=15)
@given(spec=specs(), seed=seeds, algorithm=st.sampled_from(list(ALGORITHMS)), shared=st.booleans())
def test_adaptation_in_one_call_equals_a_loop_over_tasks(spec: Any, seed: int, algorithm: str, shared: bool) -> None:
    config = MetaConfig(algorithm=algorithm, inner_lr=0.5)
    policy, (batch, _) = experience(config, spec, seed)
    own = tensors(policy.numpy_weights() if shared else task_weights(spec, TASKS, seed))
    parameters = for_tasks(own, TASKS) if shared else own
    together, _ = inner_step(policy, parameters, batch, config, differentiable=True)
    for task in range(TASKS):
        part = slice(task, task + 1)
        own_part = {name: value[part] for name, value in parameters.items()}
        alone, _ = inner_step(policy, own_part, batch.tasks(part), config, differentiable=True)
        assert_close({name: value[part] for name, value in together.items()}, alone, rtol=1e-4, atol=1e-5)
    detached_step, _ = inner_step(policy, parameters, batch, config, differentiable=False)
    assert_close(detached_step, {name: value.detach() for name, value in together.items()})
    assert not any(value.requires_grad for value in detached_step.values())


def test_the_inner_ratio_changes_the_curvature_only() -> None:
    """ProMP's inner gradient is MAML's where the data was collected; the derivative of that gradient is not."""
    config = MetaConfig(algorithm="maml", inner_lr=0.7)
    policy, parameters, stages = exact(config, make_spec())
    current = for_tasks(parameters, TASKS)
    # float32 log-probabilities of the policy that acted are the ratio's rounding.
    adapted = [
        inner_step(policy, current, stages[0], replace(config, algorithm=name), differentiable=True)[0]
        for name in ("maml", "promp")
    ]
    assert_close(*adapted, rtol=1e-4, atol=1e-5)
    curvature = [gradient(sum(value.sum() for value in each.values()), parameters) for each in adapted]
    assert norm(difference(*curvature)) > 1e-2


@settings(max_examples=15)
@given(spec=specs(action_size=3), seed=seeds, algorithm=st.sampled_from(list(ALGORITHMS)))
def test_a_small_inner_step_raises_the_surrogate_by_its_gradients_square(spec: Any, seed: int, algorithm: str) -> None:
    config = MetaConfig(algorithm=algorithm, inner_lr=1e-6)
    policy, parameters, (batch, _) = exact(config, spec, seed)
    before = inner_loss(
        policy_outputs(policy, for_tasks(parameters, TASKS), batch).actions, batch, ALGORITHMS[algorithm]
    )
    adapted, _ = inner_step(policy, for_tasks(parameters, TASKS), batch, config, differentiable=False)
    after = inner_loss(policy_outputs(policy, adapted, batch).actions, batch, ALGORITHMS[algorithm])
    for task in range(TASKS):
        square = norm(gradient(before[task], parameters)) ** 2
        assert (before[task] - after[task]).item() == pytest.approx(1e-6 * square, rel=1e-2, abs=1e-13)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("form", [{"discrete": True}, {"discrete": False, "action_size": 1}], ids=["bandit", "sign"])
def test_adaptation_moves_each_task_to_what_is_rewarded(algorithm: str, form: Any) -> None:
    """Two tasks that reward opposite actions part from one policy, a step at a time."""
    config = MetaConfig(algorithm=algorithm, inner_lr=1.0, discount=0.0)
    spec = make_spec(**form, inputs="observation", initial_std=1.0)
    policy = SSMPolicy(spec, 0)
    weights, tasks = policy.numpy_weights(), [{"best": 0}, {"best": 1}]
    rewards = []
    for step in range(4):
        record = toy_rollouts(spec, weights, tasks, 30, 6, step)
        rewards.append(record.rewards.mean((1, 2)))
        weights = adapt_weights(policy, weights, make_batch(spec, record, config), config)
    for task in range(2):
        assert rewards[0][task] == pytest.approx(0.5, abs=0.2)
        assert rewards[1][task] > rewards[0][task] + 0.05
        assert rewards[3][task] > 0.8


@pytest.mark.parametrize("baseline", ["critic", "time", "privileged"])
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
