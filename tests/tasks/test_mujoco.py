"""The MuJoCo families against gymnasium's own environments; run as a script, this file prints their references.

What needs MuJoCo stands in classes that are collected only where it is installed: no test skips itself.
"""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import cloudpickle
import gymnasium
import numpy as np
import pytest
from numpy.typing import NDArray

from ssm_metarl.tasks import Task
from ssm_metarl.tasks.mujoco import FAMILIES, THREADS_VARIABLE, AntDir, HalfCheetahDir, HalfCheetahVel, MujocoFamily

HAS_MUJOCO = importlib.util.find_spec("mujoco") is not None
REFERENCES: dict[str, tuple[str, dict[str, Any]]] = {
    "half_cheetah.xml": ("HalfCheetah-v5", {}),
    "ant.xml": ("Ant-v5", {"include_cfrc_ext_in_observation": False, "contact_cost_weight": 0.0}),
}
ONE_OF_EACH: dict[type[MujocoFamily], Task] = {
    HalfCheetahDir: {"direction": -1},
    HalfCheetahVel: {"velocity": 1.3},
    AntDir: {"angle": 2.1},
}

Floats = NDArray[np.float32]
each_family = pytest.mark.parametrize("kind", FAMILIES, ids=lambda kind: kind.name)
each_robot = pytest.mark.parametrize("kind", [HalfCheetahDir, AntDir], ids=["half-cheetah", "ant"])


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """MuJoCo writes what it complains of, also in gymnasium's own models, to a file where it is."""
    monkeypatch.chdir(tmp_path)


