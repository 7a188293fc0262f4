"""Trainers for drills of the self-improvement: one that only pretends to learn, and a real one that dies on command.

Faults stand in `.faults.json` in the run's folder: a list of {"trial", "generation", "kind", "times"}.
"""

from __future__ import annotations

import json
import os
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from ray import tune

from builders import make_policy, make_spec
from ssm_metarl.config import TrainConfig
from ssm_metarl.storage.checkpoint import load_checkpoint, save_checkpoint
from ssm_metarl.storage.contents import Checkpoint
from ssm_metarl.storage.mirror import is_uri, write_folder
from ssm_metarl.tuning.member_trainer import Assignment, EvolvingTrainer
from ssm_metarl.tuning.metrics import Assessment
from ssm_metarl.tuning.population import Report

TASKS, STEPS = 12, 100
"""Validation tasks, and environment steps of one pretended meta-iteration."""

NAVIGATION = {"observation_size": 2, "action_size": 2, "discrete": False}


def write_faults(run: Path, *faults: dict[str, Any]) -> None:
    """Arrange for faults in a run that has not begun."""
    run.mkdir(parents=True, exist_ok=True)
    (run / ".faults.json").write_text(json.dumps(faults))


def fault_now(assignment: Assignment, when: str = "") -> str | None:
    """The kind of fault that is due for a trial in its generation; counted, so that it happens `times` times."""
    if is_uri(assignment.checkpoints):
        return None
    run = Path(assignment.checkpoints).parents[1]
    path = run / ".faults.json"
    for number, fault in enumerate(json.loads(path.read_text()) if path.exists() else []):
        if (fault["trial"], fault["generation"]) != (assignment.trial, assignment.generation):
            continue
        if fault["kind"].endswith("in reset") != bool(when):
            continue
        marks = list(run.glob(f".fault-{number}-*"))
        if len(marks) < fault.get("times", 1):
            (run / f".fault-{number}-{len(marks)}").touch()
            return str(fault["kind"])
    return None


class ScriptedTrainer(tune.Trainable):
    """Gains skill at a rate that its outer learning rate decides: best at 0.01, ruinous above 0.1."""

    def setup(self, config: dict[str, Any]) -> None:
        config = dict(config)
        for name in ("slot", "task_distribution"):
            config.pop(name)
        self.assignment = Assignment(**config.pop("assignment"))
        self.options = TrainConfig.from_dict(config)
        self.lineage, self.skill, self.trained = 0, 0.3, 0

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.setup(new_config)
        kind = fault_now(self.assignment, when="in reset")
        if kind == "kill in reset":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "error in reset":
            raise OSError("the disk is full")
        return True

    def step(self) -> dict[str, Any]:
        done = self.assignment.budget <= self.trained
        if not done:
            self.trained += STEPS
            self.lineage += STEPS
            rate = self.options.meta.outer_lr
            gain = 0.02 - 0.01 * abs(np.log10(rate / 0.01)) if rate <= 0.1 else -0.2
            self.skill = float(np.clip(self.skill + gain, 0.0, 1.0))
            done = self.assignment.budget <= self.trained
        kind = fault_now(self.assignment) if self.trained else None
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        report = Report(spent=self.trained, trained=self.trained, lineage_steps=self.lineage, failure=kind)
        if done and kind is None:
            report.ended, report.checkpoint = True, self.assignment.checkpoint
            report.assessment = self._assessment().to_dict()
            report.spent += 10
            place = f"{self.assignment.checkpoints}/{self.assignment.checkpoint}"
            write_folder(place, lambda folder: self.save_checkpoint(str(folder)))
        return {"report": [asdict(report)], "composite": 0.0}

    def _assessment(self) -> Assessment:
        offsets = np.linspace(-0.1, 0.1, TASKS) + np.random.default_rng(self.options.experience.seed).normal(
            0, 0.004, TASKS
        )
        after = np.clip(self.skill + offsets, 0.0, 1.0)
        validation = np.stack([after / 2, after], 1)
        rows = [values for _, values in self.assignment.history] + [after.tolist()]
        steps = [steps for steps, _ in self.assignment.history] + [self.lineage]
        return Assessment(validation, None, np.array(rows), np.array(steps))

    def save_checkpoint(self, checkpoint_dir: str) -> str:
        spec = make_spec(
            hidden_dim=self.options.policy.hidden_dim, state_dim=self.options.policy.state_dim, **NAVIGATION
        )
        progress = {"iteration": 0, "env_steps": self.lineage, "skill": self.skill}
        weights = make_policy(spec, self.options.experience.seed % 1000).numpy_weights()
        save_checkpoint(Path(checkpoint_dir), Checkpoint(spec, self.options.to_dict(), progress, weights, {}))
        return checkpoint_dir

    def load_checkpoint(self, checkpoint: Any) -> None:
        progress = load_checkpoint(checkpoint).progress
        self.lineage, self.skill = int(progress["env_steps"]), float(progress["skill"])


class MortalTrainer(EvolvingTrainer):
    """The real trainer, with faults."""

    def step(self) -> dict[str, Any]:
        if self._trained and fault_now(self.assignment) == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step()
