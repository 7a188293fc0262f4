"""Classical players: what a meta-learned policy is measured against, on the same trials.

A policy's trials are those of a list of seeds; ``play`` lets a player have them instead, with the same tasks and the
same chance in every environment::

    returns = play("thompson", make("bandit"), tasks, seeds, columns=20)  # [M, 20]
    returns = play("psrl", make("tabular-mdp"), tasks, seeds, columns=20, episodes=10)

Players learn from what a policy sees, observations, actions, rewards and the starts of episodes, except for the
``clairvoyant`` ones, which know the task.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium.spaces import Box, Discrete
from numpy.typing import NDArray
from scipy import linalg

from ssm_metarl.checks import lookup
from ssm_metarl.core import Task, TaskDistribution
from ssm_metarl.seeds import child
from ssm_metarl.tasks.cartpole import CARTPOLE_V1, PARAMETERS, START, TIME_STEP, Physics, derivative
from ssm_metarl.tasks.parameters import stack_parameters
from ssm_metarl.tasks.popgym import NoisyPositionOnlyCartPole
from ssm_metarl.tasks.tabular_mdp import TabularMDP, backward_induction

Floats = NDArray[np.float64]
Observations = NDArray[np.float32]
Actions = NDArray[Any]

MAX_INDEX_PULLS = 200  # the table of indices grows with the cube: 64 MB and ten seconds at this number
_RATES = 201  # known arms, from paying never to paying always, with which an unknown arm is compared


@dataclass(frozen=True)
class Trials:
    """What a player is about to play: M tasks, K trials each, side by side as N = M*K columns.

    Attributes:
        distribution: the family.
        tasks: M tasks; only a clairvoyant player looks at them.
        columns: K.
        episodes: episodes a trial.
        generators: M sources of the player's own chance.
    """

    distribution: TaskDistribution
    tasks: Sequence[Task]
    columns: int
    episodes: int
    generators: Sequence[np.random.Generator]

    @property
    def number(self) -> int:
        """N, the number of trials."""
        return len(self.tasks) * self.columns

    def draw(self, sample: Callable[[np.random.Generator, slice], Actions]) -> Actions:
        """Draw for all trials, [N, ...], each task from its own generator, whatever is played beside it.

        Args:
            sample: given a task's generator and its columns, K draws [K, ...].
        """
        columns = (slice(m * self.columns, (m + 1) * self.columns) for m in range(len(self.tasks)))
        return np.concatenate([sample(*one) for one in zip(self.generators, columns, strict=True)])


class Player(abc.ABC):
    """Plays N trials side by side, from their first step to their last. ``play`` makes one and then calls::

    while trials are running:
        actions = player.act(observations)
        player.learn(actions, rewards, observations, starts)
    """

    def __init__(self, trials: Trials) -> None:
        self.trials = trials
        self.rows = np.arange(trials.number)

    @abc.abstractmethod
    def act(self, observations: Observations) -> Actions:
        """Choose actions [N] or [N, A] at observations [N, O]."""

    def learn(  # noqa: B027 (some know enough)
        self, actions: Actions, rewards: Floats, observations: Observations, starts: NDArray[np.bool_]
    ) -> None:
        """Take in a step: actions, rewards [N], the observations that follow, and whether these start an episode."""


class Uniform(Player):
    """Every action with equal chance, for any family whose actions are few or bounded."""

    def __init__(self, trials: Trials) -> None:
        super().__init__(trials)
        space = trials.distribution.action_space
        steps = trials.columns, trials.distribution.horizon * trials.episodes
        # All at once, [N, steps, ...]: a draw of a few numbers takes longer than they do.
        if isinstance(space, Discrete):
            count = int(space.n)
            self._actions = trials.draw(lambda rng, _: rng.integers(count, size=steps))
        else:
            assert isinstance(space, Box)
            shape = (*steps, *space.shape)
            self._actions = trials.draw(lambda rng, _: rng.uniform(space.low, space.high, shape).astype(np.float32))
        self._step = 0

    def act(self, observations: Observations) -> Actions:
        """See ``Player.act``."""
        self._step += 1
        return self._actions[:, self._step - 1]


# --- navigation-2d ----------------------------------------------------------------------------------------


class StayPut(Player):
    """Never moves."""

    def act(self, observations: Observations) -> Actions:
        """See ``Player.act``."""
        return np.zeros_like(observations)


class ClairvoyantNavigation(Player):
    """Knows the goal and moves each axis to it as fast as it may, which no player can better."""

    def __init__(self, trials: Trials) -> None:
        super().__init__(trials)
        goals = np.array([task["goal"] for task in trials.tasks], dtype=np.float32)
        self._goals = goals.repeat(trials.columns, axis=0)

    def act(self, observations: Observations) -> Actions:
        """See ``Player.act``; the environment clips."""
        return self._goals - observations


# --- bandit -----------------------------------------------------------------------------------------------


class BanditPlayer(Player):
    """Counts each arm's payments, `wins`, and failures, `losses`, both [N, arms]; a player says how to use them."""

    def __init__(self, trials: Trials) -> None:
        super().__init__(trials)
        assert isinstance(trials.distribution.action_space, Discrete)
        self.wins, self.losses = np.zeros((2, trials.number, int(trials.distribution.action_space.n)), np.int64)
        self.pulls = 0

    def act(self, observations: Observations) -> Actions:
        """Pull the arm of the highest score, the first of several."""
        return np.asarray(self.scores().argmax(axis=-1))

    @abc.abstractmethod
    def scores(self) -> Floats:
        """How much each arm deserves to be pulled next, [N, arms]."""

    def learn(self, actions: Actions, rewards: Floats, observations: Observations, starts: NDArray[np.bool_]) -> None:
        """See ``Player.learn``."""
        paid = rewards > 0.5
        self.wins[self.rows, actions] += paid
        self.losses[self.rows, actions] += ~paid
        self.pulls += 1


