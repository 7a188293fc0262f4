"""`bandit` against a plain scalar game, its odds, its ends and its options."""

from __future__ import annotations

from typing import Any

import cloudpickle
import numpy as np
import pytest
from gymnasium.utils.seeding import np_random
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ssm_metarl.tasks.bandit import Bandit


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_envs=st.integers(1, 6), arms=st.integers(2, 5), pulls=st.integers(1, 7))
def test_equals_a_scalar_game(seed: int, num_envs: int, arms: int, pulls: int) -> None:
    """One bandit, one pull, one number at a time, through the episodes that follow."""
    rng = np.random.default_rng(seed)
    family = Bandit(arms=arms, pulls=pulls)
    tasks = family.sample(num_envs, rng)
    envs = family.make_vector_env(tasks, 1)
    envs.reset(seed=seed)
    generators = [np_random(seed + slot)[0] for slot in range(num_envs)]
    for _ in range(3):
        luck = [generator.random(pulls) for generator in generators]
        for pull in range(pulls):
            actions = rng.integers(0, arms, num_envs)
            observations, rewards, terminated, truncated, infos = envs.step(actions)
            for i in range(num_envs):
                assert rewards[i] == float(luck[i][pull] < tasks[i]["probabilities"][actions[i]])
            last = pull == pulls - 1
            assert (terminated == last).all()  # a true end: the problem is finite
            assert (truncated == last).all()
            assert bool(infos) == last
            np.testing.assert_array_equal(observations, np.zeros((num_envs, 1)))
            assert observations in envs.observation_space


def test_an_arm_pays_as_often_as_its_task_says() -> None:
    odds, num_episodes = [0.0, 0.1, 0.5, 0.93, 1.0], 4000
    envs = Bandit(pulls=5).make_vector_env([{"probabilities": odds}], num_episodes)
    envs.reset(seed=0)
    for _ in range(2):
        for arm, chance in enumerate(odds):
            _, rewards, *_ = envs.step(np.full(num_episodes, arm))
            assert set(np.unique(rewards)) <= {0.0, 1.0}
            deviation = (chance * (1 - chance) / num_episodes) ** 0.5
            assert rewards.mean() == pytest.approx(chance, abs=4 * deviation)


def test_payments_are_independent() -> None:
    """From pull to pull, from episode to episode and from slot to slot."""
    num_episodes, pulls = 2000, 6
    envs = Bandit(pulls=pulls).make_vector_env([{"probabilities": [0.5] * 5}], num_episodes)
    envs.reset(seed=1)
    payments = np.stack([envs.step(np.zeros(num_episodes, int))[1] for _ in range(2 * pulls)])
    correlations = np.corrcoef(payments) - np.eye(2 * pulls)
    assert np.abs(correlations).max() < 4.5 / num_episodes**0.5
    neighbours = np.corrcoef(payments[:, :-1].ravel(), payments[:, 1:].ravel())[0, 1]
    assert abs(neighbours) < 4.5 / payments.size**0.5


def played(family: Bandit, tasks: list[Any], num_episodes: int, seeds: Any, actions: NDArray[Any]) -> NDArray[Any]:
    """Rewards [T, N] of the actions [T, N]."""
    envs: Any = family.make_vector_env(tasks, num_episodes)
    envs.reset(seed=seeds)
    return np.stack([envs.step(step)[1] for step in actions])


def test_a_slot_is_the_same_alone_and_beside_others() -> None:
    family, rng = Bandit(pulls=20), np.random.default_rng(0)
    tasks = family.sample(4, rng)
    seeds = rng.integers(2**32, size=(4, 3))
    actions = rng.integers(0, 5, (50, 4, 3))  # two episodes and a half
    together = played(family, tasks, 3, seeds.ravel().tolist(), actions.reshape(50, 12)).reshape(50, 4, 3)
    for m in range(4):
        for k in range(3):
            alone = played(family, [tasks[m]], 1, [int(seeds[m, k])], actions[:, m, k, None])
            np.testing.assert_array_equal(alone[:, 0], together[:, m, k])


