"""Tasks as RLlib's vector environments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from ssm_metarl.algorithms.collect import failure
from ssm_metarl.algorithms.rollouts import Array
from ssm_metarl.algorithms.spec import PolicySpec
from ssm_metarl.seeds import seed_for
from ssm_metarl.tasks import TaskDistribution

SLOTS = 20
"""Most episodes that a worker plays side by side: RLlib's time a step falls little beyond."""


class TaskEnv(VectorEnv[Array, Array, Array]):
    """N episode slots that play episodes of a family, a new task each; an observation is what the policy reads.

    That is the observation and, with `inputs="full"`, the previous action as it was sampled (`PolicySpec.encoded`),
    the previous reward and the start flag: the inputs that `collect` makes. The step after an episode's last one
    begins the next episode, whatever the action (`AutoresetMode.NEXT_STEP`, which RLlib expects). Infos of a last
    step hold `return` and `length` of the episode and, where the environment raised or gave a number that is not
    finite, `error`; such an episode is truncated at the last good observation.

    RLlib builds it in every worker, and seeds it with its own seed and the worker's index.

    Args:
        config: `distribution` (the family), `spec` (the policy's) and `num_envs`.
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
        self._tasks: list[Any] = [{}] * self.num_envs
        self._inputs = np.zeros((self.num_envs, self._spec.input_size), np.float32)
        self._returns, self._lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, np.int64)
        self._done = np.zeros(self.num_envs, bool)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Begin an episode in every slot; equal seeds give equal tasks and equal chance.

        Args:
            seed: non-negative; None goes on with new episodes of the last one.
            options: none are known.

        Returns:
            Inputs of the policy [N, I] float32, and empty infos.
        """
        if seed is not None:
            assert isinstance(seed, int), "one seed for all episode slots"
            self._seed, self._episodes = seed, [0] * self.num_envs
        for slot in range(self.num_envs):
            self._begin(slot)
        return self._inputs.copy(), {}

    def step(self, actions: Array) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        """Move every slot one step, or begin its next episode.

        Args:
            actions: [N, A] float32, or [N] or [N, D] integers.

        Returns:
            Inputs of the policy [N, I] float32, rewards [N] float32, terminated and truncated [N] bool, infos.
        """
        rewards = np.zeros(self.num_envs, np.float32)
        terminated, truncated = np.zeros((2, self.num_envs), bool)
        errors = np.full(self.num_envs, None, object)
        for slot in range(self.num_envs):
            if self._done[slot]:
                self._begin(slot)
                continue
            try:
                rewards[slot], terminated[slot], truncated[slot] = self._play(slot, actions[slot])
            except Exception as error:
                truncated[slot], errors[slot] = True, failure(error, self._tasks[slot])
        self._done = terminated | truncated
        infos: dict[str, Any] = {}
        if self._done.any():
            values = {"return": self._returns.copy(), "length": self._lengths.copy(), "error": errors}
            for name, value in values.items():
                infos |= {name: value, f"_{name}": self._done.copy()}
        return self._inputs.copy(), rewards, terminated, truncated, infos

    def close_extras(self, **kwargs: Any) -> None:
        """Close what the episode slots play in."""
        for env in self._envs:
            if env is not None:
                env.close()

    def _begin(self, slot: int) -> None:
        """Draw an episode slot's next task and put its first observation in place."""
        path = (slot, self._episodes[slot])
        self._episodes[slot] += 1
        if (before := self._envs[slot]) is not None:
            before.close()
        task = self._family.sample(1, np.random.default_rng(seed_for(self._seed, *path, 0)), "train")
        (self._tasks[slot],) = task
        env = self._envs[slot] = self._family.make_vector_env(task, 1)
        observation = env.reset(seed=seed_for(self._seed, *path, 1).generate_state(1).tolist())[0]
        self._returns[slot] = self._lengths[slot] = 0
        self._done[slot] = False
        self._read(slot, self._checked(observation[0]))
        if self._spec.inputs == "full":
            self._inputs[slot, self._spec.observation_size :] = 0.0
            self._inputs[slot, -1] = 1.0  # start flag

    def _play(self, slot: int, action: Array) -> tuple[float, bool, bool]:
        """Step an episode slot; return reward, terminated and truncated."""
        env = self._envs[slot]
        assert env is not None, "reset comes before step"
        observation, rewards, terminated, truncated, infos = env.step(self._spec.env_actions(np.asarray(action))[None])
        done = bool(terminated[0] or truncated[0])
        last = np.asarray(infos["final_obs"][0] if done else observation[0], np.float32)
        reward = float(self._checked(np.asarray(rewards, np.float32))[0])
        self._read(slot, self._checked(last))
        self._returns[slot] += reward
        self._lengths[slot] += 1
        size = self._spec.observation_size
        if self._spec.inputs == "full":
            self._inputs[slot, size:] = 0.0
            self._inputs[slot, size:-2] = self._spec.encoded(np.asarray(action))
            self._inputs[slot, -2] = reward
        cut = bool(truncated[0]) or self._lengths[slot] == self._family.horizon
        return reward, bool(terminated[0]), cut

    def _read(self, slot: int, observation: Array) -> None:
        self._inputs[slot, : self._spec.observation_size] = observation

    @staticmethod
    def _checked(numbers: Array) -> Array:
        if not np.isfinite(numbers).all():
            raise ValueError("observation or reward not finite.")
        return numbers
