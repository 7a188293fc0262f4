"""Baseline policies in the trials of a meta-learned one.

A policy's trials are those of a list of seeds; `play_baseline` gives them to a baseline policy instead, with the same
tasks and the same chance in every environment:

    returns = play_baseline("thompson", make("bandit"), tasks, seeds, num_episodes=20)  # [M, 20]
    returns = play_baseline("psrl", make("tabular-mdp"), tasks, seeds, num_episodes=20, episodes=10)

Baseline policies learn from observations, actions, rewards and the starts of episodes, as a policy does, except for the
`clairvoyant` ones, which know the task.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ssm_metarl.checks import lookup
from ssm_metarl.core import Task, TaskDistribution
from ssm_metarl.seeds import child
from ssm_metarl.tasks.baselines.bandit import UCB1, ClairvoyantBandit, FiniteHorizonIndex, PriorUCB1, ThompsonSampling
from ssm_metarl.tasks.baselines.navigation import ClairvoyantNavigation, StayPut
from ssm_metarl.tasks.baselines.noisy_cartpole import KalmanRegulator
from ssm_metarl.tasks.baselines.policy import Actions, BaselinePolicy, Floats, Trials, Uniform
from ssm_metarl.tasks.baselines.tabular_mdp import PSRL, ClairvoyantTabular, GreedyTabular, OptimisticTabular
from ssm_metarl.tasks.baselines.wind import ClairvoyantWind, DeadReckoning

BASELINE_POLICIES: Mapping[str, Mapping[str, Callable[[Trials], BaselinePolicy]]] = {
    "navigation-2d": {"stay-put": StayPut, "clairvoyant": ClairvoyantNavigation},
    "bandit": {
        "thompson": ThompsonSampling,
        "ucb1": UCB1,
        "ucb1-prior": PriorUCB1,
        "index": FiniteHorizonIndex,
        "clairvoyant": ClairvoyantBandit,
    },
    "tabular-mdp": {
        "psrl": PSRL,
        "psrl-prior-0": functools.partial(PSRL, prior_mean=0.0),
        "optimistic": OptimisticTabular,
        "greedy": GreedyTabular,
        "clairvoyant": ClairvoyantTabular,
    },
    "noisy-position-only-cartpole": {"lqg": KalmanRegulator},
    "wind-v0": {"dead-reckoning": DeadReckoning, "clairvoyant": ClairvoyantWind},
}
"""By family and name; every family has `uniform` as well."""


def baseline_policy(distribution: TaskDistribution, name: str) -> Callable[[Trials], BaselinePolicy]:
    """`uniform`, or one of `BASELINE_POLICIES[distribution.name]`.

    Raises:
        ValueError: the family has no such baseline policy; the sentence names those that it has.
    """
    own = BASELINE_POLICIES.get(distribution.name, {})
    return lookup({"uniform": Uniform, **own}, name, f"{distribution.name} player")


def demonstrate(
    player: Callable[[Trials], BaselinePolicy],
    trials: Trials,
    observations: Actions,
    actions: Actions,
    rewards: Actions,
    starts: Actions,
) -> Actions:
    """What a baseline policy would have done at each step of trials that another one played.

    It learns from what the other one did and saw, so that it shows what to do there, and not where its own play would
    have led (Ross et al. 2011, arXiv 1011.0686).

    Args:
        player: of `baseline_policy`.
        trials: M tasks and K trials each.
        observations: [M, T, K, O] float32, before each step.
        actions: [M, T, K] int64, or [M, T, K, D], or [M, T, K, A] float32 in the environment's unit.
        rewards: [M, T, K].
        starts: [M, T, K] bool, first steps of episodes.

    Returns:
        Of the shape and type of `actions`.
    """
    running = player(trials)

    def at(array: Actions, t: int) -> Actions:
        return array[:, t].reshape(trials.number, *array.shape[3:])

    shown = []
    for t in range(actions.shape[1]):
        shown.append(running.act(at(observations, t)).reshape(actions[:, t].shape))
        if t + 1 < actions.shape[1]:
            following = at(observations, t + 1), at(starts, t + 1)
            running.learn(at(actions, t), at(rewards, t).astype(np.float64), *following)
    return np.stack(shown, 1).astype(actions.dtype)


def play_baseline(
    player: str | Callable[[Trials], BaselinePolicy],
    distribution: TaskDistribution,
    tasks: Sequence[Task],
    seeds: Sequence[np.random.SeedSequence],
    num_episodes: int,
    episodes: int = 1,
) -> Floats:
    """Let a player have the trials of a policy.

    Args:
        player: `uniform` or one of `BASELINE_POLICIES[distribution.name]`, or what makes a player of one's own.
        distribution: the family.
        tasks: M tasks.
        seeds: one node of the seed tree for each, as the policy's rollouts had.
        num_episodes: K, trials a task.
        episodes: episodes a trial, which follow each other: a player remembers those before.

    Returns:
        Return of each trial, [M, K] float64: the sum of all rewards of its episodes, without discount.

    Raises:
        ValueError: the family has no such player, or there are not as many seeds as tasks, or no episode.
    """
    if isinstance(player, str):
        player = baseline_policy(distribution, player)
    if len(seeds) != len(tasks) or episodes < 1:
        raise ValueError(f"{len(tasks)} tasks need as many seeds, not {len(seeds)}, and one episode or more.")
    env_seeds, generators = _draw(seeds, num_episodes)
    env = distribution.make_vector_env(tasks, num_episodes)
    running = player(Trials(distribution, tasks, num_episodes, episodes, generators))
    # A seed an episode slot, as SyncVectorEnv takes them; the base class declares one integer.
    observations, _ = env.reset(seed=env_seeds)  # type: ignore[arg-type]
    returns = np.zeros(env.num_envs)
    left = np.full(env.num_envs, episodes)
    while (left > 0).any():
        actions = running.act(observations)
        observations, rewards, terminated, truncated, _ = env.step(actions)
        starts = terminated | truncated
        running.learn(actions, np.asarray(rewards, np.float64), observations, starts)
        returns += np.where(left > 0, rewards, 0.0)
        left -= starts
    env.close()
    return returns.reshape(len(tasks), num_episodes)


def _draw(seeds: Sequence[np.random.SeedSequence], num_episodes: int) -> tuple[list[int], list[np.random.Generator]]:
    """A seed for each environment, task by task, and a generator for each task's player.

    The seeds are those of the rollout loop, which takes them from child 0 and action noise from child 1 in the same
    way. It is not imported because task families do not know the algorithms; a test compares the two.
    """
    env_seeds: list[int] = []
    generators = []
    for seed in seeds:
        env_node, noise_node = child(seed, 0), child(seed, 1)
        env_seeds += env_node.generate_state(num_episodes).tolist()
        generators.append(np.random.default_rng(noise_node))
    return env_seeds, generators
