"""Environments of other people's habits: what is played, what is refused, and what is said of it."""

from __future__ import annotations

import re
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from gymnasium.spaces.utils import flatten, flatten_space

import habits
import odd_observations
from external_environments import assert_refused, check_conventions, draw, rollouts
from ssm_metarl.core import InvalidStep
from ssm_metarl.seeds import seed_for
from ssm_metarl.tasks.baselines.play import play_baseline
from ssm_metarl.tasks.external.names import from_name

PLAYED = {
    "Base": 2, "NoOptions": 2, "ObsBytes": 2, "ObsInt8": 3, "ObsHalf": 3, "ObsDouble": 2, "ObsList": 2, "ObsBools": 2,
    "ObsRow": 2, "ObsImage": 768, "ObsMB": 3, "ObsGridMB": 6, "ObsBoolsMB": 2, "ObsGridMD": 14, "ObsBytesMD": 5,
    "ObsFloatsMD": 5, "ObsStart": 3, "ObsDict": 5, "ObsOneKey": 4, "ObsTuple": 5, "ObsNested": 9, "ObsBytesInDict": 13,
    "RewRow": 2, "EndsInt": 2, "flattened": 5, "Prints": 2,
}  # fmt: skip
"""Numbers of the observation."""

ACTIONS: dict[str, Any] = {
    "ActStart": Discrete(3), "ActMD": MultiDiscrete([2, 3]), "ActMDStart": MultiDiscrete([2, 5]),
    "ActGridMD": MultiDiscrete([2, 3, 4, 1]), "ActMB": MultiDiscrete([2, 2, 2]), "ActGridMB": MultiDiscrete([2] * 4),
    "ActInt": MultiDiscrete([4, 4]), "ActIntUnequal": MultiDiscrete([201, 3]), "ActByte": MultiDiscrete([256]),
    "Act0d": Box(-1, 1, (1,)), "Act2d": Box(-1, 1, (4,)), "ActHalf": Box(-1, 1, (2,)),
}  # fmt: skip
"""The policy's actions."""

SAID = {
    "ObsWrongShape": r"reset: observation must be in Box\(.*\(2,\).*not an array of the shape \(3,\), \[0.0, 0.0",
    "ObsTransposed": r"reset: observation must be in Box\(.*\(2, 3\).*of the shape \(3, 2\)",
    "ObsRagged": r"reset: observation must be in Box\(.*not \[\[0.0\], \[1.0, 2.0\]\]",
    "ObsWords": r"reset: observation must be in Box\(.*not \['0', '1'\]",
    "ObsNone": r"reset: observation must be in Box\(.*not None",
    "ObsDiscOut": r"step 3: observation must be in Discrete\(3\), not 3\.",
    "ObsDiscNeg": r"step 3: observation must be in Discrete\(3\), not -1\.",
    "ObsBelowStart": r"reset: observation must be in Discrete\(3, start=5\), not 4\.",
    "ObsFraction": r"reset: observation must be in Discrete\(3\), not 0.5\.",
    "ObsOneHot": r"reset: observation must be in Discrete\(3\), not an array of the shape \(3,\), \[0, 1, 0\]",
    "ObsMDOut": r"reset: observation must be in MultiDiscrete\(\[2 3\]\), not .*\[2, 0\]",
    "ObsMDFraction": r"reset: observation must be in MultiDiscrete\(\[2 3\]\), not .*\[0.5, 0.0\]",
    "ObsScalarForMD": r"reset: observation must be in MultiDiscrete\(\[2 3\]\), not 1\.",
    "ObsMBOut": r"reset: observation must be in MultiBinary\(2\), not .*\[0, 2\]",
    "ObsMissingKey": r"reset: observation must be in Dict\('a': .*, not \{'a'",
    "ObsDeepOut": r"reset: observation\['far'\]\[0\] must be in Discrete\(3, start=2\), not 5\.",
    "ObsVectorForTuple": r"reset: observation\[0\] must be in Box\(.*not 0.0\.",
    "ObsNaN": r"observation or reward not finite at step 3\.",
    "RewNone": r"step 3: the reward must be a number, not None\.",
    "RewText": r"step 1: the reward must be a number, not '1.5'\.",
    "RewTwo": r"step 1: the reward must be a number, not an array of the shape \(2,\), \[0.0, 0.0\]\.",
    "RewComplex": r"step 1: the reward must be a number, not 1j\.",
    "EndsText": r"step 1: terminated must be true or false, not 'no'\.",
    "Exits": r"the environment exits with 3 in step, line \d+ of .*habits\.py, which would end the process\.$",
    "OldReset": r"reset: reset must return observation and info, .*before Gym 0.26: .*shimmy.GymV21CompatibilityV0",
    "OldStep": r"step 1: step must return .*, not 4 results, .*shimmy.GymV21CompatibilityV0.*step_api_compatibility",
}
"""What stands in a rollout's errors."""

