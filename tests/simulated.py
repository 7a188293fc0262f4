"""A self-improving run without Ray and without learning: members whose policy is one number, its skill.

Skill grows at a rate that options decide. Returns are in [0, 1] with common random numbers: whoever plays the same
tasks with the same seed finds them equally easy, and lineages with other options slowly drift apart. A policy, and all
that it plays, is a function of its checkpoint, its options and the iteration, as with the real trainer.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ssm_metarl.algorithms.rollouts import Array
from ssm_metarl.config import TrainConfig
from ssm_metarl.tasks import ReferenceReturns
from ssm_metarl.tuning.config import EvolveConfig
from ssm_metarl.tuning.population import Population
from ssm_metarl.tuning.records import Assignment, Play, Report, Status, mean_name
from ssm_metarl.tuning.store import RunStore

REFERENCE = ReferenceReturns(random=0.0, random_sd=0.1, oracle=1.0)
"""Returns are normalised already."""

SHORT: dict[str, Any] = {"cycles": 3, "proposals": 2, "stretch": 2}
"""Rules of a run of a few dozen meta-iterations."""

BEST_RATE = 0.01
"""Outer learning rate at which skill grows fastest."""

EPISODE_STEPS = 10


def grows(config: Mapping[str, Any], iteration: int) -> float:
    """Skill that a meta-iteration adds: most at `BEST_RATE`, less by a factor of ten nearly nothing."""
    return 0.012 * max(1 - abs(float(np.log10(config["outer_lr"] / BEST_RATE))), 0.05)


@dataclass
class World:
    """What training does to a policy, and what befalls members.

    Attributes:
        gain: skill that a meta-iteration adds.
        start: skill of initial weights.
        wander: deviation of a policy's level from iteration to iteration, the same for all that share a seed.
        drift: deviation of what an iteration adds to a lineage's skill, other for other options.
        ease: deviation over tasks of how easy they are for all.
        own: deviation over tasks of what only this lineage finds.
        failure: why a meta-iteration cannot go on; None where it can.
        mean: skill of the running mean of weights above that of the weights.
        adaptation: what an inner step adds to a return.
        offered: rollouts that were offered last.
        spent: environment steps that were really played.
        played: assignments begun, in order.
    """

    gain: Callable[[Mapping[str, Any], int], float] = grows
    start: float = 0.3
    wander: float = 0.0
    drift: float = 0.001
    ease: float = 0.05
    own: float = 0.01
    failure: Callable[[Mapping[str, Any], int], str | None] = lambda config, iteration: None
    mean: float = 0.002
    adaptation: float = 0.1
    offered: str = ""
    spent: int = 0
    played: list[Assignment] = field(default_factory=list)


@dataclass
class Policy:
    """What a checkpoint holds."""

    skill: float
    iteration: int = 0
    env_steps: int = 0


class Member:
    """Carries out assignments as `MemberTrainer` does; checkpoints are folders with one small file.

    Args:
        world: that it lives in, together with the others.
        checkpoints: folder of the run's archive.
    """

    def __init__(self, world: World, checkpoints: Path) -> None:
        self.world, self.checkpoints = world, checkpoints
        self.held: tuple[str | None, dict[str, Any]] | None = None
        self.done = 0

    def carry_out(self, assignment: Assignment) -> Iterator[Report]:
        """A report after every meta-iteration; the last one has ended or failed."""
        self.world.played.append(assignment)
        if self.held != (assignment.start, assignment.config) or self.done > assignment.iterations:
            self.policy = Policy(self.world.start) if assignment.start is None else self.load(assignment.start)
            self.held, self.done = (assignment.start, assignment.config), 0
        while True:
            report = Report(number=assignment.number)
            if self.done < assignment.iterations:
                failure = self.world.failure(assignment.config, self.policy.iteration)
                if failure is not None:
                    self.held, report.failure = None, failure
                    yield report
                    return
                self.iterate(assignment, report)
            report.iterations, report.seconds = self.done, {"training": 0.5}
            report.iteration, report.env_steps = self.policy.iteration, self.policy.env_steps
            if self.done >= assignment.iterations:
                self.finish(assignment, report)
            yield report
            if report.ended:
                return

    def iterate(self, assignment: Assignment, report: Report) -> None:
        config, policy = assignment.config, self.policy
        stages = config["inner_steps"] + 1
        steps = config["meta_batch"] * config["episodes"] * stages * EPISODE_STEPS
        taken = assignment.stages if self.done == 0 and assignment.take and self.world.offered == assignment.take else 0
        report.returns = self.returns(config, policy.skill, stages, config["meta_batch"], config["seed"])
        report.spent = steps * (stages - taken) // stages
        self.world.spent += report.spent
        lineage = np.random.default_rng([fingerprint(config), policy.iteration])
        skill = policy.skill + self.world.gain(config, policy.iteration) + self.world.drift * lineage.normal()
        self.policy = Policy(float(np.clip(skill, 0.0, 1.0)), policy.iteration + 1, policy.env_steps + steps)
        if self.done == 0 and assignment.share:
            self.world.offered = assignment.share
        self.done += 1

    def returns(self, config: Mapping[str, Any], skill: float, stages: int, tasks: int, *seed: int) -> Array:
        """[S+1, M]."""
        world, at = self.world, (*seed, self.policy.iteration)
        level = world.wander * np.random.default_rng([*at, 1]).normal()
        ease = world.ease * np.random.default_rng([*at, 2]).normal(size=tasks)
        own = world.own * np.random.default_rng([*at, 3, fingerprint(config)]).normal(size=tasks)
        return skill + level + ease + own - self.world.adaptation * np.arange(stages)[::-1, None]

    def finish(self, assignment: Assignment, report: Report) -> None:
        if assignment.checkpoint is not None:
            self.write(mean_name(assignment.checkpoint), self.policy.skill + self.world.mean)
            self.write(assignment.checkpoint, self.policy.skill)
            self.held, self.done = (assignment.checkpoint, assignment.config), 0
        for play in assignment.plays:
            report.plays[play.key] = self.play(assignment, play)
            stages = assignment.config["inner_steps"] + 1
            report.assessed += play.tasks * assignment.config["episodes"] * stages * EPISODE_STEPS
        self.world.spent += report.assessed
        report.ended = True

    def write(self, name: str, skill: float) -> None:
        """A checkpoint of the policy, or of its running mean."""
        folder = self.checkpoints / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "policy.json").write_text(json.dumps({**vars(self.policy), "skill": skill}))

    def play(self, assignment: Assignment, play: Play) -> Array:
        skill = self.policy.skill + self.world.mean * (play.policy == "mean")
        stages, split = assignment.config["inner_steps"] + 1, zlib.crc32(play.split.encode())
        world, seed = self.world, assignment.seed
        ease = world.ease * np.random.default_rng([seed, split]).normal(size=play.tasks)
        own = world.own * np.random.default_rng([seed, split, self.policy.iteration]).normal(size=play.tasks)
        return skill + ease + own - self.world.adaptation * np.arange(stages)[::-1, None]

    def load(self, name: str) -> Policy:
        return read_policy(self.checkpoints, name)


def read_policy(checkpoints: Path, name: str) -> Policy:
    """What a checkpoint of the archive holds."""
    return Policy(**json.loads((checkpoints / name / "policy.json").read_text()))


def fingerprint(config: Mapping[str, Any]) -> int:
    """Of all options: lineages with others drift apart."""
    elsewhere = ("num_learners", "min_tasks")  # these say nothing of what is learned, nor does a limit in seconds
    learned = {name: value for name, value in config.items() if name not in elsewhere} | {"sample_timeout_s": None}
    return zlib.crc32(json.dumps(learned, sort_keys=True).encode())


class Killed(Exception):
    """The driver is gone."""


Disturb = Callable[[Population, int, Report], bool]
"""Asked before a report is given; true where the member's process died instead."""


