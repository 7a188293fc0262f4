"""The POPGym families against the package; run as a script where it is installed, this file prints `RECORDED` anew.

What needs popgym stands in a class that is collected only where it is installed: no test skips itself.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import cloudpickle
import numpy as np
import pytest
from numpy.typing import NDArray

from ssm_metarl.tasks import TaskDistribution, make
from ssm_metarl.tasks.cartpole import CARTPOLE_V1
from ssm_metarl.tasks.popgym import DECKS_AND_K, NOISE, NoisyPositionOnlyCartPole, RepeatPrevious

HAS_POPGYM = importlib.util.find_spec("popgym") is not None
GYM_NAMES = {"repeat-previous": "RepeatPrevious", "noisy-position-only-cartpole": "NoisyPositionOnlyCartPole"}
each_family = pytest.mark.parametrize("name", GYM_NAMES)
each_difficulty = pytest.mark.parametrize("difficulty", DECKS_AND_K)

# The first episode of popgym 1.0.7 after reset(seed=3), when the t-th action is t modulo the number of actions.
# Printed by `pip install popgym==1.0.7 && python tests/tasks/test_popgym.py` (gymnasium 1.2.2).
# repeat-previous: the suits dealt, the last one included, and the return.
# noisy-position-only-cartpole: the first, second and last observation, and the number of steps.
RECORDED: dict[str, dict[str, Any]] = {
    "repeat-previous": {
        "easy": ("3130201221210132022300300131130022131033012301323221", -0.625),
        "medium": (
            "31230120332122101000321100121212121311023030213032102323130033001331031032220330023122221013220021330113",
            -0.4722,
        ),
        "hard": (
            "312012033212210003122130013330113231111303023312132022123323201133200120321020"
            "021003231113030132331202213203112111332323020032210122103210030001022101330020",
            -0.413,
        ),
    },
    "noisy-position-only-cartpole": {
        "easy": ([[-0.0867, 0.00857], [-0.24396, 0.0071], [-0.04731, 0.27022]], 24),
        "medium": ([[-0.13196, -0.01299], [-0.44596, -0.01609], [0.01109, 0.32847]], 24),
        "hard": ([[-0.17723, -0.03455], [-0.64796, -0.03929], [0.0695, 0.38672]], 24),
    },
}


def gym_family(name: str, difficulty: str) -> TaskDistribution:
    return make(f"gym:popgym:popgym-{GYM_NAMES[name]}{difficulty.title()}-v0")


def first_episode(family: TaskDistribution) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Observations [steps + 1, O] and rewards [steps], with the seed and the actions of `RECORDED`."""
    envs = family.make_vector_env([{}], 1)
    observations, rewards, done = [envs.reset(seed=3)[0][0]], [], False
    while not done:
        action = len(rewards) % int(family.action_space.n)  # type: ignore[attr-defined]
        observation, reward, terminated, truncated, infos = envs.step(np.array([action]))
        done = bool(terminated[0] or truncated[0])
        observations.append(infos["final_obs"][0] if done else observation[0])
        rewards.append(reward[0])
    return np.stack(observations), np.stack(rewards)


def summary(family: TaskDistribution) -> Any:
    """What `RECORDED` has of an episode."""
    observations, rewards = first_episode(family)
    if observations.shape[1] == 4:
        return "".join(map(str, observations.argmax(1))), round(float(rewards.sum()), 4)
    return [[round(float(x), 5) for x in observations[t]] for t in (0, 1, -1)], len(rewards)


@each_family
@each_difficulty
def test_is_what_was_recorded_of_the_package(name: str, difficulty: str) -> None:
    episode, last = summary(make(name, {"difficulty": difficulty}))
    expected_episode, expected_last = RECORDED[name][difficulty]
    if isinstance(episode, str):
        assert episode == expected_episode
    else:
        np.testing.assert_allclose(episode, expected_episode, atol=2e-5)
    assert last == pytest.approx(expected_last, abs=1e-4)


