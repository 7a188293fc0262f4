"""Resize a policy (state, width, depth) with its Adam moments.

Growing keeps the function: what is new is driven by the old, but nothing reads it yet, so that the output is the same
whatever the inputs and the history, while the weights that are to read it have a gradient (function-preserving growth:
Chen et al. 2016, arXiv 1511.05641). Shrinking removes what contributes least, lets the rest stand in for it where a
linear map can, and measures by how much the output changed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ssm_metarl.algorithms.heads import less_mean
from ssm_metarl.algorithms.operations import skip_tanh
from ssm_metarl.algorithms.parameters import (
    AXES,
    READERS,
    SILENT,
    TOWER,
    VALUE_HEADS,
    expected_shapes,
    parse_name,
)
from ssm_metarl.algorithms.policy import SSMPolicy, logits_of
from ssm_metarl.algorithms.rollouts import Array
from ssm_metarl.algorithms.spec import PolicySpec
from ssm_metarl.algorithms.ssm import SSMBlock

Arrays = dict[str, Array]
"""Parameters by name and, beside them, their moments by `parameter.moment`."""

SIZES = ("state_dim", "hidden_dim", "num_layers")
"""What a resize may change."""

RIDGE = 1e-3
"""Damping of the regression on what stays, in units of its mean square. Far less gives large weights of opposite signs:
as good before adaptation, worse after."""


@dataclass(frozen=True, eq=False)
class Morph:
    """A resized policy.

    Attributes:
        spec: its sizes and form.
        policy: float32 arrays by parameter name, in the order of `SSMPolicy.named_parameters()`.
        optimizer: Adam's step counts and moments by `parameter.moment`, as in `Learner.optimizer_arrays`.
        error: root mean square change of the action head's output over the probe, divided by the root mean square of
            that output; 0 or more. The output is the mean, or the logits less their mean over a head's values.
    """

    spec: PolicySpec
    policy: dict[str, Array]
    optimizer: dict[str, Array]
    error: float


def resize(
    spec: PolicySpec,
    policy: Mapping[str, Array],
    optimizer: Mapping[str, Array],
    target: PolicySpec,
    probe: Array,
    seed: int,
    resets: Array | None = None,
) -> Morph:
    """A policy of other sizes that does, as nearly as it can, the same.

    What shrinks does so first, then the rest grows. Survivors keep their order, and what is new comes after them.
    Growing keeps the function to rounding. Shrinking drops

    - blocks, one after another: the one without which the head's output is nearest to what it was;
    - units that are read least: root mean square activity × norm of the weights that read it, as a share of what the
      reader reads of all units, added up over the readers;
    - in each block the modes of least energy: root mean square activity × norm of the weights that read it.

    Readers of what is dropped get its ridge regression on what stays, in their weights and biases.

    Args:
        spec: of the given policy.
        policy: float32 arrays by parameter name; not changed, and not shared with the result.
        optimizer: as from `Learner.optimizer_arrays`; may be empty. A parameter without moments stays without.
        target: `spec` with another `state_dim`, `hidden_dim` or `num_layers`, or several.
        probe: [M, T, K, I] float32, finite: inputs (`policy_inputs`) over which contributions and the error are
            measured; for a regression many times more steps than units.
        seed: of the new weights, a non-negative integer.
        resets: [M, T, K] bool, where the state is zeroed before the step; None: nowhere.

    Raises:
        ValueError: `target` differs in something else, or the probe does not fit the policy; one sentence.
    """
    _check(spec, target, probe, resets)
    seen = _Probe(torch.tensor(probe, dtype=torch.float32), None if resets is None else torch.tensor(resets))
    arrays = {**policy, **optimizer}
    if not spec.separate_critic:
        arrays, error = _resize(spec, arrays, target, seen, seed)
    else:
        own, tower = _apart(arrays)
        rest, error = _resize(
            replace(spec, separate_critic=False), own, replace(target, separate_critic=False), seen, seed
        )
        tower, _ = _resize(_of_tower(spec), tower, _of_tower(target), seen, seed + 1)
        arrays = _together(rest, tower)
    return Morph(
        target,
        {name: np.array(arrays[name], np.float32) for name in expected_shapes(target)},
        {key: np.array(arrays[key]) for key in optimizer if key in arrays},
        error,
    )


def _resize(spec: PolicySpec, arrays: Arrays, target: PolicySpec, seen: _Probe, seed: int) -> tuple[Arrays, float]:
    """The arrays of a policy of other sizes, and the change of its head's output."""
    before = _head(spec, arrays, seen)
    for size, shrink in (("num_layers", _shrink_depth), ("hidden_dim", _shrink_width), ("state_dim", _shrink_state)):
        smaller = replace(spec, **{size: min(getattr(spec, size), getattr(target, size))})
        if smaller != spec:
            arrays = shrink(spec, arrays, smaller, seen)
            spec = smaller
    arrays = _grow(target, arrays, seed)
    return arrays, _change(before, _head(target, arrays, seen))


