"""Baseline policies of `bandit`."""

from __future__ import annotations

import abc
import functools

import numpy as np
from gymnasium.spaces import Discrete
from numpy.typing import NDArray

from ssm_metarl.tasks.baselines.policy import Actions, BaselinePolicy, Floats, Observations, Trials

MAX_INDEX_PULLS = 200  # the table of indices grows with the cube: 64 MB and ten seconds at this number
_RATES = 201  # known arms, from paying never to paying always, with which an unknown arm is compared


class BanditBaseline(BaselinePolicy):
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
        """See `BaselinePolicy.learn`."""
        paid = rewards > 0.5
        self.wins[self.rows, actions] += paid
        self.losses[self.rows, actions] += ~paid
        self.pulls += 1


class ThompsonSampling(BanditBaseline):
    """Pulls an arm as often as it is the best under the posterior, from a Beta(1, 1) prior (Thompson 1933)."""

    def scores(self) -> Floats:
        """A draw from each arm's posterior."""
        return self.trials.draw(
            lambda rng, num_episodes: rng.beta(1 + self.wins[num_episodes], 1 + self.losses[num_episodes])
        )


class UCB1(BanditBaseline):
    """Pulls the arm that may be the best: the highest upper confidence bound (Auer et al. 2002, figure 1)."""

    def scores(self) -> Floats:
        """The bounds; infinite for an arm not yet pulled."""
        pulls = self.wins + self.losses
        tried = np.maximum(pulls, 1)
        bounds = self.wins / tried + np.sqrt(2 * np.log(max(self.pulls, 1)) / tried)
        return np.where(pulls == 0, np.inf, bounds)


class PriorUCB1(BanditBaseline):
    """UCB1 as RL² was compared with it: from a Beta(1, 1) prior, so that no arm must be tried, and a narrower bound.

    Args:
        trials: what is played.
        width: the width of the bound over that of `UCB1`, which suits the worst case and not the mean. Duan et al.
            took the best of 0, 0.1, ... 1 for each number of arms and pulls.
    """

    def __init__(self, trials: Trials, width: float = 0.2) -> None:
        super().__init__(trials)
        self._width = width

    def scores(self) -> Floats:
        """The bounds."""
        pulls = self.wins + self.losses + 2
        return (self.wins + 1) / pulls + self._width * np.sqrt(2 * np.log(max(self.pulls, 1)) / pulls)


class FiniteHorizonIndex(BanditBaseline):
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
    pulls that are left. With m pulls left and a known arm of rate λ, the value after s payments and f failures is :

        V_m(s, f) = max(λ m, p (1 + V_{m-1}(s+1, f)) + (1 - p) V_{m-1}(s, f+1)),   p = (s + 1) / (s + f + 2)

    as the known arm, once the better one, stays so: nothing is learned from it. This is solved for a grid of rates
    at once; the index is where the second term less the first, which falls with λ, crosses 0.

    Args:
        pulls: 1 to `MAX_INDEX_PULLS`.

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


class ClairvoyantBandit(BaselinePolicy):
    """Knows the odds and always pulls the best arm."""

    def __init__(self, trials: Trials) -> None:
        super().__init__(trials)
        best = [np.argmax(task["probabilities"]) for task in trials.tasks]
        self._arms = np.repeat(best, trials.num_episodes)

    def act(self, observations: Observations) -> Actions:
        """See `BaselinePolicy.act`."""
        return self._arms
