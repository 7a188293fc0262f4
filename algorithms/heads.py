"""Independent categorical heads: their logits in one vector, and each head's in a row of a table.

An action of several integers has a head for each of them. Logits of all heads lie one after the other, [..., A].
Sampling and probabilities read them as a table [..., D, n]. Rows of shorter heads end in logits that no softmax sees.
"""

from __future__ import annotations

import functools

import numpy as np

from ssm_metarl.algorithms.rollouts import Array

ABSENT_LOGIT = -1e9
"""A logit of probability 0. Minus infinity would make the gradient of a divergence 0 · ∞."""


def head_starts(heads: tuple[int, ...]) -> Array:
    """Place of each head's first logit, [D] int64."""
    return np.cumsum(heads) - np.array(heads)


@functools.lru_cache
def row_places(heads: tuple[int, ...]) -> Array:
    """Places of a table's entries in the logits, [D, n] int64; A, one beyond the last, where a row has ended."""
    sizes = np.array(heads)[:, None]
    column = np.arange(max(heads))
    return np.where(column < sizes, head_starts(heads)[:, None] + column, sum(heads))


@functools.lru_cache
def logit_places(heads: tuple[int, ...]) -> Array:
    """Place of each logit in a flattened table, [A] int64: the inverse of `row_places`."""
    return np.flatnonzero(row_places(heads).ravel() < sum(heads))


def by_head(logits: Array, heads: tuple[int, ...]) -> Array:
    """The table [..., D, n] of logits [..., A]; heads of one size share the memory of the logits."""
    if len(set(heads)) == 1:
        return logits.reshape(*logits.shape[:-1], len(heads), heads[0])
    absent = np.full((*logits.shape[:-1], 1), ABSENT_LOGIT, logits.dtype)
    return np.take(np.concatenate([logits, absent], -1), row_places(heads), -1)


def less_mean(logits: Array, heads: tuple[int, ...]) -> Array:
    """Logits [..., A], or weights that make them, less each head's mean: an amount in common has no effect."""
    if len(heads) == 1:
        return logits - logits.mean(-1, keepdims=True)
    means = np.add.reduceat(logits, head_starts(heads), -1) / np.array(heads, logits.dtype)
    return logits - np.repeat(means, heads, -1)


@functools.lru_cache
def identity(size: int) -> Array:
    """One-hot vectors [A, A] float32, read-only."""
    rows = np.eye(size, dtype=np.float32)
    rows.flags.writeable = False
    return rows


def one_hot(actions: Array, heads: tuple[int, ...]) -> Array:
    """The one-hot vectors of several integers [..., D] one after the other, [..., A] float32."""
    vectors = np.zeros((*actions.shape[:-1], sum(heads)), np.float32)
    np.put_along_axis(vectors, actions + head_starts(heads), 1.0, -1)
    return vectors
