"""The decisions of `Evolution` carried out in Ray Tune, as a population-based-training scheduler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.train import Checkpoint
from ray.train._internal.session import _TrainingResult
from ray.tune.experiment import Trial
from ray.tune.experiment.trial import _TrialInfo
from ray.tune.schedulers import PopulationBasedTraining, TrialScheduler
from ray.tune.trainable.trainable import TRIAL_INFO

from ssm_metarl.tuning.evolution import Evolution
from ssm_metarl.tuning.population import Report

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController


class RecursiveSelfImprovement(PopulationBasedTraining):
    """Evolves sizes and learning rates in synchronous generations and rolls back what does not help.

    Every trial is a slot of the population, numbered by its config's "slot"; the scheduler gives it the rest of its
    config and the checkpoint to start from. Tune calls `on_trial_result` with every report of `EvolvingTrainer`:

        scheduler = RecursiveSelfImprovement(evolution)
        Tuner(
            EvolvingTrainer,
            param_space={"slot": tune.grid_search(list(range(population)))},
            tune_config=TuneConfig(scheduler=scheduler, reuse_actors=True),
        ).fit()

    Tune's own checkpoints are not used: a trial goes on, also after its process died, from the run's own archive.

    Args:
        evolution: the population.
        constants: entries of every trial's config that win over the slot's own, such as "task_distribution".
        on_border: called after every generation's decisions.
        synch: must be True.

    Raises:
        ValueError: for `synch=False`.
    """

    def __init__(
        self,
        evolution: Evolution,
        constants: Mapping[str, Any] | None = None,
        *,
        on_border: Callable[[], object] = lambda: None,
        synch: bool = True,
    ) -> None:
        if not synch:
            raise ValueError(
                "RecursiveSelfImprovement judges a child beside its parent, which needs synchronous generations: "
                "synch must be True."
            )
        super().__init__(
            time_attr="training_iteration",
            metric="composite",
            mode="max",
            custom_explore_fn=dict,  # never called: Evolution proposes
            synch=True,
        )
        self.evolution = evolution
        self._constants, self._on_border = dict(constants or {}), on_border
        self._trials: dict[int, Trial] = {}

    def on_trial_add(self, tune_controller: TuneController, trial: Trial) -> None:
        """A trial is new, or comes back after its process died: either way it gets its slot's assignment."""
        self._trial_state.setdefault(trial, None)  # the parent class's, which this one does not use
        slot = int(trial.config["slot"])
        self._trials[slot] = trial
        self._assign(slot)

    def on_trial_result(self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]) -> str:
        """Take a report; at the border let the population decide, and start every trial's next assignment."""
        slot = self._slot(trial)
        answer = self.evolution.report(slot, Report(**result["report"][0]))
        if self.evolution.finished:
            return TrialScheduler.STOP
        if answer == "continue":
            return TrialScheduler.CONTINUE
        if answer == "restart":
            self._start(tune_controller, slot)
        else:
            if any(self._has_work(other) for other in tune_controller.get_trials()):
                # Free its processor. Without a checkpoint of Tune's: the trainer has written its own.
                tune_controller.pause_trial(trial, should_checkpoint=False)
            self._advance_if_ready(tune_controller)
        return TrialScheduler.NOOP

    def on_trial_error(self, tune_controller: TuneController, trial: Trial) -> None:
        """A trial's process died. Tune has marked it as failed already if it is going to start it again."""
        slot = self._slot(trial)
        waits = trial.status == Trial.PENDING
        if waits and trial not in _controller(tune_controller)._trial_to_actor:
            # It died while Tune gave it another trial's process. Tune counts that twice, for the process and for the
            # reset that went with it, the second time as the end of the trial that it has just had back: see _revive.
            trial.run_metadata.num_failures -= 1
            return
        in_reset = waits and trial.run_metadata.num_failures <= trial.max_failures
        if trial.status == Trial.ERROR or in_reset:
            self.evolution.crashed(slot, _last_error(trial))
            for other in tune_controller.get_trials():
                # The processor that it had may be gone: those that only wait must not keep theirs.
                if other.status == Trial.RUNNING and self.evolution.slots[self._slot(other)].ended:
                    tune_controller.pause_trial(other, should_checkpoint=False)
        else:
            self._remove(tune_controller, slot, _last_error(trial))

    def on_trial_complete(self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]) -> None:
        """A trial was stopped while it ran."""
        self._remove(tune_controller, self._slot(trial), "it was stopped")

    def on_trial_remove(self, tune_controller: TuneController, trial: Trial) -> None:
        """A trial was stopped while it waited."""
        self._remove(tune_controller, self._slot(trial), "it was stopped")

    def choose_trial_to_run(self, tune_controller: TuneController) -> Trial | None:
        """A trial that has training to do in this generation; those at the border wait."""
        if self.evolution.finished:
            return None
        controller = _controller(tune_controller)
        self._revive(controller)
        waiting = [trial for trial in controller.get_trials() if self._has_work(trial)]
        # The largest first, so that a generation does not end with one processor busy and the others idle.
        waiting.sort(key=lambda trial: -_work(self.evolution.slots[self._slot(trial)].config))
        # Those for which Tune has not asked for a process yet come first: processes start side by side.
        asked = (controller._staged_trials, controller._trial_to_actor)
        return next((trial for trial in waiting if not any(trial in some for some in asked)), next(iter(waiting), None))

    def _revive(self, controller: Any) -> None:
        """Have trials back that Tune gave up although their slots live on, or that wait for a process it let go."""
        for slot in self.evolution.living:
            trial = self._trials.get(slot.id)
            if trial is not None and trial.status == Trial.ERROR:
                controller._resetting_trials.discard(trial)
                controller._set_trial_status(trial, Trial.PENDING)
                controller._live_trials.add(trial)
                self._assign(slot.id)
        for trial in [trial for trial in controller._staged_trials if trial not in controller._trial_to_actor]:
            # Asked for, then gone with a failed reset: Tune would ask for no other, only take one that is left over.
            controller._staged_trials.remove(trial)
            controller._actor_cache.decrease_max(trial.placement_group_factory)

    def debug_string(self) -> str:
        """One line for Tune's status."""
        return f"RecursiveSelfImprovement: generation {self.evolution.generation}, best {self.evolution.best}"

    def _slot(self, trial: Trial) -> int:
        return int(trial.config["slot"])

    def _has_work(self, trial: Trial) -> bool:
        """Whether a trial without a process of its own has training to do in this generation."""
        idle = trial.status in (Trial.PENDING, Trial.PAUSED)
        return idle and not self.evolution.slots[self._slot(trial)].ended

    def _remove(self, tune_controller: TuneController, slot: int, reason: str) -> None:
        """A trial does not come back: those that wait for it must not wait for ever."""
        if self.evolution.finished or self.evolution.slots[slot].status == "dead":
            return
        self.evolution.died(slot, reason)
        self._advance_if_ready(tune_controller)

    def _advance_if_ready(self, tune_controller: TuneController) -> None:
        if not self.evolution.ready():
            return
        self.evolution.advance()
        self._on_border()
        if not self.evolution.finished:
            for slot in self.evolution.living:
                self._trials[slot.id].run_metadata.num_failures = 0  # Tune's limit is for a generation
                self._start(tune_controller, slot.id)

    def _start(self, tune_controller: TuneController, slot: int) -> None:
        """Begin a trial's assignment in the process that it holds, or let Tune find one.

        Tune would give every trial that pauses for the border a new process, which costs seconds (its cache serves
        trials that are queued); here the last ones keep theirs and are reset where they are.
        """
        self._assign(slot)
        trial = self._trials[slot]
        controller = _controller(tune_controller)
        if trial.status != Trial.RUNNING:
            return
        if trial not in controller._trial_to_actor:  # its process died while it waited
            controller._set_trial_status(trial, Trial.PAUSED)
            return

        def go_on(trial: Trial, _done: bool) -> None:
            if not controller._schedule_trial_restore(trial):
                controller._schedule_trial_train(trial)

        controller._schedule_trial_task(
            trial=trial,
            method_name="reset",
            args=({**trial.config, TRIAL_INFO: _TrialInfo(trial)},),
            kwargs={"storage": trial.storage},
            on_result=go_on,
            on_error=controller._trial_task_failure,
        )

    def _assign(self, slot: int) -> None:
        """Have a trial start next from its slot's config and checkpoint."""
        trial, evolution = self._trials[slot], self.evolution
        config = {**evolution.slots[slot].config, **self._constants}
        trial.set_config({**config, "slot": slot, "assignment": evolution.assignment(slot)})
        path = evolution.start_path(slot)
        result = _TrainingResult(Checkpoint(path), {}) if path else None
        trial.run_metadata.checkpoint_manager._latest_checkpoint_result = result
        trial.invalidate_json_state()


def _controller(tune_controller: TuneController) -> Any:
    """Tune hands its controller to some methods in a wrapper that hides what is private."""
    return getattr(tune_controller, "_tune_controller", tune_controller)


def _work(config: Mapping[str, Any]) -> float:
    """About how long a policy takes for a step, in any unit: the multiplications in its blocks."""
    width, state, layers = (int(config[name]) for name in ("hidden_dim", "state_dim", "num_layers"))
    slots = int(config.get("memory_slots", 0))
    memory = width * (width + slots) if slots else 0
    return float((width * (width + 2 * state) + memory) * layers + width)


def _last_error(trial: Trial) -> str:
    """The last line of what Tune wrote down of a trial's failure."""
    path = trial.error_file
    lines = Path(path).read_text().split("\n") if path and Path(path).is_file() else []
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "its process died")
