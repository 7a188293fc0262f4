"""Sizes and form of a policy, and the environment's bounds of its actions."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete, MultiDiscrete

from ssm_metarl.algorithms.heads import identity, one_hot
from ssm_metarl.algorithms.rollouts import Array
from ssm_metarl.checks import brief, check_count, check_flag, check_keys, check_number

ABSENT_BOUND = 1e30
"""A Box with bounds of at least this size is taken for unbounded: such numbers are written where there is no bound."""

LATER = ("separate_critic",)
"""Fields of which checkpoints of earlier versions have none: they mean the default."""

MAX_HEAD_TABLE = 2**20
"""Most heads × values of the largest one."""


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """Sizes and form of a policy, whatever the task.

    Attributes:
        hidden_dim: width H of the residual stream.
        state_dim: real state variables N of each SSM block (even: N/2 complex modes).
        num_layers: SSM blocks; 0 gives a memoryless policy.
        gated: gate a block's output by its input instead of mixing it by a linear layer (see `SSMBlock`).
        inputs: "full" (observation, previous action, previous reward, start flag) or "observation" alone.
        initial_std: standard deviation of continuous actions before training.
        learned_step_sizes: every parameter has an inner step size of its own, `inner_lr` times a factor that is
            meta-learned from 1 (Li et al. 2017, arXiv 1707.09835).
        normalize_observations: observations less their running mean, divided by their running standard deviation.
        scale_rewards: rewards divided by a running standard deviation: as input by that of rewards, for the critic by
            that of returns.
        encoder_scale: factor of the encoder's initial weights. With one-hot inputs, of which few are not 0, tanh is
            nearly linear at 1, and what depends on a product of inputs (this action and that reward) is slow to learn.
        min_period: shortest period, in steps, of the oscillations that the modes start with, 2 or more; their phases
            are uniform up to 2π/min_period (LRU's max_phase). Slow ones tell apart what changes slowly; single steps
            of a long past are told apart by those of all periods from 2 on, which make a delay line.
        memory_slots: of an associative memory in each block, which binds what was done where to what came of it (see
            `SlotMemory`); 0: none.
        separate_critic: the value head reads an encoder and blocks of its own instead of the policy's, so that neither
            loss disturbs what the other needs.
    """

    hidden_dim: int = 64
    state_dim: int = 32
    num_layers: int = 1
    gated: bool = False
    inputs: Literal["full", "observation"] = "full"
    initial_std: float = 0.5
    learned_step_sizes: bool = False
    normalize_observations: bool = False
    scale_rewards: bool = False
    encoder_scale: float = 1.0
    min_period: float = 20.0
    memory_slots: int = 0
    separate_critic: bool = False

    def __post_init__(self) -> None:
        check_count("hidden_dim", self.hidden_dim, 1)
        check_count("state_dim", self.state_dim, 2)
        check_count("num_layers", self.num_layers, 0)
        check_count("memory_slots", self.memory_slots, 0)
        if self.state_dim % 2:
            raise ValueError(f"state_dim must be even (complex modes are pairs), not {self.state_dim}.")
        for name in ("gated", "learned_step_sizes", "normalize_observations", "scale_rewards", "separate_critic"):
            check_flag(name, getattr(self, name))
        if self.inputs not in ("full", "observation"):
            raise ValueError(f"inputs must be 'full' or 'observation', not {brief(self.inputs)}.")
        for name in ("initial_std", "encoder_scale"):
            check_number(name, getattr(self, name), above=0.0)
        check_number("min_period", self.min_period, low=2.0)


@dataclass(frozen=True)
class PolicySpec(PolicyConfig):
    """All that is needed, with the weights, to run a policy. JSON values only.

    Attributes:
        observation_size: O, length of an observation.
        action_size: A, length of a continuous action, or the number of discrete actions, over all heads.
        discrete: whether actions are integers in [0, A), or with `action_heads` several integers each.
        task_size: P, task features that the privileged critic reads; 0: there is none.
        action_low, action_high: bounds of each number of a continuous action in the environment's unit, None where
            there is none; empty: no number has any. See `env_actions`.
        action_heads: of an action that is D integers, the number of values of each, with the sum A; its integers are
            independent given the past. Empty: an action is one integer, or continuous.
    """

    observation_size: int
    action_size: int
    discrete: bool
    task_size: int = 0
    action_low: tuple[float | None, ...] = ()
    action_high: tuple[float | None, ...] = ()
    action_heads: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_count("observation_size", self.observation_size, 1)
        check_count("action_size", self.action_size, 1)
        check_flag("discrete", self.discrete)
        check_count("task_size", self.task_size, 0)
        super().__post_init__()
        for name, bounds in (("action_low", self.action_low), ("action_high", self.action_high)):
            if not isinstance(bounds, tuple) or len(bounds) not in (0, 0 if self.discrete else self.action_size):
                raise ValueError(f"{name} must be a tuple of a bound for each number of a continuous action.")
            for bound in bounds:
                if bound is not None:
                    check_number(name, bound, low=-ABSENT_BOUND, high=ABSENT_BOUND)
        if len(self.action_low) != len(self.action_high):
            raise ValueError("action_low and action_high must have equally many bounds.")
        for low, high in zip(self.action_low, self.action_high, strict=True):
            if low is not None and high is not None and low > high:
                raise ValueError(f"action_low {low:g} must not be above action_high {high:g}.")
        self._check_heads()

    def _check_heads(self) -> None:
        heads = self.action_heads
        if not isinstance(heads, tuple) or (heads and not self.discrete):
            raise ValueError("action_heads must be a tuple of the number of values of each integer of an action.")
        for size in heads:
            check_count("action_heads", size, 1)
        if heads and sum(heads) != self.action_size:
            raise ValueError(f"action_heads must add up to action_size, {self.action_size}, not {sum(heads)}.")
        if heads and len(heads) * max(heads) > MAX_HEAD_TABLE:
            raise ValueError(f"action_heads: {len(heads)} with up to {max(heads)} values are too many.")

    @property
    def heads(self) -> tuple[int, ...]:
        """Number of values of each categorical head: one head of a discrete action, none of a continuous one."""
        return self.action_heads or ((self.action_size,) if self.discrete else ())

    @property
    def action_shape(self) -> tuple[int, ...]:
        """Shape of an action: () of one integer, [D] of several, [A] of numbers."""
        if self.action_heads:
            return (len(self.action_heads),)
        return () if self.discrete else (self.action_size,)

    @property
    def action_type(self) -> type[np.int64 | np.float32]:
        """Type of an action's numbers."""
        return np.int64 if self.discrete else np.float32

    def draw_noise(self, generator: np.random.Generator, *lead: int) -> Array:
        """The chance of actions [*lead], float32: uniform in [0, 1) for integers, else standard normal."""
        shape = (*lead, *self.action_shape)
        if self.discrete:
            return generator.random(shape, dtype=np.float32)
        return generator.standard_normal(shape, dtype=np.float32)

    def encoded(self, actions: Array) -> Array:
        """Actions as inputs read them, [..., A] float32: integers as one-hot vectors, one after the other."""
        if self.action_heads:
            return one_hot(actions, self.action_heads)
        return identity(self.action_size)[actions] if self.discrete else actions

    @property
    def input_size(self) -> int:
        """Length I of the policy's input vector."""
        if self.inputs == "observation":
            return self.observation_size
        return self.observation_size + self.action_size + 2

    @property
    def normalizes(self) -> bool:
        """Whether inputs are normalised."""
        return self.normalize_observations or self.scale_rewards

    def env_actions(self, actions: Array) -> Array:
        """The policy's actions in the environment's unit.

        A number with two bounds is clipped to [-1, 1] and mapped to them linearly, as by the environments of rllab that
        MAML was published with. A number with one bound, or none, is in the environment's unit already and is clipped
        to the bound that it has.

        Args:
            actions: [..., A] float32, or [...] or [..., D] integers, which stay as they are.

        Returns:
            Of the same shape and dtype, within the bounds; NaN stays NaN.
        """
        if self.discrete or not self.action_low:
            return actions
        centre, half, least, most, low, high = _action_map(self.action_low, self.action_high)
        return np.clip(centre + half * np.clip(actions, least, most), low, high)

    def policy_actions(self, actions: Array) -> Array:
        """The policy's actions that `env_actions` maps to these, or to the nearest that it can.

        Args:
            actions: as of `env_actions`.
        """
        if self.discrete or not self.action_low:
            return actions
        centre, half, least, most, low, high = _action_map(self.action_low, self.action_high)
        return np.clip((np.clip(actions, low, high) - centre) / half, least, most)

    def misfit(self, observations: gymnasium.Space[Any], actions: gymnasium.Space[Any]) -> str:
        """How the spaces of an environment of vectors differ from those that the policy was made for; "" if they fit.

        Args:
            observations: space of one observation.
            actions: space of one action.
        """
        shape = getattr(observations, "shape", None)
        if shape != (self.observation_size,):
            return f"its observations are of the size {self.observation_size}, not of the shape {shape}"
        if isinstance(actions, Discrete | MultiDiscrete) != self.discrete:
            return f"its actions are {'discrete' if self.discrete else 'continuous'}"
        if isinstance(actions, MultiDiscrete) or self.action_heads:
            heads = tuple(np.ravel(actions.nvec).tolist()) if isinstance(actions, MultiDiscrete) else ()
            one = f"one integer of {self.action_size} values"
            mine = f"integers of {self.action_heads} values" if self.action_heads else one
            return "" if heads == self.action_heads else f"its actions are {mine}, not those of {actions}"
        if isinstance(actions, Discrete):
            same = int(actions.n) == self.action_size
            return "" if same else f"it has {self.action_size} actions, not {int(actions.n)}"
        if not isinstance(actions, Box) or actions.shape != (self.action_size,):
            return f"its actions have {self.action_size} numbers, not those of {actions}"
        bounds = action_bounds(actions.low, actions.high)
        if bounds == (self.action_low, self.action_high) or (not self.action_low and set(sum(bounds, ())) == {None}):
            return ""
        low, high = (
            ", ".join("none" if bound is None else f"{bound:g}" for bound in side) or "nothing"
            for side in (self.action_low, self.action_high)
        )
        return f"its actions are bounded by [{low}] and [{high}], not as in {actions}"

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PolicySpec:
        """The inverse of `to_dict`.

        Raises:
            ValueError: for an unknown key (the nearest valid one is named), a missing key, or an impossible size.
        """
        known = {f.name for f in fields(cls)}
        check_keys(values, known, "policy")
        try:
            given: dict[str, Any] = {
                k: tuple(value) if isinstance(value, list) else value for k, value in values.items()
            }
            return cls(**given)
        except TypeError as error:
            raise ValueError(f"Incomplete policy description: {error}.") from None


@functools.lru_cache
def _action_map(lows: tuple[float | None, ...], highs: tuple[float | None, ...]) -> tuple[Array, ...]:
    """Of `PolicySpec.env_actions`, [A] float32 each: centre and half-width, and the bounds before and after."""
    low = np.array([-np.inf if bound is None else bound for bound in lows])
    high = np.array([np.inf if bound is None else bound for bound in highs])
    bounded = np.isfinite(low) & np.isfinite(high)
    centre = np.where(bounded, np.where(bounded, low, 0) / 2 + np.where(bounded, high, 0) / 2, 0.0)
    half = np.where(bounded, np.where(bounded, high, 0) / 2 - np.where(bounded, low, 0) / 2, 1.0)
    least, most = np.where(bounded, -1.0, -np.inf), np.where(bounded, 1.0, np.inf)
    return tuple(array.astype(np.float32) for array in (centre, half, least, most, low, high))


def action_bounds(low: Array, high: Array) -> tuple[tuple[float | None, ...], tuple[float | None, ...]]:
    """`action_low` and `action_high` of a Box's bounds [A]; what is `ABSENT_BOUND` or more stands for none."""

    def present(bounds: Array) -> tuple[float | None, ...]:
        return tuple(bound if abs(bound) < ABSENT_BOUND else None for bound in bounds.astype(np.float32).tolist())

    return present(low), present(high)
