"""A policy's sizes and form: what is accepted, what is refused, and by which name."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import make_spec, specs
from ssm_metarl.algorithms.spec import PolicyConfig, PolicySpec


@given(spec=specs())
def test_a_specification_survives_json(spec: PolicySpec) -> None:
    assert PolicySpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


not_a_count = st.one_of(
    st.integers(max_value=0),
    st.floats(),
    st.booleans(),
    st.text(max_size=3),
    st.none(),
    st.lists(st.integers(), max_size=2),
)
not_positive = st.one_of(
    st.floats(max_value=0),
    st.sampled_from([float("nan"), float("inf"), 10**400]),
    st.booleans(),
    st.text(max_size=3),
    st.none(),
)
BAD = {
    "hidden_dim": not_a_count,
    "state_dim": st.one_of(not_a_count, st.integers(0, 50).map(lambda n: 2 * n + 1)),
    "num_layers": st.one_of(not_a_count, st.integers(max_value=-1)).filter(lambda value: value is False or value != 0),
    "memory_slots": st.one_of(not_a_count, st.integers(max_value=-1)).filter(
        lambda value: value is False or value != 0
    ),
    "gated": st.sampled_from(["yes", "false", 0, 2, None]),
    "inputs": st.one_of(st.text(max_size=5), st.none(), st.lists(st.integers(), max_size=1)),
    "initial_std": not_positive,
    "encoder_scale": not_positive,
    "min_period": st.one_of(not_positive, st.floats(max_value=1.999)),
}
BAD_SIZES = {"observation_size": not_a_count, "action_size": not_a_count, "discrete": st.sampled_from(["no", 1, None])}


@pytest.mark.parametrize("option", BAD)
@settings(max_examples=15)
@given(data=st.data())
def test_an_impossible_form_is_refused_by_name(option: str, data: Any) -> None:
    value = data.draw(BAD[option])
    with pytest.raises(ValueError, match=rf"^{option} must be [^\n]*\.$"):
        PolicyConfig(**{option: value})


@pytest.mark.parametrize("option", BAD_SIZES)
@settings(max_examples=15)
@given(data=st.data())
def test_an_impossible_size_is_refused_by_name(option: str, data: Any) -> None:
    value = data.draw(BAD_SIZES[option])
    with pytest.raises(ValueError, match=rf"^{option} must be [^\n]*\.$"):
        PolicySpec.from_dict(make_spec().to_dict() | {option: value})


def test_an_unknown_or_missing_key_is_named() -> None:
    values = make_spec().to_dict()
    with pytest.raises(ValueError, match="'hiden_dim': did you mean 'hidden_dim'"):
        PolicySpec.from_dict(values | {"hiden_dim": 3})
    del values["discrete"]
    with pytest.raises(ValueError, match="discrete"):
        PolicySpec.from_dict(values)


@given(
    st.lists(st.tuples(st.sampled_from([None, -3.0, 0.0]), st.sampled_from([None, 0.5, 40.0])), min_size=1, max_size=4),
    st.integers(0, 1000),
)
def test_actions_go_to_the_environments_unit_and_back(
    bounds: list[tuple[float | None, float | None]], seed: int
) -> None:
    low, high = zip(*bounds, strict=True)
    spec = make_spec(action_size=len(bounds), action_low=low, action_high=high)
    actions = np.random.default_rng(seed).normal(0, 20, (3, 5, len(bounds))).astype(np.float32)
    there = spec.env_actions(actions)
    np.testing.assert_allclose(spec.env_actions(spec.policy_actions(there)), there, rtol=1e-5, atol=1e-5)
    back = spec.policy_actions(there)
    both = np.array([None not in pair for pair in bounds])
    np.testing.assert_allclose(back[..., both], np.clip(actions, -1, 1)[..., both], atol=1e-5)
    # What the environment would cut counts as what it makes of it.
    inside = np.clip(
        actions,
        [bound if bound is not None else -np.inf for bound in low],
        [bound if bound is not None else np.inf for bound in high],
    )
    np.testing.assert_array_equal(spec.policy_actions(actions), spec.policy_actions(inside.astype(np.float32)))
