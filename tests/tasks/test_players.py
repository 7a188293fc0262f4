"""Classical players: they have a policy's trials, earn what is published of them, and the index is the right one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from builders import make_policy, make_spec
from ssm_metarl.algorithms.collect import collect_tasks, played
from ssm_metarl.seeds import seed_for
from ssm_metarl.tasks import TaskDistribution, make
from ssm_metarl.tasks.bandit import Bandit
from ssm_metarl.tasks.baselines import play
from ssm_metarl.tasks.baselines.bandit import MAX_INDEX_PULLS, index_table
from ssm_metarl.tasks.baselines.play import BASELINE_POLICIES, baseline_policy, demonstrate, play_baseline
from ssm_metarl.tasks.baselines.policy import BaselinePolicy, Trials
from ssm_metarl.tasks.popgym import NoisyPositionOnlyCartPole
from ssm_metarl.tasks.tabular_mdp import TabularMDP

Returns = NDArray[np.float64]

FAMILIES: dict[str, Callable[[], TaskDistribution]] = {
    "navigation-2d": lambda: make("navigation-2d"),
    "bandit": lambda: Bandit(arms=3, pulls=20),
    "tabular-mdp": lambda: TabularMDP(states=4, actions=3, episode_length=5),
    "noisy-position-only-cartpole": lambda: NoisyPositionOnlyCartPole(difficulty="medium"),
    "wind-v0": lambda: make("wind-v0"),
}
EVERY = [(family, player) for family in FAMILIES for player in ("uniform", *BASELINE_POLICIES[family])]


def earned(
    player: Any, distribution: TaskDistribution, num_tasks: int, num_episodes: int = 1, episodes: int = 1, seed: int = 0
) -> Returns:
    """Returns [M, K] on tasks of the test split."""
    tasks = distribution.sample(num_tasks, np.random.default_rng(seed), "test")
    seeds = [seed_for(seed, m) for m in range(num_tasks)]
    return play_baseline(player, distribution, tasks, seeds, num_episodes, episodes)


# --- The same trials as a policy's ------------------------------------------------------------------------


class Replay(BaselinePolicy):
    """Takes the actions [M, T, K, ...] that a policy took, and then the first one over again."""

    def __init__(self, trials: Trials, actions: NDArray[Any]) -> None:
        super().__init__(trials)
        steps = actions.swapaxes(0, 1)
        self.steps = list(steps.reshape(len(steps), trials.number, *actions.shape[3:]))

    def act(self, observations: NDArray[np.float32]) -> NDArray[Any]:
        return self.steps.pop(0)


@pytest.mark.parametrize("name", [*FAMILIES, "cartpole"])
def test_the_trials_are_those_of_a_policy(name: str) -> None:
    """Who acts as the policy did earns what it earned, to the bit: tasks, environment seeds and order are the same."""
    distribution = FAMILIES.get(name, lambda: make(name))()
    space: Any = distribution.action_space
    discrete = hasattr(space, "n")
    assert distribution.observation_space.shape
    spec = make_spec(
        observation_size=distribution.observation_space.shape[0],
        action_size=int(space.n) if discrete else space.shape[0],
        discrete=discrete,
    )
    tasks = distribution.sample(3, np.random.default_rng(0))
    seeds = [seed_for(7, 1, m) for m in range(3)]
    weights = make_policy(spec).numpy_weights()
    record = played(collect_tasks(distribution.make_vector_env, spec, weights, seeds, tasks, 4, distribution.horizon))
    returns = play_baseline(functools.partial(Replay, actions=record.actions), distribution, tasks, seeds, 4)
    np.testing.assert_array_equal(returns, record.rewards.sum(axis=1, dtype=np.float64))


def test_a_trial_goes_on_for_its_episodes() -> None:
    """Episodes follow each other as the environment lets them; the return is that of all of them."""
    distribution, episodes = FAMILIES["tabular-mdp"](), 3
    tasks = distribution.sample(2, np.random.default_rng(0))
    seeds = [seed_for(7, m) for m in range(2)]
    actions = np.random.default_rng(1).integers(0, 3, (2, 5 * episodes, 4))
    returns = play_baseline(functools.partial(Replay, actions=actions), distribution, tasks, seeds, 4, episodes)
    envs: Any = distribution.make_vector_env(tasks, 4)
    env_seeds = [
        np.random.SeedSequence(node.entropy, spawn_key=(*node.spawn_key, 0)).generate_state(4) for node in seeds
    ]
    envs.reset(seed=np.concatenate(env_seeds).tolist())
    rewards = [envs.step(step)[1] for step in actions.swapaxes(0, 1).reshape(5 * episodes, 8)]
    np.testing.assert_array_equal(returns.ravel(), np.sum(rewards, axis=0, dtype=np.float64))


def test_episodes_of_different_lengths() -> None:
    """An episode slot that has played its episodes earns nothing while others go on."""
    distribution = make("navigation-2d")
    goals = [[0.05, 0.0], [0.5, 0.5], [0.0, -0.3]]
    seeds = [seed_for(0, m) for m in range(3)]
    returns = play_baseline("clairvoyant", distribution, [{"goal": goal} for goal in goals], seeds, 2, episodes=4)
    ways = [
        4 * -sum(float(np.hypot(*(np.sign(goal) * np.maximum(np.abs(goal) - 0.1 * step, 0)))) for step in range(1, 6))
        for goal in np.array(goals)
    ]
    np.testing.assert_allclose(returns, np.repeat(ways, 2).reshape(3, 2), atol=1e-5)


@pytest.mark.parametrize(("family", "player"), EVERY)
def test_a_task_is_played_the_same_whatever_is_played_beside_it(family: str, player: str) -> None:
    distribution = FAMILIES[family]()
    tasks = distribution.sample(4, np.random.default_rng(0))
    seeds = [seed_for(3, m) for m in range(4)]
    together = play_baseline(player, distribution, tasks, seeds, 3, episodes=2)
    assert together.shape == (4, 3)
    assert np.isfinite(together).all()
    for chosen in ([2], [3, 0]):
        some = play_baseline(
            player, distribution, [tasks[m] for m in chosen], [seeds[m] for m in chosen], 3, episodes=2
        )
        np.testing.assert_array_equal(some, together[chosen])


class Noting(BaselinePolicy):
    """Another player, and what it saw and did, step by step: observations, actions, rewards, starts."""

    def __init__(self, trials: Trials, player: Callable[[Trials], BaselinePolicy], steps: list[Any]) -> None:
        super().__init__(trials)
        self.player, self.steps = player(trials), steps

    def act(self, observations: NDArray[np.float32]) -> NDArray[Any]:
        self.steps.append([observations.copy(), self.player.act(observations)])
        return self.steps[-1][1]

    def learn(self, actions: Any, rewards: Any, observations: Any, starts: Any) -> None:
        self.steps[-1] += [rewards, starts]
        self.player.learn(actions, rewards, observations, starts)


@pytest.mark.parametrize(
    ("family", "player"), [(family, player) for family, player in EVERY if family in ("bandit", "tabular-mdp")]
)
def test_in_its_own_trials_a_player_demonstrates_what_it_did(family: str, player: str) -> None:
    """By the same chance; in another's trials, where it saw something else, it does not."""
    distribution, steps, shape = FAMILIES[family](), list[Any](), (4, 3)
    tasks = distribution.sample(4, np.random.default_rng(0), "test")
    seeds, episodes = [seed_for(0, m) for m in range(4)], 2
    own = baseline_policy(distribution, player)
    play_baseline(functools.partial(Noting, player=own, steps=steps), distribution, tasks, seeds, 3, episodes)
    seen = [np.stack(each, 0).reshape(len(steps), *shape, *each[0].shape[1:]) for each in zip(*steps, strict=True)]
    observations, actions, rewards, ends = (array.swapaxes(0, 1) for array in seen)
    starts = np.concatenate([np.ones_like(ends[:, :1]), ends[:, :-1]], 1)

    def demonstrated(rewards: NDArray[Any]) -> NDArray[Any]:
        trials = Trials(distribution, tasks, 3, episodes, play._draw(seeds, 3)[1])
        return demonstrate(own, trials, observations, actions, rewards, starts)

    np.testing.assert_array_equal(demonstrated(rewards), actions)
    assert (demonstrated(1.0 - rewards) != actions).any() == (player not in ("uniform", "clairvoyant"))


