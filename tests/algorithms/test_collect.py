"""The rollout loop: what it records, how it ends, what breaks it, and that it is the same however tasks are grouped."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.func import functional_call

from builders import (
    ARRAYS,
    ToyEnv,
    assert_same,
    make_policy,
    make_spec,
    seeds,
    specs,
    task_weights,
    tensors,
    toy_rollouts,
    uneven,
)
from ssm_metarl.algorithms.collect import collect_tasks, played
from ssm_metarl.algorithms.inputs import policy_inputs
from ssm_metarl.algorithms.rollouts import Rollouts
from ssm_metarl.seeds import seed_for
from ssm_metarl.tasks import make

FAMILIES = ("navigation-2d", "cartpole")


def family(name: str, num_tasks: int, **options: Any) -> tuple[Any, Any, Any]:
    """A native family, a policy's sizes for it and some tasks."""
    distribution = make(name)
    space = distribution.action_space
    discrete = hasattr(space, "n")
    spec = make_spec(
        observation_size=distribution.observation_space.shape[0],
        action_size=int(space.n) if discrete else space.shape[0],
        discrete=discrete,
        **options,
    )
    return distribution, spec, distribution.sample(num_tasks, np.random.default_rng(0))


def toys(
    tasks: Any,
    num_episodes: int = 3,
    horizon: int = 8,
    seed: int = 0,
    spec: Any = None,
    weights: Any = None,
    **options: Any,
) -> Rollouts:
    """`collect_tasks` of toy tasks."""
    spec = spec or make_spec()
    weights = weights or make_policy(spec).numpy_weights()
    nodes = [seed_for(seed, task) for task in range(len(tasks))]
    return played(collect_tasks(ToyEnv, spec, weights, nodes, tasks, num_episodes, horizon, **options))


# --- What is recorded -----------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(spec=specs(), seed=seeds, per_task=st.booleans())
def test_log_probs_are_those_of_the_policy_that_acted(spec: Any, seed: int, per_task: bool) -> None:
    """The ratio of torch's policy, run over the recorded inputs, to the one that acted is 1."""
    policy = make_policy(spec, seed)
    weights = task_weights(spec, 2, seed) if per_task else policy.numpy_weights()
    record = toy_rollouts(spec, weights, uneven(2, 3, 12, seed), 3, 12, seed)
    inputs = torch.from_numpy(policy_inputs(spec, record))
    output = functional_call(policy, tensors(weights), (inputs, torch.from_numpy(record.resets)))
    log_probs = output.actions.log_prob(torch.from_numpy(record.actions)).detach().numpy()
    np.testing.assert_allclose(log_probs[record.valid], record.log_probs[record.valid], rtol=1e-4, atol=1e-4)


@settings(max_examples=30)
@given(seed=seeds, horizon=st.integers(1, 9), how=st.sampled_from(["terminated", "truncated"]), discrete=st.booleans())
def test_episodes_end_where_they_end(seed: int, horizon: int, how: str, discrete: bool) -> None:
    """Lengths, ends, cuts, prefixes, last observations before the autoreset, and zeros behind."""
    tasks = [{**task, "how": how} for task in uneven(2, 3, horizon, seed)]
    spec = make_spec(discrete=discrete)
    record = toys(tasks, horizon=horizon, seed=seed, spec=spec)
    ends = np.array([task["ends"] for task in tasks])
    lengths = np.minimum(ends, horizon)
    np.testing.assert_array_equal(record.lengths(), lengths)
    steps = record.valid.shape[1]
    assert steps == lengths.max()
    time = np.arange(steps)[None, :, None]
    np.testing.assert_array_equal(record.valid, time < lengths[:, None])
    ended = (time == ends[:, None] - 1) & (how == "terminated")
    np.testing.assert_array_equal(record.terminated, ended)
    for flags in (record.starts, record.resets):
        np.testing.assert_array_equal(flags, np.broadcast_to(time == 0, flags.shape))
    first = record.observations[:, :1]
    np.testing.assert_allclose(
        record.observations, (first + time[..., None]) * record.valid[..., None], rtol=0, atol=1e-5
    )
    np.testing.assert_allclose(record.last_observations, first[:, 0] + lengths[..., None], rtol=0, atol=1e-5)
    for name in ("actions", "rewards", "log_probs"):
        assert not getattr(record, name)[~record.valid].any(), name
    assert record.actions.dtype == (np.int64 if discrete else np.float32)
    assert record.rewards.dtype == record.log_probs.dtype == record.observations.dtype == np.float32
    assert not record.errors


