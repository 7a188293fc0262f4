"""What policy and critic read at each step, rebuilt from a record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ssm_metarl.algorithms.rollouts import TIMED, Array, Rollouts
from ssm_metarl.algorithms.spec import PolicySpec


def policy_inputs(spec: PolicySpec, rollouts: Rollouts) -> Array:
    """Inputs that the policy saw at each step of `rollouts`, rebuilt from the record.

    Returns:
        [M, T, K, I] float32: observation, then (`inputs="full"`) previous action (see `PolicySpec.encoded`), previous
        reward and start flag; previous action and reward are zero where `resets`.
    """
    if spec.inputs == "observation":
        return rollouts.observations
    actions = spec.encoded(rollouts.actions)
    size = spec.observation_size
    inputs = np.zeros((*rollouts.rewards.shape, spec.input_size), np.float32)
    inputs[..., :size] = rollouts.observations
    inputs[:, 1:, :, size:-2] = actions[:, :-1]
    inputs[:, 1:, :, -2] = rollouts.rewards[:, :-1]
    inputs[..., size:-1] *= ~rollouts.resets[..., None]
    inputs[..., -1] = rollouts.starts
    return inputs


def task_numbers(tasks: Sequence[Any]) -> Array:
    """Task features, which a privileged critic reads: all numbers of a task, by the order of their names.

    Args:
        tasks: M JSON values.

    Returns:
        [M, P] float32.

    Raises:
        ValueError: a task has something else than numbers, or a seed, or none, or the tasks do not have equally many.
    """

    def numbers(value: Any) -> Iterator[float]:
        if isinstance(value, Mapping):
            for name in sorted(value):
                if name == "seed":
                    raise ValueError(
                        "The privileged baseline needs tasks that are numbers; a seed, as here, tells nothing."
                    )
                yield from numbers(value[name])
        elif isinstance(value, list | tuple):
            for each in value:
                yield from numbers(each)
        elif isinstance(value, int | float):
            yield float(value)
        else:
            raise ValueError(f"The privileged baseline needs tasks that are numbers, but there is {value!r} in one.")

    found = [list(numbers(task)) for task in tasks]
    if len({len(each) for each in found}) > 1 or (found and not found[0]):
        raise ValueError("The privileged baseline needs tasks that are numbers, equally many in each.")
    return np.array(found, np.float32)


def critic_inputs(spec: PolicySpec, rollouts: Rollouts) -> tuple[Array, Array]:
    """What the critic reads of a record, and one step more: what the policy would have read after the last valid step.

    Returns:
        Inputs [M, T + 1, K, I] float32 and resets [M, T + 1, K] bool. The extra input of a slot stands after its
        last valid step; the inputs after it mean nothing.
    """
    rollouts = rollouts.masked()
    padded: dict[str, Any] = {
        name: np.concatenate([array := getattr(rollouts, name), np.zeros_like(array[:, :1])], 1) for name in TIMED
    }
    task, slot = np.indices(rollouts.lengths().shape)
    padded["observations"][task, rollouts.lengths(), slot] = rollouts.last_observations
    longer = replace(rollouts, **padded)
    return policy_inputs(spec, longer), longer.resets
