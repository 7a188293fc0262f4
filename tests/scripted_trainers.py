"""Members for drills of the self-improvement: one that only pretends to learn, and a real one that dies on command.

Faults stand in `.faults.json` in the run's folder: a list of {"member", "when", "at", "kind", "times"}.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import signal
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune import PlacementGroupFactory

from builders import make_policy, make_spec
from simulated import BEST_RATE, Member, Policy, World
from ssm_metarl.storage.checkpoint import load_checkpoint, save_checkpoint
from ssm_metarl.storage.contents import Checkpoint
from ssm_metarl.storage.mirror import local_folder, write_folder
from ssm_metarl.storage.uri import below, is_uri
from ssm_metarl.tuning.mailbox import connect
from ssm_metarl.tuning.member_trainer import MemberTrainer
from ssm_metarl.tuning.options import SIZES
from ssm_metarl.tuning.records import Assignment, Report

NAVIGATION = {"observation_size": 2, "action_size": 2, "discrete": False}
RANDOM, BEST = -60.0, -10.0
"""Returns of navigation between which a skill from 0 to 1 lies."""


def write_faults(run: Path, *faults: dict[str, Any]) -> None:
    """Arrange for faults in a run that has not begun."""
    run.mkdir(parents=True, exist_ok=True)
    (run / ".faults.json").write_text(json.dumps(faults))


def fault_now(archive: str, member: int, when: str, iteration: int = 0) -> str | None:
    """The kind of fault that is due for a member; counted, so that it happens `times` times.

    Args:
        when: "start" of its process, or whether it is "alone" or in a "race".
        iteration: that it has just done; a fault is due from its "at" on.
    """
    if is_uri(archive):
        return None
    run = Path(archive).parents[1]
    path = run / ".faults.json"
    for number, fault in enumerate(json.loads(path.read_text()) if path.exists() else []):
        due = (fault["member"], fault["when"]) == (member, when) and iteration >= fault.get("at", 0)
        marks = list(run.glob(f".fault-{number}-*"))
        if due and len(marks) < fault.get("times", 1):
            (run / f".fault-{number}-{len(marks)}").touch()
            return str(fault["kind"])
    return None


def place_of(assignment: Assignment) -> str:
    """Where an iteration is done."""
    return "race" if assignment.share or assignment.take else "alone"


def grows(config: Mapping[str, Any], iteration: int) -> float:
    """As `simulated.grows`, but ruinous far above the best learning rate."""
    rate = config["outer_lr"]
    return 0.012 if BEST_RATE / 3 < rate < 3 * BEST_RATE else -0.3 if rate > 0.05 else 0.002


class ScriptedMember(Member):
    """A simulated member with real checkpoints, of random weights, on navigation's scale of returns."""

    def __init__(self, archive: str, number: int) -> None:
        super().__init__(World(gain=grows), Path("/nowhere"))
        self.archive, self.number = archive, number

    def carry_out(self, assignment: Assignment) -> Iterator[Report]:
        self.assignment = assignment
        try:
            for report in super().carry_out(assignment):
                report.returns = None if report.returns is None else RANDOM + (BEST - RANDOM) * report.returns
                report.plays = {key: RANDOM + (BEST - RANDOM) * play for key, play in report.plays.items()}
                yield report
        except FloatingPointError as error:
            self.held = None
            yield Report(number=assignment.number, failure=str(error))

    def iterate(self, assignment: Assignment, report: Report) -> None:
        super().iterate(assignment, report)
        kind = fault_now(self.archive, self.number, place_of(assignment), self.policy.iteration)
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "warn":
            logging.getLogger("ssm_metarl.distributed.watch").warning("a worker has given no sign of life")
        elif kind is not None:
            raise FloatingPointError(kind)

    def write(self, name: str, skill: float) -> None:
        config = self.assignment.config
        spec = make_spec(**{size: config[size] for size in SIZES}, **NAVIGATION)
        progress = {**vars(self.policy), "skill": skill}
        checkpoint = Checkpoint(spec, config, progress, make_policy(spec).numpy_weights(), {})
        write_folder(below(self.archive, name), functools.partial(save_checkpoint, checkpoint=checkpoint))

    def load(self, name: str) -> Policy:
        with tempfile.TemporaryDirectory() as folder:
            found = load_checkpoint(local_folder(below(self.archive, name), Path(folder))).progress
        return Policy(found["skill"], found["iteration"], found["env_steps"])


class ScriptedTrainer(tune.Trainable):
    """Gains skill at a rate that its outer learning rate decides: most around `BEST_RATE`, and ruinous above 0.05."""

    def setup(self, config: dict[str, Any]) -> None:
        self.number = int(config["member"])
        self.exchange = connect(config["exchange"], self.number)
        archive = str(config["archive"])
        kind = fault_now(archive, self.number, "start")
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind is not None:
            raise OSError(kind)
        if not is_uri(archive):
            (Path(archive).parents[1] / f".pid-{self.number}").write_text(str(os.getpid()))
        self.simulated = ScriptedMember(archive, self.number)
        self.after, self.work = -1, iter(list[Report]())

    def step(self) -> dict[str, Any]:
        metrics = {"return_before": 0.0, "return_after": 0.0}
        report = next(self.work, None)
        if report is None:
            values = self.exchange.next(self.number, self.after)
            if values is None:
                return {"done": True, **metrics}
            self.after = values["number"]
            self.work = self.simulated.carry_out(Assignment.from_dict(values))
            report = next(self.work)
        if report.failure is not None:
            self.work = iter(list[Report]())
        return {"done": False, **metrics, "report": report.to_json()}

    save_checkpoint, load_checkpoint = MemberTrainer.save_checkpoint, MemberTrainer.load_checkpoint

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> PlacementGroupFactory:
        return PlacementGroupFactory([{"CPU": 0.5}])


class MortalTrainer(MemberTrainer):
    """The real trainer, with faults."""

    def _iterate(self, assignment: Assignment) -> None:
        super()._iterate(assignment)
        if fault_now(self._archive, self.member, place_of(assignment), self.meta_iteration) == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
