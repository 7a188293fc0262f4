"""The vocabulary: what a trainer, a family of tasks, a source of rollouts and an adapter are, each with its loop."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import gymnasium
import numpy as np
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray

from ssm_metarl import presets

if TYPE_CHECKING:
    from ssm_metarl.algorithms.adapters import Adaptation
    from ssm_metarl.algorithms.rollouts import Rollouts
    from ssm_metarl.config import TrainConfig
    from ssm_metarl.storage.contents import Checkpoint

Array = np.ndarray[Any, Any]


class Trainer(Protocol):
    """Improves a policy, an iteration at a time; `train` drives it:

        trainer = trainer_class(config).of_run(config)
        trainer.start_from(checkpoint)  # or load_checkpoint, to resume
        while trainer.meta_iteration < iterations:
            metrics = trainer.step()
            trainer.save_checkpoint(folder)
        trainer.stop()

    Attributes:
        learns_normalizer: whether it updates the running moments of observations and rewards.
        always_ray: whether it needs Ray, also without workers.
        meta_iteration: iterations done.
        env_steps: environment steps taken.
    """

    learns_normalizer: ClassVar[bool]
    always_ray: ClassVar[bool]
    meta_iteration: int
    env_steps: int

    @classmethod
    def of_run(cls, config: TrainConfig, distribution: TaskDistribution | None = None) -> Trainer:
        """The trainer of a run; `distribution`: the family itself instead of the one that `config.task` names."""

    def step(self) -> dict[str, Any]:
        """One iteration; returns its metrics, JSON values."""

    def save_checkpoint(self, checkpoint_dir: str) -> str:
        """Write a checkpoint into a folder, and return the folder."""

    def load_checkpoint(self, checkpoint: str) -> None:
        """Resume from a checkpoint of the same run."""

    def start_from(self, checkpoint: Checkpoint) -> None:
        """Take the weights of a checkpoint of any run with a policy of the same sizes."""

    def stop(self) -> None:
        """End what plays and trains; it cannot step any more."""


class Collect(Protocol):
    """Plays tasks: in process, over Ray, or in an environment of the user's own. An adapter calls it a step:

    rollouts = collect(weights, episodes, step)
    """

    def __call__(self, weights: Mapping[str, Array], episodes: int, step: int) -> Rollouts:
        """Play every task for `episodes` with `weights` (shared, or [M, ...] a task) after `step` steps."""


class Adapter(Protocol):
    """Adapts a policy to new tasks:

    adaptation = adapter.adapt(collect, episodes=5)
    adapted = adaptation.policy(policy, task=0)
    """

    def adapt(self, collect: Collect, episodes: int) -> Adaptation:
        """Adapt to every task that `collect` plays, with `episodes` a task and step."""


class InvalidStep(ValueError):
    """What an environment returned is neither in its spaces nor what gymnasium's interface asks for; one sentence."""


Task = dict[str, Any]
"""Parameters of one task: JSON values only."""

SUCCESS = ("success", "is_success")
"""Names under which the infos of a step say whether it succeeded, as a number."""

Step = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]
"""Observations [N, O], rewards [N], terminated [N], truncated [N], infos."""


@dataclass(frozen=True)
class ReferenceReturns:
    """Undiscounted episode returns on the training tasks between which metrics are normalised.

    Attributes:
        random: mean over tasks and episodes of a policy that has learned nothing.
        random_sd: standard deviation of that policy's return from episode to episode, over tasks and chance.
        oracle: mean of the best player, one that knows the task; None where no best is known.
    """

    random: float
    random_sd: float
    oracle: float | None


class TaskDistribution(abc.ABC):
    """A family of tasks: draws task parameters and builds the environments that play them.

    The trainer makes one by name and ships it to its workers: it must be picklable and hold no environment.

    Attributes:
        name: name in the registry.
        horizon: most steps of an episode; an episode of that length is truncated.
        observation_space, action_space: spaces of one environment.
        splits: what `sample` takes. `train`, `validation` and `test` are one distribution, kept apart by
            the seeds of the callers; `shifted` and `shifted-test` lie outside of it and of each other.
        enumerable: the family is finite, so that the splits share tasks and differ in seeds only.
        reference: the returns of a random and of the best player.
        recommended: training options that learn on this family, where they differ from the defaults. A family that
            nobody tuned can have inputs and rewards of any size, which would saturate a fresh policy's units.
        in_context: options that the algorithm "rl2" starts from on this family.
    """

    name: str
    horizon: int
    observation_space: gymnasium.Space[Any]
    action_space: gymnasium.Space[Any]
    splits: tuple[str, ...]
    enumerable: bool = False
    reference: ReferenceReturns
    recommended: Mapping[str, Any] = presets.of_task("untuned")
    in_context: Mapping[str, Any] = presets.of_task("untuned", "rl2")

    @abc.abstractmethod
    def sample(self, n: int, rng: np.random.Generator, split: str = "train") -> list[Task]:
        """Draw the tasks of a meta-batch or of an evaluation; the trainer and the evaluator call this.

        Args:
            n: how many, 0 or more.
            rng: the only source of chance: equal generators give equal tasks.
            split: one of `splits`.

        Returns:
            n tasks.

        Raises:
            ValueError: there is no such split; the sentence lists the valid ones.
        """

    @abc.abstractmethod
    def make_vector_env(self, tasks: Sequence[Task], num_episodes: int) -> VectorEnv[Any, Any, Any]:
        """Build the environments of M tasks, K episode slots each; a rollout worker calls this for every batch.

        Args:
            tasks: M tasks, as from `sample`.
            num_episodes: K, the episodes of a task that run side by side.

        Returns:
            M*K environments with `AutoresetMode.SAME_STEP`; number m*K + k is slot k of task m. `reset`
            takes a list of M*K seeds; `step` takes [M*K, A] float32 actions, which it clips itself, or
            int64 [M*K] or, of a `MultiDiscrete` with D integers, [M*K, D]. What an episode slot experiences depends on
            its task, seed and actions alone.

        Raises:
            ValueError: a task's parameters are missing, unknown or impossible, or the batch is empty.
        """

    def close(self) -> None:  # noqa: B027 (nothing to do is right for most)
        """Close the environments that the family keeps between batches; it can still be used."""


SPLITS = ("train", "validation", "test")
"""Of a family that offers no tasks outside its training range."""