class TestBesideThePackage:
    __test__ = HAS_POPGYM

    @each_family
    @each_difficulty
    def test_same_bits(self, name: str, difficulty: str) -> None:
        """To each slot's first end; of the cards, whose episodes draw their order only, in the next one, too."""
        ours, theirs = make(name, {"difficulty": difficulty}), gym_family(name, difficulty)
        assert (ours.horizon, ours.observation_space, ours.action_space) == (
            theirs.horizon, theirs.observation_space, theirs.action_space,
        )  # fmt: skip
        mine, reference = (family.make_vector_env([{}], 5) for family in (ours, theirs))
        np.testing.assert_array_equal(mine.reset(seed=7)[0], reference.reset(seed=7)[0])
        rng = np.random.default_rng(0)
        live = np.ones(5, bool)
        for _ in range(2 * ours.horizon):
            actions = rng.integers(0, int(ours.action_space.n), 5)  # type: ignore[attr-defined]
            observations, *step, infos = mine.step(actions)
            expected, *their_step, their_infos = reference.step(actions)
            for value, other in zip(step, their_step, strict=True):
                assert value.dtype == other.dtype
                np.testing.assert_array_equal(value[live], other[live])
            ended = step[1] | step[2]
            for slot in np.flatnonzero(live & ended):
                np.testing.assert_array_equal(infos["final_obs"][slot], their_infos["final_obs"][slot])
            if name == "noisy-position-only-cartpole":
                live &= ~ended
            np.testing.assert_array_equal(observations[live], expected[live])

    def test_others_play_without_ranges_and_horizon(self) -> None:
        family = make("gym:popgym:popgym-CountRecallEasy-v0")
        assert family.horizon == 51
        assert family.enumerable
        assert family.reference.oracle is None


# --- What is true of them, whatever the package does ------------------------------------------------------------


@each_difficulty
def test_who_remembers_the_cards_gets_1_and_who_does_not_loses(difficulty: str) -> None:
    decks, k = DECKS_AND_K[difficulty]
    family = RepeatPrevious(difficulty=difficulty)
    envs = family.make_vector_env([{}], 300)
    observations, _ = envs.reset(seed=0)
    for _ in range(2):
        seen, returns = [observations.argmax(1)], np.zeros(300)
        while True:
            answers = seen[-k] if len(seen) >= k else seen[0]
            observations, rewards, terminated, truncated, infos = envs.step(answers)
            returns += rewards
            assert ((rewards > 0) == (len(seen) >= k)).all()  # the first k cards are only shown
            if terminated.any():
                break
            seen.append(observations.argmax(1))
        assert (terminated & truncated).all()  # a true end
        assert len(seen) == family.horizon
        seen.append(np.stack(infos["final_obs"].tolist()).argmax(1))
        assert all((np.stack(seen) == suit).sum(0).tolist() == [13 * decks] * 300 for suit in range(4))
        np.testing.assert_allclose(returns, 1.0, rtol=1e-5)
        assert (seen[0] == seen[k]).mean() == pytest.approx(0.25, abs=0.1)  # it takes memory


@each_difficulty
def test_the_random_player_s_return_is_exact(difficulty: str) -> None:
    family, rng = RepeatPrevious(difficulty=difficulty), np.random.default_rng(1)
    envs = family.make_vector_env([{}], 2000)
    envs.reset(seed=0)
    returns = np.sum([envs.step(rng.integers(0, 4, 2000))[1] for _ in range(family.horizon)], axis=0)
    assert returns.mean() == pytest.approx(family.reference.random, abs=4 * family.reference.random_sd / 2000**0.5)
    assert returns.std() == pytest.approx(family.reference.random_sd, rel=0.07)


