"""The families' reference returns are measured, not chosen; run as a script, this file prints them anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ssm_metarl.tasks import Task, TaskDistribution, make
from ssm_metarl.tasks.bandit import Bandit
from ssm_metarl.tasks.tabular_mdp import START, TabularMDP, backward_induction, measure_reference

Floats = NDArray[np.float32]
Returns = NDArray[np.float64]
Player = Callable[[Floats, list[Task], np.random.Generator], NDArray[Any]]
"""Observations [N, O] and the N tasks to actions."""


def gaussian(observations: Floats, tasks: list[Task], rng: np.random.Generator) -> NDArray[Any]:
    return rng.normal(0.0, 0.05, observations.shape).astype(np.float32)


def straight_to_goal(observations: Floats, tasks: list[Task], rng: np.random.Generator) -> NDArray[Any]:
    goals = np.array([task["goal"] for task in tasks], dtype=np.float32)
    return goals - observations


def either_push(observations: Floats, tasks: list[Task], rng: np.random.Generator) -> NDArray[Any]:
    return rng.integers(0, 2, len(observations))


def any_suit(observations: Floats, tasks: list[Task], rng: np.random.Generator) -> NDArray[Any]:
    return rng.integers(0, 4, len(observations))


def any_of_five(observations: Floats, tasks: list[Task], rng: np.random.Generator) -> NDArray[Any]:
    return rng.integers(0, 5, len(observations))


def best_arm(observations: Floats, tasks: list[Task], rng: np.random.Generator) -> NDArray[Any]:
    return np.argmax([task["probabilities"] for task in tasks], axis=1)


def first_returns(distribution: TaskDistribution, play: Player, episodes: int, seed: int) -> Returns:
    """Returns [episodes] of one episode on each of as many training tasks."""
    rng = np.random.default_rng(seed)
    tasks = distribution.sample(episodes, rng)
    envs = distribution.make_vector_env(tasks, num_episodes=1)
    observations, _ = envs.reset(seed=rng.integers(2**63, size=episodes).tolist())
    returns, running = np.zeros(episodes), np.ones(episodes, dtype=bool)
    while running.any():
        observations, rewards, terminated, truncated, _ = envs.step(play(observations, tasks, rng))
        returns += np.where(running, rewards, 0.0)
        running &= ~(terminated | truncated)
    return returns


RANDOM: dict[str, Player] = {
    "navigation-2d": gaussian,
    "cartpole": either_push,
    "bandit": any_of_five,
    "tabular-mdp": any_of_five,
    "repeat-previous": any_suit,
    "noisy-position-only-cartpole": either_push,
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_return(name: str) -> None:
    episodes = 4000
    reference = make(name).reference
    returns = first_returns(make(name), RANDOM[name], episodes, seed=1)
    assert returns.mean() == pytest.approx(reference.random, abs=4 * reference.random_sd / episodes**0.5)
    # Four standard errors of a standard deviation; a heavy tail widens it (kurtosis).
    kurtosis = np.mean((returns - returns.mean()) ** 4) / returns.var() ** 2
    assert returns.std() == pytest.approx(
        reference.random_sd, abs=4 * reference.random_sd * ((kurtosis - 1) / (4 * episodes)) ** 0.5
    )


def test_navigation_oracle() -> None:
    distribution = make("navigation-2d")
    returns = first_returns(distribution, straight_to_goal, 10_000, seed=2)
    assert returns.mean() == pytest.approx(distribution.reference.oracle, abs=4 * returns.std() / 100)


def test_cartpole_oracle_is_the_most_there_is() -> None:
    distribution = make("cartpole")
    assert distribution.reference.oracle == distribution.horizon  # a reward of 1 a step


@pytest.mark.parametrize("options", [{}, {"arms": 2, "pulls": 7}, {"arms": 9, "pulls": 30}])
def test_bandit_reference_is_exact_for_all_sizes(options: dict[str, int]) -> None:
    distribution = Bandit(**options)
    best = first_returns(distribution, best_arm, 10_000, seed=2)
    assert best.mean() == pytest.approx(distribution.reference.oracle, abs=4 * best.std() / 100)

    def any_arm(observations: Floats, tasks: list[Task], rng: np.random.Generator) -> NDArray[Any]:
        return rng.integers(0, distribution.arms, len(observations))

    chance = first_returns(distribution, any_arm, 10_000, seed=3)
    assert chance.mean() == pytest.approx(distribution.reference.random, abs=4 * chance.std() / 100)
    assert chance.std() == pytest.approx(distribution.reference.random_sd, rel=0.04)


def test_tabular_mdp_oracle() -> None:
    """Of other tasks than those that the printed figure comes from."""
    distribution = TabularMDP()
    tasks = distribution.sample(4000, np.random.default_rng(2))
    values = backward_induction(*distribution.dynamics(tasks), distribution.horizon)[1][:, START]
    assert values.mean() == pytest.approx(distribution.reference.oracle, abs=4 * values.std() / 4000**0.5)


def test_tabular_mdp_reference_for_other_sizes() -> None:
    distribution = TabularMDP(states=3, actions=4, episode_length=6)

    def any_action(observations: Floats, tasks: list[Task], rng: np.random.Generator) -> NDArray[Any]:
        return rng.integers(0, distribution.actions, len(observations))

    chance = first_returns(distribution, any_action, 10_000, seed=3)
    assert chance.mean() == pytest.approx(distribution.reference.random, abs=4 * chance.std() / 100)
    assert chance.std() == pytest.approx(distribution.reference.random_sd, rel=0.06)


@pytest.mark.parametrize("name", RANDOM)
def test_the_oracle_beats_chance(name: str) -> None:
    reference = make(name).reference
    assert reference.oracle is not None
    assert reference.random + 2 * reference.random_sd < reference.oracle


def _print_references(batches: int = 250, batch: int = 4000) -> None:
    def measured(name: str, play: Player) -> Returns:
        return np.concatenate([first_returns(make(name), play, batch, seed) for seed in range(batches)])

    for name, play in RANDOM.items():
        returns = measured(name, play)
        print(f"{name}: random={returns.mean():.4g}, random_sd={returns.std():.4g}")
    print(f"navigation-2d: oracle={measured('navigation-2d', straight_to_goal).mean():.3f}")
    print(f"tabular-mdp: {measure_reference(TabularMDP(), 400_000, np.random.default_rng(0))}")


if __name__ == "__main__":
    _print_references()
