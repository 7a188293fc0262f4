"""The trainer of the algorithm "policy-gradient"."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.utils.metrics import (
    ENV_RUNNER_RESULTS,
    LEARNER_RESULTS,
    NUM_ENV_STEPS_SAMPLED,
)

from ssm_metarl.algorithms.policy import SSMPolicy
from ssm_metarl.algorithms.registry import SCHEDULES
from ssm_metarl.algorithms.rollouts import Array
from ssm_metarl.config import TrainConfig
from ssm_metarl.distributed.cluster import check_resources
from ssm_metarl.distributed.collection import INVALID_EPISODES_ALLOWED
from ssm_metarl.distributed.metrics import returns_metrics
from ssm_metarl.distributed.optimizer import load_state, optimizer_arrays
from ssm_metarl.distributed.play import EnvironmentFailure
from ssm_metarl.distributed.rllib.module import SSMModule
from ssm_metarl.distributed.rllib.ppo import EpisodicPPO, build, ppo_config
from ssm_metarl.distributed.trainer import check_sizes
from ssm_metarl.seeds import Branch, seed_for
from ssm_metarl.storage.checkpoint import load_checkpoint, save_checkpoint
from ssm_metarl.storage.contents import Checkpoint
from ssm_metarl.tasks import TaskDistribution


class PolicyGradientTrainer:
    """Trains a policy with RLlib's PPO; `train` drives it as it drives `MetaTrainer`.

    RLlib starts with the first `step`, with what was loaded until then. Ray must have been started.

    Args:
        config: of the run, with the algorithm "policy-gradient".
        distribution: the family itself, instead of the registered one that `config.task` names.
    """

    learns_normalizer: ClassVar[bool] = False
    always_ray: ClassVar[bool] = True

    @classmethod
    def of_run(cls, config: TrainConfig, distribution: TaskDistribution | None = None) -> PolicyGradientTrainer:
        """The trainer of a run."""
        return cls(config, distribution)

    def __init__(self, config: TrainConfig, distribution: TaskDistribution | None = None) -> None:
        self.train_config = config
        self.distribution = distribution or config.family()
        self.spec = config.policy_spec(self.distribution)
        check_resources(config.machine.num_workers)
        seed = seed_for(config.experience.seed, Branch.INITIAL_WEIGHTS).generate_state(1)[0]
        self.meta_iteration = self.env_steps = 0
        # Of the policy, its Adam and its normaliser, while RLlib does not hold them.
        self._weights: Mapping[str, Array] = SSMPolicy(self.spec, int(seed)).numpy_weights()
        self._optimizer: Mapping[str, Array] = {}
        self._moments: Mapping[str, Any] = {}
        self._ppo: EpisodicPPO | None = None

    def step(self) -> dict[str, Any]:
        """One iteration of PPO: about `meta_batch` × `episodes` × horizon steps, in episodes that may be cut.

        Returns:
            As from `MetaTrainer.step`: returns and lengths are those of no inner step, means over the episodes that
            ended in the iteration; of the learner's statistics those that RLlib has.

        Raises:
            EnvironmentFailure: more than a tenth of the episodes are invalid.
            RuntimeError: no worker returned anything.
        """
        begin = time.perf_counter()
        if self._ppo is None:
            self._ppo = self._build()
        ppo, meta = self._ppo, self.train_config.meta
        results = ppo.train()
        finished = [infos for infos in ppo.finished if not infos["error"]]
        errors = [infos["error"] for infos in ppo.finished if infos["error"]]
        if len(errors) > INVALID_EPISODES_ALLOWED * len(ppo.finished):
            share = f"{len(errors)} of {len(ppo.finished)} episodes"
            raise EnvironmentFailure(f"{share} were lost; the first error:\n{errors[0]}")
        steps = np.nan_to_num(results[ENV_RUNNER_RESULTS].get(NUM_ENV_STEPS_SAMPLED, 0))
        if not steps:
            raise RuntimeError("No worker returned an episode.")
        done = self.meta_iteration / self.train_config.experience.iterations
        self.meta_iteration += 1
        self.env_steps += int(steps)
        learned = results[LEARNER_RESULTS][DEFAULT_MODULE_ID]
        # Where there are more workers than episodes in an iteration, none may have ended yet.
        played = {of: [float(np.mean([infos[of] for infos in finished] or np.nan))] for of in ("return", "length")}
        return {
            "iteration": self.meta_iteration,
            "env_steps": self.env_steps,
            **returns_metrics(played["return"], played["length"]),
            "seconds": {**ppo.seconds, "adapt": 0.0, "total": time.perf_counter() - begin},
            "restarts": ppo.env_runner_group.num_remote_worker_restarts(),
            "timed_out_tasks": 0,
            "invalid_episodes": len(errors),
            "loss": float(learned["total_loss"]),
            "entropy": float(learned["entropy"]),
            "grad_norm": float(learned["gradients_default_optimizer_global_norm"]),
            "learning_rate": meta.outer_lr * SCHEDULES[meta.lr_schedule](min(done, 1.0)),
        }

    def save_checkpoint(self, checkpoint_dir: str) -> str:
        """Write a checkpoint folder, as `MetaTrainer` does."""
        checkpoint = Checkpoint(
            spec=self.spec,
            config=self.train_config.to_dict(),
            progress={
                "iteration": self.meta_iteration,
                "env_steps": self.env_steps,
                **({"normalizer": self._moments} if self._moments else {}),
            },
            policy=self.weights(),
            optimizer=self.optimizer_arrays(),
        )
        save_checkpoint(Path(checkpoint_dir), checkpoint)
        return checkpoint_dir

    def load_checkpoint(self, checkpoint: str) -> None:
        """Go on from a checkpoint of this run's sizes, before the first `step`.

        Raises:
            CheckpointError: the folder is damaged, or its policy has other sizes.
        """
        loaded = load_checkpoint(checkpoint)
        check_sizes(checkpoint, loaded.spec, self.spec)
        self.start_from(loaded)
        self._optimizer = loaded.optimizer
        self.meta_iteration = int(loaded.progress["iteration"])
        self.env_steps = int(loaded.progress["env_steps"])

    def start_from(self, checkpoint: Checkpoint) -> None:
        """Take the weights of a checkpoint of this run's sizes, and its normaliser, which does not change any more."""
        assert self._ppo is None, "RLlib has begun with other weights"
        self._weights = checkpoint.policy
        self._moments = checkpoint.progress.get("normalizer", {})

    def weights(self) -> dict[str, Array]:
        """Copies of the parameters and the normaliser."""
        return dict(self._weights) if self._ppo is None else self._ppo.ssm.numpy_weights()

    def optimizer_arrays(self) -> dict[str, Array]:
        """Adam's moments and step counts as arrays by `parameter.moment`."""
        return dict(self._optimizer) if self._ppo is None else optimizer_arrays(self._ppo.ssm, self._ppo.adam)

    def stop(self) -> None:
        """End the workers."""
        if self._ppo is not None:
            self._weights, self._optimizer = self.weights(), self.optimizer_arrays()
            self._ppo.stop()
            self._ppo = None

    def _build(self) -> EpisodicPPO:
        """RLlib's algorithm with the present weights and moments."""
        scale = float(self._weights["reward_scale"][0]) if self.spec.normalizes else 1.0
        config = ppo_config(self.train_config, self.distribution, begin=self.meta_iteration, reward_scale=scale)
        model = {"spec": self.spec.to_dict(), "max_seq_len": self.distribution.horizon + 1}
        config.rl_module(rl_module_spec=RLModuleSpec(module_class=SSMModule, model_config=model))
        ppo = build(config, self.train_config.machine.learner_threads)
        load_state(ppo.ssm, ppo.adam, self._weights, self._optimizer)
        ppo.env_runner_group.sync_weights(from_worker_or_learner_group=ppo.learner_group, inference_only=True)
        return ppo
