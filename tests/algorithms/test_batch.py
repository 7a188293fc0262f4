"""Batches of the learner."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from builders import make_policy, make_spec, toy_rollouts, uneven
from ssm_metarl.algorithms.batch import (
    advantage_moments,
    draw_minibatches,
    make_batch,
    mean_returns,
    outer_moments,
    shard_batch,
    standardized,
    step_totals,
    task_shards,
)
from ssm_metarl.algorithms.registry import CRITICS, Baseline, MetaConfig

minibatches = st.integers(1, 9)


@given(st.integers(1, 30), st.integers(1, 100), st.integers(1, 20), minibatches, st.integers(1, 10_000))
def test_shards_hold_every_task_once(tasks: int, steps: int, num_episodes: int, parts: int, budget: int) -> None:
    shards = task_shards((tasks, steps, num_episodes), parts, steps=budget)
    assert [task for shard in shards for task in range(shard.start, shard.stop)] == list(range(tasks))
    sizes = [shard.stop - shard.start for shard in shards]
    assert max(sizes) - min(sizes) <= 1
    assert len(shards) % min(parts, tasks) == 0


@given(st.integers(1, 40), minibatches, st.integers(0, 2**32 - 1))
def test_a_pass_takes_every_shard_once_and_every_minibatch_one_of_each_stretch(n: int, parts: int, seed: int) -> None:
    n *= parts
    drawn = draw_minibatches(n, parts, np.random.default_rng(seed))
    assert sorted(shard for part in drawn for shard in part) == list(range(n))
    assert [[shard // parts for shard in part] for part in drawn] == [list(range(n // parts))] * parts


def test_without_chance_a_pass_is_one_minibatch() -> None:
    assert draw_minibatches(3, 1, None) == [[0, 1, 2]]


@pytest.mark.parametrize("baseline", ["linear", "time", "critic", "privileged"])
def test_shards_make_the_batch_of_all_tasks(baseline: Baseline) -> None:
    """What a shard needs of the others are sums."""
    spec = make_spec(task_size=2)
    config = MetaConfig(baseline=baseline, discount=0.9, gae_lambda=0.8)
    tasks = [{**task, "ends": task["ends"]} for task in uneven(5, 3, 8)]
    record = toy_rollouts(spec, make_policy(spec).numpy_weights(), tasks, 3, 8)
    record = replace(record, tasks=tuple({"a": i, "b": -i} for i in range(5)))
    values = np.random.default_rng(1).normal(size=(5, record.valid.shape[1] + 1, 3))
    values = values if baseline in CRITICS else None
    whole = make_batch(spec, record, config, values=values, reward_scale=2.0)
    shards = [slice(0, 1), slice(1, 3), slice(3, 5)]
    records = [record.select(shard) for shard in shards]
    level = mean_returns([step_totals(each, config, 2.0) for each in records])
    parts = [
        shard_batch(spec, each, config, "cpu", None if values is None else values[shard], 2.0, level)
        for each, shard in zip(records, shards, strict=True)
    ]
    moments = outer_moments([advantage_moments(part, config) for part in parts])
    parts = [standardized(part, config, moments) for part in parts]
    for name, expected in whole._asdict().items():
        pieces = [getattr(part, name) for part in parts]
        if expected is None:
            assert pieces == [None] * 3, name
            continue
        torch.testing.assert_close(torch.cat(pieces), expected, rtol=1e-5, atol=1e-6, msg=name)
