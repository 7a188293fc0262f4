"""Environments with observations of other people's habits; `tasks/external/test_habits.py` says what is right."""

from __future__ import annotations

import copy
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, Graph, MultiBinary, MultiDiscrete, OneOf, Sequence, Text, Tuple

from habits import Base


class Sampled(Base):
    """Observes samples of its space."""

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        if seed is not None:
            self.observation_space = copy.deepcopy(self.observation_space)
            self.observation_space.seed(seed)
        return super().reset(seed=seed)

    def seen(self) -> Any:
        return self.observation_space.sample()


# --- Observations that are taken -------------------------------------------------------------------------------


class ObsBytes(Sampled):
    observation_space = Box(0, 255, (2,), np.uint8)


class ObsInt8(Sampled):
    observation_space = Box(-128, 127, (3,), np.int8)


class ObsHalf(Sampled):
    observation_space = Box(-1, 1, (3,), np.float16)


class ObsDouble(Sampled):
    observation_space = Box(-1e308, np.inf, (2,), np.float64)

    def seen(self) -> Any:
        return np.array([self.x, self.t])


class ObsList(Base):
    def seen(self) -> Any:
        return [float(self.x), self.t]


class ObsBools(Base):
    observation_space = Box(0, 1, (2,), np.uint8)

    def seen(self) -> Any:
        return np.array([True, False])


class ObsRow(Base):
    """One row where its numbers are declared."""

    def seen(self) -> Any:
        return super().seen()[None]


class ObsImage(Sampled):
    observation_space = Box(0, 255, (16, 16, 3), np.uint8)


class ObsMB(Sampled):
    observation_space = MultiBinary(3)


class ObsGridMB(Sampled):
    observation_space = MultiBinary([2, 3])


class ObsBoolsMB(Base):
    observation_space = MultiBinary(2)

    def seen(self) -> Any:
        return [True, False]


class ObsGridMD(Sampled):
    observation_space = MultiDiscrete([[2, 3], [4, 5]])


class ObsBytesMD(Base):
    """In its space, but no place in an array is counted in bytes."""

    observation_space = MultiDiscrete([2, 3], dtype=np.uint8)

    def seen(self) -> Any:
        return np.array([1, 2])


class ObsFloatsMD(ObsBytesMD):
    def seen(self) -> Any:
        return np.array([1.0, 2.0])


class ObsStart(Base):
    observation_space = Discrete(3, start=-1)

    def seen(self) -> Any:
        return self.t % 3 - 1


class ObsDict(Sampled):
    observation_space = Dict({"a": Box(-1, 1, (2,)), "b": Discrete(3)})


class ObsOneKey(Sampled):
    observation_space = Dict({"state": Box(-1, 1, (4,))})


class ObsTuple(Sampled):
    observation_space = Tuple((Box(-1, 1, (2,)), Discrete(3)))


class ObsNested(Sampled):
    observation_space = Dict(
        {"far": Tuple((Discrete(3, start=2), MultiBinary(2))), "near": Dict({"pixels": Box(0, 255, (2, 2), np.uint8)})}
    )


class ObsBytesInDict(Base):
    """Fractions where bytes are declared: casting them to bytes would leave zeros."""

    observation_space = Dict({"image": Box(0, 255, (2, 2), np.uint8), "time": Discrete(9)})

    def seen(self) -> Any:
        return {"image": np.full((2, 2), 0.5), "time": self.t}


# --- Observations that are not ---------------------------------------------------------------------------------


class ObsWrongShape(Base):
    def seen(self) -> Any:
        return np.zeros(3, np.float32)


class ObsTransposed(Base):
    observation_space = Box(-1, 1, (2, 3))

    def seen(self) -> Any:
        return np.zeros((3, 2), np.float32)


class ObsRagged(Base):
    def seen(self) -> Any:
        return [[0.0], [1.0, 2.0]]


class ObsWords(Base):
    def seen(self) -> Any:
        return ["0", "1"]


class ObsNone(Base):
    def seen(self) -> Any:
        return None


class ObsDiscOut(Base):
    observation_space = Discrete(3)

    def seen(self) -> Any:
        return 3 if self.t > 2 else 0


class ObsDiscNeg(Base):
    observation_space = Discrete(3)

    def seen(self) -> Any:
        return -1 if self.t > 2 else 0


class ObsBelowStart(Base):
    observation_space = Discrete(3, start=5)

    def seen(self) -> Any:
        return 4


class ObsFraction(Base):
    observation_space = Discrete(3)

    def seen(self) -> Any:
        return 0.5


class ObsOneHot(Base):
    observation_space = Discrete(3)

    def seen(self) -> Any:
        return np.array([0, 1, 0])


class ObsMDOut(Base):
    """Its first value would be the second number's."""

    observation_space = MultiDiscrete([2, 3])

    def seen(self) -> Any:
        return np.array([2, 0])


class ObsMDFraction(ObsMDOut):
    def seen(self) -> Any:
        return np.array([0.5, 0])


class ObsScalarForMD(ObsMDOut):
    def seen(self) -> Any:
        return 1


class ObsMBOut(Base):
    observation_space = MultiBinary(2)

    def seen(self) -> Any:
        return np.array([0, 2])


class ObsMissingKey(ObsDict):
    def seen(self) -> Any:
        return {"a": np.zeros(2, np.float32)}


class ObsDeepOut(ObsNested):
    def seen(self) -> Any:
        return super().seen() | {"far": (5, np.zeros(2, np.int8))}


class ObsVectorForTuple(Base):
    observation_space = Tuple((Box(-1, 1, (2,)), Discrete(3)))


class ObsNaN(Base):
    def seen(self) -> Any:
        return np.array([np.nan if self.t > 2 else 0, 0], np.float32)


# --- Spaces without a vector -----------------------------------------------------------------------------------


class ObsEmpty(Sampled):
    observation_space = Box(-1, 1, (0,), np.float32)


class ObsNoKeys(Sampled):
    observation_space = Dict({})


class ObsText(Sampled):
    observation_space = Dict({"a": Box(-1, 1, (2,)), "said": Text(5)})


class ObsGraph(Sampled):
    observation_space = Graph(Box(-1, 1, (2,)), Discrete(2))


class ObsSequence(Sampled):
    observation_space = Tuple((Discrete(2), Sequence(Discrete(2))))


class ObsOneOf(Sampled):
    observation_space = OneOf((Discrete(2), Box(-1, 1, (2,))))


class ObsScreen(Sampled):
    observation_space = Box(0, 255, (84, 84, 3), np.uint8)


class ObsNoSpace(Base):
    observation_space = None


def flattened() -> Any:
    return gymnasium.wrappers.FlattenObservation(ObsDict())
