"""Meta-World's benchmarks as task distributions: its own tasks and dynamics, each slot by itself.

What needs Meta-World stands in classes that are collected only where it is installed: no test skips itself.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from typing import Any

import cloudpickle
import numpy as np
import pytest
from numpy.typing import NDArray

from ssm_metarl.tasks import Task
from ssm_metarl.tasks import metaworld as family_module
from ssm_metarl.tasks.metaworld import ACTION_SPACE, ML1, ML10, SEED

HAS_METAWORLD = importlib.util.find_spec("metaworld") is not None

Floats = NDArray[np.float32]


@pytest.mark.parametrize(("make", "name"), [(ML10, "ml10"), (lambda: ML1("reach-v3"), "ml1:reach-v3")])
def test_without_metaworld_the_error_says_how_to_get_it(make: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "metaworld", None)
    with pytest.raises(ValueError, match=rf"{name} needs Meta-World: pip install 'ssm-metarl\[metaworld\]'"):
        make()


def test_the_module_imports_without_metaworld() -> None:
    code = "import sys; sys.modules['metaworld'] = sys.modules['mujoco'] = None; import ssm_metarl.tasks.metaworld"
    subprocess.run([sys.executable, "-c", code], check=True)


def actions_for(num_envs: int, rng: np.random.Generator) -> Floats:
    """An untrained policy's; some lie outside of the action space."""
    return rng.normal(0.0, 0.5, (num_envs, *ACTION_SPACE.shape)).astype(np.float32)