class ThompsonSampling(BanditPlayer):
    """Pulls an arm as often as it is the best under the posterior, from a Beta(1, 1) prior (Thompson 1933)."""

    def scores(self) -> Floats:
        """A draw from each arm's posterior."""
        return self.trials.draw(lambda rng, columns: rng.beta(1 + self.wins[columns], 1 + self.losses[columns]))


class UCB1(BanditPlayer):
    """Pulls the arm that may be the best: the highest upper confidence bound (Auer et al. 2002, figure 1)."""

    def scores(self) -> Floats:
        """The bounds; infinite for an arm not yet pulled."""
        pulls = self.wins + self.losses
        tried = np.maximum(pulls, 1)
        bounds = self.wins / tried + np.sqrt(2 * np.log(max(self.pulls, 1)) / tried)
        return np.where(pulls == 0, np.inf, bounds)


class PriorUCB1(BanditPlayer):
    """UCB1 as RL² was compared with it: from a Beta(1, 1) prior, so that no arm must be tried, and a narrower bound.

    Args:
        trials: what is played.
        width: the width of the bound over that of ``UCB1``, which suits the worst case and not the mean. Duan et al.
            took the best of 0, 0.1, ... 1 for each number of arms and pulls.
    """

    def __init__(self, trials: Trials, width: float = 0.2) -> None:
        super().__init__(trials)
        self._width = width

    def scores(self) -> Floats:
        """The bounds."""
        pulls = self.wins + self.losses + 2
        return (self.wins + 1) / pulls + self._width * np.sqrt(2 * np.log(max(self.pulls, 1)) / pulls)


class FiniteHorizonIndex(BanditPlayer):
    """Pulls the arm of the highest index for the pulls that are left: close to the best play there is."""

    def __init__(self, trials: Trials) -> None:
        super().__init__(trials)
        self._indices = index_table(trials.distribution.horizon * trials.episodes)

    def scores(self) -> Floats:
        """The indices."""
        left = len(self._indices) - 1 - self.pulls
        return self._indices[left, self.wins, self.losses]


