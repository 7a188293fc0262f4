"""A baseline policy: acts in many trials at once, from what it is told of their tasks or from what it observes."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from numpy.typing import NDArray

from ssm_metarl.core import Task, TaskDistribution

Floats = NDArray[np.float64]
Observations = NDArray[np.float32]
Actions = NDArray[Any]


@dataclass(frozen=True)
class Trials:
    """What a player is about to play: M tasks, K trials each, side by side as N = M*K episode slots.

    Attributes:
        distribution: the family.
        tasks: M tasks; only a clairvoyant player looks at them.
        num_episodes: K.
        episodes: episodes a trial.
        generators: M sources of the player's own chance.
    """

    distribution: TaskDistribution
    tasks: Sequence[Task]
    num_episodes: int
    episodes: int
    generators: Sequence[np.random.Generator]

    @property
    def number(self) -> int:
        """N, the number of trials."""
        return len(self.tasks) * self.num_episodes

    def draw(self, sample: Callable[[np.random.Generator, slice], Actions]) -> Actions:
        """Draw for all trials, [N, ...], each task from its own generator, whatever is played beside it.

        Args:
            sample: given a task's generator and its episode slots, K draws [K, ...].
        """
        num_episodes = (slice(m * self.num_episodes, (m + 1) * self.num_episodes) for m in range(len(self.tasks)))
        return np.concatenate([sample(*one) for one in zip(self.generators, num_episodes, strict=True)])


class BaselinePolicy(abc.ABC):
    """Plays N trials side by side, from their first step to their last. `play` makes one and then calls:

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


class Uniform(BaselinePolicy):
    """Every action with equal chance, for any family whose actions are few or bounded."""

    def __init__(self, trials: Trials) -> None:
        super().__init__(trials)
        space = trials.distribution.action_space
        steps = trials.num_episodes, trials.distribution.horizon * trials.episodes
        # All at once, [N, steps, ...]: a draw of a few numbers takes longer than they do.
        if isinstance(space, Discrete):
            count = int(space.n)
            self._actions = trials.draw(lambda rng, _: rng.integers(count, size=steps))
        elif isinstance(space, MultiDiscrete):
            shape = (*steps, *space.shape)
            self._actions = trials.draw(lambda rng, _: rng.integers(space.nvec, size=shape))
        else:
            assert isinstance(space, Box)
            shape = (*steps, *space.shape)
            self._actions = trials.draw(lambda rng, _: rng.uniform(space.low, space.high, shape).astype(np.float32))
        self._step = 0

    def act(self, observations: Observations) -> Actions:
        """See `BaselinePolicy.act`."""
        self._step += 1
        return self._actions[:, self._step - 1]