@each_difficulty
def test_the_cart_is_seen_with_noise_of_its_own(difficulty: str) -> None:
    """As CartPole-v1's position and angle, which the same seed starts at the same place, plus noise."""
    num_episodes = 2000
    envs = NoisyPositionOnlyCartPole(difficulty=difficulty).make_vector_env([{}], num_episodes)
    cart = make("cartpole").make_vector_env([CARTPOLE_V1], num_episodes)
    noise = [envs.reset(seed=5)[0] - cart.reset(seed=5)[0][:, [0, 2]]]
    for action in (0, 1, 1):
        noise.append(
            envs.step(np.full(num_episodes, action))[0] - cart.step(np.full(num_episodes, action))[0][:, [0, 2]]
        )
    positions, angles = np.moveaxis(np.stack(noise), -1, 0)
    assert positions.std() == pytest.approx(NOISE[difficulty], rel=0.05)
    assert abs(positions.mean()) < 4 * NOISE[difficulty] / positions.size**0.5
    assert np.abs(np.corrcoef(np.concatenate([positions, angles])) - np.eye(8)).max() < 4.5 / num_episodes**0.5
    if difficulty == "easy":  # else the angle is clipped
        assert angles.std() == pytest.approx(0.1, rel=0.05)


def test_who_sees_the_cart_gets_1() -> None:
    envs = NoisyPositionOnlyCartPole().make_vector_env([{}], 20)
    envs.reset(seed=0)
    returns = np.zeros(20)
    for step in range(200):
        position, velocity, angle, angular_velocity = envs._state
        push = 0.1 * position + 0.2 * velocity + angle + 0.5 * angular_velocity > 0
        observations, rewards, terminated, truncated, _ = envs.step(push.astype(int))
        returns += rewards
        assert not terminated.any()
        assert truncated.all() == (step == 199)
        assert observations in envs.observation_space
    np.testing.assert_allclose(returns, 1.0, rtol=1e-5)


@each_family
def test_a_slot_is_the_same_alone_and_beside_others(name: str) -> None:
    family, rng = make(name), np.random.default_rng(0)
    seeds = rng.integers(2**32, size=6)
    actions = rng.integers(0, 2, (120, 6))

    def played(num_episodes: NDArray[Any]) -> list[NDArray[Any]]:
        envs = family.make_vector_env([{}] * len(num_episodes), 1)
        observations = [envs.reset(seed=seeds[num_episodes].tolist())[0]]
        rewards = []
        for step in actions[:, num_episodes]:
            observation, reward, *_ = envs.step(step)
            observations.append(observation)
            rewards.append(reward)
        return [np.stack(observations), np.stack(rewards)]

    together = played(np.arange(6))
    for slot in range(6):
        for alone, beside in zip(played(np.array([slot])), together, strict=True):
            np.testing.assert_array_equal(alone[:, 0], beside[:, slot])


@each_family
def test_options_tasks_and_splits(name: str) -> None:
    with pytest.raises(ValueError, match=r"no difficulty 'hrad', did you mean 'hard'\? \(valid: easy, hard, medium\)"):
        make(name, {"difficulty": "hrad"})
    family = make(name, {"difficulty": "hard"})
    copy = cloudpickle.loads(cloudpickle.dumps(family))
    assert (copy.horizon, copy.reference) == (family.horizon, family.reference)
    assert family.enumerable
    assert family.sample(2, np.random.default_rng(0), "test") == [{}, {}]
    with pytest.raises(ValueError, match="no split 'shifted'"):
        family.sample(1, np.random.default_rng(0), "shifted")
    with pytest.raises(ValueError, match="Task 0: there is no parameter 'k'"):
        family.make_vector_env([{"k": 3}], 1)
    with pytest.raises(ValueError, match="At least one task"):
        family.make_vector_env([], 1)


@each_family
@pytest.mark.parametrize("wrong", [-1, 4])
def test_unknown_actions_are_refused(name: str, wrong: int) -> None:
    envs = make(name).make_vector_env([{}], 2)
    envs.reset(seed=0)
    with pytest.raises(ValueError, match=r"An action of .* must be "):
        envs.step(np.array([0, wrong]))


def _print_recorded() -> None:
    print({name: {level: summary(gym_family(name, level)) for level in DECKS_AND_K} for name in GYM_NAMES})


if __name__ == "__main__":
    _print_recorded()
