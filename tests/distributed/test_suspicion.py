"""Who is dropped: a task that ends workers, and hardly ever one that was there when they ended by chance."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest

from ssm_metarl.distributed.suspicion import FEWEST, MOST, Suspicion

ONE, TWO = ("a",), ("a", "b")


def test_three_ends_condemn_where_nothing_is_known_of_chance() -> None:
    suspicion = Suspicion()
    for _ in range(FEWEST):
        assert not suspicion.condemned("task", ONE, ONE)
        suspicion.ended("task", "a")
    assert suspicion.condemned("task", ONE, ONE)
    assert not suspicion.condemned("another", ONE, ONE)


def test_tasks_that_ended_workers_and_were_played_then_raise_the_bar() -> None:
    suspicion, needed = Suspicion(), []
    for number in range(30):
        suspicion.ended(number, "a")
        suspicion.played(number)
        needed.append(suspicion.needed())
    assert needed == sorted(needed)
    assert FEWEST < needed[0] < needed[-1] == MOST


def test_a_dropped_task_says_nothing_of_chance() -> None:
    suspicion = Suspicion()
    for _ in range(9):
        suspicion.ended("task", "a")
    suspicion.forget("task")
    suspicion.played("task")
    assert suspicion.needed() == FEWEST


def test_two_nodes_are_asked_where_there_are_two() -> None:
    suspicion = Suspicion()
    for _ in range(FEWEST):
        suspicion.ended("task", "a")
    assert not suspicion.condemned("task", TWO, TWO)
    assert suspicion.avoided("task", "a", TWO)
    assert not suspicion.avoided("task", "b", TWO)
    assert not suspicion.avoided("task", "a", ONE)
    assert not suspicion.avoided("another", "a", TWO)
    assert suspicion.condemned("task", TWO, ONE)
    suspicion.ended("task", "b")
    assert suspicion.condemned("task", TWO, TWO)


def test_a_lost_node_does_not_count() -> None:
    suspicion = Suspicion()
    for node in "aabb":
        suspicion.ended("task", node)
    assert suspicion.condemned("task", TWO, TWO)
    assert not suspicion.condemned("task", ("a", "c"), ("a", "c"))


def call(suspicion: Suspicion, rng: np.random.Generator, chance: float, tasks: int, guilty: int | None) -> list[int]:
    """The tasks dropped in a call in which all are played one by one, and ends of a worker for each guilty end."""
    waiting, dropped = deque(range(tasks)), []
    while waiting:
        task = waiting.popleft()
        if task == guilty or rng.random() < chance:
            suspicion.ended(task, "a")
            if suspicion.condemned(task, ONE, ONE):
                suspicion.forget(task)
                dropped.append(task)
            else:
                waiting.append(task)
        else:
            suspicion.played(task)
    return dropped


@pytest.mark.parametrize(("chance", "most"), [(0.02, 0.001), (0.1, 1 / 300), (0.3, 0.01)])
def test_error_rates(chance: float, most: float) -> None:
    """Simulated runs of 30 calls of 40 tasks: innocent ones dropped, by call; and a guilty one always is."""
    rng, runs, wrong = np.random.default_rng(0), 40, 0
    for _ in range(runs):
        suspicion = Suspicion()
        wrong += sum(bool(call(suspicion, rng, chance, 40, None)) for _ in range(30))
        assert 0 in call(suspicion, rng, chance, 40, 0)
    assert wrong / (30 * runs) <= most
