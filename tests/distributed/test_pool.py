"""The pool: the same experience however many workers there are, and whatever happens to them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders import wait_until
from faulty_tasks import Buggy, FaultyNavigation, Unstartable
from ssm_metarl.algorithms.policy import SSMPolicy
from ssm_metarl.algorithms.rollouts import Rollouts
from ssm_metarl.algorithms.spec import PolicySpec
from ssm_metarl.distributed.play import EnvironmentFailure
from ssm_metarl.distributed.pool import Pool
from ssm_metarl.seeds import seed_for
from ssm_metarl.tasks import Task, TaskDistribution, make

NUM_EPISODES = 3
NAVIGATION = PolicySpec(observation_size=2, action_size=2, discrete=False, hidden_dim=16, state_dim=8)
CARTPOLE = PolicySpec(observation_size=4, action_size=2, discrete=True, hidden_dim=16, state_dim=8)
FAULTY = FaultyNavigation()

Weights = dict[str, Any]


def shared_weights(spec: PolicySpec) -> Weights:
    return SSMPolicy(spec, seed=1).numpy_weights()


def per_task_weights(spec: PolicySpec, tasks: int) -> Weights:
    each = [SSMPolicy(spec, seed=seed).numpy_weights() for seed in range(tasks)]
    return {name: np.stack([weights[name] for weights in each]) for name in each[0]}


def seeds_for(tasks: Sequence[Task], iteration: int = 0) -> list[np.random.SeedSequence]:
    return [seed_for(7, iteration, number) for number in range(len(tasks))]


def draw(distribution: TaskDistribution, n: int) -> list[Task]:
    return distribution.sample(n, np.random.default_rng(5))


def collect(pool: Pool, weights: Weights, tasks: Sequence[Task], **options: Any) -> Rollouts:
    return pool.collect(weights, tasks, seeds_for(tasks), NUM_EPISODES, **options)


def in_process(distribution: TaskDistribution, spec: PolicySpec, weights: Weights, tasks: Sequence[Task]) -> Rollouts:
    return collect(Pool(distribution, spec, num_workers=0), weights, tasks)


def assert_equal(one: Rollouts, other: Rollouts, tasks: Sequence[int] | None = None) -> None:
    """Equal to the bit, also in what decides the last bits of a sum; on some tasks only if so asked."""
    index = list(range(one.num_tasks)) if tasks is None else list(tasks)
    for field in fields(Rollouts):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype
            assert all(array.flags.c_contiguous and array.flags.writeable for array in (a, b)), field.name
            assert a[index].tobytes() == b[index].tobytes(), field.name
        elif tasks is None:
            assert a == b, field.name


# --- In process -------------------------------------------------------------------------------------------


def test_a_task_whose_environment_raises_is_dropped_alone() -> None:
    tasks = draw(FAULTY, 4)
    expected = in_process(FAULTY, NAVIGATION, shared_weights(NAVIGATION), tasks)
    tasks[2] |= {"fault": "raise"}
    rollouts = in_process(FAULTY, NAVIGATION, shared_weights(NAVIGATION), tasks)
    assert rollouts.kept().tolist() == [[number != 2] * NUM_EPISODES for number in range(4)]
    assert_equal(rollouts, expected, [0, 1, 3])
    assert f"OSError: the simulator of goal {tasks[2]['goal']} fell over" in rollouts.errors[0]
    assert "faulty_tasks.py" in rollouts.errors[0], "the environment's own traceback"


def test_an_episode_with_a_number_that_is_not_finite_is_dropped_alone() -> None:
    tasks = draw(FAULTY, 3)
    expected = in_process(FAULTY, NAVIGATION, shared_weights(NAVIGATION), tasks)
    tasks[1] |= {"fault": "nan"}
    rollouts = in_process(FAULTY, NAVIGATION, shared_weights(NAVIGATION), tasks)
    kept = np.ones((3, NUM_EPISODES), bool)
    kept[1, 0] = False
    assert (rollouts.kept() == kept).all()
    assert_equal(rollouts, expected, [0, 2])
    assert (rollouts.rewards[1, :, 1:] == expected.rewards[1, :, 1:]).all()
    assert len(rollouts.errors) == 1
    assert str(tasks[1]["goal"]) in rollouts.errors[0]


def test_in_process_needs_no_workers() -> None:
    with Pool(FAULTY, NAVIGATION, num_workers=0) as pool:
        collect(pool, shared_weights(NAVIGATION), draw(FAULTY, 2))
        assert pool.processes() == []
        assert (pool.restarts, pool.dropped, pool.timed_out, pool.ray_seconds) == (0, [], 0, 0.0)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_workers": -1}, "num_workers must be"),
        ({"num_workers": 0, "sample_timeout_s": 0.0}, "sample_timeout_s must be"),
        ({"num_workers": 0, "sample_timeout_s": float("nan")}, "sample_timeout_s must be"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Pool(FAULTY, NAVIGATION, **options)


def test_no_task_or_another_number_of_seeds_is_refused() -> None:
    pool = Pool(FAULTY, NAVIGATION, num_workers=0)
    for tasks, seeds in ([], []), (draw(FAULTY, 2), seeds_for(draw(FAULTY, 3))):
        with pytest.raises(ValueError, match="as many seeds"):
            pool.collect(shared_weights(NAVIGATION), tasks, seeds, NUM_EPISODES)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_environment_that_exits_is_one_that_raises(ray_session: None, num_workers: int) -> None:
    tasks, weights = draw(FAULTY, 3), shared_weights(NAVIGATION)
    expected = in_process(FAULTY, NAVIGATION, weights, tasks)
    tasks[1] |= {"fault": "exit"}
    with Pool(FAULTY, NAVIGATION, num_workers=num_workers, name="exits") as pool:
        rollouts = collect(pool, weights, tasks)
    assert_equal(rollouts, expected, [0, 2])
    assert not rollouts.kept()[1].any()
    assert re.search(r"the environment exits with 3 in \w+, line \d+ of .*faulty_tasks\.py, which", rollouts.errors[0])
    assert pool.restarts == 0


# --- Workers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("family", "spec"), [("navigation-2d", NAVIGATION), ("cartpole", CARTPOLE)])
def test_experience_does_not_depend_on_the_number_of_workers(
    ray_session: None, family: str, spec: PolicySpec, num_workers: int
) -> None:
    distribution = make(family)
    tasks = draw(distribution, 5)  # neither 2 nor 4 divides 5
    with Pool(distribution, spec, num_workers=num_workers) as pool:
        for weights in (shared_weights(spec), per_task_weights(spec, len(tasks))):
            assert_equal(collect(pool, weights, tasks), in_process(distribution, spec, weights, tasks))
        few = tasks[:1]
        assert_equal(collect(pool, weights := shared_weights(spec), few), in_process(distribution, spec, weights, few))
        assert pool.restarts == 0
        assert pool.ray_seconds > 0


def test_a_worker_has_one_blas_thread_whatever_the_users_environment_says() -> None:
    code = """
