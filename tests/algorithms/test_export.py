"""An exported step is the player's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from builders import make_policy, make_spec
from ssm_metarl.algorithms.export import export_onnx, export_step
from ssm_metarl.algorithms.numpy_policy import NumpyPolicy
from ssm_metarl.algorithms.spec import PolicySpec

SPECS = {
    "default": make_spec(),
    "two gated blocks with a memory": make_spec(num_layers=2, gated=True, memory_slots=3),
    "two blocks with a memory, discrete": make_spec(num_layers=2, memory_slots=3, discrete=True, action_size=4),
    "no memory": make_spec(num_layers=0, inputs="observation"),
    "normalised": make_spec(normalize_observations=True, scale_rewards=True),
}


def reference(spec: PolicySpec, num_episodes: int) -> tuple[Any, list[Any], list[Any], list[Any]]:
    """A policy, the inputs of four steps, and what the NumPy policy makes of them."""
    policy = make_policy(spec)
    for name, buffer in policy.named_buffers():
        buffer.add_(0.3 if name.endswith("mean") else 0.5)
    acting = NumpyPolicy(spec, policy.numpy_weights())
    inputs = np.random.default_rng(0).normal(size=(4, num_episodes, spec.input_size)).astype(np.float32)
    state, heads = acting.initial_state(1, num_episodes), []
    for each in inputs:
        head, state = acting.head(each[None], state)
        heads.append(head[0])
    return policy, list(inputs), heads, [each[0] for each in state]


@pytest.mark.parametrize("num_episodes", [1, 5])
@pytest.mark.parametrize("name", SPECS)
def test_torch_export(name: str, num_episodes: int) -> None:
    spec = SPECS[name]
    policy, inputs, heads, last = reference(spec, num_episodes)
    program = export_step(policy)
    step = program.module()
    state = [torch.from_numpy(np.zeros_like(each)) for each in last]
    for each, expected in zip(inputs, heads, strict=True):
        head, state = step(torch.from_numpy(each), state)
        np.testing.assert_allclose(head.numpy(), expected, rtol=1e-4, atol=1e-5)
    for found, expected in zip(state, last, strict=True):
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", [name if name == "default" else pytest.param(name, marks=pytest.mark.slow) for name in SPECS]
)
def test_onnx(name: str, tmp_path: Path) -> None:
    spec = SPECS[name]
    policy, inputs, heads, last = reference(spec, 3)
    session = onnxruntime.InferenceSession(export_onnx(policy, tmp_path / "step.onnx"))
    assert [path.name for path in tmp_path.iterdir()] == ["step.onnx"]
    state = [np.zeros_like(each) for each in last]
    for each, expected in zip(inputs, heads, strict=True):
        fed = {"inputs": each, **{f"state_{i}": part for i, part in enumerate(state)}}
        head, *state = session.run(None, fed)
        np.testing.assert_allclose(head, expected, rtol=1e-4, atol=1e-5)
    for found, expected in zip(state, last, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
