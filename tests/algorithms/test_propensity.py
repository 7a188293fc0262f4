"""How likely stored episodes are to be of a task."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from builders import drop, make_policy, make_spec, toy_rollouts
from ssm_metarl.algorithms.collect import collect, played
from ssm_metarl.algorithms.propensity import TaskModel, effective_sample_size
from ssm_metarl.algorithms.rollouts import Rollouts
from ssm_metarl.seeds import seed_for
from ssm_metarl.tasks import make


def plays(name: str, tasks: list[Any], num_episodes: int = 1, seed: int = 0) -> tuple[Any, Rollouts]:
    """Random play of a family's tasks."""
    family = make(name)
    options = {"discrete": True, "action_size": 2} if name == "cartpole" else {"discrete": False, "action_size": 2}
    spec = make_spec(observation_size=family.observation_space.shape[0], num_layers=0, **options)  # type: ignore[index]
    policy = make_policy(spec, noise=0.0)
    nodes = [seed_for(seed, task) for task in range(len(tasks))]
    env = family.make_vector_env(tasks, num_episodes)
    return spec, played(collect(env, spec, policy.numpy_weights(), nodes, tasks, 60))


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
        _, own = plays("navigation-2d", [{"goal": [0.4, 0.3]}], num_episodes=4, seed=1)
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
        _, own = plays("cartpole", tasks[:1], num_episodes=3, seed=1)
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
