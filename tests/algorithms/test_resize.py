"""Resizing a policy: growth keeps the function, shrinking drops the least, moments follow their weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import make_policy, make_spec, seeds, specs
from ssm_metarl.algorithms.numpy_policy import NumpyPolicy
from ssm_metarl.algorithms.parameters import AXES, READERS, SILENT, expected_shapes, parse_name
from ssm_metarl.algorithms.policy import SSMPolicy
from ssm_metarl.algorithms.resize import resize

growths = st.tuples(st.integers(0, 4), st.sampled_from([0, 2, 4]), st.integers(0, 2))
sizes = st.tuples(st.integers(1, 9), st.sampled_from([2, 4, 6, 8]), st.integers(0, 4))
KINDS = ("state_dim", "hidden_dim", "num_layers")


def larger(spec: Any, by: Any) -> Any:
    units, state, layers = by
    return replace(
        spec,
        hidden_dim=spec.hidden_dim + units,
        state_dim=spec.state_dim + state,
        num_layers=spec.num_layers + layers,
    )


def probe_for(spec: Any, seed: int, steps: int = 12) -> tuple[Any, Any]:
    """Inputs and resets."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(2, steps, 3, spec.input_size)).astype(np.float32), rng.random((2, steps, 3)) < 0.2


def adam(policy: Any, seed: int) -> dict[str, Any]:
    """Moments that no two weights share; like a policy gradient's, they leave out the value head."""
    rng = np.random.default_rng(seed)
    moments = {}
    for name, value in policy.items():
        if not name.startswith("value."):
            moments[f"{name}.step"] = np.array(seed % 1000, np.float32)
            moments[f"{name}.exp_avg"] = rng.normal(size=value.shape).astype(np.float32)
            moments[f"{name}.exp_avg_sq"] = rng.random(value.shape, np.float32)
    return moments


def leaf(name: str) -> str:
    return parse_name(name).leaf


def block_of(name: str) -> int | None:
    return parse_name(name).block


def rows_of(kind: str, block: int | None, kept: Any) -> Any:
    """What is kept along an axis of a kind; None: everything."""
    return kept.get(kind, kept.get(f"{kind} {block}"))


def close(ours: Any, expected: Any) -> None:
    """To 1e-5 of the largest number, or of 1."""
    scale = max(1.0, float(np.abs(expected).max(initial=0.0)))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * scale)


