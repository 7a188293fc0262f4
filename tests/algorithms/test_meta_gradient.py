"""The meta-objective and its gradient: against loops, finite differences and what is written out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import kl_divergence
from torch.func import functional_call

from builders import (
    TASKS,
    assert_close,
    difference,
    drop,
    exact,
    experience,
    gradient,
    make_policy,
    make_spec,
    norm,
    recorded,
    seeds,
    specs,
    spoil,
    tensors,
    toy_rollouts,
    uneven,
)
from ssm_metarl.algorithms.batch import Batch, make_batch
from ssm_metarl.algorithms.inner_loop import adapt_weights, batch_for, for_tasks, inner_loss, policy_outputs
from ssm_metarl.algorithms.objective import meta_loss, outer_loss
from ssm_metarl.algorithms.policy import SSMPolicy
from ssm_metarl.algorithms.registry import ALGORITHMS, MetaConfig


def meta_gradient(
    policy: Any, parameters: Any, stages: Any, config: MetaConfig, reference: Any = None
) -> dict[str, Any]:
    return gradient(meta_loss(policy, parameters, stages, config, reference).losses.sum(), parameters)


def moved(parameters: Mapping[str, Any], by: float = 0.05) -> dict[str, Any]:
    """Where a few epochs may have brought the meta-parameters."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: (value + by * torch.randn(value.shape, dtype=value.dtype, generator=generator)).detach().requires_grad_()
        for name, value in parameters.items()
    }


# --- Tasks in one call against one at a time ------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("discrete", [False, True])
def test_the_meta_objective_equals_a_loop_over_tasks(algorithm: str, discrete: bool) -> None:
    """Losses task by task, and the meta-gradient as the sum of every task's."""
    config = MetaConfig(algorithm=algorithm, inner_lr=0.5, inner_steps=2, step_weights=(1, 2, 3), entropy_bonus=0.1)
    policy, parameters, stages = exact(config, make_spec(discrete=discrete))
    together = meta_loss(policy, parameters, stages, config)
    alone = [
        meta_loss(policy, parameters, [stage.tasks(slice(task, task + 1)) for stage in stages], config).losses
        for task in range(TASKS)
    ]
    torch.testing.assert_close(together.losses, torch.cat(alone))
    assert_close(gradient(together.losses.sum(), parameters), gradient(torch.cat(alone).sum(), parameters))


# --- Derivatives ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["promp", "maml"])
@pytest.mark.parametrize(("steps", "step_weights"), [(1, ()), (1, (1.0, 2.0)), (2, ()), (2, (1.0, 0.5, 2.0))])
@pytest.mark.parametrize("form", [{}, {"discrete": True, "gated": True}], ids=["gaussian", "categorical-gated"])
@pytest.mark.parametrize("later", [False, True], ids=["first-epoch", "later-epoch"])
def test_the_meta_gradient_is_the_derivative(
    algorithm: str, steps: int, step_weights: Any, form: Any, later: bool
) -> None:
    """Central differences of the whole objective along a random direction in every parameter."""
    config = MetaConfig(
        algorithm=algorithm, inner_steps=steps, step_weights=step_weights, entropy_bonus=0.05, kl_penalty=0.3
    )
    policy, parameters, stages = exact(config, make_spec(hidden_dim=4, **form))
    reference = None
    if later:
        reference = meta_loss(policy, parameters, stages, config).before
        parameters = moved(parameters)
    gradients = meta_gradient(policy, parameters, stages, config, reference)
    generator = torch.Generator().manual_seed(0)
    for name, value in parameters.items():
        direction = torch.randn(value.shape, dtype=value.dtype, generator=generator)
        ends = []
        for shift in (1e-5, -1e-5):
            shifted = {**parameters, name: value + shift * direction}
            ends.append(meta_loss(policy, shifted, stages, config, reference).losses.sum().item())
        slope = (ends[0] - ends[1]) / 2e-5
        assert float((gradients[name] * direction).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-7), name
    assert norm(gradients) > 1e-3


@pytest.mark.parametrize("steps", [1, 2])
def test_first_order_holds_the_inner_gradients_fixed(steps: int) -> None:
    """And so differs from second order, although the loss is the same."""
    config = MetaConfig(algorithm="fomaml", inner_lr=0.7, inner_steps=steps)
    policy, parameters, stages = exact(config, make_spec())
    current = for_tasks(parameters, TASKS)
    for stage in stages[:-1]:
        fixed = {name: value.detach().requires_grad_() for name, value in current.items()}
        losses = inner_loss(policy_outputs(policy, fixed, stage).actions, stage, ALGORITHMS["fomaml"])
        inner = gradient(losses.sum(), fixed)
        current = {name: value - config.inner_lr * inner[name] for name, value in current.items()}
    losses = outer_loss(policy_outputs(policy, current, stages[-1]), stages[-1], config)
    ours = meta_gradient(policy, parameters, stages, config)
    assert_close(ours, gradient(losses.sum(), parameters))
    second = replace(config, algorithm="maml")
    torch.testing.assert_close(
        meta_loss(policy, parameters, stages, config).losses, meta_loss(policy, parameters, stages, second).losses
    )
    assert norm(difference(ours, meta_gradient(policy, parameters, stages, second))) > 0.01 * norm(ours)


