"""`repeat-previous` and `noisy-position-only-cartpole`: two of POPGym's tests of memory (Morad et al. 2023,
arXiv 2303.01859), in three difficulties.

They play as the package popgym 1.0.7 does (its `envs/repeat_previous.py`, `envs/noisy_position_only_cartpole.py`):
with equal seed and actions the first episode of a slot is the package's, bit by bit. A return of 1 is the most there
is. Each is one partially observed problem and no family of tasks: its only task is `{}`, and the splits differ in
seeds. POPGym's others play through the package, such as `gym:popgym:popgym-CountRecallEasy-v0`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.spaces import Box, Discrete
from numpy.typing import NDArray

from ssm_metarl import presets
from ssm_metarl.checks import lookup
from ssm_metarl.core import SPLITS, ReferenceReturns, Task, TaskDistribution
from ssm_metarl.tasks.batched import BatchedEnv, check_actions
from ssm_metarl.tasks.cartpole import (
    ACTION_SPACE,
    CARTPOLE_V1,
    MAX_ANGLE,
    MAX_POSITION,
    PARAMETERS,
    CartPoleEnv,
    Physics,
)
from ssm_metarl.tasks.parameters import stack_parameters
from ssm_metarl.tasks.registry import register

SUITS = 4
DECK = 52  # cards, a quarter of each suit

DECKS_AND_K = {"easy": (1, 4), "medium": (2, 32), "hard": (3, 64)}
NOISE = {"easy": 0.1, "medium": 0.2, "hard": 0.3}
HORIZON = 200  # of the cart, at every difficulty

_BOUND = np.array([2 * MAX_POSITION, 2 * MAX_ANGLE], dtype=np.float32)
NOISY_SPACE = Box(-_BOUND, _BOUND, dtype=np.float32)


class _OneTask(TaskDistribution):
    """What both share: there is one task, `{}`."""

    splits = SPLITS
    enumerable = True

    def sample(self, n: int, rng: np.random.Generator, split: str = "train") -> list[Task]:
        """The one task, n times; see `TaskDistribution.sample`."""
        lookup(dict.fromkeys(SPLITS), split, "split")
        return [{} for _ in range(n)]


class RepeatPreviousEnv(BatchedEnv):
    """N shuffled piles of cards.

    Args:
        num_envs: N.
        decks: decks of `DECK` cards in a pile.
        k: what is asked for is the suit of the k-th last card; 1 is the last one.
    """

    def __init__(self, num_envs: int, decks: int, k: int) -> None:
        cards = decks * DECK
        super().__init__(RepeatPrevious.observation_space, RepeatPrevious.action_space, num_envs, cards - 1)
        self._k = k
        self._gain = np.float32(1 / (cards - k))
        self._suits = np.zeros((cards, num_envs), dtype=np.int64)
        self._dealt = 0  # to all episode slots: their episodes are equally long, and start and end together
        self._one_hot = np.eye(SUITS, dtype=np.float32)

    def _start(self, slots: NDArray[np.intp]) -> None:
        cards = len(self._suits)
        orders = [self._generator(slot).permutation(cards) for slot in slots.tolist()]
        self._suits[:, slots] = np.transpose(orders)[::-1] % SUITS  # dealt from the end
        self._dealt = 1

    def _advance(self, actions: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        check_actions(actions, SUITS, RepeatPrevious.name)
        rewards = np.zeros(self.num_envs, dtype=np.float32)
        if self._dealt >= self._k:
            rewards = np.where(actions == self._suits[self._dealt - self._k], self._gain, -self._gain)
        self._dealt += 1
        return rewards, np.full(self.num_envs, self._dealt == len(self._suits))

    def _observe(self) -> NDArray[np.float32]:
        return self._one_hot[self._suits[self._dealt - 1]]


class RepeatPrevious(_OneTask):
    """Cards are dealt one by one; name the suit of the k-th last, which is worth 1/(cards - k), and else costs as much.

    | difficulty | cards | k | steps |
    | --- | --- | --- | --- |
    | easy | 52 | 4 | 51 |
    | medium | 104 | 32 | 103 |
    | hard | 156 | 64 | 155 |

    The observation is the last card's suit, one-hot; until k cards are dealt, the reward is 0. The last card ends the
    episode truly: it returns terminated (and, being at the horizon, truncated).

    Args:
        difficulty: "easy", "medium" or "hard".

    Raises:
        ValueError: there is no such difficulty.
    """

    name = "repeat-previous"
    observation_space = Box(0.0, 1.0, (SUITS,), np.float32)
    action_space: Discrete[np.int64] = Discrete(SUITS)
    recommended = presets.of_task("repeat-previous")
    in_context = presets.of_task("repeat-previous", "rl2")

    def __init__(self, *, difficulty: str = "easy") -> None:
        self._decks, self._k = lookup(DECKS_AND_K, difficulty, "difficulty")
        cards = self._decks * DECK
        self.horizon = cards - 1
        # Exact: of the cards - k guesses a quarter is right, independently of each other.
        self.reference = ReferenceReturns(random=-0.5, random_sd=(3 / 4 / (cards - self._k)) ** 0.5, oracle=1.0)

    def make_vector_env(self, tasks: Sequence[Task], num_episodes: int) -> RepeatPreviousEnv:
        """Build the environments of `tasks`; see `TaskDistribution.make_vector_env`."""
        stack_parameters(tasks, {}, num_episodes)  # for its checks
        return RepeatPreviousEnv(len(tasks) * num_episodes, self._decks, self._k)


class NoisyCartPoleEnv(CartPoleEnv):
    """N carts of CartPole-v1, of which position and angle are observed with noise.

    Args:
        num_envs: N.
        noise: its standard deviation, in m and in rad.
    """

    def __init__(self, num_envs: int, noise: float) -> None:
        physics = Physics.of(stack_parameters([CARTPOLE_V1], PARAMETERS, num_envs))
        super().__init__(physics, NOISY_SPACE, HORIZON)
        self._sigma = noise
        # An episode's noise is drawn when it starts, for the first observation and for one after every step.
        self._noise = np.zeros((num_envs, HORIZON + 1, 2), dtype=np.float32)
        self._age = np.zeros(num_envs, dtype=np.int64)
        self._rows = np.arange(num_envs)

    def _start(self, slots: NDArray[np.intp]) -> None:
        super()._start(slots)
        for slot in slots.tolist():
            self._noise[slot] = self._generator(slot).normal(0.0, self._sigma, self._noise.shape[1:])
        self._age[slots] = 0

    def _advance(self, actions: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        rewards, terminated = super()._advance(actions)
        self._age += 1
        return rewards / np.float32(HORIZON), terminated

    def _observe(self) -> NDArray[np.float32]:
        seen = self._state[[0, 2]].T.astype(np.float32) + self._noise[self._rows, self._age]
        return np.clip(seen, -_BOUND, _BOUND)


class NoisyPositionOnlyCartPole(_OneTask):
    """Balance CartPole-v1's pole for 200 steps, worth 1/200 each, when only position and angle are seen, with noise.

    The noise is normal, with the standard deviation .1 (easy), .2 (medium) or .3 (hard) in m and in rad (the pole has
    fallen at .21), and what is seen is clipped to twice the limits.

    Args:
        difficulty: "easy", "medium" or "hard".

    Raises:
        ValueError: there is no such difficulty.
    """

    name = "noisy-position-only-cartpole"
    horizon = HORIZON
    observation_space = NOISY_SPACE
    action_space = ACTION_SPACE
    # Printed by `python tests/tasks/test_reference.py`: 1,000,000 episodes. Noise that a player does not look at does
    # not matter. oracle: a reward of 1/200 at each of 200 steps, the most there is.
    reference = ReferenceReturns(random=0.1114, random_sd=0.0595, oracle=1.0)
    recommended = presets.of_task("noisy-position-only-cartpole")
    in_context = presets.of_task("noisy-position-only-cartpole", "rl2")

    def __init__(self, *, difficulty: str = "easy") -> None:
        self.noise = lookup(NOISE, difficulty, "difficulty")

    def make_vector_env(self, tasks: Sequence[Task], num_episodes: int) -> NoisyCartPoleEnv:
        """Build the environments of `tasks`; see `TaskDistribution.make_vector_env`."""
        stack_parameters(tasks, {}, num_episodes)  # for its checks
        return NoisyCartPoleEnv(len(tasks) * num_episodes, self.noise)


register(RepeatPrevious.name, RepeatPrevious)
register(NoisyPositionOnlyCartPole.name, NoisyPositionOnlyCartPole)