def test_rewards_answer_the_actions() -> None:
    record = toys([{"best": 1}], num_episodes=50, spec=make_spec(discrete=True))
    assert set(record.actions.ravel()) == {0, 1}
    np.testing.assert_array_equal(record.rewards.round(), record.actions == 1)


def test_a_shorter_horizon_cuts_the_same_experience() -> None:
    tasks = uneven(2, 3, 9)
    long, short = toys(tasks, horizon=9), toys(tasks, horizon=4)
    for name in ARRAYS:
        if name != "last_observations":
            np.testing.assert_array_equal(getattr(short, name), getattr(long, name)[:, :4], err_msg=name)
    going_on = long.lengths() > 4
    np.testing.assert_array_equal(short.last_observations[going_on], long.observations[:, 4][going_on])


def test_native_families_are_cut_at_their_horizon_without_an_end() -> None:
    distribution, spec, tasks = family("navigation-2d", 2)
    nodes = [seed_for(0, 0), seed_for(0, 1)]
    weights = {name: value * 0 for name, value in make_policy(spec).numpy_weights().items()}
    record = played(
        collect_tasks(
            distribution.make_vector_env, spec, weights, nodes, tasks, 2, distribution.horizon, deterministic=True
        )
    )
    assert record.lengths().tolist() == [[100, 100], [100, 100]]
    assert not record.terminated.any()


# --- Seeds ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("per_task", [False, True])
@settings(max_examples=8)
@given(
    seed=seeds,
    cuts=st.sets(st.integers(1, 4)),
    num_episodes=st.sampled_from([1, 2, 5, 20]),
    gated=st.booleans(),
    hidden=st.sampled_from([1, 17, 64]),
)
def test_a_tasks_experience_is_the_same_in_any_grouping(
    name: str, per_task: bool, seed: int, cuts: set[int], num_episodes: int, gated: bool, hidden: int
) -> None:
    """Bit by bit: together, one by one, or in any parts."""
    distribution, spec, tasks = family(name, 5, gated=gated, hidden_dim=hidden)
    weights = task_weights(spec, 5, seed) if per_task else make_policy(spec, seed).numpy_weights()
    nodes = [seed_for(seed, 0, 3, task) for task in range(5)]

    def run(part: slice) -> Rollouts:
        own = {name: value[part] for name, value in weights.items()} if per_task else weights
        return played(
            collect_tasks(distribution.make_vector_env, spec, own, nodes[part], tasks[part], num_episodes, 40)
        )

    whole = run(slice(0, 5))
    borders = [0, *sorted(cuts), 5]
    parts = [run(slice(*pair)) for pair in itertools.pairwise(borders)]
    single = [run(slice(task, task + 1)) for task in range(5)]
    assert_same(Rollouts.concatenate(parts), whole)
    assert_same(Rollouts.concatenate(single), whole)


@settings(max_examples=15)
@given(spec=specs(observation_size=3), seed=seeds)
def test_any_policy_is_the_same_in_any_grouping(spec: Any, seed: int) -> None:
    weights, tasks = make_policy(spec, seed).numpy_weights(), uneven(3, 2, 7, seed)
    nodes = [seed_for(seed, task) for task in range(3)]

    def run(**part: Any) -> Rollouts:
        return played(collect_tasks(ToyEnv, spec, weights, num_episodes=2, horizon=7, **part))

    single = [run(seeds=[node], tasks=[task]) for node, task in zip(nodes, tasks, strict=True)]
    assert_same(Rollouts.concatenate(single), run(seeds=nodes, tasks=tasks))


