"""Adam: steps that can be taken back in part, and its state as arrays."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ssm_metarl.algorithms.policy import SSMPolicy
from ssm_metarl.algorithms.rollouts import Array


class BoundedStep:
    """An update's Adam steps, of which the last one can be taken back in part.

    Adam's first steps are as long as its learning rate for every parameter, whatever the gradient: a policy that is
    sure of itself, and starts with a new optimiser, can be ruined by one.
    """

    shorter = 0.25
    most = 12

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._before: list[Tensor] = []
        self.shortened = 0

    def take(self) -> None:
        """A step along the gradients that are set."""
        self._before = [parameter.detach().clone() for parameter in self._parameters()]
        self._optimizer.step()

    def shorten(self) -> bool:
        """Go back three quarters of the last step, and make the next ones as short; False where it makes no sense."""
        if not self._before or self.shortened >= self.most:
            return False
        self.shortened += 1
        for group in self._optimizer.param_groups:
            group["lr"] *= self.shorter
        with torch.no_grad():
            for parameter, before in zip(self._parameters(), self._before, strict=True):
                parameter.copy_(before + self.shorter * (parameter - before))
        return True

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]


def optimizer_arrays(policy: SSMPolicy, optimizer: torch.optim.Optimizer) -> dict[str, Array]:
    """Adam's moments and step counts as arrays by `parameter.moment`."""
    arrays = {}
    for name, parameter in policy.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            arrays[f"{name}.{key}"] = value.detach().cpu().numpy().copy()
    return arrays


def load_state(
    policy: SSMPolicy,
    optimizer: torch.optim.Optimizer,
    weights: Mapping[str, Array],
    moments: Mapping[str, Array],
) -> None:
    """Put the weights and moments of a checkpoint into a policy and its Adam.

    Args:
        weights: by parameter name, of exactly this policy's shapes.
        moments: as from `optimizer_arrays`.

    Raises:
        ValueError: a name or shape does not fit; nothing is changed.
    """
    own = dict(policy.named_parameters()) | dict(policy.named_buffers())
    misfit = {name for name in own.keys() | weights.keys() if name not in own or name not in weights}
    misfit |= {name for name in own.keys() & weights.keys() if tuple(own[name].shape) != weights[name].shape}
    # Adam keeps all three of its numbers for a parameter, or, without a gradient so far, none.
    for name in {key.rpartition(".")[0] for key in moments}:
        shape = tuple(own[name].shape) if name in own else None
        for moment, size in (("step", ()), ("exp_avg", shape), ("exp_avg_sq", shape)):
            key = f"{name}.{moment}"
            if shape is None or key not in moments or moments[key].shape != size:
                misfit.add(key)
    misfit |= {key for key in moments if key.rpartition(".")[2] not in ("step", "exp_avg", "exp_avg_sq")}
    if misfit:
        raise ValueError(f"The checkpoint's policy has other sizes: {', '.join(sorted(misfit))} do not fit.")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(torch.as_tensor(weights[name]))
    optimizer.state.clear()
    for key, value in moments.items():
        name, moment = key.rsplit(".", 1)
        tensor = torch.as_tensor(np.array(value))
        # Adam keeps its step count on the CPU whatever the parameters' device.
        optimizer.state[own[name]][moment] = tensor if moment == "step" else tensor.to(own[name].device)
