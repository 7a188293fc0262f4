"""The SSM policy as RLlib's module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from ray.rllib.core.columns import Columns
from ray.rllib.core.distribution.torch.torch_distribution import TorchMultiCategorical
from ray.rllib.core.rl_module.apis.value_function_api import ValueFunctionAPI
from ray.rllib.core.rl_module.torch import TorchRLModule
from torch import Tensor

from ssm_metarl.algorithms.policy import SSMPolicy, logits_of
from ssm_metarl.algorithms.rollouts import Array
from ssm_metarl.algorithms.spec import PolicySpec


def state_name(number: int) -> str:
    """Name in RLlib's batches of a tensor of `SSMPolicy.initial_state`."""
    return f"ssm_{number}"


class SSMModule(TorchRLModule, ValueFunctionAPI):
    """An `SSMPolicy` as RLlib's workers and learner call it; its state dict is the policy's, name by name.

    Sequences come as [B, T, I], zero-padded at their end, each with the recurrent state before its first step
    (zero where an episode begins: a sequence never goes beyond one), of which each tensor has a name of its own.

    Values are in rewards as the environment gives them; the policy's critic itself speaks in units of its
    `reward_scaling`.
    """

    def setup(self) -> None:
        """Build the policy that `model_config["spec"]` describes; RLlib calls it once."""
        self.ssm = SSMPolicy(PolicySpec.from_dict(self.model_config["spec"]))
        if heads := self.ssm.spec.action_heads:  # RLlib itself chooses for single integers and numbers only
            self.action_dist_cls = TorchMultiCategorical.get_partial_dist_cls(input_lens=list(heads))

    def get_initial_state(self) -> dict[str, Tensor]:
        """Zero state of one episode, as `SSMPolicy.initial_state` by `state_name`; without blocks, empty."""
        return {state_name(i): each for i, each in enumerate(self.ssm.initial_state())}

    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Array]:
        """Parameters and normaliser, as in a checkpoint's `policy.safetensors`."""
        return self.ssm.numpy_weights()

    def set_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of `get_state`."""
        self.ssm.load_state_dict({name: torch.as_tensor(value) for name, value in state.items()})

    def _forward(self, batch: Mapping[str, Any], **kwargs: Any) -> dict[str, Any]:
        logits, _, state = self._run(batch[Columns.OBS], batch)
        return {Columns.ACTION_DIST_INPUTS: logits, **({Columns.STATE_OUT: state} if state else {})}

    def _forward_train(self, batch: Mapping[str, Any], **kwargs: Any) -> dict[str, Any]:
        inputs = batch[Columns.OBS]
        steps = int(batch[Columns.SEQ_LENS].max()) if Columns.SEQ_LENS in batch else inputs.shape[1]
        logits, values, _ = self._run(inputs[:, :steps], batch)
        if Columns.SEQ_LENS in batch:
            # A narrow distribution's density at the zeros after a sequence's end can be infinite in RLlib's ratio. The
            # gradient is then no number, masked or not.
            lengths = torch.as_tensor(batch[Columns.SEQ_LENS], device=logits.device)
            taken = torch.arange(steps, device=logits.device) < lengths[:, None]
            logits = torch.where(taken[..., None], logits, 0.0)
        missing = inputs.shape[1] - steps  # RLlib pads all sequences to max_seq_len: what no episode reaches is not run
        logits = torch.nn.functional.pad(logits, (0, 0, 0, missing))
        return {
            Columns.ACTION_DIST_INPUTS: logits,
            Columns.EMBEDDINGS: torch.nn.functional.pad(values, (0, missing)),
        }

    def compute_values(self, batch: Mapping[str, Any], embeddings: Tensor | None = None) -> Tensor:
        """Values [B, T] of the steps in a batch; `embeddings` are those that `forward_train` has found already."""
        return self._forward_train(batch)[Columns.EMBEDDINGS] if embeddings is None else embeddings

    def _run(self, inputs: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Inputs of RLlib's distribution [B, T, ...], values [B, T] and the state after the last step."""
        stateful = self.is_stateful()
        sequence = inputs.transpose(0, 1) if stateful else inputs[None]  # the policy's axes: time first
        given = batch[Columns.STATE_IN] if stateful else {}
        before = [given[state_name(i)] for i in range(len(given))] if stateful else None
        output = self.ssm(sequence, state=before)
        if self.ssm.spec.discrete:
            logits = logits_of(output.actions, self.ssm.spec)
        else:
            normal = output.actions.base_dist
            logits = torch.cat([normal.loc, normal.scale.log()], -1)
        values = output.values * self.ssm.reward_scaling
        if not stateful:
            return logits[0], values[0], {}
        state = {state_name(i): each for i, each in enumerate(output.state)}
        return logits.transpose(0, 1), values.transpose(0, 1), state