@functools.lru_cache(maxsize=2)
def index_table(pulls: int) -> Floats:
    """Indices of a Bernoulli arm with a Beta(1, 1) prior, for every state within `pulls` pulls.

    The index is the rate of a known arm that is worth as much as the unknown one when both are to be had for the
    pulls that are left. With m pulls left and a known arm of rate λ, the value after s payments and f failures is ::

        V_m(s, f) = max(λ m, p (1 + V_{m-1}(s+1, f)) + (1 - p) V_{m-1}(s, f+1)),   p = (s + 1) / (s + f + 2)

    as the known arm, once the better one, stays so: nothing is learned from it. This is solved for a grid of rates
    at once; the index is where the second term less the first, which falls with λ, crosses 0.

    Args:
        pulls: 1 to ``MAX_INDEX_PULLS``.

    Returns:
        [pulls + 1, pulls, pulls] float64, by pulls left, payments and failures; 0 where there is no such state.

    Raises:
        ValueError: too many pulls.

    Source: Berry and Fristedt, Bandit Problems, 1985, chapter 5; Kaufmann, On Bayesian index policies for sequential
    resource allocation, 2018 (arXiv 1601.01190), section 2, as finite-horizon Gittins indices.
    """
    if pulls > MAX_INDEX_PULLS:
        raise ValueError(f"The index player takes up to {MAX_INDEX_PULLS} pulls a trial, not {pulls}.")
    indices = np.zeros((pulls + 1, pulls, pulls))
    rates = np.linspace(0.0, 1.0, _RATES)
    values = np.zeros((pulls + 1, pulls + 1, _RATES))  # with no pull left
    for left in range(1, pulls + 1):
        size = pulls - left + 1  # payments and failures so far are fewer
        wins, losses = np.ogrid[:size, :size]
        chance = ((wins + 1) / (wins + losses + 2))[..., None]
        pull = chance * (1.0 + values[1 : size + 1, :size]) + (1.0 - chance) * values[:size, 1 : size + 1]
        known = rates * left
        indices[left, :size, :size] = _crossing(pull - known, rates)
        values = np.maximum(pull, known)
    indices.setflags(write=False)  # callers share it
    return indices


def _crossing(gaps: Floats, rates: Floats) -> Floats:
    """The rate at which falling gaps [..., rates] are 0, on the line between the last above 0 and the next."""
    last = np.minimum(np.count_nonzero(gaps > 0, axis=-1), len(rates) - 1) - 1
    above, below = (np.take_along_axis(gaps, last[..., None] + i, axis=-1)[..., 0] for i in (0, 1))
    return np.asarray(rates[last] + (rates[1] - rates[0]) * above / (above - below))


class ClairvoyantBandit(Player):
    """Knows the odds and always pulls the best arm."""

    def __init__(self, trials: Trials) -> None:
        super().__init__(trials)
        best = [np.argmax(task["probabilities"]) for task in trials.tasks]
        self._arms = np.repeat(best, trials.columns)

    def act(self, observations: Observations) -> Actions:
        """See ``Player.act``."""
        return self._arms


# --- tabular-mdp ------------------------------------------------------------------------------------------


class TabularPlayer(Player):
    """Plans when an episode starts, and plays the plan to its end."""

    def __init__(self, trials: Trials) -> None:
        super().__init__(trials)
        assert isinstance(trials.distribution, TabularMDP)
        self.family = trials.distribution
        self._step = 0  # of the episode: all columns' episodes are equally long
        self._states = np.zeros(trials.number, np.int64)
        self._plan = np.zeros((0, 0, 0), np.int64)

    def act(self, observations: Observations) -> Actions:
        """See ``Player.act``."""
        if self._step == 0:
            self._plan, _ = backward_induction(*self.beliefs(), self.family.horizon)
        self._states = observations.argmax(axis=-1)
        return self._plan[self._step, self.rows, self._states]

    @abc.abstractmethod
    def beliefs(self) -> tuple[Floats, Floats]:
        """The MDPs to plan for: mean rewards [N, S, A] and probabilities of the next state [N, S, A, S]."""

    def learn(self, actions: Actions, rewards: Floats, observations: Observations, starts: NDArray[np.bool_]) -> None:
        """See ``Player.learn``."""
        self._step = (self._step + 1) % self.family.horizon


