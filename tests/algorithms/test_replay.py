"""The replay buffer, and the propensities of what it holds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from builders import assert_same, drop, make_policy, make_spec, seeds, specs, toy_rollouts, uneven
from ssm_metarl.algorithms.collect import collect
from ssm_metarl.algorithms.propensity import TaskModel, effective_sample_size
from ssm_metarl.algorithms.replay import ReplayBuffer
from ssm_metarl.algorithms.rollouts import Rollouts
from ssm_metarl.seeds import seed_for
from ssm_metarl.tasks import make


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


def plays(name: str, tasks: list[Any], columns: int = 1, seed: int = 0) -> tuple[Any, Rollouts]:
    """Random play of a family's tasks."""
    family = make(name)
    options = {"discrete": True, "action_size": 2} if name == "cartpole" else {"discrete": False, "action_size": 2}
    spec = make_spec(observation_size=family.observation_space.shape[0], num_layers=0, **options)  # type: ignore[index]
    policy = make_policy(spec, noise=0.0)
    nodes = [seed_for(seed, task) for task in range(len(tasks))]
    env = family.make_vector_env(tasks, columns)
    return spec, collect(env, spec, policy.numpy_weights(), nodes, tasks, 60)


def model_for(spec: Any, stored: Rollouts, current: Rollouts, **options: Any) -> TaskModel:
    model = TaskModel(stored, spec, **options)
    model.observe(current)
    return model


class TestPropensity:
    def test_tasks_that_push_the_other_way_are_told_apart_from_one_episode(self) -> None:
        """Cart and pole in both directions: of 60 stored episodes, those of the current direction count."""
        family = make("cartpole")
        tasks = family.sample(60, np.random.default_rng(0), "train")
        spec, stored = plays("cartpole", tasks)
        current = {**tasks[0], "direction": 1}
        _, own = plays("cartpole", [current, {**current, "direction": -1}], seed=1)
        found = model_for(spec, stored, own).propensities()
        direction = np.array([task["direction"] for task in tasks])
        for row, sign in enumerate((1, -1)):
            assert found[row, direction == sign].mean() > 0.15
            assert found[row, direction != sign].max() < 0.2
            assert found[row, direction != sign].mean() < 0.01
        assert ((found >= 0) & (found <= 1)).all()

    def test_near_goals_are_likelier_than_far_ones(self) -> None:
        """The reward alone tells goals of the plane apart."""
        rng = np.random.default_rng(0)
        goals = rng.uniform(-0.5, 0.5, (80, 2)).tolist()
        spec, stored = plays("navigation-2d", [{"goal": goal} for goal in goals])
        _, own = plays("navigation-2d", [{"goal": [0.4, 0.3]}], columns=4, seed=1)
        found = model_for(spec, stored, own).propensities()[0]
        distance = np.linalg.norm(np.array(goals) - [0.4, 0.3], axis=1)
        assert stats.spearmanr(found, distance).statistic < -0.5
        assert found[distance < 0.3].mean() > 4 * found[distance > 0.7].mean()

    def test_garbage_is_weighted_away(self) -> None:
        family = make("cartpole")
        tasks = [family.sample(1, np.random.default_rng(0), "train")[0]] * 12
        spec, stored = plays("cartpole", tasks)
        rng = np.random.default_rng(1)
        garbage = stored.observations.copy()
        garbage[6:] = rng.normal(size=garbage[6:].shape)
        _, own = plays("cartpole", tasks[:1], columns=3, seed=1)
        found = model_for(spec, replace(stored, observations=garbage), own).propensities()[0]
        assert np.median(found[:6]) > 0.5
        assert found[6:].max() < 1e-6

    def test_more_episodes_are_taken_in(self) -> None:
        """What was seen of a task is kept: the same episodes at once or one after the other."""
        family = make("cartpole")
        tasks = family.sample(10, np.random.default_rng(0), "train")
        spec, stored = plays("cartpole", tasks)
        own = [plays("cartpole", tasks[:2], seed=seed)[1] for seed in (1, 2)]
        one = TaskModel(stored, spec)
        one.observe(own[0].beside(own[1]))
        other = TaskModel(stored, spec)
        for each in own:
            other.observe(each)
        np.testing.assert_allclose(other.propensities(), one.propensities(), rtol=1e-9)

    def test_a_task_of_which_nothing_was_seen_has_no_likely_episode(self) -> None:
        family = make("cartpole")
        tasks = family.sample(4, np.random.default_rng(0), "train")
        spec, stored = plays("cartpole", tasks)
        _, own = plays("cartpole", tasks[:2], seed=1)
        assert not model_for(spec, stored, drop(own, 1)).propensities()[1].any()

    def test_steps_that_a_new_episode_follows_are_left_out(self) -> None:
        """Within a trial the observation after an episode's end is the next one's first, and says nothing."""
        spec = make_spec(discrete=True)
        trial = toy_rollouts(spec, make_policy(spec).numpy_weights(), [{}], 1, 6)
        starts, jump = trial.starts.copy(), trial.observations.copy()
        starts[:, 3], jump[:, 3:] = True, jump[:, 3:] + 100.0
        cut = replace(trial, starts=starts, observations=jump, last_observations=trial.last_observations + 100.0)
        outputs = TaskModel(cut, spec)._steps(cut, cut.valid)[1]
        assert len(outputs) == 5
        assert np.abs(outputs[:, :3]).max() < 10


@given(weights=st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_effective_sample_size(weights: list[float]) -> None:
    """As many as there are where they are equal, one where one counts, 0 where none does."""
    found = float(effective_sample_size(np.array(weights)))
    assert 0 <= found <= len(weights) + 1e-9
    assert float(effective_sample_size(np.full(5, 0.3))) == pytest.approx(5)
    assert float(effective_sample_size(np.array([0.0, 0.7, 0.0]))) == pytest.approx(1)
    assert float(effective_sample_size(np.zeros(3))) == 0
