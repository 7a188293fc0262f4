"""`ml1:<environment>` and `ml10`: Meta-World's benchmarks of a robot arm on a table, with its own splits.

Yu et al. 2019, arXiv 1910.10897, as published by the package `metaworld` (3.0 or newer; the extra `metaworld`,
without which this module imports, and making a family raises a ValueError that says so). An environment is one
manipulation, such as `reach-v3`; a task is one of 50 placements of its goal and objects, which the observation
does not show. Rewards lie between 0 and 10 a step.

Meta-World draws its placements from a seed, here 0, and hands each out as pickled bytes. Ours are JSON, the number
of a placement; the bytes are Meta-World's, made in this process or in the one that sent the family here, and only
its own `set_task` reads them.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium.spaces import Box
from numpy.typing import NDArray

from ssm_metarl import presets
from ssm_metarl.checks import check_count, lookup
from ssm_metarl.core import ReferenceReturns, Task, TaskDistribution
from ssm_metarl.tasks.batched import BatchedEnv
from ssm_metarl.tasks.registry import load_extra

HORIZON = 500  # Meta-World's; it ends every episode there
SEED = 0  # of Meta-World's placements

ML1_PREFIX = "ml1:"

OBSERVATION_SPACE = Box(-np.inf, np.inf, (39,), np.float32)
ACTION_SPACE = Box(-1.0, 1.0, (4,), np.float32)

# Ours -> Meta-World's. It has no tasks between: those of validation are those of training, with other seeds.
SPLITS = {"train": "train", "validation": "train", "test": "test"}

KEYS = ("env", "index", "split")


# --- Meta-World -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Placements:
    """A benchmark as Meta-World drew it.

    Attributes:
        classes: split of Meta-World's -> name of an environment -> its class.
        tasks: split -> name of an environment -> Meta-World's `Task` objects, in its order.
    """

    classes: dict[str, dict[str, Any]]
    tasks: dict[str, dict[str, list[Any]]]


@functools.cache
def draw_placements(family: str) -> Placements:
    """Let Meta-World draw a benchmark, once a process: about 2 s for `ml1:…`, 15 s for `ml10`."""
    metaworld = load_extra("metaworld", "Meta-World", family)
    if family.startswith(ML1_PREFIX):
        benchmark = metaworld.ML1(family.removeprefix(ML1_PREFIX), seed=SEED)
    else:
        benchmark = metaworld.ML10(seed=SEED)
    tasks: dict[str, dict[str, list[Any]]] = {}
    for split, listed in (("train", benchmark.train_tasks), ("test", benchmark.test_tasks)):
        by_environment: defaultdict[str, list[Any]] = defaultdict(list)
        for task in listed:
            by_environment[task.env_name].append(task)
        tasks[split] = dict(by_environment)
    return Placements({"train": dict(benchmark.train_classes), "test": dict(benchmark.test_classes)}, tasks)


_IDLE: defaultdict[type[Any], list[Any]] = defaultdict(list)
"""Environments that no vector environment of this process uses: making one takes as long as 100 steps. Each holds
about 22 MB, so that 20 tasks of 20 episodes need 9 GB, shared among a run's workers."""


# --- The environment --------------------------------------------------------------------------------------