def test_the_wind_is_shown_by_a_move_of_anothers() -> None:
    """Who moved too fast, moved as fast as it may; what the first place of the next episode shows is nothing."""
    distribution, wind = FAMILIES["wind-v0"](), np.array([0.03, -0.05])
    places = np.zeros((1, 4, 1, 2), np.float32)
    actions = np.array([[0.5, -0.02], [0.1, 0.1], [0.0, 0.0], [0.0, 0.0]], np.float32)[None, :, None]
    starts = np.array([True, False, False, True])[None, :, None]
    places[0, 1:, 0] = np.cumsum([wind + np.array([0.1, -0.02]), wind + 0.1, np.zeros(2)], 0)
    places[0, 3] = 0.0
    trials = Trials(distribution, [{"wind": [0.0, 0.0]}], 1, 2, [np.random.default_rng(0)])
    own = baseline_policy(distribution, "dead-reckoning")
    shown = demonstrate(own, trials, places, actions, np.zeros((1, 4, 1)), starts)
    assert shown.dtype == np.float32
    expected = np.array([0.0, 1.0]) - places[0, :, 0] - np.array([[0.0], [1.0], [1.0], [1.0]]) * wind
    np.testing.assert_allclose(shown[0, :, 0], expected, atol=1e-6)


def test_seeds_are_not_used_up() -> None:
    """A node of the seed tree gives the same trials however often it was used."""
    distribution = FAMILIES["bandit"]()
    tasks, seeds = distribution.sample(2, np.random.default_rng(0)), [seed_for(0, m) for m in range(2)]
    seeds[0].spawn(2)
    first = play_baseline("thompson", distribution, tasks, seeds, 5)
    np.testing.assert_array_equal(first, play_baseline("thompson", distribution, tasks, seeds, 5))
    assert (first != play_baseline("thompson", distribution, tasks, [seed_for(1, m) for m in range(2)], 5)).any()


