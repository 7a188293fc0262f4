"""Options of meta-learning: what they mean, what is accepted, and what is refused by name."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssm_metarl.algorithms.registry import ALGORITHMS, SCHEDULES, AlgorithmName, MetaConfig, Schedule


def test_two_step_weights_are_before_and_after_however_many_steps() -> None:
    assert MetaConfig(step_weights=(1, 3)).weights == (0.25, 0.75)
    assert MetaConfig(inner_steps=3, step_weights=(1, 3)).weights == (0.25, 0, 0, 0.75)
    assert MetaConfig(inner_steps=3, step_weights=(1, 3, 2, 2)).weights == (0.125, 0.375, 0.25, 0.25)
    assert MetaConfig(inner_steps=2).weights == (0, 0, 1)


not_a_number = st.one_of(
    st.sampled_from([float("nan"), float("inf"), float("-inf"), -(10**400), 10**400]),
    st.text(max_size=3),
    st.none(),
    st.booleans(),
)
not_positive = st.one_of(not_a_number, st.floats(max_value=0), st.integers(max_value=0))
negative = st.one_of(not_a_number, st.floats(max_value=0, exclude_max=True), st.integers(max_value=-1))
no_fraction = st.one_of(negative, st.floats(min_value=1, exclude_min=True), st.integers(min_value=2))
not_a_count = st.one_of(st.integers(max_value=0), st.floats(), st.text(max_size=3), st.none(), st.booleans())
not_a_name = st.one_of(
    st.text(max_size=6), st.none(), st.integers(), st.lists(st.text(max_size=2), max_size=1), st.just("PROMP")
)
BAD = {
    "algorithm": not_a_name,
    "lr_schedule": not_a_name,
    **dict.fromkeys(("inner_lr", "outer_lr", "clip", "max_grad_norm"), not_positive),
    **dict.fromkeys(("kl_penalty", "max_kl", "entropy_bonus"), negative),
    **dict.fromkeys(("discount", "gae_lambda"), no_fraction),
    **dict.fromkeys(("inner_steps", "epochs"), not_a_count),
    "step_weights": st.one_of(
        st.sampled_from([(0.0, 0.0), (1e308, 1e308), 3, "weights"]),
        st.lists(st.floats(0.1, 1), min_size=1, max_size=5).filter(lambda weights: len(weights) != 2).map(tuple),
        st.tuples(st.just(1.0), negative),
    ),
}


@pytest.mark.parametrize("option", BAD)
@settings(max_examples=15)
@given(data=st.data())
def test_an_impossible_option_is_refused_by_name(option: str, data: Any) -> None:
    """In one sentence."""
    value = data.draw(BAD[option])
    with pytest.raises(ValueError, match=rf"^{option} (must|needs) [^\n]*\.$"):
        MetaConfig(**{option: value})


@given(weights=st.lists(st.floats(0, 100), min_size=2, max_size=4).filter(lambda weights: sum(weights) > 1e-3))
def test_step_weights_are_normalised(weights: list[float]) -> None:
    config = MetaConfig(inner_steps=len(weights) - 1, step_weights=tuple(weights))
    assert sum(config.weights) == pytest.approx(1.0)
    assert [w * sum(weights) for w in config.weights] == pytest.approx(weights)
    assert MetaConfig(inner_steps=3).weights == (0.0, 0.0, 0.0, 1.0)


def test_only_the_clipped_objective_is_good_for_several_epochs() -> None:
    passes = {name: MetaConfig(algorithm=name, epochs=7).passes for name in ALGORITHMS}
    assert passes == {"promp": 7, "rl2": 7, "policy-gradient": 7, "maml": 1, "fomaml": 1}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_start_at_1_and_never_rise(name: str) -> None:
    factors = [SCHEDULES[name](done / 20) for done in range(21)]
    assert factors[0] == 1.0
    assert factors == sorted(factors, reverse=True)
    assert factors[-1] == pytest.approx(1.0 if name == "constant" else 0.0, abs=1e-12)


@pytest.mark.parametrize("algorithm", ["promp", "maml", "fomaml"])
def test_only_rl2_learns_without_inner_steps(algorithm: str) -> None:
    with pytest.raises(ValueError, match=f"inner_steps must be 1 or more for {algorithm}"):
        MetaConfig(algorithm=algorithm, inner_steps=0)
    assert MetaConfig(algorithm="rl2", inner_steps=0).weights == (1.0,)
    with pytest.raises(ValueError, match="step_weights"):
        MetaConfig(algorithm="rl2", inner_steps=0, step_weights=(1.0, 1.0))


def test_the_names_that_help_lists_are_those_of_the_registry() -> None:
    assert get_args(AlgorithmName) == tuple(ALGORITHMS)
    assert get_args(Schedule) == tuple(SCHEDULES)


def test_the_former_name_of_the_privileged_baseline_is_taken() -> None:
    """Runs and checkpoints of version 0.1 have it."""
    assert MetaConfig(algorithm="rl2", baseline="informed") == MetaConfig(algorithm="rl2", baseline="privileged")
