"""Meta-learning for reinforcement learning: inner adaptation and the meta-objective, of MAML's family and of RL².

The inner step is written once. The meta-objective differentiates through it, evaluation and the collection of query
rollouts use its value. All tasks of a meta-batch adapt in one call: parameters carry a leading task axis [M, ...],
so that a sum of per-task losses has every task's own gradient as its gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, Independent, Normal, kl_divergence
from torch.func import functional_call

from ssm_metarl.algorithms.inference import (
    PolicySpec,
    adapts,
    check_count,
    check_number,
    policy_inputs,
    step_size,
    task_numbers,
)
from ssm_metarl.algorithms.policy import PolicyOutput, SSMPolicy
from ssm_metarl.algorithms.returns import advantages as estimate
from ssm_metarl.algorithms.returns import discounted_returns, normalized, step_means, tells_apart
from ssm_metarl.algorithms.rollouts import Array, Rollouts

Parameters = dict[str, Tensor]


class Algorithm(NamedTuple):
    """What distinguishes the members of the MAML family.

    Attributes:
        inner_ratio: the inner objective weighs advantages with the likelihood ratio to the policy that acted (the
            low-variance curvature surrogate of ProMP, whose Hessian is that of the expected return) instead of with
            the log-probability (MAML's, whose Hessian lacks the term ∇log π ∇log πᵀ).
        second_order: the meta-gradient passes through the inner gradient.
        clipped: the outer objective is PPO's clipped ratio with a penalty on the change of the policy before
            adaptation, good for several epochs on the same data; otherwise a plain policy gradient, good for one.
    """

    inner_ratio: bool
    second_order: bool
    clipped: bool


ALGORITHMS: Mapping[str, Algorithm] = {
    "promp": Algorithm(inner_ratio=True, second_order=True, clipped=True),
    "rl2": Algorithm(inner_ratio=True, second_order=True, clipped=True),
    "maml": Algorithm(inner_ratio=False, second_order=True, clipped=False),
    "fomaml": Algorithm(inner_ratio=False, second_order=False, clipped=False),
    "policy-gradient": Algorithm(inner_ratio=True, second_order=True, clipped=True),
}
"""ProMP (Rothfuss et al. 2019, arXiv 1810.06784), RL² (Duan et al. 2016, arXiv 1611.02779), MAML and first-order MAML
(Finn et al. 2017, arXiv 1703.03400). RL² is ProMP that may do without inner steps: PPO on a policy that learns in its
recurrent state. "policy-gradient" is that with RLlib's PPO, over single episodes."""

IN_CONTEXT: Mapping[str, object] = {
    "inner_steps": 0,
    "baseline": "critic",
    "epochs": 4,
    "minibatches": 8,
    "clip": 0.2,
    "kl_penalty": 0.0,
    "lr_schedule": "linear",
    "num_layers": 2,
    "state_dim": 64,
}
"""Options that "rl2" starts from, where they differ from the defaults."""

POLICY_GRADIENT: Mapping[str, object] = {
    **IN_CONTEXT,
    "algorithm": "policy-gradient",
    "episodes": 1,
    "epochs": 8,
    "outer_lr": 2e-3,
    "gae_lambda": 0.95,
    # Returns are not scaled, and encoder and memory are shared: with more, the critic's error is all that they learn.
    "value_weight": 1e-3,
}
"""Options that "policy-gradient" starts from, where they differ from the defaults."""

BASELINES = ("linear", "critic", "informed", "time")
"""What advantages are measured against, see ``MetaConfig``."""

CRITICS = ("critic", "informed")
"""The baselines that the policy learns."""


@dataclass(frozen=True, kw_only=True)
class MetaConfig:
    """How the policy adapts and how it is meta-trained.

    Attributes:
        algorithm: "promp", "maml", "fomaml", "rl2" or "policy-gradient".
        inner_lr: step size of the inner policy gradient steps.
        inner_steps: number S of inner steps; "rl2" can do without (0), "policy-gradient" has none.
        step_weights: weights w_0..w_S of the loss after 0..S steps in the meta-objective; two numbers: before
            adaptation and after the last step; empty: all on the last.
        outer_lr: Adam's learning rate at the first iteration.
        lr_schedule: how it goes on: "constant", "linear" or "cosine" (both end at 0 with the last iteration).
        epochs: passes over an iteration's rollouts; plain policy gradients ("maml", "fomaml") take one.
        minibatches: parts of the meta-batch that a pass takes one after the other, an update each.
        baseline: of the advantages: "linear" (fitted to each task's returns), "critic" (the policy's value head),
            "time" (the step's mean return over all tasks) or "informed" ("time", and a value head that in training is
            told the task, which must be numbers, for the rest). Critics also bootstrap where a column was cut.
        value_weight: weight of the critic's squared error.
        clip: range of PPO's likelihood ratio, 1 ± clip.
        kl_penalty: weight of the divergence of the policy before adaptation from the one that acted.
        entropy_bonus: weight of the policy's entropy after adaptation at first; it falls with the learning rate.
        max_grad_norm: the meta-gradient is scaled down to this norm.
        discount: of rewards, a step.
        gae_lambda: of the generalized advantage estimator.
    """

    algorithm: str = "promp"
    inner_lr: float = 0.1
    inner_steps: int = 1
    step_weights: tuple[float, ...] = ()
    outer_lr: float = 1e-3
    lr_schedule: str = "constant"
    epochs: int = 5
    minibatches: int = 1
    baseline: str = "linear"
    value_weight: float = 0.5
    clip: float = 0.3
    kl_penalty: float = 0.01
    entropy_bonus: float = 0.0
    max_grad_norm: float = 1.0
    discount: float = 0.99
    gae_lambda: float = 1.0

    def __post_init__(self) -> None:
        _one_of("algorithm", self.algorithm, ALGORITHMS)
        _one_of("lr_schedule", self.lr_schedule, SCHEDULES)
        _one_of("baseline", self.baseline, dict.fromkeys(BASELINES))
        for name in ("inner_lr", "outer_lr", "clip", "max_grad_norm"):
            check_number(name, getattr(self, name), above=0.0)
        for name in ("kl_penalty", "entropy_bonus", "value_weight"):
            check_number(name, getattr(self, name), low=0.0)
        for name in ("discount", "gae_lambda"):
            check_number(name, getattr(self, name), low=0.0, high=1.0)
        check_count("inner_steps", self.inner_steps, 0)
        if self.inner_steps == 0 and self.algorithm not in ("rl2", "policy-gradient"):
            raise ValueError(
                f"inner_steps must be 1 or more for {self.algorithm}: only rl2 and policy-gradient learn without."
            )
        check_count("epochs", self.epochs, 1)
        check_count("minibatches", self.minibatches, 1)
        weights = self.step_weights
        if not isinstance(weights, tuple | list):
            raise ValueError(f"step_weights must be a tuple of numbers, not {weights!r}.")
        for weight in weights:
            check_number("step_weights", weight, low=0.0)
        if len(weights) not in (0, *([2] if self.inner_steps else []), self.inner_steps + 1):
            raise ValueError(
                f"step_weights needs one weight for each of 0..{self.inner_steps} inner steps, "
                f"that is {self.inner_steps + 1}, or two for before and after, not {len(weights)}."
            )
        if weights and not 0 < sum(weights) < math.inf:
            raise ValueError(f"step_weights must have a positive sum, not {weights!r}.")

    @property
    def weights(self) -> tuple[float, ...]:
        """The weights w_0..w_S, normalised to sum 1."""
        if self.inner_steps == 0:
            return (1.0,)
        first, *_, last = self.step_weights or (0.0, 1.0)
        between = self.step_weights[1:-1] or [0.0] * (self.inner_steps - 1)
        weights = (first, *between, last)
        return tuple(weight / sum(weights) for weight in weights)

    @property
    def passes(self) -> int:
        """Epochs that the algorithm takes over one iteration's rollouts."""
        return self.epochs if ALGORITHMS[self.algorithm].clipped else 1


SCHEDULES = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}
"""Factor of the outer learning rate by the fraction of iterations done, in [0, 1)."""


