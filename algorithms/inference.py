"""The policy as workers run it: sizes, inputs and one time step, in NumPy alone.

A worker never imports torch. Matrix products are of fixed shape, one a task or a column, and everything else is
elementwise or a reduction over a short axis, so a task's numbers do not depend on which other tasks share the call:
collecting with 0, 1 or 8 workers gives bit-equal experience.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete

from ssm_metarl.algorithms.rollouts import Array, Rollouts

MIN_DECAY = 1e-6
"""Least decay of a mode a step. It keeps |a| below 1 in float32 too, where exp(-exp(nu)) rounds to 1 for small nu."""

MAX_NU = 10.0
"""Largest ν that has an effect: beyond, a mode forgets all in one step, and exp(ν) would overflow in gradients."""


ABSENT_BOUND = 1e30
"""A Box with bounds of at least this size is taken for unbounded: such numbers are written where there is no bound."""

CRITIC_UNITS = 128
"""Width of what a critic that is told the task makes of it and of the policy's last layer."""


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """Sizes and form of a policy, whatever the task.

    Attributes:
        hidden_dim: width H of the residual stream.
        state_dim: real state variables N of each SSM block (even: N/2 complex modes).
        num_layers: SSM blocks; 0 gives a memoryless policy.
        gated: gate a block's output by its input instead of mixing it by a linear layer (see ``SSMBlock``).
        inputs: "full" (observation, previous action, previous reward, start flag) or "observation" alone.
        initial_std: standard deviation of continuous actions before training.
        learned_step_sizes: every parameter has an inner step size of its own, ``inner_lr`` times a factor that is
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
            ``SlotMemory``); 0: none.
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

    def __post_init__(self) -> None:
        check_count("hidden_dim", self.hidden_dim, 1)
        check_count("state_dim", self.state_dim, 2)
        check_count("num_layers", self.num_layers, 0)
        check_count("memory_slots", self.memory_slots, 0)
        if self.state_dim % 2:
            raise ValueError(f"state_dim must be even (complex modes are pairs), not {self.state_dim}.")
        for name in ("gated", "learned_step_sizes", "normalize_observations", "scale_rewards"):
            check_flag(name, getattr(self, name))
        if self.inputs not in ("full", "observation"):
            raise ValueError(f"inputs must be 'full' or 'observation', not {self.inputs!r}.")
        for name in ("initial_std", "encoder_scale"):
            check_number(name, getattr(self, name), above=0.0)
        check_number("min_period", self.min_period, low=2.0)


@dataclass(frozen=True)
class PolicySpec(PolicyConfig):
    """All that is needed, with the weights, to run a policy. JSON values only.

    Attributes:
        observation_size: O, length of an observation.
        action_size: A, length of a continuous action, or the number of discrete actions.
        discrete: whether actions are integers in [0, A).
        task_size: P, how many numbers describe a task to the critic that is told it; 0: there is none such.
        action_low, action_high: bounds of each number of a continuous action in the environment's unit, None where
            there is none; empty: no number has any. See :meth:`env_actions`.
    """

    observation_size: int
    action_size: int
    discrete: bool
    task_size: int = 0
    action_low: tuple[float | None, ...] = ()
    action_high: tuple[float | None, ...] = ()

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
            actions: [..., A] float32, or [...] integers, which stay as they are.

        Returns:
            Of the same shape and dtype, within the bounds; NaN stays NaN.
        """
        if self.discrete or not self.action_low:
            return actions
        centre, half, least, most, low, high = _action_map(self.action_low, self.action_high)
        return np.clip(centre + half * np.clip(actions, least, most), low, high)

    def misfit(self, observations: gymnasium.Space[Any], actions: gymnasium.Space[Any]) -> str:
        """How the spaces of an environment of vectors differ from those that the policy was made for; "" if they fit.

        Args:
            observations: space of one observation.
            actions: space of one action.
        """
        shape = getattr(observations, "shape", None)
        if shape != (self.observation_size,):
            return f"its observations are of the size {self.observation_size}, not of the shape {shape}"
        if isinstance(actions, Discrete) != self.discrete:
            return f"its actions are {'discrete' if self.discrete else 'continuous'}"
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
        """The inverse of :meth:`to_dict`.

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
    """Of ``PolicySpec.env_actions``, [A] float32 each: centre and half-width, and the bounds before and after."""
    low = np.array([-np.inf if bound is None else bound for bound in lows])
    high = np.array([np.inf if bound is None else bound for bound in highs])
    bounded = np.isfinite(low) & np.isfinite(high)
    centre = np.where(bounded, np.where(bounded, low, 0) / 2 + np.where(bounded, high, 0) / 2, 0.0)
    half = np.where(bounded, np.where(bounded, high, 0) / 2 - np.where(bounded, low, 0) / 2, 1.0)
    least, most = np.where(bounded, -1.0, -np.inf), np.where(bounded, 1.0, np.inf)
    return tuple(array.astype(np.float32) for array in (centre, half, least, most, low, high))


def action_bounds(low: Array, high: Array) -> tuple[tuple[float | None, ...], tuple[float | None, ...]]:
    """``action_low`` and ``action_high`` of a Box's bounds [A]; what is ``ABSENT_BOUND`` or more stands for none."""

    def present(bounds: Array) -> tuple[float | None, ...]:
        return tuple(bound if abs(bound) < ABSENT_BOUND else None for bound in bounds.astype(np.float32).tolist())

    return present(low), present(high)


