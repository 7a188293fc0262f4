"""Everything that defines a training run, in one frozen dataclass."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
from gymnasium import spaces

from ssm_metarl import presets
from ssm_metarl.algorithms.inputs import task_numbers
from ssm_metarl.algorithms.registry import ALGORITHMS, MetaConfig
from ssm_metarl.algorithms.spec import PolicyConfig, PolicySpec, action_bounds
from ssm_metarl.checks import check_count, check_keys, check_number
from ssm_metarl.seeds import Branch, seed_for
from ssm_metarl.tasks import TaskDistribution, make


def available_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, kw_only=True)
class TrainConfig(MetaConfig, PolicyConfig):
    """A meta-training run: task family, amount of experience, meta-learning algorithm and policy.

    Build one with the options that are known to train a family, and change what you like:

        config = TrainConfig.for_task("cartpole", iterations=20, hidden_dim=32)

    Attributes:
        task: name of the task family, gym:ID, or module:attribute for your own.
        task_options: of the family, such as `{"arms": 10}` for bandit; JSON values.
        task_ranges: for `gym:ID`, the numbers that differ between tasks, `{"gravity": [5, 15]}`.
        iterations: meta-iterations of the whole run; the learning-rate schedule spans them.
        meta_batch: tasks M of an iteration.
        episodes: episodes K a task, for each inner step and for the query; trials, where a trial has several episodes.
        trial_episodes: episodes of a trial, over which the policy keeps its recurrent state and sums its return.
        seed: of everything random in the run.
        num_workers: Ray actors that collect rollouts; 0 collects in process, without Ray.
        learner_threads: threads that share the learner's tasks (on a CPU).
        device: where the learner computes, such as "cpu" or "cuda"; "auto": on a GPU where there is one.
        checkpoint_every: iterations between checkpoints; there is one at the end, too.
        replay_episodes: query episodes that are kept for hybrid adaptation, one a task, the last ones; 0: none.
        sample_timeout_s: seconds after which a worker is replaced and its tasks are given up; such a run is not
            reproducible.
    """

    task: str = "navigation-2d"
    task_options: Mapping[str, Any] = field(default_factory=dict)
    task_ranges: Mapping[str, Any] = field(default_factory=dict)
    iterations: int = 30
    meta_batch: int = 20
    episodes: int = 20
    trial_episodes: int = 1
    seed: int = 0
    num_workers: int = 0
    learner_threads: int = field(default_factory=available_cores)
    device: str = "cpu"
    checkpoint_every: int = 10
    replay_episodes: int = 0
    sample_timeout_s: float | None = None

    def __post_init__(self) -> None:
        PolicyConfig.__post_init__(self)
        MetaConfig.__post_init__(self)
        for name in ("iterations", "meta_batch", "episodes", "trial_episodes", "learner_threads", "checkpoint_every"):
            check_count(name, getattr(self, name), 1)
        for name in ("seed", "num_workers", "replay_episodes"):
            check_count(name, getattr(self, name), 0)
        if self.sample_timeout_s is not None:
            check_number("sample_timeout_s", self.sample_timeout_s, above=0.0)
        for name, value in ALGORITHMS[self.algorithm].fixed.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name} must be {value!r} for {self.algorithm}, not {getattr(self, name)!r}.")

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
        algorithm = options.get("algorithm", family.recommended.get("algorithm", cls.algorithm))
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
        check_keys(values, {f.name for f in fields(cls)}, "option")
        listed: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**listed)

    def to_dict(self) -> dict[str, Any]:
        """All options as JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

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
        discrete = isinstance(action, spaces.Discrete)
        if isinstance(action, spaces.Discrete):
            size = int(action.n)
        elif isinstance(action, spaces.Box) and len(action.shape) == 1:
            size = action.shape[0]
        else:
            raise ValueError(f"{distribution.name}: actions must be Discrete or a Box with one axis, not {action}.")
        form = {f.name: getattr(self, f.name) for f in fields(PolicyConfig)}
        example = (
            distribution.sample(1, np.random.default_rng(seed_for(self.seed, Branch.TASKS)))
            if self.baseline == "privileged"
            else []
        )
        bounds = () if isinstance(action, spaces.Discrete) else action_bounds(action.low, action.high)
        return PolicySpec(observation.shape[0], size, discrete, task_numbers(example).size, *bounds, **form)
