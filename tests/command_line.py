"""What the tests of the command line share."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

SMALL: dict[str, Any] = {"meta_batch": 4, "episodes": 3, "hidden_dim": 16, "state_dim": 8, "epochs": 1}
# A schedule that ends with the last iteration would tell runs of different lengths apart.
SMALL["lr_schedule"] = "constant"
OPTIONS = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", str(value))]
IN_PROCESS = [*OPTIONS, "--num-workers", "0", "--eval-tasks", "3"]


class Outcome(NamedTuple):
    """Exit code, stdout and stderr."""

    code: int
    out: str
    err: str


Command = Callable[..., Outcome]
"""Runs the command line with these words."""

EVALUATION = {"task", "split", "num_tasks", "return", "ci_low", "ci_high", "episode_length", "return_by_episode"}
EVALUATION |= {"environment_steps", "seconds"}
"""Keys of an evaluation."""


def only_object(out: str) -> dict[str, Any]:
    """The one JSON object that all of `out` is."""
    value = json.loads(out, parse_constant=pytest.fail)
    assert isinstance(value, dict)
    assert len(out.splitlines()) == 1
    return value


def join_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a command take the Ray of the test session, which there must be, instead of starting one."""
    for module in ("distributed.train", "evaluation.tasks"):
        monkeypatch.setattr(f"ssm_metarl.{module}.start_ray", lambda *needed, always=False: None)
