"""The replay buffer, and the propensities of what it holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from builders import assert_same, drop, make_policy, make_spec, seeds, specs, toy_rollouts, uneven
from ssm_metarl.algorithms.replay import ReplayBuffer
from ssm_metarl.algorithms.rollouts import Rollouts


def record(spec: Any, tasks: int = 4, seed: int = 0) -> Rollouts:
    return toy_rollouts(spec, make_policy(spec).numpy_weights(), uneven(tasks, 3, 7, seed), 3, 7, seed)


def filled(spec: Any, capacity: int = 9, count: int = 3) -> ReplayBuffer:
    replay = ReplayBuffer(capacity)
    for seed in range(count):
        replay.add(record(spec, seed=seed))
    return replay


class TestBuffer:
    @pytest.mark.parametrize("discrete", [False, True])
    def test_it_holds_the_first_episode_of_each_task_of_the_last_records(self, discrete: bool) -> None:
        spec = make_spec(discrete=discrete)
        records = [record(spec, seed=seed) for seed in range(3)]
        replay = ReplayBuffer(9)
        for each in records:
            replay.add(each)
        held = replay.rollouts()
        assert len(replay) == held.num_tasks == 9
        first = [(records[0], 3), *((r, task) for r in records[1:] for task in range(4))]
        for row, (source, task) in enumerate(first):
            length = int(source.lengths()[task, 0])
            assert held.lengths()[row, 0] == length
            for name in ("observations", "actions", "rewards", "log_probs", "starts", "resets", "terminated"):
                expected = getattr(source, name)[task, :length, 0]
                np.testing.assert_array_equal(getattr(held, name)[row, :length, 0], expected)
            np.testing.assert_array_equal(held.last_observations[row, 0], source.last_observations[task, 0])
            assert held.tasks[row] == source.tasks[task]

    def test_a_lost_episode_is_passed_over(self) -> None:
        spec = make_spec()
        whole = record(spec)
        replay = ReplayBuffer(10)
        replay.add(drop(drop(whole, 1, 0), 2))
        assert [task["best"] for task in replay.rollouts().tasks] == [0, 1, 1]
        length = int(whole.lengths()[1, 1])
        np.testing.assert_array_equal(replay.rollouts().rewards[1, :length, 0], whole.rewards[1, :length, 1])

    @given(spec=specs(), seed=seeds)
    @settings(deadline=None, max_examples=20)
    def test_arrays_and_back(self, spec: Any, seed: int) -> None:
        replay = ReplayBuffer(5)
        replay.add(record(spec, seed=seed))
        again = ReplayBuffer.from_arrays(replay.arrays(), spec)
        assert again.capacity == 5
        assert_same(again.rollouts(), replay.rollouts())

    def test_memory_is_what_is_stated_and_bounded(self) -> None:
        spec = make_spec()
        replay = ReplayBuffer(3)
        for seed in range(4):
            replay.add(record(spec, seed=seed))
            assert 0 < replay.nbytes <= ReplayBuffer.bound(spec, 3, 7)
        tasks = [{"ends": [7] * 3}] * 4
        full = toy_rollouts(spec, make_policy(spec).numpy_weights(), tasks, 3, 7)
        replay.add(full)
        assert replay.nbytes == ReplayBuffer.bound(spec, 3, 7)

    def test_it_does_not_keep_the_records_alive(self) -> None:
        spec = make_spec()
        whole = record(spec)
        replay = ReplayBuffer(3)
        replay.add(whole)
        before = replay.rollouts()
        whole.rewards[:] = 7.0
        assert_same(replay.rollouts(), before)

    @pytest.mark.parametrize("capacity", [0, -1, 2.5, True])
    def test_an_impossible_capacity_is_refused(self, capacity: Any) -> None:
        with pytest.raises(ValueError, match="replay_episodes must be"):
            ReplayBuffer(capacity)

    def test_an_empty_one_holds_nothing(self) -> None:
        assert ReplayBuffer(3).arrays() == {}
        assert ReplayBuffer(3).nbytes == 0
        with pytest.raises(ValueError, match="holds no episode"):
            ReplayBuffer(3).rollouts()

    @pytest.mark.parametrize(
        ("name", "change", "message"),
        [
            ("rewards", lambda x: x[:-1], "'rewards' is float32"),
            ("rewards", lambda x: x.astype(np.float64), "'rewards' is float64"),
            ("rewards", lambda x: np.full_like(x, np.nan), "NaN or infinite"),
            ("observations", lambda x: x[:, :2], "another policy, or damaged"),
            ("actions", lambda x: x + 5, "not all in 0..1"),
            ("lengths", lambda x: x * 0, "not positive"),
            ("lengths", lambda x: x + 1, "instead of"),
            ("lengths", lambda x: x[:0], "not positive"),
            ("capacity", lambda x: x * 0 + 1, "at least as many episodes"),
            ("tasks", lambda x: x[:-1], "not a JSON list"),
            ("tasks", lambda x: np.frombuffer(b"[1]", np.uint8), "one task an episode"),
            ("log_probs", None, "missing"),
        ],
    )
    def test_what_is_no_replay_is_refused(self, name: str, change: Any, message: str) -> None:
        spec = make_spec(discrete=True)
        arrays = filled(spec).arrays()
        if change is None:
            del arrays[name]
        else:
            arrays[name] = change(arrays[name])
        with pytest.raises(ValueError, match=message):
            ReplayBuffer.from_arrays(arrays, spec)

    def test_of_another_policy_is_refused(self) -> None:
        arrays = filled(make_spec()).arrays()
        with pytest.raises(ValueError, match="another policy"):
            ReplayBuffer.from_arrays(arrays, make_spec(observation_size=4))
