"""The meta-iteration, as a Ray Tune trainable that also runs alone."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from ray import tune
from ray.exceptions import ObjectLostError
from ray.tune import PlacementGroupFactory

from ssm_metarl.algorithms.normalizer import RunningMoments
from ssm_metarl.algorithms.policy import SSMPolicy
from ssm_metarl.algorithms.registry import ALGORITHMS, META_TRAINER
from ssm_metarl.algorithms.replay import ReplayBuffer
from ssm_metarl.algorithms.rollouts import Array, Rollouts
from ssm_metarl.algorithms.spec import PolicySpec
from ssm_metarl.config import MachineConfig, TrainConfig
from ssm_metarl.distributed.cluster import check_resources
from ssm_metarl.distributed.collection import StageCollector
from ssm_metarl.distributed.learner import Learner
from ssm_metarl.distributed.learner_group import LearnerGroup, learner_gpus
from ssm_metarl.distributed.metrics import returns_metrics
from ssm_metarl.distributed.pool import Pool
from ssm_metarl.distributed.resizing import Resize, resized
from ssm_metarl.distributed.stopwatch import Stopwatch
from ssm_metarl.distributed.telemetry import Telemetry
from ssm_metarl.seeds import Branch, seed_for
from ssm_metarl.storage.checkpoint import load_checkpoint, save_checkpoint
from ssm_metarl.storage.contents import Checkpoint, CheckpointError
from ssm_metarl.tasks import TaskDistribution, names, register
from ssm_metarl.tasks.baselines.play import baseline_policy, demonstrate
from ssm_metarl.tasks.baselines.policy import Trials

MOST_REPETITIONS = 3
"""Of a meta-iteration from which a lost node took something."""

_log = logging.getLogger(__name__)


class MetaTrainer(tune.Trainable):
    """Meta-trains a policy; one `step` is one meta-iteration.

    Alone, without Ray started when `num_workers` is 0:

        trainer = MetaTrainer(TrainConfig.for_task("cartpole").to_dict())
        metrics = trainer.train()
        trainer.save_checkpoint("somewhere/checkpoint_000001")
        trainer.stop()

    Under Tune it is passed as it is, with `TrainConfig.to_dict()` as parameter space.

    Args:
        config: options of `TrainConfig`, and optionally "task_distribution": the family itself, instead of the
            registered one that "task" names.
    """

    learns_normalizer: ClassVar[bool] = True
    always_ray: ClassVar[bool] = False
    processors: float = 1.0
    """That Ray keeps for each worker and learner."""

    @classmethod
    def of_run(cls, config: TrainConfig, distribution: TaskDistribution | None = None) -> MetaTrainer:
        """The trainer of a run outside of Tune."""
        return cls({**config.to_dict(), "task_distribution": distribution})

    def setup(self, config: dict[str, Any]) -> None:
        """Build learner and workers; Tune and the constructor call it once."""
        config = dict(config)
        distribution = config.pop("task_distribution", None)
        if distribution is not None and ":" not in config["task"] and config["task"] not in names():
            # A family of the user's own, in a process where the user's module did not run.
            register(config["task"], lambda: distribution)
        if self._trial_info is not None:  # under Tune, where the learner has the one CPU that was requested for it
            config["learner_threads"] = 1
        self.train_config = TrainConfig.from_dict(config)
        experience, machine = self.train_config.experience, self.train_config.machine
        algorithm = self.train_config.meta.algorithm
        if ALGORITHMS[algorithm].trainer != META_TRAINER:
            raise ValueError(f"{algorithm} is no meta-learning algorithm: only train runs it, with its own trainer.")
        self.distribution: TaskDistribution = distribution or self.train_config.family()
        self.spec = self.train_config.policy_spec(self.distribution)
        if self.train_config.meta.imitate:
            baseline_policy(self.distribution, self.train_config.meta.imitate)
        if self._trial_info is None:
            gpus = learner_gpus(machine) * machine.num_learners
            check_resources(machine.num_workers, machine.num_learners, gpus)
        name = f"ssm-metarl/{self.train_config.task}/{self.trial_name}/{os.getpid()}-{time.monotonic_ns()}"
        seed = seed_for(experience.seed, Branch.INITIAL_WEIGHTS).generate_state(1)[0]
        horizon = self.distribution.horizon * experience.trial_episodes
        learner = self.spec, self.train_config.meta, machine, int(seed), horizon
        self.learner = LearnerGroup(*learner, name, self.processors) if machine.num_learners else Learner(*learner)
        self.pool = Pool(
            self.distribution,
            self.spec,
            num_workers=machine.num_workers,
            name=name,
            trial_episodes=experience.trial_episodes,
            sample_timeout_s=machine.sample_timeout_s,
            processors=self.processors,
        )
        if isinstance(self.learner, LearnerGroup):
            self.pool.on_wait(self.learner.waited)
            self.learner.homeless = partial(
                self.pool.make_room, ends=self._trial_info is None, gpus=learner_gpus(machine)
            )
        self.telemetry = Telemetry(self.trial_name, self.train_config.task)
        self.replay = ReplayBuffer(experience.replay_episodes) if experience.replay_episodes else None
        self.meta_iteration = 0
        self.env_steps = 0

    def step(self) -> dict[str, Any]:
        """One meta-iteration: collect, adapt, collect with the adapted policies, meta-update.

        Returns:
            `iteration`, `env_steps` (all so far), what `returns_metrics` says of the returns, `seconds` by phase,
            `restarts`, `timed_out_tasks`, `invalid_episodes` and the learner's statistics.

        Raises:
            EnvironmentFailure: more than a tenth of the support's or the query's episodes are invalid.
        """
        watch = Stopwatch(self.pool)
        collected, statistics = self._learn_whole(watch)
        self.meta_iteration += 1
        env_steps = sum(rollouts.num_steps for rollouts in collected)
        self.env_steps += env_steps
        returns = [float(np.nanmean(rollouts.returns())) for rollouts in collected]
        lengths = [float(rollouts.num_steps / max(rollouts.kept().sum(), 1)) for rollouts in collected]
        told = [(rollouts.succeeded(), rollouts.kept()) for rollouts in collected]
        # An environment may tell of a success alone, and a stage may have none.
        successes = [0.0 if own is None else float(own[kept].mean()) for own, kept in told]
        if all(own is None for own, _ in told):
            successes = []
        metrics = {
            "iteration": self.meta_iteration,
            "env_steps": self.env_steps,
            **returns_metrics(returns, lengths, watch.dropped_tasks(), successes),
            "seconds": watch.seconds(),
            **watch.losses(),
            **statistics,
            **({"replay_bytes": self.replay.nbytes} if self.replay is not None else {}),
        }
        self.telemetry.iteration(metrics, env_steps)
        return metrics

    def _learn_whole(self, watch: Stopwatch) -> tuple[list[Any], dict[str, float]]:
        """The rollouts of each stage, and what the update says; again where a node that held any of it was lost.

        Every number follows from the weights, the optimiser and the seeds, so that it does not matter how often.
        """
        before = self.checkpoint() if self.train_config.machine.num_learners else None
        for more in range(MOST_REPETITIONS, -1, -1):
            try:
                return self._learn(watch)
            except ObjectLostError as error:
                if before is None or not more:
                    raise
                _log.warning("Meta-iteration %d is repeated: %s", self.meta_iteration, str(error).splitlines()[-1])
                self._continue_from(before)
        raise AssertionError("the last repetition returns or raises")

    def _learn(self, watch: Stopwatch) -> tuple[list[Any], dict[str, float]]:
        """Collect, adapt and update once."""
        experience, learner, collector = self.train_config.experience, self.learner, self._collector()
        stages, collected = learner.collect(collector, experience.episodes, watch)
        with watch("update"):
            if self.meta_iteration < self.imitations:
                stages = [
                    stage.imitating(self._demonstrations(number, collected[number]))
                    for number, stage in enumerate(stages)
                ]
            statistics = learner.update(
                stages,
                progress=min(self.meta_iteration / experience.iterations, 1.0),
                seed=seed_for(experience.seed, Branch.MINIBATCHES, self.meta_iteration),
            )
            # Before the next shards are known, for these are cut as they were played; and kept when nothing can fail.
            kept = learner.first_episodes(collected[-1]) if self.replay is not None else []
            learner.observe(collected)
            if self.replay is not None:
                for record in kept:
                    self.replay.add(record)
        return collected, {"invalid_episodes": collector.invalid_episodes, **statistics}

    @property
    def imitations(self) -> int:
        """How many iterations at first imitate a baseline policy."""
        return self.train_config.meta.imitate_iterations if self.train_config.meta.imitate else 0

    def _demonstrations(self, stage: int, rollouts: Rollouts) -> Array:
        """What the baseline policy that is imitated would have done at each step, as actions of the policy."""
        experience = self.train_config.experience
        path = (Branch.DEMONSTRATIONS, self.meta_iteration, stage)
        nodes = [seed_for(experience.seed, *path, task) for task in range(rollouts.num_tasks)]
        generators = [np.random.default_rng(node) for node in nodes]
        trials = Trials(
            self.distribution, rollouts.tasks, rollouts.valid.shape[2], experience.trial_episodes, generators
        )
        player = baseline_policy(self.distribution, self.train_config.meta.imitate)
        actions = self.spec.env_actions(rollouts.actions)
        steps = (rollouts.observations, actions, rollouts.rewards, rollouts.starts)
        return self.spec.policy_actions(demonstrate(player, trials, *steps))

    def _collector(self) -> StageCollector:
        """What plays the tasks of this iteration, stage by stage."""
        seed, iteration = self.train_config.experience.seed, self.meta_iteration
        rng = np.random.default_rng(seed_for(seed, Branch.TASKS, iteration))
        tasks = self.distribution.sample(self.train_config.experience.meta_batch, rng, "train")

        def seeds(stage: int) -> list[np.random.SeedSequence]:
            return [seed_for(seed, Branch.ROLLOUTS, iteration, stage, task) for task in range(len(tasks))]

        last = self.train_config.meta.inner_steps
        return StageCollector(
            self.pool,
            tasks,
            seeds,
            lambda stage: "support" if stage < last else "query",
            shards=self.learner.pieces(len(tasks), self.train_config.experience.episodes),
            min_tasks=self.train_config.machine.min_tasks,
        )

    def checkpoint(self) -> Checkpoint:
        """All that continues this run, as it is now."""
        return Checkpoint(
            spec=self.spec,
            config=self.train_config.to_dict(),
            progress={
                "iteration": self.meta_iteration,
                "env_steps": self.env_steps,
                "longest": self.learner.longest,
                **({"normalizer": moments} if (moments := self.learner.normalizer.to_dict()) else {}),
            },
            policy=self.learner.weights(),
            optimizer=self.learner.optimizer_arrays(),
            replay=self.replay,
        )

    def save_checkpoint(self, checkpoint_dir: str) -> str:
        """Write a checkpoint folder (see `storage.checkpoint`); Tune calls it, and so does `train`."""
        save_checkpoint(Path(checkpoint_dir), self.checkpoint())
        return checkpoint_dir

    def load_checkpoint(self, checkpoint: str | dict[str, Any] | None) -> None:
        """Go on from a checkpoint of this trainer's sizes; learning rates stay those of the config.

        Raises:
            CheckpointError: the folder is damaged, or its policy has other sizes.
        """
        assert isinstance(checkpoint, str | Path), "checkpoints are folders"
        loaded = load_checkpoint(checkpoint)
        check_sizes(checkpoint, loaded.spec, self.spec)
        self._continue_from(loaded)

    def start_from(self, checkpoint: Checkpoint) -> None:
        """Take the weights of a checkpoint of this trainer's sizes, and the moments that they are normalised with."""
        self.learner.load(checkpoint.policy, {})
        self.learner.normalizer.load(checkpoint.progress.get("normalizer", {}))

    def change(self, options: Mapping[str, Any]) -> None:
        """Go on with other options from where the trainer is; a policy of other sizes is resized.

        Args:
            options: of `TrainConfig`, by name; the others stay.

        Raises:
            ValueError: an impossible value, or one that changes the policy's form; one sentence.
        """
        checkpoint, config = self.checkpoint(), self.train_config.replace(**options)
        if self.pool.num_workers:  # the cluster may have room for fewer or more than at first
            config = config.replace(num_workers=self.pool.num_workers)
        self.cleanup()
        self.setup({**config.to_dict(), "task_distribution": self.distribution})
        self.go_on_from(checkpoint)

    def go_on_from(self, checkpoint: Checkpoint) -> Resize | None:
        """Take parameters, moments and counters of a checkpoint, resized where its policy has other sizes.

        Returns:
            What the resize did; None where sizes are equal.
        """
        done = None
        if checkpoint.spec != self.spec:
            checkpoint, done = resized(checkpoint, self.spec, self.train_config.experience, self.distribution)
        self._continue_from(checkpoint)
        return done

    def _continue_from(self, checkpoint: Checkpoint) -> None:
        """Take parameters, moments and counters of a checkpoint of this trainer's sizes."""
        self.learner.load(checkpoint.policy, checkpoint.optimizer)
        self.learner.normalizer.load(checkpoint.progress.get("normalizer", {}))
        if self.replay is not None:
            self.replay = ReplayBuffer(self.replay.capacity)
            if checkpoint.replay is not None:
                self.replay.extend(checkpoint.replay)
        self.learner.expect(int(checkpoint.progress.get("longest", self.learner.longest)))
        self.meta_iteration = int(checkpoint.progress["iteration"])
        self.env_steps = int(checkpoint.progress["env_steps"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take new options in the same process (Tune's `reuse_actors`); parameters start anew, until a restore."""
        self.cleanup()
        self.setup(new_config)
        return True

    def cleanup(self) -> None:
        """End workers and learners."""
        self.pool.close()
        self.learner.close()

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> PlacementGroupFactory:
        """One CPU for the trainer, a learner and a worker each, spread over nodes.

        And a GPU for each learner that computes on one, or for the trainer where that learns itself.
        """
        known = {name: config[name] for name in ("device", "num_learners", "num_workers") if name in config}
        machine = MachineConfig(**known)
        gpus = learner_gpus(machine)
        learner = {"CPU": 1.0, **({"GPU": gpus} if gpus else {})}
        learners = [{"CPU": 1.0}, *[learner] * machine.num_learners] if machine.num_learners else [learner]
        return PlacementGroupFactory([*learners, *[{"CPU": 1.0}] * machine.num_workers], strategy="SPREAD")

    def _setup_logdir(self) -> None:
        # Alone, Trainable would make an empty folder under ~/ray_results for every trainer.
        if self._storage:
            super()._setup_logdir()


def check_sizes(checkpoint: str | Path, found: PolicySpec, wanted: PolicySpec) -> None:
    """Refuse a checkpoint whose policy is not of the wanted sizes and form.

    Raises:
        CheckpointError: one sentence with all differences.
    """
    want = wanted.to_dict()
    differences = [
        f"{name} {value!r} instead of {want[name]!r}" for name, value in found.to_dict().items() if value != want[name]
    ]
    if differences:
        raise CheckpointError(f"{checkpoint}: its policy has {', '.join(differences)}.")


def with_critic(checkpoint: Checkpoint, spec: PolicySpec) -> Checkpoint:
    """The checkpoint with the critic of another baseline: one that is told `spec.task_size` numbers, new, or none."""
    if checkpoint.spec.task_size == spec.task_size:
        return checkpoint
    moments = {name: value for name, value in checkpoint.progress.get("normalizer", {}).items() if name != "tasks"}
    if spec.task_size:
        moments["tasks"] = RunningMoments(spec.task_size).to_dict()
    own = replace(checkpoint.spec, task_size=spec.task_size)
    kept = {name: value for name, value in checkpoint.policy.items() if not name.startswith(("critic.", "task_"))}
    return replace(
        checkpoint,
        spec=own,
        policy={name: kept.get(name, value) for name, value in SSMPolicy(own).numpy_weights().items()},
        optimizer={},
        progress={**checkpoint.progress, "normalizer": moments},
    )