class ClairvoyantTabular(TabularPlayer):
    """Knows the MDP and plays its best policy for each step of the episode."""

    def beliefs(self) -> tuple[Floats, Floats]:
        """The MDPs themselves."""
        means, transitions = self.family.dynamics(self.trials.tasks)
        return means.repeat(self.trials.columns, axis=0), transitions.repeat(self.trials.columns, axis=0)


class PSRL(TabularPlayer):
    """Posterior sampling: plays each episode as is best in an MDP drawn from the posterior.

    The prior is the family's own: mean rewards from N(1, 1) with noise of variance 1, next states from a flat
    Dirichlet distribution. Of an episode's last step only the reward counts, since what follows it is not seen.

    Args:
        trials: what is played.
        prior_mean: mean of the mean rewards in the prior. With 0, which explores less and earns more in few episodes,
            it earns what Duan et al. 2016 published.

    Source: Strens 2000; Osband et al. 2013 (arXiv 1306.0940), algorithm 1.
    """

    def __init__(self, trials: Trials, prior_mean: float = 1.0) -> None:
        super().__init__(trials)
        shape = (trials.number, self.family.states, self.family.actions)
        self._visits = np.zeros(shape)
        self._sums = np.full(shape, prior_mean)  # of rewards; the prior weighs as much as one
        self._successors = np.ones((*shape, self.family.states))

    def beliefs(self) -> tuple[Floats, Floats]:
        """A draw from the posterior."""
        precision = 1.0 + self._visits
        noise = self.trials.draw(lambda rng, columns: rng.standard_normal(precision[columns].shape))
        weights = self.trials.draw(lambda rng, columns: rng.standard_gamma(self._successors[columns]))
        return self._sums / precision + noise / np.sqrt(precision), weights / weights.sum(axis=-1, keepdims=True)

    def learn(self, actions: Actions, rewards: Floats, observations: Observations, starts: NDArray[np.bool_]) -> None:
        """See ``Player.learn``."""
        super().learn(actions, rewards, observations, starts)
        where = self.rows, self._states, actions
        self._visits[where] += 1.0
        self._sums[where] += rewards
        self._successors[(*where, observations.argmax(axis=-1))] += ~starts


class GreedyTabular(PSRL):
    """Takes in every state the action of the highest mean reward by PSRL's posterior; it plans and explores nothing.

    Next states are so random here that what an action pays at once is nearly all that it is worth.
    """

    def act(self, observations: Observations) -> Actions:
        """See ``Player.act``."""
        self._states = observations.argmax(axis=-1)
        here = self.rows, self._states
        return (self._sums[here] / (1.0 + self._visits[here])).argmax(axis=-1)


# --- noisy-position-only-cartpole -------------------------------------------------------------------------


