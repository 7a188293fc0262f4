"""Trials of several episodes: one recurrent state, one reset, one true end."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from builders import ToyEnv, make_policy, make_spec
from ssm_metarl.algorithms.collect import collect, played
from ssm_metarl.algorithms.inputs import policy_inputs
from ssm_metarl.algorithms.rollouts import Rollouts
from ssm_metarl.seeds import seed_for
from ssm_metarl.tasks import make

EPISODES, NUM_EPISODES = 3, 4


def trials(name: str, seed: int = 0, **options: Any) -> tuple[Any, Any, Rollouts]:
    """Trials of a native family."""
    family = make(name)
    discrete = hasattr(family.action_space, "n")
    size = int(family.action_space.n) if discrete else family.action_space.shape[0]
    spec = make_spec(observation_size=family.observation_space.shape[0], action_size=size, discrete=discrete, **options)
    policy = make_policy(spec, seed)
    tasks = family.sample(2, np.random.default_rng(seed))
    env = family.make_vector_env(tasks, NUM_EPISODES)
    nodes = [seed_for(seed, task) for task in range(2)]
    weights = policy.numpy_weights()
    return policy, family, played(collect(env, spec, weights, nodes, tasks, family.horizon, trial_episodes=EPISODES))


@pytest.mark.parametrize("name", ["cartpole", "navigation-2d"])
def test_a_trial_has_its_episodes_and_one_reset(name: str) -> None:
    policy, family, record = trials(name)
    assert record.resets[:, 0].all()
    assert not record.resets[:, 1:].any()
    assert ((record.starts & record.valid).sum(1) == EPISODES).all()
    # An episode starts where the one before ended, and lasts no longer than the horizon.
    for task, slot in np.ndindex(2, NUM_EPISODES):
        length = record.lengths()[task, slot]
        borders = [*np.flatnonzero(record.starts[task, :length, slot]), length]
        assert (np.diff(borders) <= family.horizon).all()
        assert record.valid[task, :length, slot].all()
    # The previous action and reward pass the border, with a start flag of 1.
    inputs = policy_inputs(policy.spec, record)
    later = record.starts & record.valid & ~record.resets
    task, step, slot = np.nonzero(later)
    np.testing.assert_array_equal(inputs[task, step, slot, -2], record.rewards[task, step - 1, slot])
    assert (inputs[..., -1] == record.starts).all()


@pytest.mark.parametrize("name", ["cartpole", "navigation-2d"])
def test_the_state_passes_the_border_of_episodes(name: str) -> None:
    """The learner, which reads the record, finds the log-probabilities of the worker, which acted."""
    policy, _, record = trials(name)
    inputs = torch.from_numpy(policy_inputs(policy.spec, record))
    with torch.no_grad():
        output = policy(inputs, torch.from_numpy(record.resets))
        log_probs = output.actions.log_prob(torch.from_numpy(record.actions)).numpy()
    np.testing.assert_allclose(log_probs[record.valid], record.log_probs[record.valid], atol=2e-4)


def test_only_the_last_episode_ends_a_trial_truly() -> None:
    _, _, record = trials("cartpole")
    ended = record.terminated.sum(1)
    assert (ended <= 1).all()
    assert ended.any()
    for task, slot in np.argwhere(ended):
        assert record.terminated[task, record.lengths()[task, slot] - 1, slot]


def test_a_trial_of_one_episode_is_an_episode() -> None:
    _, family, _ = trials("cartpole")
    spec = make_spec(observation_size=4, action_size=2, discrete=True)
    weights, tasks = make_policy(spec).numpy_weights(), family.sample(2, np.random.default_rng(0))
    nodes = [seed_for(0, task) for task in range(2)]
    whole = played(
        collect(family.make_vector_env(tasks, 3), spec, weights, nodes, tasks, family.horizon, trial_episodes=1)
    )
    np.testing.assert_array_equal(whole.starts, whole.resets)
    assert whole.terminated.any()


def test_an_episode_that_begins_with_nan_spoils_its_trial() -> None:
    class Spoiled(ToyEnv):
        def step(self, actions: Any) -> Any:
            observations, *rest = super().step(actions)
            if rest[1].any() or rest[2].any():
                observations = np.array(observations)
                observations[0] = np.nan
            return observations, *rest

    spec = make_spec()
    tasks = [{"ends": [4, 4]}]
    env = Spoiled(tasks, 2)
    weights = make_policy(spec).numpy_weights()
    record = played(collect(env, spec, weights, [seed_for(0)], tasks, 8, trial_episodes=2))
    assert record.kept().tolist() == [[False, True]]
    assert len(record.errors) == 1
