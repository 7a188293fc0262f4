"""What the parameters of a task can be, and their layout for many environments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ssm_metarl.checks import no_such
from ssm_metarl.core import Task


@dataclass(frozen=True)
class Parameter:
    """The values that one parameter of a task can take at all, whatever the splits draw.

    Attributes:
        low, high: least and greatest value, both included.
        size: None for a number, n for a list of n numbers.
        choices: the only valid values where these are few, else empty.
    """

    low: float
    high: float
    size: int | None = None
    choices: tuple[float, ...] = ()

    def allows(self, value: object) -> bool:
        """Whether `value` is one number, or a list of `size` of them, and every number is in the range."""
        if self.size is None:
            return self._allows_number(value)
        return isinstance(value, list) and len(value) == self.size and all(map(self._allows_number, value))

    def _allows_number(self, value: object) -> bool:
        return (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and self.low <= value <= self.high  # false for NaN
            and (not self.choices or value in self.choices)
        )

    def __str__(self) -> str:
        if self.choices:
            return " or ".join(f"{choice:g}" for choice in self.choices)
        number = "a number" if self.size is None else f"a list of {self.size} numbers"
        return f"{number} in [{self.low:g}, {self.high:g}]"


def stack_parameters(
    tasks: Sequence[Task], parameters: Mapping[str, Parameter], num_episodes: int
) -> dict[str, NDArray[np.float64]]:
    """Check the parameters of M tasks and lay them out for M*K environments; `make_vector_env` calls this.

    Args:
        tasks: M tasks, each with exactly the keys of `parameters`.
        parameters: what each key may be.
        num_episodes: K.

    Returns:
        For each key an array [M*K], or [M*K, size], float64, a task's value repeated K times.

    Raises:
        ValueError: there is no task or no slot, or a key is missing, unknown or has an impossible value.
    """
    if not tasks or num_episodes < 1:
        raise ValueError(f"At least one task and one slot are needed, not {len(tasks)} and {num_episodes}.")
    for number, task in enumerate(tasks):
        for key in task:
            if key not in parameters:
                raise ValueError(f"Task {number}: there is {no_such('parameter', key, parameters)}")
        for key, parameter in parameters.items():
            if key not in task:
                raise ValueError(f"Task {number} lacks the parameter {key!r}, which is {parameter}.")
            if not parameter.allows(task[key]):
                raise ValueError(f"Task {number}: {key!r} must be {parameter}, not {task[key]!r}.")
    return {
        key: np.repeat(np.asarray([task[key] for task in tasks], dtype=np.float64), num_episodes, axis=0)
        for key in parameters
    }
