"""`bandit`: slot machines of unknown odds, the smallest problem of exploring and exploiting.

The bandits of RL² (Duan et al. 2016, arXiv 1611.02779): every arm pays 1 with a probability of its
own, uniform in [0, 1], and else 0; an episode is a fixed number of pulls. Nothing is observed but the payments.
"""

from __future__ import annotations

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

OBSERVATION_SPACE = Box(0.0, 0.0, (1,), np.float32)


class BanditEnv(BatchedEnv):
    """N bandits.

    Args:
        probabilities: [N, arms], of a reward of 1.
        pulls: pulls an episode.
    """

    def __init__(self, probabilities: NDArray[np.float64], pulls: int) -> None:
        num_envs, self._arms = probabilities.shape
        super().__init__(OBSERVATION_SPACE, Discrete(self._arms), num_envs, pulls)
        self._probabilities = probabilities
        self._rows = np.arange(num_envs)
        # One number a pull, drawn when the episode starts: a pull pays where it is below the arm's probability.
        self._luck = np.zeros((pulls, num_envs))
        self._pull = 0  # of all episode slots: their episodes are equally long, and start and end together

    def _start(self, slots: NDArray[np.intp]) -> None:
        pulls = len(self._luck)
        self._luck[:, slots] = np.transpose([self._generator(slot).random(pulls) for slot in slots.tolist()])
        self._pull = 0

    def _advance(self, actions: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        arms = check_actions(actions, self._arms, "bandit")
        paid = self._luck[self._pull] < self._probabilities[self._rows, arms]
        self._pull += 1
        return paid.astype(np.float32), np.full(self.num_envs, self._pull == len(self._luck))

    def _observe(self) -> NDArray[np.float32]:
        return np.zeros((self.num_envs, 1), dtype=np.float32)


class Bandit(TaskDistribution):
    """Bernoulli bandits; a task is `{"probabilities": [p_1, ..., p_arms]}`.

    The last pull ends the problem truly: it returns terminated (and, being at the horizon, truncated).

    Args:
        arms: 2 or more.
        pulls: pulls an episode, 1 or more.

    Raises:
        ValueError: an option is no such number.
    """

    name = "bandit"
    observation_space = OBSERVATION_SPACE
    splits = SPLITS
    recommended = presets.of_task("bandit")

    def __init__(self, *, arms: int = 5, pulls: int = 100) -> None:
        self.arms = check_count("arms", arms, 2)
        self.horizon = check_count("pulls", pulls, 1)
        self.action_space: Discrete[np.int64] = Discrete(self.arms)
        self._parameters = {"probabilities": Parameter(0.0, 1.0, size=self.arms)}
        self.reference = _reference(self.arms, self.horizon)
        self.in_context = {
            **presets.of_task("bandit", "rl2"),
            # While many arms are pulled at random, one is seldom pulled again: over long stretches chance drowns what
            # that pays, and nothing is learned for millions of pulls.
            "gae_lambda": 0.9 if self.arms <= 10 else 0.8,
            # What a pull of an arm paid is a product of inputs, of arms + 3 few are not 0: weights of about 2.2.
            "encoder_scale": (5 * (self.arms + 3)) ** 0.5,
        }

    def sample(self, n: int, rng: np.random.Generator, split: str = "train") -> list[Task]:
        """Draw the odds of n bandits; see `TaskDistribution.sample`."""
        lookup(dict.fromkeys(SPLITS), split, "split")
        return [{"probabilities": odds} for odds in rng.random((n, self.arms)).tolist()]

    def make_vector_env(self, tasks: Sequence[Task], num_episodes: int) -> BanditEnv:
        """Build the environments of `tasks`; see `TaskDistribution.make_vector_env`."""
        return BanditEnv(stack_parameters(tasks, self._parameters, num_episodes)["probabilities"], self.horizon)


def _reference(arms: int, pulls: int) -> ReferenceReturns:
    """Exact: the arms at random against always the best arm, whose probability is the largest of `arms` uniforms.

    A pull of a random arm pays with the probability p̄, the mean over the task's arms, whose variance is
    v = 1/(12 arms). The return is binomial given p̄, hence its variance pulls · E[p̄(1 − p̄)] + pulls² · v.
    """
    v = 1 / (12 * arms)
    variance = pulls * (1 / 4 - v) + pulls**2 * v
    return ReferenceReturns(random=pulls / 2, random_sd=variance**0.5, oracle=pulls * arms / (arms + 1))


register(Bandit.name, Bandit)
