"""The policy in NumPy against torch, and the samples that it draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.func import functional_call

from builders import make_policy, make_spec, seeds, specs, task_weights, tensors
from ssm_metarl.algorithms.numpy_policy import NumpyPolicy


def run(spec: Any, weights: Any, inputs: Any, noise: Any) -> tuple[Any, Any, Any, Any]:
    """Heads, actions, log-probs over inputs [M, T, K, I], and the last state in torch's form."""
    policy = NumpyPolicy(spec, weights)
    state = policy.initial_state(inputs.shape[0], inputs.shape[2])
    heads, actions, log_probs = [], [], []
    for t in range(inputs.shape[1]):
        heads.append(policy.head(inputs[:, t], state)[0])
        action, log_prob, state = policy.act(inputs[:, t], state, None if noise is None else noise[:, t])
        actions.append(action)
        log_probs.append(log_prob)
    each = 2 if spec.memory_slots else 1  # of a block's state; its modes have their parts in halves here
    end = [h if i % each else np.ascontiguousarray(h.swapaxes(-1, -2)) for i, h in enumerate(state)]
    return np.stack(heads, 1), np.stack(actions, 1), np.stack(log_probs, 1), end


@settings(max_examples=40)
@given(spec=specs(), seed=seeds, per_task=st.booleans(), deterministic=st.booleans(), steps=st.sampled_from([1, 30]))
def test_equals_torch(spec: Any, seed: int, per_task: bool, deterministic: bool, steps: int) -> None:
    """Heads, log-probabilities and states to 1e-5; the most likely action without noise."""
    tasks, num_episodes = 2, 3
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(tasks, steps, num_episodes, spec.input_size)).astype(np.float32)
    policy = make_policy(spec, seed)
    weights = task_weights(spec, tasks, seed) if per_task else policy.numpy_weights()
    noise: Any = rng.random((tasks, steps, num_episodes), np.float32)
    if not spec.discrete:
        noise = rng.normal(size=(tasks, steps, num_episodes, spec.action_size)).astype(np.float32)
    heads, actions, log_probs, end = run(spec, weights, inputs, None if deterministic else noise)
    output = functional_call(policy, tensors(weights), (torch.from_numpy(inputs),))
    close = {"rtol": 1e-5, "atol": 1e-5}
    said = torch.from_numpy(heads)
    if spec.discrete:
        torch.testing.assert_close(said.log_softmax(-1), output.actions.logits.detach(), **close)
        assert actions.dtype == np.int64
        assert ((actions >= 0) & (actions < spec.action_size)).all()
        if deterministic:
            best = np.take_along_axis(heads, actions[..., None], -1)[..., 0]
            np.testing.assert_array_equal(best, heads.max(-1))
    else:
        normal = output.actions.base_dist
        torch.testing.assert_close(said, normal.loc.detach(), **close)
        expected = heads if deterministic else heads + normal.scale.detach().numpy() * noise
        np.testing.assert_allclose(actions, expected, rtol=1e-5, atol=1e-5)
    recomputed = output.actions.log_prob(torch.from_numpy(actions)).detach().numpy()
    # A density's logarithm grows with the square of the distance in standard deviations, and its rounding with it: by
    # the distance over the deviation for what a mean may be off.
    allowed = 5e-5 + 1e-5 * np.abs(recomputed)
    if not (spec.discrete or deterministic):
        allowed += 1e-5 * (np.abs(noise) / normal.scale.detach().numpy()).sum(-1)
    assert (np.abs(log_probs - recomputed) <= allowed).all()
    for ours, theirs in zip(end, output.state[: len(end)], strict=True):  # a separate critic's come after
        # A sum is rounded by the size of what went into it: small entries, where much cancelled, as well as large ones.
        size = max(1.0, float(theirs.abs().max()))
        torch.testing.assert_close(torch.from_numpy(ours), theirs.detach(), rtol=1e-5, atol=1e-5 * size)
    assert log_probs.dtype == np.float32


def test_extreme_modes_stay_inside_the_unit_circle() -> None:
    """float32 has no number between 1 - 6e-8 and 1: the least decay keeps |a| below it here too."""
    spec = make_spec(state_dim=6, inputs="observation")
    weights = make_policy(spec).numpy_weights()
    weights["blocks.0.nu"] = np.array([-1e4, -50.0, 50.0], np.float32)
    weights["encoder.bias"] *= 0.0
    state = [np.array([[[[1, 1, 1], [0, 0, 0]]]], np.float32)]
    _, [end] = NumpyPolicy(spec, weights).head(np.zeros((1, 1, 3), np.float32), state)
    modulus = np.hypot(end[..., 0, :], end[..., 1, :])
    assert (modulus < 1).all()
    assert modulus[..., 0] > 0.99999


@pytest.mark.parametrize("size", [2, 7])
def test_discrete_samples_follow_their_probabilities(size: int) -> None:
    spec = make_spec(discrete=True, action_size=size, num_layers=0)
    weights = make_policy(spec, 4, noise=1.0).numpy_weights()
    num_episodes, rng = 40_000, np.random.default_rng(0)
    inputs = np.broadcast_to(rng.normal(size=spec.input_size).astype(np.float32), (1, 1, num_episodes, spec.input_size))
    heads, actions, log_probs, _ = run(spec, weights, inputs, rng.random((1, 1, num_episodes), np.float32))
    probabilities = np.exp(heads[0, 0, 0].astype(float))
    probabilities /= probabilities.sum()
    counts = np.bincount(actions.ravel(), minlength=size)
    assert stats.chisquare(counts, num_episodes * probabilities).pvalue > 1e-3
    np.testing.assert_allclose(np.exp(log_probs), probabilities[actions], rtol=1e-4)


@pytest.mark.parametrize(("noise", "expected"), [(0.0, 1), (0.25, 1), (0.9999999, 2)])
def test_an_impossible_action_is_never_sampled(noise: float, expected: int) -> None:
    """Of three with the probabilities 0, 0.27 and 0.73, also at the very ends of the noise."""
    spec = make_spec(discrete=True, action_size=3, num_layers=0)
    weights = {name: np.zeros_like(value) for name, value in make_policy(spec).numpy_weights().items()}
    weights["policy.bias"] = np.array([-200.0, 0.0, 1.0], np.float32)
    _, action, _, _ = run(
        spec, weights, np.zeros((1, 1, 1, spec.input_size), np.float32), np.full((1, 1, 1), noise, np.float32)
    )
    assert action.item() == expected


def test_gaussian_samples_have_the_policys_scale() -> None:
    spec = make_spec(num_layers=0)
    weights = make_policy(spec).numpy_weights()
    weights["policy.log_std"] = np.log(np.array([0.2, 3.0], np.float32))
    rng, num_episodes = np.random.default_rng(0), 20_000
    inputs = np.zeros((1, 1, num_episodes, spec.input_size), np.float32)
    heads, actions, _, _ = run(spec, weights, inputs, rng.standard_normal((1, 1, num_episodes, 2), np.float32))
    np.testing.assert_allclose((actions - heads).std((0, 1, 2)), [0.2, 3.0], rtol=0.03)
