"""The meta-RL suite against an independent computation of its protocols; run as a script, it prints references.

What needs MuJoCo stands in classes that are collected only where it is installed: no test skips itself.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from numpy.typing import NDArray

from ssm_metarl.config import TrainConfig
from ssm_metarl.tasks import Task, make
from ssm_metarl.tasks.meta_mujoco import BASES, FAMILIES, AntDirV0, CheetahDir, CheetahVel, HopperParam, WalkerParam
from ssm_metarl.tasks.wind import Wind

HAS_MUJOCO = importlib.util.find_spec("mujoco") is not None
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "cheetah-dir-v0": ("HalfCheetah-v5", {"ctrl_cost_weight": 0.05}),
    "cheetah-vel-v0": ("HalfCheetah-v5", {"ctrl_cost_weight": 0.05}),
    "ant-dir-v0": ("Ant-v5", {"include_cfrc_ext_in_observation": False, "contact_cost_weight": 5e-4}),
    "hopper-param-v0": ("Hopper-v5", {"xml_file": "hopper.xml"}),
    "walker-param-v0": ("Walker2d-v5", {"xml_file": "walker2d.xml"}),
}
"""Gymnasium's environment of the same physics."""

each_family = pytest.mark.parametrize("kind", FAMILIES, ids=lambda kind: kind.name)


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """MuJoCo writes what it complains of, also in gymnasium's own models, to a file where it is."""
    monkeypatch.chdir(tmp_path)


def their_env(kind: Any, task: Task) -> Any:
    """Gymnasium's environment, with the task's body."""
    name, options = THEIRS[kind.name]
    env: Any = gymnasium.make(name, **options).unwrapped
    for array in BASES.keys() & task.keys():
        numbers = getattr(env.model, array)
        base = 1.3 if array == "dof_damping" else 1.5
        numbers[:] = numbers * base ** np.array(task[array]).reshape(numbers.shape)
    return env


def their_step(env: Any, kind: Any, task: Task, action: NDArray[np.float32]) -> tuple[Any, float, bool]:
    """Observation, reward and end of the published protocol, written down from its source with gymnasium's physics."""
    mujoco = importlib.import_module("mujoco")
    env.data.qacc_warmstart[:] = 0.0
    before = env.data.qpos[:2].copy()
    observation, _, fell, _, info = env.step(action)
    velocity = (env.data.qpos[:2] - before) / env.dt
    cost = float(np.square(action, dtype=np.float64).sum())
    if kind is CheetahDir or kind is CheetahVel:
        mujoco.mj_kinematics(env.model, env.data)
        observation = np.concatenate([observation, env.data.body("torso").xpos])
        gain = task["direction"] * velocity[0] if kind is CheetahDir else -abs(velocity[0] - task["velocity"])
        return observation, float(gain - 0.05 * cost), False
    if kind is AntDirV0:
        gain = math.cos(task["angle"]) * velocity[0] + math.sin(task["angle"]) * velocity[1]
        contact = 5e-4 * np.square(np.clip(env.data.cfrc_ext, -1, 1)).sum()
        assert contact == pytest.approx(-info["reward_contact"])
        return observation, float(gain - 0.5 * cost - contact + 1.0), fell
    return observation, float(velocity[0] + 1.0 - 1e-3 * cost), fell


def some_actions(kind: Any, count: int, rng: np.random.Generator, scale: float = 0.5) -> NDArray[np.float32]:
    return rng.normal(0.0, scale, (count, kind.robot.actuators)).astype(np.float32)