class KalmanRegulator(Player):
    """Pushes to the side that a linear-quadratic regulator of a Kalman filter's estimate would.

    It knows the physics, of which it takes the linear part about the upright pole, and the size of the noise. The
    regulator's weights are 1 for the squared angle, 1e-4 for the squared position and 1e-3 for the squared force, in
    rad, m and N: of twelve pairs of the last two that were tried none is better by more than .01 at any noise.

    Source: Anderson and Moore, Optimal Control: Linear Quadratic Methods, 1990, chapter 8.
    """

    def __init__(self, trials: Trials) -> None:
        super().__init__(trials)
        family = trials.distribution
        assert isinstance(family, NoisyPositionOnlyCartPole)
        physics = Physics.of(stack_parameters([CARTPOLE_V1], PARAMETERS, 1))

        def after(state: Floats, force: float) -> Floats:
            found: Floats = state + TIME_STEP * derivative(state[:, None], np.full(1, force), physics)[:, 0]
            return found

        small = 1e-5
        columns = [(after(small * axis, 0.0) - after(-small * axis, 0.0)) / (2 * small) for axis in np.eye(4)]
        self._transition = np.stack(columns, axis=1)
        self._push = after(np.zeros(4), float(physics.push[0]))  # of action 1; that of action 0 is its opposite
        control = self._push[:, None] / physics.push
        cost = linalg.solve_discrete_are(self._transition, control, np.diag([1e-4, 0.0, 1.0, 0.0]), [[1e-3]])
        self._regulator = -(control.T @ cost @ self._transition)[0]
        # How much of what surprises goes into the estimate at each step of an episode, [T, 4, 2].
        seen = np.eye(4)[[0, 2]]
        covariance = np.eye(4) * START**2 / 3
        gains = []
        for _ in range(family.horizon):
            innovation = seen @ covariance @ seen.T + np.eye(2) * family.noise**2
            gains.append(np.linalg.solve(innovation, seen @ covariance).T)
            covariance = self._transition @ (covariance - gains[-1] @ seen @ covariance) @ self._transition.T
        self._gains = np.array(gains)
        self._estimate = np.zeros((trials.number, 4))
        self._age = np.zeros(trials.number, dtype=np.int64)

    def act(self, observations: Observations) -> Actions:
        """See ``Player.act``."""
        surprise = observations - self._estimate[:, [0, 2]]
        self._estimate += np.einsum("nij,nj->ni", self._gains[self._age], surprise)
        return (self._estimate @ self._regulator > 0).astype(np.int64)

    def learn(self, actions: Actions, rewards: Floats, observations: Observations, starts: NDArray[np.bool_]) -> None:
        """See ``Player.learn``."""
        self._estimate = self._estimate @ self._transition.T + np.where(actions == 1, 1.0, -1.0)[:, None] * self._push
        self._age += 1
        self._estimate[starts] = 0.0
        self._age[starts] = 0


# --- Playing ----------------------------------------------------------------------------------------------

PLAYERS: Mapping[str, Mapping[str, Callable[[Trials], Player]]] = {
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
        "greedy": GreedyTabular,
        "clairvoyant": ClairvoyantTabular,
    },
    "noisy-position-only-cartpole": {"lqg": KalmanRegulator},
}
"""By family and name; every family has `uniform` as well."""


def play(
    player: str | Callable[[Trials], Player],
    distribution: TaskDistribution,
    tasks: Sequence[Task],
    seeds: Sequence[np.random.SeedSequence],
    columns: int,
    episodes: int = 1,
) -> Floats:
    """Let a player have the trials of a policy.

    Args:
        player: `uniform` or one of ``PLAYERS[distribution.name]``, or what makes a player of one's own.
        distribution: the family.
        tasks: M tasks.
        seeds: one node of the seed tree for each, as the policy's rollouts had.
        columns: K, trials a task.
        episodes: episodes a trial, which follow each other: a player remembers those before.

    Returns:
        Return of each trial, [M, K] float64: the sum of all rewards of its episodes, without discount.

    Raises:
        ValueError: the family has no such player, or there are not as many seeds as tasks, or no episode.
    """
    if isinstance(player, str):
        player = lookup(
            {"uniform": Uniform, **PLAYERS.get(distribution.name, {})}, player, f"{distribution.name} player"
        )
    if len(seeds) != len(tasks) or episodes < 1:
        raise ValueError(f"{len(tasks)} tasks need as many seeds, not {len(seeds)}, and one episode or more.")
    env_seeds, generators = _draw(seeds, columns)
    env = distribution.make_vector_env(tasks, columns)
    running = player(Trials(distribution, tasks, columns, episodes, generators))
    # A seed a column, as SyncVectorEnv takes them; the base class declares one integer.
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
    return returns.reshape(len(tasks), columns)


def _draw(seeds: Sequence[np.random.SeedSequence], columns: int) -> tuple[list[int], list[np.random.Generator]]:
    """A seed for each environment, task by task, and a generator for each task's player.

    The seeds are those of the rollout loop, which takes them from child 0 and action noise from child 1 in the same
    way. It is not imported because task families do not know the algorithms; a test compares the two.
    """
    env_seeds: list[int] = []
    generators = []
    for seed in seeds:
        env_node, noise_node = child(seed, 0), child(seed, 1)
        env_seeds += env_node.generate_state(columns).tolist()
        generators.append(np.random.default_rng(noise_node))
    return env_seeds, generators