def _apart(arrays: Arrays) -> tuple[Arrays, Arrays]:
    """A policy with a separate critic as two without: its own body, and the critic's, whose head is the value's.

    What the policy itself does not have is 0 in either: its value head, or the critic's standard deviation.
    """
    tower: Arrays = {"policy.log_std": np.zeros(1, np.float32)}
    own = dict(arrays)
    for key, value in arrays.items():
        if key.startswith(TOWER):
            tower[key.removeprefix(TOWER)] = own.pop(key)
        elif key.startswith("value."):
            tower["policy." + key.removeprefix("value.")] = value
            own[key] = np.zeros_like(value)
        elif key.startswith(("critic.", "task_", "input_", "reward_")):
            tower[key] = value
    for name in ("value.weight", "value.bias"):
        tower[name] = np.zeros_like(arrays[name])
    return own, tower


def _together(own: Arrays, tower: Arrays) -> Arrays:
    """The inverse of `_apart`."""
    arrays = {key: value for key, value in own.items() if not key.startswith(("value.", "critic."))}
    for key, value in tower.items():
        if key.startswith(("encoder.", "blocks.")):
            arrays[TOWER + key] = value
        elif key.startswith("policy.") and not key.startswith("policy.log_std"):
            arrays["value." + key.removeprefix("policy.")] = value
        elif key.startswith("critic."):
            arrays[key] = value
    return arrays


def _of_tower(spec: PolicySpec) -> PolicySpec:
    """The policy that a separate critic's body is resized as: its one output is the value."""
    return replace(
        spec,
        separate_critic=False,
        learned_step_sizes=False,
        inputs="observation",
        observation_size=spec.input_size,
        action_size=1,
        discrete=False,
        action_low=(),
        action_high=(),
        action_heads=(),
    )


def _check(spec: PolicySpec, target: PolicySpec, probe: Array, resets: Array | None) -> None:
    fixed = (field.name for field in fields(PolicySpec) if field.name not in SIZES)
    others = [name for name in fixed if getattr(spec, name) != getattr(target, name)]
    if others:
        raise ValueError(f"Only {', '.join(SIZES)} of a policy can be resized, not {', '.join(others)}.")
    if probe.ndim != 4 or probe.shape[-1] != spec.input_size or not probe.size:
        raise ValueError(f"The probe must have the shape [M, T, K, {spec.input_size}], not {list(probe.shape)}.")
    if not np.isfinite(probe).all():
        raise ValueError("The probe must be finite, without NaN or infinite inputs.")
    if resets is not None and resets.shape != probe.shape[:-1]:
        raise ValueError(f"The resets must have the probe's {list(probe.shape[:-1])}, not {list(resets.shape)}.")