import numpy
from threadpoolctl import threadpool_info
from builders import make_spec
from ssm_metarl.distributed.worker import RolloutWorker
from ssm_metarl.tasks import make
before = [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]
RolloutWorker(make("navigation-2d"), make_spec(observation_size=2))
print(max(before), max(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"))
"""
    asked = {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **asked}, capture_output=True, text=True)
    assert done.stdout.split() == ["2", "1"], done.stderr


def test_workers_are_named_and_gone_after_close(ray_session: None) -> None:
    import ray

    def named() -> bool:
        try:
            return ray.get_actor("run/trial/closing/rollout-worker-0") is not None
        except ValueError:
            return False

    for _ in range(2):  # the name is free again
        with Pool(FAULTY, NAVIGATION, num_workers=1, name="run/trial/closing") as pool:
            (process,) = pool.processes()
            assert named()
        wait_until(lambda: not named())  # Ray's head takes note of a killed actor a moment later
        wait_until(lambda process=process: not Path(f"/proc/{process}").exists())
        pool.close()
        with pytest.raises(RuntimeError, match="closed"):
            collect(pool, shared_weights(NAVIGATION), draw(FAULTY, 1))


def test_a_pool_of_another_size_brings_the_same_experience(ray_session: None) -> None:
    weights, tasks = shared_weights(NAVIGATION), draw(FAULTY, 4)
    expected = in_process(FAULTY, NAVIGATION, weights, tasks)
    with Pool(FAULTY, NAVIGATION, num_workers=1, name="run/trial/resized") as pool:
        (first,) = pool.processes()
        for count in (3, 1):
            pool.resize(count)
            assert pool.num_workers == len(set(pool.processes())) == count
            assert first in pool.processes(), "what runs stays"
            assert_equal(collect(pool, weights, tasks), expected)
        with pytest.raises(ValueError, match="A pool of 1 workers cannot have 0"):
            pool.resize(0)
    with Pool(FAULTY, NAVIGATION, num_workers=0) as pool, pytest.raises(ValueError, match="A pool of 0 workers"):
        pool.resize(1)


def test_workers_make_room_for_learners(
    ray_session: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for a placement group, where a processor is free, where a GPU is missing, and the last one."""
    with Pool(FAULTY, NAVIGATION, num_workers=2, name="run/trial/room") as pool:
        pool.processes()
        for free, ends, gpus, workers in (
            (1.0, True, 0.0, 2),
            (0.0, False, 0.0, 2),
            (0.0, True, 1.0, 2),
            (0.0, True, 0.0, 1),
            (0.0, True, 0.0, 1),
        ):
            monkeypatch.setattr("ray.available_resources", lambda free=free: {"CPU": free, "GPU": 0.5})
            pool.make_room(1, ends, gpus)
            assert pool.num_workers == workers
        assert [message.partition("yet: ")[2] for message in caplog.messages] == [
            "training goes on when there is one.",
            "training goes on when there is one.",
            "training goes on when there is one.",
            "1 worker from now on, instead of 2.",
            "training goes on when there is one.",
        ]
        assert len(collect(pool, shared_weights(NAVIGATION), draw(FAULTY, 2)).tasks) == 2


def test_workers_stay_inside_their_owners_placement_group(ray_session: None) -> None:
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    class Owner:
        def groups(self) -> tuple[Any, Any]:
            with Pool(FAULTY, NAVIGATION, num_workers=1, name="grouped") as pool:
                pool.processes()
                worker = ray.get_actor("grouped/rollout-worker-0")
                return _placement_group(), ray.get(worker.__ray_call__.remote(_placement_group))

    def _placement_group(actor: Any = None) -> Any:
        group = ray.util.get_current_placement_group()
        return group and group.id

    group = placement_group([{"CPU": 1}] * 2)
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)
    owner = ray.remote(Owner).options(num_cpus=1, scheduling_strategy=strategy).remote()
    owners, workers = ray.get(owner.groups.remote())
    assert owners == workers == group.id
    ray.kill(owner)
    remove_placement_group(group)


# --- Two workers and tasks that go wrong ------------------------------------------------------------------


@pytest.fixture(scope="module")
def pool(ray_session: None) -> Iterator[Pool]:
    """Holds two of Ray's four CPUs: hence the tests that need more stand before this line."""
    with Pool(FAULTY, NAVIGATION, num_workers=2, name="run/trial/0") as pool:
        yield pool


def test_deterministic_actions_reach_the_workers(pool: Pool) -> None:
    tasks, weights = draw(FAULTY, 3), shared_weights(NAVIGATION)
    alone = Pool(FAULTY, NAVIGATION, num_workers=0)
    rollouts = collect(pool, weights, tasks, deterministic=True)
    assert_equal(rollouts, collect(alone, weights, tasks, deterministic=True))
    assert not np.array_equal(rollouts.actions, collect(alone, weights, tasks).actions)


def test_large_shared_weights_are_put_once_and_again_when_they_change(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    puts = []

    def put(value: Any, ray_put: Any = ray.put) -> Any:
        puts.append(value)
        return ray_put(value)

    monkeypatch.setattr(ray, "put", put)
    monkeypatch.setattr("ssm_metarl.distributed.pool.INLINE_BYTES", 0)
    first, second = (SSMPolicy(NAVIGATION, seed=seed).numpy_weights() for seed in (1, 2))
    tasks = draw(FAULTY, 2)
    for weights, expected_puts in (first, 1), (first, 1), (second, 2), (first, 3):
        assert_equal(collect(pool, weights, tasks), in_process(FAULTY, NAVIGATION, weights, tasks))
        assert len(puts) == expected_puts


def test_errors_of_environments_come_back_from_workers(pool: Pool) -> None:
    tasks, weights = draw(FAULTY, 4), shared_weights(NAVIGATION)
    tasks[0] |= {"fault": "raise"}
    tasks[3] |= {"fault": "nan"}
    rollouts = collect(pool, weights, tasks)
    expected = in_process(FAULTY, NAVIGATION, weights, tasks)
    assert_equal(rollouts, expected, range(4))
    assert [error.splitlines()[-1] for error in rollouts.errors] == [
        error.splitlines()[-1] for error in expected.errors
    ]


def test_a_worker_killed_in_the_middle_changes_nothing(pool: Pool, tmp_path: Path) -> None:
    tasks, weights = draw(FAULTY, 6), per_task_weights(NAVIGATION, 6)
    expected = in_process(FAULTY, NAVIGATION, weights, tasks)
    tasks[4] |= {"pause": 0.05, "announce": str(tmp_path / "process")}
    before = pool.restarts
    killer = threading.Thread(target=_signal_announced, args=(tmp_path / "process", signal.SIGKILL))
    killer.start()
    rollouts = collect(pool, weights, tasks)
    killer.join()
    assert_equal(rollouts, expected, range(6))
    assert rollouts.errors == ()
    assert pool.restarts == before + 1
    assert pool.dropped == []


@pytest.mark.parametrize("for_good", [False, True])
def test_a_worker_killed_between_calls_is_no_trouble(pool: Pool, for_good: bool) -> None:
    import ray

    tasks, weights = draw(FAULTY, 4), shared_weights(NAVIGATION)
    before, processes = pool.restarts, pool.processes()
    if for_good:  # Ray will not restart this one
        ray.kill(ray.get_actor("run/trial/0/rollout-worker-1"))
    else:
        os.kill(processes[1], signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{processes[1]}").exists())
    assert_equal(collect(pool, weights, tasks), in_process(FAULTY, NAVIGATION, weights, tasks))
    assert pool.restarts == before + 1
    after = pool.processes()
    assert after[0] == processes[0]
    assert after[1] != processes[1]


@pytest.mark.slow
def test_a_task_that_kills_every_worker_is_dropped_after_three_and_named(pool: Pool) -> None:
    tasks, weights = draw(FAULTY, 6), shared_weights(NAVIGATION)
    expected = in_process(FAULTY, NAVIGATION, weights, tasks)
    tasks[1] |= {"fault": "kill"}
    before = pool.restarts
    rollouts = collect(pool, weights, tasks)
    assert_equal(rollouts, expected, [0, 2, 3, 4, 5])
    assert not rollouts.kept()[1].any()
    assert rollouts.tasks == tuple(tasks)
    assert len(rollouts.errors) == 1
    assert str(tasks[1]["goal"]) in rollouts.errors[0]
    assert pool.dropped == [tasks[1]]
    assert pool.restarts == before + 4  # one with others beside it, three alone


def test_who_has_lost_all_tasks_says_so_and_goes_on_with_others(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssm_metarl.distributed.suspicion.FEWEST", 1)
    monkeypatch.setattr("ssm_metarl.distributed.suspicion.ERROR", 1.0)
    tasks, weights = draw(FAULTY, 3), shared_weights(NAVIGATION)
    with pytest.raises(EnvironmentFailure, match=r"Every task was lost. Task 0, .*'kill'.* was dropped"):
        collect(pool, weights, [tasks[0] | {"fault": "kill"}])
    assert len(set(pool.processes())) == 2
    assert_equal(collect(pool, weights, tasks), in_process(FAULTY, NAVIGATION, weights, tasks))


@pytest.mark.slow
def test_a_task_that_takes_too_long_alone_is_missing(ray_session: None) -> None:
    tasks, weights = draw(FAULTY, 4), shared_weights(NAVIGATION)
    expected = in_process(FAULTY, NAVIGATION, weights, tasks)
    hanging = [*tasks[:3], tasks[3] | {"fault": "hang"}]
    with Pool(FAULTY, NAVIGATION, num_workers=2, name="late", sample_timeout_s=3.0) as pool:
        rollouts = collect(pool, weights, hanging)
        assert_equal(rollouts, expected, [0, 1])
        assert_equal(rollouts, expected, [2])
        assert not rollouts.kept()[3:].any()
        assert pool.timed_out == 1
        assert pool.restarts == 2  # with another beside it, and alone
        assert pool.dropped == []
        assert len(rollouts.errors) == 1
        assert "sample_timeout_s = 3" in rollouts.errors[0]
        assert str(tasks[3]["goal"]) in rollouts.errors[0]
        assert_equal(collect(pool, weights, tasks), expected)
        assert pool.timed_out == 1


def test_a_worker_that_stands_still_is_told_and_replaced_and_nothing_is_missing(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """SIGSTOP in the middle of a call; the others' silence is known from the call before."""
    tasks, weights = draw(FAULTY, 6), per_task_weights(NAVIGATION, 6)
    expected = in_process(FAULTY, NAVIGATION, weights, tasks)
    collect(pool, weights, tasks)
    monkeypatch.setattr("ssm_metarl.distributed.watch.LEAST_SILENCE", 4.0)
    monkeypatch.setattr("ssm_metarl.distributed.watch.SILENCES", 0.0)
    tasks[4] |= {"pause": 0.05, "announce": str(tmp_path / "process")}
    before, dropped = pool.restarts, len(pool.dropped)
    stopper = threading.Thread(target=_signal_announced, args=(tmp_path / "process", signal.SIGSTOP))
    stopper.start()
    rollouts = collect(pool, weights, tasks)
    stopper.join()
    assert_equal(rollouts, expected, range(6))
    assert rollouts.errors == ()
    assert (len(pool.dropped), pool.timed_out) == (dropped, 0)
    assert pool.restarts == before + 1
    told, replaced = caplog.messages[:2]
    process = (tmp_path / "process").read_text()
    assert told.startswith("run/trial/0/rollout-worker-")
    assert f"(process {process}) has given no sign of life since " in told
    assert "it is replaced after 4 s" in told
    assert replaced.endswith("is replaced.")


@pytest.mark.slow
def test_a_slow_worker_gives_signs_of_life(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tasks, weights = draw(FAULTY, 2), shared_weights(NAVIGATION)
    expected = in_process(FAULTY, NAVIGATION, weights, tasks)
    collect(pool, weights, tasks)
    monkeypatch.setattr("ssm_metarl.distributed.watch.LEAST_SILENCE", 4.0)
    monkeypatch.setattr("ssm_metarl.distributed.watch.WARNING", 0.9)
    before = pool.restarts
    tasks[1] |= {"pause": 0.3}  # 6 s
    assert_equal(collect(pool, weights, tasks), expected, range(2))
    assert pool.restarts == before
    assert caplog.messages == []


def test_an_interrupted_call_leaves_the_pool_usable(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    tasks, weights = draw(FAULTY, 4), shared_weights(NAVIGATION)
    with monkeypatch.context() as patch:
        patch.setattr(ray, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            collect(pool, per_task_weights(NAVIGATION, 4), tasks)
    assert_equal(collect(pool, weights, tasks), in_process(FAULTY, NAVIGATION, weights, tasks))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_mistake_outside_of_environments_is_raised_with_its_traceback(ray_session: None, num_workers: int) -> None:
    tasks = draw(FAULTY, 2)
    with (
        Pool(Buggy(), NAVIGATION, num_workers=num_workers, name="buggy") as pool,
        pytest.raises(ZeroDivisionError, match="horizon is undefined"),
    ):
        collect(pool, shared_weights(NAVIGATION), tasks)


def test_a_worker_that_cannot_start_says_why(ray_session: None) -> None:
    with (
        Pool(Unstartable(), NAVIGATION, num_workers=1, name="unstartable") as pool,
        pytest.raises(Exception, match="the robot's drivers are not installed"),
    ):
        collect(pool, shared_weights(NAVIGATION), draw(FAULTY, 2))


def _signal_announced(path: Path, number: int) -> None:
    """Send a signal to the process whose id appears in the file."""
    wait_until(path.exists)
    time.sleep(0.2)  # a few steps further
    os.kill(int(path.read_text()), number)
