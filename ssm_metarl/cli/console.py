"""The terminal that commands write to."""

from __future__ import annotations

from rich.console import Console

console = Console(stderr=True)

RUNS = "runs"
"""Parent of the run folders."""


def say(line: str) -> None:
    """A line to stderr as it is: paths may be long and hold brackets."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)