REFUSED = {
    "ObsEmpty": "observations of .* hold no number",
    "ObsNoKeys": r"observations of Dict\(\) hold no number",
    "ObsText": r"observations\['said'\] must be a Box, .* not Text",
    "ObsGraph": "observations must be a Box, .* not Graph",
    "ObsSequence": r"observations\[1\] must be a Box, .* not Sequence",
    "ObsOneOf": "observations must be a Box, .* not OneOf",
    "ObsScreen": r"shape \(84, 84, 3\) are too large .* ResizeObservation",
    "ObsNoSpace": "observation_space must be a gymnasium.Space, not None",
    "ActWide": "integers of 10001 values, 256 at most are supported: declare a Box of real numbers",
    "ActEmpty": "actions of .* hold no number",
    "ActTuple": r"actions must be a Box, .* not Tuple\(Discrete\(2\), Discrete\(2\)\): .*ActionWrapper",
    "ActText": "actions must be a Box, .* not Text",
    "OldSeed": "reset takes no seed, as before Gym 0.26: .*shimmy.GymV21CompatibilityV0",
    "Sized": "cannot be made: TypeError: .*'size'",
    "several": "must make a gymnasium.Env, not list",
    "vectors": "must make a gymnasium.Env, not SyncVectorEnv",
}
"""Why no family is made."""


def place(name: str) -> str:
    """A family's name."""
    return f"{'odd_observations' if hasattr(odd_observations, name) and name != 'Base' else 'habits'}:{name}"


@pytest.mark.parametrize("name", PLAYED)
def test_is_played(name: str) -> None:
    family = from_name(place(name))
    assert family.observation_space.shape == (PLAYED[name],)
    record = rollouts(family, draw(family, 2))
    assert not record.errors
    assert record.num_steps == (16 if name == "EndsInt" else 32)
    check_conventions(family, steps=10).close()


@pytest.mark.parametrize("name", ["ObsMB", "ObsGridMD", "ObsDict", "ObsTuple", "ObsNested", "ObsImage", "ObsStart"])
def test_observations_are_gymnasiums_flattened_ones(name: str) -> None:
    family: Any = from_name(place(name))
    space = getattr(odd_observations, name).observation_space
    flat = flatten_space(space)
    np.testing.assert_array_equal(family.observation_space.low, flat.low)
    np.testing.assert_array_equal(family.observation_space.high, flat.high)
    slot = family._policy_env({"goal": 0.0})
    for _ in range(5):
        sample = space.sample()
        vector = slot._vector(sample)
        assert vector.dtype == np.float32
        np.testing.assert_array_equal(vector, flatten(space, sample).astype(np.float32))


def test_nothing_is_cut_off_where_a_part_is_declared_as_bytes() -> None:
    family: Any = from_name(place("ObsBytesInDict"))
    observation = family._policy_env({"goal": 0.0})._vector({"image": np.full((2, 2), 0.5), "time": 0})
    assert observation[:4].tolist() == [0.5] * 4