def _select(arrays: Arrays, kept: Mapping[str, Array], block: int | None = None) -> Arrays:
    """The entries `kept` along each kind of axis, of all parameters and moments, or of one block's."""
    selected = {}
    for key, value in arrays.items():
        parsed = parse_name(key)
        if parsed.moment != "step" and block in (None, parsed.block):
            for axis, kind in enumerate(AXES[parsed.leaf]):
                value = value.take(kept[kind], axis) if kind in kept else value
        selected[key] = value
    return selected


class _Probe(NamedTuple):
    inputs: Tensor
    resets: Tensor | None


def _model(spec: PolicySpec, arrays: Arrays) -> SSMPolicy:
    model = SSMPolicy(spec)
    model.load_state_dict({name: torch.tensor(arrays[name]) for name in model.state_dict()})
    return model


@torch.no_grad()
def _head(spec: PolicySpec, arrays: Arrays, probe: _Probe) -> Array:
    """Mean, or logits less their mean, over the probe: [M, T, K, A]."""
    actions = _model(spec, arrays)(*probe).actions
    if spec.action_heads:
        return less_mean(logits_of(actions, spec).numpy(), spec.heads)
    if spec.discrete:
        return (actions.logits - actions.logits.mean(-1, keepdim=True)).numpy()
    return actions.mean.numpy()


def _change(before: Array, after: Array) -> float:
    """Relative root mean square change; 0 where there was nothing and is nothing."""
    return float(_rms(after - before) / max(_rms(before), np.finfo(np.float32).tiny))


def _rms(values: Array, axis: int | None = None) -> Array:
    return np.sqrt(np.mean(np.square(values, dtype=np.float64), axis))


@torch.no_grad()
def _activities(spec: PolicySpec, arrays: Arrays, probe: _Probe) -> Arrays:
    """What the rows of each reader are multiplied with over the probe: [M·T·K, H or N] by the reader's name."""
    model, met = _model(spec, arrays), {}

    def note(name: str, meets: Callable[..., Tensor]) -> Callable[[Any, tuple[Any, ...]], None]:
        def before_forward(module: Any, inputs: tuple[Any, ...]) -> None:
            met[name] = meets(module, *inputs).flatten(0, -2).numpy()

        return before_forward

    readers = {
        name: key for name in model.state_dict() if (key := parse_name(name)).leaf in READERS and not key.step_sizes
    }
    for name, key in readers.items():
        # Inside a block one operation follows the other, and only the block itself is called.
        owner = f"blocks.{key.block}" if key.leaf in _INSIDE else name.rpartition(".")[0]
        meets = _INSIDE.get(key.leaf, lambda module, x, *others: x)
        model.get_submodule(owner).register_forward_pre_hook(note(name, meets))
    model(*probe)
    assert met.keys() == readers.keys()  # nothing would stand in for what a reader that is not met loses
    return met


def _states(block: SSMBlock, x: Tensor, resets: Tensor | None, state: None) -> Tensor:
    """A block's states [M, T, K, N], of which it tells only the last."""
    return torch.view_as_real(block.states(x, resets)).flatten(-2)


def _mixed(block: SSMBlock, x: Tensor, resets: Tensor | None, state: None) -> Tensor:
    """What the last matrix of a block that is not gated mixes, [M, T, K, H]."""
    recalled = None if block.memory is None else block.memory(x, resets)[0]
    return skip_tanh(block.read(block.states(x, resets), recalled), x, block.D)


_INSIDE: dict[str, Callable[..., Tensor]] = {"C": _states, "out.weight": _mixed}


def _shrink_depth(spec: PolicySpec, arrays: Arrays, smaller: PolicySpec, probe: _Probe) -> Arrays:
    before = _head(spec, arrays, probe)
    while spec != smaller:
        hidden = _activities(spec, arrays, probe)["policy.weight"]
        spec = replace(spec, num_layers=spec.num_layers - 1)
        rests = [_without_block(spec, arrays, block, hidden, probe) for block in range(spec.num_layers + 1)]
        changes = [_change(before, _head(spec, rest, probe)) for rest in rests]
        # Among equals the last goes: it may have just grown.
        arrays = rests[min(range(len(rests)), key=lambda block: (changes[block], -block))]
    return arrays


