"""The record: joining, cutting and totals."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import ARRAYS, assert_same, drop, make_policy, make_spec, seeds, spoil, toy_rollouts, uneven
from ssm_metarl.algorithms.collect import blank
from ssm_metarl.algorithms.rollouts import Rollouts


def record(tasks: int, discrete: bool, seed: int, horizon: int = 6) -> Rollouts:
    spec = make_spec(discrete=discrete)
    return toy_rollouts(spec, make_policy(spec).numpy_weights(), uneven(tasks, 3, horizon, seed), 3, horizon, seed)


@settings(max_examples=30)
@given(seed=seeds, discrete=st.booleans(), cut=st.integers(1, 3))
def test_parts_of_a_record_join_to_it(seed: int, discrete: bool, cut: int) -> None:
    whole = record(4, discrete, seed)
    assert_same(Rollouts.concatenate([whole.select(slice(0, cut)), whole.select(slice(cut, 4))]), whole)


@settings(max_examples=30)
@given(seed=seeds, discrete=st.booleans(), horizons=st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_parts_of_other_lengths_are_padded_with_what_is_not_valid(seed: int, discrete: bool, horizons: Any) -> None:
    parts = [record(2, discrete, seed + i, horizon) for i, horizon in enumerate(horizons)]
    joined = Rollouts.concatenate(parts)
    assert joined.num_tasks == 2 * len(parts)
    assert joined.num_steps == sum(part.num_steps for part in parts)
    for i, part in enumerate(parts):
        own, steps = joined.select(slice(2 * i, 2 * i + 2)), part.valid.shape[1]
        for name in ARRAYS:
            array = getattr(own, name)
            if name != "last_observations":
                assert not array[:, steps:].any(), name
                array = array[:, :steps]
            np.testing.assert_array_equal(array, getattr(part, name), err_msg=name)
        np.testing.assert_array_equal(own.returns(), part.returns())


def test_totals_are_of_valid_steps_and_kept_slots() -> None:
    whole = record(2, False, 0)
    valid = whole.valid.copy()
    valid[1, :, 2] = False
    whole = dataclasses.replace(whole, valid=valid, rewards=np.where(valid, whole.rewards, np.nan))
    assert whole.kept().tolist() == [[True] * 3, [True, True, False]]
    assert whole.lengths()[1, 2] == 0
    assert whole.num_steps == whole.lengths().sum() == valid.sum()
    assert np.isnan(whole.returns()).tolist() == [[False] * 3, [False, False, True]]
    expected = sum(float(whole.rewards[0, t, 1]) for t in range(valid.shape[1]) if valid[0, t, 1])
    assert whole.returns()[0, 1] == pytest.approx(expected)


def test_a_trials_return_is_that_of_its_episodes() -> None:
    one = record(2, False, 3)
    valid, starts = np.ones_like(one.valid), np.zeros_like(one.starts)
    starts[:, 0] = starts[0, 2] = starts[0, 4, 0] = True  # three, two and two episodes of the first task
    valid[0, 5, 2] = False
    rewards = np.random.default_rng(0).normal(size=valid.shape).astype(np.float32)
    trials = drop(dataclasses.replace(one, valid=valid, starts=starts, rewards=rewards), 1, 0)
    found = trials.returns_by_episode()
    assert found.shape == (2, 3, 3)
    np.testing.assert_allclose(found[0, 0], [rewards[0, a : a + 2, 0].sum() for a in (0, 2, 4)], rtol=1e-6)
    np.testing.assert_allclose(found[0, 2, :2], [rewards[0, :2, 2].sum(), rewards[0, 2:5, 2].sum()], rtol=1e-6)
    assert np.isnan(found).sum(2).tolist() == [[0, 1, 1], [3, 2, 2]]
    np.testing.assert_allclose(np.nansum(found, 2)[trials.kept()], trials.returns()[trials.kept()])


def test_the_share_of_successes_is_of_episodes_that_were_played() -> None:
    one = record(2, False, 3)
    assert one.success_rates() is None
    starts, successes = np.zeros_like(one.starts), np.zeros((2, 3, 3), bool)
    starts[:, 0] = starts[0, 2, :2] = True  # two episodes of the first task's first two slots
    successes[0] = [[True, False, False], [True, True, False], [False, True, False]]  # the last was not played
    said = dataclasses.replace(one, valid=np.ones_like(one.valid), starts=starts, successes=successes)
    np.testing.assert_array_equal(said.success_rates(), [2 / 6, 1 / 2, np.nan])
    lost = blank(make_spec(), [{}], 3, ["it broke"])
    joined = Rollouts.concatenate([lost, said.select(slice(0, 1)), said.select(slice(1, 2))])
    np.testing.assert_array_equal(joined.success_rates(), said.success_rates())
    assert joined.trimmed().select(slice(1, 3)).successes.tolist() == successes.tolist()  # type: ignore[union-attr]
    assert said.beside(said).successes is None


def test_an_empty_record_joins_and_says_what_was_lost() -> None:
    whole = record(2, True, 0)
    lost = blank(make_spec(discrete=True), [{"a": 1}], 3, ["it broke"])
    joined = Rollouts.concatenate([whole, lost])
    assert joined.tasks[-1] == {"a": 1}
    assert joined.errors == ("it broke",)
    assert not joined.kept()[-1].any()
    assert_same(joined.select(slice(0, 2)), whole)
    for name in ARRAYS:
        assert getattr(lost, name).dtype == getattr(whole, name).dtype


@settings(max_examples=20)
@given(seed=seeds, shard=st.integers(0, 3), own=st.booleans())
def test_a_shard_is_the_same_from_whatever_record_it_was_cut(seed: int, shard: int, own: bool) -> None:
    """Padding, order in memory and what stood beside it leave no trace."""
    whole = record(4, True, seed)
    alone = dataclasses.replace(whole.select(slice(shard, shard + 1)))
    longer = Rollouts.concatenate([alone.trimmed(), record(1, True, seed + 1, horizon=9)]).select(slice(0, 1))
    for name in ARRAYS:
        getattr(longer, name).flags.writeable = own
    one, other = alone.trimmed(), longer.trimmed()
    assert_same(one, other)
    np.testing.assert_array_equal(one.returns(), alone.returns())
    for name in ARRAYS:
        flags = getattr(other, name).flags
        assert flags.c_contiguous
        assert flags.writeable


def test_nothing_cannot_be_joined() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Rollouts.concatenate([])


@settings(max_examples=20)
@given(seed=seeds, discrete=st.booleans())
def test_masked_forgets_numbers_that_are_not_valid(seed: int, discrete: bool) -> None:
    whole = record(2, discrete, seed)
    masked = spoil(whole, seed).masked()
    for name in ("observations", "actions", "rewards", "log_probs", "valid"):
        np.testing.assert_array_equal(getattr(masked, name), getattr(whole, name), err_msg=name)
        assert getattr(masked, name).dtype == getattr(whole, name).dtype