@pytest.mark.parametrize("name", FAMILIES)
def test_seeds_decide_everything(name: str) -> None:
    distribution, spec, tasks = family(name, 2)
    weights = make_policy(spec).numpy_weights()

    def run(*path: int) -> Rollouts:
        nodes = [seed_for(*path, task) for task in range(2)]
        return played(collect_tasks(distribution.make_vector_env, spec, weights, nodes, tasks, 3, 20))

    one, again = run(7, 1), run(7, 1)
    assert_same(one, again)
    for other in (run(8, 1), run(7, 2)):
        assert not np.array_equal(one.actions[:, 0], other.actions[:, 0])
    # Nor do two tasks of one call, or two episode slots of a task, share their chance.
    noise = one.actions[:, 0].reshape(6, -1) if not spec.discrete else one.observations[:, 0].reshape(6, -1)
    assert len(np.unique(noise, axis=0)) == 6


def test_noise_is_standard_normal_or_uniform() -> None:
    normal = make_spec(num_layers=0, inputs="observation", initial_std=1.0)
    weights = {name: value * 0 for name, value in make_policy(normal).numpy_weights().items()}
    record = toys([{}, {}], num_episodes=50, horizon=50, spec=normal, weights=weights)
    assert stats.kstest(record.actions.ravel(), "norm").pvalue > 1e-3
    even = make_spec(num_layers=0, discrete=True, action_size=5)
    weights = {name: value * 0 for name, value in make_policy(even).numpy_weights().items()}
    record = toys([{}, {}], num_episodes=50, horizon=50, spec=even, weights=weights)
    assert stats.chisquare(np.bincount(record.actions.ravel())).pvalue > 1e-3


@pytest.mark.parametrize("discrete", [False, True])
def test_deterministic_actions_are_the_most_likely(discrete: bool) -> None:
    spec = make_spec(discrete=discrete, action_size=4)
    policy = make_policy(spec)
    record = toys([{}, {}], spec=spec, weights=policy.numpy_weights(), deterministic=True)
    actions = policy(torch.from_numpy(policy_inputs(spec, record))).actions
    if discrete:
        np.testing.assert_array_equal(record.actions, actions.probs.argmax(-1).numpy())
    else:
        np.testing.assert_allclose(record.actions, actions.mean.detach().numpy(), rtol=1e-5, atol=1e-5)


# --- Faults ---------------------------------------------------------------------------------------------------


def check_dropped(record: Rollouts, healthy: Rollouts, task: int, slot: int) -> None:
    """One slot is lost without a trace; all the others are as if nothing had happened."""
    assert not record.valid[task, :, slot].any()
    steps = record.valid.shape[1]
    others = np.ones(record.kept().shape, bool)
    others[task, slot] = False
    np.testing.assert_array_equal(record.kept(), others)
    for name in ARRAYS:
        array, expected = getattr(record, name), getattr(healthy, name)
        assert np.isfinite(array).all(), name
        if name == "last_observations":
            array, expected = array[:, None], expected[:, None]
        np.testing.assert_array_equal(
            array.swapaxes(1, 2)[others], expected[:, :steps].swapaxes(1, 2)[others], err_msg=name
        )
        if name not in ("starts", "resets"):
            assert not array.swapaxes(1, 2)[~others].any(), name


@settings(max_examples=30)
@given(
    seed=seeds,
    task=st.integers(0, 1),
    slot=st.integers(0, 2),
    step=st.integers(0, 6),
    where=st.sampled_from(["observation", "reward"]),
    length=st.integers(1, 8),
    discrete=st.booleans(),
)
def test_an_episode_that_is_not_finite_is_dropped_alone(
    seed: int, task: int, slot: int, step: int, where: str, length: int, discrete: bool
) -> None:
    """At the start, on the way, in the last step, or not at all where it happens in the next episode."""
    tasks = uneven(2, 3, 6, seed)
    tasks[task]["ends"][slot] = length
    spoiled = [dict(row) for row in tasks]
    spoiled[task]["nan"] = (slot, step, where)
    spec = make_spec(discrete=discrete)
    healthy, record = (toys(rows, horizon=6, seed=seed, spec=spec) for rows in (tasks, spoiled))
    first = max(step, 1) if where == "reward" else step
    if first > min(length, 6):
        assert not record.errors
        for name in ARRAYS:
            np.testing.assert_array_equal(getattr(record, name), getattr(healthy, name), err_msg=name)
    else:
        assert len(record.errors) == 1
        assert f"step {first}." in record.errors[0]
        check_dropped(record, healthy, task, slot)