def _without_block(spec: PolicySpec, arrays: Arrays, block: int, hidden: Array, probe: _Probe) -> Arrays:
    """All but a block's arrays; the blocks after it move up, and the heads make up for it.

    `spec` is that of the result and `hidden` [M·T·K, H] what the heads read before.
    """
    rest = {}
    for key, value in arrays.items():
        own = parse_name(key).block
        if own is None or own < block:
            rest[key] = value
        elif own > block:
            rest[re.sub(rf"(blocks[./]){own}([./])", rf"\g<1>{own - 1}\2", key)] = value
    present = _activities(spec, rest, probe)["policy.weight"]
    for name in [name for name in ("policy.weight", *VALUE_HEADS) if name in rest]:
        rest |= _absorb(rest, name, np.arange(spec.hidden_dim), present, rest[name], hidden - present)
    return rest


def _shrink_width(spec: PolicySpec, arrays: Arrays, smaller: PolicySpec, probe: _Probe) -> Arrays:
    """Drop units, each with its index in the residual stream and inside every block, which D and gate tie together."""
    activities = {
        name: activity
        for name, activity in _activities(spec, arrays, probe).items()
        if AXES[parse_name(name).leaf][0] == "unit"
    }
    shares = np.zeros(spec.hidden_dim)
    for name, activity in activities.items():
        # No policy gradient trains the value heads, so that what they read says nothing.
        if name not in VALUE_HEADS:
            read = _rms(activity, 0) * np.linalg.norm(_effective(spec, name, arrays[name]), axis=1)
            # Readers have different units (a state, a preactivation, a logit): only shares can be added up.
            shares += read / max(read.sum(), np.finfo(np.float64).tiny)
    kept = _largest(shares, smaller.hidden_dim)
    for name, activity in activities.items():
        arrays = arrays | _stand_in(arrays, name, activity, kept)
    return _select(arrays, {"unit": kept})


def _effective(spec: PolicySpec, name: str, weight: Array) -> Array:
    """A reader's weights without what has no effect: an amount that a head's logits, or all slots, have in common."""
    if spec.discrete and name == "policy.weight":
        return less_mean(weight, spec.heads)
    if name.endswith("memory.address"):
        return weight - weight.mean(1, keepdims=True)
    return weight


