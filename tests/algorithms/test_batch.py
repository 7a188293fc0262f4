"""Batches of the learner."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ssm_metarl.algorithms.batch import task_shards


@given(st.integers(1, 30), st.integers(1, 100), st.integers(1, 20), st.integers(1, 10_000))
def test_shards_hold_every_task_once(tasks: int, steps: int, num_episodes: int, budget: int) -> None:
    shards = task_shards((tasks, steps, num_episodes), budget)
    assert [task for shard in shards for task in range(shard.start, shard.stop)] == list(range(tasks))
