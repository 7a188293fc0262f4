"""RLlib's PPO, an iteration a whole number of episodes."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from ray.rllib.algorithms.ppo import PPO, PPOConfig
from ray.rllib.core import ALL_MODULES, DEFAULT_MODULE_ID
from ray.rllib.utils.metrics import (
    ENV_RUNNER_RESULTS,
    LEARNER_RESULTS,
    NUM_ENV_STEPS_SAMPLED_LIFETIME,
)

from ssm_metarl.algorithms.policy import SSMPolicy
from ssm_metarl.algorithms.registry import SCHEDULES
from ssm_metarl.config import TrainConfig
from ssm_metarl.distributed.learner import resolve_device
from ssm_metarl.distributed.rllib.env import SLOTS, TaskEnv
from ssm_metarl.distributed.rllib.sampling import Sampler
from ssm_metarl.seeds import Branch, seed_for
from ssm_metarl.tasks import TaskDistribution


class EpisodicPPO(PPO):
    """RLlib's PPO, which also says what its last iteration did, and leaves out invalid episodes.

    Attributes:
        finished: infos of the last steps of the iteration's finished episodes, see `TaskEnv`.
        seconds: of the iteration, spent in `sample`, `update` and, for copies of the weights to workers, `ray`.
    """

    finished: Sequence[Mapping[str, Any]] = ()
    seconds: Mapping[str, float] = {}
    _sampler: Sampler | None = None

    @property
    def ssm(self) -> SSMPolicy:
        """The learner's policy."""
        return self._learner.module[DEFAULT_MODULE_ID].ssm

    @property
    def adam(self) -> torch.optim.Optimizer:
        """Its optimiser."""
        return self._learner.get_optimizer(DEFAULT_MODULE_ID)

    @property
    def _learner(self) -> Any:
        return self.learner_group._learner  # in this process, as `ppo_config` has it

    def _setup_logdir(self) -> None:
        # Alone, Trainable would make an empty folder under ~/ray_results for every algorithm.
        if self._storage:
            super()._setup_logdir()

    def training_step(self) -> None:
        """Sample, update, send the weights: as the method of PPO, with RLlib's own parts."""
        begin = time.perf_counter()
        if self._sampler is None:
            self._sampler = Sampler(self.env_runner_group, self.restore_env_runners)
        episodes, found = self._sampler(self.config.total_train_batch_size)
        self.metrics.aggregate(found, key=ENV_RUNNER_RESULTS)
        self.finished = [episode.get_infos(-1) for episode in episodes if episode.is_done]
        good = [episode for episode in episodes if not (episode.is_done and episode.get_infos(-1).get("error"))]
        sampled = time.perf_counter()
        self.seconds = {"sample": sampled - begin, "update": 0.0, "ray": 0.0}
        if not good:
            return
        steps = self.metrics.peek((ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME))
        results = self.learner_group.update(
            episodes=good,
            timesteps={NUM_ENV_STEPS_SAMPLED_LIFETIME: steps},
            num_epochs=self.config.num_epochs,
            minibatch_size=self.config.minibatch_size,
            shuffle_batch_per_epoch=self.config.shuffle_batch_per_epoch,
        )
        self.metrics.aggregate(results, key=LEARNER_RESULTS)
        updated = time.perf_counter()
        self.env_runner_group.sync_weights(
            from_worker_or_learner_group=self.learner_group,
            policies=set(results[0]) - {ALL_MODULES},
            inference_only=True,
        )
        self.seconds = {
            "sample": sampled - begin,
            "update": updated - sampled,
            "ray": time.perf_counter() - updated,
        }


def ppo_config(
    config: TrainConfig, distribution: TaskDistribution, begin: int = 0, reward_scale: float = 1.0
) -> PPOConfig:
    """RLlib's configuration of a run, without its module.

    Args:
        config: of the run, with the algorithm "policy-gradient".
        distribution: the family.
        begin: iterations already done: chance and the learning rate's schedule continue from there.
        reward_scale: what rewards are divided by for the critic.
    """
    meta, experience, machine = config.meta, config.experience, config.machine
    spec = config.policy_spec(distribution)
    episodes = experience.meta_batch * experience.episodes
    batch = episodes * distribution.horizon
    slots = max(1, min(SLOTS, episodes // max(machine.num_workers, 1)))

    def schedule(first: float) -> float | list[list[float]]:
        """Of RLlib's form: values at numbers of environment steps."""
        factors = [
            SCHEDULES[meta.lr_schedule](i / experience.iterations) for i in range(begin, experience.iterations + 1)
        ]
        points = [[i * batch, first * factor] for i, factor in enumerate(factors)]
        return points if meta.lr_schedule != "constant" and len(points) > 1 else first

    # Less than the longest episode would round RLlib's sequences a minibatch down to none.
    minibatch = max(math.ceil(batch / meta.minibatches), distribution.horizon + 1)
    rllib = PPOConfig(algo_class=EpisodicPPO)
    rllib.api_stack(enable_rl_module_and_learner=True, enable_env_runner_and_connector_v2=True)
    rllib.environment(
        TaskEnv,
        env_config={"distribution": distribution, "spec": spec},
        # A policy reads the actions that it sampled; the environment maps them to its own unit.
        normalize_actions=False,
        clip_actions=False,
        disable_env_checking=True,
    )
    rllib.env_runners(
        num_env_runners=machine.num_workers,
        num_envs_per_env_runner=slots,
        gym_env_vectorize_mode="vector_entry_point",
    )
    rllib.learners(num_learners=0, num_gpus_per_learner=int(resolve_device(machine.device).startswith("cuda")))
    rllib.training(
        lr=schedule(meta.outer_lr),
        gamma=meta.discount,
        lambda_=meta.gae_lambda,
        clip_param=meta.clip,
        entropy_coeff=schedule(meta.entropy_bonus),
        use_kl_loss=False,
        # RLlib's values and targets are in rewards, the weight is of the error in units of the critic.
        vf_loss_coeff=meta.value_weight / reward_scale**2,
        vf_clip_param=math.inf,  # the default gives no gradient where a value is off by more than sqrt(10)
        num_epochs=meta.epochs,
        minibatch_size=minibatch if meta.minibatches > 1 and minibatch <= batch else None,
        train_batch_size=batch,
        grad_clip=meta.max_grad_norm,
        grad_clip_by="global_norm",
    )
    rllib.debugging(
        seed=int(seed_for(experience.seed, Branch.ROLLOUTS, begin).generate_state(1)[0]) // 2, log_level="ERROR"
    )
    return rllib


def build(config: PPOConfig, threads: int) -> EpisodicPPO:
    """Start RLlib's workers and its learner, in this process, with as many threads; Ray must have been started.

    Without files of RLlib's own, and with torch as it was but for the threads.
    """
    logging.getLogger("ray.rllib").setLevel(logging.ERROR)
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(threads)
    try:
        with warnings.catch_warnings(), _without_stderr():
            warnings.simplefilter("ignore")
            return EpisodicPPO(config)
    finally:
        # RLlib's seed turns them on, for the whole process and its other torch code.
        torch.use_deterministic_algorithms(deterministic)


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Ray's native code warns there, of every worker, that it can be restarted only while its configuration is kept;
    RLlib keeps it."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
