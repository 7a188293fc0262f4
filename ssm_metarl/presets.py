"""Options that are known to train, by algorithm and task: `presets.toml`."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from importlib.resources import files
from typing import Any


@functools.cache
def table() -> Mapping[str, Mapping[str, Any]]:
    """`presets.toml`: the tables `algorithms` and `tasks`."""
    return tomllib.loads((files("ssm_metarl") / "presets.toml").read_text())


def of_algorithm(algorithm: str) -> dict[str, Any]:
    """What an algorithm starts from on every task; nothing for one without an entry."""
    return dict(table()["algorithms"].get(algorithm, {}))


def of_task(task: str, algorithm: str | None = None) -> dict[str, Any]:
    """What trains a task by algorithms with inner steps, or by `algorithm` where the task has a table for it."""
    entry = table()["tasks"][task]
    if algorithm is not None:
        return dict(entry[algorithm])
    return {name: value for name, value in entry.items() if not isinstance(value, Mapping)}
