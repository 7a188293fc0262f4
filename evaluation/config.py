"""What is tried, and how: the options of evaluation and adaptation. Nothing here loads torch, Ray or scipy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from ssm_metarl.checks import check_count, check_flag, check_number
from ssm_metarl.config import TrainConfig
from ssm_metarl.tasks import TaskDistribution, make

if TYPE_CHECKING:
    from ssm_metarl.algorithms.adapters import StandardAdapter
    from ssm_metarl.evaluation.tasks import Subject

Split = Literal["train", "validation", "test", "shifted", "shifted-test"]
"""The splits of the families here; one of the user's own may have others."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Which tasks a checkpoint is tried on, how, and where.

    Attributes:
        task: family of the tasks; by default the one of training.
        task_options: of the family; by default as in training.
        task_ranges: of gym:ID; by default as in training.
        split: train, validation, test, or outside the training range shifted and shifted-test.
        num_tasks: number of tasks.
        steps: inner steps; by default as many as the policy was trained for, and in a mode of adaptation at least one.
        episodes: episodes a task and step; by default as in training.
        inner_lr: step size of the inner steps; by default as in training.
        deterministic: take the most likely actions instead of sampling.
        seed: of tasks and rollouts: equal seeds give equal tasks and common random numbers.
        num_workers: Ray actors that collect rollouts; 0: in process.
        trust_checkpoint_code: run the code that the checkpoint names as its task, module:attribute or an environment of
            another package than gymnasium; without it only a task that is named here, or a family that is given.
    """

    task: str | None = None
    task_options: Mapping[str, Any] | None = None
    task_ranges: Mapping[str, Any] | None = None
    split: Split | str = "test"
    num_tasks: int = 100
    steps: int | None = None
    episodes: int | None = None
    inner_lr: float | None = None
    deterministic: bool = False
    seed: int = 0
    num_workers: int = 0
    trust_checkpoint_code: bool = False

    def __post_init__(self) -> None:
        check_count("num_tasks", self.num_tasks, 1)
        for name in ("seed", "num_workers"):
            check_count(name, getattr(self, name), 0)
        for name in ("deterministic", "trust_checkpoint_code"):
            check_flag(name, getattr(self, name))
        if self.steps is not None:
            check_count("steps", self.steps, 0)
        if self.episodes is not None:
            check_count("episodes", self.episodes, 1)
        if self.inner_lr is not None:
            check_number("inner_lr", self.inner_lr, above=0.0)

    def family(self, trained: TrainConfig) -> TaskDistribution:
        """The family, that of training but for what is given.

        Raises:
            ValueError: an unknown task, option or range; one sentence.
        """
        same = self.task in (None, trained.task)
        options = trained.task_options if same and self.task_options is None else self.task_options
        ranges = trained.task_ranges if same and self.task_ranges is None else self.task_ranges
        return make(self.task or trained.task, options or {}, ranges or {})

    def extent(self, trained: TrainConfig, least_steps: int = 0) -> tuple[int, int]:
        """Steps, and episodes a task and step."""
        steps = max(trained.meta.inner_steps, least_steps) if self.steps is None else self.steps
        return steps, trained.experience.episodes if self.episodes is None else self.episodes


Mode = Literal["none", "standard", "replay", "hybrid"]
MODES: tuple[Mode, ...] = get_args(Mode)
"""How a policy adapts: not at all; with the task's own episodes; with randomly drawn replay beside them, unweighted;
with replay weighted by propensity."""


@dataclass(frozen=True, kw_only=True)
class AdaptOptions:
    """What adaptation has beside the steps and episodes of `EvaluationConfig`; see `StandardAdapter`, `HybridAdapter`.

    Attributes:
        kl_bound: most that a step may move the policy, nats a step; a larger one is halved.
        optimizer: sgd, the inner step of meta-training, or adam.
        replay_episodes: most stored episodes a step uses (replay, hybrid).
        pull: strength of the pull towards the meta-parameters (replay, hybrid).
        test_episodes: fresh episodes a task that judge the adapted policy, and count as no cost.
    """

    kl_bound: float = float("inf")
    optimizer: Literal["sgd", "adam"] = "sgd"
    replay_episodes: int = 20
    pull: float = 0.0
    test_episodes: int = 20

    def __post_init__(self) -> None:
        check_count("test_episodes", self.test_episodes, 1)

    def adapter(self, mode: str, subject: Subject, config: EvaluationConfig) -> StandardAdapter:
        """The adapter of a mode.

        Raises:
            ValueError: an unknown mode, an impossible option, or no replay where the mode needs one.
        """
        from ssm_metarl.algorithms.adapters import HybridAdapter, StandardAdapter  # only here, see above

        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, not {mode!r}.")
        if config.deterministic:
            raise ValueError("Modes of adaptation are compared with sampled actions; leave deterministic out.")
        common: dict[str, Any] = {
            "steps": 0 if mode == "none" else config.extent(subject.trained, 1)[0],
            "step_size": config.inner_lr,
            "kl_bound": self.kl_bound,
            "optimizer": self.optimizer,
        }
        if mode in ("none", "standard"):
            return StandardAdapter(subject.policy, subject.trained.meta, **common)
        return HybridAdapter(
            subject.policy,
            subject.trained.meta,
            subject.checkpoint.replay,
            replay_episodes=self.replay_episodes,
            weighted=mode == "hybrid",
            pull=self.pull,
            seed=config.seed,
            **common,
        )
