"""A checkpoint fitted to other sizes of the policy."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ssm_metarl.algorithms.inputs import policy_inputs
from ssm_metarl.algorithms.resize import resize
from ssm_metarl.algorithms.rollouts import Rollouts
from ssm_metarl.algorithms.spec import PolicySpec
from ssm_metarl.config import ExperienceConfig
from ssm_metarl.distributed.pool import Pool
from ssm_metarl.seeds import Branch, seed_for
from ssm_metarl.storage.contents import Checkpoint
from ssm_metarl.tasks import TaskDistribution

PROBE_TASKS, PROBE_EPISODES = 10, 2
"""Rollouts of the old policy on which a resize measures what contributes, and its error."""


class Resize(NamedTuple):
    """What a resize did.

    Attributes:
        error: see `resize.Morph`.
        env_steps: environment steps that were played to measure it.
    """

    error: float
    env_steps: int


def resized(
    checkpoint: Checkpoint, spec: PolicySpec, experience: ExperienceConfig, distribution: TaskDistribution
) -> tuple[Checkpoint, Resize]:
    """The checkpoint with its policy and moments in other sizes; its seed and iteration alone decide about chance.

    Args:
        checkpoint: of a policy of the same form.
        spec: the sizes that are wanted.
        experience: the run's, for its seed and trials.
        distribution: the family whose training tasks are played.

    Raises:
        ValueError: the two specs differ in more than sizes.
    """
    iteration = int(checkpoint.progress["iteration"])
    rollouts = _probe(checkpoint, iteration, experience, distribution)
    seed = int(seed_for(experience.seed, Branch.RESIZE, iteration).generate_state(1)[0])
    inputs = policy_inputs(checkpoint.spec, rollouts)
    morph = resize(checkpoint.spec, checkpoint.policy, checkpoint.optimizer, spec, inputs, seed, rollouts.resets)
    fitted = replace(checkpoint, spec=morph.spec, policy=morph.policy, optimizer=morph.optimizer)
    return fitted, Resize(morph.error, rollouts.num_steps)


def _probe(
    checkpoint: Checkpoint, iteration: int, experience: ExperienceConfig, distribution: TaskDistribution
) -> Rollouts:
    """A few training episodes of the policy as it was."""
    rng = np.random.default_rng(seed_for(experience.seed, Branch.RESIZE, iteration, 0))
    tasks = distribution.sample(PROBE_TASKS, rng, "train")
    seeds = [seed_for(experience.seed, Branch.RESIZE, iteration, 1, task) for task in range(PROBE_TASKS)]
    with Pool(distribution, checkpoint.spec, num_workers=0, trial_episodes=experience.trial_episodes) as pool:
        return pool.collect(checkpoint.policy, tasks, seeds, PROBE_EPISODES)
