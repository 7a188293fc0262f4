"""The policy as workers run it: one time step, in NumPy alone.

A worker never imports torch. Matrix products are of fixed shape, one a task or an episode slot, and everything else is
elementwise or a reduction over a short axis, so a task's numbers do not depend on which other tasks share the call:
collecting with 0, 1 or 8 workers gives bit-equal experience.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from ssm_metarl.algorithms.heads import by_head
from ssm_metarl.algorithms.parameters import MAX_NU, MIN_DECAY, per_task
from ssm_metarl.algorithms.rollouts import Array
from ssm_metarl.algorithms.spec import PolicySpec


class NumpyPolicy:
    """One time step of the policy for M tasks and K episodes at a time, each task with its own or the shared weights.

    `collect` calls it once per environment step:

        policy = NumpyPolicy(spec, weights)
        state = policy.initial_state(tasks, num_episodes)
        actions, log_probs, state = policy.act(inputs, state, noise)

    Args:
        spec: sizes.
        weights: float32 arrays by the names of `SSMPolicy`'s parameters, each with a leading task axis [M, ...]
            or, where all tasks share them, without.
    """

    def __init__(self, spec: PolicySpec, weights: Mapping[str, Array]) -> None:
        self.spec = spec
        # A column axis is inserted where a vector meets [M, K, ·]; matrices broadcast over tasks in matmul.
        vector = (lambda x: np.ascontiguousarray(x)[:, None]) if per_task(weights) else np.ascontiguousarray
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
        if spec.discrete:
            self._last = np.array(spec.action_heads or spec.action_size) - 1
        else:
            log_std = vector(weights["policy.log_std"])
            self._std = np.exp(log_std)
            self._log_norm = log_std.sum(-1) + np.float32(0.5 * spec.action_size * math.log(2 * math.pi))

    def initial_state(self, tasks: int, num_episodes: int) -> list[Array]:
        """Zero state: for each block [M, K, 2, N/2] float32, real parts and imaginary parts, and with a memory after
        that [M, K, S, H+2], sums, weights and the last address."""
        sizes = [(2, self.spec.state_dim // 2)]
        if self.spec.memory_slots:
            sizes.append((self.spec.memory_slots, self.spec.hidden_dim + 2))
        return [np.zeros((tasks, num_episodes, *size), np.float32) for _ in self.blocks for size in sizes]

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
            noise: of `PolicySpec.draw_noise` for [M, K], or None.

        Returns:
            actions ([M, K, A] float32, [M, K] int64 or [M, K, D] int64), their log-probabilities [M, K] float32, and
            the new state.
        """
        head, state = self.head(inputs, state)
        if self.spec.discrete:
            heads = self.spec.action_heads
            head = by_head(head, heads) if heads else head
            head -= head.max(-1, keepdims=True)
            log_probs = head - np.log(np.exp(head).sum(-1, keepdims=True))
            if noise is None:
                actions = log_probs.argmax(-1)
            else:
                below = np.exp(log_probs).cumsum(-1) <= noise[..., None]
                actions = np.minimum(below.sum(-1), self._last)
            taken = np.take_along_axis(log_probs, actions[..., None], -1)[..., 0]
            return actions, taken.sum(-1) if heads else taken, state
        if noise is None:
            return head, np.broadcast_to(-self._log_norm, head.shape[:-1]).astype(np.float32), state
        log_prob = np.float32(-0.5) * (noise * noise).sum(-1)
        log_prob -= self._log_norm
        return head + self._std * noise, log_prob, state


def _recall(hidden: Array, state: Array, address: Array, weight: Array, bias: Array) -> tuple[Array, Array]:
    """One step of `SlotMemory`: what is recalled [M, K, H], and the state [M, K, S, H+2] after it."""
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
