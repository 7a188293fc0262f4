"""The SSM policy in torch: encoder, SSM blocks, action head and value head."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal

from ssm_metarl.algorithms.affine import Affine, along
from ssm_metarl.algorithms.heads import ABSENT_LOGIT, logit_places, row_places
from ssm_metarl.algorithms.operations import linear, tanh
from ssm_metarl.algorithms.parameters import CRITIC_UNITS, adapts, step_size
from ssm_metarl.algorithms.rollouts import Array
from ssm_metarl.algorithms.spec import PolicySpec
from ssm_metarl.algorithms.ssm import SSMBlock

__all__ = ["PolicyOutput", "PolicySpec", "SSMPolicy"]


class PolicyOutput(NamedTuple):
    """What the policy says of a sequence: action distribution [M, T, K], value [M, T, K], state after the last step."""

    actions: Distribution
    values: Tensor
    state: list[Tensor]


class SSMPolicy(nn.Module):
    """Recurrent policy: tanh encoder → SSM blocks → Gaussian head or categorical ones, and a value head.

    Parameters may carry a leading task axis M, so that every task of a meta-batch runs with its own weights in one
    call:

        output = torch.func.functional_call(policy, adapted, (inputs, resets))
        log_probs = output.actions.log_prob(batch.actions)

    Args:
        spec: sizes and form.
        seed: seed of the initial weights.
    """

    # With `spec.normalizes`; set by the learner, see `normalize.py`.
    input_mean: Tensor
    input_scale: Tensor
    reward_scale: Tensor
    # With `spec.task_size`.
    task_mean: Tensor
    task_scale: Tensor

    def __init__(self, spec: PolicySpec, seed: int = 0) -> None:
        super().__init__()
        self.spec = spec
        generator = torch.Generator().manual_seed(seed)
        width = spec.hidden_dim
        self.encoder, self.blocks = _body(spec, generator)
        # A small last layer starts near the uniform or zero-mean policy.
        self.policy = ActionHead(width, spec.action_size, 0.01 * width**-0.5, generator)
        if not spec.discrete:
            log_std = torch.full((spec.action_size,), math.log(spec.initial_std))
            self.policy.log_std = nn.Parameter(log_std)
        self.value = Affine(width, 1, 0.01 * width**-0.5, generator)
        if spec.task_size:
            self.critic = PrivilegedCritic(width, spec.task_size, generator)
            self.register_buffer("task_mean", torch.zeros(spec.task_size))
            self.register_buffer("task_scale", torch.ones(spec.task_size))
        if spec.separate_critic:
            self.tower = Tower(spec, generator)
        if spec.learned_step_sizes:
            adapted = {name: value for name, value in self.named_parameters() if adapts(name)}
            factors = {step_size(name).partition(".")[2]: torch.ones_like(value) for name, value in adapted.items()}
            self.step_sizes = nn.ParameterDict(factors)
        if spec.normalizes:
            self.register_buffer("input_mean", torch.zeros(spec.input_size))
            self.register_buffer("input_scale", torch.ones(spec.input_size))
            self.register_buffer("reward_scale", torch.ones(1))

    def forward(
        self,
        inputs: Tensor,
        resets: Tensor | None = None,
        state: list[Tensor] | None = None,
        task_features: Tensor | None = None,
    ) -> PolicyOutput:
        """Run over a whole sequence.

        Args:
            inputs: [M, T, K, I], see `policy_inputs`.
            resets: [M, T, K] bool, where the recurrent state is zeroed before the step; None: nowhere.
            state: as of `initial_state`; None: zero.
            task_features: [M, P], which a privileged critic reads; None: those of an average task.

        Returns:
            Distributions and values over [M, T, K], and the state after the last step.
        """
        if not isinstance(inputs, Tensor):
            raise TypeError(
                f"A policy reads sequences of tensors, not {type(inputs).__name__}: to act in an environment use "
                "load_player(path).act(observation)."
            )
        inputs, own = self._normalized(inputs), len(self.blocks) * (2 if self.spec.memory_slots else 1)
        hidden, after = _through(self, inputs, resets, None if state is None else state[:own])
        valued = hidden
        if self.spec.separate_critic:
            valued, last = _through(self.tower, inputs, resets, None if state is None else state[own:])
            after += last
        return PolicyOutput(self._distribution(hidden), self._values(valued, task_features), after)

    def _values(self, hidden: Tensor, task_features: Tensor | None) -> Tensor:
        values = self.value(hidden)
        if self.spec.task_size:
            if task_features is not None:
                task_features = (task_features - self.task_mean) / self.task_scale
                task_features = task_features.reshape(
                    *task_features.shape[:-1], *[1] * (hidden.dim() - task_features.dim()), task_features.shape[-1]
                )
            values = values + self.critic(hidden, task_features)
        return values.squeeze(-1)

    @property
    def reward_scaling(self) -> float:
        """What rewards are divided by for the critic."""
        return float(self.reward_scale) if self.spec.normalizes else 1.0

    def initial_state(self, *lead: int) -> list[Tensor]:
        """Zero state, for each block modes [*lead, N/2, 2], and with a memory after them [*lead, S, H+2]; a separate
        critic's after the policy's."""
        sizes = [(self.spec.state_dim // 2, 2)]
        if self.spec.memory_slots:
            sizes.append((self.spec.memory_slots, self.spec.hidden_dim + 2))
        sizes = sizes * len(self.blocks) * (2 if self.spec.separate_critic else 1)
        return [torch.zeros((*lead, *size), device=self.encoder.weight.device) for size in sizes]

    def _normalized(self, inputs: Tensor) -> Tensor:
        if not self.spec.normalizes:
            return inputs
        return (inputs - along(self.input_mean, inputs)) / along(self.input_scale, inputs)

    def _distribution(self, hidden: Tensor) -> Distribution:
        head = self.policy(hidden)
        if self.spec.action_heads:
            heads = Categorical(logits=_by_head(head, self.spec.action_heads), validate_args=False)
            return Independent(heads, 1, validate_args=False)
        if self.spec.discrete:
            return Categorical(logits=head, validate_args=False)
        # Contiguous: the logarithm that log_prob takes of it is ten times slower on an expanded one.
        std = torch.exp(along(self.policy.log_std, head)).expand_as(head).contiguous()
        return Independent(Normal(head, std, validate_args=False), 1, validate_args=False)

    def load_numpy(self, weights: Mapping[str, Array]) -> None:
        """Take parameters and normaliser as `numpy_weights` gives them.

        Raises:
            RuntimeError: names or shapes are not those of this policy.
        """
        self.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in weights.items()})

    def numpy_weights(self) -> dict[str, Array]:
        """Copies of parameters and normaliser as float32 arrays by name: what workers act with and checkpoints keep."""
        return numpy_weights(dict(self.named_parameters()) | dict(self.named_buffers()))


class Tower(nn.Module):
    """An encoder and blocks like the policy's, for a critic of its own."""

    def __init__(self, spec: PolicySpec, generator: torch.Generator) -> None:
        super().__init__()
        self.encoder, self.blocks = _body(spec, generator)


