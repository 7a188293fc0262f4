"""Standard and hybrid adaptation to new tasks."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from builders import drop, make_policy, make_spec, toy_rollouts, uneven
from ssm_metarl.algorithms.adapters import Collect, HybridAdapter, StandardAdapter, divergence, log_probs
from ssm_metarl.algorithms.batch import make_batch
from ssm_metarl.algorithms.inner_loop import adapt_weights, batch_for
from ssm_metarl.algorithms.parameters import step_size
from ssm_metarl.algorithms.policy import SSMPolicy
from ssm_metarl.algorithms.registry import MetaConfig
from ssm_metarl.algorithms.replay import ReplayBuffer
from ssm_metarl.algorithms.rollouts import Rollouts

HORIZON = 6


def collector(spec: Any, tasks: list[Any], seen: list[Rollouts] | None = None, seed: int = 0) -> Collect:
    """Plays toy tasks, each step with other random numbers."""

    def collect(weights: Any, episodes: int, step: int) -> Rollouts:
        own = [{**task, "ends": (task.get("ends", [HORIZON + 1]) * episodes)[:episodes]} for task in tasks]
        record = toy_rollouts(spec, weights, own, episodes, HORIZON, seed + step)
        if seen is not None:
            seen.append(record)
        return record

    return collect


def stored(spec: Any, policy: SSMPolicy, tasks: list[Any], count: int = 12, seed: int = 50) -> ReplayBuffer:
    """A replay of toy episodes of `policy`."""
    replay = ReplayBuffer(count)
    for i in range(math.ceil(count / len(tasks))):
        replay.add(collector(spec, tasks, seed=seed + i)(policy.numpy_weights(), 1, 0))
    return replay


def assert_weights(found: Any, expected: Any, **tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, err_msg=name, **({"rtol": 0, "atol": 0} | tolerance))


ADVENTURES = [{"best": 0}, {"best": 1}, {"best": 0}]


class TestStandard:
    @pytest.mark.parametrize("discrete", [False, True])
    def test_curve_cost_and_the_best_parameters_seen(self, discrete: bool) -> None:
        spec, config = make_spec(discrete=discrete), MetaConfig(inner_lr=0.5)
        policy, tasks, seen = make_policy(spec), uneven(4, 5, HORIZON), list[Rollouts]()
        found = StandardAdapter(policy, config, steps=3).adapt(collector(spec, tasks, seen), 5)
        assert len(seen) == 4
        returns = np.stack([record.returns().mean(1) for record in seen], 1)
        np.testing.assert_allclose(found.returns, returns)
        np.testing.assert_allclose(found.lengths, np.stack([record.lengths().mean(1) for record in seen], 1))
        assert found.environment_steps == sum(record.num_steps for record in seen)
        assert found.best_step.tolist() == returns.argmax(1).tolist()
        weights: Any = policy.numpy_weights()
        steps = [{name: np.repeat(value[None], 4, 0) for name, value in weights.items()}]
        for step, record in enumerate(seen[:-1]):
            sized = config if step == 0 else replace(config, inner_lr=0.25)
            weights = adapt_weights(policy, weights, make_batch(spec, record, config), sized)
            steps.append(weights)
        best = {
            name: np.stack([steps[step][name][task] for task, step in enumerate(found.best_step)]) for name in weights
        }
        assert_weights(found.weights, best)
        np.testing.assert_array_equal(found.fractions, 1.0)
        np.testing.assert_array_equal(found.effective_episodes, 0.0)

    def test_where_no_step_helps_the_meta_parameters_come_back(self) -> None:
        """A step up the wrong way: every later policy is worse, and the report says step 0."""
        spec, config = make_spec(discrete=True, inputs="observation"), MetaConfig(inner_lr=1.0, discount=0.0)
        policy = SSMPolicy(spec)
        play = collector(spec, [{"best": 1}] * 3)

        def misled(weights: Any, episodes: int, step: int) -> Rollouts:
            record = play(weights, episodes, step)
            return (
                replace(record, rewards=-record.rewards) if step == 0 else replace(record, rewards=record.rewards - 9)
            )

        found = StandardAdapter(policy, config, steps=2).adapt(misled, 30)
        assert found.best_step.tolist() == [0, 0, 0]
        for task in range(3):
            assert_weights({n: v[task] for n, v in found.weights.items()}, policy.numpy_weights())

    def test_the_adapted_policy_acts_as_the_weights_say(self) -> None:
        spec = make_spec(discrete=True)
        policy = make_policy(spec)
        found = StandardAdapter(policy, MetaConfig(inner_lr=0.5), steps=2).adapt(collector(spec, ADVENTURES), 4)
        for task in range(3):
            own = found.policy(policy, task)
            assert own.spec == spec
            assert_weights(own.numpy_weights(), {name: value[task] for name, value in found.weights.items()})

    def test_the_meta_policy_is_not_changed(self) -> None:
        spec = make_spec()
        policy = make_policy(spec)
        before = policy.numpy_weights()
        for adapter in (
            StandardAdapter(policy, MetaConfig(), steps=2, optimizer="adam", kl_bound=1e-3),
            HybridAdapter(policy, MetaConfig(), stored(spec, policy, ADVENTURES), steps=2, pull=1.0),
        ):
            adapter.adapt(collector(spec, ADVENTURES), 3)
        assert_weights(policy.numpy_weights(), before)

    def test_a_bound_on_the_divergence_holds_and_halves_no_more_than_it_must(self) -> None:
        spec, config, bound = make_spec(discrete=True), MetaConfig(inner_lr=3.0), 0.01
        policy, seen = make_policy(spec), list[Rollouts]()
        meta = {name: np.repeat(v[None], 3, 0) for name, v in policy.numpy_weights().items()}
        play = collector(spec, ADVENTURES, seen)
        adapter = StandardAdapter(policy, config, steps=1, kl_bound=bound)
        found = adapter.adapt(
            lambda w, e, s: play(w, e, s) if s == 0 else replace(play(w, e, s), rewards=play(w, e, s).rewards + 99), 8
        )
        assert found.best_step.tolist() == [1, 1, 1]
        batch = batch_for(policy, meta, seen[0], config)
        moved = divergence(policy, meta, found.weights, batch)
        assert (moved <= bound).all()
        assert (moved > 0).all()
        assert (found.fractions < 1).all()
        full = adapt_weights(policy, meta, batch, config)
        for task, fraction in enumerate(found.fractions[:, 0]):
            assert math.log2(fraction).is_integer()
            double = {name: (meta[name] + 2 * fraction * (full[name] - meta[name])).astype(np.float32) for name in meta}
            assert divergence(policy, meta, double, batch)[task] > bound

    def test_a_wide_bound_changes_nothing(self) -> None:
        spec, config = make_spec(), MetaConfig(inner_lr=0.2)
        policy = make_policy(spec)
        free = StandardAdapter(policy, config, steps=2).adapt(collector(spec, ADVENTURES), 4)
        bound = StandardAdapter(policy, config, steps=2, kl_bound=1e6).adapt(collector(spec, ADVENTURES), 4)
        assert_weights(bound.weights, free.weights)
        np.testing.assert_array_equal(bound.fractions, 1.0)

    def test_adam_is_torch_s_on_each_task_s_own_gradient(self) -> None:
        spec, config = make_spec(discrete=True), MetaConfig(inner_lr=0.05, inner_steps=2)
        policy, seen = make_policy(spec), list[Rollouts]()
        adapter = StandardAdapter(policy, config, steps=2, optimizer="adam")
        used: list[Any] = []
        play = collector(spec, ADVENTURES, seen)

        def collect(weights: Any, episodes: int, step: int) -> Rollouts:
            used.append(weights)
            return play(weights, episodes, step)

        adapter.adapt(collect, 4)
        for task in range(3):
            own = make_policy(spec)
            adam = torch.optim.Adam(own.parameters(), lr=0.05)
            for step in range(2):
                batch = make_batch(spec, seen[step], config).tasks(slice(task, task + 1))
                actions = own(batch.inputs, batch.resets).actions
                ratio = torch.exp(actions.log_prob(batch.actions) - batch.log_probs)
                adam.zero_grad()
                (-(ratio * batch.advantages * batch.share).sum()).backward()
                adam.step()
                assert_weights({n: v[task] for n, v in used[step + 1].items()}, own.numpy_weights(), atol=2e-3)

    def test_learned_step_sizes_are_used(self) -> None:
        spec = make_spec(discrete=True, learned_step_sizes=True)
        policy, seen = make_policy(spec, noise=0.1), list[Any]()
        with torch.no_grad():
            for name, value in policy.named_parameters():
                if name.startswith("step_sizes."):
                    value.zero_()
            dict(policy.named_parameters())[step_size("policy.bias")].fill_(2.0)
        play = collector(spec, ADVENTURES)

        def collect(weights: Any, episodes: int, step: int) -> Rollouts:
            seen.append(weights)
            return play(weights, episodes, step)

        StandardAdapter(policy, MetaConfig(), steps=1).adapt(collect, 4)
        changed = {name for name, value in seen[1].items() if (value != policy.numpy_weights()[name]).any()}
        assert changed == {"policy.bias"}

    def test_a_lost_task_stays_where_it_is(self) -> None:
        spec = make_spec(discrete=True)
        policy = make_policy(spec)
        play = collector(spec, ADVENTURES)
        for adapter in (
            StandardAdapter(policy, MetaConfig(), steps=1),
            HybridAdapter(policy, MetaConfig(), stored(spec, policy, ADVENTURES), steps=1),
        ):
            found = adapter.adapt(lambda w, e, s: drop(play(w, e, s), 1), 4)
            assert_weights({n: v[1] for n, v in found.weights.items()}, policy.numpy_weights())
            assert np.isnan(found.returns[1]).all()
            assert found.best_step[1] == 0

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"steps": -1}, "steps must be"),
            ({"step_size": 0.0}, "step_size must be a number above 0"),
            ({"kl_bound": 0.0}, "kl_bound must be a number above 0"),
            ({"kl_bound": math.nan}, "kl_bound must be a number above 0"),
            ({"optimizer": "sgdd"}, "optimizer must be one of sgd, adam"),
        ],
    )
    def test_impossible_options_are_refused(self, options: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            StandardAdapter(make_policy(make_spec()), MetaConfig(), **options)


class TestHybrid:
    @pytest.mark.parametrize("baseline", ["linear", "critic"])
    def test_without_replayed_episodes_it_is_standard(self, baseline: str) -> None:
        spec, config = make_spec(discrete=True), MetaConfig(inner_lr=0.5, baseline=baseline)
        policy = make_policy(spec)
        replay = stored(spec, policy, ADVENTURES)
        standard = StandardAdapter(policy, config, steps=3).adapt(collector(spec, ADVENTURES), 4)
        hybrid = HybridAdapter(policy, config, replay, replay_episodes=0, steps=3)
        found = hybrid.adapt(collector(spec, ADVENTURES), 4)
        assert_weights(found.weights, standard.weights)
        np.testing.assert_array_equal(found.returns, standard.returns)

    @pytest.mark.parametrize("baseline", ["linear", "critic"])
    def test_episodes_without_weight_change_nothing(self, baseline: str) -> None:
        """Garbage in the buffer: with weight 0 the step is the standard one but for rounding."""
        spec, config = make_spec(discrete=True), MetaConfig(inner_lr=0.5, inner_steps=2, baseline=baseline)
        policy = make_policy(spec)
        replay, garbage = stored(spec, policy, ADVENTURES), ReplayBuffer(12)
        arrays = replay.arrays()
        rng = np.random.default_rng(0)
        arrays["observations"] = rng.normal(0, 30, arrays["observations"].shape).astype(np.float32)
        arrays["rewards"] = rng.normal(0, 100, arrays["rewards"].shape).astype(np.float32)
        garbage.extend(ReplayBuffer.from_arrays(arrays, spec))
        standard = StandardAdapter(policy, config, steps=2).adapt(collector(spec, ADVENTURES), 4)
        found = HybridAdapter(policy, config, garbage, steps=2, tolerance=0.01).adapt(collector(spec, ADVENTURES), 4)
        assert_weights(found.weights, standard.weights, atol=1e-4)
        mixed = ReplayBuffer(24)
        for part in (garbage, replay):
            mixed.extend(part)
        good = HybridAdapter(policy, config, replay, steps=1, replay_episodes=12).adapt(collector(spec, ADVENTURES), 4)
        both = HybridAdapter(policy, config, mixed, steps=1, replay_episodes=24).adapt(collector(spec, ADVENTURES), 4)
        assert good.effective_episodes.min() > 2
        assert (both.effective_episodes <= 12 + 1e-3).all()

    def test_weights_are_one_where_task_and_policy_agree(self) -> None:
        """The current policy's own episodes of the current task count fully."""
        spec, config = make_spec(discrete=True), MetaConfig()
        policy, task = make_policy(spec), [{"best": 0}]
        replay = stored(spec, policy, task, count=30)
        adapter = HybridAdapter(policy, config, replay, replay_episodes=30, steps=1)
        found = adapter.adapt(collector(spec, task), 20)
        assert found.effective_episodes[0, 0] > 29
        record = collector(spec, task)(policy.numpy_weights(), 5, 0)
        np.testing.assert_allclose(log_probs(policy, policy.numpy_weights(), record), record.log_probs, atol=1e-5)

    def test_actions_that_the_current_policy_would_not_take_count_less(self) -> None:
        spec, config = make_spec(discrete=True, inputs="observation", num_layers=0), MetaConfig()
        policy, task = SSMPolicy(spec), [{"best": 0}]
        certain = SSMPolicy(spec)
        with torch.no_grad():
            certain.policy.bias[0] = 30.0  # always the first action, of which the meta-policy says one half
        for source, weight in ((policy, 1.0), (certain, 0.5)):
            adapter = HybridAdapter(policy, config, stored(spec, source, task), steps=1, tolerance=10.0)
            batch = adapter._batch(
                {n: v[None] for n, v in policy.numpy_weights().items()},
                collector(spec, task)(policy.numpy_weights(), 20, 0),
                0,
            )[0]
            replayed = batch.share[0, 0, 20:] / batch.share[0, 0, 0]
            # 12 stored episodes, equally likely, beside 20 own ones: 12 / 32 of the own ones' gradient.
            np.testing.assert_allclose(replayed.numpy(), weight * (12 / 32) / 12 * 20, rtol=0.05)
            np.testing.assert_allclose(batch.share[0, :, :20].sum(), 1.0, rtol=1e-5)

    def test_an_infinite_pull_returns_the_meta_parameters_and_a_finite_one_comes_between(self) -> None:
        spec, config = make_spec(discrete=True), MetaConfig(inner_lr=0.5)
        policy = make_policy(spec)
        replay, meta = stored(spec, policy, ADVENTURES), policy.numpy_weights()
        seen: dict[float, Any] = {}
        for pull in (0.0, 2.0, math.inf):
            used: list[Any] = []
            play = collector(spec, ADVENTURES)

            def collect(weights: Any, episodes: int, step: int, used: Any = used, play: Any = play) -> Rollouts:
                used.append(weights)
                return play(weights, episodes, step)

            HybridAdapter(policy, config, replay, steps=1, pull=pull).adapt(collect, 4)
            seen[pull] = used[1]
        assert_weights(seen[math.inf], {name: np.repeat(v[None], 3, 0) for name, v in meta.items()})
        halfway = {name: (value + meta[name]) / 2 for name, value in seen[0.0].items()}  # alpha · pull = 1
        assert_weights(seen[2.0], halfway, atol=1e-6)

    def test_unweighted_replay_takes_any_episodes_fully(self) -> None:
        spec, config = make_spec(discrete=True), MetaConfig()
        policy = make_policy(spec)
        replay = stored(spec, policy, ADVENTURES)
        adapter = HybridAdapter(policy, config, replay, weighted=False, replay_episodes=5, steps=2)
        found = adapter.adapt(collector(spec, ADVENTURES), 4)
        np.testing.assert_allclose(found.effective_episodes, 5)
        again = HybridAdapter(policy, config, replay, weighted=False, replay_episodes=5, steps=2)
        assert_weights(again.adapt(collector(spec, ADVENTURES), 4).weights, found.weights)

    def test_weighted_replay_is_better_than_unweighted_and_than_none(self) -> None:
        """One episode of six steps a task; half of the buffer is of a task where the other action is paid."""
        spec = make_spec(discrete=True, inputs="observation", num_layers=0)
        config = MetaConfig(inner_lr=0.5, discount=0.0, inner_steps=1)
        policy, tasks = SSMPolicy(spec), [{"best": i % 2} for i in range(20)]
        replay = stored(spec, policy, tasks, count=60)
        weighted, unweighted, without = (
            np.stack([
                adapter.adapt(collector(spec, tasks, seed=seed), 1).returns
                for seed in range(9, 15)
                for adapter in [make()]
            ])
            for make in (
                lambda: HybridAdapter(policy, config, replay, steps=1),
                lambda: HybridAdapter(policy, config, replay, steps=1, weighted=False),
                lambda: StandardAdapter(policy, config, steps=1),
            )
        )  # fmt: skip
        np.testing.assert_array_equal(weighted[..., 0], without[..., 0])
        for other in (weighted[..., 0], unweighted[..., 1], without[..., 1]):
            better = weighted[..., 1] - other
            assert better.mean() > 3 * better.std() / np.sqrt(better.size)

    def test_a_task_whose_first_episodes_are_all_dropped_gets_its_scale_from_the_next(self) -> None:
        spec = make_spec(discrete=True)
        policy, play = make_policy(spec), collector(spec, ADVENTURES)
        weights = {name: np.stack([value] * 3) for name, value in policy.numpy_weights().items()}
        adapter = HybridAdapter(policy, MetaConfig(), stored(spec, policy, ADVENTURES), steps=2, weighted=False)
        adapter._batch(weights, drop(play(weights, 4, 0), 1), 0)
        batch = adapter._batch(weights, play(weights, 4, 1), 1)[0]
        np.testing.assert_allclose(batch.advantages[1, 0, 4:].square().mean().sqrt(), 1.0, rtol=1e-5)

    def test_none_and_empty_are_refused(self) -> None:
        for replay in (None, ReplayBuffer(3)):
            with pytest.raises(ValueError, match="needs a replay"):
                HybridAdapter(make_policy(make_spec()), MetaConfig(), replay)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"pull": -1.0}, "pull must be"),
            ({"pull": math.nan}, "pull must be"),
            ({"tolerance": 0.0}, "tolerance must be"),
            ({"replay_episodes": -1}, "replay_episodes must be"),
        ],
    )
    def test_impossible_options_are_refused(self, options: Any, message: str) -> None:
        spec = make_spec()
        policy = make_policy(spec)
        with pytest.raises(ValueError, match=message):
            HybridAdapter(policy, MetaConfig(), stored(spec, policy, ADVENTURES), **options)


def test_evaluation_alone_copies_no_parameters() -> None:
    """Without a step, the parameters of thousands of tasks are one array."""
    spec = make_spec(discrete=True)
    policy = make_policy(spec)
    found = StandardAdapter(policy, MetaConfig(), steps=0).adapt(collector(spec, ADVENTURES), 2)
    for name, value in found.weights.items():
        assert value.strides[0] == 0
        np.testing.assert_array_equal(value[1], policy.numpy_weights()[name])
