"""The names and shapes of a policy's parameters."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from builders import make_spec
from ssm_metarl.algorithms.numpy_policy import NumpyPolicy
from ssm_metarl.algorithms.parameters import adapts, expected_shapes
from ssm_metarl.algorithms.policy import SSMPolicy

FLAGS = ("gated", "discrete", "learned_step_sizes", "normalize_observations", "scale_rewards", "separate_critic")


@pytest.mark.parametrize("slots", [0, 3])
@pytest.mark.parametrize("task_size", [0, 2])
def test_the_table_names_what_torch_holds_and_numpy_reads(slots: int, task_size: int) -> None:
    """In every form; workers read nothing that only the learner needs, and all else."""
    for flags in itertools.product([False, True], repeat=len(FLAGS)):
        spec = make_spec(num_layers=2, memory_slots=slots, task_size=task_size, **dict(zip(FLAGS, flags, strict=True)))
        shapes, policy = expected_shapes(spec), SSMPolicy(spec)
        arrays = policy.numpy_weights()
        assert [(name, value.shape) for name, value in arrays.items()] == list(shapes.items())
        assert policy.state_dict().keys() == shapes.keys()
        read = Reads(arrays)
        NumpyPolicy(spec, read)
        assert read.names == {name for name in shapes if adapts(name) or name in ("input_mean", "input_scale")}


class Reads(dict[str, Any]):
    """What remembers which of its entries were read."""

    def __init__(self, entries: dict[str, Any]) -> None:
        super().__init__(entries)
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.names.add(name)
        return super().__getitem__(name)
