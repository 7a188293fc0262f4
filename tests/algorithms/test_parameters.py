"""The names and shapes of a policy's parameters."""

from __future__ import annotations

import pytest

from builders import make_spec
from ssm_metarl.algorithms.parameters import expected_shapes
from ssm_metarl.algorithms.policy import SSMPolicy


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("discrete", [False, True])
def test_checkpoints_know_the_arrays_of_every_form(gated: bool, discrete: bool) -> None:
    step_sizes = {"learned_step_sizes": True}
    for flags in ({}, step_sizes, {"normalize_observations": True, **step_sizes}, {"task_size": 2, **step_sizes},
                  {"task_size": 2, "scale_rewards": True}):  # fmt: skip
        spec = make_spec(num_layers=2, gated=gated, discrete=discrete, **flags)
        arrays = SSMPolicy(spec).numpy_weights()
        assert list(arrays) == list(expected_shapes(spec))
        assert {name: value.shape for name, value in arrays.items()} == expected_shapes(spec)
