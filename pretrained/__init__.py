"""Meta-trained models that come with the package: a folder each, a checkpoint with `card.json` beside it."""

from __future__ import annotations

from pathlib import Path

PREFIX = "pretrained:"
"""What the name of a shipped model begins with wherever a checkpoint's path is taken."""


def names() -> list[str]:
    """Names of the shipped models, in order."""
    return sorted(path.parent.name for path in Path(__file__).parent.glob("*/manifest.json"))


def folder(name: str) -> Path:
    """The checkpoint folder of a shipped model.

    Raises:
        ValueError: there is none of that name; the sentence lists those that there are.
    """
    if name not in names():
        raise ValueError(f"There is no pretrained model {name!r}; there are {', '.join(names())}.")
    return Path(__file__).parent / name
