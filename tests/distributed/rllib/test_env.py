"""RLlib's environment: the tasks, as our own rollouts play them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from faulty_tasks import FaultyNavigation
from ssm_metarl.algorithms.inputs import policy_inputs
from ssm_metarl.algorithms.rollouts import Rollouts
from ssm_metarl.algorithms.spec import PolicySpec
from ssm_metarl.config import TrainConfig
from ssm_metarl.distributed.rllib.env import TaskEnv
from ssm_metarl.tasks import Task, TaskDistribution, make

Array = np.ndarray[Any, Any]


class Noting:
    """A family that remembers the tasks that it was asked for."""

    def __init__(self, family: TaskDistribution) -> None:
        self.family, self.tasks = family, list[Task]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.family, name)

    def sample(self, n: int, rng: np.random.Generator, split: str = "train") -> list[Task]:
        assert split == "train"
        self.tasks += self.family.sample(n, rng, split)
        return self.tasks[-n:]


def task_env(family: Any, num_episodes: int = 3, inputs: str = "full") -> TaskEnv:
    spec = TrainConfig().replace(inputs=inputs).policy_spec(family)  # type: ignore[arg-type]
    return TaskEnv({"distribution": family, "spec": spec, "num_envs": num_episodes})


def wander(env: TaskEnv, steps: int, seed: int) -> list[tuple[Array, ...]]:
    """Inputs, actions, rewards, terminated and truncated of each step, with actions that do not fit in the space."""
    rng = np.random.default_rng(0)
    record, inputs = [], env.reset(seed=seed)[0]
    for _ in range(steps):
        if hasattr(env.single_action_space, "n"):
            actions = rng.integers(env.single_action_space.n, size=env.num_envs)
        elif hasattr(env.single_action_space, "nvec"):
            actions = rng.integers(env.single_action_space.nvec, size=(env.num_envs, *env.single_action_space.shape))
        else:
            actions = rng.normal(size=(env.num_envs, *env.single_action_space.shape)).astype(np.float32)
        after, rewards, terminated, truncated, _ = env.step(actions)
        record.append((inputs, actions, rewards, terminated, truncated))
        inputs = after
    return record


@pytest.mark.parametrize("task", ["cartpole", "navigation-2d", "bandit", "habits:ActMDStart"])
def test_the_policy_reads_what_it_reads_in_our_own_rollouts(task: str) -> None:
    family = make(task)
    env = task_env(family)
    spec: PolicySpec = env._spec
    played = 0
    for slot in range(env.num_envs):
        steps = [[part[slot] for part in step] for step in wander(env, 230, seed=5)]
        ends = [i for i, step in enumerate(steps) if step[3] or step[4]]
        begin = 0
        for end in ends:
            inputs, actions, rewards, *_ = (np.stack(part)[None, :, None] for part in zip(*steps[begin : end + 1]))
            starts = np.zeros(rewards.shape, bool)
            starts[:, 0] = True
            zero = np.zeros(rewards.shape, np.float32)
            observations = inputs[..., : spec.observation_size]
            record = Rollouts(
                observations, actions, rewards, zero, starts, starts, zero > 0, zero < 1, observations[:, -1], ({},)
            )
            np.testing.assert_array_equal(inputs, policy_inputs(spec, record))
            begin = end + 2  # the step after an episode's last one is the reset
            played += 1
    assert played >= 6


def test_equal_seeds_give_equal_experience_and_every_slot_and_worker_has_its_own() -> None:
    seen: dict[int, list[Task]] = {}
    for seed in (7, 8, 9):  # RLlib gives a worker its seed plus the worker's index
        family = Noting(make("cartpole"))
        first = wander(task_env(family, 4), 60, seed)
        seen[seed] = family.tasks
        again = wander(task_env(make("cartpole"), 4), 60, seed)
        for one, other in zip(first, again, strict=True):
            for part, same in zip(one, other, strict=True):
                np.testing.assert_array_equal(part, same)
    everything = [str(task) for tasks in seen.values() for task in tasks]
    assert len(set(everything)) == len(everything) > 3 * 4 * 2


def test_a_new_task_begins_whatever_the_action_after_an_episodes_end() -> None:
    env = task_env(make("cartpole"), 2)
    for before, after in zip(record := wander(env, 200, 0), record[1:]):
        done = before[3] | before[4]
        assert not (after[2][done]).any(), "the reset has no reward"
        ready = after[0][~done]
        assert (ready.shape[1], env._spec.input_size) == (8, 8)


def test_a_reward_that_is_no_number_is_told_in_a_sentence() -> None:
    env = task_env(make("habits:RewText"), 2)
    env.reset(seed=0)
    infos = env.step(np.zeros((2, 1), np.float32))[-1]
    for error in infos["error"]:
        assert error.startswith("task {'goal': ")
        assert error.endswith("habits:RewText, step 1: the reward must be a number, not '1.5'.")


def test_an_episode_is_cut_at_the_horizon_where_the_environment_goes_on() -> None:
    env = task_env(FaultyNavigation(), 2)  # whose horizon is 20, and its environments' 100
    ends = [i for i, step in enumerate(wander(env, 63, 0)) if step[4].all()]
    assert ends == [19, 40, 61]


@pytest.mark.parametrize("fault", ["raise", "nan"])
def test_an_episode_that_the_environment_spoils_is_cut_at_its_last_good_step(fault: str) -> None:
    class Faulty(FaultyNavigation):
        def sample(self, n: int, rng: np.random.Generator, split: str = "train") -> list[Task]:
            return [{**task, "fault": fault} for task in super().sample(n, rng, split)]

    env = task_env(Faulty(), 2)
    env.reset(seed=0)
    still = np.zeros((2, 2), np.float32)
    for step in range(8):
        inputs, rewards, terminated, truncated, infos = env.step(still)
        assert np.isfinite(inputs).all()
        assert np.isfinite(rewards).all()
        assert not terminated.any()
        assert truncated.all() == (step == 5)
        if step == 5:
            assert infos["length"].tolist() == [5, 5]
            assert all(("fell over" if fault == "raise" else "not finite") in error for error in infos["error"])