class Batch(NamedTuple):
    """Rollouts of M tasks as the objectives read them; all tensors on one device.

    Attributes:
        inputs: [M, T, K, I] float32, see ``policy_inputs``.
        resets: [M, T, K] bool, or None where the only reset is at the first step (which starts from zero anyway).
        actions: [M, T, K, A] float32 or [M, T, K] int64.
        log_probs: [M, T, K] float32, of the policy that acted.
        advantages: [M, T, K] float32, 0 where not valid: for the inner step, normalised in each task.
        share: [M, T, K] float32, each valid step's share of its task's mean; 0 where not valid, sums to 1 a task (to
            0 for a task without any step).
        outer_advantages: the same for the outer objective; with the linear baseline the same numbers. With the others
            they are normalised over all tasks, which are told apart by what is expected of them.
        targets: [M, T, K] float32, what the value head should have said, with the informed baseline beyond the time
            step's mean return; None without a critic.
        known: [M, P] float32, what the critic is told of the tasks; None: nothing.
    """

    inputs: Tensor
    resets: Tensor | None
    actions: Tensor
    log_probs: Tensor
    advantages: Tensor
    share: Tensor
    outer_advantages: Tensor
    targets: Tensor | None = None
    known: Tensor | None = None

    def tasks(self, part: slice | Tensor) -> Batch:
        """The batch of some of its tasks: a slice, or indices [n]."""
        return Batch(*(None if x is None else x[part] for x in self))  # type: ignore[arg-type]

    def counted(self, numbers: Tensor) -> Tensor:
        """``numbers`` [M, T, K], and 0 where a step has no share.

        A product with the share alone would not do: what a policy says of a step that nobody took can overflow, and
        infinity times 0 is not a number.
        """
        return torch.where(self.share > 0, numbers, 0.0)

    def log_ratio(self, log_probs: Tensor) -> Tensor:
        """log π/π_old of the actions, from π's log-probabilities [M, T, K]; 0 where a step has no share."""
        return self.counted(log_probs - self.log_probs)


