"""A player acts as the rollout loop does, in one environment or many, and says in a sentence what it cannot take."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from builders import make_policy, make_spec
from ssm_metarl import Player, TrainConfig, load_player, load_policy
from ssm_metarl.algorithms.collect import collect, played
from ssm_metarl.algorithms.spec import PolicySpec
from ssm_metarl.seeds import child, seed_for
from ssm_metarl.tasks import make

NODE = seed_for(3, 1)


class Reach(gymnasium.Env[Any, Any]):
    """Reach a place between 6 and 7 with actions in [5, 7]; episodes of 4 steps, ended at the place."""

    horizon = 4
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gymnasium.spaces.Box(5.0, 7.0, (2,), np.float32)
    goal = 6.5

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.steps = 0
        self.shift = self.np_random.normal(size=3).astype(np.float32)
        return self.shift, {}

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action)
        self.steps += 1
        reward = -abs(float(action[0]) - self.goal)
        return self.shift + self.steps, reward, bool(action[1] > 6.9), self.steps == 4, {}


SPEC = make_spec(action_low=(5.0, 5.0), action_high=(7.0, 7.0), memory_slots=2)


def player_for(spec: PolicySpec, **options: Any) -> Player:
    noise = np.random.default_rng(child(NODE, 1))
    return Player(spec, make_policy(spec).numpy_weights(), noise=noise, **options)


@pytest.mark.parametrize("num_episodes", [1, 3])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("family", ["navigation-2d", "cartpole", "bandit"])
@pytest.mark.parametrize("inputs", ["full", "observation"])
def test_a_player_takes_the_rollout_loops_actions_bit_by_bit(
    num_episodes: int, deterministic: bool, family: Any, inputs: str
) -> None:
    family = make(family)
    episodes = 2 if family.name == "bandit" else 1
    discrete = family.name != "navigation-2d"
    spec = make_spec(
        observation_size=family.observation_space.shape[0],
        action_size=int(family.action_space.n) if discrete else 2,
        discrete=discrete,
        inputs=inputs,
        **({} if discrete else {"action_low": (-0.1, -0.1), "action_high": (0.1, 0.1)}),
    )
    (task,) = family.sample(1, np.random.default_rng(0))
    weights = make_policy(spec).numpy_weights()
    env = family.make_vector_env([task], num_episodes)
    record = played(
        collect(
            env, spec, weights, [NODE], [task], family.horizon, trial_episodes=episodes, deterministic=deterministic
        )
    )
    player = player_for(spec, trial_episodes=episodes, deterministic=deterministic)
    again = family.make_vector_env([task], num_episodes)
    observations, _ = again.reset(seed=child(NODE, 0).generate_state(num_episodes).tolist())
    single = num_episodes == 1
    actions = player.act(observations[0] if single else observations)
    for step in range(record.valid.shape[1]):
        running = record.valid[0, step]
        expected = spec.env_actions(record.actions[0, step])
        np.testing.assert_array_equal(np.atleast_1d(actions)[running] if discrete else
                                      np.reshape(actions, expected.shape)[running], expected[running])  # fmt: skip
        batch = np.reshape(actions, (num_episodes, *expected.shape[1:]))
        observations, rewards, terminated, truncated, _ = again.step(batch)
        one = (lambda x: x[0]) if single else (lambda x: x)
        actions = player.act(one(observations), one(rewards), one(terminated), one(truncated))


def test_a_player_says_what_it_plays() -> None:
    assert repr(load_player("pretrained:cartpole")) == ("<Player of cartpole: 4 observed numbers, actions of 2 values>")
    assert repr(load_player("pretrained:navigation-2d")) == (
        "<Player of navigation-2d: 2 observed numbers, 2 numbers as actions>"
    )


def test_a_slot_that_begins_another_trial_forgets_and_the_others_do_not() -> None:
    spec = make_spec(discrete=True, memory_slots=2)
    player, fresh = (player_for(spec, deterministic=True) for _ in range(2))
    rng = np.random.default_rng(0)
    observations = rng.normal(size=(5, 3, 3)).astype(np.float32)
    player.act(observations[0])
    for step in range(1, 4):
        player.act(observations[step], np.ones(3))
    got = player.act(observations[4], np.ones(3), np.array([False, True, False]))
    fresh.act(observations[4])
    np.testing.assert_array_equal(player._state[0][0, 1], fresh._state[0][0, 1])
    assert not np.array_equal(player._state[0][0, 0], fresh._state[0][0, 0])
    assert got.shape == (3,)


def test_actions_are_in_the_environments_unit() -> None:
    player = player_for(SPEC)
    action = player.act(np.zeros(3))
    assert action.dtype == np.float32
    assert Reach.action_space.contains(action)
    many = player_for(SPEC).act(np.zeros((500, 3)))
    assert ((many >= 5) & (many <= 7)).all()
    assert many.std() > 0.1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([1.0, 2.0],), r"An observation must be \[3\] or \[N, 3\] numbers, not \[2\]"),
        (("text",), "An observation must be"),
        (([1.0, 2.0, np.nan],), "NaN or infinite"),
        (([1.0, 2.0, 3.0],), "reads the reward of the last step"),
        (([1.0, 2.0, 3.0], np.inf), "reward must be a finite number"),
        (([1.0, 2.0, 3.0], [1.0, 2.0]), "reward must be a finite number for each of 1"),
        (([1.0, 2.0, 3.0], 1.0, 2), "terminated must be true or false"),
        (([[1.0, 2.0, 3.0]] * 2, 1.0), r"in the middle of 1 episode\(s\) and got 2"),
    ],
)
def test_impossible_arguments_get_a_sentence_and_lose_nothing(arguments: Any, words: str) -> None:
    player, other = (player_for(SPEC, deterministic=True) for _ in range(2))
    for each in (player, other):
        each.act(np.zeros(3))
    with pytest.raises(ValueError, match=words):
        player.act(*arguments)
    np.testing.assert_array_equal(player.act(np.ones(3), 1.0), other.act(np.ones(3), 1.0))


def test_the_first_observation_has_no_reward_and_reset_begins_anew() -> None:
    player = player_for(SPEC, deterministic=True)
    with pytest.raises(ValueError, match=r"first observation after reset\(\) has no reward"):
        player.act(np.zeros(3), reward=1.0)
    first = player.act(np.zeros(3))
    player.act(np.ones(3), 1.0)
    player.reset()
    np.testing.assert_array_equal(player.act(np.zeros(3)), first)
    player.reset()
    assert player.act(np.zeros((2, 3))).shape == (2, 2)


@pytest.mark.parametrize("discrete", [False, True])
def test_a_policy_that_diverged_does_not_act(discrete: bool) -> None:
    spec = make_spec(discrete=discrete)
    weights = make_policy(spec).numpy_weights()
    weights["policy.bias"][:] = np.nan
    with pytest.raises(FloatingPointError, match="action is not finite"):
        Player(spec, weights).act(np.zeros(3))


# --- Adapting ---------------------------------------------------------------------------------------------


def test_adapting_leaves_the_player_and_the_environment_as_they_are() -> None:
    env = Reach()
    player = player_for(SPEC, trained=TrainConfig().replace(inner_lr=0.05, inner_steps=1, episodes=3))
    before = {name: value.copy() for name, value in player._weights.items()}
    adapted, again = (player.adapt(env, 4, steps=2, seed=1) for _ in range(2))
    assert adapted.adaptation is not None
    assert again.adaptation is not None
    np.testing.assert_array_equal(adapted.adaptation.returns, again.adaptation.returns)
    assert adapted.adaptation.returns.shape == (1, 3)
    for name, value in player._weights.items():
        np.testing.assert_array_equal(value, before[name])
    assert player.adaptation is None
    env.reset()
    env.step(adapted.act(np.zeros(3)))


def test_adapting_learns() -> None:
    player = Player(SPEC, make_policy(SPEC, noise=0.0).numpy_weights(), trained=TrainConfig().replace(inner_lr=0.5))
    found = player.adapt(Reach(), 60, steps=6).adaptation
    assert found is not None
    assert found.returns[0, -1] > found.returns[0, 0] + 0.2


def test_a_vector_environment_shares_the_episodes() -> None:
    envs = SyncVectorEnv([Reach, Reach], autoreset_mode=AutoresetMode.SAME_STEP)
    player = player_for(SPEC, trained=TrainConfig().replace(episodes=4))
    found = player.adapt(envs, 3, steps=1, horizon=4).adaptation
    assert found is not None
    assert found.environment_steps <= 2 * 4 * 4
    with pytest.raises(ValueError, match="needs horizon="):
        player.adapt(envs)
    with pytest.raises(ValueError, match="must reset in the same step"):
        player.adapt(SyncVectorEnv([Reach]), horizon=4)


class Pushes(Reach):
    action_space = gymnasium.spaces.Discrete(2)


class Elsewhere(Reach):
    action_space = gymnasium.spaces.Box(4.0, 7.0, (2,), np.float32)


class Wide(Reach):
    observation_space = gymnasium.spaces.Box(-1, 1, (5,), np.float32)


class Endless(Reach):
    horizon = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("env", "words"),
    [
        (Pushes, "cannot play this environment: its actions are continuous"),
        (Elsewhere, r"bounded by \[5, 5\] and \[7, 7\]"),
        (Wide, "observations are of the size 3"),
        (Endless, "horizon must be"),
    ],
)
def test_an_environment_of_other_spaces_is_refused(env: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        player_for(SPEC).adapt(env(), 1)


# --- From a checkpoint ------------------------------------------------------------------------------------


def test_the_pretrained_cartpole_acts_on_gymnasiums_own_environment() -> None:
    env = gymnasium.make("CartPole-v1")
    player = load_player("pretrained:cartpole", seed=1).adapt(env, 10, steps=2)
    returns = []
    for episode in range(5):
        player.reset()
        observation, _ = env.reset(seed=episode)
        action, total, done = player.act(observation), 0.0, False
        while not done:
            observation, reward, terminated, truncated, _ = env.step(action)
            total, done = total + float(reward), terminated or truncated
            action = player.act(observation, reward=reward)
        returns.append(total)
    assert np.mean(returns) > 300


def test_calling_a_policy_with_an_array_names_what_acts() -> None:
    policy, _ = load_policy("pretrained:cartpole")
    with pytest.raises(TypeError, match=r"load_player\(path\).act\(observation\)"):
        policy(np.zeros(4, np.float32))