def test_orders_agree_when_nothing_adapts() -> None:
    """The difference of the two orders is of the size of the inner step."""
    config = MetaConfig(algorithm="fomaml", inner_lr=1e-9)
    policy, parameters, stages = exact(config, make_spec())
    first = meta_gradient(policy, parameters, stages, config)
    second = meta_gradient(policy, parameters, stages, replace(config, algorithm="maml"))
    assert_close(first, second, atol=1e-7, rtol=1e-6)


# --- The first epoch ------------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(spec=specs(initial_std=0.5), seed=seeds, steps=st.integers(1, 3), algorithm=st.sampled_from(list(ALGORITHMS)))
def test_the_ratio_is_1_in_the_first_epoch(spec: Any, seed: int, steps: int, algorithm: str) -> None:
    """What the objective adapts to is what collected the query; so is the reference of the penalty."""
    config = MetaConfig(algorithm=algorithm, inner_steps=steps, inner_lr=0.03)
    policy, stages = experience(config, spec, seed)
    loss = meta_loss(policy, dict(policy.named_parameters()), stages, config)
    assert float(loss.log_ratio) < 1e-3
    assert loss.kl_before.abs().max() < 1e-6
    assert loss.losses.isfinite().all()


@pytest.mark.parametrize("discrete", [False, True])
def test_the_penalty_and_its_gradient_are_0_at_the_reference_and_grow_from_it(discrete: bool) -> None:
    free, tied = MetaConfig(kl_penalty=0.0), MetaConfig(kl_penalty=7.0)
    policy, parameters, stages = exact(tied, make_spec(discrete=discrete))
    at = meta_loss(policy, parameters, stages, tied)
    torch.testing.assert_close(at.losses, meta_loss(policy, parameters, stages, free).losses)
    assert_close(meta_gradient(policy, parameters, stages, tied), meta_gradient(policy, parameters, stages, free))
    away = moved(parameters)
    costs = [meta_loss(policy, away, stages, config, at.before) for config in (tied, free)]
    now = functional_call(policy, for_tasks(away, TASKS), (stages[0].inputs,)).actions
    expected = (kl_divergence(at.before, now) * stages[0].share).sum((1, 2))
    torch.testing.assert_close(costs[0].kl_before, expected.detach())
    assert (expected > 1e-4).all()
    torch.testing.assert_close(costs[0].losses - costs[1].losses, 7.0 * expected)
    pull = norm(difference(*(gradient(cost.losses.sum(), away) for cost in costs)))
    assert pull > 1e-3


@pytest.mark.parametrize("ratio", [0.5, 2.0])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_beyond_the_clip_there_is_no_gradient(ratio: float, advantage: float) -> None:
    """For a change that has already gone too far the right way; one that went the wrong way is still undone."""
    config = MetaConfig(algorithm="promp", clip=0.3)
    policy, parameters, (batch, _) = exact(config, make_spec())
    actions = functional_call(policy, for_tasks(parameters, TASKS), (batch.inputs,)).actions
    batch = batch._replace(
        log_probs=(actions.log_prob(batch.actions) - math.log(ratio)).detach(),
        outer_advantages=torch.full_like(batch.advantages, advantage),
    )
    losses = outer_loss(policy_outputs(policy, for_tasks(parameters, TASKS), batch), batch, config)
    too_far = (ratio > 1) == (advantage > 0)
    bound = 1.3 if ratio > 1 else 0.7
    torch.testing.assert_close(losses, torch.full_like(losses, -advantage * (bound if too_far else ratio)))
    assert (norm(gradient(losses.sum(), parameters)) == 0) == too_far


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_a_step_makes_an_action_likelier_where_its_advantage_is_positive(algorithm: str, advantage: float) -> None:
    """For the inner and the outer loss alike."""
    config = MetaConfig(algorithm=algorithm)
    policy, parameters, (batch, _) = exact(config, make_spec(discrete=True))
    only = torch.zeros_like(batch.share)
    only[:, 0, 0] = 1.0
    batch = batch._replace(share=only, advantages=advantage * only, outer_advantages=advantage * only)

    def log_prob(at: Any) -> Any:
        actions = functional_call(policy, for_tasks(at, TASKS), (batch.inputs,)).actions
        return actions.log_prob(batch.actions)[:, 0, 0].sum()

    output = policy_outputs(policy, for_tasks(parameters, TASKS), batch)
    for loss in (
        inner_loss(output.actions, batch, ALGORITHMS[algorithm]),
        outer_loss(output, batch, config),
    ):
        step = gradient(loss.sum(), parameters)
        after = {name: value - 1e-3 * step[name] for name, value in parameters.items()}
        assert (log_prob(after) - log_prob(parameters)) * advantage > 0


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("steps", [1, 2])
def test_all_weight_on_step_0_is_the_plain_policy_gradient(algorithm: str, steps: int) -> None:
    config = MetaConfig(algorithm=algorithm, inner_lr=0.7, inner_steps=steps, step_weights=(1.0, *[0.0] * steps))
    policy, parameters, stages = exact(config, make_spec())
    first = stages[0]
    log_probs = policy(first.inputs).actions.log_prob(first.actions)
    expected = torch.autograd.grad(
        -(log_probs * first.advantages * first.share).sum(), list(policy.parameters()), allow_unused=True
    )
    ours = meta_gradient(policy, parameters, stages, config)
    for (name, grad), value in zip(ours.items(), expected, strict=True):
        # Where the ratio is 1 but for the record's float32.
        torch.testing.assert_close(
            grad, torch.zeros_like(grad) if value is None else value, rtol=1e-4, atol=1e-6, msg=name
        )