class TestML1:
    __test__ = HAS_METAWORLD

    def test_tasks_are_json_and_depend_on_the_generator_only(self) -> None:
        family = ML1("reach-v3")
        for split, theirs in (("train", "train"), ("validation", "train"), ("test", "test")):
            tasks = family.sample(400, np.random.default_rng(3), split)
            assert json.loads(json.dumps(tasks)) == tasks
            assert family.sample(400, np.random.default_rng(3), split) == tasks
            assert family.sample(400, np.random.default_rng(4), split) != tasks
            assert {(task["env"], task["split"]) for task in tasks} == {("reach-v3", theirs)}
            assert {task["index"] for task in tasks} == set(range(50))
        with pytest.raises(ValueError, match="no split 'shifted' "):
            family.sample(1, np.random.default_rng(0), "shifted")

    def test_an_episode_is_metaworlds(self) -> None:
        """The placement of that number, the same observations and rewards, and the goal hidden."""
        import metaworld  # pyright: ignore[reportMissingImports]  # an extra

        benchmark = metaworld.ML1("reach-v3", seed=SEED)
        rng = np.random.default_rng(0)
        for split, theirs in (("train", benchmark.train_tasks), ("test", benchmark.test_tasks)):
            reference: Any = benchmark.train_classes["reach-v3"]()
            reference.set_task(theirs[7])
            envs = ML1("reach-v3", horizon=15).make_vector_env([{"env": "reach-v3", "index": 7, "split": split}], 1)
            observations, _ = envs.reset(seed=0)
            for _ in range(2):  # also after the autoreset
                expected, _ = reference.reset()
                for step in range(1, 16):
                    np.testing.assert_array_equal(observations[0], expected.astype(np.float32))
                    np.testing.assert_array_equal(observations[0, -3:], 0.0)
                    action = actions_for(1, rng)
                    observations, rewards, terminated, truncated, infos = envs.step(action)
                    expected, reward, *_ = reference.step(action[0].clip(-1, 1))
                    assert rewards[0] == np.float32(reward)
                    assert not terminated.any()
                    assert truncated[0] == (step == 15)
                np.testing.assert_array_equal(infos["final_obs"][0], expected.astype(np.float32))
            envs.close()

    def test_slots_do_not_touch_each_other(self) -> None:
        """Together, apart, and in simulators that other tasks have used: the same bits."""
        family = ML1("push-v3", horizon=20)
        rng = np.random.default_rng(0)
        tasks = family.sample(3, rng)
        actions = rng.normal(0.0, 1.0, (45, 3, 2, 4)).astype(np.float32)

        def play(chosen: list[int]) -> Floats:
            envs = family.make_vector_env([tasks[m] for m in chosen], 2)
            seen = [envs.reset(seed=0)[0].reshape(len(chosen), 2, -1)]
            for step in actions[:, chosen].reshape(45, 2 * len(chosen), 4):
                observations, rewards, *_ = envs.step(step)
                seen.append(observations.copy().reshape(len(chosen), 2, -1))
                seen[-1][..., -1] = rewards.reshape(len(chosen), 2)  # in the place of the hidden goal
            envs.close()
            return np.stack(seen)

        together = play([0, 1, 2])
        for chosen in ([2], [1, 0], [0, 1, 2]):
            np.testing.assert_array_equal(play(chosen), together[:, chosen])

    def test_success_is_metaworlds(self) -> None:
        """A hand that goes to the goal, and one that stays."""
        horizon = 60
        family = ML1("reach-v3", horizon=horizon)
        envs = family.make_vector_env(family.sample(2, np.random.default_rng(0)), 1)
        envs.reset(seed=0)
        simulator, said, near = envs._envs[0], [], []
        goal = simulator._target_pos
        for step in range(1, horizon + 1):
            towards = np.zeros((2, 4), np.float32)
            towards[0, :3] = np.clip(10 * (goal - simulator.tcp_center), -1, 1)
            _, rewards, *_, infos = envs.step(towards)
            own = infos["final_info"] if step == horizon else infos
            assert own["_success"].all()
            said.append(own["success"].tolist())
            near.append(rewards[0] == pytest.approx(10.0))  # of a hand within .05 of the goal
        envs.close()
        assert [hand for hand, _ in said] == near
        assert any(near)
        assert not all(near)
        assert not any(other for _, other in said)

    def test_nan_actions_spoil_one_step_of_one_slot(self) -> None:
        family = ML1("reach-v3")
        envs = family.make_vector_env(family.sample(2, np.random.default_rng(0)), 1)
        envs.reset(seed=0)
        actions = np.zeros((2, 4), np.float32)
        actions[1, 2] = np.nan
        observations, rewards, *_ = envs.step(actions)
        assert np.isnan(rewards).tolist() == [False, True]
        assert np.isfinite(observations).all()
        assert np.isfinite(envs.step(np.zeros((2, 4), np.float32))[1]).all()
        envs.close()

    def test_placements_travel_to_workers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        family = ML1("reach-v3", horizon=7)
        sent = cloudpickle.dumps(family)
        monkeypatch.setattr(family_module, "draw_placements", None)
        copy = cloudpickle.loads(sent)
        assert (copy.name, copy.horizon) == ("ml1:reach-v3", 7)
        tasks = copy.sample(2, np.random.default_rng(0))
        envs = copy.make_vector_env(tasks, num_episodes=2)
        assert envs.reset(seed=0)[0].shape == (4, 39)
        envs.close()

    def test_reference_is_measured_once_and_always_the_same(self) -> None:
        first, second = ML1("reach-v3", horizon=20), ML1("reach-v3", horizon=20)
        assert first.reference == second.reference
        assert first.reference is first.reference
        assert 0 < first.reference.random < 20 * 10
        assert first.reference.oracle is None

    @pytest.mark.parametrize(
        ("task", "words"),
        [
            ({"env": "reach-v3", "index": 50, "split": "train"}, "'index' must be an integer from 0 to 49, not 50"),
            ({"env": "reach-v3", "index": True, "split": "train"}, "'index' must be an integer from 0 to 49, not True"),
            ({"env": "reach-v3", "index": 0, "split": "tst"}, "no split 'tst', did you mean 'test'"),
            ({"env": "reach-v2", "index": 0, "split": "test"}, "no environment 'reach-v2', did you mean 'reach-v3'"),
            ({"env": "reach-v3", "index": 0}, "must have the keys env, index, split, not env, index"),
        ],
    )
    def test_impossible_tasks_are_named(self, task: Task, words: str) -> None:
        family = ML1("reach-v3")
        good = {"env": "reach-v3", "index": 0, "split": "train"}
        with pytest.raises(ValueError, match=f"Task 1.*{words}"):
            family.make_vector_env([good, task], 1)

    def test_impossible_families(self) -> None:
        with pytest.raises(ValueError, match="no Meta-World environment 'reach-v2', did you mean 'reach-v3'"):
            ML1("reach-v2")
        for horizon in (0, 501, 2.5, True):
            with pytest.raises(ValueError, match="horizon must be an integer from 1 to 500"):
                ML1("reach-v3", horizon=horizon)  # type: ignore[arg-type]


class TestML10:
    __test__ = HAS_METAWORLD

    @pytest.mark.slow
    def test_test_environments_are_never_trained(self) -> None:
        family = ML10(horizon=3)
        rng = np.random.default_rng(0)
        tasks = {split: family.sample(200, rng, split) for split in family.splits}
        environments = {split: {task["env"] for task in tasks[split]} for split in family.splits}
        assert len(environments["train"]) == 10
        assert environments["validation"] == environments["train"]
        assert len(environments["test"]) == 5
        assert not environments["test"] & environments["train"]
        one_of_each = [next(t for t in tasks[s] if t["env"] == e) for s in ("train", "test") for e in environments[s]]
        envs = family.make_vector_env(one_of_each, num_episodes=1)
        observations, _ = envs.reset(seed=0)
        for _ in range(4):
            assert np.isfinite(observations).all()
            observations, rewards, *_ = envs.step(actions_for(15, rng))
            assert np.isfinite(rewards).all()
        envs.close()
