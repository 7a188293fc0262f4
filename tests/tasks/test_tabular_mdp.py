"""`tabular-mdp` against a plain scalar game, its distributions, its best policy and its options."""

from __future__ import annotations

import itertools
from typing import Any

import cloudpickle
import numpy as np
import pytest
from gymnasium.utils.seeding import np_random
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ssm_metarl.tasks.tabular_mdp import TabularEnv, TabularMDP, backward_induction


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_envs=st.integers(1, 5), states=st.integers(1, 5), length=st.integers(1, 6))
def test_equals_a_scalar_game(seed: int, num_envs: int, states: int, length: int) -> None:
    """One MDP, one step, one number at a time, through the episodes that follow."""
    rng = np.random.default_rng(seed)
    family = TabularMDP(states=states, actions=3, episode_length=length)
    tasks = family.sample(num_envs, rng)
    means, transitions = family.dynamics(tasks)
    envs = family.make_vector_env(tasks, 1)
    observations, _ = envs.reset(seed=seed)
    generators = [np_random(seed + slot)[0] for slot in range(num_envs)]
    for _ in range(3):
        np.testing.assert_array_equal(observations.argmax(axis=1), 0)  # every episode starts in state 0
        noise = [(generator.standard_normal(length), generator.random(length)) for generator in generators]
        current = [0] * num_envs
        for step in range(length):
            actions = rng.integers(0, 3, num_envs)
            observations, rewards, terminated, truncated, infos = envs.step(actions)
            last = step == length - 1
            assert (terminated == last).all()  # a true end: the problem is finite
            assert (truncated == last).all()
            assert bool(infos) == last
            for i, action in enumerate(actions):
                normal, luck = noise[i][0][step], noise[i][1][step]
                assert rewards[i] == np.float32(means[i, current[i], action] + normal)
                bounds = np.cumsum(transitions[i, current[i], action])[:-1]
                current[i] = sum(luck >= bound for bound in bounds)
                seen = infos["final_obs"][i] if last else observations[i]
                np.testing.assert_array_equal(seen, np.eye(states)[current[i]])
            assert observations in envs.observation_space


def test_rewards_and_next_states_follow_the_tables() -> None:
    num_episodes = 20_000
    means = np.array([[[0.5, -2.0], [3.0, 1.0], [0.0, 0.0]]])
    transitions = np.array([[[[0.2, 0.5, 0.3], [0, 0, 1]], [[1, 0, 0], [0, 1, 0]], [[0, 1, 0], [0.5, 0, 0.5]]]])
    envs = TabularEnv(means, transitions, num_episodes, episode_length=2)
    states = envs.reset(seed=0)[0].argmax(axis=1)
    for step, actions in enumerate(np.random.default_rng(0).integers(0, 2, (2, num_episodes))):
        before = states
        observations, rewards, _, _, infos = envs.step(actions)
        states = (np.stack(infos["final_obs"]) if step else observations).argmax(axis=1)
        for state, action in itertools.product(np.unique(before), (0, 1)):
            here = (before == state) & (actions == action)
            drawn, count = rewards[here], np.count_nonzero(here)
            assert drawn.mean() == pytest.approx(means[0, state, action], abs=4.5 / count**0.5)
            assert drawn.std() == pytest.approx(1.0, abs=4.5 / (2 * count) ** 0.5)
            shares = np.bincount(states[here], minlength=3) / count
            np.testing.assert_allclose(shares, transitions[0, state, action], atol=4.5 * 0.5 / count**0.5)
            impossible = transitions[0, state, action] == 0
            assert (shares[impossible] == 0).all()


def test_rewards_tell_nothing_of_the_next_state() -> None:
    family = TabularMDP(states=2, actions=2, episode_length=1)
    num_episodes = 20_000
    envs = family.make_vector_env(family.sample(1, np.random.default_rng(0)), num_episodes)
    envs.reset(seed=0)
    _, rewards, _, _, infos = envs.step(np.zeros(num_episodes, int))
    follows = np.stack(infos["final_obs"])[:, 0]
    assert abs(np.corrcoef(rewards, follows)[0, 1]) < 4.5 / num_episodes**0.5


