"""Test-time adaptation: a few policy-gradient steps on a new task, from its own episodes alone or with replay.

The inner step is that of meta-training (`inner_loop.inner_step`). All tasks adapt in one call.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.distributions import kl_divergence
from torch.func import functional_call

from ssm_metarl.algorithms.batch import Batch, replayed_batch
from ssm_metarl.algorithms.inner_loop import Parameters, Weights, adapt_weights, batch_for, by_shard, policy_outputs
from ssm_metarl.algorithms.inputs import policy_inputs
from ssm_metarl.algorithms.policy import SSMPolicy
from ssm_metarl.algorithms.propensity import TaskModel, effective_sample_size
from ssm_metarl.algorithms.registry import MetaConfig
from ssm_metarl.algorithms.replay import ReplayBuffer, as_slots
from ssm_metarl.algorithms.rollouts import Array, Rollouts
from ssm_metarl.checks import check_count, check_number
from ssm_metarl.core import Collect
from ssm_metarl.seeds import Branch, seed_for

OPTIMIZERS = ("sgd", "adam")
"""How an adapter steps: along the gradient as in meta-training, or by Adam, whose steps have the size of the rate."""

HALVINGS = 10
"""A step that still changes the policy too much when it was halved as many times is not taken."""


@dataclass(frozen=True)
class Adaptation:
    """What adapting to M tasks gave.

    Attributes:
        weights: the best parameters of each task by the returns of its own episodes, [M, ...] float32 each, read-only
            where no step was taken.
        returns: the adaptation curve: undiscounted return after 0..S steps, [M, S+1] float64, mean over a task's
            episodes; NaN where all of them were dropped.
        lengths: [M, S+1] float64, mean episode length.
        best_step: [M] int64, after how many steps `weights` are; 0: no step helped, they are the meta-parameters.
        fractions: [M, S] float64, what the bound on the divergence left of each step; 1 without a bound.
        effective_episodes: [M, S] float64, effective number of replayed episodes behind each step; 0 without replay.
        environment_steps: all steps taken.
        seconds: wall time.
    """

    weights: Weights
    returns: Array
    lengths: Array
    best_step: Array
    fractions: Array
    effective_episodes: Array
    environment_steps: int
    seconds: float

    def policy(self, like: SSMPolicy, task: int = 0) -> SSMPolicy:
        """The adapted policy of one task, of the sizes of `like`."""
        adapted = SSMPolicy(like.spec)
        adapted.load_numpy({name: value[task] for name, value in self.weights.items()})
        return adapted


class StandardAdapter:
    """Adapts with the episodes of the current task alone, as the inner loop of meta-training does:

        adaptation = StandardAdapter(policy, config, steps=3).adapt(collect, episodes=5)
        adapted = adaptation.policy(policy)

    Steps beyond those that the policy was meta-trained for are half as large, as in MAML's own evaluation (Finn et
    al. 2017, appendix A.2): advantages are normalised, so that near an optimum a full step would follow noise.

    Args:
        policy: the meta-trained policy; it is not changed. Learned step sizes are used where it has them.
        config: inner objective, step size and the number of steps trained for.
        steps: number S of adaptation steps.
        step_size: of a step; None: as in meta-training.
        kl_bound: a step that moves the policy by more than this mean divergence (nats a step, on the episodes that it
            is made of) is halved until it does not; infinite: no bound.
        optimizer: see `OPTIMIZERS`.

    Raises:
        ValueError: an option is impossible, in one sentence.
    """

    def __init__(
        self,
        policy: SSMPolicy,
        config: MetaConfig,
        *,
        steps: int = 3,
        step_size: float | None = None,
        kl_bound: float = math.inf,
        optimizer: str = "sgd",
    ) -> None:
        check_count("steps", steps, 0)
        if step_size is not None:
            check_number("step_size", step_size, above=0.0)
        if not (isinstance(kl_bound, int | float) and kl_bound > 0):
            raise ValueError(f"kl_bound must be a number above 0, not {kl_bound!r}.")
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, not {optimizer!r}.")
        self.policy = policy
        # What a task is nobody knows at test time; inner steps never did.
        config = replace(config, baseline="linear") if config.baseline == "privileged" else config
        self.config = config if step_size is None else replace(config, inner_lr=step_size)
        self.steps, self.kl_bound, self.optimizer = steps, kl_bound, optimizer

    def adapt(self, collect: Collect, episodes: int) -> Adaptation:
        """Adapt to every task that `collect` plays.

        Args:
            collect: called for steps 0..S in order, each time with the parameters so far; the last call only judges.
            episodes: episodes a task and call.
        """
        begin = time.perf_counter()
        meta = weights = self.policy.numpy_weights()
        best: Weights = {}
        returns, lengths, fractions, effective = [], [], [], []
        environment_steps, optimizer = 0, _Adam()
        for step in range(self.steps + 1):
            rollouts = collect(weights, episodes, step)
            environment_steps += rollouts.num_steps
            returns.append(_task_means(rollouts.returns()))
            lengths.append(_task_means(np.where(rollouts.kept(), rollouts.lengths(), np.nan)))
            if step == 0:
                # Views: what is only evaluated needs no copy of the parameters for each of thousands of tasks.
                best = {
                    name: np.broadcast_to(value, (rollouts.num_tasks, *value.shape)) for name, value in meta.items()
                }
                best_step, highest = np.zeros(rollouts.num_tasks, np.int64), np.nan_to_num(returns[0], nan=-np.inf)
            else:
                better = returns[-1] > highest
                highest, best_step = np.where(better, returns[-1], highest), np.where(better, step, best_step)
                best = {name: _where(better, weights[name], value) for name, value in best.items()}
            if step == self.steps:
                break
            if step == 0:
                weights = {name: value.copy() for name, value in best.items()}
            batch, found = self._batch(weights, rollouts, step)
            effective.append(found)
            config = self.config
            if step >= config.inner_steps:
                config = replace(config, inner_lr=config.inner_lr / 2)
            proposal = adapt_weights(self.policy, weights, batch, config)
            if self.optimizer == "adam":
                proposal = optimizer.step(weights, proposal, config.inner_lr)
            proposal = self._pulled(proposal, meta, config.inner_lr)
            weights, left = self._bounded(weights, proposal, batch)
            fractions.append(left)
        empty = np.zeros((len(best_step), 0))
        return Adaptation(
            weights=best,
            returns=np.stack(returns, 1),
            lengths=np.stack(lengths, 1),
            best_step=best_step,
            fractions=np.stack(fractions, 1) if fractions else empty,
            effective_episodes=np.stack(effective, 1) if effective else empty,
            environment_steps=environment_steps,
            seconds=time.perf_counter() - begin,
        )

    def _batch(self, weights: Weights, rollouts: Rollouts, step: int) -> tuple[Batch, Array]:
        """What a step is made of, and how many replayed episodes that are, [M]."""
        batch = batch_for(self.policy, weights, rollouts, self.config)
        return batch, np.zeros(rollouts.num_tasks)

    def _pulled(self, proposal: Weights, meta: Mapping[str, Array], step_size: float) -> Weights:
        """The proposed parameters after what draws them back."""
        return proposal

    def _bounded(self, weights: Weights, proposal: Weights, batch: Batch) -> tuple[Weights, Array]:
        """The proposed step, or of each task as large a fraction of it as the bound allows, and the fractions [M]."""
        fraction = np.ones(len(batch.share))
        if math.isinf(self.kl_bound):
            return proposal, fraction
        shortened = proposal
        for halving in range(HALVINGS + 1):
            far = ~(divergence(self.policy, weights, shortened, batch) <= self.kl_bound)
            if not far.any():
                break
            fraction = np.where(far, 0.0 if halving == HALVINGS else fraction / 2, fraction)
            shortened = {
                name: (value + _lead(fraction, value) * (proposal[name] - value)).astype(np.float32)
                for name, value in weights.items()
            }
            whole = fraction == 1  # to the last bit what was proposed
            shortened = {name: _where(whole, proposal[name], value) for name, value in shortened.items()}
        return shortened, fraction


class HybridAdapter(StandardAdapter):
    """Adapts with the episodes of the current task and, beside them, episodes of meta-training that are like them.

    A stored episode counts with its propensity w = w_task · w_policy: how likely its transitions are under the current
    task (see `TaskModel`), and how likely its actions are under the current policy π, which did not take them:

        w_policy = min(1, exp(mean_t log π(a_t) - log μ(a_t))),

    with μ the policy that took them. It is the geometric mean over steps: the product over hundreds of steps would be
    0 or enormous. Of `replay_episodes` stored episodes, those of highest w_task are used.

    The own episodes' gradient is that of meta-training, to the bit: the policy was trained to answer it. Added is ρ
    times the gradient of the stored episodes, ρ = n / (n + K) with their effective number n
    (`effective_sample_size`) and K own episodes. All steps of a stored episode have one advantage: by how much its
    return exceeds the mean of the own ones, in units of the root mean square of these differences at the first step or
    now, whichever is larger. As the policy comes to do as well, nothing is left to learn from the stored episodes. One
    baseline and one normalisation over both kinds would leave nothing of either where stored episodes are long and own
    ones short.

    A proximal pull draws the parameters to the meta-parameters θ, whose distance it weighs with ½ pull |θ' - θ|²:
    after a step of size α they are (θ' + α pull θ) / (1 + α pull). (Fakoor et al. 2020, arXiv 1910.00125, eq. 13-18,
    whose propensities and pull these stand for.)

    Args:
        replay: episodes of meta-training.
        replay_episodes: most stored episodes a step uses.
        weighted: by propensity; without, episodes are drawn at random and all count fully, which is the control that
            shows what the weights are worth.
        pull: strength of the proximal pull; infinite: nothing moves.
        tolerance: of `TaskModel`.
        seed: of the episodes that are drawn at random.
        policy, config, options: as of `StandardAdapter`.

    Raises:
        ValueError: the replay is None or empty, or an option is impossible, in one sentence.
    """

    def __init__(
        self,
        policy: SSMPolicy,
        config: MetaConfig,
        replay: ReplayBuffer | None,
        *,
        replay_episodes: int = 20,
        weighted: bool = True,
        pull: float = 0.0,
        tolerance: float = 0.25,
        seed: int = 0,
        steps: int = 3,
        step_size: float | None = None,
        kl_bound: float = math.inf,
        optimizer: str = "sgd",
    ) -> None:
        super().__init__(policy, config, steps=steps, step_size=step_size, kl_bound=kl_bound, optimizer=optimizer)
        if replay is None or not len(replay):
            raise ValueError("Hybrid adaptation needs a replay, and this policy was trained without --replay-episodes.")
        check_count("replay_episodes", replay_episodes, 0)
        check_number("tolerance", tolerance, above=0.0)
        if not (isinstance(pull, int | float) and pull >= 0):
            raise ValueError(f"pull must be a number of at least 0, not {pull!r}.")
        self._replay = replay.rollouts()
        self._count, self._weighted, self._pull, self._seed = replay_episodes, weighted, pull, seed
        self._tolerance = tolerance
        self._model: TaskModel | None = None
        self._scale = np.zeros(0)

    def _batch(self, weights: Weights, rollouts: Rollouts, step: int) -> tuple[Batch, Array]:
        tasks, stored = rollouts.num_tasks, self._replay.num_tasks
        count = min(self._count, stored)
        if not count:
            return super()._batch(weights, rollouts, step)
        if self._weighted:
            if step == 0:
                self._model = TaskModel(self._replay, self.policy.spec, self._tolerance)
            assert self._model is not None
            self._model.observe(rollouts)
            likely = self._model.propensities()
            index = np.argsort(-likely, axis=1, kind="stable")[:, :count]
            propensity = np.take_along_axis(likely, index, 1)
        else:
            rng = np.random.default_rng(seed_for(self._seed, Branch.REPLAY, step))
            index = rng.random((tasks, stored)).argsort(1)[:, :count]
            propensity = np.ones((tasks, count))
        replayed = as_slots(self._replay, index)
        own = log_probs(self.policy, weights, replayed)
        if self._weighted:
            steps = np.maximum(replayed.lengths(), 1)
            agreement = np.where(replayed.valid, own - replayed.log_probs, 0.0).sum(1) / steps
            propensity = propensity * np.exp(np.minimum(agreement, 0.0))
        effective, played = effective_sample_size(propensity), rollouts.kept().sum(1)
        # A task without an episode of its own does not move.
        ratio = np.where(played > 0, effective / np.maximum(effective + played, 1), 0.0) * propensity.max(1)
        # Nothing can be said of a task, or a stored episode, without a return.
        gain = np.nan_to_num(replayed.returns() - _task_means(rollouts.returns())[:, None])
        scale = np.sqrt((propensity * gain**2).sum(1) / np.maximum(propensity.sum(1), np.finfo(np.float64).tiny))
        self._scale = scale if step == 0 else np.maximum(self._scale, scale)
        advantages = gain / np.where(self._scale > 0, self._scale, 1.0)[:, None]
        # Only steps of the current policy have a likelihood ratio: that of a stored episode is in its propensity.
        stored_batch = replayed_batch(self.policy.spec, replace(replayed, log_probs=own), advantages, propensity, ratio)
        return super()._batch(weights, rollouts, step)[0].beside(stored_batch), effective

    def _pulled(self, proposal: Weights, meta: Mapping[str, Array], step_size: float) -> Weights:
        if not self._pull:
            return proposal
        share = 1.0 if math.isinf(self._pull) else step_size * self._pull / (1 + step_size * self._pull)
        if share == 1.0:
            return {name: np.broadcast_to(meta[name], value.shape).copy() for name, value in proposal.items()}
        return {name: (value + share * (meta[name] - value)).astype(np.float32) for name, value in proposal.items()}


class _Adam:
    """Adam's steps along the gradients that plain steps show; all tasks at once, since it works entry by entry."""

    def __init__(self) -> None:
        self._parameters: dict[str, Tensor] = {}
        self._adam: torch.optim.Adam | None = None

    def step(self, weights: Weights, proposal: Weights, rate: float) -> Weights:
        """The parameters after Adam's step from `weights`, whose plain step of size `rate` is `proposal`."""
        if self._adam is None:
            self._parameters = {name: torch.from_numpy(value.copy()) for name, value in weights.items()}
            self._adam = torch.optim.Adam(self._parameters.values())
        self._adam.param_groups[0]["lr"] = rate
        for name, parameter in self._parameters.items():
            parameter.data = torch.from_numpy(weights[name].copy())
            parameter.grad = torch.from_numpy((weights[name] - proposal[name]) / np.float32(rate))
        self._adam.step()
        return {name: parameter.numpy().copy() for name, parameter in self._parameters.items()}