def step_size(name: str) -> str:
    """Name of the step sizes of a parameter."""
    return "step_sizes." + name.replace(".", "/")  # a parameter's own name cannot have a dot


def adapts(name: str) -> bool:
    """Whether inner steps change what has that name: no value head, no step size and no normaliser."""
    return name.startswith(("encoder.", "blocks.", "policy."))


def check_count(name: str, value: object, least: int) -> None:
    """Refuse what is not an integer of at least ``least``.

    Raises:
        ValueError: with one sentence that names the option.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer of {least} or more, not {value!r}.")


def check_flag(name: str, value: object) -> None:
    """Refuse what is neither true nor false.

    Raises:
        ValueError: with one sentence that names the option.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, not {value!r}.")


def check_number(
    name: str, value: float, *, above: float = -math.inf, low: float = -math.inf, high: float = math.inf
) -> None:
    """Refuse what is not a finite number above ``above`` and in [``low``, ``high``].

    Raises:
        ValueError: with one sentence that names the option.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if number and above < value and low <= value <= high:
        return
    bounds = [f"above {above:g}"] if above > -math.inf else []
    bounds += [f"at least {low:g}"] if low > -math.inf else []
    bounds += [f"at most {high:g}"] if high < math.inf else []
    raise ValueError(f"{name} must be a number {' and '.join(bounds)}, not {value!r}.")


def check_keys(values: Mapping[str, Any], known: set[str], what: str) -> None:
    """Refuse keys that are not ``known``, naming the nearest valid one.

    Raises:
        ValueError: with one sentence, for the first unknown key.
    """
    for key in values:
        if key not in known:
            near = get_close_matches(str(key), sorted(known), 1)
            hint = f"did you mean {near[0]!r}?" if near else f"valid keys are {', '.join(sorted(known))}."
            raise ValueError(f"Unknown {what} key {key!r}: {hint}")


def policy_inputs(spec: PolicySpec, rollouts: Rollouts) -> Array:
    """Inputs that the policy saw at each step of ``rollouts``, rebuilt from the record.

    Returns:
        [M, T, K, I] float32: observation, then (``inputs="full"``) previous action (one-hot if discrete), previous
        reward and start flag; previous action and reward are zero where ``resets``.
    """
    if spec.inputs == "observation":
        return rollouts.observations
    actions = rollouts.actions
    if spec.discrete:
        actions = np.eye(spec.action_size, dtype=np.float32)[actions]
    size = spec.observation_size
    inputs = np.zeros((*rollouts.rewards.shape, spec.input_size), np.float32)
    inputs[..., :size] = rollouts.observations
    inputs[:, 1:, :, size:-2] = actions[:, :-1]
    inputs[:, 1:, :, -2] = rollouts.rewards[:, :-1]
    inputs[..., size:-1] *= ~rollouts.resets[..., None]
    inputs[..., -1] = rollouts.starts
    return inputs


def task_numbers(tasks: Sequence[Any]) -> Array:
    """What a critic is told of tasks: all their numbers, by the order of their names.

    Args:
        tasks: M JSON values.

    Returns:
        [M, P] float32.

    Raises:
        ValueError: a task has something else than numbers, or a seed, or none, or the tasks do not have equally many.
    """

    def numbers(value: Any) -> Iterator[float]:
        if isinstance(value, Mapping):
            for name in sorted(value):
                if name == "seed":
                    raise ValueError(
                        "The informed baseline needs tasks that are numbers; a seed, as here, tells nothing."
                    )
                yield from numbers(value[name])
        elif isinstance(value, list | tuple):
            for each in value:
                yield from numbers(each)
        elif isinstance(value, int | float):
            yield float(value)
        else:
            raise ValueError(f"The informed baseline needs tasks that are numbers, but there is {value!r} in one.")

    found = [list(numbers(task)) for task in tasks]
    if len({len(each) for each in found}) > 1 or (found and not found[0]):
        raise ValueError("The informed baseline needs tasks that are numbers, equally many in each.")
    return np.array(found, np.float32)


class NumpyPolicy:
    """One time step of the policy for M tasks and K columns at a time, each task with its own or the shared weights.

    ``collect`` calls it once per environment step::

        policy = NumpyPolicy(spec, weights)
        state = policy.initial_state(tasks, columns)
        actions, log_probs, state = policy.act(inputs, state, noise)

    Args:
        spec: sizes.
        weights: float32 arrays by the names of ``SSMPolicy``'s parameters, each with a leading task axis [M, ...]
            or, where all tasks share them, without.
    """

    def __init__(self, spec: PolicySpec, weights: Mapping[str, Array]) -> None:
        self.spec = spec
        per_task = weights["encoder.weight"].ndim == 3
        # A column axis is inserted where a vector meets [M, K, ·]; matrices broadcast over tasks in matmul.
        vector = (lambda x: np.ascontiguousarray(x)[:, None]) if per_task else np.ascontiguousarray
        # tanh is made of 1 - 2 / (exp(2z) + 1); its factor 2, which rounds nothing, is in the weights that make z.
        self.encoder = (np.ascontiguousarray(weights["encoder.weight"] * _TWO), vector(weights["encoder.bias"] * _TWO))
        head, head_bias = weights["policy.weight"], weights["policy.bias"]
        # [I], or [M, 1, I]
        self.normalizer = (vector(weights["input_mean"]), vector(weights["input_scale"])) if spec.normalizes else None
        self.blocks = []
        for i in range(spec.num_layers):
            name = f"blocks.{i}."
            decay = np.exp(np.minimum(weights[name + "nu"].astype(np.float64), MAX_NU)) + MIN_DECAY
            modulus, phase = np.exp(-decay), weights[name + "theta"]
            gain = np.sqrt(-np.expm1(-2.0 * decay)).astype(np.float32)
            # Pairs (re, im, re, im, …) become halves (re…, im…), so that the recurrence runs on contiguous real
            # arrays: real multiplications and additions are rounded alike at every position of an array.
            into = weights[name + "B"] * np.repeat(gain, 2, -1)[..., None, :]
            into = np.concatenate([into[..., 0::2], into[..., 1::2]], -1)
            out, skip = weights[name + "C"], weights[name + "D"]
            out = np.concatenate([out[..., 0::2, :], out[..., 1::2, :]], -2)
            memory = None
            if spec.memory_slots:
                address, value, offset = (weights[f"{name}memory.{part}"] for part in ("address", "weight", "bias"))
                memory = np.ascontiguousarray(address), np.ascontiguousarray(value), vector(offset)
            a_re, a_im = modulus * np.cos(phase), modulus * np.sin(phase)
            straight, crossed = (
                vector(np.stack(pair, -2).astype(np.float32)) for pair in ((a_re, a_re), (-a_im, a_im))
            )
            if spec.gated:
                last = (vector(weights[name + "gate.weight"]), vector(weights[name + "gate.bias"]))
            else:
                out, skip = out * _TWO, skip * _TWO
                mix, bias = weights[name + "out.weight"], weights[name + "out.bias"]
                if i == spec.num_layers - 1:  # nothing but the head reads what it makes: one product instead of two
                    head_bias = head_bias + np.matmul(bias[..., None, :], head)[..., 0, :]
                    mix, bias = np.matmul(mix, head), np.zeros_like(head_bias)
                last = (np.ascontiguousarray(mix), vector(bias))
            out = np.ascontiguousarray(out)
            arrays = (np.ascontiguousarray(into), straight, crossed, out, vector(skip), last, memory)
            self.blocks.append(arrays)
        self.readout = (np.ascontiguousarray(head), vector(head_bias))
        if not spec.discrete:
            log_std = vector(weights["policy.log_std"])
            self._std = np.exp(log_std)
            self._log_norm = log_std.sum(-1) + np.float32(0.5 * spec.action_size * math.log(2 * math.pi))

    def initial_state(self, tasks: int, columns: int) -> list[Array]:
        """Zero state: for each block [M, K, 2, N/2] float32, real parts and imaginary parts, and with a memory after
        that [M, K, S, H+2], sums, weights and the last address."""
        sizes = [(2, self.spec.state_dim // 2)]
        if self.spec.memory_slots:
            sizes.append((self.spec.memory_slots, self.spec.hidden_dim + 2))
        return [np.zeros((tasks, columns, *size), np.float32) for _ in self.blocks for size in sizes]

    def head(self, inputs: Array, state: list[Array]) -> tuple[Array, list[Array]]:
        """Action mean or logits for one step.

        Args:
            inputs: [M, K, I] float32.
            state: of the step before.

        Returns:
            [M, K, A] float32, and the new state.
        """
        weight, bias = self.encoder
        if self.normalizer is not None:
            inputs = (inputs - self.normalizer[0]) / self.normalizer[1]
        hidden = np.matmul(inputs, weight)
        hidden += bias
        _tanh_of_half(hidden)
        head_weight, head_bias = self.readout
        head = None
        new_state: list[Array] = []
        before = iter(state)
        for i, block in enumerate(self.blocks):
            h = next(before)
            into, straight, crossed, out, skip, (last_weight, last_bias), memory = block
            new = straight * h
            new += crossed * h[..., ::-1, :]
            new += np.matmul(hidden, into).reshape(h.shape)
            new_state.append(new)
            y = np.matmul(new.reshape(*h.shape[:-2], -1), out)
            y += skip * hidden
            if memory is not None:
                recalled, contents = _recall(hidden, next(before), *memory)
                if not self.spec.gated:
                    recalled *= _TWO
                y += recalled
                new_state.append(contents)
            if self.spec.gated:
                gate = last_weight * hidden
                gate += last_bias
                _sigmoid(gate)
                y *= gate
                hidden = hidden + y
                continue
            _tanh_of_half(y)
            y = np.matmul(y, last_weight)
            if i == len(self.blocks) - 1:
                head = y
            else:
                y += last_bias
                hidden = hidden + y
        read = np.matmul(hidden, head_weight)
        if head is not None:
            read += head
        read += head_bias
        return read, new_state

    def act(self, inputs: Array, state: list[Array], noise: Array | None) -> tuple[Array, Array, list[Array]]:
        """Sample (or, without noise, take the most likely) actions.

        Args:
            inputs: [M, K, I] float32.
            state: of the step before.
            noise: standard normal [M, K, A] for continuous actions, uniform in [0, 1) [M, K] for discrete
                ones, or None.

        Returns:
            actions ([M, K, A] float32 or [M, K] int64), their log-probabilities [M, K] float32, and the new state.
        """
        head, state = self.head(inputs, state)
        if self.spec.discrete:
            head -= head.max(-1, keepdims=True)
            log_probs = head - np.log(np.exp(head).sum(-1, keepdims=True))
            if noise is None:
                actions = log_probs.argmax(-1)
            else:
                below = np.exp(log_probs).cumsum(-1) <= noise[..., None]
                actions = np.minimum(below.sum(-1), self.spec.action_size - 1)
            return actions, np.take_along_axis(log_probs, actions[..., None], -1)[..., 0], state
        if noise is None:
            return head, np.broadcast_to(-self._log_norm, head.shape[:-1]).astype(np.float32), state
        log_prob = np.float32(-0.5) * (noise * noise).sum(-1)
        log_prob -= self._log_norm
        return head + self._std * noise, log_prob, state


def _recall(hidden: Array, state: Array, address: Array, weight: Array, bias: Array) -> tuple[Array, Array]:
    """One step of ``SlotMemory``: what is recalled [M, K, H], and the state [M, K, S, H+2] after it."""
    value = np.matmul(hidden, weight)
    value += bias
    value = np.concatenate([value, np.ones_like(value[..., :1])], -1)
    new = np.empty_like(state)
    np.multiply(state[..., -1:], value[..., None, :], out=new[..., :-1])
    new[..., :-1] += state[..., :-1]
    at = np.matmul(hidden, address)
    at -= at.max(-1, keepdims=True)
    np.exp(at, out=at)
    at /= at.sum(-1, keepdims=True)
    new[..., -1] = at
    found = np.matmul(at[..., None, :], new[..., :-1])[..., 0, :]
    return found[..., :-1] / (found[..., -1:] + _ONE), new


def _sigmoid(x: Array) -> None:
    """1 / (1 + exp(-x)) in place, rounded alike at every position of an array."""
    np.negative(x, out=x)
    with np.errstate(over="ignore"):  # exp(-x) = inf gives 0, as it should
        np.exp(x, out=x)
    x += _ONE
    np.reciprocal(x, out=x)


def _tanh_of_half(x: Array) -> None:
    """tanh(x / 2) = 1 - 2 / (exp(x) + 1) in place, within 2e-7: NumPy's own tanh takes about 1.5 times as long."""
    with np.errstate(over="ignore"):  # exp(x) = inf gives 1, as it should
        np.exp(x, out=x)
    x += _ONE
    np.divide(_MINUS_TWO, x, out=x)
    x += _ONE


# As arrays: NumPy would convert a Python number at every step.
_ONE, _TWO, _MINUS_TWO = (np.array(number, np.float32) for number in (1, 2, -2))