@pytest.mark.parametrize("name", ACTIONS)
def test_every_action_that_a_policy_can_take_is_in_the_space(name: str) -> None:
    family: Any = from_name(place(name))
    assert family.action_space == ACTIONS[name]
    record = rollouts(family, draw(family, 2))
    assert not record.errors
    assert record.num_steps == 32
    slot = family._policy_env({"goal": 0.0})
    space = slot.env.action_space
    seen = []
    for _ in range(300):
        action = slot._action(family.action_space.sample())
        assert action in space
        seen.append(np.ravel(action))
    if isinstance(family.action_space, MultiDiscrete):
        values = [set(column) for column in np.stack(seen, 1).tolist()]
        assert all(len(found) == size or size > 100 for found, size in zip(values, family.action_space.nvec))
    assert np.isfinite(family.reference.random)


@pytest.mark.parametrize("name", SAID)
def test_a_fault_is_told_with_the_space_the_value_and_the_step(name: str) -> None:
    family = from_name(place(name))
    record = rollouts(family, draw(family, 2))
    assert not record.valid.any()
    assert len(record.errors) == 4
    for error in record.errors:
        assert re.search(SAID[name], error), error
        assert error.startswith("task {'goal': ")
        assert "\n" not in error


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_in_one_sentence(name: str) -> None:
    assert_refused(REFUSED[name], place(name))


def test_nothing_is_forgotten() -> None:
    """Every class of the module has its place in one of the tables."""
    elsewhere = {"Sampled", "Rewarded", "Bits"}
    members = {**vars(habits), **vars(odd_observations)}
    classes = {name for name, kind in members.items() if isinstance(kind, type) and issubclass(kind, habits.Base)}
    assert classes - elsewhere == {*PLAYED, *ACTIONS, *SAID, *REFUSED} - {"flattened", "several", "vectors"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [(np.array([1.5]), 1.5), (np.array(1.5), 1.5), (np.float64(1.5), 1.5), (np.bool_(True), 1.0), (2, 2.0), ([3], 3.0)],
)
def test_rewards_are_numbers_in_any_wrapping(given: Any, expected: float) -> None:
    family: Any = from_name("habits:Rewarded")
    slot = family._policy_env({"goal": 0.0})
    slot.unwrapped.given = given
    slot.assign({"goal": 0.0})
    slot.reset(seed=0)
    assert slot.step(np.zeros(1, np.float32))[1] == expected


@pytest.mark.parametrize("given", [10**400, np.zeros(0), [None], {"reward": 1.0}, np.datetime64(1, "s"), b"1", "", 1j])
def test_rewards_that_are_no_number(given: Any) -> None:
    family: Any = from_name("habits:Rewarded")
    slot = family._policy_env({"goal": 0.0})
    slot.unwrapped.given = given
    slot.assign({"goal": 0.0})
    slot.reset(seed=0)
    with pytest.raises(InvalidStep, match=r"^habits:Rewarded, step 1: the reward must be a number, not "):
        slot.step(np.zeros(1, np.float32))


def test_the_uniform_baseline_draws_every_integer() -> None:
    family = from_name("habits:Bits")
    seeds = [seed_for(0, task) for task in range(5)]
    returns = play_baseline("uniform", family, draw(family, 5), seeds, 40)
    assert returns.mean() == pytest.approx(6, abs=4 * np.sqrt(3 / 200))


def test_registered_environments_are_read_in_the_same_way() -> None:
    before = dict(gymnasium.registry)
    try:
        for name in ("ObsNested", "ActMDStart", "ObsDiscOut"):
            gymnasium.register(f"{name}-v0", place(name), max_episode_steps=8)
        family = from_name("gym:ObsNested-v0", {"x": [0.0, 1.0]})
        assert family.observation_space.shape == (9,)
        assert from_name("gym:ActMDStart-v0").action_space == MultiDiscrete([2, 5])
    finally:
        gymnasium.registry.clear()
        gymnasium.registry.update(before)


def test_blackjack_of_gymnasium_is_taken() -> None:
    """A Tuple of three Discrete spaces."""
    family = from_name("gym:Blackjack-v1", {}, 10)
    assert family.observation_space.shape == (32 + 11 + 2,)
    record = rollouts(family, draw(family, 2))
    assert not record.errors
    np.testing.assert_array_equal(record.observations[record.valid].sum(-1), 3.0)
