"""Sums over shards: in one order, whoever adds which of them."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from ssm_metarl.algorithms.shard import tree_nodes, tree_total


def bracketed(one: str, other: str) -> str:
    return f"({one}{other})"


@given(st.integers(1, 40), st.integers(1, 12))
def test_the_order_of_a_sum_does_not_depend_on_who_adds(leaves: int, learners: int) -> None:
    single = {(i, i + 1): f" {i}" for i in range(leaves)}
    expected = tree_total(leaves, single, bracketed)
    borders = [leaves * i // learners for i in range(learners + 1)]
    known = {}
    for first, last in pairwise(borders):
        for low, high in tree_nodes(leaves, first, last):
            assert first <= low < high <= last
            known[low, high] = tree_total(leaves, single, bracketed, (low, high))
    assert tree_total(leaves, known, bracketed) == expected