def test_the_odds_do_not_change_the_luck() -> None:
    """Common random numbers: a better arm pays wherever a worse one did."""
    rewards = [
        played(Bandit(), [{"probabilities": [chance] * 5}], 50, 3, np.zeros((100, 50), int)) for chance in (0.3, 0.6)
    ]
    assert (rewards[0] <= rewards[1]).all()
    assert rewards[0].mean() < rewards[1].mean()


@pytest.mark.parametrize("split", Bandit().splits)
def test_odds_are_uniform(split: str) -> None:
    odds = np.array([task["probabilities"] for task in Bandit().sample(4000, np.random.default_rng(0), split)])
    assert odds.shape == (4000, 5)
    np.testing.assert_allclose(np.quantile(odds, [0.1, 0.5, 0.9], axis=0), [[0.1] * 5, [0.5] * 5, [0.9] * 5], atol=0.04)
    assert np.abs(np.corrcoef(odds.T) - np.eye(5)).max() < 0.07
    assert odds.max(axis=1).mean() == pytest.approx(5 / 6, abs=0.01)


def test_there_is_no_shifted_split() -> None:
    assert Bandit().splits == ("train", "validation", "test")
    with pytest.raises(ValueError, match="no split 'shifted'") as error:
        Bandit().sample(1, np.random.default_rng(0), "shifted")
    assert "train" in str(error.value)


def test_options_belong_to_the_instance() -> None:
    small, usual = Bandit(arms=3, pulls=7), Bandit()
    assert (small.horizon, small.action_space.n) == (7, 3)
    assert (usual.horizon, usual.action_space.n) == (100, 5)
    assert usual.reference.random == 50
    assert usual.reference.oracle == pytest.approx(500 / 6)
    copy = cloudpickle.loads(cloudpickle.dumps(small))
    assert (copy.horizon, copy.action_space, copy.reference) == (7, small.action_space, small.reference)
    assert copy.sample(2, np.random.default_rng(0)) == small.sample(2, np.random.default_rng(0))


@pytest.mark.parametrize("wrong", [0, -3, 1.5, 5.0, "5", None, True, np.nan])
@pytest.mark.parametrize(("option", "least"), [("arms", 2), ("pulls", 1)])
def test_impossible_options_are_refused(option: str, least: int, wrong: Any) -> None:
    with pytest.raises(ValueError, match=f"^{option} must be an integer of {least} or more, not ") as error:
        Bandit(**{option: wrong})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "wrong", [[0.5] * 4, [0.5] * 6, 0.5, [0.5, 0.5, 0.5, 0.5, 1.1], [0.5, 0.5, -0.1, 0.5, 0.5], [np.nan] * 5, None, []]
)
def test_impossible_tasks_are_named(wrong: Any) -> None:
    good = {"probabilities": [0.5] * 5}
    with pytest.raises(ValueError, match=r"Task 1: 'probabilities' must be a list of 5 numbers in \[0, 1\]"):
        Bandit().make_vector_env([good, {"probabilities": wrong}], 1)


@pytest.mark.parametrize("wrong", [5, -1, 0.5, np.nan])
def test_unknown_actions_are_refused(wrong: float) -> None:
    envs = Bandit().make_vector_env([{"probabilities": [0.5] * 5}], 2)
    envs.reset(seed=0)
    with pytest.raises(ValueError, match="bandit must be a whole number from 0 to 4"):
        envs.step(np.array([0, wrong]))


@pytest.mark.parametrize("arms", [2, 5, 10, 50])
def test_options_in_context_follow_from_the_number_of_arms(arms: int) -> None:
    """Of the inputs arms + 3, few of which are not 0, each has the same weight; many arms have short stretches."""
    options = Bandit(arms=arms).in_context
    assert options["encoder_scale"] * (arms + 3) ** -0.5 == pytest.approx(5**0.5)
    assert options["gae_lambda"] == (0.9 if arms <= 10 else 0.8)
