"""Tasks as RLlib's vector environments."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from ssm_metarl.algorithms.rollouts import Array
from ssm_metarl.algorithms.spec import PolicySpec
from ssm_metarl.seeds import seed_for
from ssm_metarl.tasks import TaskDistribution

COLUMNS = 20
"""Most episodes that a worker plays side by side: RLlib's time a step falls little beyond."""


class TaskEnv(VectorEnv[Array, Array, Array]):
    """N columns that play episodes of a family, a new task each; an observation is what the policy reads.

    That is the observation and, with ``inputs="full"``, the previous action as it was sampled (one-hot if discrete),
    the previous reward and the start flag: the inputs that ``collect`` makes. The step after an episode's last one
    begins the next episode, whatever the action (``AutoresetMode.NEXT_STEP``, which RLlib expects). Infos of a last
    step hold ``return`` and ``length`` of the episode and, where the environment raised or gave a number that is not
    finite, ``error``; such an episode is truncated at the last good observation.

    RLlib builds it in every worker, and seeds it with its own seed and the worker's index.

    Args:
        config: ``distribution`` (the family), ``spec`` (the policy's) and ``num_envs``.
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012 (gymnasium's type)

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._family: TaskDistribution = config["distribution"]
        self._spec: PolicySpec = config["spec"]
        self.num_envs = int(config["num_envs"])
        self.single_observation_space = spaces.Box(-np.inf, np.inf, (self._spec.input_size,), np.float32)
        action = self._family.action_space
        # A policy's actions, of which the bounds are those of PolicySpec.env_actions.
        self.single_action_space = (
            action if self._spec.discrete else spaces.Box(-np.inf, np.inf, action.shape, np.float32)
        )
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._seed = 0
        self._envs: list[VectorEnv[Any, Any, Any] | None] = [None] * self.num_envs
        self._episodes = [0] * self.num_envs
        self._inputs = np.zeros((self.num_envs, self._spec.input_size), np.float32)
        self._returns, self._lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, np.int64)
        self._done = np.zeros(self.num_envs, bool)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Begin an episode in every column; equal seeds give equal tasks and equal chance.

        Args:
            seed: non-negative; None goes on with new episodes of the last one.
            options: none are known.

        Returns:
            Inputs of the policy [N, I] float32, and empty infos.
        """
        if seed is not None:
            assert isinstance(seed, int), "one seed for all columns"
            self._seed, self._episodes = seed, [0] * self.num_envs
        for column in range(self.num_envs):
            self._begin(column)
        return self._inputs.copy(), {}

    def step(self, actions: Array) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        """Move every column one step, or begin its next episode.

        Args:
            actions: [N, A] float32, or [N] integers.

        Returns:
            Inputs of the policy [N, I] float32, rewards [N] float32, terminated and truncated [N] bool, infos.
        """
        rewards = np.zeros(self.num_envs, np.float32)
        terminated, truncated = np.zeros((2, self.num_envs), bool)
        errors = np.full(self.num_envs, None, object)
        for column in range(self.num_envs):
            if self._done[column]:
                self._begin(column)
                continue
            try:
                rewards[column], terminated[column], truncated[column] = self._play(column, actions[column])
            except Exception:
                truncated[column], errors[column] = True, traceback.format_exc()
        self._done = terminated | truncated
        infos: dict[str, Any] = {}
        if self._done.any():
            values = {"return": self._returns.copy(), "length": self._lengths.copy(), "error": errors}
            for name, value in values.items():
                infos |= {name: value, f"_{name}": self._done.copy()}
        return self._inputs.copy(), rewards, terminated, truncated, infos

    def close_extras(self, **kwargs: Any) -> None:
        """Close what the columns play in."""
        for env in self._envs:
            if env is not None:
                env.close()

    def _begin(self, column: int) -> None:
        """Draw a column's next task and put its first observation in place."""
        path = (column, self._episodes[column])
        self._episodes[column] += 1
        if (before := self._envs[column]) is not None:
            before.close()
        task = self._family.sample(1, np.random.default_rng(seed_for(self._seed, *path, 0)), "train")
        env = self._envs[column] = self._family.make_vector_env(task, 1)
        observation = env.reset(seed=seed_for(self._seed, *path, 1).generate_state(1).tolist())[0]
        self._returns[column] = self._lengths[column] = 0
        self._done[column] = False
        self._read(column, self._checked(observation[0]))
        if self._spec.inputs == "full":
            self._inputs[column, self._spec.observation_size :] = 0.0
            self._inputs[column, -1] = 1.0  # start flag

    def _play(self, column: int, action: Array) -> tuple[float, bool, bool]:
        """Step a column; return reward, terminated and truncated."""
        env = self._envs[column]
        assert env is not None, "reset comes before step"
        observation, rewards, terminated, truncated, infos = env.step(self._spec.env_actions(np.asarray(action))[None])
        done = bool(terminated[0] or truncated[0])
        last = np.asarray(infos["final_obs"][0] if done else observation[0], np.float32)
        reward = float(self._checked(np.asarray(rewards, np.float32))[0])
        self._read(column, self._checked(last))
        self._returns[column] += reward
        self._lengths[column] += 1
        size = self._spec.observation_size
        if self._spec.inputs == "full":
            self._inputs[column, size:] = 0.0
            if self._spec.discrete:
                self._inputs[column, size + int(action)] = 1.0
            else:
                self._inputs[column, size:-2] = action
            self._inputs[column, -2] = reward
        cut = bool(truncated[0]) or self._lengths[column] == self._family.horizon
        return reward, bool(terminated[0]), cut

    def _read(self, column: int, observation: Array) -> None:
        self._inputs[column, : self._spec.observation_size] = observation

    @staticmethod
    def _checked(numbers: Array) -> Array:
        if not np.isfinite(numbers).all():
            raise ValueError("observation or reward not finite.")
        return numbers