def make_batch(
    spec: PolicySpec,
    rollouts: Rollouts,
    config: MetaConfig,
    device: torch.device | str = "cpu",
    values: Array | None = None,
    reward_scale: float = 1.0,
    weight: Array | None = None,
) -> Batch:
    """Rollouts with inputs rebuilt and advantages estimated.

    Args:
        values: with a critic as baseline, what it says of :func:`critic_inputs`, [M, T + 1, K].
        reward_scale: what rewards are divided by for the critic.
        weight: [M, K], of each column in the objectives, at least 0; None: 1.
    """
    rollouts = rollouts.masked()
    counted = rollouts.valid if weight is None else rollouts.valid * weight[:, None]
    discount, gae_lambda, baseline = config.discount, config.gae_lambda, config.baseline
    level = np.zeros((1, 1, 1))
    if values is not None and baseline == "informed":
        # Most of a return is what everybody gets from that step on. A critic that had to learn it, too, would for
        # long be worse than none: of the return that is left it says how a task and a past differ from the others.
        returns = discounted_returns(rollouts.rewards / np.float32(reward_scale), rollouts.valid, discount)
        level = step_means(returns, rollouts.valid)
        values = values + np.pad(level, ((0, 0), (0, 1), (0, 0)))
    raw, expected = estimate(rollouts, discount, gae_lambda, baseline, values, reward_scale, weight)
    some = tells_apart(rollouts, discount, weight)
    own_raw = raw
    if baseline in ("time", "informed"):  # how a task adapts must depend neither on the others nor on what it is
        own_raw = estimate(rollouts, discount, gae_lambda, weight=weight)[0]
    own = normalized(own_raw, counted) * some.astype(np.float32)[:, None, None]
    outer = own if baseline == "linear" else normalized(raw, counted, (0, 1, 2))
    total = counted.sum((1, 2), keepdims=True)
    share = (counted / np.where(total > 0, total, 1)).astype(np.float32)

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    return Batch(
        inputs=tensor(policy_inputs(spec, rollouts)),
        resets=tensor(rollouts.resets) if rollouts.resets[:, 1:].any() else None,
        actions=tensor(rollouts.actions),
        log_probs=tensor(rollouts.log_probs),
        advantages=tensor(own),
        share=tensor(share),
        outer_advantages=tensor(outer),
        targets=tensor((raw + expected - level).astype(np.float32)) if values is not None else None,
        known=tensor(task_numbers(rollouts.tasks)) if baseline == "informed" else None,
    )