@pytest.mark.parametrize("family", ["navigation-2d", "cartpole"])
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_policy_that_diverged_is_not_taken_for_a_faulty_environment(family: Any, number: float) -> None:
    """Of logits that are no numbers a discrete policy would take the first action."""
    family = make(family)
    discrete = family.name == "cartpole"
    spec = make_spec(observation_size=family.observation_space.shape[0], discrete=discrete)
    weights = task_weights(spec, 2)
    weights["policy.bias"][1] = number
    tasks = family.sample(2, np.random.default_rng(0))
    nodes = [seed_for(0, task) for task in range(2)]
    record = played(collect_tasks(family.make_vector_env, spec, weights, nodes, tasks, num_episodes=1, horizon=5))
    assert record.kept().tolist() == [[True], [False]]
    (error,) = record.errors
    assert "the policy's action not finite at step 0." in error


def test_all_episodes_can_be_lost() -> None:
    record = toys([{"nan": (0, 0, "observation")}, {"nan": (0, 3, "reward")}], num_episodes=1)
    assert record.num_steps == 0
    assert len(record.errors) == 2
    assert np.isnan(record.returns()).all()


def test_what_is_said_of_lost_episodes_does_not_depend_on_the_grouping() -> None:
    """Errors come task by task, whatever the order in which they happened."""
    tasks = [{"nan": (1, 5, "reward")}, {}, {"nan": (0, 2, "observation")}]
    nodes, spec = [seed_for(0, task) for task in range(3)], make_spec()
    weights = make_policy(spec).numpy_weights()

    def run(**part: Any) -> Rollouts:
        return played(collect_tasks(ToyEnv, spec, weights, num_episodes=2, horizon=8, **part))

    single = [run(seeds=[node], tasks=[task]) for node, task in zip(nodes, tasks, strict=True)]
    assert Rollouts.concatenate(single).errors == run(seeds=nodes, tasks=tasks).errors


class Unmakeable(ToyEnv):
    def __init__(self, tasks: Any, num_episodes: int) -> None:
        super().__init__(tasks, num_episodes)
        if any(task.get("unmakeable") for task in tasks):
            raise OSError("no such toy")


@pytest.mark.parametrize("fault", [{"raises": 1}, {"raises": 5}, {"unmakeable": True}], ids=str)
@pytest.mark.parametrize("per_task", [False, True])
@pytest.mark.parametrize("discrete", [False, True])
def test_a_task_whose_environment_raises_is_dropped_alone(fault: Any, per_task: bool, discrete: bool) -> None:
    tasks, spec = uneven(3, 2, 8), make_spec(discrete=discrete)
    weights = task_weights(spec, 3) if per_task else make_policy(spec).numpy_weights()
    nodes = [seed_for(0, task) for task in range(3)]
    healthy = played(collect_tasks(Unmakeable, spec, weights, nodes, tasks, 2, 8))
    tasks[1] = tasks[1] | fault
    record = played(collect_tasks(Unmakeable, spec, weights, nodes, tasks, 2, 8))
    assert record.kept().tolist() == [[True, True], [False, False], [True, True]]
    for task in (0, 2):
        one, other = record.select(slice(task, task + 1)), healthy.select(slice(task, task + 1))
        steps = record.valid.shape[1]
        for name in ARRAYS:
            expected = getattr(other, name)
            expected = expected if name == "last_observations" else expected[:, :steps]
            np.testing.assert_array_equal(getattr(one, name), expected, err_msg=name)
    assert len(record.errors) == 2
    assert ("no such toy" if "unmakeable" in fault else "the toy is broken") in record.errors[0]
    assert record.tasks == tuple(tasks)


def test_every_environment_can_raise() -> None:
    record = toys([{"raises": 1}, {"raises": 2}], num_episodes=2)
    assert record.valid.shape == (2, 1, 2)
    assert record.num_steps == 0
    assert len(record.errors) == 4


def test_environments_are_closed_also_when_they_raise() -> None:
    closed: list[int] = []

    class Closing(ToyEnv):
        def close_extras(self, **_: Any) -> None:
            closed.append(self.num_envs)

    spec = make_spec()
    nodes = [seed_for(0, 0), seed_for(0, 1)]
    played(collect_tasks(Closing, spec, make_policy(spec).numpy_weights(), nodes, [{"raises": 1}, {}], 2, 4))
    assert closed == [4, 2, 2]