class TestSuite:
    __test__ = HAS_MUJOCO

    @each_family
    def test_an_episode_is_that_of_the_protocol(self, kind: Any) -> None:
        """From gymnasium's own start, with actions that let robots fall and feet hit the floor."""
        family = kind()
        steps = 0
        for seed in range(6):
            task = family.sample(1, np.random.default_rng(seed))[0]
            env, ours = their_env(kind, task), family.make_vector_env([task], 1)
            env.reset(seed=seed)
            ours.reset(seed=[seed])
            np.testing.assert_array_equal(ours._state[0, 1:], np.concatenate([env.data.qpos, env.data.qvel]))
            rng = np.random.default_rng(seed)
            for _ in range(60):
                action = some_actions(kind, 1, rng, scale=0.2 + 0.2 * seed).clip(-1, 1)
                observation, reward, fell = their_step(env, kind, task, action[0])
                observed, rewards, terminated, _, infos = ours.step(action)
                observed = infos["final_obs"] if terminated[0] else observed
                np.testing.assert_allclose(observed[0], observation, rtol=2e-5, atol=2e-5)
                assert rewards[0] == pytest.approx(reward, abs=2e-4)
                assert terminated[0] == fell
                steps += 1
                if fell:
                    break
        assert steps > 60

    def test_contacts_cost(self) -> None:
        """An ant on the floor pays for standing there."""
        ours: Any = AntDirV0().make_vector_env([{"angle": 1}], 2)
        ours.reset(seed=0)
        for _ in range(20):
            ours.step(np.zeros((2, 8), np.float32))
        assert (ours._contact_cost() > 1e-4).all()

    @each_family
    def test_slots_do_not_touch_each_other(self, kind: Any) -> None:
        """Together, apart, on one thread or three: the same bits."""
        rng = np.random.default_rng(0)
        tasks, steps = kind().sample(3, rng), 25
        actions = np.stack([some_actions(kind, 6, rng) for _ in range(steps)]).reshape(steps, 3, 2, -1)

        def play(chosen: list[int], threads: int) -> NDArray[np.float32]:
            envs = kind(horizon=10, threads=threads).make_vector_env([tasks[m] for m in chosen], 2)
            envs.reset(seed=[10 * m + k for m in chosen for k in range(2)])
            seen = []
            for step in actions[:, chosen].reshape(steps, 2 * len(chosen), -1):
                observations, rewards, *_ = envs.step(step)
                seen.append(np.concatenate([observations, rewards[:, None]], axis=1))
            envs.close()
            return np.stack(seen).reshape(steps, len(chosen), 2, -1)

        together = play([0, 1, 2], threads=1)
        for chosen, threads in (([0, 1, 2], 3), ([2], 1), ([1, 0], 2)):
            np.testing.assert_array_equal(play(chosen, threads), together[:, chosen])

    @each_family
    def test_tasks(self, kind: Any) -> None:
        family = kind()
        tasks = family.sample(200, np.random.default_rng(0))
        assert json.loads(json.dumps(tasks)) == tasks
        assert family.sample(200, np.random.default_rng(0), "test") == tasks
        with pytest.raises(ValueError, match="no split 'shifted'"):
            family.sample(1, np.random.default_rng(0), "shifted")
        family.make_vector_env(tasks[:3], 1).close()

    def test_ranges(self) -> None:
        rng = np.random.default_rng(0)
        assert {task["direction"] for task in CheetahDir().sample(50, rng)} == {-1, 1}
        assert {task["angle"] for task in AntDirV0().sample(50, rng)} == {-1, 1}
        speeds = [task["velocity"] for task in CheetahVel().sample(3000, rng)]
        np.testing.assert_allclose(np.quantile(speeds, [0, 0.5, 1]), [0, 1.5, 3], atol=0.1)
        for kind in (HopperParam, WalkerParam):
            exponents = np.array([task["body_mass"] for task in kind().sample(1000, rng)])
            np.testing.assert_allclose(np.quantile(exponents, [0, 0.5, 1]), [-3, 0, 3], atol=0.1)

    def test_bodies_differ_and_the_model_that_all_share_stays(self) -> None:
        """A heavier body moves otherwise; the next family's bodies begin from the same numbers."""
        family = HopperParam()
        heavy = {name: [3.0] * (each.size or 1) for name, each in family.parameters.items()}
        even = {name: [0.0] * (each.size or 1) for name, each in family.parameters.items()}
        for _ in range(2):
            envs: Any = family.make_vector_env([even, heavy], 2)
            masses = [model.body_mass.sum() for model in envs._models]
            assert masses[0] == masses[1]
            assert masses[2] == masses[3] == pytest.approx(masses[0] * 1.5**3)
            assert envs._models[0] is envs._models[1]

    @each_family
    def test_a_trial_has_two_episodes(self, kind: Any) -> None:
        config = TrainConfig.for_task(kind.name, algorithm="rl2")
        assert config.experience.trial_episodes == 2
        assert kind().horizon == 200

    @each_family
    def test_random_return(self, kind: Any) -> None:
        returns, reference = random_returns(kind(), 60, seed=10_000), kind.reference
        assert returns.mean() == pytest.approx(reference.random, abs=5 * reference.random_sd / 60**0.5)


