"""Everything that defines a training run: frozen dataclasses, each of which checks itself."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal, get_type_hints

import numpy as np
from gymnasium import spaces

from ssm_metarl import presets
from ssm_metarl.algorithms.inputs import task_numbers
from ssm_metarl.algorithms.registry import ALGORITHMS, MetaConfig
from ssm_metarl.algorithms.replay import MOST_EPISODES
from ssm_metarl.algorithms.spec import PolicyConfig, PolicySpec, action_bounds
from ssm_metarl.checks import brief, check_count, check_keys, check_mapping, check_number, check_text
from ssm_metarl.seeds import Branch, seed_for
from ssm_metarl.tasks import TaskDistribution, make


def available_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, kw_only=True)
class ExperienceConfig:
    """Amount of experience, and the seed of everything random in it.

    Attributes:
        iterations: meta-iterations of the whole run; the learning-rate schedule spans them.
        meta_batch: tasks M of an iteration.
        episodes: episodes K a task, for each inner step and for the query; trials, where a trial has several episodes.
        trial_episodes: episodes of a trial, over which the policy keeps its recurrent state and sums its return.
        seed: of everything random in the run.
        replay_episodes: query episodes that are kept for hybrid adaptation, one a task, the last ones, at most 100,000;
            0: none.
    """

    iterations: int = 30
    meta_batch: int = 20
    episodes: int = 20
    trial_episodes: int = 1
    seed: int = 0
    replay_episodes: int = 0

    def __post_init__(self) -> None:
        for name in ("iterations", "meta_batch", "episodes", "trial_episodes"):
            check_count(name, getattr(self, name), 1)
        check_count("seed", self.seed, 0)
        check_count("replay_episodes", self.replay_episodes, 0, MOST_EPISODES)


@dataclass(frozen=True, kw_only=True)
class MachineConfig:
    """Where a run computes, and how often it is saved.

    Attributes:
        num_workers: Ray actors that collect rollouts; 0 collects in process, without Ray.
        num_learners: Ray actors, of one CPU (or GPU) each, that share the learner's tasks; 0: it is in the driver. The
            results are the same.
        learner_threads: threads that share the tasks of the learner in the driver (on a CPU).
        device: where the learner computes, such as "cpu" or "cuda"; "auto": on a GPU where there is one.
        checkpoint_every: iterations between checkpoints; there is one at the end, too.
        sample_timeout_s: "auto": a worker that gives no sign of life for ten times as long as any that went on, and
            for a minute at least, is replaced, and its tasks are played again with the same seeds. A number: seconds
            that a worker may take for a call; a task that takes longer alone is given up, and such a run is not
            reproducible. None: never.
        min_tasks: share of a meta-batch's tasks that is enough: with workers, those that still play then are given up.
            A run in which that happens (`timed_out_tasks`) is not reproducible.
    """

    num_workers: int = 0
    num_learners: int = 0
    learner_threads: int = field(default_factory=available_cores)
    device: str = "cpu"
    checkpoint_every: int = 10
    sample_timeout_s: float | Literal["auto"] | None = "auto"
    min_tasks: float = 1.0

    def __post_init__(self) -> None:
        for name in ("num_workers", "num_learners"):
            check_count(name, getattr(self, name), 0)
        for name in ("learner_threads", "checkpoint_every"):
            check_count(name, getattr(self, name), 1)
        check_text("device", self.device)
        if self.sample_timeout_s is not None and self.sample_timeout_s != "auto":
            check_number("sample_timeout_s", self.sample_timeout_s, above=0.0)
        if self.num_learners and self.device.startswith("cuda:"):
            raise ValueError(f"device must be 'cuda' for learners, which have a GPU each, not {self.device!r}.")
        check_number("min_tasks", self.min_tasks, above=0.0, high=1.0)


SINCE: Mapping[str, Any] = {
    "max_kl": 0.5,
    "memory_lr": 1.0,
    "normalize_advantages": True,
    "value_loss": "squared",
    "imitate": "",
    "imitate_iterations": 100,
    "separate_critic": False,
    "num_learners": 0,
    "min_tasks": 1.0,
}
"""Options that checkpoints of earlier versions lack, and what stands for each."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A meta-training run: task family, policy, meta-learning algorithm, amount of experience and machine.

    It is read part by part, `config.meta.outer_lr`. Where people write, the options of all parts have one level: build
    one with the options that are known to train a family, and change what you like:

        config = TrainConfig.for_task("cartpole", iterations=20, hidden_dim=32)

    Attributes:
        task: name of the task family, gym:ID, or module:attribute for your own.
        task_options: of the family, such as `{"arms": 10}` for bandit; JSON values.
        task_ranges: for `gym:ID`, the numbers that differ between tasks, `{"gravity": [5, 15]}`.
        policy: sizes and form of the policy.
        meta: how it adapts and is meta-trained.
        experience: amount of experience.
        machine: where the run computes.
    """

    task: str = "navigation-2d"
    task_options: Mapping[str, Any] = field(default_factory=dict)
    task_ranges: Mapping[str, Any] = field(default_factory=dict)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    meta: MetaConfig = field(default_factory=MetaConfig)
    experience: ExperienceConfig = field(default_factory=ExperienceConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)

    def __post_init__(self) -> None:
        check_text("task", self.task)
        for name in ("task_options", "task_ranges"):
            check_mapping(name, getattr(self, name))
        options = self.to_dict()
        for name, values in ALGORITHMS[self.meta.algorithm].fixed.items():
            if options[name] not in values:
                raise ValueError(f"{name} must be {values[0]!r} for {self.meta.algorithm}, not {brief(options[name])}.")
        if self.meta.imitate and self.machine.num_learners:
            raise ValueError(f"num_learners must be 0 to imitate, not {self.machine.num_learners}.")

    def family(self) -> TaskDistribution:
        """A new instance of the task family.

        Raises:
            ValueError: it is unknown, or an option or range is; one sentence.
        """
        return make(self.task, self.task_options, self.task_ranges)

    @classmethod
    def for_task(cls, task: str, **options: Any) -> TrainConfig:
        """The configuration that is known to train a family, with `options` changed.

        Raises:
            ValueError: for an unknown task, an unknown option or an impossible value, in one sentence.
        """
        family = make(task, options.get("task_options", {}), options.get("task_ranges", {}))
        algorithm = options.get("algorithm", family.recommended.get("algorithm", MetaConfig.algorithm))
        entry = ALGORITHMS.get(algorithm)
        own = getattr(family, entry.family_preset) if entry and entry.family_preset else {}
        start = {**presets.of_algorithm(algorithm), **own, "algorithm": algorithm}
        return cls.from_dict({**start, "task": task, **options})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`; options that are not named keep their defaults.

        Raises:
            ValueError: for an unknown key (the nearest valid one is named) or an impossible value.
        """
        check_keys(values, set(OPTIONS), "option")
        own: dict[str, Any] = {}
        given: dict[str, dict[str, Any]] = {part: {} for part in PARTS}
        for name, value in values.items():
            place = given.get(OPTIONS[name], own)
            place[name] = tuple(value) if isinstance(value, list) else value
        return cls(**own, **{part: kind(**given[part]) for part, kind in PARTS.items()})

    @classmethod
    def from_checkpoint(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The configuration that a checkpoint keeps, which must have all options but those of `SINCE`: none is guessed.

        Raises:
            ValueError: an option is missing, unknown or impossible; one sentence.
        """
        values = {**SINCE, **values}
        if missing := [name for name in OPTIONS if name not in values]:
            raise ValueError(
                f"The checkpoint's config has no {', '.join(missing[:5])}{' …' * (len(missing) > 5)}: it is damaged, "
                "or of another version of ssm-metarl."
            )
        config = cls.from_dict(values)
        for name, most in MOST.items():
            check_count(name, values[name], 0, most)
        return config

    def to_dict(self) -> dict[str, Any]:
        """All options as JSON values, on one level."""
        nested = asdict(self)
        parts = [nested.pop(part) for part in PARTS]
        flat = {name: value for values in (*parts, nested) for name, value in values.items()}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in flat.items()}

    def replace(self, **options: Any) -> TrainConfig:
        """The same with other options of any part.

        Raises:
            ValueError: for an unknown option or an impossible value, in one sentence.
        """
        return self.from_dict({**self.to_dict(), **options})

    def policy_spec(self, distribution: TaskDistribution) -> PolicySpec:
        """Sizes of the policy for a family's spaces.

        Raises:
            ValueError: for a space that the policy cannot take, or tasks that its critic cannot.
        """
        observation, action = distribution.observation_space, distribution.action_space
        if not isinstance(observation, spaces.Box) or len(observation.shape) != 1:
            raise ValueError(
                f"{distribution.name}: observations must be vectors (Box with one axis), not {observation}."
            )
        low: tuple[float | None, ...] = ()
        high: tuple[float | None, ...] = ()
        heads: tuple[int, ...] = ()
        if isinstance(action, spaces.Discrete):
            size = int(action.n)
        elif isinstance(action, spaces.MultiDiscrete) and action.nvec.ndim == 1 and not action.start.any():
            heads = tuple(action.nvec.tolist())
            size = sum(heads)
        elif isinstance(action, spaces.Box) and len(action.shape) == 1:
            size = action.shape[0]
            low, high = action_bounds(action.low, action.high)
        else:
            raise ValueError(
                f"{distribution.name}: actions must be Discrete, MultiDiscrete from 0, or a Box with one axis, "
                f"not {action}."
            )
        example = (
            distribution.sample(1, np.random.default_rng(seed_for(self.experience.seed, Branch.TASKS)))
            if self.meta.baseline == "privileged"
            else []
        )
        return PolicySpec(
            observation_size=observation.shape[0],
            action_size=size,
            discrete=not isinstance(action, spaces.Box),
            task_size=task_numbers(example).size,
            action_low=low,
            action_high=high,
            action_heads=heads,
            **asdict(self.policy),
        )


MOST: Mapping[str, int] = {
    "inner_steps": 100,
    "meta_batch": 100_000,
    "episodes": 100_000,
    "trial_episodes": 100_000,
}
"""Greatest values that a checkpoint's config may have: whoever reads one would play for ever, or run out of memory."""

PARTS: Mapping[str, Any] = {name: kind for name, kind in get_type_hints(TrainConfig).items() if is_dataclass(kind)}
"""The parts of a `TrainConfig` by name."""

OPTIONS: Mapping[str, str] = {
    **{f.name: "" for f in fields(TrainConfig) if f.name not in PARTS},
    **{f.name: part for part, kind in PARTS.items() for f in fields(kind)},
}
"""The part that each option belongs to; "": to `TrainConfig` itself."""
