"""One step of a policy for other runtimes: `torch.export` and ONNX."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ssm_metarl.algorithms.numpy_policy import NumpyPolicy
from ssm_metarl.algorithms.policy import SSMPolicy


class PolicyStep(nn.Module):
    """One step of a policy with its weights fixed, in real arithmetic alone: the computation of `NumpyPolicy`.

    Args:
        policy: whose parameters and normaliser are copied.
    """

    def __init__(self, policy: SSMPolicy) -> None:
        super().__init__()
        self.spec = policy.spec
        prepared = NumpyPolicy(policy.spec, policy.numpy_weights())
        self._add("encoder", prepared.encoder)
        if prepared.normalizer is not None:
            self._add("normalizer", prepared.normalizer)
        for i, (into, straight, crossed, out, skip, last, memory) in enumerate(prepared.blocks):
            self._add(f"block_{i}", (into, straight, crossed, out, skip, *last, *(memory or ())))
        self._add("readout", prepared.readout)

    def _add(self, name: str, arrays: Sequence[np.ndarray]) -> None:
        for i, array in enumerate(arrays):
            self.register_buffer(f"{name}_{i}", torch.from_numpy(np.array(array)))

    def _of(self, name: str, count: int) -> list[Tensor]:
        return [self.get_buffer(f"{name}_{i}") for i in range(count)]

    def initial_state(self, num_episodes: int) -> list[Tensor]:
        """Zero state of N environments: [N, 2, S/2] a block, real parts and imaginary parts, and with a memory after
        that [N, slots, H+2]."""
        spec = self.spec
        sizes = [(2, spec.state_dim // 2), *([(spec.memory_slots, spec.hidden_dim + 2)] if spec.memory_slots else [])]
        return [torch.zeros(num_episodes, *size) for _ in range(spec.num_layers) for size in sizes]

    def forward(self, inputs: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Run one step.

        Args:
            inputs: [N, I] float32, see `policy_inputs`: observation, and with `inputs="full"` the previous action
                (`PolicySpec.encoded`), the previous reward and the start flag.
            state: of the step before, as of `initial_state`.

        Returns:
            [N, A]: the mean action in [-1, 1] before clipping (see `PolicySpec.env_actions`), or logits, those of
            `PolicySpec.action_heads` one head after the other; and the new state.
        """
        spec = self.spec
        weight, bias = self._of("encoder", 2)
        if spec.normalizes:
            mean, scale = self._of("normalizer", 2)
            inputs = (inputs - mean) / scale
        hidden = torch.tanh((inputs @ weight + bias) / 2)
        head, before, after = None, iter(state), []
        for i in range(spec.num_layers):
            arrays = self._of(f"block_{i}", 10 if spec.memory_slots else 7)
            into, straight, crossed, out, skip, last_weight, last_bias = arrays[:7]
            h = next(before)
            new = straight * h + crossed * h.flip(-2) + (hidden @ into).reshape(h.shape)
            after.append(new)
            y = new.flatten(-2) @ out + skip * hidden
            if spec.memory_slots:
                recalled, contents = _recall(hidden, next(before), *arrays[7:])
                y = y + recalled * (1 if spec.gated else 2)  # what tanh(y / 2) reads is doubled
                after.append(contents)
            if spec.gated:
                hidden = hidden + y * torch.sigmoid(last_weight * hidden + last_bias)
                continue
            y = torch.tanh(y / 2) @ last_weight
            if i == spec.num_layers - 1:
                head = y
            else:
                hidden = hidden + y + last_bias
        weight, bias = self._of("readout", 2)
        read = hidden @ weight + bias
        return read if head is None else read + head, after


def _recall(hidden: Tensor, state: Tensor, address: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """One step of `SlotMemory`: what is recalled [N, H], and the state after it."""
    value = hidden @ weight + bias
    value = torch.cat([value, torch.ones_like(value[..., :1])], -1)
    sums = state[..., :-1] + state[..., -1:] * value.unsqueeze(-2)
    at = torch.softmax(hidden @ address, -1)
    found = (at.unsqueeze(-2) @ sums).squeeze(-2)
    return found[..., :-1] / (found[..., -1:] + 1), torch.cat([sums, at.unsqueeze(-1)], -1)


def export_step(policy: SSMPolicy) -> torch.export.ExportedProgram:
    """A policy's step for any number of environments, as `torch.export` captures it; see `PolicyStep.forward`:

    step = export_step(policy).module()
    head, state = step(inputs, state)
    """
    module, arguments, shapes = _captured(policy)
    return torch.export.export(module, arguments, dynamic_shapes=shapes)


def export_onnx(policy: SSMPolicy, path: str | Path) -> Path:
    """Write a policy's step as an ONNX file, with the inputs `inputs`, `state_0`, … and the outputs `head`,
    `next_state_0`, …; see `PolicyStep.forward`.

    Raises:
        ValueError: ONNX is not installed; the sentence says how to get it.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise ValueError("Export to ONNX needs it: pip install 'ssm-metarl[onnx]'") from None
    module, arguments, shapes = _captured(policy)
    count = len(arguments[1])
    path = Path(path)
    torch.onnx.export(
        module,
        arguments,
        str(path),
        input_names=["inputs", *(f"state_{i}" for i in range(count))],
        output_names=["head", *(f"next_state_{i}" for i in range(count))],
        dynamic_shapes=shapes,
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    return path


def _captured(policy: SSMPolicy) -> tuple[PolicyStep, tuple[Tensor, list[Tensor]], tuple[object, list[object]]]:
    """The module, example arguments, and which of their axes can have any length."""
    module = PolicyStep(policy).eval()
    state = module.initial_state(2)
    num_episodes = torch.export.Dim("num_episodes")
    return (
        module,
        (torch.zeros(2, policy.spec.input_size), state),
        ({0: num_episodes}, [{0: num_episodes} for _ in state]),
    )