def test_the_objective_is_the_weighted_sum_over_steps() -> None:
    config = MetaConfig(inner_steps=2, step_weights=(1, 2, 5), inner_lr=0.7)
    policy, parameters, stages = exact(config, make_spec())
    each = [
        meta_loss(policy, parameters, stages, replace(config, step_weights=only)).losses
        for only in ((1, 0, 0), (0, 1, 0), (0, 0, 1))
    ]
    expected = (each[0] + 2 * each[1] + 5 * each[2]) / 8
    torch.testing.assert_close(meta_loss(policy, parameters, stages, config).losses, expected)
    assert not torch.allclose(each[0], each[2])
    # The weight of step s is on the policy after s steps: what follows does not count.
    for steps in (1, 2):
        shorter = replace(config, inner_steps=steps, step_weights=())
        torch.testing.assert_close(each[steps], meta_loss(policy, parameters, stages[: steps + 1], shorter).losses)


def test_the_entropy_bonus_is_what_it_says() -> None:
    plain, bonus = MetaConfig(), MetaConfig(entropy_bonus=0.5)
    policy, parameters, stages = exact(plain, make_spec(discrete=True))
    without, with_bonus = (meta_loss(policy, parameters, stages, config) for config in (plain, bonus))
    torch.testing.assert_close((without.losses - with_bonus.losses).mean(), 0.5 * without.entropy)
    assert 0 < float(without.entropy) < math.log(2)


# --- What must not matter -------------------------------------------------------------------------------------


def outcome(policy: SSMPolicy, stages: Sequence[Batch], config: MetaConfig) -> tuple[Any, dict[str, Any]]:
    parameters = dict(policy.named_parameters())
    loss = meta_loss(policy, parameters, stages, config)
    assert all(torch.as_tensor(part).isfinite().all() for part in (*loss[:1], *loss[2:]))
    return loss.losses, gradient(loss.losses.sum(), parameters)


@settings(max_examples=20)
@given(seed=seeds, algorithm=st.sampled_from(list(ALGORITHMS)), discrete=st.booleans())
def test_garbage_that_is_not_valid_changes_nothing(seed: int, algorithm: str, discrete: bool) -> None:
    """Neither batches, nor losses, nor the meta-gradient."""
    config = MetaConfig(algorithm=algorithm, entropy_bonus=0.1, step_weights=(1, 1))
    spec = make_spec(discrete=discrete)
    policy = make_policy(spec, seed)
    records = [
        drop(toy_rollouts(spec, policy.numpy_weights(), uneven(TASKS, 3, 6, seed + i), 3, 6, seed + i), 0, 1)
        for i in (0, 1)
    ]
    clean, spoiled = (
        [make_batch(spec, record, config) for record in each]
        for each in (records, [spoil(record, seed) for record in records])
    )
    for one, other in zip(clean, spoiled, strict=True):
        for name in ("actions", "log_probs", "advantages", "share"):
            torch.testing.assert_close(getattr(other, name), getattr(one, name), rtol=0, atol=0)
    (losses, gradients), (spoiled_losses, spoiled_gradients) = (
        outcome(policy, stages, config) for stages in (clean, spoiled)
    )
    torch.testing.assert_close(spoiled_losses, losses)
    assert_close(spoiled_gradients, gradients)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_task_without_a_valid_step_stays_where_it_is(algorithm: str) -> None:
    config = MetaConfig(algorithm=algorithm)
    spec = make_spec()
    policy = make_policy(spec)
    record = toy_rollouts(spec, policy.numpy_weights(), uneven(TASKS, 3, 6), 3, 6)
    batch = make_batch(spec, drop(record, 1), config)
    torch.testing.assert_close(batch.share.sum((1, 2)), torch.tensor([1.0, 0.0, 1.0]))
    weights = policy.numpy_weights()
    adapted = adapt_weights(policy, weights, batch, config)
    for name, value in weights.items():
        torch.testing.assert_close(adapted[name][1], value, rtol=0, atol=0)
    losses, gradients = outcome(policy, [batch, batch], config)
    assert losses[1] == 0
    whole = make_batch(spec, record, config)
    others = [Batch(*(None if x is None else x[[0, 2]] for x in whole))] * 2
    expected, expected_gradients = outcome(policy, others, config)
    torch.testing.assert_close(losses[[0, 2]], expected, rtol=1e-4, atol=1e-6)
    assert_close(gradients, expected_gradients, rtol=1e-3, atol=1e-6)


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