class MetaWorldEnv(BatchedEnv):
    """N of Meta-World's environments, stepped one after another: each is a simulator with Python around it.

    An episode depends on its task and actions alone: Meta-World has no chance after the placement. Episodes are
    truncated, never terminated; success ends none. An action that is NaN gives the reward NaN, so that `collect`
    drops the episode, and does not reach the simulator.

    Args:
        classes: N classes of Meta-World's environments.
        tasks: N `Task` objects of Meta-World.
        horizon: most steps of an episode, at most 500.
    """

    def __init__(self, classes: Sequence[type[Any]], tasks: Sequence[Any], horizon: int) -> None:
        super().__init__(OBSERVATION_SPACE, ACTION_SPACE, len(classes), horizon)
        self._envs = [_IDLE[kind].pop() if _IDLE[kind] else kind() for kind in classes]
        for env, task in zip(self._envs, tasks, strict=True):
            env.set_task(task)
        self._observations = np.zeros((self.num_envs, *OBSERVATION_SPACE.shape), dtype=np.float32)
        self._successes = np.zeros(self.num_envs, dtype=np.bool_)

    def close_extras(self, **kwargs: Any) -> None:
        """Leave the simulators to the next vector environment of this process."""
        for env in self._envs:
            _IDLE[type(env)].append(env)
        self._envs = []

    def _start(self, slots: NDArray[np.intp]) -> None:
        for slot in slots.tolist():
            self._observations[slot] = self._envs[slot].reset()[0]

    def _advance(self, actions: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        clipped = actions.astype(np.float32, copy=False).clip(-1, 1)
        rewards = np.zeros(self.num_envs, dtype=np.float32)
        for slot, env in enumerate(self._envs):
            action = clipped[slot]
            sound = bool(np.isfinite(action).all())
            observation, reward, *_, info = env.step(action if sound else np.zeros_like(action))
            self._observations[slot] = observation
            self._successes[slot] = info["success"] > 0
            rewards[slot] = reward if sound else np.nan
        return rewards, np.zeros(self.num_envs, dtype=np.bool_)

    def _observe(self) -> NDArray[np.float32]:
        return self._observations.copy()

    def _success(self) -> NDArray[np.bool_]:
        return self._successes.copy()


# --- Families ---------------------------------------------------------------------------------------------


class MetaWorld(TaskDistribution):
    """What `ML1` and `ML10` share.

    A task is `{"env": name, "index": number, "split": "train" or "test"}`: the placement of that number that
    Meta-World drew for that environment, in its own split. The family's split `test` is Meta-World's test split,
    for `ml10` five environments that training never meets; `validation` has the tasks of `train`.

    Placements are drawn when a task is first sampled or played, and travel to workers with the family.

    Args:
        name: the family's.
        horizon: most steps of an episode, at most Meta-World's 500.

    Raises:
        ValueError: Meta-World is not installed, or the horizon is not an integer from 1 to 500.
    """

    observation_space = OBSERVATION_SPACE
    action_space = ACTION_SPACE
    splits = tuple(SPLITS)
    enumerable = True
    recommended = presets.of_task("metaworld")
    in_context = presets.of_task("metaworld", "rl2")

    def __init__(self, name: str, *, horizon: int = HORIZON) -> None:
        load_extra("metaworld", "Meta-World", name)
        self.name = name
        self.horizon = check_count("horizon", horizon, 1, HORIZON)
        self._sent: Placements | None = None

    @property
    def placements(self) -> Placements:
        """Meta-World's classes and tasks."""
        return self._sent or draw_placements(self.name)

    @functools.cached_property
    def reference(self) -> ReferenceReturns:  # type: ignore[override]
        """Returns of random actions, measured when first asked for, always the same: 20 episodes on training tasks.

        Actions have mean 0 and standard deviation 0.5, an untrained Gaussian policy's. No best is known.
        """
        episodes = 20
        rng = np.random.default_rng(0)
        envs = self.make_vector_env(self.sample(episodes, rng), num_episodes=1)
        envs.reset(seed=0)
        returns = np.zeros(episodes)
        for _ in range(self.horizon):
            returns += envs.step(rng.normal(0.0, 0.5, (episodes, *ACTION_SPACE.shape)).astype(np.float32))[1]
        envs.close()
        return ReferenceReturns(float(returns.mean()), float(returns.std()), oracle=None)

    def sample(self, n: int, rng: np.random.Generator, split: str = "train") -> list[Task]:
        """Draw n tasks, every environment and placement with equal chance; see `TaskDistribution.sample`."""
        theirs = lookup(SPLITS, split, "split")
        tasks = self.placements.tasks[theirs]
        names = list(tasks)
        drawn = [names[i] for i in rng.integers(len(names), size=n)]
        return [{"env": env, "index": int(rng.integers(len(tasks[env]))), "split": theirs} for env in drawn]

    def make_vector_env(self, tasks: Sequence[Task], num_episodes: int) -> MetaWorldEnv:
        """Build the environments of `tasks`; see `TaskDistribution.make_vector_env`."""
        if not tasks or num_episodes < 1:
            raise ValueError(f"At least one task and one slot are needed, not {len(tasks)} and {num_episodes}.")
        classes, theirs = [], []
        for number, task in enumerate(tasks):
            env, index, split = self._checked(number, task)
            classes += [self.placements.classes[split][env]] * num_episodes
            theirs += [self.placements.tasks[split][env][index]] * num_episodes
        return MetaWorldEnv(classes, theirs, self.horizon)

    def _checked(self, number: int, task: Task) -> tuple[str, int, str]:
        """The three values of a task, which Meta-World has."""
        if set(task) != set(KEYS):
            raise ValueError(f"Task {number} must have the keys {', '.join(KEYS)}, not {', '.join(map(str, task))}.")
        try:
            tasks = lookup(lookup(self.placements.tasks, task["split"], "split"), task["env"], "environment")
        except ValueError as error:
            raise ValueError(f"Task {number}: {error}") from None
        index = check_count(f"Task {number}: 'index'", task["index"], 0, len(tasks) - 1)
        return task["env"], index, task["split"]

    def __getstate__(self) -> dict[str, Any]:
        # A worker that drew them itself would keep the others waiting at its first batch.
        return self.__dict__ | {"_sent": self.placements}


class ML1(MetaWorld):
    """Meta-World's ML1 of one environment: 50 placements to train with, 50 others for `test`.

    Args:
        env: such as "reach-v3"; the family's name is "ml1:reach-v3".
        horizon: most steps of an episode, at most Meta-World's 500.

    Raises:
        ValueError: Meta-World is not installed, or has no such environment; the sentence gives the nearest.
    """

    def __init__(self, env: str, *, horizon: int = HORIZON) -> None:
        name = f"{ML1_PREFIX}{env}"
        lookup(dict.fromkeys(load_extra("metaworld", "Meta-World", name).ML1.ENV_NAMES), env, "Meta-World environment")
        super().__init__(name, horizon=horizon)


class ML10(MetaWorld):
    """Meta-World's ML10: ten environments to train with, five others for `test`, 50 placements each.

    Args:
        horizon: most steps of an episode, at most Meta-World's 500.

    Raises:
        ValueError: Meta-World is not installed.
    """

    def __init__(self, *, horizon: int = HORIZON) -> None:
        super().__init__("ml10", horizon=horizon)