# --- What they earn ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "player"), [pair for pair in EVERY if pair[1] != "uniform"])
def test_every_player_beats_chance_and_none_the_clairvoyant(family: str, player: str) -> None:
    """On the same trials, hence by the mean of differences."""

    def returns(who: str) -> Returns:
        return earned(who, FAMILIES[family](), 150, num_episodes=2, episodes=6).mean(axis=1)

    gain = returns(player) - returns("uniform")
    assert gain.mean() > 4 * gain.std() / 150**0.5
    if "clairvoyant" in BASELINE_POLICIES[family]:
        missed = returns("clairvoyant") - returns(player)
        assert missed.mean() >= 0


@pytest.mark.parametrize(
    ("player", "figure", "tolerance"),
    [
        ("uniform", 50.0, 0.8),
        ("thompson", 74.7, 1.2),  # 74.7 in Duan et al. 2016
        ("ucb1-prior", 78.0, 1.2),  # 78.0 there
        ("index", 78.57, 0.8),
        ("clairvoyant", 500 / 6, 0.8),
    ],
)
def test_bandit_of_five_arms(player: str, figure: float, tolerance: float) -> None:
    """2000 trials; only Thompson sampling, which draws at every pull, has fewer tasks and more episode slots."""
    num_tasks, num_episodes = (400, 5) if player == "thompson" else (2000, 1)
    returns = earned(player, Bandit(), num_tasks, num_episodes)
    assert returns.mean() == pytest.approx(figure, abs=tolerance)


@pytest.mark.parametrize(("arms", "figure"), [(10, 83.73), (50, 85.64)])
def test_index_player_with_more_arms(arms: int, figure: float) -> None:
    assert earned("index", Bandit(arms=arms), 2000).mean() == pytest.approx(figure, abs=0.8)


def test_order_of_the_bandit_players() -> None:
    """On the same trials: theory's UCB1 explores too much for 100 pulls, the index player is the best."""
    returns = [earned(who, Bandit(), 200, 3).mean() for who in ("ucb1", "thompson", "ucb1-prior", "index")]
    assert np.all(np.diff(returns) > 0)