def log_probs(policy: SSMPolicy, weights: Mapping[str, Array], rollouts: Rollouts) -> Array:
    """Log-probability of a record's actions under a policy that need not have taken them.

    Args:
        weights: shared or [M, ...].

    Returns:
        [M, T, K] float32; any number where not valid.
    """
    inputs = torch.from_numpy(policy_inputs(policy.spec, rollouts.masked()))
    resets, actions = torch.from_numpy(rollouts.resets), torch.from_numpy(rollouts.actions)

    @torch.no_grad()
    def work(own: Parameters, part: slice) -> Array:
        output = functional_call(policy, own, (inputs[part], resets[part]))
        return np.asarray(output.actions.log_prob(actions[part]).numpy())

    return np.concatenate(by_shard(policy, work, weights, rollouts.valid.shape))


def divergence(policy: SSMPolicy, before: Mapping[str, Array], after: Mapping[str, Array], batch: Batch) -> Array:
    """Mean KL divergence of the policy `after` a step from the one `before`, over each task's batch.

    Args:
        before, after: weights [M, ...].

    Returns:
        [M] float64, nats a step.
    """

    @torch.no_grad()
    def work(own: Parameters, part: slice) -> Array:
        batch_part = batch.tasks(part)
        other = {name: torch.as_tensor(value[part]) for name, value in after.items()}
        old, new = (policy_outputs(policy, weights, batch_part).actions for weights in (own, other))
        return np.asarray((batch_part.counted(kl_divergence(old, new)) * batch_part.share).sum((1, 2)).numpy())

    return np.concatenate(by_shard(policy, work, before, batch.share.shape)).astype(np.float64)


def _lead(vector: Array, value: Array) -> Array:
    """A number a task, [M], in a shape that broadcasts with [M, ...]."""
    return vector.reshape(-1, *[1] * (value.ndim - 1))


def _where(condition: Array, value: Array, other: Array) -> Array:
    """For each task of [M] the one or the other of two arrays [M, ...]."""
    return np.where(_lead(condition, value), value, other)


def _task_means(values: Array) -> Array:
    """Mean over episode slots, NaN without any: [M, K] → [M]."""
    count = np.isfinite(values).sum(1)
    return np.where(count > 0, np.nansum(values, 1) / np.maximum(count, 1), np.nan)