def critic_inputs(spec: PolicySpec, rollouts: Rollouts) -> tuple[Array, Array]:
    """What the critic reads of a record, and one step more: what the policy would have read after the last valid step.

    Returns:
        Inputs [M, T + 1, K, I] float32 and resets [M, T + 1, K] bool. The extra input of a column stands after its last
        valid step; what follows it means nothing.
    """
    rollouts = rollouts.masked()
    padded: dict[str, Any] = {
        name: np.concatenate([array := getattr(rollouts, name), np.zeros_like(array[:, :1])], 1)
        for name in ("observations", "actions", "rewards", "log_probs", "starts", "resets", "terminated", "valid")
    }
    task, column = np.indices(rollouts.lengths().shape)
    padded["observations"][task, rollouts.lengths(), column] = rollouts.last_observations
    longer = replace(rollouts, **padded)
    return policy_inputs(spec, longer), longer.resets


def for_tasks(parameters: Mapping[str, Tensor], tasks: int) -> Parameters:
    """Shared parameters seen by each of M tasks: [M, ...] views, differentiable to the shared ones."""
    return {name: value.unsqueeze(0).expand(tasks, *value.shape) for name, value in parameters.items()}


def play(policy: SSMPolicy, parameters: Parameters, batch: Batch) -> PolicyOutput:
    """What the policy with ``parameters``, shared or [M, ...] each, says of every step of a batch."""
    output: PolicyOutput = functional_call(policy, parameters, (batch.inputs, batch.resets, None, batch.known))
    return output


def inner_loss(actions: Distribution, batch: Batch, algorithm: Algorithm) -> Tensor:
    """The negative policy-gradient objective that a task descends to adapt, [M].

    Args:
        actions: distributions of the policy that adapts over the batch's steps, [M, T, K].
        batch: support rollouts.
    """
    log_probs = actions.log_prob(batch.actions)
    weight = torch.exp(batch.log_ratio(log_probs)) if algorithm.inner_ratio else batch.counted(log_probs)
    return -(weight * batch.advantages * batch.share).sum((1, 2))


def inner_step(
    policy: SSMPolicy, parameters: Parameters, batch: Batch, config: MetaConfig, *, differentiable: bool
) -> tuple[Parameters, PolicyOutput]:
    """One gradient step of every task on its own support batch: θ'_i = θ_i - α ∇ L_i(θ_i).

    Args:
        parameters: [M, ...] each.
        batch: the M tasks' support rollouts, collected with ``parameters`` (or, in later epochs, their old values).
        differentiable: keep the graph from the result to ``parameters``; without, the result is a new leaf.

    Returns:
        Parameters after the step, [M, ...] each, and what the policy before it says of the batch.
    """
    algorithm = ALGORITHMS[config.algorithm]
    if not differentiable:
        parameters = {name: value.detach().requires_grad_() for name, value in parameters.items()}
    output = play(policy, parameters, batch)
    losses = inner_loss(output.actions, batch, algorithm)
    second_order = differentiable and algorithm.second_order
    # From the second step on, a task's parameters depend on the step sizes, whose gradient is no part of adaptation.
    adapting = {name: value for name, value in parameters.items() if adapts(name)}
    gradients = torch.autograd.grad(
        losses.sum(), list(adapting.values()), create_graph=second_order, retain_graph=differentiable
    )
    adapted = dict(parameters)
    for (name, value), gradient in zip(adapting.items(), gradients, strict=True):
        adapted[name] = value - config.inner_lr * gradient * parameters.get(step_size(name), 1.0)
    if not differentiable:
        adapted = {name: value.detach() for name, value in adapted.items()}
    return adapted, output