@pytest.mark.parametrize(
    ("player", "episodes", "figure", "tolerance"),
    [
        ("psrl", 10, 133.4, 3.0),
        ("psrl", 25, 403.5, 6.0),
        ("psrl-prior-0", 10, 138.1, 3.0),  # 138.1 and 408.8 in Duan et al. 2016
        ("psrl-prior-0", 25, 408.8, 6.0),
        ("greedy", 10, 159.2, 3.0),  # 4,000 MDPs in a loop of its own
        ("optimistic", 10, 162.7, 3.0),  # as another implementation measured it
        ("optimistic", 25, 463.0, 8.0),
    ],
)
def test_players_of_tabular_mdps(player: str, episodes: int, figure: float, tolerance: float) -> None:
    returns = earned(player, TabularMDP(), 1000, episodes=episodes, seed=1)
    assert returns.mean() == pytest.approx(figure, abs=tolerance)


@pytest.mark.slow
def test_psrl_comes_to_play_the_best_policy() -> None:
    distribution = TabularMDP(states=3, actions=2, episode_length=5)

    def per_episode(player: str, episodes: int) -> float:
        return float(earned(player, distribution, 200, episodes=episodes).mean())

    late = (per_episode("psrl", 120) - per_episode("psrl", 100)) / 20
    best = (per_episode("clairvoyant", 120) - per_episode("clairvoyant", 100)) / 20
    first = per_episode("psrl", 1)
    assert late > first + 0.9 * (best - first)


@pytest.mark.parametrize(("difficulty", "figure"), [("easy", 0.989), ("medium", 0.648), ("hard", 0.387)])
def test_the_regulator_earns_what_the_best_memories_do(difficulty: str, figure: float) -> None:
    """Within what 1,000 episodes leave to chance; published are .995, .659 and .404 (Morad et al. 2023)."""
    returns = earned("lqg", NoisyPositionOnlyCartPole(difficulty=difficulty), 1000)
    assert abs(returns.mean() - figure) < 4 * returns.std() / 1000**0.5 + 0.002


def test_the_regulator_without_noise_lets_no_pole_fall() -> None:
    """It also starts anew with every episode."""
    distribution = NoisyPositionOnlyCartPole()
    distribution.noise = 1e-6
    assert earned("lqg", distribution, 20, num_episodes=2, episodes=2) == pytest.approx(2.0)


def test_stay_put_earns_the_distance() -> None:
    distribution = make("navigation-2d")
    tasks = distribution.sample(5, np.random.default_rng(0))
    returns = play_baseline("stay-put", distribution, tasks, [seed_for(0, m) for m in range(5)], 2)
    distances = [np.hypot(*task["goal"]) for task in tasks]
    np.testing.assert_allclose(returns, -100 * np.repeat(distances, 2).reshape(5, 2), rtol=1e-5)


def test_ucb1_tries_every_arm_first() -> None:
    """With as many pulls as arms, each is pulled once, whatever it pays."""
    odds = [1.0, 0.0, 1.0, 1.0, 0.0]
    returns = play_baseline("ucb1", Bandit(pulls=5), [{"probabilities": odds}], [seed_for(0)], 3)
    np.testing.assert_array_equal(returns, [[3, 3, 3]])


# --- The index --------------------------------------------------------------------------------------------


@functools.cache
def beside_a_known_arm(wins: int, losses: int, left: int, rate: float) -> tuple[float, float]:
    """Values of pulling the known arm, and the unknown one, next; later either may be pulled, in any order."""
    if left == 0:
        return 0.0, 0.0
    chance = (wins + 1) / (wins + losses + 2)
    known = rate + max(beside_a_known_arm(wins, losses, left - 1, rate))
    paid = 1 + max(beside_a_known_arm(wins + 1, losses, left - 1, rate))
    not_paid = max(beside_a_known_arm(wins, losses + 1, left - 1, rate))
    return known, chance * paid + (1 - chance) * not_paid


