"""The learner: independent of threads, exact after loading, unharmed by what is not finite or not valid."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from builders import assert_equal_arrays, drop, make_spec, toy_rollouts, uneven
from ssm_metarl.algorithms.inner_loop import policy_outputs
from ssm_metarl.algorithms.registry import ALGORITHMS
from ssm_metarl.algorithms.rollouts import Rollouts
from ssm_metarl.config import TrainConfig
from ssm_metarl.distributed import learner as module
from ssm_metarl.distributed.learner import Learner, Stage

TASKS, NUM_EPISODES, HORIZON = 6, 5, 8

OURS = [name for name in ALGORITHMS if name != "policy-gradient"]  # which RLlib trains


def make_learner(seed: int = 0, discrete: bool = False, hidden_dim: int = 6, **options: Any) -> Learner:
    options = {"learner_threads": 1, "epochs": 3} | options
    config = TrainConfig().replace(**options)
    return Learner(make_spec(discrete=discrete, hidden_dim=hidden_dim), config.meta, config.machine, seed, HORIZON)


def rollouts(learner: Learner, weights: Any, seed: int, num_episodes: int = NUM_EPISODES) -> Rollouts:
    tasks = uneven(TASKS, num_episodes, HORIZON, seed)
    return toy_rollouts(learner.policy.spec, weights, tasks, num_episodes, HORIZON, seed)


def experience(learner: Learner, seed: int = 0, num_episodes: int = NUM_EPISODES) -> list[Stage]:
    """The batches of every stage of an iteration."""
    weights, stages = learner.weights(), []
    for stage in range(learner.config.inner_steps + 1):
        stages.append(learner.batch(weights, rollouts(learner, weights, 10 * seed + stage, num_episodes)))
        weights = learner.adapt(weights, stages[-1])
    return stages


def snapshot(learner: Learner) -> dict[str, Any]:
    return {**learner.weights(), **learner.optimizer_arrays()}


def assert_close(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-3, atol=1e-6, err_msg=name)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """One task a shard."""
    monkeypatch.setattr(module, "task_shards", lambda shape, _: [slice(i, i + 1) for i in range(shape[0])])


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("algorithm", OURS)
@pytest.mark.parametrize("discrete", [False, True])
def test_threads_change_nothing(algorithm: str, discrete: bool) -> None:
    """Parameters, moments and statistics are equal to the last bit, update after update."""
    results = []
    for threads in (1, 3):
        learner = make_learner(discrete=discrete, algorithm=algorithm, learner_threads=threads, step_weights=(1, 2))
        statistics = [learner.update(experience(learner, seed)) for seed in range(2)]
        assert all(isinstance(parameter, torch.nn.Parameter) for parameter in learner.policy.parameters())
        results.append((statistics, snapshot(learner)))
    for statistics, parameters in results[1:]:
        assert statistics == results[0][0]
        assert_equal_arrays(parameters, results[0][1])


@pytest.mark.slow
def test_threads_change_nothing_in_any_environment() -> None:
    """The suite sets OMP_NUM_THREADS; without it a new thread begins with as many threads as there are cores."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert len(set(done.stdout.split())) == 1, done.stdout


PROGRAM = """
import hashlib
from builders import make_spec, toy_rollouts, uneven
from ssm_metarl.distributed import learner as module
from ssm_metarl.config import TrainConfig

module.task_shards = lambda shape, _: [slice(i, i + 1) for i in range(shape[0])]
for threads in (1, 2, 3):
    config = TrainConfig().replace(learner_threads=threads, epochs=3, step_weights=(1, 2))
    learner = module.Learner(make_spec(hidden_dim=6), config.meta, config.machine, 0, 8)
    weights, stages = learner.weights(), []
    for stage in range(2):
        played = toy_rollouts(learner.policy.spec, weights, uneven(6, 5, 8, stage), 5, 8, stage)
        stages.append(learner.batch(weights, played))
        weights = learner.adapt(weights, stages[-1])
    learner.update(stages)
    print(hashlib.sha256(b"".join(array.tobytes() for array in learner.weights().values())).hexdigest())
"""