@each_family
def test_without_mujoco_the_error_says_how_to_get_it(kind: type[MujocoFamily], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mujoco", None)
    with pytest.raises(ValueError, match=rf"{kind.name} needs MuJoCo: pip install 'ssm-metarl\[mujoco\]'"):
        kind()


def test_the_module_imports_without_mujoco() -> None:
    code = "import sys; sys.modules['mujoco'] = None; import ssm_metarl.tasks.mujoco"
    subprocess.run([sys.executable, "-c", code], check=True)


def actions_for(family: MujocoFamily, num_envs: int, rng: np.random.Generator) -> Floats:
    """An untrained policy's; some lie outside of the action space."""
    return rng.normal(0.0, 0.5, (num_envs, *family.action_space.shape)).astype(np.float32)  # type: ignore[misc]


def gymnasium_env(family: MujocoFamily) -> Any:
    name, options = REFERENCES[family.robot.file]
    return gymnasium.make(name, **options).unwrapped


def place(envs: Any, slot: int, reference: Any) -> None:
    """Bring an episode slot into the state of gymnasium's environment."""
    envs._state[slot] = np.concatenate([[reference.data.time], reference.data.qpos, reference.data.qvel])


def expected_reward(family: MujocoFamily, task: Task, velocity: Floats, action: Floats, healthy: bool) -> float:
    """Rewards written down once more, from the velocity [2] of the torso."""
    if isinstance(family, AntDir):
        along = math.cos(task["angle"]) * velocity[0] + math.sin(task["angle"]) * velocity[1]
        return float(along + healthy - 0.5 * np.square(action).sum())
    cost = 0.1 * np.square(action).sum()
    if isinstance(family, HalfCheetahVel):
        return float(-abs(velocity[0] - task["velocity"]) - cost)
    return float(task["direction"] * velocity[0] - cost)


class TestAgainstGymnasium:
    __test__ = HAS_MUJOCO

    @each_robot
    def test_spaces_and_time(self, kind: type[MujocoFamily]) -> None:
        family, reference = kind(), gymnasium_env(kind())
        assert family.observation_space.shape == reference.observation_space.shape
        assert family.action_space == reference.action_space
        assert family.robot.frame_skip == reference.frame_skip
        assert family.make_vector_env([ONE_OF_EACH[kind]], 1)._step_time == reference.dt

    @each_robot
    def test_starts(self, kind: type[MujocoFamily]) -> None:
        """Seed by seed, and with the same generator in the episodes that follow."""
        reference = gymnasium_env(kind())
        envs = kind(horizon=1).make_vector_env([ONE_OF_EACH[kind]], 1)
        for seed in range(5):
            observations, _ = envs.reset(seed=[seed])
            np.testing.assert_array_equal(observations[0], reference.reset(seed=seed)[0].astype(np.float32))
            observations, *_ = envs.step(np.zeros((1, *kind.robot.action_space.shape), np.float32))
            np.testing.assert_array_equal(observations[0], reference.reset()[0].astype(np.float32))

    @each_family
    def test_one_step_from_the_same_state(self, kind: type[MujocoFamily]) -> None:
        """From states of a played episode and from wild ones, whatever gymnasium's solver remembers."""
        family, task = kind(), ONE_OF_EACH[kind]
        reference = gymnasium_env(family)
        envs = family.make_vector_env([task], num_episodes=1)
        envs.reset(seed=0)
        rng = np.random.default_rng(0)
        reference.reset(seed=1)
        for trial in range(60):
            if trial % 20 == 0:  # then it goes on from where the last step led
                qpos, qvel = reference.init_qpos.copy(), rng.normal(0.0, trial / 10, reference.model.nv)
                qpos[2:] += rng.normal(0.0, 0.1, len(qpos) - 2)
                reference.set_state(qpos, qvel)
            action = actions_for(family, 1, rng)[0].clip(-1, 1)
            place(envs, 0, reference)
            before = reference.data.qpos[:2].copy()
            expected, reward, fell, *_ = reference.step(action)
            velocity = (reference.data.qpos[:2] - before) / reference.dt
            observations, rewards, terminated, _, infos = envs.step(action[None])
            observed = infos["final_obs"][0] if terminated[0] else observations[0]
            np.testing.assert_allclose(observed, expected.astype(np.float32), rtol=1e-6, atol=1e-6)
            assert terminated[0] == fell
            ours = expected_reward(family, task, velocity, action, not fell)
            np.testing.assert_allclose(rewards[0], ours, rtol=1e-6, atol=1e-6)
            if kind is HalfCheetahDir:  # direction -1: the velocity counts the other way
                theirs = reward - 2 * velocity[0]
                np.testing.assert_allclose(rewards[0], theirs, rtol=1e-6, atol=1e-6)

    @each_robot
    def test_an_episode_is_the_same_bits(self, kind: type[MujocoFamily]) -> None:
        """Where gymnasium's solver is told to forget before each of its steps, as ours does."""
        family = kind()
        reference = gymnasium_env(family)
        envs = family.make_vector_env([ONE_OF_EACH[kind]], num_episodes=1)
        envs.reset(seed=[3])
        reference.reset(seed=3)
        rng = np.random.default_rng(0)
        for _ in range(100):
            action = actions_for(family, 1, rng)
            reference.data.qacc_warmstart[:] = 0.0
            expected, _, fell, *_ = reference.step(action[0].clip(-1, 1))
            observations, _, terminated, *_ = envs.step(action)
            assert terminated[0] == fell
            if fell:
                break
            np.testing.assert_array_equal(observations[0], expected.astype(np.float32))

    @each_robot
    def test_twenty_steps_of_gymnasium_as_it_is(self, kind: type[MujocoFamily]) -> None:
        """Its warm start moves the solver's result by 1e-13 a step, which contacts amplify: 1e-5 after 20."""
        family = kind()
        reference = gymnasium_env(family)
        envs = family.make_vector_env([ONE_OF_EACH[kind]], num_episodes=1)
        for seed in range(5):
            envs.reset(seed=[seed])
            reference.reset(seed=seed)
            rng = np.random.default_rng(seed)
            for _ in range(20):
                action = actions_for(family, 1, rng)
                expected, _, fell, *_ = reference.step(action[0].clip(-1, 1))
                observations, _, terminated, *_ = envs.step(action)
                assert terminated[0] == fell
                if fell:
                    break
                np.testing.assert_allclose(observations[0], expected, rtol=1e-5, atol=1e-5)

    def test_the_ants_velocity_is_near_gymnasiums(self) -> None:
        """Ant-v5 reads its position where the integrator last looked; ours is that of the state."""
        family = AntDir()
        reference = gymnasium_env(family)
        envs = family.make_vector_env([{"angle": 0.0}], num_episodes=1)
        envs.reset(seed=[0])
        reference.reset(seed=0)
        rng = np.random.default_rng(0)
        for _ in range(50):
            action = actions_for(family, 1, rng)
            _, expected, fell, *_ = reference.step(action[0].clip(-1, 1))
            _, rewards, *_ = envs.step(action)
            assert rewards[0] == pytest.approx(expected, abs=0.1)
            if fell:
                break


class TestColumns:
    __test__ = HAS_MUJOCO

    @each_family
    def test_slots_and_threads_do_not_touch_each_other(self, kind: type[MujocoFamily]) -> None:
        """Together, apart, in another company, on one thread or three: the same bits, over several episodes."""
        family = kind(horizon=20)
        rng = np.random.default_rng(0)
        tasks, num_episodes, steps = family.sample(4, rng), 3, 50
        seeds = rng.integers(2**63, size=(4, num_episodes))
        actions = np.stack([actions_for(family, 4 * num_episodes, rng) for _ in range(steps)])
        actions = actions.reshape(steps, 4, num_episodes, -1)

        def play(chosen: list[int], threads: int) -> Floats:
            envs: Any = kind(horizon=20, threads=threads).make_vector_env([tasks[m] for m in chosen], num_episodes)
            envs.reset(seed=seeds[chosen].ravel().tolist())
            seen = []
            for step in actions[:, chosen].reshape(steps, len(chosen) * num_episodes, -1):
                observations, rewards, *_ = envs.step(step)
                seen.append(np.concatenate([observations, rewards[:, None]], axis=1))
            envs.close()
            return np.stack(seen).reshape(steps, len(chosen), num_episodes, -1)

        together = play([0, 1, 2, 3], threads=1)
        for chosen, threads in (([0, 1, 2, 3], 3), ([3], 1), ([2], 2), ([3, 0, 1], 1)):
            np.testing.assert_array_equal(play(chosen, threads), together[:, chosen])

    @each_family
    def test_the_task_shows_in_rewards_only(self, kind: type[MujocoFamily]) -> None:
        family = kind(horizon=30)
        first, second = (family.sample(20, np.random.default_rng(seed)) for seed in (0, 1))
        number = next(i for i in range(20) if first[i] != second[i])
        envs: list[Any] = [family.make_vector_env([tasks[number]], 2) for tasks in (first, second)]
        starts = [env.reset(seed=3)[0] for env in envs]
        np.testing.assert_array_equal(*starts)
        rng = np.random.default_rng(0)
        for _ in range(29):
            actions = actions_for(family, 2, rng)
            (one, reward, *_, info), (other, other_reward, *_, other_info) = (env.step(actions) for env in envs)
            np.testing.assert_array_equal(one, other)
            assert info.keys() == other_info.keys()
            assert (reward != other_reward).all()

    @each_family
    def test_actions_are_clipped_and_so_is_their_cost(self, kind: type[MujocoFamily]) -> None:
        family = kind()
        envs: Any = family.make_vector_env([ONE_OF_EACH[kind]], 2)
        envs.reset(seed=[4, 4])
        for _ in range(10):
            actions = np.stack([np.full(family.robot.actuators, 1.0), np.full(family.robot.actuators, np.inf)])
            actions[:, ::2] *= -1
            observations, rewards, *_ = envs.step(actions.astype(np.float32))
            np.testing.assert_array_equal(observations[0], observations[1])
            assert np.isfinite(rewards[0])
            assert rewards[0] == rewards[1]

    @each_family
    def test_nan_actions_spoil_one_step_of_one_slot(self, kind: type[MujocoFamily]) -> None:
        family = kind()
        rng = np.random.default_rng(0)
        envs: list[Any] = [family.make_vector_env([ONE_OF_EACH[kind]], 3) for _ in range(2)]
        for env in envs:
            env.reset(seed=0)
        for step in range(5):
            actions = actions_for(family, 3, rng)
            spoilt = actions.copy()
            if step == 2:
                spoilt[1, 0] = np.nan
            expected, got = envs[0].step(actions), envs[1].step(spoilt)
            assert np.isnan(got[1]).tolist() == [False, step == 2, False]
            assert np.isfinite(got[0]).all()
            for left, right in zip(expected[:2], got[:2], strict=True):
                np.testing.assert_array_equal(left[[0, 2]], right[[0, 2]])

    @each_robot
    def test_an_unstable_simulation_shows_as_nan(self, kind: type[MujocoFamily]) -> None:
        """MuJoCo sets such a robot back to its start, which must not pass for a leap."""
        envs: Any = kind().make_vector_env([ONE_OF_EACH[kind]], 2)
        envs.reset(seed=0)
        zeros = np.zeros((2, kind.robot.actuators), np.float32)
        for _ in range(2):
            assert np.isfinite(envs.step(zeros)[1]).all()
        envs._state[0, -1] = 1e11
        _, rewards, *_ = envs.step(zeros)
        assert np.isnan(rewards).tolist() == [True, False]
        envs.reset(seed=0)
        assert np.isfinite(envs.step(zeros)[1]).all()

    def test_an_ant_off_its_height_ends_its_episode(self) -> None:
        family = AntDir()
        envs: Any = family.make_vector_env([{"angle": 0.0}], 2)
        envs.reset(seed=0)
        envs._state[:, 3] = 0.75, 1.5
        _, rewards, terminated, truncated, infos = envs.step(np.zeros((2, 8), np.float32))
        assert terminated.tolist() == [False, True]
        assert not truncated.any()
        assert infos["final_obs"][1][0] > 1.0
        assert np.isfinite(rewards).all()
        for height, healthy in ((0.19, False), (0.2, True), (1.0, True), (1.01, False), (np.nan, False)):
            envs._state[:, 3] = height
            rewards, terminated = envs._judge(np.zeros((2, 2)), np.zeros(2))
            assert rewards.tolist() == [healthy] * 2
            assert terminated.tolist() == [not healthy] * 2

    def test_nothing_is_written_where_the_user_works(self, tmp_path: Path) -> None:
        code = (
            "from ssm_metarl.tasks.mujoco import HalfCheetahDir\n"
            "HalfCheetahDir().make_vector_env([{'direction': 1}], 1).reset(seed=0)"
        )
        run = subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True, text=True)
        assert run.stdout + run.stderr == ""
        assert list(tmp_path.iterdir()) == []


