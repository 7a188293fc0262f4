"""Mutations stay within their bounds, move as far as they may, and never come again once rejected."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import seeds
from ssm_metarl.config import TrainConfig
from ssm_metarl.tuning.evolution import _fit_weights
from ssm_metarl.tuning.mutation import BOUNDS, FACTORS, SIZES, Proposal, alternatives, moves, propose

BEYOND = {"state_dim": 512, "hidden_dim": 512, "inner_lr": 100.0, "outer_lr": 1.0, "inner_steps": 9}
"""So far outside the bounds that none of these can move."""


@st.composite
def configs(draw: Any) -> dict[str, Any]:
    """Any parent that training takes, within the bounds or beyond them."""
    inner_steps = draw(st.integers(1, 4))
    weights = st.lists(st.floats(0.1, 2.0), min_size=inner_steps + 1, max_size=inner_steps + 1)
    return (
        TrainConfig()
        .replace(
            state_dim=2 * draw(st.integers(1, 160)),
            hidden_dim=draw(st.integers(1, 320)),
            num_layers=draw(st.integers(0, 5)),
            inner_lr=draw(st.floats(1e-4, 30.0)),
            outer_lr=draw(st.floats(1e-7, 0.5)),
            inner_steps=inner_steps,
            step_weights=tuple(draw(st.just([]) | weights)),
        )
        .to_dict()
    )


def mutated(config: dict[str, Any], proposal: Proposal) -> dict[str, Any]:
    """What `Evolution` makes of it."""
    child = {**config, **proposal.after}
    return {**child, "step_weights": _fit_weights(child["step_weights"], child["inner_steps"])}


def draws(config: dict[str, Any], seed: int, taboo: set[str] | None = None) -> Proposal | None:
    return propose("parent", config, np.random.default_rng(seed), taboo or set())


# --- What one option may become ---------------------------------------------------------------------------


def test_alternatives_by_hand() -> None:
    config = TrainConfig().replace(state_dim=32, hidden_dim=5, num_layers=1, inner_lr=0.1, outer_lr=1e-3).to_dict()
    assert alternatives("state_dim", config) == [26, 38]
    assert alternatives("hidden_dim", config) == [7]  # 3 would be under the bound
    assert alternatives("num_layers", config) == [0, 2]
    assert alternatives("inner_steps", config) == [2]
    assert alternatives("inner_lr", config) == pytest.approx([0.05, 0.08, 0.125, 0.2])
    assert alternatives("outer_lr", config) == pytest.approx([0.0005, 0.0008, 0.00125, 0.002])


@given(config=configs(), name=st.sampled_from(list(BOUNDS)))
def test_alternatives_are_within_bounds_and_move(config: dict[str, Any], name: str) -> None:
    low, high = BOUNDS[name]
    for value in alternatives(name, config):
        assert low <= value <= high
        assert value != config[name]
        assert type(value) is type(config[name])


@given(config=configs(), name=st.sampled_from(list(SIZES)))
def test_sizes_move_by_a_fifth_or_their_least_step(config: dict[str, Any], name: str) -> None:
    """Rounded to whole steps, both ways alike: pairs of modes stay pairs."""
    least, value = SIZES[name], config[name]
    for other in alternatives(name, config):
        moved = abs(other - value)
        assert moved % least == 0
        assert abs(moved - max(0.2 * value, least)) <= least / 2 + 1e-9


@given(config=configs(), name=st.sampled_from(["inner_lr", "outer_lr"]))
def test_learning_rates_take_every_factor_that_fits(config: dict[str, Any], name: str) -> None:
    low, high = BOUNDS[name]
    assert alternatives(name, config) == [
        config[name] * factor for factor in FACTORS if low <= config[name] * factor <= high
    ]


@given(config=configs(), name=st.sampled_from(list(BOUNDS)))
def test_what_lies_within_bounds_can_always_move(config: dict[str, Any], name: str) -> None:
    low, high = BOUNDS[name]
    if low <= config[name] <= high:
        assert alternatives(name, config)


# --- Proposals --------------------------------------------------------------------------------------------


@given(config=configs(), seed=seeds)
def test_a_proposal_changes_one_or_two_options_and_trains(config: dict[str, Any], seed: int) -> None:
    proposal = draws(config, seed)
    if proposal is None:
        assert not any(alternatives(name, config) for name in BOUNDS if name not in ("inner_steps", "state_dim"))
        return
    assert 1 <= len(proposal.after) <= 2
    assert proposal.before == {name: config[name] for name in proposal.after}
    assert all(value in alternatives(name, config) for name, value in proposal.after.items())
    TrainConfig.from_dict(mutated(config, proposal))  # sizes even, step weights as many as steps
    assert draws(config, seed) == proposal


@given(config=configs(), seed=seeds)
def test_memoryless_policies_keep_the_size_of_their_state(config: dict[str, Any], seed: int) -> None:
    proposal = draws({**config, "num_layers": 0}, seed)
    if any(alternatives(name, config) for name in BOUNDS if name not in ("inner_steps", "state_dim")):
        assert proposal is not None
    assert "state_dim" not in (proposal.after if proposal else {})


def counts(config: dict[str, Any], verdicts: Mapping[str, Sequence[float]], draws: int = 400) -> Counter[str]:
    """How often each move is proposed."""
    found = (propose("p", config, np.random.default_rng(seed), set(), verdicts) for seed in range(draws))
    return Counter(move for proposal in found if proposal for move in moves(proposal.before, proposal.after))


def test_every_option_is_proposed_alone_and_in_pairs() -> None:
    config = TrainConfig().replace(inner_steps=2).to_dict()
    found = [draws(config, seed) for seed in range(400)]
    chosen = {frozenset(proposal.after) for proposal in found if proposal}
    assert len(chosen) == len(BOUNDS) * (len(BOUNDS) + 1) // 2
    often = counts(config, {})
    assert set(often) == {f"{name} {way}" for name in BOUNDS for way in ("up", "down")}
    assert max(often.values()) < 2 * min(often.values())


def test_moves_that_were_kept_come_more_often_and_none_is_given_up() -> None:
    config = TrainConfig().replace(inner_steps=2).to_dict()
    often = counts(config, {"inner_lr up": (15.0, 1.0), "num_layers up": (0.0, 15.0), "hidden_dim down": (1.0, 1.0)})
    assert often["inner_lr up"] > 3 * often["outer_lr up"]
    assert often["num_layers up"] < often["outer_lr up"] / 3
    assert set(often) | {"num_layers up"} == set(counts(config, {}))
    assert propose("p", {**config, **BEYOND}, np.random.default_rng(0), set(), {"num_layers up": (0.0, 50.0)})


def test_a_proposal_is_known_by_parent_options_and_values() -> None:
    one = Proposal("p", {"inner_lr": 0.1, "state_dim": 32}, {"inner_lr": 0.2, "state_dim": 38})
    assert one.key == Proposal("p", {}, {"state_dim": 38, "inner_lr": 0.2}).key
    others = [Proposal("q", one.before, one.after), Proposal("p", {}, {"inner_lr": 0.2})]
    others += [Proposal("p", {}, {**one.after, "inner_lr": np.nextafter(0.2, 1).item()})]
    assert len({one.key, *(other.key for other in others)}) == 4


@given(config=configs(), seed=seeds)
def test_what_is_taboo_never_comes_again(config: dict[str, Any], seed: int) -> None:
    """Until 40 are, or none is left."""
    rng, taboo = np.random.default_rng(seed), set[str]()
    for _ in range(40):
        proposal = propose("parent", config, rng, taboo)
        if proposal is None:
            break
        assert proposal.key not in taboo
        taboo.add(proposal.key)
    other = propose("other parent", config, rng, taboo)
    assert (other is None) == (not taboo)


def test_without_anything_left_there_is_no_proposal() -> None:
    """A small space: one layer more or less, and nothing else within its bounds."""
    config = {**TrainConfig().to_dict(), **BEYOND}
    layers = [Proposal("parent", {"num_layers": 1}, {"num_layers": count}) for count in (0, 2)]
    found = {proposal.key for seed in range(20) if (proposal := draws(config, seed))}
    assert found == {proposal.key for proposal in layers}
    assert draws(config, 0, {layers[0].key}) == layers[1]
    assert draws(config, 0, found) is None
    assert draws({**config, "num_layers": 9}, 0) is None


# --- Step weights -----------------------------------------------------------------------------------------


@given(
    weights=st.lists(st.floats(0.0, 2.0), max_size=6).filter(lambda w: len(w) != 1),
    inner_steps=st.integers(1, 6),
)
def test_step_weights_fit_any_number_of_steps(weights: list[float], inner_steps: int) -> None:
    fitted = _fit_weights(weights, inner_steps)
    assert len(fitted) == (len(weights) if len(weights) in (0, inner_steps + 1) else 2)
    assert sum(fitted) == pytest.approx(sum(weights))
    assert fitted[:1] == weights[:1]
    if len(weights) == inner_steps + 1:
        assert fitted == weights
    if sum(weights) > 0:
        TrainConfig().replace(inner_steps=inner_steps, step_weights=tuple(fitted))