class TestWind:
    def test_an_episode_by_hand(self) -> None:
        envs = Wind().make_vector_env([{"wind": [0.05, -0.08]}, {"wind": [0.0, 0.0]}], 1)
        observations, _ = envs.reset(seed=0)
        np.testing.assert_array_equal(observations, np.zeros((2, 2)))
        place = np.zeros((2, 2))
        total = np.zeros(2)
        for step in range(75):
            wanted = np.array([0.0, 1.0]) - place - np.array([[0.05, -0.08], [0.0, 0.0]])
            action = wanted.astype(np.float32)  # clipped to .1 along each axis
            place += np.clip(action, np.float32(-0.1), np.float32(0.1)) + np.array([[0.05, -0.08], [0.0, 0.0]])
            observations, rewards, terminated, truncated, infos = envs.step(action)
            seen = np.stack(infos["final_obs"]) if step == 74 else observations
            np.testing.assert_allclose(seen, place, rtol=1e-6)
            np.testing.assert_array_equal(rewards, np.linalg.norm(place - [0.0, 1.0], axis=1) <= 0.03)
            assert not terminated.any()
            assert truncated.all() == (step == 74)
            total += rewards
        # Against the wind .02 a step remain, so that 1 takes 49 steps to come within .03 of it.
        assert total.tolist() == [27.0, 66.0]

    def test_what_is_no_number_spoils_its_slot_alone(self) -> None:
        envs = Wind().make_vector_env([{"wind": [0.0, 0.0]}], 2)
        envs.reset(seed=0)
        _, rewards, *_ = envs.step(np.array([[np.nan, 0.0], [0.0, 0.0]], np.float32))
        assert np.isnan(rewards).tolist() == [True, False]

    def test_winds(self) -> None:
        tasks = Wind().sample(3000, np.random.default_rng(0))
        assert json.loads(json.dumps(tasks)) == tasks
        winds = np.array([task["wind"] for task in tasks])
        np.testing.assert_allclose(
            np.quantile(winds, [0, 0.5, 1], axis=0), [[-0.08] * 2, [0] * 2, [0.08] * 2], atol=4e-3
        )

    def test_references(self) -> None:
        assert random_returns(make("wind-v0"), 400, seed=1).mean() == pytest.approx(Wind.reference.random, abs=0.2)
        found = informed_returns(4000, seed=1)
        assert Wind.reference.oracle == pytest.approx(found.mean(), abs=5 * found.std() / 4000**0.5)


def random_returns(family: Any, episodes: int, seed: int) -> NDArray[np.float64]:
    """Returns [episodes] on as many tasks of actions of mean 0 and half of the largest as deviation."""
    rng = np.random.default_rng(seed)
    envs: Any = family.make_vector_env(family.sample(episodes, rng), num_episodes=1)
    envs.reset(seed=rng.integers(2**63, size=episodes).tolist())
    returns, running = np.zeros(episodes), np.ones(episodes, dtype=bool)
    half = 0.5 * family.action_space.high
    while running.any():
        actions = half * rng.standard_normal((episodes, len(half)))
        _, rewards, terminated, truncated, _ = envs.step(actions.astype(np.float32))
        returns += np.where(running, rewards, 0.0)
        running &= ~(terminated | truncated)
    envs.close()
    return returns


def informed_returns(episodes: int, seed: int) -> NDArray[np.float64]:
    """Of a player that knows the wind."""
    tasks = Wind().sample(episodes, np.random.default_rng(seed))
    winds, envs = np.array([task["wind"] for task in tasks]), Wind().make_vector_env(tasks, 1)
    places, _ = envs.reset(seed=0)
    returns = np.zeros(episodes)
    for _ in range(75):
        places, rewards, *_ = envs.step((np.array([0.0, 1.0]) - places - winds).astype(np.float32))
        returns += rewards
    return returns


if __name__ == "__main__":
    print(f"wind-v0: oracle={informed_returns(200_000, seed=0).mean():.2f}")
    for each in (*FAMILIES, Wind):
        found = np.concatenate([random_returns(each(), 100, number) for number in range(10)])
        print(f"{each.name}: random={found.mean():.2f}, random_sd={found.std():.2f} ({len(found)} episodes)")
