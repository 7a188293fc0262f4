"""The trainer of one member: it does what it is assigned, from a checkpoint of any size, and reports each iteration."""

from __future__ import annotations

import copy
import functools
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from ray.tune import PlacementGroupFactory

from ssm_metarl.algorithms.rollouts import Array, Rollouts
from ssm_metarl.distributed.collection import StageCollector
from ssm_metarl.distributed.play import EnvironmentFailure
from ssm_metarl.distributed.references import here
from ssm_metarl.distributed.trainer import MetaTrainer
from ssm_metarl.evaluation.evaluate import evaluate_policy
from ssm_metarl.storage.checkpoint import load_checkpoint, save_checkpoint
from ssm_metarl.storage.contents import Checkpoint
from ssm_metarl.storage.mirror import local_folder, write_folder
from ssm_metarl.storage.uri import below
from ssm_metarl.tuning.records import START, Assignment, Play, Report, mean_name

MEAN = "mean_iterations"
"""In a checkpoint's progress: over how many iterations its weights are averaged."""


class Exchange(Protocol):
    """Where members get their assignments, and offer rollouts to each other."""

    def next(self, member: int, after: int) -> dict[str, Any] | None:
        """The member's assignment, once there is one with a number above `after`; None: the run is over."""

    def threads(self, member: int) -> int | None:
        """Of the member's learner now, which has the processors of members without work; None: as in its config."""

    def offer(self, key: str, rollouts: Sequence[Rollouts]) -> None:
        """Offer rollouts under a name."""

    def fetch(self, key: str) -> Sequence[Rollouts]:
        """Rollouts that were offered, stage by stage; empty where they are gone."""