class TestFamilies:
    __test__ = HAS_MUJOCO

    @each_family
    def test_tasks_are_json_and_depend_on_the_generator_only(self, kind: type[MujocoFamily]) -> None:
        family = kind()
        train = family.sample(40, np.random.default_rng(0))
        assert json.loads(json.dumps(train)) == train
        for split in ("train", "validation", "test"):
            assert family.sample(40, np.random.default_rng(0), split) == train
        assert family.sample(40, np.random.default_rng(1)) != train
        assert family.sample(0, np.random.default_rng(0)) == []
        with pytest.raises(ValueError, match=r"no split 'tset', did you mean 'test'"):
            family.sample(1, np.random.default_rng(0), "tset")

    def test_ranges(self) -> None:
        rng = np.random.default_rng(0)
        assert {task["direction"] for task in HalfCheetahDir().sample(100, rng)} == {-1, 1}
        for split, bounds in (("train", (0, 2)), ("shifted", (2, 2.5)), ("shifted-test", (2.5, 3))):
            velocities = [task["velocity"] for task in HalfCheetahVel().sample(5000, rng, split)]
            shares = (np.array(velocities) - bounds[0]) / (bounds[1] - bounds[0])
            np.testing.assert_allclose(np.quantile(shares, [0, 0.25, 0.5, 0.75, 1]), np.linspace(0, 1, 5), atol=0.03)
        angles = [task["angle"] for task in AntDir().sample(5000, rng)]
        np.testing.assert_allclose(np.quantile(angles, [0, 0.5, 1]) / math.pi, [0, 1, 2], atol=0.06)

    @each_family
    def test_travels_to_workers_with_its_options(self, kind: type[MujocoFamily]) -> None:
        copy = cloudpickle.loads(cloudpickle.dumps(kind(horizon=7, threads=2)))
        assert (copy.horizon, copy.threads) == (7, 2)
        envs = copy.make_vector_env([ONE_OF_EACH[kind]], 2)
        envs.reset(seed=0)
        flags = [envs.step(np.zeros((2, kind.robot.actuators), np.float32))[3].all() for _ in range(7)]
        assert flags == [False] * 6 + [True]

    def test_the_environment_variable_sets_the_threads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(THREADS_VARIABLE, raising=False)
        assert AntDir().threads == 1
        monkeypatch.setenv(THREADS_VARIABLE, "3")
        assert AntDir().threads == 3
        assert AntDir(threads=2).threads == 2
        for wrong, shown in (("0", "0"), ("-1", "'-1'"), ("two", "'two'"), ("1.5", "'1.5'")):
            monkeypatch.setenv(THREADS_VARIABLE, wrong)
            with pytest.raises(ValueError, match=f"{THREADS_VARIABLE} must be an integer of 1 or more, not {shown}"):
                AntDir()

    @pytest.mark.parametrize("wrong", [0, -3, 2.5, True, "many"])
    def test_impossible_options(self, wrong: Any) -> None:
        for option in ("horizon", "threads"):
            with pytest.raises(ValueError, match=f"{option} must be an integer of 1 or more, not "):
                HalfCheetahDir(**{option: wrong})

    @pytest.mark.parametrize(
        ("kind", "task"),
        [
            (HalfCheetahDir, {"direction": 0}),
            (HalfCheetahDir, {"velocity": 1}),
            (HalfCheetahVel, {"velocity": math.nan}),
            (HalfCheetahVel, {}),
            (AntDir, {"angle": -1.0}),
            (AntDir, {"angle": "north"}),
        ],
    )
    def test_impossible_tasks(self, kind: type[MujocoFamily], task: Task) -> None:
        with pytest.raises(ValueError, match="Task 0"):
            kind().make_vector_env([task], 1)

    @each_family
    def test_random_return(self, kind: type[MujocoFamily]) -> None:
        episodes = 40 if kind is AntDir else 120
        reference = kind.reference
        returns = random_returns(kind, episodes, seed=10_000)
        assert reference.oracle is None
        assert returns.mean() == pytest.approx(reference.random, abs=5 * reference.random_sd / episodes**0.5)
        assert 0.6 < returns.std() / reference.random_sd < 1.6


def random_returns(kind: type[MujocoFamily], episodes: int, seed: int) -> NDArray[np.float64]:
    """Returns [episodes] of one episode on each of as many training tasks, under an untrained policy's actions."""
    family = kind(threads=2)
    rng = np.random.default_rng(seed)
    envs: Any = family.make_vector_env(family.sample(episodes, rng), num_episodes=1)
    envs.reset(seed=rng.integers(2**63, size=episodes).tolist())
    returns, running = np.zeros(episodes), np.ones(episodes, dtype=bool)
    while running.any():
        _, rewards, terminated, truncated, _ = envs.step(actions_for(family, episodes, rng))
        returns += np.where(running, rewards, 0.0)
        running &= ~(terminated | truncated)
    envs.close()
    return returns


def _print_references(batches: int = 10) -> None:
    for kind in FAMILIES:
        size = 100 if kind is AntDir else 200
        returns = np.concatenate([random_returns(kind, size, seed) for seed in range(batches)])
        print(f"{kind.name}: random={returns.mean():.2f}, random_sd={returns.std():.2f} ({len(returns)} episodes)")


if __name__ == "__main__":
    _print_references()
