"""Environments that are made for a test, and families of them."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from gymnasium.spaces import Discrete, Space

from external_environments import LINE, PENDULUM, Toy
from ssm_metarl.tasks import TaskDistribution
from ssm_metarl.tasks.external.gym import GymFamily
from ssm_metarl.tasks.external.names import from_name


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., GymFamily]]:
    """Registers toy environments of given spaces, and makes families of them."""
    before = dict(gymnasium.registry)

    def family(observation_space: Space[Any], action_space: Space[Any] | None = None, limit: int | None = 9) -> Any:
        spaces = {"observation_space": observation_space, "action_space": action_space or Discrete(2)}
        env_id = f"Toy{len(gymnasium.registry)}-v0"
        gymnasium.register(env_id, Toy, max_episode_steps=limit, kwargs=spaces)
        return from_name(f"gym:{env_id}")

    yield family
    gymnasium.registry.clear()
    gymnasium.registry.update(before)


_COUNTER = itertools.count()


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a module that can be imported, and returns its name."""

    def write(source: str) -> str:
        name = f"adapted_module_{next(_COUNTER)}"
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        monkeypatch.syspath_prepend(tmp_path)
        return name

    return write


@pytest.fixture(params=["gym:Pendulum-v1", "gym:CartPole-v1", "gym:FrozenLake-v1", "Line"])
def family(request: pytest.FixtureRequest, module: Callable[[str], str]) -> TaskDistribution:
    ranges = {"gym:Pendulum-v1": PENDULUM, "gym:CartPole-v1": {"length": [0.3, 1], "gravity": [5, 15]}}
    name = f"{module(LINE)}:Line" if request.param == "Line" else request.param
    return from_name(name, ranges.get(name, {}))
