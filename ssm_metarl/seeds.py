"""The seed tree: every random draw of a run comes from a node of its own, named by a path."""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Branch(IntEnum):
    """First element of a node's path: the purpose of its draws. A new purpose gets a new number, at the end."""

    ROLLOUTS = 0
    TASKS = 1
    INITIAL_WEIGHTS = 2
    EVALUATION = 3
    MINIBATCHES = 4
    ADAPTED = 5
    RESIZE = 6
    REPLAY = 7
    BOOTSTRAP = 8
    PLAYER = 9
    DEMONSTRATIONS = 10
    # of a population's run
    CHILD_SEED = 100
    PROPOSAL = 101
    PARENT = 102
    COMPARISON = 103


def seed_for(seed: int, *path: int) -> np.random.SeedSequence:
    """The node of the seed tree at `path`; every random draw of a run comes from such a node.

    Args:
        seed: the run's seed, a non-negative integer.
        path: non-negative integers below 2³²: a `Branch`, then such as iteration, stage and task index. All nodes of
            a branch have distinct paths, and so do their `child` nodes.
    """
    return np.random.SeedSequence(seed, spawn_key=tuple(map(int, path)))


def child(node: np.random.SeedSequence, number: int) -> np.random.SeedSequence:
    """A node's child by number. `SeedSequence.spawn` would count how often it was called."""
    return np.random.SeedSequence(node.entropy, spawn_key=(*node.spawn_key, number))
