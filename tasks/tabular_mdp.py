"""`tabular-mdp`: small Markov decision processes of which nothing is known but their size.

The random MDPs of RL² (Duan et al. 2016, arXiv 1611.02779): 10 states, 5 actions, mean rewards drawn from N(1, 1),
rewards from N(mean, 1), next states from a flat Dirichlet distribution for each state and action. Every episode starts
in state 0 and takes 10 steps.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.spaces import Box, Discrete
from numpy.typing import NDArray

from ssm_metarl import presets
from ssm_metarl.checks import check_count, lookup
from ssm_metarl.core import SPLITS, ReferenceReturns, Task, TaskDistribution
from ssm_metarl.tasks.batched import BatchedEnv, check_actions
from ssm_metarl.tasks.parameters import Parameter, stack_parameters
from ssm_metarl.tasks.registry import register

Floats = NDArray[np.float64]

STATES, ACTIONS, EPISODE_LENGTH = 10, 5, 10
START = 0  # the state in which an episode starts
SEEDS = 2**53  # task seeds are below: as a number in float64, such a seed is exact


class _Seed(Parameter):
    """A whole number, in a range."""

    def allows(self, value: object) -> bool:
        return isinstance(value, int) and super().allows(value)

    def __str__(self) -> str:
        return f"a whole number in [{self.low:.0f}, {self.high:.0f}]"


PARAMETERS = {"seed": _Seed(0, SEEDS - 1)}


def backward_induction(means: Floats, transitions: Floats, steps: int) -> tuple[NDArray[np.int64], Floats]:
    """Solve MDPs for an episode of `steps` steps, without discount.

    Args:
        means: [..., S, A], mean rewards.
        transitions: [..., S, A, S], probabilities of the next state.
        steps: 1 or more.

    Returns:
        The best action for each step of the episode, [steps, ..., S] int64, and the value of the episode that
        starts in each state, [..., S].

    Source: Puterman, Markov Decision Processes, 1994, section 4.5.
    """
    actions = np.zeros((steps, *means.shape[:-1]), dtype=np.int64)
    values = np.zeros(means.shape[:-1])
    for step in reversed(range(steps)):
        action_values = means + _expected(transitions, values)
        actions[step] = action_values.argmax(axis=-1)
        values = action_values.max(axis=-1)
    return actions, values


def _expected(transitions: Floats, values: Floats) -> Floats:
    """Mean over the next state, [..., S, A], of values [..., S]."""
    return np.asarray(np.einsum("...san,...n->...sa", transitions, values))


def _random_moments(means: Floats, transitions: Floats, steps: int) -> tuple[Floats, Floats]:
    """First and second moment, [...] each, of the return of an episode with actions at random, from `START`.

    With R the reward and G the return of the rest: E[(R + G)²] = E[R²] + 2 E[R] E[G] + E[G²] for each state and
    action, as R and the next state are independent given both.
    """
    first = second = np.zeros(means.shape[:-1])
    for _ in range(steps):
        rest = _expected(transitions, first)
        second = (means**2 + 1.0 + 2.0 * means * rest + _expected(transitions, second)).mean(axis=-1)
        first = (means + rest).mean(axis=-1)
    return first[..., START], second[..., START]


def measure_reference(distribution: TabularMDP, n: int, rng: np.random.Generator) -> ReferenceReturns:
    """Estimate the reference returns of an episode from n training tasks; each task's share is exact.

    The random player's mean needs no estimate: every reward has mean 1, whatever is played without knowledge.
    """
    batch = max(1, 500_000 // (distribution.states**2 * distribution.actions))  # what a processor's cache can hold
    seconds, oracles = [], []
    for start in range(0, n, batch):
        means, transitions = distribution.dynamics(distribution.sample(min(batch, n - start), rng))
        seconds.append(_random_moments(means, transitions, distribution.horizon)[1])
        oracles.append(backward_induction(means, transitions, distribution.horizon)[1][:, START])
    mean = float(distribution.horizon)
    deviation = (np.concatenate(seconds).mean() - mean**2) ** 0.5
    return ReferenceReturns(random=mean, random_sd=float(deviation), oracle=float(np.concatenate(oracles).mean()))


class TabularEnv(BatchedEnv):
    """M MDPs in K episode slots each.

    Args:
        means: [M, S, A], mean rewards.
        transitions: [M, S, A, S], probabilities of the next state.
        num_episodes: K.
        episode_length: steps an episode.
    """

    def __init__(self, means: Floats, transitions: Floats, num_episodes: int, episode_length: int) -> None:
        tasks, states, self._actions = means.shape
        num_envs = tasks * num_episodes
        super().__init__(_observation_space(states), Discrete(self._actions), num_envs, episode_length)
        self._means = means
        # The next state is the number of bounds at or below a uniform draw. The last bound, 1 but for rounding,
        # is left out, so that there always is a next state.
        self._bounds = transitions.cumsum(axis=-1)[..., :-1]
        self._tasks = np.repeat(np.arange(tasks), num_episodes)
        self._one_hot = np.eye(states, dtype=np.float32)
        self._states = np.zeros(num_envs, dtype=np.int64)
        # An episode's chance, drawn when it starts: the rewards' noise and what decides the next state.
        self._noise = np.zeros((episode_length, num_envs))
        self._luck = np.zeros((episode_length, num_envs))
        self._step = 0  # of all episode slots: their episodes are equally long, and start and end together

    def _start(self, slots: NDArray[np.intp]) -> None:
        length = len(self._noise)
        generators = [self._generator(slot) for slot in slots.tolist()]
        self._noise[:, slots] = np.transpose([generator.standard_normal(length) for generator in generators])
        self._luck[:, slots] = np.transpose([generator.random(length) for generator in generators])
        self._states[slots] = START
        self._step = 0

    def _advance(self, actions: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        where = self._tasks, self._states, check_actions(actions, self._actions, "tabular-mdp")
        rewards = self._means[where] + self._noise[self._step]
        self._states = np.count_nonzero(self._bounds[where] <= self._luck[self._step, :, None], axis=-1)
        self._step += 1
        return rewards.astype(np.float32), np.full(self.num_envs, self._step == len(self._noise))

    def _observe(self) -> NDArray[np.float32]:
        return self._one_hot[self._states]


class TabularMDP(TaskDistribution):
    """Random MDPs; a task is `{"seed": n}`, from which its rewards and transitions are drawn: see `dynamics`.

    A seed, as the tables themselves, 550 numbers at the usual size, would be most of what a logged or stored rollout
    takes. The observation is the state, one-hot. The last step ends the episode truly: it returns terminated (and,
    being at the horizon, truncated).

    Args:
        states: 1 or more.
        actions: 2 or more.
        episode_length: steps an episode, 1 or more.

    Raises:
        ValueError: an option is no such number.
    """

    name = "tabular-mdp"
    splits = SPLITS
    recommended = presets.of_task("tabular-mdp")
    in_context = presets.of_task("tabular-mdp", "rl2")

    def __init__(self, *, states: int = STATES, actions: int = ACTIONS, episode_length: int = EPISODE_LENGTH) -> None:
        self.states = check_count("states", states, 1)
        self.actions = check_count("actions", actions, 2)
        self.horizon = check_count("episode_length", episode_length, 1)
        self.observation_space = _observation_space(self.states)
        self.action_space: Discrete[np.int64] = Discrete(self.actions)

    @functools.cached_property
    def reference(self) -> ReferenceReturns:  # type: ignore[override]
        """Returns of an episode with actions at random and of the best play of one who knows the MDP."""
        if (self.states, self.actions, self.horizon) == (STATES, ACTIONS, EPISODE_LENGTH):
            return _REFERENCE
        return measure_reference(self, 2000, np.random.default_rng(0))

    def sample(self, n: int, rng: np.random.Generator, split: str = "train") -> list[Task]:
        """Draw n MDPs; see `TaskDistribution.sample`."""
        lookup(dict.fromkeys(SPLITS), split, "split")
        return [{"seed": seed} for seed in rng.integers(SEEDS, size=n).tolist()]

    def dynamics(self, tasks: Sequence[Task]) -> tuple[Floats, Floats]:
        """The MDPs of M tasks, for the environments and for players that know them or plan.

        Returns:
            Mean rewards [M, S, A] and probabilities of the next state [M, S, A, S], float64.
        """
        means = np.zeros((len(tasks), self.states, self.actions))
        transitions = np.zeros((*means.shape, self.states))
        for number, task in enumerate(tasks):
            # The key keeps these draws apart from those of an episode slot that is reset with the same number.
            rng = np.random.default_rng(np.random.SeedSequence(task["seed"], spawn_key=(0,)))
            means[number] = rng.normal(1.0, 1.0, means.shape[1:])
            transitions[number] = rng.standard_exponential(transitions.shape[1:])
        # Exponential draws over their sum are a flat Dirichlet draw.
        transitions /= transitions.sum(axis=-1, keepdims=True)
        return means, transitions

    def make_vector_env(self, tasks: Sequence[Task], num_episodes: int) -> TabularEnv:
        """Build the environments of `tasks`; see `TaskDistribution.make_vector_env`."""
        stack_parameters(tasks, PARAMETERS, num_episodes)  # for its checks: the tables are kept once a task
        return TabularEnv(*self.dynamics(tasks), num_episodes, self.horizon)


def _observation_space(states: int) -> Box:
    return Box(0.0, 1.0, (states,), np.float32)


# Printed by `python tests/tasks/test_reference.py`: 400,000 tasks, each with its exact values.
# random: actions with equal chance. oracle: knows the MDP and plays its best policy for each step of the episode.
_REFERENCE = ReferenceReturns(random=10.0, random_sd=4.67, oracle=21.83)

register(TabularMDP.name, TabularMDP)
