"""The environment that steps many episodes in a few arrays."""

from __future__ import annotations

import abc
import functools
import operator
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.utils.seeding import np_random
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from ssm_metarl.core import Step


def check_actions(actions: NDArray[Any], count: int, family: str) -> NDArray[np.integer[Any]]:
    """Return actions [N] that must be whole numbers from 0 to `count` - 1: an index below 0 would not fail by itself.

    Raises:
        ValueError: one is anything else.
    """
    if not np.issubdtype(actions.dtype, np.integer) or actions.min() < 0 or actions.max() >= count:
        raise ValueError(f"An action of {family} must be a whole number from 0 to {count - 1}.")
    return actions


class BatchedEnv(VectorEnv[NDArray[np.float32], NDArray[Any], NDArray[Any]], abc.ABC):
    """N environments whose state is a few arrays, stepped together; native families derive from it.

    It keeps what is the same everywhere: seeds, the horizon, ends and autoreset. A family adds its dynamics
    in `_start`, `_advance` and `_observe`, which must treat episode slots one by one (elementwise operations
    only), so that an episode slot's experience is the same bits whatever runs beside it.

    Flags and infos are those of gymnasium's `SyncVectorEnv` in `AutoresetMode.SAME_STEP`: the step that
    ends an episode returns its reward and flags with the next episode's first observation, and its last
    observation as `infos["final_obs"][slot]`, where `infos["_final_obs"][slot]` is true. Where
    nothing ended, infos are empty but for "success" in a family that has `_success`. All arrays returned are the
    caller's to keep and to change.
    """

    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012 (gymnasium's type)

    def __init__(
        self,
        observation_space: gymnasium.Space[Any],
        action_space: gymnasium.Space[Any],
        num_envs: int,
        horizon: int,
    ) -> None:
        """Set up `num_envs` environments with these spaces (of one) and up to `horizon` steps an episode."""
        self.num_envs = num_envs
        self.single_observation_space = observation_space
        self.single_action_space = action_space
        self._actions_shape = (num_envs, *(action_space.shape or ()))
        self._horizon = horizon
        # Columns share one clock. A column is truncated at its deadline; before the next one no step looks.
        self._clock: int | None = None
        self._deadlines = np.zeros(num_envs, dtype=np.int64)
        self._next_deadline = 0
        self._seeds: list[int | None] = [None] * num_envs
        self._generators: list[np.random.Generator | None] = [None] * num_envs

    # Made when asked for: a rollout worker never asks, and making one takes as long as many steps.

    @functools.cached_property
    def observation_space(self) -> gymnasium.Space[Any]:  # type: ignore[override]
        """Space of the observations of all episode slots."""
        return batch_space(self.single_observation_space, self.num_envs)

    @functools.cached_property
    def action_space(self) -> gymnasium.Space[Any]:  # type: ignore[override]
        """Space of the actions of all episode slots."""
        return batch_space(self.single_action_space, self.num_envs)

    @abc.abstractmethod
    def _start(self, slots: NDArray[np.intp]) -> None:
        """Put these episode slots at the start of an episode; chance comes from `_generator(slot)`."""

    @abc.abstractmethod
    def _advance(self, actions: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Move every slot one step; return new arrays: rewards [N] float32 and terminated [N] bool."""

    @abc.abstractmethod
    def _observe(self) -> NDArray[np.float32]:
        """Return the present observations in a new array [N, O] float32."""

    def _success(self) -> NDArray[np.bool_] | None:
        """Return in a new array [N] bool whose step was a success, in a family where there is such a thing."""
        return None

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Start an episode in every slot.

        Args:
            seed: N seeds; or one, for seed, seed + 1, ...; None, here or for an episode slot, goes on with the
                slot's present generator.
            options: none are known.

        Returns:
            Observations [N, O] float32 and an empty dict.

        Raises:
            ValueError: wrong number of seeds, a negative seed, or options.
        """
        if options:
            raise ValueError(f"{type(self).__name__} has no reset options, not {', '.join(options)}.")
        for slot, slot_seed in enumerate(_slot_seeds(seed, self.num_envs)):
            if slot_seed is not None:
                self._seeds[slot] = slot_seed
                self._generators[slot] = None
        self._clock = 0
        self._begin(np.arange(self.num_envs))
        return self._observe(), {}

    def step(self, actions: NDArray[Any]) -> Step:
        """Move every slot one step and start the next episode where one ended.

        Args:
            actions: [N, A] float32, or [N] integers.

        Returns:
            Observations [N, O] float32, rewards [N] float32, terminated and truncated [N] bool, and the infos
            described above. At the horizon both flags can be true.

        Raises:
            ResetNeeded: before the first `reset`.
            ValueError: actions of another shape, or that a discrete family does not have.
        """
        if self._clock is None:
            raise ResetNeeded("Call reset before step.")
        actions = np.asarray(actions)
        if actions.shape != self._actions_shape:
            raise ValueError(f"Actions must have the shape {self._actions_shape}, not {actions.shape}.")
        rewards, terminated = self._advance(actions)
        observations = self._observe()
        self._clock += 1
        if self._clock < self._next_deadline:
            truncated = np.zeros(self.num_envs, dtype=np.bool_)
        else:
            truncated = self._deadlines <= self._clock
        ended = terminated | truncated
        success = self._success()
        infos: dict[str, Any] = {} if success is None else {"success": success, "_success": ~ended}
        if not np.count_nonzero(ended):
            return observations, rewards, terminated, truncated, infos
        slots = np.flatnonzero(ended)
        infos |= _final_infos(observations, ended, slots)
        if success is not None:
            infos["final_info"] = {"success": success.copy(), "_success": ended.copy()}
        self._begin(slots)
        return self._observe(), rewards, terminated, truncated, infos

    def _begin(self, slots: NDArray[np.intp]) -> None:
        """Start an episode in these episode slots, at the present time."""
        assert self._clock is not None
        self._start(slots)
        self._deadlines[slots] = self._clock + self._horizon
        self._next_deadline = int(self._deadlines.min())

    def _generator(self, slot: int) -> np.random.Generator:
        """The slot's own generator, made when a start first draws from it: many families never do."""
        generator = self._generators[slot]
        if generator is None:
            generator = self._generators[slot] = np_random(self._seeds[slot])[0]
        return generator


def _slot_seeds(seed: int | Sequence[int | None] | None, num_envs: int) -> Sequence[int | None]:
    """One seed an episode slot, as gymnasium's vector environments read `reset(seed=...)`."""
    if seed is None:
        return [None] * num_envs
    if isinstance(seed, int | np.integer):
        seed = range(int(seed), int(seed) + num_envs)
    seeds = [None if slot_seed is None else operator.index(slot_seed) for slot_seed in seed]
    if len(seeds) != num_envs:
        raise ValueError(f"{num_envs} environments need {num_envs} seeds, not {len(seeds)}.")
    if any(slot_seed is not None and slot_seed < 0 for slot_seed in seeds):
        raise ValueError("A seed must be 0 or more.")
    return seeds


def _final_infos(
    observations: NDArray[np.float32], ended: NDArray[np.bool_], slots: NDArray[np.intp]
) -> dict[str, Any]:
    """The infos of gymnasium's `SyncVectorEnv` where these episode slots ended and no environment has its own."""
    final_obs = np.full(len(ended), None, dtype=object)
    for slot in slots.tolist():
        final_obs[slot] = observations[slot]
    return {"final_obs": final_obs, "_final_obs": ended, "final_info": {}, "_final_info": ended.copy()}
