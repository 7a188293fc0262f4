"""Rollouts and weights that stay where they were made: what a driver has of them are references and summaries.

Never imports torch: a rollout worker resolves the weights that it is called with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import ray

from ssm_metarl.algorithms.rollouts import Array, Rollouts, joined_successes

LEAST_BYTES = 110_000
"""Ray sends a smaller answer (below 100 KiB) to the caller itself, and from there to whoever is called with it."""


class Kept(NamedTuple):
    """A value that Ray keeps on the node where it was made, however small it is; `padding` makes it large enough."""

    value: Any
    padding: bytes

    @classmethod
    def of(cls, value: Any) -> Kept:
        """`value`, which may be small."""
        return cls(value, bytes(LEAST_BYTES))


class Summary(NamedTuple):
    """What a driver knows of rollouts that it has not seen.

    Attributes:
        returns: [M, K] float64, see `Rollouts.returns`.
        lengths: [M, K] int64.
        errors: see `Rollouts`.
        succeeded: [M, K] bool, see `Rollouts.succeeded`.
    """

    returns: Array
    lengths: Array
    errors: tuple[str, ...]
    succeeded: Array | None = None

    @classmethod
    def of(cls, rollouts: Rollouts) -> Summary:
        """The summary of a record."""
        return cls(rollouts.returns(), rollouts.lengths(), rollouts.errors, rollouts.succeeded())


@dataclass(frozen=True)
class RemoteRollouts:
    """Experience of M tasks in Ray's object store: `Rollouts` for whoever needs returns and lengths alone.

    Attributes:
        pieces: of consecutive tasks each, in order: which they are, and a reference to their `Kept` record.
        summary: of all.
        tasks: M JSON values.
    """

    pieces: Sequence[tuple[range, Any]]
    summary: Summary
    tasks: tuple[Any, ...]

    @classmethod
    def put(cls, rollouts: Rollouts, *pieces: range) -> RemoteRollouts:
        """A record that is here; `pieces`: the numbers that its tasks get."""
        cuts = np.cumsum([0, *map(len, pieces)]).tolist()
        records = [rollouts.select(slice(*pair)).trimmed() for pair in pairwise(cuts)]
        references = [ray.put(Kept(record, b"")) for record in records]
        return cls(list(zip(pieces, references, strict=True)), Summary.of(rollouts), rollouts.tasks)

    @classmethod
    def concatenate(cls, parts: Sequence[RemoteRollouts]) -> RemoteRollouts:
        """The rollouts of all parts, in order."""
        summary = Summary(
            np.concatenate([part.summary.returns for part in parts]),
            np.concatenate([part.summary.lengths for part in parts]),
            tuple(error for part in parts for error in part.errors),
            joined_successes([part.succeeded() for part in parts], [part.lengths().shape for part in parts]),
        )
        pieces = [piece for part in parts for piece in part.pieces]
        return cls(pieces, summary, tuple(task for part in parts for task in part.tasks))

    def split(self) -> list[RemoteRollouts]:
        """Each piece for itself; errors are with the first."""
        parts, row = list[RemoteRollouts](), 0
        for tasks, reference in self.pieces:
            own = slice(row, row + len(tasks))
            succeeded = None if self.summary.succeeded is None else self.summary.succeeded[own]
            arrays = self.summary.returns[own], self.summary.lengths[own]
            summary = Summary(*arrays, () if row else self.errors, succeeded)
            parts.append(RemoteRollouts([(tasks, reference)], summary, self.tasks[own]))
            row += len(tasks)
        return parts

    def spread(self, index: Sequence[int], others: Mapping[int, RemoteRollouts]) -> RemoteRollouts:
        """These tasks under the numbers of `index`, with other tasks between them."""
        parts = dict(others)
        for part in self.split():
            ((tasks, reference),) = part.pieces
            first = index[tasks.start]
            parts[first] = replace(part, pieces=[(range(first, first + len(tasks)), reference)])
        return RemoteRollouts.concatenate([parts[i] for i in sorted(parts)])

    @property
    def num_tasks(self) -> int:
        """Number of tasks M."""
        return len(self.tasks)

    @property
    def num_steps(self) -> int:
        """Number of valid environment steps."""
        return int(self.summary.lengths.sum())

    @property
    def errors(self) -> tuple[str, ...]:
        """See `Rollouts`."""
        return self.summary.errors

    def kept(self) -> Array:
        """See `Rollouts.kept`."""
        return np.asarray(self.summary.lengths > 0)

    def returns(self) -> Array:
        """See `Rollouts.returns`."""
        return self.summary.returns

    def lengths(self) -> Array:
        """See `Rollouts.lengths`."""
        return self.summary.lengths

    def succeeded(self) -> Array | None:
        """See `Rollouts.succeeded`."""
        return self.summary.succeeded

    def of_shard(self, shard: slice) -> list[Any]:
        """References to the records that the shard's tasks have together, in order; a piece is of one shard."""
        return [reference for tasks, reference in self.pieces if shard.start <= tasks.start < shard.stop]

    def fetch(self) -> Rollouts:
        """The record itself, brought here."""
        pieces = [kept.value for kept in ray.get([reference for _, reference in self.pieces])]
        return Rollouts.concatenate(pieces).trimmed()


@dataclass(frozen=True)
class RemoteWeights:
    """Weights [M, ...] of M tasks in Ray's object store, shard by shard.

    Attributes:
        shards: which tasks stand in each.
        references: to each shard's `Kept` weights.
        index: [M], the tasks that are meant; all of them at first.
    """

    shards: Sequence[slice]
    references: Sequence[Any]
    index: Array

    @classmethod
    def of(cls, shards: Sequence[slice], references: Sequence[Any]) -> RemoteWeights:
        """Of all tasks."""
        return cls(shards, references, np.arange(shards[-1].stop))

    def select(self, index: Sequence[int] | slice) -> RemoteWeights:
        """The weights of some of the tasks."""
        return RemoteWeights(self.shards, self.references, self.index[index])

    def needed(self) -> tuple[list[Array], list[Any]]:
        """For each shard that has any of the tasks: their rows in its weights, and its reference."""
        rows, references = [], []
        for shard, reference in zip(self.shards, self.references, strict=True):
            own = self.index[(self.index >= shard.start) & (self.index < shard.stop)]
            if len(own):
                rows.append(own - shard.start)
                references.append(reference)
        return rows, references

    def fetch(self) -> dict[str, Array]:
        """The weights themselves, brought here."""
        rows, references = self.needed()
        return joined_weights(rows, ray.get(references))


def here(rollouts: Rollouts | RemoteRollouts) -> Rollouts:
    """The record of rollouts, wherever they are."""
    return rollouts.fetch() if isinstance(rollouts, RemoteRollouts) else rollouts


def joined_weights(rows: Sequence[Array], shards: Sequence[Kept]) -> dict[str, Array]:
    """Weights [M, ...] of tasks that stand in these rows of their shards."""
    values = [kept.value for kept in shards]
    return {
        name: np.concatenate([value[name][own] for own, value in zip(rows, values, strict=True)]) for name in values[0]
    }
