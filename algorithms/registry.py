"""The algorithms of MAML's family and RL², and the options of meta-learning."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from ssm_metarl.checks import brief, check_count, check_flag, check_number, check_text

META_TRAINER = "ssm_metarl.distributed.trainer:MetaTrainer"
"""The trainer that populations and Ray Tune can have, too."""


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """What distinguishes an algorithm from the others.

    Attributes:
        inner_ratio: the inner objective weighs advantages with the likelihood ratio to the policy that acted (the
            low-variance curvature surrogate of ProMP, whose Hessian is that of the expected return) instead of with
            the log-probability (MAML's, whose Hessian lacks the term ∇log π ∇log πᵀ).
        second_order: the meta-gradient passes through the inner gradient.
        clipped: the outer objective is PPO's clipped ratio with a penalty on the change of the policy before
            adaptation, good for several epochs on the same data; otherwise a plain policy gradient, good for one.
        least_inner_steps: 0 where the algorithm learns without inner steps.
        family_preset: attribute of a task family with the options that train it by this algorithm; None: no family has
            such options, and those of the algorithm hold for all.
        trainer: `module:class`.
        fixed: options that the trainer does not follow, and the values that each may have, the usual one first.
    """

    inner_ratio: bool = True
    second_order: bool = True
    clipped: bool = True
    least_inner_steps: int = 1
    family_preset: str | None = "recommended"
    trainer: str = META_TRAINER
    fixed: Mapping[str, tuple[object, ...]] = field(default_factory=dict)


ALGORITHMS: Mapping[str, Algorithm] = {
    "promp": Algorithm(),
    "rl2": Algorithm(least_inner_steps=0, family_preset="in_context"),
    "maml": Algorithm(inner_ratio=False, clipped=False),
    "fomaml": Algorithm(inner_ratio=False, second_order=False, clipped=False),
    "policy-gradient": Algorithm(
        least_inner_steps=0,
        family_preset=None,
        trainer="ssm_metarl.distributed.rllib.trainer:PolicyGradientTrainer",
        fixed={
            "inner_steps": (0,),
            "baseline": ("critic",),
            "kl_penalty": (0.0,),
            "max_kl": (0.5, 0.0),
            "trial_episodes": (1,),
            "learned_step_sizes": (False,),
            "replay_episodes": (0,),
            "memory_lr": (1.0,),
            "normalize_advantages": (True,),
            "value_loss": ("squared",),
            "imitate": ("",),
            "num_learners": (0,),
            "min_tasks": (1.0,),
            "sample_timeout_s": ("auto", None),
        },
    ),
}
"""ProMP (Rothfuss et al. 2019, arXiv 1810.06784), RL² (Duan et al. 2016, arXiv 1611.02779), MAML and first-order MAML
(Finn et al. 2017, arXiv 1703.03400). RL² is ProMP that may do without inner steps: PPO on a policy that learns in its
recurrent state. "policy-gradient" is that with RLlib's PPO, over single episodes."""

AlgorithmName = Literal["promp", "rl2", "maml", "fomaml", "policy-gradient"]
"""The keys of `ALGORITHMS`."""

Schedule = Literal["constant", "linear", "cosine"]
"""The keys of `SCHEDULES`."""

Baseline = Literal["linear", "critic", "privileged", "time", "informed"]
BASELINES: tuple[Baseline, ...] = get_args(Baseline)[:4]
"""What advantages are measured against, see `MetaConfig`."""

ValueLoss = Literal["squared", "huber"]

CRITICS = ("critic", "privileged")
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
        memory_lr: learning rate of the SSM blocks as a share of `outer_lr`.
        epochs: passes over an iteration's rollouts; plain policy gradients ("maml", "fomaml") take one.
        minibatches: parts of the meta-batch that a pass takes one after the other, an update each.
        baseline: of the advantages: "linear" (fitted to each task's returns), "critic" (the policy's value head),
            "time" (the step's mean return over all tasks) or "privileged" ("time", and for the rest a value head that
            in training reads the task's numbers). Critics also bootstrap where an episode was cut. "informed" is the
            former name of "privileged".
        normalize_advantages: advantages of the outer loss have mean 0 and deviation 1, with "linear" of each task, else
            over all tasks. Without, they are in units of reward, or of `scale_rewards`.
        value_weight: weight of the critic's error.
        value_loss: of the critic: "squared", or "huber", which grows linearly beyond an error of 1.
        clip: range of PPO's likelihood ratio, 1 ± clip.
        kl_penalty: weight of the divergence of the policy before adaptation from the one that acted.
        max_kl: divergence of the adapted policies from those that acted at which an Adam step is shortened, in nats; 0:
            no bound. An update that is far below it is not touched.
        entropy_bonus: weight of the policy's entropy after adaptation at first; it falls with the learning rate.
        max_grad_norm: the meta-gradient is scaled down to this norm.
        discount: of rewards, a step.
        gae_lambda: of the generalized advantage estimator.
        imitate: a baseline policy of the family, such as "index" of bandit. At first the policy learns to do what this
            one would have done in its place.
        imitate_iterations: for how many iterations.
    """

    algorithm: AlgorithmName = "promp"
    inner_lr: float = 0.1
    inner_steps: int = 1
    step_weights: tuple[float, ...] = ()
    outer_lr: float = 1e-3
    lr_schedule: Schedule = "constant"
    memory_lr: float = 1.0
    epochs: int = 5
    minibatches: int = 1
    baseline: Baseline = "linear"
    normalize_advantages: bool = True
    value_weight: float = 0.5
    value_loss: ValueLoss = "squared"
    clip: float = 0.3
    kl_penalty: float = 0.01
    max_kl: float = 0.5
    entropy_bonus: float = 0.0
    max_grad_norm: float = 1.0
    discount: float = 0.99
    gae_lambda: float = 1.0
    imitate: str = ""
    imitate_iterations: int = 100

    def __post_init__(self) -> None:
        if self.baseline == "informed":
            object.__setattr__(self, "baseline", "privileged")
        _one_of("algorithm", self.algorithm, ALGORITHMS)
        _one_of("lr_schedule", self.lr_schedule, SCHEDULES)
        _one_of("baseline", self.baseline, BASELINES)
        _one_of("value_loss", self.value_loss, get_args(ValueLoss))
        check_flag("normalize_advantages", self.normalize_advantages)
        for name in ("inner_lr", "memory_lr", "outer_lr", "clip", "max_grad_norm"):
            check_number(name, getattr(self, name), above=0.0)
        for name in ("kl_penalty", "max_kl", "entropy_bonus", "value_weight"):
            check_number(name, getattr(self, name), low=0.0)
        if self.imitate != "":
            check_text("imitate", self.imitate)
        for name in ("discount", "gae_lambda"):
            check_number(name, getattr(self, name), low=0.0, high=1.0)
        check_count("inner_steps", self.inner_steps, 0)
        check_count("imitate_iterations", self.imitate_iterations, 1)
        if self.inner_steps < ALGORITHMS[self.algorithm].least_inner_steps:
            others = " and ".join(name for name, entry in ALGORITHMS.items() if not entry.least_inner_steps)
            raise ValueError(f"inner_steps must be 1 or more for {self.algorithm}: only {others} learn without.")
        check_count("epochs", self.epochs, 1)
        check_count("minibatches", self.minibatches, 1)
        weights = self.step_weights
        if not isinstance(weights, tuple | list):
            raise ValueError(f"step_weights must be a tuple of numbers, not {brief(weights)}.")
        for weight in weights:
            check_number("step_weights", weight, low=0.0)
        if len(weights) not in (0, *([2] if self.inner_steps else []), self.inner_steps + 1):
            raise ValueError(
                f"step_weights needs one weight for each of 0..{self.inner_steps} inner steps, "
                f"that is {self.inner_steps + 1}, or two for before and after, not {len(weights)}."
            )
        if weights and not 0 < sum(weights) < math.inf:
            raise ValueError(f"step_weights must have a positive sum, not {brief(weights)}.")

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
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}
"""Factor of the outer learning rate by the fraction of iterations done, in [0, 1)."""


def _one_of(name: str, value: str, valid: Iterable[str]) -> None:
    if value not in tuple(valid):
        raise ValueError(f"{name} must be one of {', '.join(valid)}, not {brief(value)}.")