def _body(spec: PolicySpec, generator: torch.Generator) -> tuple[Affine, nn.ModuleList]:
    """Encoder and SSM blocks."""
    width = spec.hidden_dim
    encoder = Affine(spec.input_size, width, spec.encoder_scale * spec.input_size**-0.5, generator)
    form = (width, spec.state_dim, spec.gated, generator, spec.min_period, spec.memory_slots)
    return encoder, nn.ModuleList([SSMBlock(*form) for _ in range(spec.num_layers)])


def _through(
    body: SSMPolicy | Tower, inputs: Tensor, resets: Tensor | None, state: list[Tensor] | None
) -> tuple[Tensor, list[Tensor]]:
    """The last block's output [M, T, K, H] over a sequence, and the states after the last step."""
    hidden: Tensor = tanh(body.encoder(inputs))
    after: list[Tensor] = []
    for i, block in enumerate(body.blocks):
        each = 0 if state is None else len(state) // len(body.blocks)
        hidden, last = block(hidden, resets, None if state is None else state[i * each : (i + 1) * each])
        after += last
    return hidden, after


class PrivilegedCritic(Affine):
    """What task features add to a value: C · tanh(hidden W + features U + b).

    The baseline of a policy gradient may depend on whatever the action does not change, and the task is such; it takes
    out of the advantages what a task is worth as a whole. The policy reads none of this (Pinto et al. 2018, arXiv
    1710.06542; Baisero and Amato 2022, arXiv 2105.11674).

    Args:
        width: H, of the policy's last layer.
        task_size: P.
        generator: source of the initial weights.
    """

    def __init__(self, width: int, task_size: int, generator: torch.Generator) -> None:
        # 2: a value is a product of memory and task features.
        scale = 2 * (width + task_size) ** -0.5
        super().__init__(width, CRITIC_UNITS, scale, generator)
        self.task = nn.Parameter(torch.randn((task_size, CRITIC_UNITS), generator=generator) * scale)
        self.out = nn.Parameter(torch.randn((CRITIC_UNITS, 1), generator=generator) * 0.01 * CRITIC_UNITS**-0.5)

    def forward(self, hidden: Tensor, task_features: Tensor | None = None) -> Tensor:
        """[M, ..., H] and [M, ..., P] → [M, ..., 1]; None: zeros."""
        inner = super().forward(hidden)
        return linear(tanh(inner if task_features is None else inner + linear(task_features, self.task)), self.out)


class ActionHead(Affine):
    """Mean or logits; for continuous actions with a learned standard deviation that is the same in every state."""

    log_std: Tensor


def _by_head(logits: Tensor, heads: tuple[int, ...]) -> Tensor:
    """`heads.by_head` in torch."""
    if len(set(heads)) == 1:
        return logits.unflatten(-1, (len(heads), heads[0]))
    places = torch.as_tensor(row_places(heads), device=logits.device)
    table = nn.functional.pad(logits, (0, 1), value=ABSENT_LOGIT).index_select(-1, places.flatten())
    return table.unflatten(-1, places.shape)


def logits_of(actions: Distribution, spec: PolicySpec) -> Tensor:
    """Normalised logits [..., A] of a discrete policy's distribution, those of all heads one after the other."""
    if not spec.action_heads:
        assert isinstance(actions, Categorical)
        return actions.logits
    assert isinstance(actions, Independent)
    logits: Tensor = actions.base_dist.logits.flatten(-2)
    if len(set(spec.action_heads)) == 1:
        return logits
    return logits.index_select(-1, torch.as_tensor(logit_places(spec.action_heads), device=logits.device))


def numpy_weights(parameters: Mapping[str, Tensor]) -> dict[str, Array]:
    """Copies of `parameters` as float32 arrays."""
    return {name: value.detach().cpu().numpy().copy() for name, value in parameters.items()}
