"""The trainer of one trial: meta-iterations counted in generations, assessed at their ends, of any size."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssm_metarl.algorithms.inputs import policy_inputs
from ssm_metarl.algorithms.resize import resize
from ssm_metarl.algorithms.rollouts import Rollouts
from ssm_metarl.distributed.collection import EnvironmentFailure
from ssm_metarl.distributed.pool import Pool
from ssm_metarl.distributed.trainer import MetaTrainer
from ssm_metarl.evaluation.evaluate import evaluate_policy
from ssm_metarl.seeds import Branch, seed_for
from ssm_metarl.storage.checkpoint import load_checkpoint
from ssm_metarl.storage.contents import Checkpoint
from ssm_metarl.storage.mirror import write_folder
from ssm_metarl.tuning.metrics import Assessment, normalise
from ssm_metarl.tuning.population import Report

PROBE_TASKS, PROBE_EPISODES = 10, 2
"""Rollouts of the old policy on which a resize measures what contributes, and its error."""


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What a trial is to do in a generation; `Evolution.assignment` makes it.

    Attributes:
        trial, generation: name the checkpoint at the end.
        budget: environment steps of training, to the nearest meta-iteration; 0: assess only.
        probation: assess at half the budget, too.
        checkpoints: folder of the run's archive, a path or a URI.
        seed: of the validation tasks and rollouts, equal for all trials.
        history: [lineage_steps, post-adaptation values by validation task] at the generation's start, if known.
        validation_tasks, validation_episodes, validation_steps: see `EvolveConfig`.
    """

    trial: int
    generation: int
    budget: int
    probation: bool
    checkpoints: str
    seed: int
    history: list[Any]
    validation_tasks: int
    validation_episodes: int
    validation_steps: int

    @property
    def checkpoint(self) -> str:
        """Name of the checkpoint at the generation's end."""
        return f"generation_{self.generation:04d}_trial_{self.trial}"


