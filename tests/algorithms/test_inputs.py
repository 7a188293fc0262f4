"""What the policy and its critic read: what happened before, and what the task is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from builders import make_policy, recorded, seeds, specs, toy_rollouts, uneven
from ssm_metarl.algorithms.inputs import critic_inputs, policy_inputs, task_numbers


@settings(max_examples=20)
@given(spec=specs(inputs="full"), seed=seeds)
def test_inputs_are_what_happened_before(spec: Any, seed: int) -> None:
    """Observation, previous action and reward unless reset between, and the start flag."""
    record = toy_rollouts(spec, make_policy(spec, seed).numpy_weights(), uneven(2, 3, 6, seed), 3, 6, seed)
    rng = np.random.default_rng(seed)
    record.resets[:] = rng.random(record.resets.shape) < 0.3
    record.starts[:] = rng.random(record.starts.shape) < 0.3
    inputs = policy_inputs(spec, record)
    for m, t, k in np.ndindex(record.valid.shape):
        action, reward = np.zeros(spec.action_size, np.float32), 0.0
        if t and not record.resets[m, t, k]:
            before = record.actions[m, t - 1, k]
            action = np.eye(spec.action_size, dtype=np.float32)[before] if spec.discrete else before
            reward = record.rewards[m, t - 1, k]
        expected = [*record.observations[m, t, k], *action, reward, record.starts[m, t, k]]
        np.testing.assert_array_equal(inputs[m, t, k], np.array(expected, np.float32))


def test_the_extra_input_is_what_the_policy_would_have_read_next() -> None:
    policy, _, record = recorded(3)
    inputs, _ = critic_inputs(policy.spec, record)
    size = policy.spec.observation_size
    for task, slot in np.ndindex(3, 2):
        length = int(record.lengths()[task, slot])
        extra = inputs[task, length, slot]
        np.testing.assert_array_equal(extra[:size], record.last_observations[task, slot])
        np.testing.assert_array_equal(extra[size:-2], record.actions[task, length - 1, slot])
        assert extra[-2] == record.rewards[task, length - 1, slot]
        assert extra[-1] == 0.0


def test_the_numbers_of_a_task() -> None:
    tasks = [{"b": [1, 2.5], "a": {"y": 3, "x": True}}, {"a": {"x": 0, "y": 4}, "b": (5, 6)}]
    found = task_numbers(tasks)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, [[1, 3, 1, 2.5], [0, 4, 5, 6]])
    for wrong in ([{"seed": 1}], [{"kind": "door"}], [{}], [{"a": [1]}, {"a": [1, 2]}], ["goal"], [{"a": None}]):
        with pytest.raises(ValueError, match="privileged baseline needs tasks that are numbers"):
            task_numbers(wrong)
