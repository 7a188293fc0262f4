"""Baseline policies of `tabular-mdp`."""

from __future__ import annotations

import abc

import numpy as np
from numpy.typing import NDArray

from ssm_metarl.tasks.baselines.policy import Actions, BaselinePolicy, Floats, Observations, Trials
from ssm_metarl.tasks.tabular_mdp import TabularMDP, backward_induction


class TabularBaseline(BaselinePolicy):
    """Plans when an episode starts, and plays the plan to its end."""

    def __init__(self, trials: Trials) -> None:
        super().__init__(trials)
        assert isinstance(trials.distribution, TabularMDP)
        self.family = trials.distribution
        self._step = 0  # of the episode: all episode slots' episodes are equally long
        self._states = np.zeros(trials.number, np.int64)
        self._plan = np.zeros((0, 0, 0), np.int64)

    def act(self, observations: Observations) -> Actions:
        """See `BaselinePolicy.act`."""
        if self._step == 0:
            self._plan, _ = backward_induction(*self.beliefs(), self.family.horizon)
        self._states = observations.argmax(axis=-1)
        return self._plan[self._step, self.rows, self._states]

    @abc.abstractmethod
    def beliefs(self) -> tuple[Floats, Floats]:
        """The MDPs to plan for: mean rewards [N, S, A] and probabilities of the next state [N, S, A, S]."""

    def learn(self, actions: Actions, rewards: Floats, observations: Observations, starts: NDArray[np.bool_]) -> None:
        """See `BaselinePolicy.learn`."""
        self._step = (self._step + 1) % self.family.horizon


class ClairvoyantTabular(TabularBaseline):
    """Knows the MDP and plays its best policy for each step of the episode."""

    def beliefs(self) -> tuple[Floats, Floats]:
        """The MDPs themselves."""
        means, transitions = self.family.dynamics(self.trials.tasks)
        return means.repeat(self.trials.num_episodes, axis=0), transitions.repeat(self.trials.num_episodes, axis=0)


class PSRL(TabularBaseline):
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
        noise = self.trials.draw(lambda rng, num_episodes: rng.standard_normal(precision[num_episodes].shape))
        weights = self.trials.draw(lambda rng, num_episodes: rng.standard_gamma(self._successors[num_episodes]))
        return self._sums / precision + noise / np.sqrt(precision), weights / weights.sum(axis=-1, keepdims=True)

    def learn(self, actions: Actions, rewards: Floats, observations: Observations, starts: NDArray[np.bool_]) -> None:
        """See `BaselinePolicy.learn`."""
        super().learn(actions, rewards, observations, starts)
        where = self.rows, self._states, actions
        self._visits[where] += 1.0
        self._sums[where] += rewards
        self._successors[(*where, observations.argmax(axis=-1))] += ~starts


class OptimisticTabular(PSRL):
    """Plans at every step, with rewards above their posterior means while there is time to gain from what they show.

        mean + c · deviation · sqrt(share of the trial's episodes that are left),    next states as expected

    Args:
        trials: what is played.
        optimism: c.

    Source: a Bayesian upper confidence bound (Kaufmann et al. 2012), which here falls with the horizon that is left.
    """

    def __init__(self, trials: Trials, optimism: float = 1.0) -> None:
        super().__init__(trials)
        self._optimism, self._ended = optimism, 0

    def act(self, observations: Observations) -> Actions:
        """See `BaselinePolicy.act`."""
        self._states = observations.argmax(axis=-1)
        plan, _ = backward_induction(*self.beliefs(), self.family.horizon - self._step)
        return plan[0, self.rows, self._states]

    def beliefs(self) -> tuple[Floats, Floats]:
        """Means with the bonus."""
        precision, left = 1.0 + self._visits, 1.0 - self._ended / self.trials.episodes
        means = self._sums / precision + self._optimism * np.sqrt(left / precision)
        return means, self._successors / self._successors.sum(axis=-1, keepdims=True)

    def learn(self, actions: Actions, rewards: Floats, observations: Observations, starts: NDArray[np.bool_]) -> None:
        """See `BaselinePolicy.learn`."""
        super().learn(actions, rewards, observations, starts)
        self._ended += self._step == 0


class GreedyTabular(PSRL):
    """Takes in every state the action of the highest mean reward by PSRL's posterior; it plans and explores nothing.

    Next states are so random here that what an action pays at once is nearly all that it is worth.
    """

    def act(self, observations: Observations) -> Actions:
        """See `BaselinePolicy.act`."""
        self._states = observations.argmax(axis=-1)
        here = self.rows, self._states
        return (self._sums[here] / (1.0 + self._visits[here])).argmax(axis=-1)