def drive(
    population: Population,
    world: World,
    order: int = 0,
    *,
    disturb: Disturb = lambda population, member, report: False,
    reports: int | None = None,
    process: Callable[[int], Any] | None = None,
) -> Population:
    """Play a run to its end, members reporting in a random order.

    Args:
        order: seed of the order.
        disturb: what befalls members.
        reports: after as many the driver is killed.
        process: a member's, by its number, that can `carry_out` assignments; None: a `Member`.

    Raises:
        Killed: it was.
    """
    rng = np.random.default_rng(order)
    start = process or (lambda number: Member(world, population.store.checkpoints))
    processes: dict[int, Any] = {}
    at_work: dict[int, tuple[int, Iterator[Report]]] = {}
    done: dict[int, int] = {}
    population.begin()
    while not population.finished:
        if reports is not None and reports <= 0:
            raise Killed
        assigned = population.assignments
        ready = [
            member
            for member, assignment in assigned.items()
            if done.get(member) != assignment.number and population.statuses[member] != Status.GONE
        ]
        assert ready, "the run waits for nobody"
        member = int(rng.choice(ready))
        assignment = assigned[member]
        if at_work.get(member, (-1, None))[0] != assignment.number:
            if member not in processes:
                processes[member] = start(member)
            values = Assignment.from_dict(json.loads(json.dumps(assignment.to_dict())))
            at_work[member] = assignment.number, processes[member].carry_out(values)
        report = next(at_work[member][1])
        if disturb(population, member, report):
            del at_work[member], processes[member]
            continue
        if report.ended or report.failure is not None:
            done[member] = assignment.number
        population.report(member, Report.from_json(report.to_json()))
        reports = None if reports is None else reports - 1
    return population


def new_population(
    folder: Path, *, base: Mapping[str, Any] | None = None, start: str | None = None, **rules: Any
) -> Population:
    """A run that has not begun; options start a factor of ten below the best learning rate."""
    store = RunStore(folder)
    store.create()
    options = {"meta_batch": 20, "episodes": 4, "outer_lr": BEST_RATE / 10, "lr_schedule": "constant", **(base or {})}
    config = TrainConfig.for_task("navigation-2d", **options).to_dict()
    population = Population(EvolveConfig(**rules), config, REFERENCE, store, start)
    population.commit()
    return population


def resumed(population: Population, **changes: Any) -> Population:
    """By another process, which knows only the folder."""
    return Population.resume(RunStore(population.store.folder.parent), REFERENCE, **changes)


VOLATILE = ("time", "seconds")


def events(population: Population, **wanted: Any) -> list[dict[str, Any]]:
    """Those of the log with such entries, without what depends on time."""
    found = [{k: v for k, v in event.items() if k not in VOLATILE} for event in population.store.events()]
    return [event for event in found if all(event.get(name) == value for name, value in wanted.items())]


def skill_of(population: Population, name: str | None = None) -> float:
    """Of the policy that a checkpoint holds; without a name, of the one that is handed over."""
    if name is None:
        name = population.archive[population.progress.best or ""].exported
    return read_policy(population.store.checkpoints, name).skill
