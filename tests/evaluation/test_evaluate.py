"""Returns over adaptation steps, of a policy and of a checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import (
    assert_same,
    drop,
    make_policy,
    make_spec,
    seeds,
    small_config,
    toy_rollouts,
    uneven,
)
from faulty_tasks import FaultyAfter
from ssm_metarl.algorithms.batch import make_batch
from ssm_metarl.algorithms.inner_loop import adapt_weights, for_tasks, inner_step
from ssm_metarl.algorithms.policy import SSMPolicy
from ssm_metarl.algorithms.registry import MetaConfig
from ssm_metarl.distributed.play import EnvironmentFailure
from ssm_metarl.distributed.train import train
from ssm_metarl.evaluation.evaluate import Evaluation, evaluate, evaluate_checkpoint
from ssm_metarl.tasks import Task
from ssm_metarl.tasks.navigation import Navigation2D

TASKS, NUM_EPISODES, HORIZON = 4, 5, 6


@pytest.mark.parametrize("discrete", [False, True])
def test_evaluation_is_the_returns_of_policies_adapted_one_step_after_another(discrete: bool) -> None:
    """With half the step size beyond the steps that were trained for."""
    spec, config = make_spec(discrete=discrete), MetaConfig(inner_lr=0.5)
    policy, tasks = make_policy(spec), uneven(TASKS, NUM_EPISODES, HORIZON)
    seen: list[Any] = []

    def collect(weights: Any, episodes: int, step: int) -> Any:
        seen.append((step, weights, toy_rollouts(spec, weights, tasks, NUM_EPISODES, HORIZON, step)))
        return seen[-1][2]

    result = evaluate(policy, config, collect, 2, NUM_EPISODES)
    assert [step for step, _, _ in seen] == [0, 1, 2]
    weights = policy.numpy_weights()
    for step, used, record in seen:
        assert_same(record, toy_rollouts(spec, weights, tasks, NUM_EPISODES, HORIZON, step))
        for name, value in weights.items():
            np.testing.assert_array_equal(used[name], value)
        np.testing.assert_allclose(result.returns[:, step], record.returns().mean(1))
        np.testing.assert_allclose(result.lengths[:, step], record.lengths().mean(1))
        sized = config if step < config.inner_steps else replace(config, inner_lr=0.25)
        weights = adapt_weights(policy, weights, make_batch(spec, record, config), sized)
    assert result.environment_steps == sum(record.num_steps for _, _, record in seen)
    assert result.seconds > 0


def test_episodes_of_a_trial_have_returns_of_their_own(tmp_path: Path) -> None:
    config = small_config("bandit", algorithm="rl2", task_options={"pulls": 5}, trial_episodes=3, iterations=1)
    train(config, tmp_path)
    result = evaluate_checkpoint(tmp_path, num_tasks=6, steps=0, episodes=4)
    assert result.by_episode.shape == (1, 3)
    assert result.by_episode.sum() == pytest.approx(result.returns.mean())


def test_shares_of_success_are_those_of_the_rollouts() -> None:
    spec, tasks = make_spec(), uneven(2, 2, 4)
    said = np.array([[[True], [False]], [[True], [True]]])

    def collect(weights: Any, episodes: int, step: int) -> Any:
        successes = said & (step == 1) if step < 2 else None  # of an environment that tells of successes alone
        return replace(toy_rollouts(spec, weights, tasks, 2, 4, step), successes=successes)

    result = evaluate(make_policy(spec), MetaConfig(), collect, 2, 2)
    assert result.summary()["success_by_episode"] == [[0.0], [0.75], [0.0]]


def test_the_policy_is_not_changed() -> None:
    spec = make_spec()
    policy = make_policy(spec)
    before = policy.numpy_weights()
    evaluate(policy, MetaConfig(), lambda w, _, step: toy_rollouts(spec, w, uneven(2, 2, 4), 2, 4, step), 1, 2)
    for name, value in policy.numpy_weights().items():
        np.testing.assert_array_equal(value, before[name])
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_adaptation_pays_on_a_task_that_can_be_learned() -> None:
    """From chance to nearly every reward, with intervals that say so."""
    spec, config = make_spec(discrete=True, inputs="observation"), MetaConfig(inner_lr=1.0, discount=0.0)
    tasks = [{"best": task % 2} for task in range(6)]
    result = evaluate(SSMPolicy(spec), config, lambda w, _, step: toy_rollouts(spec, w, tasks, 30, 6, step), 3, 30)
    summary = json.loads(json.dumps(result.summary(), allow_nan=False))
    for key in ("return", "ci_low", "ci_high", "episode_length"):
        assert len(summary[key]) == 4
    assert summary["return"][0] == pytest.approx(3.0, abs=0.5)
    assert summary["ci_low"][3] > summary["ci_high"][0]
    assert summary["return"][3] > 5.0
    assert summary["episode_length"] == [6.0] * 4
    assert summary["num_tasks"] == 6
    assert summary["environment_steps"] == 4 * 6 * 30 * 6


def test_lost_episodes_and_tasks_are_left_out() -> None:
    spec, tasks = make_spec(), uneven(3, 4, 5)
    whole: list[Any] = []

    def collect(weights: Any, episodes: int, step: int) -> Any:
        whole.append(toy_rollouts(spec, weights, tasks, 4, 5, step))
        return drop(drop(whole[-1], 0, 2), 1)

    result = evaluate(make_policy(spec), MetaConfig(), collect, 1, 4)
    kept = [0, 1, 3]
    for step, record in enumerate(whole):
        assert result.returns[0, step] == pytest.approx(record.returns()[0, kept].mean())
        assert result.lengths[0, step] == pytest.approx(record.lengths()[0, kept].mean())
    assert np.isnan(result.returns).tolist() == [[False] * 2, [True] * 2, [False] * 2]
    assert np.isfinite(result.summary()["return"]).all()


@settings(max_examples=6)
@given(seed=seeds, shared=st.booleans(), num_episodes=st.sampled_from([1, 400, 1100]))
def test_shards_do_not_show(seed: int, shared: bool, num_episodes: int) -> None:
    """Adapting all tasks in one call, or in parts that fit the cache, is the same."""
    spec, config = make_spec(hidden_dim=3), MetaConfig()
    policy = make_policy(spec, seed)
    weights = policy.numpy_weights()
    batch = make_batch(spec, toy_rollouts(spec, weights, [{}] * 3, num_episodes, 4, seed), config)
    parameters = for_tasks(dict(policy.named_parameters()), 3)
    whole, _ = inner_step(policy, parameters, batch, config, differentiable=False)
    current = weights if shared else {name: np.stack([value] * 3) for name, value in weights.items()}
    for name, value in adapt_weights(policy, current, batch, config).items():
        np.testing.assert_allclose(value, whole[name].numpy(), rtol=1e-4, atol=1e-6)
        assert value.dtype == np.float32


def test_one_task_has_no_interval_in_json() -> None:
    one = Evaluation(np.array([[1.0, 2.0]]), np.ones((1, 2)), np.array([[1.0, np.nan]] * 2), 10, 0.1)
    summary = json.loads(json.dumps(one.summary(), allow_nan=False))
    assert summary["return"] == [1.0, 2.0]
    assert summary["ci_low"] == summary["ci_high"] == [None, None]
    assert summary["return_by_episode"] == [[1.0, None]] * 2


class Recorded(Navigation2D):
    """Remembers the tasks that it drew, by split and in order."""

    drawn: ClassVar[list[tuple[str, str]]] = []

    def sample(self, n: int, rng: np.random.Generator, split: str = "train") -> list[Task]:
        tasks = super().sample(n, rng, split)
        Recorded.drawn += [(split, json.dumps(task)) for task in tasks]
        return tasks


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(small_config(iterations=2), tmp_path_factory.mktemp("trained") / "run").run_dir


def evaluated(run: Path, **changes: Any) -> Evaluation:
    return evaluate_checkpoint(run, **{"num_tasks": 5, "steps": 2, "episodes": 3, **changes})


def test_random_numbers_are_common_to_evaluations_of_the_same_seed(trained: Path, without_ray: None) -> None:
    report = evaluated(trained)
    assert report.returns.shape == report.lengths.shape == (5, 3)
    assert np.array_equal(evaluated(trained).returns, report.returns)
    for fewer in (0, 1):
        assert np.array_equal(evaluated(trained, steps=fewer).returns, report.returns[:, : fewer + 1])
    slower = evaluated(trained, inner_lr=0.003).returns
    assert np.array_equal(slower[:, 0], report.returns[:, 0]), "the same tasks, starts and actions"
    assert not np.array_equal(slower[:, 1], report.returns[:, 1])
    for other in ({"seed": 1}, {"split": "validation"}, {"deterministic": True}):
        assert not np.isin(evaluated(trained, **other).returns, report.returns).any(), other


def test_evaluation_does_not_depend_on_workers(trained: Path, ray_session: None) -> None:
    alone, shared = evaluated(trained), evaluated(trained, num_workers=2)
    assert np.array_equal(alone.returns, shared.returns)
    assert np.array_equal(alone.lengths, shared.lengths)
    assert alone.environment_steps == shared.environment_steps


def test_evaluation_does_not_depend_on_the_threads_that_torch_has(trained: Path, without_ray: None) -> None:
    before = torch.get_num_threads()
    try:
        reports = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            reports.append(evaluated(trained, num_tasks=20, episodes=20, steps=1))
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(reports[0].returns, reports[1].returns)


def test_no_split_shares_a_task_with_another_or_with_training(
    tmp_path: Path, without_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Recorded, "drawn", [])  # the class's: the trainer has a copy of the family
    family = Recorded()
    run = train(small_config(iterations=2), tmp_path, distribution=family).run_dir
    for split in ("train", "validation", "test"):
        evaluated(run, split=split, steps=0, distribution=family)
    drawn = Recorded.drawn
    assert [split for split, _ in drawn] == ["train"] * 13 + ["validation"] * 5 + ["test"] * 5
    assert len({task for _, task in drawn}) == len(drawn)


def test_the_report_says_what_was_evaluated(trained: Path, without_ray: None) -> None:
    report = evaluated(trained, split="shifted-test")
    summary = report.summary()
    assert (summary["task"], summary["split"], summary["num_tasks"]) == ("navigation-2d", "shifted-test", 5)
    assert summary["return"] == pytest.approx(report.returns.mean(0).tolist())
    assert summary["environment_steps"] == pytest.approx(3 * report.lengths.sum())
    for low, mean, high in zip(summary["ci_low"], summary["return"], summary["ci_high"], strict=True):
        assert low < mean < high
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_a_runs_best_checkpoint_is_evaluated_unless_one_is_named(tmp_path: Path, without_ray: None) -> None:
    run = train(small_config(iterations=4, checkpoint_every=1, outer_lr=0.05), tmp_path).run_dir
    best = json.loads((run / "best.json").read_text())["checkpoint"]
    reports = {
        name: evaluated(run / name, steps=0).returns for name in (path.name for path in run.glob("checkpoint_*"))
    }
    assert np.array_equal(evaluated(run, steps=0).returns, reports.pop(best))
    assert all(not np.array_equal(evaluated(run, steps=0).returns, returns) for returns in reports.values())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"task": "cartpole"},
            r"cannot play 'cartpole': its observations are of the size 2, not of the shape \(4,\)\.$",
        ),
        (
            {"task": "faulty_tasks:Doubled"},
            r"its actions are bounded by \[-0.1, -0.1\] and \[0.1, 0.1\], not as in Box\(",
        ),
        ({"task": "navigation"}, r"no task family 'navigation', did you mean 'navigation-2d'"),
        ({"split": "tset"}, r"no split 'tset', did you mean 'test'"),
        ({"num_tasks": 0}, r"^num_tasks must be an integer of 1 or more, not 0\.$"),
        ({"steps": -1}, r"^steps must be an integer of 0 or more, not -1\.$"),
        ({"episodes": 0}, r"^episodes must be an integer of 1 or more, not 0\.$"),
        ({"seed": -1}, r"^seed must be an integer of 0 or more, not -1\.$"),
        ({"num_workers": -1}, r"^num_workers must be an integer of 0 or more, not -1\.$"),
        ({"inner_lr": float("nan")}, r"^inner_lr must be a number above 0, not nan\.$"),
    ],
)
def test_impossible_evaluations_are_refused_before_ray_is_started(
    trained: Path, without_ray: None, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        evaluated(trained, **{"num_workers": 2, **changes})


def test_more_workers_than_ray_has_cpus_are_refused(trained: Path, ray_session: None) -> None:
    with pytest.raises(ValueError, match="need 5 CPUs, but this Ray cluster has 4"):
        evaluated(trained, num_workers=4)


def test_a_faulty_environment_fails_the_evaluation(trained: Path, without_ray: None) -> None:
    with pytest.raises(EnvironmentFailure, match="OSError: the simulator of goal"):
        evaluated(trained, distribution=FaultyAfter(after=0))
