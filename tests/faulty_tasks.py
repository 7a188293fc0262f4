"""Families of tasks that go wrong on purpose, for the tests of what happens then.

They stand beside conftest.py so that Ray's workers can import them: see its fixture `ray_session`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.spaces import Box
from numpy.typing import NDArray

from ssm_metarl.tasks import Task
from ssm_metarl.tasks.navigation import Navigation2D, NavigationEnv

FAULTY_STEP = 5  # the step of an episode, from 0, at which a fault happens


def _raise(env: FaultyEnv, slot: int) -> None:
    raise OSError(f"the simulator of goal {env.goal(slot)} fell over")


def _nan(env: FaultyEnv, slot: int) -> None:
    env.broken[slot] = True


def _kill(env: FaultyEnv, slot: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _exit(env: FaultyEnv, slot: int) -> None:
    sys.exit(3)


def _hang(env: FaultyEnv, slot: int) -> None:
    time.sleep(3600)


FAULTS: dict[str, Callable[[FaultyEnv, int], None]] = {
    "raise": _raise,
    "nan": _nan,  # the first slot's reward only
    "kill": _kill,  # with SIGKILL, and whatever process it is: with workers only
    "exit": _exit,
    "hang": _hang,
}


class FaultyEnv(NavigationEnv):
    """The environments of `FaultyNavigation`."""

    def __init__(self, tasks: Sequence[Task], num_episodes: int) -> None:
        super().__init__(np.repeat([task["goal"] for task in tasks], num_episodes, axis=0))
        self._tasks = tasks
        self._num_episodes = num_episodes
        self._step = 0
        self.broken = np.zeros(self.num_envs, dtype=np.bool_)

    def goal(self, slot: int) -> list[float]:
        """The goal of an episode slot, as its task has it."""
        return self._tasks[slot // self._num_episodes]["goal"]

    def _advance(self, actions: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        for number, task in enumerate(self._tasks):
            if "pause" in task:
                time.sleep(task["pause"])
            if "announce" in task and self._step == 0:
                _announce(Path(task["announce"]))
            if "tally" in task and self._step == 0:
                with Path(task["tally"]).open("a") as lines:
                    lines.write("played\n")
            if "waits_for" in task and self._step == 0:
                _wait_for_two(Path(task["waits_for"]))
            if "fault" in task and self._step == FAULTY_STEP:
                FAULTS[task["fault"]](self, number * self._num_episodes)
        self._step += 1
        rewards, terminated = super()._advance(actions)
        rewards[self.broken] = np.nan
        return rewards, terminated


def _wait_for_two(tally: Path) -> None:
    """Wait until the task with this tally has been played twice; an error where it is not."""
    end = time.monotonic() + 60
    while not (tally.exists() and tally.read_text().count("\n") >= 2):
        if time.monotonic() > end:
            raise OSError("the other task was not played again")
        time.sleep(0.02)


def _announce(path: Path) -> None:
    """Write this process's id, unless a worker did before."""
    if not path.exists():
        unfinished = path.with_suffix(f".{os.getpid()}")
        unfinished.write_text(str(os.getpid()))
        unfinished.rename(path)


class FaultyNavigation(Navigation2D):
    """`navigation-2d` cut at 20 steps, with tasks that may go wrong.

    A task is `{"goal": [x, y]}` and, each if wanted:

    - `"fault"`, one of `FAULTS`, which happens at step `FAULTY_STEP`;
    - `"pause"`, seconds that every step takes;
    - `"announce"`, a path where the first process that plays the task writes its id.
    """

    name = "faulty-navigation"
    horizon = 20

    def make_vector_env(self, tasks: Sequence[Task], num_episodes: int) -> FaultyEnv:
        """Build the environments of `tasks`."""
        return FaultyEnv(tasks, num_episodes)


class TellingEnv(FaultyEnv):
    """Says of each step whether it ends on the goal's side of the first axis."""

    def _success(self) -> NDArray[np.bool_]:
        return np.asarray((self._positions * self._goals)[:, 0] > 0)


class Telling(FaultyNavigation):
    """The same with success."""

    def make_vector_env(self, tasks: Sequence[Task], num_episodes: int) -> TellingEnv:
        """Build the environments of `tasks`."""
        return TellingEnv(tasks, num_episodes)


class FaultyAfter(FaultyNavigation):
    """Every environment raises, after some calls of `sample`."""

    def __init__(self, after: int) -> None:
        self.left = after

    def sample(self, n: int, rng: np.random.Generator, split: str = "train") -> list[Task]:
        """Draw n tasks; see `TaskDistribution.sample`."""
        self.left -= 1
        return [task | ({"fault": "raise"} if self.left < 0 else {}) for task in super().sample(n, rng, split)]


class Unstartable(FaultyNavigation):
    """A family that cannot be unpickled: no worker that gets it can start."""

    def __reduce__(self) -> tuple[Callable[[], object], tuple[()]]:
        return _cannot_unpickle, ()


def _cannot_unpickle() -> object:
    raise ImportError("the robot's drivers are not installed on this machine")


class Buggy(FaultyNavigation):
    """A family with a mistake in its own code, outside of any environment."""

    @property
    def horizon(self) -> int:  # type: ignore[override]
        """No horizon."""
        raise ZeroDivisionError("horizon is undefined")


class Doubled(Navigation2D):
    """Navigation whose moves may be twice as long."""

    action_space = Box(-0.2, 0.2, (2,), np.float32)