def test_the_index_decides_between_an_unknown_and_a_known_arm() -> None:
    """Against all ways to mix the two: the unknown arm is pulled where its index is above the known arm's rate."""
    indices, pulls = index_table(8), 8
    for left in range(1, pulls + 1):
        for wins in range(pulls - left + 1):
            for losses in range(pulls - left - wins + 1):
                index = indices[left, wins, losses]
                for rate in (index - 0.004, index + 0.004):
                    known, unknown = beside_a_known_arm(wins, losses, left, float(rate))
                    assert (unknown > known) == (rate < index)


def test_the_index_of_the_last_pull_is_the_mean_and_more_pulls_are_worth_exploring() -> None:
    indices = index_table(30)
    wins, losses = np.ogrid[:30, :30]
    reachable = wins + losses < 30
    means = (wins + 1) / (wins + losses + 2)
    np.testing.assert_allclose(indices[1][reachable], means[reachable], atol=1e-12)
    for left in range(1, 30):
        reachable = wins + losses <= 29 - left
        assert (indices[left + 1] >= indices[left] - 1e-3)[reachable].all()
        assert (indices[left][reachable] < 1).all()


Pair = tuple[int, int, int, int]
"""Payments and failures of the first arm, then of the second."""


def after_pull(state: Pair, arm: int, value: Callable[[Pair], float]) -> float:
    """Expected payment of a pull and value of what follows it."""
    wins, losses = state[2 * arm : 2 * arm + 2]
    chance = (wins + 1) / (wins + losses + 2)
    paid, not_paid = list(state), list(state)
    paid[2 * arm] += 1
    not_paid[2 * arm + 1] += 1
    return chance * (1 + value((*paid,))) + (1 - chance) * value((*not_paid,))  # type: ignore[arg-type]


def two_arms(pulls: int) -> tuple[float, float]:
    """Exact expected returns of the best play_baseline of two unknown arms, and of the index player."""
    indices = index_table(pulls)

    @functools.cache
    def best(state: Pair) -> float:
        return 0.0 if sum(state) == pulls else max(after_pull(state, arm, best) for arm in (0, 1))

    @functools.cache
    def by_index(state: Pair) -> float:
        if sum(state) == pulls:
            return 0.0
        left = pulls - sum(state)
        first, second = indices[left, state[0], state[1]], indices[left, state[2], state[3]]
        return after_pull(state, int(second > first), by_index)

    return best((0, 0, 0, 0)), by_index((0, 0, 0, 0))


@pytest.mark.parametrize("pulls", [1, 2, 5, 12])
def test_the_index_player_is_close_to_the_best_play_of_two_arms(pulls: int) -> None:
    best, by_index = two_arms(pulls)
    assert by_index <= best + 1e-12
    assert by_index == pytest.approx(best, rel=2e-3)


def test_the_index_player_earns_its_expectation() -> None:
    returns = earned("index", Bandit(arms=2, pulls=12), 1000, 5).mean(axis=1)
    assert returns.mean() == pytest.approx(two_arms(12)[1], abs=4 * returns.std() / 1000**0.5)


# --- Wrong calls ------------------------------------------------------------------------------------------


def test_unknown_players_are_named() -> None:
    with pytest.raises(ValueError, match=r"no bandit player 'psrl'.*clairvoyant, index, thompson, ucb1"):
        earned("psrl", Bandit(), 1)
    with pytest.raises(ValueError, match=r"no cartpole player 'thompson'.*uniform"):
        earned("thompson", make("cartpole"), 1)
    assert earned("uniform", make("cartpole"), 2, num_episodes=3).shape == (2, 3)


def test_wrong_calls() -> None:
    tasks = Bandit().sample(2, np.random.default_rng(0))
    with pytest.raises(ValueError, match="2 tasks need as many seeds, not 1"):
        play_baseline("uniform", Bandit(), tasks, [seed_for(0)], 1)
    with pytest.raises(ValueError, match="one episode or more"):
        play_baseline("uniform", Bandit(), tasks, [seed_for(0), seed_for(1)], 1, episodes=0)
    with pytest.raises(ValueError, match=f"up to {MAX_INDEX_PULLS} pulls a trial, not {MAX_INDEX_PULLS + 1}"):
        earned("index", Bandit(pulls=MAX_INDEX_PULLS + 1), 1)
