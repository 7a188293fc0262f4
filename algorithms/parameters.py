"""The policy's parameters: names, axes, shapes and readers, for policy, NumPy, checkpoints and resizing alike."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

from ssm_metarl.algorithms.spec import PolicySpec

MIN_DECAY = 1e-6
"""Least decay of a mode a step. It keeps |a| below 1 in float32 too, where exp(-exp(nu)) rounds to 1 for small nu."""

MAX_NU = 10.0
"""Largest ν that has an effect: beyond, a mode forgets all in one step, and exp(ν) would overflow in gradients."""

CRITIC_UNITS = 128
"""Hidden units of the privileged critic."""


Value = TypeVar("Value")


def per_task(weights: Mapping[str, Any]) -> bool:
    """Whether weights (arrays or tensors by name) have a task axis, [M, ...] each; else all tasks share them."""
    return bool(weights["encoder.weight"].ndim == 3)


def of_tasks(weights: Mapping[str, Value], part: slice) -> dict[str, Value]:
    """The weights of some tasks; shared ones are those of any."""
    return {name: value[part] for name, value in weights.items()} if per_task(weights) else dict(weights)  # type: ignore[index]


def step_size(name: str) -> str:
    """Name of the step sizes of a parameter."""
    return "step_sizes." + name.replace(".", "/")  # a parameter's own name cannot have a dot


def adapts(name: str) -> bool:
    """Whether inner steps change what has that name: no value head, no step size and no normaliser."""
    return name.startswith(("encoder.", "blocks.", "policy."))


def is_memory(name: str) -> bool:
    """Whether a parameter is of an SSM block, the policy's or a separate critic's."""
    return parse_name(name).block is not None and not parse_name(name).step_sizes


AXES: dict[str, tuple[str, ...]] = {
    "encoder.weight": ("input", "unit"),
    "encoder.bias": ("unit",),
    "nu": ("mode",),
    "theta": ("mode",),
    "B": ("unit", "state"),
    "C": ("state", "unit"),
    "D": ("unit",),
    "gate.weight": ("unit",),
    "gate.bias": ("unit",),
    "out.weight": ("unit", "unit"),
    "out.bias": ("unit",),
    "memory.weight": ("unit", "unit"),
    "memory.bias": ("unit",),
    "memory.address": ("unit", "slot"),
    "policy.weight": ("unit", "action"),
    "policy.bias": ("action",),
    "policy.log_std": ("action",),
    "value.weight": ("unit", "value"),
    "value.bias": ("value",),
    "critic.weight": ("unit", "critic"),
    "critic.bias": ("critic",),
    "critic.task": ("task", "critic"),
    "critic.out": ("critic", "value"),
    "input_mean": ("input",),
    "input_scale": ("input",),
    "reward_scale": ("reward",),
    "task_mean": ("task",),
    "task_scale": ("task",),
}
"""What lies along each axis of a parameter (its name without `blocks.i.`). Resizing changes units (of the residual
stream, and of the same number in a block), real state variables, and complex modes, two state variables each. Moments
and learned step sizes have the axes of their parameter."""

VALUE_HEADS = ("value.weight", "critic.weight")
"""Readers that say what a policy expects, not what it does."""

READERS = ("B", "C", "out.weight", "memory.weight", "memory.address", "policy.weight", *VALUE_HEADS)
"""Parameters whose row j is how unit (for C: state variable) j is read: zero where j is new. Whatever else a unit or
mode has, D and gate included, stays inside it and reaches others through these rows alone."""

SILENT = {True: ("C", "D", "memory.weight", "memory.bias"), False: ("out.weight", "out.bias")}
"""Parameters that are zero in a new block, gated or not, so that its output is its input."""

TOWER = "tower."
"""Before the names of a separate critic's encoder and blocks."""

_KEY = re.compile(r"(step_sizes\.)?(?:tower\.)?(?:blocks[./](\d+)[./])?(.+?)(?:\.(step|exp_avg|exp_avg_sq))?")


class ParameterName(NamedTuple):
    """A name taken apart.

    Attributes:
        block: number of its block, or None.
        leaf: the parameter's name in there.
        moment: which of Adam's numbers it is, or "".
        step_sizes: whether it is of the parameter's step sizes instead of the parameter.
    """

    block: int | None
    leaf: str
    moment: str
    step_sizes: bool


def parse_name(key: str) -> ParameterName:
    """A name taken apart; any name of a policy's parameter, step size or moment can be."""
    match = _KEY.fullmatch(key)
    assert match is not None
    step_sizes, block, leaf, moment = match.groups()
    return ParameterName(None if block is None else int(block), leaf.replace("/", "."), moment or "", bool(step_sizes))


def expected_shapes(spec: PolicySpec) -> dict[str, tuple[int, ...]]:
    """Shape of each array of such a policy by name, ordered as in `SSMPolicy.numpy_weights()`."""
    block = ["nu", "theta", "B", "C", "D"]
    block += ["gate.bias", "gate.weight"] if spec.gated else ["out.weight", "out.bias"]  # a ParameterDict sorts
    block += ["memory.weight", "memory.bias", "memory.address"] if spec.memory_slots else []
    body = ["encoder.weight", "encoder.bias"]
    body += [f"blocks.{i}.{leaf}" for i in range(spec.num_layers) for leaf in block]
    names = body + ["policy.weight", "policy.bias"] + ["policy.log_std"] * (not spec.discrete)
    step_sizes = sorted(map(step_size, names)) if spec.learned_step_sizes else []
    names += ["value.weight", "value.bias"]
    names += ["critic.weight", "critic.bias", "critic.task", "critic.out"] if spec.task_size else []
    names += [TOWER + name for name in body] if spec.separate_critic else []
    names += step_sizes
    names += ["task_mean", "task_scale"] if spec.task_size else []
    names += ["input_mean", "input_scale", "reward_scale"] if spec.normalizes else []
    sizes = {"unit": spec.hidden_dim, "state": spec.state_dim, "mode": spec.state_dim // 2, "slot": spec.memory_slots}
    sizes |= {"input": spec.input_size, "action": spec.action_size, "task": spec.task_size, "critic": CRITIC_UNITS}
    sizes |= {"value": 1, "reward": 1}
    return {name: tuple(sizes[axis] for axis in AXES[parse_name(name).leaf]) for name in names}