class MemberTrainer(MetaTrainer):
    """A `MetaTrainer` driven by `RecursiveSelfImprovement`; a `step` is a meta-iteration and what is due after it.

    It alone takes a checkpoint of another size, which `resize` fits to its own.

    Args:
        config: "member", its number; "exchange", an `Exchange` or the name of the actor that is one; "archive", the
            folder of the run's checkpoints, a path or a URI; "mean_iterations", see `EvolveConfig`; "machine", options
            that win over those of an assignment; and optionally "task_distribution".
    """

    def setup(self, config: dict[str, Any]) -> None:
        """Wait for the first assignment before anything is built."""
        from ssm_metarl.tuning.mailbox import connect  # only here: an actor of Ray, which is not always there

        self.member = int(config["member"])
        self._archive, self._reach = str(config["archive"]), int(config["mean_iterations"])
        self._constants = {**config["machine"], "task_distribution": config.get("task_distribution")}
        machine, self.processors = config["machine"], float(config.get("share", 1.0))
        processors = [self.processors] * (1 + machine.get("num_workers", 0) + machine.get("num_learners", 0))
        self._exchange: Exchange = connect(config["exchange"], self.member, processors)
        self._held: tuple[str | None, dict[str, Any]] | None = None
        self._done = 0
        self._built = False
        self._last_number = -1
        self._work: Iterator[Report] | None = None
        self._metrics: dict[str, Any] = {"return_before": math.nan, "return_after": math.nan}

    def step(self) -> dict[str, Any]:
        """Carry the assignment on by a meta-iteration; without one, wait for it.

        Returns:
            "report", a `Report` as JSON; "done" at the end of the run; and the iteration's metrics.
        """
        if self._work is None:
            values = self._exchange.next(self.member, self._last_number)
            if values is None:
                return {"done": True, **self._metrics}
            assignment = Assignment.from_dict(values)
            self._last_number = assignment.number
            self._work = self.carry_out(assignment)
        report = next(self._work)
        if report.ended or report.failure is not None:
            self._work = None
        return {"done": False, **self._metrics, "report": report.to_json()}

    def carry_out(self, assignment: Assignment) -> Iterator[Report]:
        """Do what is assigned, a report after every meta-iteration; the last one has ended or failed."""
        begin, self._report = time.perf_counter(), Report(number=assignment.number)
        try:
            self._take_up(assignment)
            while True:
                self._count("resizing", begin)
                if self._done < assignment.iterations:
                    self._iterate(assignment)
                self._report.iterations = self._done
                if self._done >= assignment.iterations:
                    self._finish(assignment)
                report, self._report = self._report, Report(number=assignment.number)
                yield report
                if report.ended:
                    return
                begin = time.perf_counter()
        except (FloatingPointError, EnvironmentFailure) as error:
            # A policy that diverged shows either way; an environment that is broken fails again, until all stops.
            self._held = None
            self._report.failure = str(error)
            yield self._report

    def _take_up(self, assignment: Assignment) -> None:
        """Hold what the assignment starts from: what is held already, or its checkpoint, or initial weights."""
        if self._held == (assignment.start, assignment.config) and self._done <= assignment.iterations:
            return
        self.cleanup()
        super().setup({**assignment.config, **self._constants})
        self._built = True
        self._mean: tuple[int, dict[str, Array]] = (0, {})
        if assignment.start is not None:
            self._load(assignment)
        self._held, self._done = (assignment.start, assignment.config), 0

    def _load(self, assignment: Assignment) -> None:
        """The checkpoint that an assignment starts from, of any size, and the running mean beside it."""
        assert assignment.start is not None
        with tempfile.TemporaryDirectory() as folder:
            loaded = load_checkpoint(local_folder(below(self._archive, assignment.start), Path(folder)))
            resize = self.go_on_from(loaded)
            if resize is None and assignment.start != START:
                mean = load_checkpoint(local_folder(below(self._archive, mean_name(assignment.start)), Path(folder)))
                self._mean = int(mean.progress[MEAN]), mean.policy
            else:
                self._mean = 1, self.learner.weights()
            if resize is not None:
                self._report.resize_error = resize.error
                self._report.assessed += resize.env_steps
        self.learner.check_rates(self.train_config.meta.inner_lr, self.train_config.meta.outer_lr)

    def _iterate(self, assignment: Assignment) -> None:
        """A meta-iteration, what it cost and what it brought."""
        begin, before = time.perf_counter(), self.env_steps
        if (threads := self._exchange.threads(self.member)) is not None:  # others begin and end meanwhile
            self.learner.use_threads(threads)
        first = self._done == 0
        self._given = self._exchange.fetch(assignment.take)[: assignment.stages] if first and assignment.take else ()
        self._metrics = super().step()
        self._done += 1
        count, mean = self._mean
        share, weights = np.float32(max(1 / (count + 1), 1 / self._reach)), self.learner.weights()
        self._mean = count + 1, {name: old + share * (weights[name] - old) for name, old in (mean or weights).items()}
        if first and assignment.share:
            self._exchange.offer(assignment.share, [here(rollouts) for rollouts in self._collected.collected])
        # The incumbent's, and counted with it, also where they had to be played again because its process is gone.
        shared = self._collected.collected[: assignment.stages] if first and assignment.take else []
        taken = sum(rollouts.num_steps for rollouts in shared)
        report = self._report
        report.returns = np.stack([np.nanmean(rollouts.returns(), 1) for rollouts in self._collected.collected])
        report.spent, self._given = self.env_steps - before - taken, ()
        self._count("training", begin)

    def _collector(self) -> StageCollector:
        """As in training, but for stages that another member has played."""
        self._collected = super()._collector()
        self._collected.given = self._given
        return self._collected

    def _finish(self, assignment: Assignment) -> None:
        """Write the checkpoint and play what is to be assessed."""
        begin = time.perf_counter()
        if assignment.checkpoint is not None:
            last = self.checkpoint()
            count, mean = self._mean
            averaged = Checkpoint(
                last.spec, last.config, {**last.progress, MEAN: count}, mean or last.policy, {}, last.replay
            )
            for name, checkpoint in ((mean_name(assignment.checkpoint), averaged), (assignment.checkpoint, last)):
                write_folder(below(self._archive, name), functools.partial(save_checkpoint, checkpoint=checkpoint))
            self._held, self._done = (assignment.checkpoint, assignment.config), 0
        for play in assignment.plays:
            self._report.plays[play.key] = self._play(play, assignment.seed)
        self._report.ended = True
        self._count("assessment", begin)

    def _play(self, play: Play, seed: int) -> Array:
        """Returns [S+1, V] of the weights, or of their running mean, on held-out tasks."""
        policy = copy.deepcopy(self.learner.policy)
        if play.policy == "mean":
            policy.load_numpy(self._mean[1])
        evaluation = evaluate_policy(
            policy,
            self.train_config,
            self.distribution,
            self.pool,
            split=play.split if play.split in self.distribution.splits else "validation",
            num_tasks=play.tasks,
            steps=self.train_config.meta.inner_steps,
            episodes=self.train_config.experience.episodes,
            seed=seed,
        )
        self._report.assessed += evaluation.environment_steps
        return evaluation.returns.T

    def _count(self, phase: str, begin: float) -> None:
        """Seconds of a phase since `begin`, and where the trainer is."""
        seconds = self._report.seconds
        seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - begin
        self._report.iteration, self._report.env_steps = self.meta_iteration, self.env_steps

    def save_checkpoint(self, checkpoint_dir: str) -> str:
        """Nothing for Tune, which may ask before anything is built: what counts is in the run's archive."""
        return checkpoint_dir

    def load_checkpoint(self, checkpoint: str | dict[str, Any] | None) -> None:
        """Nothing from Tune: an assignment says what to start from."""

    def cleanup(self) -> None:
        """End the workers."""
        if self._built:
            super().cleanup()
            self._built = False

    @classmethod
    def default_resource_request(cls, config: Mapping[str, Any]) -> PlacementGroupFactory:
        """As `MetaTrainer`, but for the share of a processor that a member has where there are fewer than members."""
        machine = config["machine"]
        request = super().default_resource_request(dict(machine))
        bundles = [{**bundle, "CPU": bundle["CPU"] * config.get("share", 1.0)} for bundle in request.bundles]
        return PlacementGroupFactory(bundles, strategy=request.strategy)
