"""Environments of other people's habits; `tasks/external/test_habits.py` says what is right of `habits:NAME`.

Each differs from `Base` in the one habit that it is named after. Those of observations are in `odd_observations`.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete, Text, Tuple


class Base(gymnasium.Env[Any, Any]):
    """Move to a hidden place on a line."""

    horizon = 8
    observation_space: Any = Box(-np.inf, np.inf, (2,), np.float32)
    action_space: Any = Box(-1, 1, (1,), np.float32)
    x, t = 0.0, 0

    def sample_tasks(self, n: int) -> Any:
        return [{"goal": float(goal)} for goal in self.np_random.uniform(-1, 1, n)]

    def set_task(self, task: Any) -> None:
        self.goal = task["goal"]

    def seen(self) -> Any:
        return np.array([self.x, self.t], np.float32)

    def reward(self) -> Any:
        return -abs(self.x - self.goal)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.x, self.t = 0.0, 0
        return self.seen(), {}

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action), (self.action_space, action)
        self.x += 0.1 * float(np.ravel(action)[0])
        self.t += 1
        return self.seen(), self.reward(), False, False, {}


# --- Actions ---------------------------------------------------------------------------------------------------


class ActStart(Base):
    action_space = Discrete(3, start=1)


class ActMD(Base):
    action_space = MultiDiscrete([2, 3])


class ActMDStart(Base):
    action_space = MultiDiscrete([2, 5], start=[3, -2])


class ActGridMD(Base):
    action_space = MultiDiscrete(np.array([[2, 3], [4, 1]]))


class ActMB(Base):
    action_space = MultiBinary(3)


class ActGridMB(Base):
    action_space = MultiBinary([2, 2])


class ActInt(Base):
    action_space = Box(0, 3, (2,), np.int32)


class ActIntUnequal(Base):
    action_space = Box(np.array([-100, 7], np.int64), np.array([100, 9], np.int64), dtype=np.int64)


class ActByte(Base):
    action_space = Box(0, 255, (), np.uint8)


class Act0d(Base):
    action_space = Box(-1, 1, (), np.float32)


class Act2d(Base):
    action_space = Box(-1, 1, (2, 2), np.float64)


class ActHalf(Base):
    action_space = Box(-1, 1, (2,), np.float16)


class ActWide(Base):
    action_space = Box(0, 10_000, (2,), np.int32)


class ActEmpty(Base):
    action_space = Box(-1, 1, (0,), np.float32)


class ActTuple(Base):
    action_space = Tuple((Discrete(2), Discrete(2)))


class ActText(Base):
    action_space = Text(4)


# --- Rewards and ends ------------------------------------------------------------------------------------------


class Rewarded(Base):
    """Rewarded by what it is made with."""

    def __init__(self, given: Any = 0.5) -> None:
        self.given = given

    def reward(self) -> Any:
        return self.given


class RewRow(Base):
    def reward(self) -> Any:
        return np.array([super().reward()])


class RewNone(Base):
    def reward(self) -> Any:
        return None if self.t > 2 else 0.0


class RewText(Base):
    def reward(self) -> Any:
        return "1.5"


class RewTwo(Base):
    def reward(self) -> Any:
        return np.zeros(2)


class RewComplex(Base):
    def reward(self) -> Any:
        return 1j


class EndsInt(Base):
    def step(self, action: Any) -> Any:
        seen, reward, *_ = super().step(action)
        return seen, reward, int(self.t >= 4), np.array([0]), {}


class EndsText(Base):
    def step(self, action: Any) -> Any:
        seen, reward, *_ = super().step(action)
        return seen, reward, "no", False, {}


# --- Older interfaces ------------------------------------------------------------------------------------------


class OldReset(Base):
    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        return super().reset(seed=seed)[0]


class OldSeed(Base):
    def reset(self) -> Any:  # type: ignore[override]
        return super().reset()


class NoOptions(Base):
    def reset(self, seed: int | None = None) -> Any:  # type: ignore[override]
        return super().reset(seed=seed)


class OldStep(Base):
    def step(self, action: Any) -> Any:
        seen, reward, terminated, _, info = super().step(action)
        return seen, reward, terminated, info


# --- How they are made -----------------------------------------------------------------------------------------


class Sized(Base):
    """Needs an argument, and has one that changes the space."""

    def __init__(self, size: int, names: Any = ()) -> None:
        self.observation_space = Box(-np.inf, np.inf, (size,), np.float32)
        self.names = names

    def seen(self) -> Any:
        return np.zeros(self.observation_space.shape, np.float32)


class Prints(Base):
    def step(self, action: Any) -> Any:
        print("noise on stdout")
        return super().step(action)


class Exits(Base):
    def step(self, action: Any) -> Any:
        raise SystemExit(3)


class Bits(Base):
    """Set the bits that the task wants; the last reward tells how many were right."""

    horizon = 4
    observation_space = Box(-1, 1, (1,), np.float32)
    action_space = MultiBinary(3)

    def seen(self) -> Any:
        return np.zeros(1, np.float32)

    def sample_tasks(self, n: int) -> Any:
        return [{"bits": bits} for bits in self.np_random.integers(0, 2, (n, 3)).tolist()]

    def set_task(self, task: Any) -> None:
        self.bits = np.array(task["bits"])

    def step(self, action: Any) -> Any:
        return self.seen(), float((action == self.bits).sum()), False, False, {}


def several() -> list[Base]:
    """Environments where one is meant."""
    return [Base(), Base()]


def vectors() -> Any:
    """A vector of environments where one is meant."""
    return gymnasium.vector.SyncVectorEnv([Base, Base])