def _shrink_state(spec: PolicySpec, arrays: Arrays, smaller: PolicySpec, probe: _Probe) -> Arrays:
    """Drop in each block the modes of least energy: root mean square of the mode over the probe × |C_n|.

    For white input and endless sequences this is the mode's H₂ norm, |C_n| |B_n| with B as stored (γ makes every mode's
    gain 1). Over the probe a memory of a thousand steps that never fills in an episode of a hundred counts for what it
    is: a quarter of a navigation policy's state then costs nothing after adaptation (−19.5 of −19.2) instead of −22.3.
    """
    activities = _activities(spec, arrays, probe)
    for block in range(spec.num_layers):
        name = f"blocks.{block}.C"
        squares = np.square(activities[name]).mean(0).reshape(-1, 2).sum(1)
        out_norm = np.linalg.norm(arrays[name].reshape(-1, 2, spec.hidden_dim), axis=(1, 2))
        modes = _largest(np.sqrt(squares) * out_norm, smaller.state_dim // 2)
        kept = {"mode": modes, "state": np.stack([2 * modes, 2 * modes + 1], 1).ravel()}
        arrays = _select(arrays | _stand_in(arrays, name, activities[name], kept["state"]), kept, block)
    return arrays


def _largest(contributions: Array, count: int) -> Array:
    """Indices of the `count` largest, in their order. Among equals the last go: they may have just grown."""
    return np.sort(np.argsort(-contributions, kind="stable")[:count])


def _stand_in(arrays: Arrays, name: str, activity: Array, kept: Array) -> Arrays:
    """Let the `kept` rows of a reader make up for the others, which are about to go."""
    lost = np.delete(np.arange(activity.shape[1]), kept)
    return _absorb(arrays, name, kept, activity[:, kept], arrays[name][lost], activity[:, lost])


def _absorb(arrays: Arrays, name: str, kept: Array, present: Array, rows: Array, lost: Array) -> Arrays:
    """A reader, and its bias if it has one, that gets `lost` through its `kept` rows as far as they can tell it.

    Dropping alone would leave little of what meta-training found: without a quarter of its 64 units, a navigation
    policy's output changed by 56 % and its return after adaptation fell from −19 to −90; with this, 4 % and −19.

    Args:
        arrays: parameters; not changed.
        name: the reader's.
        kept: [k] indices of rows.
        present: [n, k], what they meet.
        rows: [l, ·], the weights that read what is lost.
        lost: [n, l], what these met.
    """
    bias = name.replace("weight", "bias")
    slope, offset = _regress(present, lost, centred=bias != name)
    changed = {key: arrays[key].copy() for key in {name, bias}}
    changed[name][kept] += slope @ rows
    if bias != name:
        changed[bias] += offset @ rows
    return changed


def _regress(present: Array, lost: Array, centred: bool) -> tuple[Array, Array]:
    """Ridge regression lost ≈ present · slope + offset.

    Args:
        present: [n, k].
        lost: [n, l].
        centred: whether there is an offset.

    Returns:
        [k, l] and [l], float64; exactly zero where nothing is lost.
    """
    present, lost = present.astype(np.float64), lost.astype(np.float64)
    centre, aim = (values.mean(0) * centred for values in (present, lost))
    present, lost = present - centre, lost - aim
    squares = present.T @ present
    damping = RIDGE * squares.trace() / len(squares) + np.finfo(np.float64).tiny
    slope = np.linalg.solve(squares + damping * np.eye(len(squares)), present.T @ lost)
    return slope, aim - centre @ slope


def _grow(target: PolicySpec, arrays: Arrays, seed: int) -> Arrays:
    """Parameters as a fresh policy of the target's sizes has them, with the old ones in their leading corners."""
    rng = np.random.default_rng(seed)
    grown = {}
    for name, fresh in SSMPolicy(target, seed).numpy_weights().items():
        leaf, step_sizes = parse_name(name).leaf, parse_name(name).step_sizes
        if step_sizes:
            fresh[...] = 0.0  # what is new adapts only when meta-training has it adapt
        if name not in arrays:
            grown[name] = np.zeros_like(fresh) if leaf in SILENT[target.gated] else fresh
            continue
        if leaf == "nu" and not step_sizes:
            # A block starts with modes spread evenly over memories of 1 to 1000 steps; more are drawn from there.
            fresh = -np.log(1000.0) * rng.random(fresh.shape)
        if leaf in READERS:
            fresh[len(arrays[name]) :] = 0.0
        grown[name] = _with_corner(fresh, arrays[name])
    for key, value in arrays.items():
        name, _, moment = key.rpartition(".")
        if parse_name(key).moment:
            grown[key] = value if moment == "step" else _with_corner(_new_moment(moment, value, grown[name]), value)
    return grown


def _with_corner(whole: Array, corner: Array) -> Array:
    """`whole` with `corner` in place of its leading entries, and of its type."""
    whole = whole.astype(corner.dtype)
    whole[tuple(map(slice, corner.shape))] = corner
    return whole


def _new_moment(moment: str, old: Array, parameter: Array) -> Array:
    """What new entries of a moment start from, as an array of the parameter's shape.

    Adam's bias correction has worn off, so that from zeros a new entry's first step would be (1 - β₁) / sqrt(1 - β₂),
    3.2 learning rates long. With the mean of the old entries' second moments it starts at (1 - β₁) of a usual step.
    """
    return np.full(parameter.shape, old.mean() if moment == "exp_avg_sq" else 0.0)