def outer_loss(output: PolicyOutput, batch: Batch, config: MetaConfig) -> Tensor:
    """Loss of each task's policy on a batch that it collected, [M]: PPO's clipped surrogate, or plain policy gradient.

    Args:
        output: what the policy says of the batch's steps.
        batch: rollouts of the query, or of any stage that has a weight in the meta-objective.
    """
    actions, advantages = output.actions, batch.outer_advantages
    log_probs = actions.log_prob(batch.actions)
    if ALGORITHMS[config.algorithm].clipped:
        ratio = torch.exp(batch.log_ratio(log_probs))
        clipped = torch.clamp(ratio, 1 - config.clip, 1 + config.clip)
        gain = torch.minimum(ratio * advantages, clipped * advantages)
    else:
        gain = batch.counted(log_probs) * advantages
    if config.entropy_bonus:
        gain = gain + config.entropy_bonus * batch.counted(actions.entropy())
    if batch.targets is not None:
        gain = gain - config.value_weight * torch.square(batch.counted(output.values) - batch.targets)
    return -(gain * batch.share).sum((1, 2))


class MetaLoss(NamedTuple):
    """The meta-objective over M tasks and its diagnostics.

    Attributes:
        losses: [M], Σ_s w_s L(θ_s) plus the penalty.
        before: detached action distribution of the meta-parameters on the first batch: the reference of later epochs.
        kl_before: [M], detached divergence of the meta-policy from the reference on the first batch; in minibatches or
            without inner steps an unbiased estimate from the actions taken.
        log_ratio: largest |log π_new/π_old| on the query batch over valid steps.
        entropy: mean entropy of the adapted policies on the query batch.
    """

    losses: Tensor
    before: Distribution
    kl_before: Tensor
    log_ratio: Tensor
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
        Losses of each task, differentiable to ``parameters``.
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
    output = play(policy, current, stages[-1])
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
        log_ratio = query.log_ratio(adapted.log_prob(query.actions)).abs().max()
        entropy = (query.counted(adapted.entropy()) * query.share).sum() / query.share.sum().clamp(min=1e-8)
    return MetaLoss(total, detached(before), divergence.detach(), log_ratio, entropy)


def detached(distribution: Distribution) -> Distribution:
    """The same distribution without a graph."""
    if isinstance(distribution, Categorical):
        return Categorical(logits=distribution.logits.detach(), validate_args=False)
    assert isinstance(distribution, Independent)
    base = distribution.base_dist
    normal = Normal(base.loc.detach(), base.scale.detach(), validate_args=False)
    return Independent(normal, 1, validate_args=False)


def task_shards(shape: Sequence[int], steps: int = 20_000) -> list[slice]:
    """Slices of the tasks, equal to one task and even in number, of at most about ``steps`` environment steps each.

    Fewer and larger ones pay less for each operation's start, smaller ones need less memory. Two are the least, so that
    two cores can share the work.

    Args:
        shape: of the batch, [M, T, K].
        steps: about the most of a shard.
    """
    tasks, *per_task = shape
    count = min(tasks, 2 * math.ceil(tasks * math.prod(per_task) / (2 * steps)))
    borders = [tasks * i // count for i in range(count + 1)]
    return [slice(*pair) for pair in pairwise(borders)]


def _one_of(name: str, value: str, valid: Mapping[str, object]) -> None:
    if value not in tuple(valid):
        raise ValueError(f"{name} must be one of {', '.join(valid)}, not {value!r}.")
