"""The meta-objective: the loss after each inner step, differentiated through adaptation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, Independent, Normal, kl_divergence
from torch.nn.functional import huber_loss

from ssm_metarl.algorithms.batch import Batch
from ssm_metarl.algorithms.inner_loop import for_tasks, inner_step, policy_outputs
from ssm_metarl.algorithms.policy import PolicyOutput, SSMPolicy
from ssm_metarl.algorithms.registry import ALGORITHMS, MetaConfig


def outer_loss(output: PolicyOutput, batch: Batch, config: MetaConfig) -> Tensor:
    """Loss of each task's policy on a batch that it collected, [M]: PPO's clipped surrogate, or plain policy gradient.

    With demonstrations it is instead the negative log-likelihood of what was demonstrated.

    Args:
        output: what the policy says of the batch's steps.
        batch: rollouts of the query, or of any stage that has a weight in the meta-objective.
    """
    actions, advantages = output.actions, batch.outer_advantages
    log_probs = actions.log_prob(batch.actions)
    if batch.demonstrated is not None:
        gain = batch.counted(actions.log_prob(batch.demonstrated))
    elif ALGORITHMS[config.algorithm].clipped:
        ratio = torch.exp(batch.log_ratio(log_probs))
        clipped = torch.clamp(ratio, 1 - config.clip, 1 + config.clip)
        gain = torch.minimum(ratio * advantages, clipped * advantages)
    else:
        gain = batch.counted(log_probs) * advantages
    if config.entropy_bonus:
        gain = gain + config.entropy_bonus * batch.counted(actions.entropy())
    if batch.targets is not None:
        error = batch.counted(output.values) - batch.targets
        if config.value_loss == "squared":
            distance = torch.square(error)
        else:  # twice Huber's loss is the square where it is small
            distance = 2 * huber_loss(error, torch.zeros_like(error), reduction="none")
        gain = gain - config.value_weight * distance
    return -(gain * batch.share).sum((1, 2))


class MetaLoss(NamedTuple):
    """The meta-objective over M tasks and its diagnostics.

    Attributes:
        losses: [M], Σ_s w_s L(θ_s) plus the penalty.
        before: detached action distribution of the meta-parameters on the first batch: the reference of later epochs.
        kl_before: [M], detached divergence of the meta-policy from the reference on the first batch; in minibatches or
            without inner steps an unbiased estimate from the actions taken.
        log_ratio: largest |log π_new/π_old| on the query batch over valid steps.
        moved: [M], divergence of the adapted policies from those that acted on the query batch: ½ (log ratio)², which
            estimates it with a small bias and, unlike unbiased estimates, without a heavy tail.
        entropy: mean entropy of the adapted policies on the query batch.
    """

    losses: Tensor
    before: Distribution
    kl_before: Tensor
    log_ratio: Tensor
    moved: Tensor
    entropy: Tensor


def meta_loss(
    policy: SSMPolicy,
    parameters: Mapping[str, Tensor],
    stages: Sequence[Batch],
    config: MetaConfig,
    reference: Distribution | None = None,
) -> MetaLoss:
    """Σ_s w_s L(θ_s) over 0..S adaptation steps, θ_0 the meta-parameters and θ_{s+1} = θ_s - α ∇L_s(θ_s).

    Args:
        parameters: the meta-parameters, shared by all tasks.
        stages: S+1 batches; the s-th was collected with θ_s. Batch s < S is support of step s, batch S is the query.
        reference: the meta-policy's action distribution on the first batch when it was collected; None: it is now.

    Returns:
        Losses of each task, differentiable to `parameters`.
    """
    algorithm = ALGORITHMS[config.algorithm]
    weights = config.weights
    # Without inner steps no task has parameters of its own, and none gets a gradient of its own.
    current = for_tasks(parameters, stages[0].share.shape[0]) if len(stages) > 1 else dict(parameters)
    total = torch.zeros((), device=stages[0].share.device)
    before: Distribution | None = None
    for stage, weight in zip(stages[:-1], weights[:-1], strict=True):
        current, output = inner_step(policy, current, stage, config, differentiable=True)
        if weight:
            total = total + weight * outer_loss(output, stage, config)
        before = output.actions if before is None else before
    output = policy_outputs(policy, current, stages[-1])
    adapted = output.actions
    total = total + weights[-1] * outer_loss(output, stages[-1], config)
    first = stages[0]
    before = adapted if before is None else before
    if config.minibatches > 1 or len(stages) == 1:
        # The policy that acted has changed since in other minibatches; its log-probabilities are known.
        change = first.log_ratio(before.log_prob(first.actions))
        pointwise = torch.exp(change) - 1 - change
    else:
        pointwise = first.counted(kl_divergence(detached(before) if reference is None else reference, before))
    divergence = (pointwise * first.share).sum((1, 2))
    if algorithm.clipped and config.kl_penalty:
        total = total + config.kl_penalty * divergence
    with torch.no_grad():
        query = stages[-1]
        log_ratio = query.log_ratio(adapted.log_prob(query.actions))
        moved = (0.5 * torch.square(log_ratio) * query.share).sum((1, 2))
        entropy = (query.counted(adapted.entropy()) * query.share).sum() / query.share.sum().clamp(min=1e-8)
    return MetaLoss(total, detached(before), divergence.detach(), log_ratio.abs().max(), moved, entropy)


def detached(distribution: Distribution) -> Distribution:
    """The same distribution without a graph."""
    parameters = [parameter.detach() for parameter in distribution_parameters(distribution)]
    return distribution_of(parameters, isinstance(distribution, Independent))


def distribution_parameters(distribution: Distribution) -> list[Tensor]:
    """Logits, or mean and standard deviation: what a policy's distribution is made of."""
    base = distribution.base_dist if isinstance(distribution, Independent) else distribution
    if isinstance(base, Categorical):
        return [base.logits]
    assert isinstance(base, Normal)
    return [base.loc, base.scale]


def distribution_of(parameters: Sequence[Tensor], several: bool) -> Distribution:
    """The inverse of `distribution_parameters`; `several`: an action has several numbers."""
    if len(parameters) == 1:
        base: Distribution = Categorical(logits=parameters[0], validate_args=False)
    else:
        base = Normal(parameters[0], parameters[1], validate_args=False)
    return Independent(base, 1, validate_args=False) if several else base