def assert_equal(ours: Any, expected: Any) -> None:
    assert list(ours) == list(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
        assert ours[name].dtype == value.dtype


def assert_same_function(ours: Any, expected: Any) -> None:
    """Heads and values of `run`."""
    for one, other in zip(ours[:2], expected[:2], strict=True):
        close(one, other)


@torch.no_grad()
def run(spec: Any, weights: Any, inputs: Any, resets: Any = None, state: Any = None) -> Any:
    """Mean or centred logits, values, and the last states."""
    policy = SSMPolicy(spec)
    policy.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
    arguments = [None if x is None else torch.tensor(x) for x in (inputs, resets)]
    output = policy(*arguments, None if state is None else [torch.tensor(h) for h in state])
    head = output.actions.logits if spec.discrete else output.actions.mean
    return centred(spec, head.numpy()), output.values.numpy(), [h.numpy() for h in output.state]


def centred(spec: Any, head: Any) -> Any:
    return head - head.mean(-1, keepdims=True) if spec.discrete else head


def numpy_head(spec: Any, weights: Any, inputs: Any, resets: Any) -> Any:
    """The same head as `run`, by the workers' policy."""
    policy = NumpyPolicy(spec, weights)
    state = policy.initial_state(inputs.shape[0], inputs.shape[2])
    heads = []
    for t in range(inputs.shape[1]):
        state = [h * ~resets[:, t, :, None, None] for h in state]
        head, state = policy.head(inputs[:, t], state)
        heads.append(head)
    return centred(spec, np.stack(heads, 1))


# --- Growing ----------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(spec=specs(), seed=seeds, by=st.lists(growths, min_size=1, max_size=3))
def test_growth_keeps_the_function_whatever_the_history(spec: Any, seed: int, by: Any) -> None:
    """From any state, also of the new modes; the memory of a new block is empty."""
    policy = make_policy(spec, seed).numpy_weights()
    small, weights = spec, policy
    for step, growth in enumerate(by):
        morph = resize(small, weights, {}, larger(small, growth), probe_for(spec, seed)[0], seed + step)
        assert 0 <= morph.error < 1e-5
        small, weights = morph.spec, morph.policy
    inputs, resets = probe_for(spec, seed + 1, 30)
    rng = np.random.default_rng(seed)
    states = [np.abs(rng.normal(size=(2, 3, *h.shape))).astype(np.float32) for h in SSMPolicy(small).initial_state()]
    sizes = [h.shape for h in SSMPolicy(spec).initial_state()]
    bodies = 1 + spec.separate_critic
    each, before = len(states) // bodies, len(sizes) // bodies
    kept = [body * each + i for body in range(bodies) for i in range(before)]
    for i, h in enumerate(states):
        h *= i in kept or h.shape[-1] == 2
    old = [cut(states[i], size) for i, size in zip(kept, sizes, strict=True)]
    expected = run(spec, policy, inputs, resets, old)
    ours = run(small, weights, inputs, resets, states)
    assert_same_function(ours, expected)
    for i, other, size in zip(kept, expected[2], sizes, strict=True):
        close(cut(ours[2][i], size), other)


def cut(state: Any, size: Any) -> Any:
    """Of a larger policy's state what is a smaller one's: its modes, or a memory's sums, weights and last address."""
    if size[1] == 2:
        return state[:, :, : size[0]]
    return np.concatenate([state[..., : size[1] - 2], state[..., -2:]], -1)


@pytest.mark.parametrize("slots", [0, 3])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_new_can_learn(kind: str, gated: bool, slots: int) -> None:
    """The weights that keep it from being read have a gradient."""
    spec = make_spec(num_layers=2, gated=gated, memory_slots=slots)
    target = replace(spec, **{kind: getattr(spec, kind) + 2})
    inputs, resets = probe_for(spec, 0)
    morph = resize(spec, make_policy(spec).numpy_weights(), {}, target, inputs, 1)
    policy = SSMPolicy(target)
    policy.load_state_dict({name: torch.tensor(value) for name, value in morph.policy.items()})
    output = policy(torch.tensor(inputs), torch.tensor(resets))
    (output.actions.mean.square().mean() + output.values.square().mean()).backward()
    learning = set()
    for name, parameter in policy.named_parameters():
        zeros = parameter == 0
        old = expected_shapes(spec).get(name)
        if leaf(name) in READERS and old is not None:
            zeros[:, old[1] :] = False  # from what is new to what is new, too
        if leaf(name) in (READERS if old else SILENT[gated]) and zeros.any():
            assert parameter.grad is not None
            assert parameter.grad[zeros].all(), name
            learning.add(leaf(name))
    own = {each for each in READERS if each.startswith("memory.") <= bool(slots)} - {"C", "critic.weight"}
    readers = own - {"out.weight"} if gated else own
    silent = {each for each in SILENT[gated] if each.startswith("memory.") <= bool(slots)}
    assert learning == {"state_dim": {"C"}, "hidden_dim": readers, "num_layers": silent}[kind]


@settings(max_examples=20)
@given(spec=specs(num_layers=2), seed=seeds, modes=st.integers(1, 5))
def test_new_modes_remember_1_to_1000_steps(spec: Any, seed: int, modes: int) -> None:
    policy, inputs = make_policy(spec, seed).numpy_weights(), probe_for(spec, seed)[0]
    target = replace(spec, state_dim=spec.state_dim + 2 * modes)
    one, same, other = (resize(spec, policy, {}, target, inputs, seed + s).policy for s in (0, 0, 1))
    assert_equal(one, same)
    for block in ("blocks.0.nu", "blocks.1.nu"):
        memory = np.exp(-one[block][-modes:])
        assert ((memory > 0.999) & (memory < 1001)).all()
        assert not np.array_equal(memory, np.exp(-other[block][-modes:]))
    assert not np.array_equal(one["blocks.0.nu"][-modes:], one["blocks.1.nu"][-modes:])


@settings(max_examples=30)
@given(spec=specs(), seed=seeds, by=growths)
def test_moments_of_new_weights(spec: Any, seed: int, by: Any) -> None:
    """First moments of zero, second ones as the old weights' mean, none at all in a new block."""
    policy = make_policy(spec, seed).numpy_weights()
    moments = adam(policy, seed)
    target = larger(spec, by)
    grown = resize(spec, policy, moments, target, probe_for(spec, seed)[0], seed).optimizer
    assert list(grown) == list(moments)
    for key, old in moments.items():
        name, _, moment = key.rpartition(".")
        new = grown[key]
        assert new.shape == (() if moment == "step" else expected_shapes(target)[name])
        corner = tuple(map(slice, old.shape))
        np.testing.assert_array_equal(new[corner], old)
        padded = np.ones(new.shape, bool)
        padded[corner] = False
        np.testing.assert_allclose(new[padded], old.mean() if moment == "exp_avg_sq" else 0.0, rtol=1e-5)
    assert resize(spec, policy, {}, target, probe_for(spec, seed)[0], seed).optimizer == {}


# --- Shrinking --------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(spec=specs(), seed=seeds, by=growths)
def test_shrinking_undoes_growth_to_the_bit(spec: Any, seed: int, by: Any) -> None:
    """What nothing reads is what contributes least."""
    policy = make_policy(spec, seed).numpy_weights()
    moments = adam(policy, seed)
    inputs, resets = probe_for(spec, seed)
    grown = resize(spec, policy, moments, larger(spec, by), inputs, seed, resets)
    back = resize(grown.spec, grown.policy, grown.optimizer, spec, inputs, seed, resets)
    assert back.spec == spec
    assert_equal(back.policy, policy)
    assert_equal(back.optimizer, moments)
    assert back.error < 1e-5


@settings(max_examples=30)
@given(spec=specs(num_layers=3, action_size=2), seed=seeds)
def test_what_nothing_reads_goes_wherever_it_is(spec: Any, seed: int) -> None:
    """The rest keeps its order, its values and its moments."""
    rng = np.random.default_rng(seed)

    def survivors(size: int) -> Any:
        return np.sort(rng.permutation(size)[: size // 2 + 1])

    policy = make_policy(spec, seed).numpy_weights()
    blocks, kept = survivors(3), {"unit": survivors(spec.hidden_dim)}
    for i in range(3):
        kept[f"mode {i}"] = modes = survivors(spec.state_dim // 2)
        kept[f"state {i}"] = np.stack([2 * modes, 2 * modes + 1], 1).ravel()
    for name, value in policy.items():
        if leaf(name) in READERS:
            rows = rows_of(AXES[leaf(name)][0], block_of(name), kept)
            value[np.delete(np.arange(len(value)), rows)] = 0.0
        if leaf(name) in SILENT[spec.gated] and block_of(name) not in blocks:
            value[:] = 0.0
    moments = adam(policy, seed)
    inputs, resets = probe_for(spec, seed)
    smaller = {"hidden_dim": len(kept["unit"]), "state_dim": len(kept["state 0"]), "num_layers": len(blocks)}
    morph = resize(spec, policy, moments, replace(spec, **smaller), inputs, seed, resets)
    for key, value in (morph.policy | morph.optimizer).items():
        name, _, moment = key.rpartition(".") if key in moments or key in morph.optimizer else (key, "", "")
        block = block_of(name)
        old = key if block is None else key.replace(f".{block}.", f".{blocks[block]}.", 1)
        expected = (policy | moments)[old]
        for axis, kind in enumerate(AXES[leaf(name)] if moment != "step" else ()):
            rows = rows_of(kind, None if block is None else blocks[block], kept)
            expected = expected if rows is None else expected.take(rows, axis)
        np.testing.assert_array_equal(value, expected, err_msg=key)
    assert morph.error < 1e-5
    assert_same_function(run(morph.spec, morph.policy, inputs, resets), run(spec, policy, inputs, resets))


@settings(max_examples=30)
@given(spec=specs(hidden_dim=5, state_dim=6, num_layers=3), seed=seeds, chosen=st.integers(0, 2))
@pytest.mark.parametrize("kind", KINDS)
def test_the_dominant_one_stays(kind: str, spec: Any, seed: int, chosen: int) -> None:
    spec = replace(spec, action_size=max(spec.action_size, 2))  # one discrete action: nothing has an effect
    policy = make_policy(spec, seed).numpy_weights()
    for name, value in policy.items():
        if kind == "state_dim" and leaf(name) == "C":
            value[2 * chosen : 2 * chosen + 2] *= 1e3
        if kind == "hidden_dim" and leaf(name) in READERS and leaf(name) != "C":
            value[chosen] *= 1e3
        if kind == "num_layers" and leaf(name) in SILENT[spec.gated] and f"blocks.{chosen}." not in name:
            value *= 1e-3
    least = {"state_dim": 2, "hidden_dim": 1, "num_layers": 1}[kind]
    inputs, resets = probe_for(spec, seed)
    shrunk = resize(spec, policy, {}, replace(spec, **{kind: least}), inputs, 0, resets).policy
    if kind == "state_dim":
        for i in range(3):
            assert shrunk[f"blocks.{i}.nu"] == policy[f"blocks.{i}.nu"][chosen]
    elif kind == "hidden_dim":
        np.testing.assert_array_equal(shrunk["encoder.weight"][:, 0], policy["encoder.weight"][:, chosen])
    else:
        np.testing.assert_array_equal(shrunk["blocks.0.nu"], policy[f"blocks.{chosen}.nu"])


def test_what_all_slots_have_in_common_decides_nothing() -> None:
    """A softmax does not see it."""
    spec = make_spec(memory_slots=3)
    policy = make_policy(spec).numpy_weights()
    inputs, resets = probe_for(spec, 0)
    one, other = (
        resize(spec, policy, {}, replace(spec, hidden_dim=3), inputs, 0, resets).policy["encoder.bias"]
        for policy["blocks.0.memory.address"][5] in (0.0, 50.0)
    )
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("slots", [0, 3])
def test_units_that_are_one_leave_a_block_as_it_was(gated: bool, slots: int) -> None:
    """Twins in the stream and inside: whoever reads one can read the other instead, the block's last matrix, too."""
    spec = make_spec(num_layers=1, gated=gated, memory_slots=slots)
    policy = make_policy(spec).numpy_weights()
    inputs, resets = probe_for(spec, 0, 100)
    for name, value in policy.items():
        for axis, kind in enumerate(AXES[leaf(name)]):
            if kind == "unit" and (leaf(name) not in READERS or axis):
                twins = np.moveaxis(value, axis, 0)
                twins[-1] = twins[-2]
        if leaf(name) in READERS and AXES[leaf(name)][0] == "unit":
            value[:-2] *= 3.0  # the other four are read more, and stay
    assert resize(spec, policy, {}, replace(spec, hidden_dim=5), inputs, 0, resets).error < 5e-3


@pytest.mark.parametrize("redundant", ["twin units", "constant unit", "twin modes", "modes reset at every step"])
def test_what_is_dropped_is_made_up_for(redundant: str) -> None:
    """Redundant parts that are read as much as others."""
    units = redundant.endswith(("units", "unit"))
    spec = make_spec(num_layers=0 if units else 1, state_dim=8)
    policy = make_policy(spec).numpy_weights()
    inputs, resets = probe_for(spec, 0)
    if redundant == "twin units":
        for name in ("encoder.weight", "encoder.bias"):
            policy[name][..., 3:] = policy[name][..., :3]
    elif redundant == "constant unit":
        policy["encoder.weight"][:, 3], policy["encoder.bias"][3] = 0.0, 1.0
        policy["policy.weight"][3] = 0.5 * policy["policy.weight"][np.argmin(np.abs(policy["policy.weight"]).max(1))]
    elif redundant == "twin modes":
        for name in ("nu", "theta", "B"):
            array = policy[f"blocks.0.{name}"]
            array[..., array.shape[-1] // 2 :] = array[..., : array.shape[-1] // 2]
    else:  # such a mode is its input, whatever its memory
        policy["blocks.0.B"][:, 4:] = policy["blocks.0.B"][:, :4]
        resets[:] = True
    smaller = {"hidden_dim": spec.hidden_dim - 1} if units else {"state_dim": spec.state_dim - 2}
    assert 0 < resize(spec, policy, {}, replace(spec, **smaller), inputs, 0, resets).error < 2e-3


# --- Both -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=40)
@given(spec=specs(), seed=seeds, chain=st.lists(sizes, min_size=1, max_size=4), with_resets=st.booleans())
def test_chains_of_resizes_give_valid_policies(spec: Any, seed: int, chain: Any, with_resets: bool) -> None:
    """Which run in NumPy as in torch; the reported error is that of the workers' policy."""
    weights = make_policy(spec, seed).numpy_weights()
    moments = adam(weights, seed)
    inputs, resets = probe_for(spec, seed)
    if not with_resets:
        resets = np.zeros_like(resets)
    for step, (units, state, layers) in enumerate(chain):
        target = replace(spec, hidden_dim=units, state_dim=state, num_layers=layers)
        arguments = (spec, weights, moments, target, inputs, seed + step)
        morph = resize(*arguments, resets if with_resets else None)
        shapes = expected_shapes(target)
        assert {name: value.shape for name, value in morph.policy.items()} == shapes
        assert list(morph.policy) == list(shapes)
        for value in (morph.policy | morph.optimizer).values():
            assert value.dtype == np.float32
            assert np.isfinite(value).all()
        for key, value in morph.optimizer.items():
            name, _, moment = key.rpartition(".")
            assert value.shape == (() if moment == "step" else shapes[name])
        before, after = numpy_head(spec, weights, inputs, resets), numpy_head(target, morph.policy, inputs, resets)
        close(run(target, morph.policy, inputs, resets)[0], after)
        size, error = (float(np.sqrt(np.mean(x.astype(np.float64) ** 2))) for x in (before, after - before))
        rounding = 1e-5 * max(1.0, float(np.abs(before).max()), float(np.abs(after).max()))
        assert abs(morph.error * size - error) < rounding + 1e-3 * error
        spec, weights, moments = morph.spec, morph.policy, morph.optimizer


@settings(max_examples=10)
@given(spec=specs(), seed=seeds)
def test_equal_sizes_change_nothing_and_arguments_are_left_alone(spec: Any, seed: int) -> None:
    policy = make_policy(spec, seed).numpy_weights()
    moments = adam(policy, seed)
    same = resize(spec, policy, moments, spec, probe_for(spec, seed)[0], seed)
    assert (same.spec, same.error) == (spec, 0.0)
    assert_equal(same.policy, policy)
    assert_equal(same.optimizer, moments)
    copies = {key: value.copy() for key, value in (policy | moments).items()}
    for target in (replace(spec, hidden_dim=1, state_dim=2, num_layers=0), larger(spec, (1, 2, 1)), spec):
        morph = resize(spec, policy, moments, target, probe_for(spec, seed)[0], seed)
        for value in (morph.policy | morph.optimizer).values():
            value[...] = 7.0
    assert_equal(policy | moments, copies)


@pytest.mark.parametrize(
    ("changes", "probe", "resets", "says"),
    [
        ({"action_size": 3}, None, None, "resized, not action_size"),
        ({"gated": True, "hidden_dim": 8, "initial_std": 1.0}, None, None, "not gated, initial_std"),
        ({}, np.zeros((2, 3, 7)), None, r"shape \[M, T, K, 7\], not \[2, 3, 7\]"),
        ({}, np.zeros((2, 3, 1, 6)), None, "not .2, 3, 1, 6"),
        ({}, np.zeros((2, 0, 1, 7)), None, "not .2, 0, 1, 7"),
        ({}, np.full((2, 3, 1, 7), np.nan), None, "finite"),
        ({}, None, np.zeros((2, 3), bool), r"\[2, 4, 3\], not \[2, 3\]"),
    ],
)
def test_refuses_what_does_not_fit_in_one_sentence(changes: Any, probe: Any, resets: Any, says: str) -> None:
    spec = make_spec()
    inputs = probe_for(spec, 0, 4)[0] if probe is None else probe
    policy = make_policy(spec).numpy_weights()
    with pytest.raises(ValueError, match=says) as caught:
        resize(spec, policy, {}, replace(spec, **changes), inputs, 0, resets)
    assert str(caught.value).count(".") == 1
    assert str(caught.value).endswith(".")