def test_distribution_of_the_mdps() -> None:
    family = TabularMDP()
    means, transitions = family.dynamics(family.sample(400, np.random.default_rng(0)))
    assert means.shape == (400, 10, 5)
    assert transitions.shape == (400, 10, 5, 10)
    assert means.mean() == pytest.approx(1.0, abs=4.5 / means.size**0.5)
    assert means.std() == pytest.approx(1.0, abs=4.5 / (2 * means.size) ** 0.5)
    np.testing.assert_allclose(transitions.sum(axis=-1), 1.0, rtol=1e-12)
    # A coordinate of a flat Dirichlet draw over S is Beta(1, S - 1): P(p > x) = (1 - x)^(S - 1).
    survival = (1 - transitions.ravel()) ** 9
    np.testing.assert_allclose(np.quantile(survival, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.01)
    assert transitions.var() == pytest.approx(9 / (100 * 11), rel=0.02)


def test_an_mdp_depends_on_its_seed_alone() -> None:
    family = TabularMDP()
    tasks = family.sample(5, np.random.default_rng(0))
    means, transitions = family.dynamics(tasks)
    for chosen in ([3], [4, 0]):
        some_means, some_transitions = family.dynamics([tasks[m] for m in chosen])
        np.testing.assert_array_equal(some_means, means[chosen])
        np.testing.assert_array_equal(some_transitions, transitions[chosen])
    assert len(np.unique(means)) == means.size


def test_a_slot_reset_with_the_tasks_seed_is_not_told_its_tables() -> None:
    """Small numbers are used for both: the same stream would make an episode's noise the table's first rows."""
    family = TabularMDP()
    means, _ = family.dynamics([{"seed": 3}])
    envs = family.make_vector_env([{"seed": 3}], 1)
    observations, _ = envs.reset(seed=3)
    noise = []
    for _ in range(10):
        state = int(observations[0].argmax())
        observations, rewards, *_ = envs.step(np.array([0]))
        noise.append(float(rewards[0]) - means[0, state, 0])
    assert abs(np.corrcoef(noise, means.ravel()[:10])[0, 1]) < 0.9


def played(family: TabularMDP, tasks: list[Any], num_episodes: int, seeds: Any, actions: NDArray[Any]) -> NDArray[Any]:
    """Observations and rewards [T, N, S + 1] of the actions [T, N]."""
    envs: Any = family.make_vector_env(tasks, num_episodes)
    envs.reset(seed=seeds)
    steps = [envs.step(step)[:2] for step in actions]
    return np.stack([np.concatenate([observations, rewards[:, None]], axis=1) for observations, rewards in steps])


def test_a_slot_is_the_same_alone_and_beside_others() -> None:
    family, rng = TabularMDP(), np.random.default_rng(0)
    tasks = family.sample(4, rng)
    seeds = rng.integers(2**32, size=(4, 3))
    actions = rng.integers(0, 5, (25, 4, 3))  # two episodes and a half
    together = played(family, tasks, 3, seeds.ravel().tolist(), actions.reshape(25, 12)).reshape(25, 4, 3, -1)
    for m in range(4):
        for k in range(3):
            alone = played(family, [tasks[m]], 1, [int(seeds[m, k])], actions[:, m, k, None])
            np.testing.assert_array_equal(alone[:, 0], together[:, m, k])


# --- The best policy --------------------------------------------------------------------------------------


def value_of(policy: Any, means: NDArray[Any], transitions: NDArray[Any], steps: int) -> NDArray[Any]:
    """Value of an episode from each state under `policy[step][state]`, by following every path's probability."""
    values = []
    for start in range(len(means)):
        share, total = np.eye(len(means))[start], 0.0
        for step in range(steps):
            chosen = [policy[step][state] for state in range(len(means))]
            total += sum(share[state] * means[state, action] for state, action in enumerate(chosen))
            share = sum(share[state] * transitions[state, action] for state, action in enumerate(chosen))
        values.append(total)
    return np.array(values)


@pytest.mark.parametrize("seed", range(5))
def test_backward_induction_finds_the_best_of_all_policies(seed: int) -> None:
    family, steps = TabularMDP(states=2, actions=2, episode_length=3), 3
    means, transitions = family.dynamics([{"seed": seed}])
    actions, values = backward_induction(means, transitions, steps)
    assert actions.shape == (3, 1, 2)
    assert values.shape == (1, 2)
    policies = itertools.product(itertools.product((0, 1), repeat=2), repeat=steps)
    best = np.max([value_of(policy, means[0], transitions[0], steps) for policy in policies], axis=0)
    np.testing.assert_allclose(values[0], best, rtol=1e-12)
    np.testing.assert_allclose(value_of(actions[:, 0], means[0], transitions[0], steps), best, rtol=1e-12)


def test_a_known_optimum() -> None:
    """Two states: 1 pays 10 to who stays, but the way there costs 1, which pays off unless the end is near."""
    means = np.array([[0.5, -1.0], [10.0, 0.0]])
    transitions = np.array([[[1, 0], [0, 1]], [[0, 1], [1, 0]]], dtype=float)
    actions, values = backward_induction(means, transitions, 4)
    np.testing.assert_array_equal(actions[:, 0], [1, 1, 1, 0])  # nothing follows the last step
    np.testing.assert_array_equal(values, [-1 + 10 * 3, 10 * 4])


def test_the_optimum_is_reached_by_playing_it() -> None:
    family, num_episodes = TabularMDP(), 2000
    means, transitions = family.dynamics([{"seed": 0}])
    actions, values = backward_induction(means[0], transitions[0], 10)
    envs = TabularEnv(means, transitions, num_episodes, 10)
    observations, _ = envs.reset(seed=0)
    returns = np.zeros(num_episodes)
    for step in range(10):
        observations, rewards, *_ = envs.step(actions[step, observations.argmax(axis=1)])
        returns += rewards
    assert returns.mean() == pytest.approx(values[0], abs=4.5 * returns.std() / num_episodes**0.5)


# --- Options and tasks ------------------------------------------------------------------------------------


def test_tasks_and_splits() -> None:
    family = TabularMDP()
    assert family.splits == ("train", "validation", "test")
    tasks = family.sample(1000, np.random.default_rng(0))
    assert all(isinstance(task["seed"], int) and task.keys() == {"seed"} for task in tasks)
    assert len({task["seed"] for task in tasks}) == 1000
    with pytest.raises(ValueError, match="no split 'shifted'"):
        family.sample(1, np.random.default_rng(0), "shifted")


def test_options_belong_to_the_instance() -> None:
    small, usual = TabularMDP(states=3, actions=2, episode_length=4), TabularMDP()
    assert (small.horizon, small.action_space.n, small.observation_space.shape) == (4, 2, (3,))
    assert (usual.horizon, usual.action_space.n, usual.observation_space.shape) == (10, 5, (10,))
    reference = small.reference
    assert reference.random == 4
    assert reference.oracle is not None
    assert reference.random < reference.oracle
    copy = cloudpickle.loads(cloudpickle.dumps(small))
    assert (copy.horizon, copy.action_space, copy.reference) == (4, small.action_space, reference)
    assert TabularMDP(states=3, actions=2, episode_length=4).reference == reference


@pytest.mark.parametrize("wrong", [0, -3, 1.5, 5.0, "5", None, True, np.nan])
@pytest.mark.parametrize(("option", "least"), [("states", 1), ("actions", 2), ("episode_length", 1)])
def test_impossible_options_are_refused(option: str, least: int, wrong: Any) -> None:
    with pytest.raises(ValueError, match=f"^{option} must be an integer of {least} or more, not ") as error:
        TabularMDP(**{option: wrong})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("wrong", [-1, 2**53, 0.5, 3.0, True, "3", None, [3], np.nan])
def test_impossible_tasks_are_named(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"Task 1: 'seed' must be a whole number in \[0, 9007199254740991\], not "):
        TabularMDP().make_vector_env([{"seed": 0}, {"seed": wrong}], 1)


@pytest.mark.parametrize("wrong", [5, -1, 0.5, np.nan])
def test_unknown_actions_are_refused(wrong: float) -> None:
    envs = TabularMDP().make_vector_env([{"seed": 0}], 2)
    envs.reset(seed=0)
    with pytest.raises(ValueError, match="tabular-mdp must be a whole number from 0 to 4"):
        envs.step(np.array([0, wrong]))