class EvolvingTrainer(MetaTrainer):
    """A `MetaTrainer` driven by `RecursiveSelfImprovement`; a `step` is a meta-iteration and what is due.

    Its config is that of `MetaTrainer` with the entry "assignment". It alone takes a checkpoint of another size,
    which `morph.resize` fits to its own.
    """

    def setup(self, config: dict[str, Any]) -> None:
        """Build learner and workers for an assignment."""
        config = dict(config)
        config.pop("slot", None)  # Tune's grid search needs an entry that numbers the trials
        self.assignment = Assignment(**config.pop("assignment"))
        self._history = [(int(steps), list(values)) for steps, values in self.assignment.history]
        self._spent = self._trained = self._last = 0
        self._checked = not self.assignment.probation
        self._extra_seconds = 0.0
        self.resize_error: float | None = None
        super().setup(config)

    def step(self) -> dict[str, Any]:
        """Train one meta-iteration; at the end of the budget assess and write the checkpoint.

        Returns:
            "report": one `Report` as a dict, in a list, which Tune passes on as it is; "composite" for Tune's own
            checks, always 0; and the iteration's metrics.
        """
        metrics: dict[str, Any] = {}
        assessment, ended, failure = None, False, None
        begin = trained_at = time.perf_counter()
        try:
            if self._goes_on():
                metrics = self._train()
            trained_at = time.perf_counter()
            ended = not self._goes_on()
            if ended or (not self._checked and 2 * self._trained >= self.assignment.budget):
                assessment = self._assess()
                self._checked = True
            if ended:
                place = f"{self.assignment.checkpoints}/{self.assignment.checkpoint}"
                write_folder(place, lambda folder: self.save_checkpoint(str(folder)))
        except (FloatingPointError, EnvironmentFailure) as error:
            # A policy that diverged shows either way; an environment that is broken fails again, until all stops.
            assessment, ended, failure = None, False, str(error)
        report = Report(
            spent=self._spent,
            trained=self._trained,
            lineage_steps=self.env_steps,
            assessment=assessment.to_dict() if assessment else None,
            ended=ended,
            checkpoint=self.assignment.checkpoint if ended else None,
            failure=failure,
            resize_error=self.resize_error,
            seconds={
                "training": trained_at - begin,
                "assessment": time.perf_counter() - trained_at + self._extra_seconds,
            },
        )
        self._extra_seconds = 0.0
        return {**metrics, "report": [asdict(report)], "composite": 0.0}

    def _goes_on(self) -> bool:
        """Whether another meta-iteration, as long as the last one, ends nearer to the budget than it is now."""
        return 2 * self._trained + self._last < 2 * self.assignment.budget

    def _train(self) -> dict[str, Any]:
        """One meta-iteration, and what it cost."""
        before = self.env_steps
        metrics = super().step()
        self._last = self.env_steps - before
        self._trained += self._last
        self._spent += self._last
        return metrics

    def load_checkpoint(self, checkpoint: str | dict[str, Any] | None) -> None:
        """Go on from a checkpoint of any size; the config's sizes and learning rates win.

        Raises:
            CheckpointError: the folder is damaged.
            ValueError: its policy differs in more than its sizes.
        """
        begin = time.perf_counter()
        assert isinstance(checkpoint, str | Path), "checkpoints are folders"
        loaded = load_checkpoint(checkpoint)
        if loaded.spec != self.spec:
            loaded = self._resized(loaded)
        self._continue_from(loaded)
        self.learner.check_rates(self.train_config.meta.inner_lr, self.train_config.meta.outer_lr)
        self._extra_seconds += time.perf_counter() - begin

    def _resized(self, loaded: Checkpoint) -> Checkpoint:
        """The checkpoint's policy and moments in this trainer's sizes."""
        rollouts = self._probe(loaded)
        root = self.train_config.experience.seed
        node = seed_for(root, Branch.RESIZE, self.assignment.generation, self.assignment.trial)
        seed = int(node.generate_state(1)[0])
        morph = resize(
            loaded.spec,
            loaded.policy,
            loaded.optimizer,
            self.spec,
            policy_inputs(loaded.spec, rollouts),
            seed,
            rollouts.resets,
        )
        self.resize_error = morph.error
        return Checkpoint(morph.spec, loaded.config, loaded.progress, morph.policy, morph.optimizer, loaded.replay)

    def _probe(self, loaded: Checkpoint) -> Rollouts:
        """A few training episodes of the policy as it was."""
        key, seed = (self.assignment.generation, self.assignment.trial), self.train_config.experience.seed
        tasks = self.distribution.sample(
            PROBE_TASKS, np.random.default_rng(seed_for(seed, Branch.TASKS, *key, 0)), "train"
        )
        seeds = [seed_for(seed, Branch.ROLLOUTS, *key, 0, 0, task) for task in range(PROBE_TASKS)]
        episodes = self.train_config.experience.trial_episodes
        with Pool(self.distribution, loaded.spec, num_workers=0, trial_episodes=episodes) as pool:
            rollouts = pool.collect(loaded.policy, tasks, seeds, PROBE_EPISODES)
        self._spent += rollouts.num_steps
        return rollouts

    def _assess(self) -> Assessment:
        """Returns on the fixed validation tasks, and on shifted ones where the family has them."""
        validation = self._evaluate("validation")
        shifted = self._evaluate("shifted") if "shifted" in self.distribution.splits else None
        # Only the generation's start and this moment: a check in between, which not every trial has, must not count.
        history = [*self._history, (self.env_steps, validation[:, -1])]
        return Assessment(
            validation=validation,
            shifted=shifted,
            history=np.array([values for _, values in history], np.float64),
            history_steps=np.array([steps for steps, _ in history], np.int64),
        )

    def _evaluate(self, split: str) -> np.ndarray[Any, Any]:
        assignment = self.assignment
        evaluation = evaluate_policy(
            self.learner.policy,
            self.train_config,
            self.distribution,
            self.pool,
            split=split,
            num_tasks=assignment.validation_tasks,
            steps=assignment.validation_steps,
            episodes=assignment.validation_episodes,
            seed=assignment.seed,
        )
        self._spent += evaluation.environment_steps
        # A task that a policy lost altogether counts as played at random: diverging must not make a comparison easier.
        returns = evaluation.returns / self.train_config.experience.trial_episodes
        return np.nan_to_num(normalise(returns, self.distribution.reference), nan=0.0)