def test_shards_change_only_the_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make_learner()
    expected = whole.update(experience(whole))
    monkeypatch.setattr(module, "task_shards", lambda shape, _: [slice(0, 1), slice(1, 4), slice(4, TASKS)])
    parts = make_learner()
    statistics = parts.update(experience(parts))
    assert_close(snapshot(parts), snapshot(whole))
    for name in ("loss", "kl", "grad_norm", "learning_rate"):
        assert statistics[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize("algorithm", OURS)
def test_an_update_improves_the_objective(algorithm: str) -> None:
    learner = make_learner(algorithm=algorithm, outer_lr=3e-3)
    stages = experience(learner)
    losses = [learner.update(stages)["loss"] for _ in range(3)]
    assert losses[-1] < losses[0]


def test_statistics_say_what_happened() -> None:
    learner = make_learner(outer_lr=1e-2)
    statistics = learner.update(experience(learner))
    assert statistics["ratio_error"] < 1e-3
    assert statistics["kl"] > 0  # after two steps away from the policy that acted
    assert statistics["grad_norm"] > 0
    assert all(np.isfinite(value) and isinstance(value, float) for value in statistics.values())


def test_the_gradient_is_scaled_down_to_its_greatest_norm() -> None:
    """Seen in Adam's first moment after one step: (1 - β₁) times the gradient."""
    moments = []
    for limit in (1e-3, 1e9):
        learner = make_learner(max_grad_norm=limit, epochs=1)
        norm = learner.update(experience(learner))["grad_norm"]
        first = [value for name, value in learner.optimizer_arrays().items() if name.endswith("exp_avg")]
        moments.append(10 * np.sqrt(sum((value**2).sum() for value in first)))
    assert moments[0] == pytest.approx(1e-3, rel=1e-3)
    assert moments[1] == pytest.approx(norm, rel=1e-3)
    assert norm > 1e-3


@pytest.mark.parametrize(("schedule", "expected"), [("constant", 1.0), ("linear", 0.75), ("cosine", 0.853553)])
def test_the_learning_rate_follows_its_schedule(schedule: str, expected: float) -> None:
    learner = make_learner(lr_schedule=schedule, outer_lr=0.004, epochs=1)
    before = learner.weights()
    assert learner.update(experience(learner), progress=0.25)["learning_rate"] == pytest.approx(
        0.004 * expected, rel=1e-5
    )
    # Adam's first step is as long as the learning rate, where the gradient is not tiny.
    moved = max(np.abs(value - before[name]).max() for name, value in learner.weights().items())
    assert moved == pytest.approx(0.004 * expected, rel=1e-2)


def test_the_memory_can_learn_at_a_rate_of_its_own() -> None:
    """Adam's first step is as long as the learning rate for every parameter with a gradient."""
    learner = make_learner(epochs=1, outer_lr=1e-3, memory_lr=0.1, max_kl=0.0, max_grad_norm=1e6)
    before = learner.weights()
    assert learner.update(experience(learner))["learning_rate"] == 1e-3
    for name, value in learner.weights().items():
        if name.startswith(("encoder.", "blocks.", "policy.")):
            step = float(np.abs(value - before[name]).max())
            assert step == pytest.approx(1e-4 if name.startswith("blocks.") else 1e-3, rel=0.01)
    learner.load(learner.weights(), learner.optimizer_arrays())
    learner.check_rates(learner.config.inner_lr, 1e-3)
    learner.optimizer.param_groups[1]["lr"] = 1e-3
    with pytest.raises(RuntimeError, match=r"instead of \[0.001, 0.0001\]"):
        learner.check_rates(learner.config.inner_lr, 1e-3)


def moved(learner: Learner, stages: list[Stage]) -> float:
    """½ (log ratio)² of the policy from the one that acted, mean over the valid steps."""
    squares = []
    for batch in stages[-1].batches:
        output = policy_outputs(learner.policy, dict(learner.policy.named_parameters()), batch)
        change = batch.log_ratio(output.actions.log_prob(batch.actions)).detach().numpy()
        squares.append(0.5 * np.square(change)[batch.share.numpy() > 0])
    return float(np.concatenate(squares).mean())


@pytest.mark.parametrize("discrete", [False, True])
def test_an_update_keeps_the_policy_near_the_one_that_acted(discrete: bool) -> None:
    """A new optimiser's steps are as long as its rate: too long for a policy that is sure of itself."""
    ends = {}
    for limit in (0.0, 0.5):
        learner = make_learner(discrete=discrete, algorithm="rl2", inner_steps=0, outer_lr=1.0, epochs=6, max_kl=limit)
        stages = experience(learner)
        statistics = learner.update(stages)
        ends[limit] = moved(learner, stages)
        assert (statistics["shortened_steps"] > 0) == (limit > 0)
        assert statistics["learning_rate"] == 1.0
        assert learner.update(experience(learner))["learning_rate"] == 1.0
    assert ends[0.0] > 5
    assert ends[0.5] < 1  # the last step of an update is not measured, but as short as those before


@pytest.mark.parametrize("algorithm", OURS)
def test_steps_that_are_short_are_not_touched(algorithm: str) -> None:
    results = []
    for limit in (0.0, 0.5):
        learner = make_learner(algorithm=algorithm, max_kl=limit)
        statistics = learner.update(experience(learner))
        assert statistics["shortened_steps"] == 0
        results.append(snapshot(learner))
    assert_equal_arrays(results[0], results[1])


def test_plain_policy_gradients_take_one_pass() -> None:
    for algorithm, passes in (("promp", 3), ("maml", 1), ("fomaml", 1)):
        learner = make_learner(algorithm=algorithm)
        learner.update(experience(learner))
        assert learner.optimizer_arrays()["encoder.weight.step"] == passes


# --- Checkpoints ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("updates", [0, 2])
def test_a_loaded_learner_continues_to_the_last_bit(updates: int) -> None:
    first = make_learner(seed=1)
    for seed in range(updates):
        first.update(experience(first, seed))
    second = make_learner(seed=2)
    second.update(experience(second, 9))
    second.load(first.weights(), first.optimizer_arrays())
    assert_equal_arrays(snapshot(second), snapshot(first))
    for seed in range(5, 7):
        assert first.update(experience(first, seed)) == second.update(experience(second, seed))
    assert_equal_arrays(snapshot(second), snapshot(first))


def test_what_is_loaded_and_saved_are_copies() -> None:
    first, second = make_learner(seed=1), make_learner(seed=2)
    first.update(experience(first))
    saved = snapshot(first)
    weights, moments = first.weights(), first.optimizer_arrays()
    second.load(weights, moments)
    second.update(experience(second, 1))
    assert_equal_arrays({**weights, **moments}, saved)
    assert_equal_arrays(snapshot(first), saved)


def test_the_configs_learning_rate_wins() -> None:
    first = make_learner(outer_lr=1e-2)
    first.update(experience(first))
    second = make_learner(outer_lr=1e-6)
    second.load(first.weights(), first.optimizer_arrays())
    statistics = second.update(experience(second, 1))
    assert statistics["learning_rate"] == 1e-6
    moved = max(np.abs(value - first.weights()[name]).max() for name, value in second.weights().items())
    assert 0 < moved < 1e-4


def wider(name: str) -> Any:
    def change(weights: dict[str, Any], moments: dict[str, Any]) -> None:
        arrays = weights if name in weights else moments
        arrays[name] = np.concatenate([arrays[name], arrays[name]])

    return change


def other_sizes(weights: dict[str, Any], moments: dict[str, Any]) -> None:
    other = make_learner(hidden_dim=8)
    other.update(experience(other))
    weights.update(other.weights())
    moments.update(other.optimizer_arrays())


def unknown(kind: int, name: str) -> Any:
    return lambda *arrays: arrays[kind].update({name: np.zeros(3, np.float32)})


def missing(kind: int, name: str) -> Any:
    return lambda *arrays: arrays[kind].pop(name)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (other_sizes, "encoder.weight"),
        (wider("blocks.0.nu"), "blocks.0.nu"),
        (unknown(0, "blocks.1.nu"), "blocks.1.nu"),
        (missing(0, "value.bias"), "value.bias"),
        (wider("encoder.bias.exp_avg"), "encoder.bias.exp_avg"),
        (unknown(1, "blocks.1.nu.exp_avg"), "blocks.1.nu.exp_avg"),
        (unknown(1, "encoder.bias.momentum"), "encoder.bias.momentum"),
        (missing(1, "encoder.bias.exp_avg_sq"), "encoder.bias"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_changed(change: Any, named: str) -> None:
    donor, learner = make_learner(seed=1), make_learner(seed=2)
    for each in (donor, learner):
        each.update(experience(each))
    weights, moments = donor.weights(), donor.optimizer_arrays()
    change(weights, moments)
    before = snapshot(learner)
    with pytest.raises(ValueError, match=rf"^[^\n]*{named}[^\n]*$"):
        learner.load(weights, moments)
    assert_equal_arrays(snapshot(learner), before)


# --- What must do no harm -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 1])
def test_a_gradient_that_is_not_finite_stops_before_the_parameters(stage: int) -> None:
    learner = make_learner()
    learner.update(experience(learner))
    stages = experience(learner, 1)
    batch = stages[stage].batches[0]
    for advantages in (batch.advantages, batch.outer_advantages):
        advantages[0, 0, 0] = float("nan")
    before = snapshot(learner)
    with pytest.raises(FloatingPointError, match="not finite"):
        learner.update(stages)
    assert_equal_arrays(snapshot(learner), before)
    learner.update(experience(learner, 2))


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("algorithm", OURS)
def test_a_task_lost_at_one_stage_has_no_influence(stage: int, algorithm: str) -> None:
    """The update is that of the other tasks alone."""
    learner, others = make_learner(algorithm=algorithm), make_learner(algorithm=algorithm)
    weights, batches, rest = learner.weights(), [], []
    others_weights = weights
    for index in range(2):
        record = rollouts(learner, weights, index)
        batch = learner.batch(weights, drop(record, 2) if index == stage else record)
        weights = learner.adapt(weights, batch)
        batches.append(batch)
        kept = Rollouts.concatenate([record.select(slice(0, 2)), record.select(slice(3, TASKS))])
        rest.append(others.batch(others_weights, kept))
        others_weights = others.adapt(others_weights, rest[-1])
    statistics, expected = learner.update(batches), others.update(rest)
    assert_close(snapshot(learner), snapshot(others))
    for name in ("loss", "grad_norm"):
        assert statistics[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-6), name


def test_an_iteration_without_any_whole_task_changes_no_number_to_nan() -> None:
    learner = make_learner()
    record = rollouts(learner, learner.weights(), 0)
    for task in range(TASKS):
        record = drop(record, task)
    batch = learner.batch(learner.weights(), record)
    assert all(np.isfinite(value) for value in learner.update([batch, batch]).values())
    assert all(np.isfinite(value).all() for value in snapshot(learner).values())


def test_building_and_updating_use_no_global_chance() -> None:
    state = torch.get_rng_state()
    learner = make_learner()
    learner.update(experience(learner))
    assert torch.equal(torch.get_rng_state(), state)
