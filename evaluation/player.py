"""A policy that acts: the way to use a trained policy on environments of one's own. NumPy only, until it adapts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

from ssm_metarl.algorithms.collect import collect, played
from ssm_metarl.algorithms.numpy_policy import NumpyPolicy
from ssm_metarl.algorithms.rollouts import Array, Rollouts
from ssm_metarl.algorithms.spec import PolicySpec
from ssm_metarl.checks import check_count
from ssm_metarl.config import TrainConfig
from ssm_metarl.seeds import Branch, child, seed_for
from ssm_metarl.storage.checkpoint import load_checkpoint
from ssm_metarl.storage.contents import Checkpoint
from ssm_metarl.storage.run_folder import resolve_checkpoint
from ssm_metarl.tasks.external.lending import policy_env

if TYPE_CHECKING:
    from ssm_metarl.algorithms.adapters import Adaptation


class Player:
    """A policy that acts in one environment or in N side by side, with the inputs that it was trained with:

        player = load_player("pretrained:cartpole")
        observation, _ = env.reset()
        action, done = player.act(observation), False
        while not done:
            observation, reward, terminated, truncated, _ = env.step(action)
            done = terminated or truncated
            action = player.act(observation, reward=reward)
        player.reset()  # before an episode of another task

    A policy of single episodes is reset with every episode. One that was trained over trials of several episodes
    (`rl2`) learns from one to the next: then `act` is called with the first observation of the next episode,
    the last reward and `terminated=True`, and `reset` only before another task.

    Args:
        spec: of the policy.
        weights: its parameters and normaliser by name, float32, without a task axis.
        trial_episodes: episodes over which it keeps its memory.
        deterministic: take the most likely action instead of sampling.
        noise: what actions are sampled with.
        trained: how it was meta-trained; only `adapt` needs it.

    Attributes:
        adaptation: what `adapt` found, of the player that it returned; None for another.
    """

    def __init__(
        self,
        spec: PolicySpec,
        weights: Mapping[str, Array],
        *,
        trial_episodes: int = 1,
        deterministic: bool = False,
        noise: np.random.Generator | None = None,
        trained: TrainConfig | None = None,
    ) -> None:
        check_count("trial_episodes", trial_episodes, 1)
        self.spec, self.trial_episodes, self.deterministic = spec, trial_episodes, deterministic
        self.adaptation: Adaptation | None = None
        self._weights, self._trained = dict(weights), trained or TrainConfig()
        self._policy = NumpyPolicy(spec, self._weights)
        self._noise = noise or np.random.default_rng()
        self._num_episodes: int | None = None
        self._single = False
        self._state: list[Array] = []
        self._ended = np.zeros(0, np.int64)
        self._inputs = np.zeros((1, 0, spec.input_size), np.float32)

    def __repr__(self) -> str:
        spec = self.spec
        actions = f"actions of {' and '.join(map(str, spec.heads))} values" if spec.discrete else "numbers as actions"
        kind = actions if spec.discrete else f"{spec.action_size} {actions}"
        return f"<Player of {self._trained.task}: {spec.observation_size} observed numbers, {kind}>"

    def reset(self) -> None:
        """Forget everything: the next `act` begins an episode in every slot. Their number may change."""
        self._num_episodes = None

    def act(
        self,
        observation: Any,
        reward: Any = None,
        terminated: Any = False,
        truncated: Any = False,
    ) -> Any:
        """Choose actions.

        Args:
            observation: [O], of one environment, or [N, O], of N; finite numbers. Where an episode has just ended, the
                first one of the next, as environments with `AutoresetMode.SAME_STEP` return it.
            reward: of the step that led there, a number or [N]. Not with the first observation after `reset`,
                and needed after that by policies that read rewards (`inputs="full"`).
            terminated, truncated: whether that step ended an episode, a flag or [N].

        Returns:
            A discrete action, int64, with several heads [D] of them, or [A] float32 in the environment's own unit and
            within its bounds; for N environments [N, ...].

        Raises:
            ValueError: an argument has another shape or is not finite, or the reward is missing; one sentence. What
                the player remembers is unchanged.
            FloatingPointError: the policy's weights or memory gave an action that is not finite.
        """
        spec, size = self.spec, self.spec.observation_size
        observations = self._observations(observation)
        num_episodes = observations.shape[0]
        first = self._num_episodes is None
        if not first and (num_episodes, np.ndim(observation) == 1) != (self._num_episodes, self._single):
            raise ValueError(
                f"The player is in the middle of {self._num_episodes} episode(s) and got {num_episodes} "
                "observation(s): call reset() before other environments."
            )
        if first and reward is not None:
            raise ValueError("The first observation after reset() has no reward: leave it out.")
        if first:
            inputs, state, ended = self._started(num_episodes)
        else:
            inputs, state, ended = self._continued(num_episodes, reward, terminated, truncated)
        inputs[0, :, :size] = observations
        actions, log_probs, state = self._policy.act(inputs, state, self._draw(num_episodes))
        if not (np.isfinite(actions).all() and np.isfinite(log_probs).all()):
            raise FloatingPointError("The policy's action is not finite: its weights or its memory have diverged.")
        self._num_episodes, self._single = num_episodes, np.ndim(observation) == 1
        self._state, self._ended, self._inputs = state, ended, inputs
        if spec.inputs == "full":
            inputs[..., size:-2] = spec.encoded(actions)
        found = spec.env_actions(actions)[0]
        return found[0] if self._single else found

    def adapt(
        self,
        env: gymnasium.Env[Any, Any] | VectorEnv[Any, Any, Any],
        episodes: int | None = None,
        *,
        steps: int | None = None,
        horizon: int | None = None,
        seed: int = 0,
    ) -> Player:
        """A player adapted to an environment by gradient steps, see `StandardAdapter`; needs torch.

        Args:
            env: the task. It is reset with seeds, played `steps + 1` times for as many episodes, and left open. Of a
                vector environment, whose sub-environments must be of the same task and reset themselves in the same
                step, each plays a share of the episodes.
            episodes: a step; None: as in training.
            steps: adaptation steps; None: as in training, at least one.
            horizon: most steps of an episode; None: the environment's own limit.
            seed: of the environment's resets and of the actions.

        Returns:
            A new player, whose `adaptation` tells the returns after each step. This one stays as it is.

        Raises:
            ValueError: the environment's spaces are not those of the policy, an option is impossible, or all
                episodes were lost; one sentence.
        """
        from ssm_metarl.algorithms.adapters import StandardAdapter
        from ssm_metarl.algorithms.policy import SSMPolicy

        meta, experience = self._trained.meta, self._trained.experience
        episodes = experience.episodes if episodes is None else episodes
        steps = max(meta.inner_steps, 1) if steps is None else steps
        check_count("episodes", episodes, 1)
        check_count("seed", seed, 0)
        vector, longest = _vector_env(env, self.spec, horizon)
        rounds = math.ceil(episodes / vector.num_envs)

        def play(weights: Mapping[str, Array], episodes: int, step: int) -> Rollouts:
            whole: Rollouts | None = None
            for turn in range(rounds):
                node = seed_for(seed, Branch.PLAYER, step, turn)
                steps = collect(vector, self.spec, weights, [node], [{}], longest, trial_episodes=self.trial_episodes)
                part = played(steps)
                if not part.num_steps:
                    raise ValueError(f"The environment gave nothing to learn from: {part.errors[0]}")
                whole = part if whole is None else whole.beside(part)
            assert whole is not None
            return whole

        policy = SSMPolicy(self.spec)
        policy.load_numpy(self._weights)
        found = StandardAdapter(policy, meta, steps=steps).adapt(play, rounds * vector.num_envs)
        adapted = Player(
            self.spec,
            {name: value[0].copy() for name, value in found.weights.items()},
            trial_episodes=self.trial_episodes,
            deterministic=self.deterministic,
            noise=np.random.default_rng(child(seed_for(seed, Branch.PLAYER), 1)),
            trained=self._trained,
        )
        adapted.adaptation = found
        return adapted

    def _started(self, num_episodes: int) -> tuple[Array, list[Array], Array]:
        """Inputs, without the observations, state and ended episodes of each trial, at the start of trials."""
        inputs = np.zeros((1, num_episodes, self.spec.input_size), np.float32)
        if self.spec.inputs == "full":
            inputs[..., -1] = 1.0
        return inputs, self._policy.initial_state(1, num_episodes), np.zeros(num_episodes, np.int64)

    def _continued(
        self, num_episodes: int, reward: Any, terminated: Any, truncated: Any
    ) -> tuple[Array, list[Array], Array]:
        """The same after a step; a slot whose last episode of a trial ended begins another trial."""
        size, full = self.spec.observation_size, self.spec.inputs == "full"
        if reward is None and full:
            raise ValueError("This policy reads the reward of the last step: act(observation, reward=...).")
        rewards = _numbers("reward", 0.0 if reward is None else reward, num_episodes)
        done = _flags("terminated", terminated, num_episodes) | _flags("truncated", truncated, num_episodes)
        inputs, state = self._inputs.copy(), [each.copy() for each in self._state]
        ended = self._ended + done
        new = ended >= self.trial_episodes
        ended[new] = 0
        for each in state:
            each[0, new] = 0.0
        if full:
            inputs[0, :, -2], inputs[0, :, -1] = rewards, done
            inputs[0, new, size:-1] = 0.0
        return inputs, state, ended

    def _observations(self, observation: Any) -> Array:
        """[N, O] float32, finite."""
        size = self.spec.observation_size
        try:
            array = np.asarray(observation, np.float32)
        except (TypeError, ValueError):
            raise ValueError(f"An observation must be [{size}] or [N, {size}] numbers.") from None
        if array.ndim not in (1, 2) or array.shape[-1] != size or not array.size:
            raise ValueError(f"An observation must be [{size}] or [N, {size}] numbers, not {list(array.shape)}.")
        if not np.isfinite(array).all():
            raise ValueError("An observation holds NaN or infinite numbers.")
        return array.reshape(-1, size)

    def _draw(self, num_episodes: int) -> Array | None:
        if self.deterministic:
            return None
        return self.spec.draw_noise(self._noise, 1, num_episodes)


def load_player(path: str | Path, *, deterministic: bool = False, seed: int = 0) -> Player:
    """The policy of a checkpoint, of a run's best one or of `pretrained:NAME`, ready to act.

    It plays the environments that it is given, and runs no code that the checkpoint names.

    Args:
        path: a checkpoint, a run folder, or pretrained:NAME.
        deterministic: take the most likely actions instead of sampling as in training.
        seed: of the sampled actions.

    Raises:
        CheckpointError: there is none, or it is damaged.
        ValueError: the seed is no number of at least 0.
    """
    check_count("seed", seed, 0)
    return player_of(load_checkpoint(resolve_checkpoint(path)), deterministic=deterministic, seed=seed)


def player_of(checkpoint: Checkpoint, *, deterministic: bool = False, seed: int = 0) -> Player:
    """`load_player` for a checkpoint in memory."""
    trained = TrainConfig.from_checkpoint(checkpoint.config)
    return Player(
        checkpoint.spec,
        checkpoint.policy,
        trial_episodes=trained.experience.trial_episodes,
        deterministic=deterministic,
        noise=np.random.default_rng(child(seed_for(seed, Branch.PLAYER), 1)),
        trained=trained,
    )


def _vector_env(
    env: gymnasium.Env[Any, Any] | VectorEnv[Any, Any, Any], spec: PolicySpec, horizon: int | None
) -> tuple[VectorEnv[Any, Any, Any], int]:
    """The environment as the rollout loop plays it, and the most steps of an episode.

    Raises:
        ValueError: it is none that the policy can play; one sentence.
    """
    if isinstance(env, VectorEnv):
        if env.metadata.get("autoreset_mode") != AutoresetMode.SAME_STEP:
            raise ValueError("A vector environment must reset in the same step: autoreset_mode=SAME_STEP.")
        if horizon is None:
            raise ValueError("A vector environment needs horizon=..., the most steps of an episode.")
        vector, observations, actions, longest = env, env.single_observation_space, env.single_action_space, horizon
    else:
        wrapped, longest = policy_env(env, horizon)
        vector = SyncVectorEnv([lambda: wrapped], autoreset_mode=AutoresetMode.SAME_STEP)
        observations, actions = wrapped.observation_space, wrapped.action_space
    check_count("horizon", longest, 1)
    difference = spec.misfit(observations, actions)
    if difference:
        raise ValueError(f"The policy cannot play this environment: {difference}.")
    return vector, longest


def _numbers(name: str, value: Any, num_episodes: int) -> Array:
    try:
        array = np.asarray(value, np.float32)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number for each of {num_episodes} environment(s), not {value!r}.") from None
    if array.shape not in ((), (num_episodes,)) or not np.isfinite(array).all():
        raise ValueError(f"{name} must be a finite number for each of {num_episodes} environment(s), not {value!r}.")
    return np.broadcast_to(array, (num_episodes,))


def _flags(name: str, value: Any, num_episodes: int) -> Array:
    array = np.asarray(value)
    if array.shape not in ((), (num_episodes,)) or array.dtype != bool:
        raise ValueError(f"{name} must be true or false for each of {num_episodes} environment(s), not {value!r}.")
    return np.broadcast_to(array, (num_episodes,))
