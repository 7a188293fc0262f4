"""A policy adapted to one task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssm_metarl.algorithms.rollouts import Rollouts
from ssm_metarl.algorithms.statistics import confidence_interval, interval_values
from ssm_metarl.evaluation.config import AdaptOptions, EvaluationConfig
from ssm_metarl.evaluation.tasks import collector, open_subject, sample_tasks
from ssm_metarl.seeds import Branch
from ssm_metarl.storage.contents import Checkpoint
from ssm_metarl.tasks import Task, TaskDistribution

if TYPE_CHECKING:  # loads torch, which the options of a command can do without
    from ssm_metarl.algorithms.adapters import Adaptation
    from ssm_metarl.algorithms.policy import SSMPolicy


@dataclass(frozen=True)
class TaskReport:
    """A policy adapted to one task.

    Attributes:
        task: family.
        parameters: the task's.
        mode: of adaptation.
        adaptation: curve, cost and the adapted weights.
        policy: the adapted policy.
        checkpoint: the adapted policy's, of the same run; without an optimiser's state.
        before, after: fresh episodes of the meta-trained and of the adapted policy, with common random numbers.
        family: of the task.
        original: the meta-trained policy's checkpoint.
    """

    task: str
    parameters: Task
    mode: str
    adaptation: Adaptation
    policy: SSMPolicy
    checkpoint: Checkpoint
    before: Rollouts
    after: Rollouts
    family: TaskDistribution
    original: Checkpoint

    def summary(self) -> dict[str, Any]:
        """JSON values: the adaptation curve on the task's own episodes, its cost, and fresh returns with intervals."""
        found = self.adaptation
        result: dict[str, Any] = {
            "task": self.task,
            "parameters": self.parameters,
            "mode": self.mode,
            "curve": found.returns[0].tolist(),
            "best_step": int(found.best_step[0]),
            "step_fractions": found.fractions[0].tolist(),
            "effective_replay_episodes": found.effective_episodes[0].tolist(),
            "environment_steps": found.environment_steps,
            "seconds": found.seconds,
        }
        for name, record in (("before", self.before), ("after", self.after)):
            found_interval = interval_values(*confidence_interval(record.returns()[0]))
            result[name] = {"return": found_interval.pop("value"), **found_interval}
        return result


def adapt_checkpoint(
    path: str | Path,
    params: Mapping[str, Any] | None = None,
    *,
    mode: str = "standard",
    options: AdaptOptions | None = None,
    config: EvaluationConfig | None = None,
    distribution: TaskDistribution | None = None,
    **changes: Any,
) -> TaskReport:
    """Adapt a checkpoint's policy to one task, and play it before and after:

        report = adapt_checkpoint("pretrained:cartpole", {"direction": -1}, mode="hybrid", episodes=2)
        report.policy

    Args:
        path: a checkpoint, a run folder for its best one, or pretrained:NAME.
        params: the task's parameters; what is not given is as in a task drawn from the split.
        mode: see `MODES`.
        options: of the adapter.
        config: where the task comes from, steps and episodes.
        distribution: the family itself, instead of a registered one.
        **changes: options of `EvaluationConfig`, in place of those of `config`.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or its task is code that nobody named here.
        ValueError: an impossible option, task or parameter, or a mode that needs a replay without one.
        EnvironmentFailure: more than a tenth of a step's episodes are invalid.
    """
    options = options or AdaptOptions()
    config = replace(config or EvaluationConfig(), num_tasks=1, **changes)
    with open_subject(path, config, distribution) as subject:
        adapter = options.adapter(mode, subject, config)
        task = sample_tasks(subject.family, config)[0]
        if params:
            if not isinstance(task, Mapping):
                raise ValueError(f"A task of {subject.family.name} is {task!r} and has no parameters to set.")
            if unknown := set(params) - set(task):
                raise ValueError(
                    f"A task of {subject.family.name} has the parameters {', '.join(task)}, not {sorted(unknown)[0]!r}."
                )
            task = {**task, **params}
        subject.family.make_vector_env([task], 1).close()  # refuses impossible values in one sentence
        _, episodes = config.extent(subject.trained)
        adaptation = adapter.adapt(collector(subject.pool, [task], config), episodes)
        test = [collector(subject.pool, [task], config, Branch.ADAPTED) for _ in range(2)]
        before = test[0](subject.policy.numpy_weights(), options.test_episodes, 0)
        after = test[1](adaptation.weights, options.test_episodes, 0)
        adapted = adaptation.policy(subject.policy)
        checkpoint = replace(
            subject.checkpoint,
            progress={**subject.checkpoint.progress, "adapted_to": task},
            policy=adapted.numpy_weights(),
            optimizer={},
        )
        return TaskReport(
            subject.family.name,
            task,
            mode,
            adaptation,
            adapted,
            checkpoint,
            before,
            after,
            subject.family,
            subject.checkpoint,
        )
