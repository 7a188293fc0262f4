"""The examples run and do what they say."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module that a test is named after, found as by `python examples/NAME.py`."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return import_module(request.node.name.removeprefix("test_"))


def test_own_family(example: ModuleType, tmp_path: Path) -> None:
    before, after = example.main(str(tmp_path / "run"), iterations=4)
    assert after > before + 3, "one step finds the goal's side"


def test_act(example: ModuleType) -> None:
    assert np.mean(example.main(episodes=3)) < 100, "a policy that has not adapted does not know the task"


def test_adapt(example: ModuleType) -> None:
    (before, after), curve = example.main()
    assert after > before + 300
    assert max(curve) > curve[0] + 300


@pytest.mark.slow
def test_evolve(example: ModuleType, ray_session: None, tmp_path: Path) -> None:
    assert len(example.main(str(tmp_path / "run"), generations=1, num_tasks=4)) == 2
