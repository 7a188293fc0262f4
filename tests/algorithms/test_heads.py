"""Actions of several integers: a categorical head each, independent given the past."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.distributions import Categorical, kl_divergence
from torch.func import functional_call

from builders import make_policy, make_spec, seeds, task_weights, tensors
from external_environments import draw
from ssm_metarl.algorithms.adapters import divergence, log_probs
from ssm_metarl.algorithms.batch import make_batch
from ssm_metarl.algorithms.collect import collect_tasks, played
from ssm_metarl.algorithms.export import export_step
from ssm_metarl.algorithms.heads import by_head, less_mean, logit_places
from ssm_metarl.algorithms.inputs import policy_inputs
from ssm_metarl.algorithms.numpy_policy import NumpyPolicy
from ssm_metarl.algorithms.objective import detached, meta_loss
from ssm_metarl.algorithms.parameters import expected_shapes
from ssm_metarl.algorithms.policy import SSMPolicy, logits_of
from ssm_metarl.algorithms.propensity import TaskModel
from ssm_metarl.algorithms.registry import MetaConfig
from ssm_metarl.algorithms.replay import ReplayBuffer
from ssm_metarl.algorithms.resize import resize
from ssm_metarl.algorithms.rollouts import Rollouts
from ssm_metarl.algorithms.spec import PolicySpec
from ssm_metarl.seeds import seed_for
from ssm_metarl.tasks.external.names import from_name

heads_of_any_kind = st.lists(st.integers(1, 5), min_size=1, max_size=5).map(tuple)


def spec_of(heads: tuple[int, ...], **options: Any) -> PolicySpec:
    return make_spec(discrete=True, action_size=sum(heads), action_heads=heads, **options)


def bits(tasks: int = 3, num_episodes: int = 4, weights: Any = None) -> tuple[PolicySpec, Rollouts]:
    """Experience of three bits an action."""
    family = from_name("habits:Bits")
    spec = spec_of((2, 2, 2), observation_size=1)
    weights = make_policy(spec).numpy_weights() if weights is None else weights
    nodes = [seed_for(0, task) for task in range(tasks)]
    steps = collect_tasks(
        family.make_vector_env, spec, weights, nodes, draw(family, tasks), num_episodes, family.horizon
    )
    return spec, played(steps)


class TestTable:
    @given(heads=heads_of_any_kind)
    def test_rows_hold_each_heads_logits_and_back(self, heads: tuple[int, ...]) -> None:
        logits = np.random.default_rng(0).normal(size=(2, sum(heads))).astype(np.float32)
        table = by_head(logits, heads)
        assert table.shape == (2, len(heads), max(heads))
        for row, (part, size) in enumerate(zip(np.split(logits, np.cumsum(heads)[:-1], -1), heads, strict=True)):
            np.testing.assert_array_equal(table[:, row, :size], part)
            assert (table[:, row, size:] < -1e8).all()
        np.testing.assert_array_equal(table.reshape(2, -1)[:, logit_places(heads)], logits)

    @given(heads=heads_of_any_kind)
    def test_less_mean_is_by_head(self, heads: tuple[int, ...]) -> None:
        logits = np.random.default_rng(0).normal(size=(3, sum(heads)))
        parts = np.split(logits, np.cumsum(heads)[:-1], -1)
        expected = np.concatenate([part - part.mean(-1, keepdims=True) for part in parts], -1)
        np.testing.assert_allclose(less_mean(logits, heads), expected, atol=1e-12)


class TestSpec:
    def test_there_and_back(self) -> None:
        spec = spec_of((2, 3))
        assert PolicySpec.from_dict(spec.to_dict()) == spec
        assert (spec.action_shape, spec.heads, spec.input_size) == ((2,), (2, 3), 3 + 5 + 2)
        for old in (make_spec(), make_spec(discrete=True)):
            values = old.to_dict()
            del values["action_heads"]  # as older versions wrote it
            assert PolicySpec.from_dict(values) == old

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"action_heads": (2, 2)}, "must add up to action_size, 5, not 4"),
            ({"action_heads": (5, 0)}, "action_heads must be an integer of 1 or more, not 0"),
            ({"action_heads": (2.0, 3)}, "action_heads must be an integer"),
            ({"action_heads": 5}, "action_heads must be a tuple"),
            ({"action_heads": (2, 3), "discrete": False}, "action_heads must be a tuple"),
            ({"action_heads": (1,) * 2000 + (2000,), "action_size": 4000}, "2001 with up to 2000 values are too many"),
        ],
    )
    def test_what_is_refused(self, options: dict[str, Any], match: str) -> None:
        with pytest.raises(ValueError, match=match):
            make_spec(**{"discrete": True, "action_size": 5, **options})

    def test_misfits_are_told(self) -> None:
        family, other = from_name("habits:ActMD"), from_name("habits:ActMB")
        spec = spec_of((2, 3), observation_size=2)
        assert not spec.misfit(family.observation_space, family.action_space)
        assert "integers of (2, 3) values, not those of MultiDiscrete([2 2 2])" in spec.misfit(
            other.observation_space, other.action_space
        )
        single = make_spec(discrete=True, observation_size=2, action_size=5)
        assert "one integer of 5 values" in single.misfit(family.observation_space, family.action_space)
        assert "discrete" in spec.misfit(family.observation_space, from_name("habits:Base").action_space)

    def test_parameters_are_those_of_one_head_of_all_values(self) -> None:
        spec = spec_of((2, 3))
        assert expected_shapes(spec) == expected_shapes(replace(spec, action_heads=()))
        for name, value in SSMPolicy(spec).numpy_weights().items():
            np.testing.assert_array_equal(value, SSMPolicy(replace(spec, action_heads=())).numpy_weights()[name])


class TestDistribution:
    @settings(max_examples=30, deadline=None)
    @given(heads=heads_of_any_kind, seed=seeds, per_task=st.booleans(), deterministic=st.booleans())
    def test_numpy_equals_torch(self, heads: Any, seed: int, per_task: bool, deterministic: bool) -> None:
        spec, rng = spec_of(heads, num_layers=1), np.random.default_rng(seed)
        weights = task_weights(spec, 2, seed) if per_task else make_policy(spec, seed).numpy_weights()
        inputs = rng.normal(size=(2, 7, 3, spec.input_size)).astype(np.float32)
        acting, state = NumpyPolicy(spec, weights), NumpyPolicy(spec, weights).initial_state(2, 3)
        output = functional_call(make_policy(spec), tensors(weights), (torch.from_numpy(inputs),))
        logits = logits_of(output.actions, spec).detach().numpy()
        for t in range(7):
            noise = None if deterministic else spec.draw_noise(rng, 2, 3)
            actions, found, state = acting.act(inputs[:, t], state, noise)
            assert (actions.dtype, actions.shape, found.dtype) == (np.int64, (2, 3, len(heads)), np.float32)
            assert ((actions >= 0) & (actions < np.array(heads))).all()
            parts = np.split(logits[:, t], np.cumsum(heads)[:-1], -1)
            each = [np.take_along_axis(part, actions[..., [d]], -1)[..., 0] for d, part in enumerate(parts)]
            np.testing.assert_allclose(found, sum(each), atol=1e-5)
            if deterministic:
                np.testing.assert_allclose(each, [part.max(-1) for part in parts], atol=1e-5)
            recomputed = output.actions.log_prob(torch.from_numpy(np.repeat(actions[:, None], 7, 1)))[:, t]
            np.testing.assert_allclose(found, recomputed.detach(), atol=1e-5)

    @given(heads=heads_of_any_kind, seed=seeds)
    @settings(max_examples=20, deadline=None)
    def test_entropy_and_divergence_add_up(self, heads: Any, seed: int) -> None:
        spec = spec_of(heads)
        inputs = torch.randn(1, 4, 2, spec.input_size, generator=torch.Generator().manual_seed(seed % 1000))
        one, other = (make_policy(spec, number)(inputs).actions for number in (1, 2))

        def parts(actions: Any) -> list[Categorical]:
            return [Categorical(logits=part) for part in logits_of(actions, spec).split(heads, -1)]

        expected: Any = sum(part.entropy() for part in parts(one))
        torch.testing.assert_close(one.entropy(), expected, atol=1e-5, rtol=1e-5)
        expected = sum(kl_divergence(*pair) for pair in zip(parts(one), parts(other), strict=True))
        torch.testing.assert_close(kl_divergence(one, other), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(kl_divergence(detached(one), one), torch.zeros(1, 4, 2), atol=1e-6, rtol=0)

    def test_samples_are_independent_with_the_heads_probabilities(self) -> None:
        heads, count = (2, 3), 60_000
        spec = spec_of(heads, num_layers=0)
        acting = NumpyPolicy(spec, make_policy(spec, 4, noise=1.0).numpy_weights())
        rng = np.random.default_rng(0)
        inputs = np.broadcast_to(rng.normal(size=spec.input_size).astype(np.float32), (1, count, spec.input_size))
        logits = acting.head(inputs[:, :1], [])[0].ravel().astype(float)
        actions = acting.act(inputs, [], spec.draw_noise(rng, 1, count))[0][0]
        each = [np.exp(part) / np.exp(part).sum() for part in np.split(logits, [2])]
        counts = [((actions == pair).all(-1)).sum() for pair in itertools.product(range(2), range(3))]
        assert stats.chisquare(counts, count * np.outer(*each).ravel()).pvalue > 1e-3

    def test_one_head_is_a_discrete_policy_bit_for_bit(self) -> None:
        single = make_spec(discrete=True, action_size=5)
        spec = replace(single, action_heads=(5,))
        weights, rng = make_policy(single).numpy_weights(), np.random.default_rng(0)
        inputs, noise = rng.normal(size=(2, 3, single.input_size)).astype(np.float32), rng.random((2, 3), np.float32)
        one = NumpyPolicy(single, weights).act(inputs, NumpyPolicy(single, weights).initial_state(2, 3), noise)
        other = NumpyPolicy(spec, weights).act(inputs, NumpyPolicy(spec, weights).initial_state(2, 3), noise[..., None])
        np.testing.assert_array_equal(one[0], other[0][..., 0])
        np.testing.assert_array_equal(one[1], other[1])

    @pytest.mark.parametrize("heads", [(2, 2, 2), (1, 4, 2)])
    def test_gradients_of_the_meta_objective_are_finite(self, heads: Any) -> None:
        """Twice through heads of unequal sizes, whose table has entries that no action is."""
        spec = spec_of(heads, observation_size=1)
        policy, config = make_policy(spec), MetaConfig(kl_penalty=0.1, entropy_bonus=0.01)
        rng = np.random.default_rng(0)
        stages = []
        for _ in range(2):
            _, record = bits()
            actions = rng.integers(heads, size=(*record.rewards.shape, len(heads)))
            stages.append(make_batch(spec, replace(record, actions=actions), config))
        parameters = dict(policy.named_parameters())
        loss = meta_loss(policy, parameters, stages, config)
        gradients = torch.autograd.grad(loss.losses.sum(), list(parameters.values()), allow_unused=True)
        assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)
        assert float(loss.entropy) == pytest.approx(sum(np.log(heads)), abs=0.5)
        again = meta_loss(policy, parameters, stages, config, loss.before)
        torch.testing.assert_close(again.kl_before, torch.zeros(3), atol=1e-6, rtol=0)


class TestRecords:
    def test_log_probabilities_of_a_record_are_those_that_acted(self) -> None:
        spec, record = bits()
        assert record.actions.shape == (3, 4, 4, 3)
        policy = make_policy(spec)
        found = log_probs(policy, policy.numpy_weights(), record)
        np.testing.assert_allclose(found, record.log_probs, atol=1e-5)
        weights = task_weights(spec, 3)
        batch = make_batch(spec, record, MetaConfig())
        np.testing.assert_allclose(divergence(policy, weights, weights, batch), 0.0, atol=1e-6)

    def test_inputs_hold_the_previous_action_one_hot_by_head(self) -> None:
        spec, record = bits()
        inputs = policy_inputs(spec, record)[:, 1:, :, 1:7].reshape(3, 3, 4, 3, 2)
        np.testing.assert_array_equal(inputs.argmax(-1), record.actions[:, :-1])
        np.testing.assert_array_equal(inputs.sum(-1), 1.0)

    def test_a_task_is_the_same_alone(self) -> None:
        weights = task_weights(spec_of((2, 2, 2), observation_size=1), 3)
        together = bits(3, weights=weights)[1]
        alone = bits(1, weights={name: value[:1] for name, value in weights.items()})[1]
        np.testing.assert_array_equal(alone.actions[0], together.actions[0])
        np.testing.assert_array_equal(alone.log_probs[0], together.log_probs[0])

    def test_replay_there_and_back(self) -> None:
        spec, record = bits()
        replay = ReplayBuffer(8)
        replay.add(record)
        assert replay.nbytes <= ReplayBuffer.bound(spec, 8, 4)
        arrays = replay.arrays()
        back = ReplayBuffer.from_arrays(arrays, spec).rollouts()
        np.testing.assert_array_equal(back.actions, replay.rollouts().actions)
        wrong = arrays["actions"].copy()
        wrong[0, 1] = 2
        with pytest.raises(ValueError, match=r"'actions' are not all in 0..\[1, 1, 1\]"):
            ReplayBuffer.from_arrays({**arrays, "actions": wrong}, spec)
        model = TaskModel(replay.rollouts(), spec)
        model.observe(record)
        assert model.propensities().shape == (3, 3)


class TestForms:
    def test_growth_keeps_the_function_and_shrinking_tells_its_error(self) -> None:
        spec = spec_of((2, 4), num_layers=1, hidden_dim=8)
        policy, rng = make_policy(spec).numpy_weights(), np.random.default_rng(0)
        probe = rng.normal(size=(2, 30, 3, spec.input_size)).astype(np.float32)
        grown = resize(spec, policy, {}, replace(spec, hidden_dim=10, state_dim=6, num_layers=2), probe, 0)
        assert grown.error < 1e-5
        back = resize(grown.spec, grown.policy, {}, spec, probe, 0)
        assert back.error < 1e-3
        shifted = dict(policy)
        shifted["policy.bias"] = policy["policy.bias"] + np.repeat(np.float32([3, -5]), (2, 4))
        smaller = replace(spec, hidden_dim=4)
        errors = [resize(spec, weights, {}, smaller, probe, 0).error for weights in (policy, shifted)]
        assert errors[0] == pytest.approx(errors[1], rel=1e-3), "an amount that a head's logits have in common"

    def test_an_exported_step_gives_the_logits_of_all_heads(self, tmp_path: Path) -> None:
        policy = make_policy(spec_of((2, 3)))
        step: Any = export_step(policy).module()
        inputs = np.random.default_rng(0).normal(size=(4, policy.spec.input_size)).astype(np.float32)
        acting = NumpyPolicy(policy.spec, policy.numpy_weights())
        expected, _ = acting.head(inputs[None], acting.initial_state(1, 4))
        found, _ = step(torch.from_numpy(inputs), [torch.zeros(4, 2, 2)])
        assert found.shape == (4, 5)
        np.testing.assert_allclose(found.detach(), expected[0], atol=1e-5)
