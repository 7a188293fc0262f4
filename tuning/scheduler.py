"""The decisions of `Population` carried out in Ray Tune, as a population-based-training scheduler."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import PopulationBasedTraining, TrialScheduler

from ssm_metarl.config import TrainConfig
from ssm_metarl.distributed.cluster import start_ray
from ssm_metarl.distributed.telemetry import Telemetry
from ssm_metarl.tasks import TaskDistribution
from ssm_metarl.tuning.config import EvolveConfig
from ssm_metarl.tuning.mailbox import RayExchange, start_mailbox
from ssm_metarl.tuning.member_trainer import MemberTrainer
from ssm_metarl.tuning.population import Population
from ssm_metarl.tuning.records import Report, Status
from ssm_metarl.tuning.run import MACHINE, Run, open_run

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController

_log = logging.getLogger(__name__)

PATIENCE_S = 120.0
"""Seconds that the others wait for a member whose process is gone, before they go on without it."""


class RecursiveSelfImprovement(PopulationBasedTraining):
    """Improves one policy by races against challengers; see `EvolveConfig` for the rules.

    Members of the population are trials of Tune. A challenger exploits the incumbent's checkpoint and explores one
    option, a loser's member is rolled back to the incumbent. With a `Tuner` of one's own:

        improvement = RecursiveSelfImprovement.for_config(
            TrainConfig.for_task("navigation-2d"), EvolveConfig(cycles=2), "runs/improved"
        )
        results = tune.Tuner(
            improvement.trainable,
            param_space=improvement.param_space,
            tune_config=tune.TuneConfig(scheduler=improvement),
        ).fit()
        print(improvement.population.finished, improvement.checkpoint)

    The experiment ends by itself. Tune's own checkpoints are not used: a member goes on, also after its process died,
    from the run's own archive.

    Args:
        population: the decisions.
        param_space: of the trials.
        trainable: class of the trials.
        on_boundary: called whenever something was decided.
    """

    def __init__(
        self,
        population: Population,
        param_space: Mapping[str, Any],
        trainable: type[tune.Trainable] = MemberTrainer,
        on_boundary: Callable[[], object] = lambda: None,
    ) -> None:
        super().__init__(
            time_attr="training_iteration",
            metric="return_after",
            mode="max",
            custom_explore_fn=dict,  # never called: Population proposes
            synch=True,
        )
        self.population, self.param_space, self.trainable = population, dict(param_space), trainable
        self.checkpoint: Path | None = None
        self._on_boundary = on_boundary
        self._trials: dict[int, Trial] = {}
        self._waiting_since: dict[int, float] = {}
        self._exchange: RayExchange | None = None
        self._notes: Any = None  # the call that is answered when a member has something to tell
        self._sent: dict[int, int] = {}
        self._logged = -1

    @classmethod
    def for_config(
        cls,
        config: TrainConfig,
        rules: EvolveConfig | None = None,
        run_dir: str | Path = "runs/evolve",
        *,
        start: str | Path | None = None,
        resume: bool = False,
        distribution: TaskDistribution | None = None,
        mirror: str | None = None,
        trainable: type[tune.Trainable] = MemberTrainer,
    ) -> RecursiveSelfImprovement:
        """The scheduler of a run in a folder, with the trainable and parameter space that a `Tuner` needs beside it.

        Ray is started unless it is, for the members share its processors.

        Args:
            config: of the incumbent at first; `iterations`, `lr_schedule` and `learner_threads` have no effect.
            rules: of the run.
            run_dir: new or empty, unless `resume`; the best policy is exported there.
            start: a checkpoint, or a run for its best one, that the incumbent starts from; None: initial weights.
            resume: go on with the run in the folder.
            distribution: the family itself, instead of the registered one that `config.task` names.
            mirror: URI of storage that all nodes reach, where the run is copied with every decision; without it
                `run_dir` must be a folder that all nodes share, unless there is only one.
            trainable: class of the members.

        Raises:
            ValueError: bad input, in one sentence.
            CheckpointError: `start` is damaged.
        """
        run = open_run(config, rules or EvolveConfig(), Path(run_dir), start, resume, distribution, mirror)
        start_ray(run.config.machine.num_workers, run.config.machine.num_learners, always=True)
        return cls.of_run(run, trainable)

    @classmethod
    def of_run(cls, run: Run, trainable: type[tune.Trainable] = MemberTrainer) -> RecursiveSelfImprovement:
        """The scheduler of an open run, once Ray is started."""
        machine = {name: value for name, value in run.config.to_dict().items() if name in MACHINE}
        processes = 1 + run.config.machine.num_workers + run.config.machine.num_learners
        space = {
            "member": tune.grid_search(list(range(run.population.config.members))),
            "exchange": f"ssm-metarl/evolve/{uuid.uuid4().hex}",
            "archive": run.population.store.archive,
            "mean_iterations": run.population.config.mean_iterations,
            "machine": machine,
            "share": _share(run.population.config.members, processes),
            "task_distribution": run.family,
        }
        scheduler = cls(run.population, space, trainable)

        population, telemetry = run.population, Telemetry(run.folder.name, run.config.task)
        reported = len(population.store.events())

        def on_boundary() -> None:
            nonlocal reported
            scheduler.checkpoint = run.export() or scheduler.checkpoint
            events, best = population.store.events(), population.archive.get(population.progress.best or "")
            telemetry.decisions(population.progress.cycle, best.level if best else None, events[reported:])
            reported = len(events)

        scheduler._on_boundary = on_boundary
        return scheduler

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """A metric of the experiment is for its results; decisions do not depend on it."""
        return True

    # --- What Tune calls ------------------------------------------------------------------------------------

    def on_trial_add(self, tune_controller: TuneController, trial: Trial) -> None:
        """A member is new, or comes back after its process died: either way it asks for its assignment."""
        self._trial_state.setdefault(trial, None)  # the parent class's, which this one does not use
        self._trials[int(trial.config["member"])] = trial
        if self._exchange is None:
            self._exchange = start_mailbox(trial.config["exchange"])
            if not self.population.finished:
                self.population.begin()
        self._deliver()

    def on_trial_result(self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]) -> str:
        """Take a report; once all that were asked have ended, new assignments follow from it."""
        if "report" in result:
            self.population.report(int(trial.config["member"]), Report.from_json(result["report"]))
        self._deliver()
        return TrialScheduler.STOP if self.population.finished else TrialScheduler.CONTINUE

    def on_trial_error(self, tune_controller: TuneController, trial: Trial) -> None:
        """A member's process died; Tune starts it again, unless it was told not to."""
        self.population.crashed(int(trial.config["member"]), _last_error(trial))
        self._deliver()

    def on_trial_complete(self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]) -> None:
        """A member was stopped while it ran."""
        self._gone(int(trial.config["member"]), "it was stopped")

    def on_trial_remove(self, tune_controller: TuneController, trial: Trial) -> None:
        """A member was stopped while it waited."""
        self._gone(int(trial.config["member"]), "it was stopped")

    def choose_trial_to_run(self, tune_controller: TuneController) -> Trial | None:
        """The first member without a process; every one is to have its own."""
        self._look_after_members()
        self._relay()
        idle = (Trial.PENDING, Trial.PAUSED)
        waiting = [trial for _, trial in sorted(self._trials.items()) if trial.status in idle]
        return next(iter(waiting), None)

    def debug_string(self) -> str:
        """One line for Tune's status."""
        progress = self.population.progress
        return f"RecursiveSelfImprovement: {progress.phase}, cycle {progress.cycle}, best {progress.best}"

    def __getstate__(self) -> dict[str, Any]:
        # Tune saves its scheduler with every state of its own; what counts of this one is in the run's folder.
        return {"param_space": {}, "trainable": self.trainable}

    # --- Members --------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Have all members end, also those that wait for an assignment."""
        if self._exchange is not None:
            self._exchange.actor.close.remote()

    def _deliver(self) -> None:
        """Hand out what the population has assigned since the last time."""
        if self._exchange is None:
            return
        assignments = self.population.assignments
        numbers = {member: assignment.number for member, assignment in assignments.items()}
        if numbers != self._sent:
            self._exchange.actor.put.remote({m: assignment.to_dict() for m, assignment in assignments.items()})
            self._sent = numbers
        if self.population.boundaries != self._logged:
            self._logged = self.population.boundaries
            self._on_boundary()
        if self.population.finished:
            self.close()

    def _look_after_members(self) -> None:
        """Those whose process does not come back are given up; those that come back late are had again."""
        now = time.monotonic()
        for member, trial in self._trials.items():
            if trial.status == Trial.RUNNING:
                self._waiting_since.pop(member, None)
                if self.population.statuses[member] == Status.GONE:
                    self.population.statuses[member] = Status.IDLE
            elif trial.status in (Trial.ERROR, Trial.TERMINATED):
                self._gone(member, _last_error(trial))
            elif now - self._waiting_since.setdefault(member, now) > PATIENCE_S:
                self._gone(member, f"no process for it within {PATIENCE_S:g} s")

    def _relay(self) -> None:
        """Tell what members had to tell."""
        if self._exchange is None or self.population.finished:
            return
        if self._notes is None:
            self._notes = self._exchange.actor.notes.remote()
        elif ray.wait([self._notes], timeout=0)[0]:
            for line in ray.get(self._notes):
                _log.warning(line)
            self._notes = None

    def _gone(self, member: int, reason: str) -> None:
        if not self.population.finished:
            self.population.gone(member, reason)
            self._deliver()


def _share(members: int, processes: int) -> float:
    """Of a processor that each of so many processes of a member gets, so that all members run at the same time."""
    if not ray.is_initialized():
        return 1.0
    processors = float(ray.cluster_resources().get("CPU", 1.0))
    return min(1.0, int(1000 * processors / (members * processes)) / 1000)


def _last_error(trial: Trial) -> str:
    """The last line of what Tune wrote down of a trial's failure."""
    path = trial.error_file
    lines = Path(path).read_text().split("\n") if path and Path(path).is_file() else []
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "its process died")
