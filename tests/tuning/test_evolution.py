"""The population's decisions, drilled with a scripted trainer: no Ray, no learning, every rule and every crash."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssm_metarl.config import TrainConfig
from ssm_metarl.tuning.evolution import Evolution
from ssm_metarl.tuning.metrics import Comparison
from ssm_metarl.tuning.mutation import Proposal, moves
from ssm_metarl.tuning.population import EvolveConfig, Report, Slot, checkpoint_bound
from ssm_metarl.tuning.safety import SafetyConfig, below_floor, collapsed, keeps
from ssm_metarl.tuning.store import RunStore, read_state

STEPS, VALIDATION = 1000, 40
"""Environment steps of a generation's training, and of an assessment."""

TASKS = 5
seeds = st.integers(0, 2**32 - 1)


def on_probation(slot: Slot) -> bool:
    return slot.status == "on probation"


# --- The scripted trainer ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """What training does to a policy, which is one number, its skill, and what befalls a trial.

    Attributes:
        initial: skill of a trial's initial weights.
        gain: skill that a generation of training adds for a trial in a generation.
        noise: deviation of what a trial's task seed adds to that.
        wobble: deviation of what an assessment adds to each task's value, beside what all trials find there.
        iteration: environment steps between two reports.
        failure: why a trial cannot go on, when it has done a share of its budget; None if it can.
        accident: "crashed" or "died", asked at every report.
    """

    initial: Callable[[int], float] = lambda trial: 0.4
    gain: Callable[[Slot, int], float] = lambda slot, generation: 0.02
    noise: float = 0.0
    wobble: float = 0.01
    iteration: int = STEPS // 2
    failure: Callable[[Slot, int, float], str | None] = lambda slot, generation, done: None
    accident: Callable[[Slot, int], str | None] = lambda slot, generation: None


@dataclass
class Training:
    """A trial's process since it was started from its assignment, as `EvolvingTrainer` would be."""

    evolution: Evolution
    world: World
    trial: int
    trained: int = 0
    spent: int = 0
    checked: bool = False
    lineage: int = 0
    history: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.assignment = self.evolution.assignment(self.trial)
        self.skill = self.world.initial(self.trial)
        start = self.evolution.start_path(self.trial)
        if start is not None:
            saved = json.loads((Path(start) / "policy").read_text())
            self.skill, self.lineage = saved["skill"], saved["lineage"]
        self.history = [*self.assignment["history"]]
        if self.history:
            assert self.history[0][0] == self.lineage, "the history begins where the policy does"

    def next(self) -> Report:
        slot, generation, budget = self.slot, self.assignment["generation"], self.assignment["budget"]
        if self.trained < budget:
            steps = min(self.world.iteration, budget - self.trained)
            rng = np.random.default_rng([slot.config["seed"], self.lineage])
            self.skill += (self.world.gain(slot, generation) + self.world.noise * rng.normal()) * steps / STEPS
            self.trained, self.spent, self.lineage = self.trained + steps, self.spent + steps, self.lineage + steps
        done = self.trained / budget if budget else 1.0
        failure = self.world.failure(slot, generation, done)
        ended = self.trained >= budget and failure is None
        due = self.assignment["probation"] and not self.checked and 2 * self.trained >= budget
        assessment = self.assess() if failure is None and (ended or due) else None
        if ended:
            path = Path(self.assignment["checkpoints"]) / self.name
            path.mkdir(exist_ok=True)
            (path / "policy").write_text(json.dumps({"skill": self.skill, "lineage": self.lineage}))
        return Report(
            spent=self.spent,
            trained=self.trained,
            lineage_steps=self.lineage,
            assessment=assessment,
            ended=ended,
            checkpoint=self.name if ended else None,
            failure=failure,
            seconds={"training": 0.1, "assessment": 0.1},
        )

    def assess(self) -> dict[str, Any]:
        self.checked = True
        self.spent += VALIDATION
        ease = np.random.default_rng(self.assignment["seed"]).uniform(-0.1, 0.1, (2, TASKS, 1))
        wobble = np.random.default_rng([self.slot.config["seed"], self.lineage, 1]).normal(size=ease.shape)
        values = np.clip(self.skill + ease + self.world.wobble * wobble + [-0.1, 0.0], 0, 1)
        history = [*self.history, [self.lineage, values[0, :, 1].tolist()]]
        return {
            "validation": values[0].tolist(),
            "shifted": values[1].tolist(),
            "history": [row for _, row in history],
            "history_steps": [steps for steps, _ in history],
        }

    @property
    def slot(self) -> Slot:
        return self.evolution.slots[self.trial]

    @property
    def name(self) -> str:
        return f"generation_{self.assignment['generation']:04d}_trial_{self.trial}"


def play(evolution: Evolution, world: World, pick: Callable[[Sequence[int]], int] = min) -> Iterator[str]:
    """Train until the evolution is over: what happened, after each time that it was told something.

    Args:
        pick: which of the trials that have work to do reports next.
    """
    running: dict[int, Training] = {}
    while not evolution.finished:
        at_work = [slot.id for slot in evolution.living if not slot.ended]
        assert evolution.ready() == (not at_work), "the border is open exactly when nobody is at work"
        if not at_work:
            evolution.advance()
            check_border(evolution)
            running = {}
            yield "border"
            continue
        trial = pick(at_work)
        slot = evolution.slots[trial]
        training = running.pop(trial, None) or Training(evolution, world, trial)
        budget = left = training.assignment["budget"]
        report = training.next()
        answer = world.accident(slot, evolution.generation)
        if answer == "died":
            evolution.died(trial, "the node is gone")
        elif answer == "crashed":
            evolution.crashed(trial, "the process is gone")
        else:
            answer = evolution.report(trial, report)
        if answer == "continue":
            running[trial] = training
        elif answer == "restart":
            left = budget - training.trained
        elif answer == "wait":
            assert training.trained == budget
        assert slot.budget == left, "every trial trains as many steps in a generation, however often it begins again"
        check(evolution)
        yield answer


def finish(evolution: Evolution, world: World | None = None, **options: Any) -> Evolution:
    """Play to the end."""
    for _ in play(evolution, world or World(), **options):
        pass
    return evolution


def play_to(evolution: Evolution, world: World, borders: int) -> None:
    """Play until as many borders have been passed."""
    passed = (each for each in play(evolution, world) if each == "border")
    for _ in range(borders):
        next(passed)


# --- What holds at every moment ---------------------------------------------------------------------------


def check(evolution: Evolution) -> None:
    """Checkpoints on disk carry the run, whatever comes next."""
    on_disk = {path.name for path in evolution.store.checkpoints.iterdir()}
    assert on_disk >= set(evolution.archive)
    assert evolution.best is None or evolution.best in evolution.archive
    for slot in evolution.slots:
        assert slot.start is None or slot.start in on_disk or slot.status == "dead"
        assert slot.checkpoint is None or slot.checkpoint in evolution.archive
        mutated = slot.proposal is not None and slot.fallback is not None
        assert on_probation(slot) == mutated or slot.status == "dead"
        if on_probation(slot):
            assert slot.partner is not None
            assert Proposal(**slot.proposal or {}).key not in evolution.rejected


def check_state(evolution: Evolution) -> None:
    """So does the state on disk, and every config in it trains."""
    check(evolution)
    state = strict_json((evolution.store.folder / "state.json").read_text())
    assert state["trials"] == json.loads(json.dumps([evolution._view(slot) for slot in evolution.slots]))
    assert set(state["archive"]) == set(evolution.archive)
    assert (state["best"], state["finished"]) == (evolution.best, evolution.finished)
    for slot in evolution.slots:
        TrainConfig.from_dict(slot.config)


def check_border(evolution: Evolution) -> None:
    """A new generation: equal budgets, children beside a parent that goes on, and no checkpoint too many."""
    check_state(evolution)
    on_disk = [path.name for path in evolution.store.checkpoints.iterdir()]
    assert set(on_disk) == set(evolution.archive)
    assert len(on_disk) + 4 <= checkpoint_bound(evolution.config)  # the run folder holds up to four
    if evolution.finished:
        return
    children = [slot for slot in evolution.living if slot.status in ("on probation", "copied")]
    parents = [slot for slot in evolution.living if slot not in children]
    assert parents
    for slot in evolution.living:
        assert (slot.budget, slot.spent, slot.ended) == (STEPS, 0, False)
        assert slot.start == slot.checkpoint
        assert slot.lineage_steps == evolution.archive[slot.start or ""].lineage_steps
    for child in children:
        assert child.parent == child.start
        assert child.start in {parent.start for parent in parents}
        if child.proposal:
            partner = evolution.slots[child.partner if child.partner is not None else -1]
            assert partner in parents
            assert partner.start == child.start == child.proposal["parent"]
            assert child.fallback == evolution.archive[child.start or ""].config
            changed = {name for name in child.config if child.config[name] != partner.config[name]}
            assert changed == {*child.proposal["after"], "seed"}
            assert {name: child.config[name] for name in child.proposal["after"]} == child.proposal["after"]
    keys = [Proposal(**child.proposal).key for child in children if child.proposal]
    assert len(set(keys)) == len(keys), "siblings differ"
    assert len({child.config["seed"] for child in children}) == len(children)


def strict_json(text: str) -> Any:
    def refuse(constant: str) -> Any:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def decisions(evolution: Evolution) -> list[dict[str, Any]]:
    """The log without what a second attempt may change: the time, and how much was ever spent."""
    return [{k: v for k, v in event.items() if k not in ("time", "lifetime_steps")} for event in events(evolution)]


def events(evolution: Evolution, **wanted: Any) -> list[dict[str, Any]]:
    """Those of the log with such entries."""
    return [e for e in evolution.store.events() if all(e[name] == value for name, value in wanted.items())]


SPENT = ("spent", "lifetime_steps")


def outcome(evolution: Evolution) -> dict[str, Any]:
    """All that decides how a run goes on."""
    return {
        "generation": evolution.generation,
        "best": evolution.best,
        "floor": evolution.floor,
        "failures": evolution.failures,
        "finished": evolution.finished,
        "rejected": evolution.rejected,
        "verdicts": evolution.verdicts,
        "slots": [{k: v for k, v in asdict(slot).items() if k not in SPENT} for slot in evolution.slots],
        "records": {slot.checkpoint: evolution.archive.get(slot.checkpoint or "") for slot in evolution.slots},
    }


def skill_of(evolution: Evolution, name: str | None) -> float:
    """Of the policy that a checkpoint holds."""
    return float(json.loads((evolution.store.checkpoints / (name or "") / "policy").read_text())["skill"])


# --- Runs -------------------------------------------------------------------------------------------------

NewRun = Callable[..., Evolution]


@pytest.fixture(scope="module")
def new_run() -> Iterator[NewRun]:
    """Makes evolutions in folders of their own; what is slow on a disk is left out."""
    with tempfile.TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        numbers = itertools.count()

        def make(
            *, seed: int = 0, base: Mapping[str, Any] | None = None, store: type[RunStore] = RunStore, **options: Any
        ) -> Evolution:
            there = store(Path(root) / str(next(numbers)))
            there.create()
            config = EvolveConfig(**{"population": 4, "generations": 3, "generation_steps": STEPS, **options})
            evolution = Evolution(config, TrainConfig().replace(seed=seed, **(base or {})).to_dict(), there)
            evolution.commit()
            return evolution

        yield make


def children_gain(extra: float, gain: float = 0.02) -> Callable[[Slot, int], float]:
    """A mutation adds so much to what a generation brings."""
    return lambda slot, generation: gain + extra * on_probation(slot)


# --- Kept and rolled back ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_a_clearly_better_mutation_is_kept(new_run: NewRun, seed: int) -> None:
    evolution = new_run(seed=seed, generations=1)
    play_to(evolution, World(gain=children_gain(0.1)), 1)
    proposals = {slot.id: slot.proposal for slot in evolution.slots if slot.proposal}
    assert len(proposals) == 2
    finish(evolution, World(gain=children_gain(0.1)))
    assert evolution.finished == "1 generation"
    for trial, proposal in proposals.items():
        slot = evolution.slots[trial]
        assert (slot.status, slot.checkpoint) == ("kept", f"generation_0001_trial_{trial}")
        assert slot.config == {**slot.config, **proposal["after"]}
        (event,) = events(evolution, trial=trial, kind="probation")
        assert event["decision"] == "kept"
        assert (event["before"], event["after"]) == (proposal["before"], proposal["after"])
        assert event["checkpoint"] == slot.checkpoint
        assert event["interval"][0] <= event["composite"] <= event["interval"][1]
    assert evolution.best in {slot.checkpoint for slot in evolution.slots if slot.id in proposals}
    assert evolution.rejected == []
    assert evolution.failures == 0


@pytest.mark.parametrize("seed", range(3))
def test_a_clearly_worse_mutation_gives_its_place_to_its_parent_as_it_is_now(new_run: NewRun, seed: int) -> None:
    """Config and checkpoint are the partner's of the same generation end: the same parameters to the last bit."""
    evolution = new_run(seed=seed, generations=1)
    world = World(gain=children_gain(-0.1), noise=0.01)
    play_to(evolution, world, 1)
    before = {slot.id: (slot.partner, slot.proposal) for slot in evolution.slots if slot.proposal}
    finish(evolution, world)
    for trial, (partner, proposal) in before.items():
        slot, parent = evolution.slots[trial], evolution.slots[partner or 0]
        assert slot.status == "rolled back"
        assert slot.checkpoint == parent.checkpoint == f"generation_0001_trial_{partner}"
        assert slot.config == parent.config == evolution.archive[parent.checkpoint or ""].config
        assert slot.lineage_steps == parent.lineage_steps == STEPS
        assert Proposal(**proposal or {}).key in evolution.rejected
        (event,) = events(evolution, trial=trial, kind="probation")
        assert event["decision"] == "rolled back"
        assert "not above its parent" in event["reason"]
    assert evolution.failures == 0
    assert evolution.best not in {f"generation_0001_trial_{trial}" for trial in before}


@pytest.mark.parametrize(
    ("comparison", "kept"),
    [
        ((0.01, -0.0199, 0.1), True),
        ((0.01, -0.02, 0.1), False),  # the bound itself is outside
        ((0.01, -0.0201, 0.1), False),
        ((1e-300, 0.0, 0.1), True),
        ((0.0, 0.0, 0.0), False),  # an identical child
        ((-1e-300, -0.01, 0.1), False),
        ((0.5, -0.3, 0.9), False),
        ((np.nan, 0.0, 0.1), False),
        ((0.1, np.nan, 0.1), False),
        ((np.nan, np.nan, np.nan), False),
    ],
)
def test_a_child_is_kept_only_above_its_parent_and_not_by_chance(
    comparison: tuple[float, float, float], kept: bool
) -> None:
    decision, reason = keeps(Comparison(*comparison), SafetyConfig())
    assert decision is kept
    assert ("above its parent" in reason and "not above" not in reason) is kept


@given(mean=st.floats(-1, 1), low=st.floats(-1, 1), margin=st.floats(0, 1))
def test_the_rule_of_keeping(mean: float, low: float, margin: float) -> None:
    decision, _ = keeps(Comparison(mean, low, 1.0), SafetyConfig(keep_margin=margin))
    assert decision == (mean > 0 and low > -margin)


@pytest.mark.parametrize("curve", ["straight", "steep first", "steep last"])
def test_a_mutation_without_effect_is_not_kept(new_run: NewRun, curve: str) -> None:
    """Only the child is assessed at half, which must not change its efficiency."""
    steep = {"straight": None, "steep first": 0, "steep last": STEPS // 2}[curve]

    def gain(slot: Slot, generation: int) -> float:
        return 0.05 if steep is None else 0.1 * (slot.lineage_steps % STEPS == steep)

    evolution = finish(new_run(generations=2), World(gain=gain, wobble=0.0))
    differences = [float(event["reason"].split()[1]) for event in events(evolution, kind="probation")]
    assert differences == pytest.approx([0.0] * 4, abs=1e-9)
    assert not events(evolution, decision="kept")


def test_a_child_is_not_kept_because_its_parent_trained_less(new_run: NewRun) -> None:
    """One that began again has trained half as much: nothing can be said."""
    evolution = new_run(survivors=1, generations=2)
    world = World(
        gain=lambda *_: 0.1,
        failure=lambda slot, generation, done: (
            "not finite" if generation == 1 and done == 0.5 and not on_probation(slot) and not slot.restarts else None
        ),
        wobble=0.0,
    )
    play_to(evolution, world, 2)
    (parent,) = events(evolution, kind="training", generation=1)
    children = events(evolution, kind="probation", generation=1)
    assert {event["decision"] for event in children} == {"rolled back"} or parent["lineage_steps"] == STEPS


@pytest.mark.parametrize("rule", [below_floor, collapsed])
def test_what_lies_too_far_below(rule: Callable[[float, float, SafetyConfig], bool]) -> None:
    """Exactly the margin is not too far; no number is."""
    config = SafetyConfig(floor_margin=0.25, collapse_margin=0.25)
    assert not rule(0.5, 0.75, config)
    assert rule(np.nextafter(0.5, 0), 0.75, config)
    assert not rule(1.0, 0.75, config)
    for pair in [(np.nan, 0.5), (0.5, np.nan), (np.nan, np.nan), (-np.inf, 0.5)]:
        assert rule(*pair, config)


def test_what_was_rejected_is_not_proposed_again_from_the_same_parent(new_run: NewRun) -> None:
    """A person goes back to one checkpoint again and again, and every mutation of it is worse."""
    evolution = new_run(generations=8, population=5, keep_generations=20)
    world = World(gain=lambda slot, generation: -0.02 - 0.01 * on_probation(slot), wobble=0.0)
    passed = 0
    for happened in play(evolution, world):
        if happened == "border":
            passed += 1
            evolution.store.request("generation_0000_trial_0")
    assert passed == 9
    proposals = [
        Proposal(event["parent"], event["before"], event["after"]).key
        for event in events(evolution, kind="mutation", parent="generation_0000_trial_0")
        if event["decision"] == "on probation"
    ]
    assert len(proposals) == len(set(proposals)) >= 4 * 7
    assert set(proposals) <= set(evolution.rejected)


def test_a_parent_without_mutations_left_is_copied(new_run: NewRun) -> None:
    """Two mutations are possible: three children share them, and the next three are copies."""
    beyond = {"state_dim": 512, "hidden_dim": 512, "inner_lr": 100.0, "outer_lr": 1.0, "inner_steps": 9}
    evolution = new_run(generations=4, survivors=1, base=beyond, keep_generations=9)
    world = World(gain=children_gain(-0.01), wobble=0.0)
    play_to(evolution, world, 1)
    assert Counter(slot.status for slot in evolution.slots) == {"continued": 1, "on probation": 2, "copied": 1}
    assert {(slot.proposal or {}).get("after", {}).get("num_layers") for slot in evolution.slots} == {0, 2, None}
    evolution.store.request(evolution.slots[0].start or "")
    play_to(evolution, world, 1)
    assert Counter(slot.status for slot in evolution.slots) == {"restored": 1, "copied": 3}
    assert all(slot.proposal is None for slot in evolution.slots)


@pytest.mark.parametrize("fate", ["kept", "rolled back", "failed"])
def test_a_verdict_counts_for_the_moves_that_it_was_about(new_run: NewRun, fate: str) -> None:
    """Older verdicts count less."""
    evolution = new_run(generations=1, population=2)
    world = World(gain=children_gain(0.1 if fate == "kept" else -0.1))
    if fate == "failed":
        world = World(failure=lambda slot, *_: "not finite" if on_probation(slot) else None)
    evolution.verdicts = {"outer_lr up": [2.0, 1.0]}
    finish(evolution, world)
    (event,) = [e for e in evolution.store.events() if e["kind"] in ("probation", "failure")]
    expected = {"outer_lr up": np.array([1.9, 0.95])}
    for move in moves(event["before"], event["after"]):
        expected[move] = expected.get(move, 0) + np.array([fate == "kept", fate != "kept"])
    assert {move: pytest.approx(counts) for move, counts in expected.items()} == evolution.verdicts


# --- Failures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("done", [0.5, 1.0])
@pytest.mark.parametrize("how", ["not finite", "under the floor"])
def test_a_child_that_fails_goes_back_at_once(new_run: NewRun, how: str, done: float) -> None:
    """To its parent's config and the checkpoint it was forked from, for what is left of its budget."""
    evolution = new_run()
    play_to(evolution, World(), 1)
    child = next(slot for slot in evolution.slots if slot.proposal)
    proposal, fallback, seed, start = child.proposal, child.fallback, child.config["seed"], child.start

    def failure(slot: Slot, generation: int, at: float) -> str | None:
        return "the meta-gradient is not finite" if slot is child and on_probation(slot) and at == done else None

    def gain(slot: Slot, generation: int) -> float:
        return -0.4 / done if slot is child and on_probation(slot) else 0.02

    world = World(failure=failure) if how == "not finite" else World(gain=gain)
    if how == "under the floor" and done == 1.0:
        world = World(gain=lambda slot, generation: -0.11 / 0.8 if slot is child and on_probation(slot) else 0.02)
    lifetime = child.lifetime_steps
    answers = play(evolution, world)
    while next(answers) != "restart":
        pass
    assert child.status == "rolled back"
    assert child.config == {**(fallback or {}), "seed": child.config["seed"]}
    assert child.config["seed"] not in (seed, (fallback or {})["seed"])
    assert (child.start, child.parent) == (start, start)
    assert evolution.assignment(child.id)["probation"] is False
    assert evolution.assignment(child.id)["budget"] == child.budget == STEPS - round(done * STEPS)
    assert child.lineage_steps == evolution.archive[start or ""].lineage_steps == 0
    assert child.lifetime_steps >= lifetime + done * STEPS
    assert Proposal(**proposal or {}).key in evolution.rejected
    assert evolution.failures == 1
    (event,) = events(evolution, kind="failure")
    assert (event["trial"], event["decision"]) == (child.id, "rolled back")
    assert (event["before"], event["after"]) == ((proposal or {})["before"], (proposal or {})["after"])
    assert ("not finite" if how == "not finite" else "under the first's") in event["reason"]
    lifetime = child.lifetime_steps
    while next(answers) != "border":
        assert child.lifetime_steps >= lifetime
    record = evolution.archive.get(f"generation_0001_trial_{child.id}")
    assert record is None or record.lineage_steps == STEPS - round(done * STEPS)
    assert not events(evolution, kind="probation", trial=child.id), "judged once is enough"


def test_an_ordinary_trial_that_fails_begins_again_with_other_tasks(new_run: NewRun) -> None:
    evolution = new_run()
    play_to(evolution, World(), 1)
    parent = next(slot for slot in evolution.slots if slot.status == "continued")
    before, start = dict(parent.config), parent.start
    seed = before["seed"]
    world = World(failure=lambda slot, _, at: "not finite" if slot.config["seed"] == seed and at == 0.5 else None)
    answers = play(evolution, world)
    while next(answers) != "restart":
        pass
    assert parent.config == {**before, "seed": parent.config["seed"]}
    assert parent.config["seed"] != seed
    assert (parent.status, parent.start, parent.budget) == ("continued", start, STEPS // 2)
    assert evolution.rejected == []
    (event,) = events(evolution, kind="failure")
    assert (event["decision"], event["after"]) == ("restarted", {})
    while next(answers) != "border":
        pass
    assert evolution.failures == 0


def test_initial_weights_that_fail_are_drawn_anew(new_run: NewRun) -> None:
    evolution = new_run()
    seed = evolution.slots[2].config["seed"]
    play_to(evolution, World(failure=lambda slot, *_: "not finite" if slot.config["seed"] == seed else None), 1)
    assert evolution.archive["generation_0000_trial_2"].config["seed"] != seed


def test_a_lost_node_is_one_failure(new_run: NewRun) -> None:
    """However many trials it takes with it; a trial that dies again and again is more."""
    evolution = new_run()
    play_to(evolution, World(), 1)
    for trial in range(4):
        evolution.crashed(trial, "the node is gone")
    assert evolution.failures == 1
    for _ in range(2):
        evolution.crashed(2, "the process is gone")
    assert (evolution.finished or "").startswith("emergency stop: 3 failures")


def test_three_failures_in_a_row_stop_the_run_and_keep_the_best(new_run: NewRun) -> None:
    evolution = new_run(generations=9)
    good = World(gain=lambda slot, generation: 0.05)
    play_to(evolution, good, 3)
    best = evolution.best
    bad = World(failure=lambda slot, generation, done: "the meta-gradient is not finite")
    happened = list(play(evolution, bad))
    assert happened[-1] == "restart"
    assert (evolution.finished or "").startswith("emergency stop: 3 failures in a row, the last: the meta-gradient")
    assert evolution.failures == 3
    assert evolution.best == best
    assert skill_of(evolution, best) == pytest.approx(0.5)
    assert len(events(evolution, kind="failure")) == 3
    (stop,) = events(evolution, kind="stop")
    assert stop["decision"] == "stopped"
    assert read_state(evolution.store.folder.parent)["finished"] == evolution.finished


def test_a_trial_that_began_under_the_floor_does_not_stop_the_run(new_run: NewRun) -> None:
    """Where the first of the initial policies is much the best, beginning again cannot help the others."""
    evolution = new_run(survivors=3, generations=3)
    finish(evolution, World(initial=lambda trial: 0.4 if trial else 0.6, gain=lambda *_: 0.01))
    assert evolution.finished == "3 generations"


@pytest.mark.parametrize("extra", [0.1, -0.1])
def test_a_judged_proposal_ends_a_row_of_failures(new_run: NewRun, extra: float) -> None:
    """Two failures a generation for ten generations: no three in a row, whether children are kept or not."""
    evolution = new_run(generations=10, population=4)

    def failure(slot: Slot, generation: int, done: float) -> str | None:
        parents = [s.id for s in evolution.slots if not s.proposal]
        return "not finite" if slot.id in parents[:2] and not slot.restarts and generation else None

    finish(evolution, World(gain=children_gain(extra, 0.0), failure=failure))
    assert evolution.finished == "10 generations"
    assert len(events(evolution, kind="failure")) == 20


@pytest.mark.slow
@settings(max_examples=2)
@given(seed=seeds)
def test_a_healthy_noisy_population_is_not_stopped(new_run: NewRun, seed: int) -> None:
    """Composites walk with a deviation of .02 a generation, and rise by .005."""
    evolution = new_run(seed=seed, generations=30)
    world = World(gain=lambda slot, generation: 0.0055, noise=0.02 / 0.9, iteration=STEPS)
    for happened in play(evolution, world):
        assert happened in ("border", "continue", "wait")
    assert evolution.finished == "30 generations"
    assert not events(evolution, kind="failure")
    assert evolution.archive[evolution.best or ""].composite > (evolution.floor or 0) + 0.05


# --- Going back to the best -------------------------------------------------------------------------------


def collapse_at(*generations: int) -> World:
    """All trials lose .08, more than the margin and less than what the floor forbids."""
    return World(gain=lambda slot, generation: -0.09 if generation in generations else 0.03, wobble=0.001)


@pytest.mark.parametrize("mutate", [True, False])
def test_a_population_wholly_below_the_best_ever_goes_back_to_it(new_run: NewRun, mutate: bool) -> None:
    evolution = new_run(mutate=mutate, generations=6)
    play_to(evolution, collapse_at(2), 2)
    best = evolution.best
    assert best is not None
    assert best.startswith("generation_0001")
    play_to(evolution, collapse_at(2), 1)
    assert evolution.best == best
    (event,) = events(evolution, decision="restored")
    assert (event["kind"], event["generation"], event["checkpoint"]) == ("failure", 2, best)
    assert [slot.start for slot in evolution.slots] == [best] * 4
    (sole,) = [slot for slot in evolution.slots if slot.status == "restored"]
    assert all(slot.parent == best for slot in evolution.slots if slot is not sole)
    assert all(slot.partner == sole.id for slot in evolution.slots if slot.status == "on probation")
    record = evolution.archive[best]
    assert {**sole.config, "seed": 0} == {**record.config, "seed": 0}
    assert evolution.failures == 1


def test_at_the_margin_the_population_goes_on(new_run: NewRun) -> None:
    evolution = new_run(generations=3, collapse_margin=0.1)
    finish(evolution, collapse_at(2))
    assert not events(evolution, decision="restored")
    assert not events(evolution, kind="failure")


def test_what_came_back_does_not_train_on_the_same_tasks_again(new_run: NewRun) -> None:
    """It would end the same way."""
    evolution = new_run(generations=6)
    play_to(evolution, collapse_at(2), 3)
    (sole,) = [slot for slot in evolution.slots if slot.status == "restored"]
    assert sole.config["seed"] != evolution.archive[evolution.best or ""].config["seed"]


def test_a_population_that_never_recovers_is_stopped(new_run: NewRun) -> None:
    """Whatever comes back is wholly below the best again, three times in a row; judged children do not excuse it."""
    evolution = new_run(generations=9)
    finish(evolution, collapse_at(*range(2, 10)))
    assert len(events(evolution, decision="restored")) >= 3
    assert (evolution.finished or "").startswith("emergency stop")


def test_who_goes_on_after_a_return_is_not_twice_the_same(new_run: NewRun) -> None:
    """All children of the only parent are rolled back: an exact copy of it is no second survivor."""
    evolution = new_run(generations=6)
    world = World(gain=lambda slot, generation: -0.09 if generation == 2 else 0.03 - 0.02 * on_probation(slot))
    play_to(evolution, world, 4)
    going_on = [slot for slot in evolution.slots if slot.status not in ("on probation", "copied")]
    twins = [(slot.start, json.dumps(slot.config, sort_keys=True)) for slot in going_on]
    assert len(set(twins)) == len(twins)


# --- Crashes and deaths -----------------------------------------------------------------------------------


def test_a_crash_keeps_the_assignment(new_run: NewRun) -> None:
    evolution = new_run()
    play_to(evolution, World(), 1)
    child = next(slot for slot in evolution.slots if slot.proposal)
    answers = play(evolution, World(), pick=lambda at_work: child.id)
    assert next(answers) == "continue"
    before, assignment = asdict(child), evolution.assignment(child.id)
    evolution.crashed(child.id, "Killed by the kernel")
    assert asdict(child) == {**before, "spent": 0, "restarts": 1}
    assert evolution.assignment(child.id) == assignment
    (event,) = events(evolution, kind="failure")
    assert (event["decision"], event["reason"]) == ("restarted", "Killed by the kernel")
    lifetime = child.lifetime_steps
    finish(evolution)
    assert child.lifetime_steps > lifetime
    assert evolution.finished == "3 generations"


def test_a_crash_while_waiting_opens_the_border_again(new_run: NewRun) -> None:
    evolution = new_run()
    play_to(evolution, World(), 1)
    answers = play(evolution, World())
    while any(not slot.ended for slot in evolution.slots[:2]):
        next(answers)
    evolution.crashed(0, "its process died")
    assert not evolution.ready()
    finish(evolution)
    assert evolution.finished == "3 generations"


def test_crashes_far_apart_are_not_in_a_row(new_run: NewRun) -> None:
    """A generation without a failure ends a row, also without mutations."""
    evolution = new_run(generations=10, mutate=False)
    crashing = {(0, 2): "crashed", (1, 5): "crashed", (0, 8): "crashed"}
    finish(
        evolution,
        World(accident=lambda slot, generation: None if slot.restarts else crashing.get((slot.id, generation))),
    )
    assert evolution.finished == "10 generations"


def dies(trial: int, generation: int) -> World:
    return World(accident=lambda slot, now: "died" if (slot.id, now) == (trial, generation) else None)


@pytest.mark.parametrize("generation", [0, 1, 2])
@pytest.mark.parametrize("last", [False, True])
def test_a_trial_that_died_does_not_hold_up_the_others(new_run: NewRun, generation: int, last: bool) -> None:
    """Whether they wait for it already or not."""
    evolution = new_run(generations=4)
    finish(evolution, dies(2, generation), pick=max if last else min)
    assert evolution.finished == "4 generations"
    assert [slot.status == "dead" for slot in evolution.slots] == [False, False, True, False]
    (event,) = events(evolution, decision="given up")
    assert (event["trial"], event["generation"]) == (2, generation)


@pytest.mark.parametrize("extra", [0.1, -0.1])
def test_a_child_without_its_parent_goes_back_to_where_it_was_forked(new_run: NewRun, extra: float) -> None:
    """However good it is: there is nothing to compare it with."""
    evolution = new_run(generations=1)
    play_to(evolution, World(), 1)
    child = next(slot for slot in evolution.slots if slot.proposal)
    fallback, start, partner = child.fallback, child.start, child.partner
    assert partner is not None
    finish(
        evolution,
        World(gain=children_gain(extra), accident=lambda slot, _: "died" if slot.id == partner else None),
    )
    assert (child.status, child.checkpoint, child.config) == ("rolled back", start, fallback)
    (event,) = events(evolution, kind="probation", trial=child.id)
    assert "died" in event["reason"]


def test_the_death_of_all_ends_the_run(new_run: NewRun) -> None:
    evolution = new_run(max_failures=9)
    play_to(evolution, World(), 2)
    best = evolution.best
    finish(evolution, World(accident=lambda *_: "died"))
    assert evolution.finished == "every trial died"
    assert evolution.best == best
    assert not evolution.ready()


# --- Modes ------------------------------------------------------------------------------------------------


@settings(max_examples=5)
@given(seed=seeds)
def test_cycles_have_one_incumbent_and_its_challengers(new_run: NewRun, seed: int) -> None:
    evolution = new_run(seed=seed, survivors=1, generations=4, population=4)
    before: list[Slot] = []
    for happened in play(evolution, World(noise=0.03)):
        if happened != "border" or evolution.finished:
            continue
        (incumbent,) = [slot for slot in evolution.slots if slot.status in ("continued", "kept")]
        challengers = [slot for slot in evolution.slots if slot is not incumbent]
        assert all(on_probation(slot) and slot.partner == incumbent.id for slot in challengers)
        assert {slot.start for slot in evolution.slots} == {incumbent.checkpoint}
        if before:
            generation = evolution.generation - 1
            verdicts = {e["trial"]: e for e in events(evolution, kind="probation", generation=generation)}
            assert set(verdicts) == {slot.id for slot in before}
            (old,) = events(evolution, kind="training", generation=generation)
            contenders = [old, *(e for e in verdicts.values() if e["decision"] == "kept")]
            champion = max(contenders, key=lambda event: (event["composite"], -event["trial"]))
            assert incumbent.checkpoint == champion["checkpoint"]
        before = challengers
    assert evolution.finished == "4 generations"


def test_without_mutations_the_others_are_copies(new_run: NewRun) -> None:
    evolution = new_run(mutate=False, generations=4)
    base = TrainConfig().to_dict()
    for happened in play(evolution, World(noise=0.02)):
        if happened == "border" and not evolution.finished:
            assert sorted(slot.status for slot in evolution.slots) == ["continued"] * 2 + ["copied"] * 2
        for slot in evolution.slots:
            assert slot.proposal is None
            assert {**slot.config, "seed": 0} == base
    assert evolution.rejected == []
    assert {event["kind"] for event in evolution.store.events()} == {"training", "mutation"}
    assert {event["decision"] for event in evolution.store.events()} == {"continued", "copied"}


@given(population=st.integers(2, 9), survivors=st.integers(0, 8), seed=seeds)
@settings(max_examples=10)
def test_the_better_ones_go_on(new_run: NewRun, population: int, survivors: int, seed: int) -> None:
    survivors = survivors % population
    evolution = new_run(population=population, survivors=survivors, seed=seed, generations=2)
    play_to(evolution, World(wobble=0.1), 1)
    expected = survivors or (population + 1) // 2
    ranked = sorted(
        (event for event in events(evolution, kind="training")),
        key=lambda event: (-event["composite"], event["trial"]),
    )
    assert [slot.id for slot in evolution.slots if slot.status == "continued"] == sorted(
        event["trial"] for event in ranked[:expected]
    )


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"population": 1}, "population"),
        ({"survivors": 4}, r"survivors must be below population \(4\), not 4\."),
        ({"generation_steps": -1}, "generation_steps"),
        ({"validation_steps": -1}, "validation_steps"),
        ({"generations": -1}, "generations"),
        ({"mutate": 1}, "mutate"),
        ({"keep_level": 1.0}, "keep_level"),
        ({"keep_margin": float("nan")}, "keep_margin"),
        ({"step_tolerance": -0.1}, "step_tolerance"),
        ({"max_failures": 0}, "max_failures"),
    ],
)
def test_impossible_rules_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        EvolveConfig(**options)


# --- The same again ---------------------------------------------------------------------------------------


def accidents(chance: float) -> World:
    """A world where trials fail and crash by a chance that their task seeds and restarts decide."""

    def drawn(slot: Slot, generation: int, which: int) -> float:
        return float(np.random.default_rng([slot.config["seed"], generation, slot.restarts, which]).random())

    return World(
        noise=0.03,
        failure=lambda slot, generation, done: (
            "not finite" if drawn(slot, generation, int(2 * done)) < chance else None
        ),
        accident=lambda slot, generation: "crashed" if drawn(slot, generation, 9) < chance else None,
    )


@settings(max_examples=6)
@given(seed=seeds, chance=st.sampled_from([0.0, 0.2]))
def test_equal_seeds_and_reports_give_equal_decisions(new_run: NewRun, seed: int, chance: float) -> None:
    one, other = (finish(new_run(seed=seed, max_failures=9), accidents(chance)) for _ in range(2))
    assert decisions(one) == decisions(other)
    assert outcome(one) == outcome(other)


@pytest.mark.slow
@settings(max_examples=6)
@given(seed=seeds, order=seeds)
def test_who_reports_first_decides_nothing(new_run: NewRun, seed: int, order: int) -> None:
    rng = np.random.default_rng(order)
    one = finish(new_run(seed=seed), World(noise=0.03))
    other = finish(new_run(seed=seed), World(noise=0.03), pick=lambda at_work: int(rng.choice(at_work)))
    assert decisions(one) == decisions(other)
    assert outcome(one) == outcome(other)


def test_other_seeds_give_other_decisions(new_run: NewRun) -> None:
    one, other = (finish(new_run(seed=seed), World(noise=0.03)) for seed in range(2))
    assert [event["after"] for event in decisions(one)] != [event["after"] for event in decisions(other)]


# --- Resuming ---------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process is gone."""


class MortalStore(RunStore):
    """Kills the process at one of its commits: before it, between state and log, or within a line of the log."""

    kill_at, written = -1, 0.0

    def commit(self, state: Mapping[str, Any], events: Sequence[Mapping[str, Any]] = ()) -> None:
        self.kill_at -= 1
        if self.kill_at == 0 and self.written < 0:
            raise Killed
        super().commit(state, events)

    def _append(self, events: Sequence[Mapping[str, Any]]) -> None:
        if self.kill_at != 0:
            return super()._append(events)
        text = "".join(json.dumps(event) + "\n" for event in events)
        with self._events.open("a") as log:
            log.write(text[: round(self.written * len(text))])
        raise Killed


def resumed(evolution: Evolution, **changes: Any) -> Evolution:
    """By another process, which knows only the folder."""
    whole = (evolution.store.folder / "events.jsonl").read_text() if events_written(evolution) else ""
    again = Evolution.resume(RunStore(evolution.store.folder.parent), **changes)
    log = (again.store.folder / "events.jsonl").read_text()
    assert log.startswith(whole[: whole.rfind("\n") + 1]), "a line once written stays"
    check_state(again)
    return again


def events_written(evolution: Evolution) -> bool:
    return (evolution.store.folder / "events.jsonl").exists()


@settings(max_examples=15)
@given(
    seed=st.integers(0, 20),
    chance=st.sampled_from([0.0, 0.15]),
    kills=st.lists(st.tuples(st.integers(1, 40), st.floats(-0.5, 1.5)), min_size=1, max_size=3),
)
def test_a_run_killed_at_any_moment_decides_as_if_nothing_had_happened(
    new_run: NewRun, seed: int, chance: float, kills: list[tuple[int, float]]
) -> None:
    options: dict[str, Any] = {"seed": seed, "generations": 2, "population": 3, "max_failures": 99}
    undisturbed = finish(new_run(**options), accidents(chance))
    evolution = new_run(**options, store=MortalStore)
    for at, written in kills:
        evolution.store.__dict__.update(kill_at=at, written=min(written, 1.0))
        with contextlib.suppress(Killed):
            finish(evolution, accidents(chance))
        lifetimes = [slot["lifetime_steps"] for slot in read_state(evolution.store.folder.parent)["trials"]]
        again = resumed(evolution)
        assert [slot.lifetime_steps for slot in again.slots] == lifetimes
        again.store = MortalStore(again.store.folder.parent)
        evolution = again
    finish(evolution, accidents(chance))
    assert decisions(evolution) == decisions(undisturbed)
    assert outcome(evolution) == outcome(undisturbed)
    assert set(evolution.archive) == set(undisturbed.archive)


@settings(max_examples=6)
@given(seed=st.integers(0, 20), first=st.integers(1, 3), chance=st.sampled_from([0.0, 0.15]))
def test_a_finished_run_can_go_on(new_run: NewRun, seed: int, first: int, chance: float) -> None:
    options: dict[str, Any] = {"seed": seed, "population": 3, "max_failures": 99}
    undisturbed = finish(new_run(**options, generations=4), accidents(chance))
    evolution = finish(new_run(**options, generations=first), accidents(chance))
    done = outcome(evolution)
    same = resumed(evolution)
    assert same.finished == evolution.finished
    assert outcome(same) == {**done, "slots": outcome(same)["slots"]}
    longer = finish(resumed(same, generations=4), accidents(chance))
    assert decisions(longer) == decisions(undisturbed)
    assert outcome(longer) == outcome(undisturbed)


def test_a_run_that_finished_where_the_best_came_back_goes_on_from_it(new_run: NewRun) -> None:
    """At the last border the best ever comes back: with more generations, it is the only parent."""
    undisturbed = finish(new_run(generations=4), collapse_at(2))
    short = finish(new_run(generations=2), collapse_at(2))
    longer = finish(resumed(short, generations=4), collapse_at(2))
    assert decisions(longer) == decisions(undisturbed)


def test_a_stop_between_borders_is_no_border(new_run: NewRun) -> None:
    """The last at work dies, which stops the run: resumed, its generation begins again and is not skipped."""
    evolution = new_run(max_failures=1, survivors=1)
    play_to(evolution, World(), 1)
    finish(evolution, dies(3, 1))
    assert (evolution.finished or "").startswith("emergency stop")
    again = resumed(evolution)
    assert again.generation == 1
    finish(again)
    assert {event["trial"] for event in events(again, kind="probation", generation=1)} >= {1, 2}


@pytest.mark.parametrize("generation", [0, 1])
def test_a_run_whose_trials_all_died_can_be_resumed(new_run: NewRun, generation: int) -> None:
    evolution = finish(new_run(max_failures=9), World(accident=lambda _, now: "died" if now == generation else None))
    again = resumed(evolution)
    assert again.generation == generation
    finish(again)
    assert again.finished == "3 generations"


def test_a_child_that_died_comes_back_without_its_mutation_or_on_probation(new_run: NewRun) -> None:
    """A mutation that was never judged does not go on as an ordinary trial."""
    evolution = new_run(survivors=1)
    play_to(evolution, World(), 1)
    child = next(slot for slot in evolution.slots if slot.proposal)
    fallback = {**(child.fallback or {}), "seed": 0}
    play_to(evolution, dies(child.id, 1), 1)
    slot = Evolution.resume(evolution.store).slots[child.id]
    assert slot.status == "on probation" or {**slot.config, "seed": 0} == fallback


def test_a_trial_that_died_before_its_first_border_comes_back(new_run: NewRun) -> None:
    """Though it has no checkpoint."""
    evolution = finish(new_run(generations=2), dies(1, 0))
    again = finish(resumed(evolution, generations=3))
    assert again.finished == "3 generations"


@pytest.mark.parametrize("waits", [False, True])
def test_no_trial_goes_on_from_a_checkpoint_that_is_gone(new_run: NewRun, waits: bool) -> None:
    """The first border deletes it: a trial that died before goes on from another."""
    evolution = new_run()
    start = evolution.store.checkpoints / "start"
    start.mkdir()
    (start / "policy").write_text(json.dumps({"skill": 0.6, "lineage": 7}))
    evolution = Evolution(evolution.config, TrainConfig().to_dict(), evolution.store, "start")
    world = dies(1, 0)
    if waits:
        for _ in zip(range(3), play(evolution, World())):
            pass
        evolution.crashed(1, "its process died while it waited")
    play_to(evolution, world, 2)
    again = Evolution.resume(evolution.store)
    for slot in again.slots:
        assert Path(again.start_path(slot.id) or start).is_dir()


def test_a_trial_that_comes_back_trains_a_whole_generation(new_run: NewRun) -> None:
    """Though it had begun again, for what was left, in the one in which it died."""
    evolution = new_run(generations=4)
    play_to(evolution, World(), 1)
    seed = evolution.slots[1].config["seed"]
    world = World(
        failure=lambda slot, _, done: "not finite" if slot.config["seed"] == seed and done == 0.5 else None,
        accident=lambda slot, _: "died" if slot.id == 1 and slot.restarts else None,
    )
    play_to(evolution, world, 1)
    again = resumed(evolution)
    assert [slot.budget for slot in again.slots] == [STEPS] * 4


@given(
    fates=st.lists(st.tuples(st.integers(1, 3 * STEPS), st.integers(1, 3 * STEPS)), min_size=2, max_size=6),
    seed=seeds,
)
@settings(max_examples=30, deadline=None)
def test_what_a_generation_is_too_long_by_the_next_one_is_shorter(
    new_run: NewRun, fates: list[tuple[int, int]], seed: int
) -> None:
    """A trial that is never restarted spends its share; a child has its parent's budget, and only like is compared."""
    evolution = new_run(population=2, generations=len(fates), seed=seed, step_tolerance=0.5)
    for trained in [(0, 0), *fates]:
        budgets = [slot.budget for slot in evolution.slots]
        if evolution.generation:
            assert budgets[0] == budgets[1], "equal budgets beside each other"
            assert STEPS // 2 <= budgets[0] <= STEPS + STEPS // 2
        survivor = next((slot for slot in evolution.slots if not slot.proposal), None)
        child = next((slot for slot in evolution.slots if slot.proposal), None)
        for slot, steps in zip(evolution.slots, trained):
            evolution.report(slot.id, overlong(Training(evolution, World(), slot.id), steps))
        carry = None if survivor is None else survivor.budget - trained[survivor.id]
        proposal = None if child is None else Proposal(**child.proposal or {}).key
        evolution.advance()
        if child is not None and survivor is not None:
            (verdict,) = events(evolution, kind="probation", generation=evolution.generation - (not evolution.finished))
            assert ("no comparison" in verdict["reason"]) == (abs(trained[0] - trained[1]) > STEPS / 2)
            if "no comparison" in verdict["reason"]:
                assert verdict["decision"] == "rolled back"
                assert proposal not in evolution.rejected, "nothing is known of it"
        if carry is not None and child is not None and not evolution.finished and survivor.status == "continued":
            assert survivor.carry == carry
            assert survivor.budget == STEPS + min(max(carry, -STEPS // 2), STEPS // 2)


def overlong(training: Training, steps: int) -> Report:
    """The end of a generation that took so many steps."""
    training.trained, training.spent, training.lineage = steps, steps, training.lineage + steps
    assessment = training.assess()
    path = Path(training.assignment["checkpoints"]) / training.name
    path.mkdir(exist_ok=True)
    (path / "policy").write_text(json.dumps({"skill": training.skill, "lineage": training.lineage}))
    return Report(
        spent=training.spent,
        trained=steps,
        lineage_steps=training.lineage,
        assessment=assessment,
        ended=True,
        checkpoint=training.name,
    )


def test_after_an_emergency_stop_at_the_last_border_a_run_is_finished(new_run: NewRun) -> None:
    """Resumed without more generations, it does not begin one more."""
    evolution = finish(new_run(generations=3, max_failures=1), collapse_at(3))
    assert (evolution.finished or "").startswith("emergency stop")
    again = resumed(evolution)
    assert again.finished == "3 generations"
    assert again.generation == 3
    assert {slot.start for slot in resumed(again, generations=4).slots} == {evolution.best}


def test_after_an_emergency_stop_a_person_gets_three_failures_again(new_run: NewRun) -> None:
    evolution = new_run()
    play_to(evolution, World(), 1)
    finish(evolution, World(failure=lambda *_: "not finite"))
    again = resumed(evolution)
    assert again.finished is None
    next(play(again, World(failure=lambda *_: "not finite")))
    assert again.finished is None


@pytest.mark.parametrize("damage", ["{", "[]", '{"format": 1}', '{"format": 0}'])
def test_a_damaged_run_is_not_resumed(new_run: NewRun, damage: str) -> None:
    evolution = new_run()
    (evolution.store.folder / "state.json").write_text(damage)
    with pytest.raises(ValueError, match=r"state\.json"):
        Evolution.resume(evolution.store)


def test_a_resumed_run_keeps_its_rules_but_for_those_that_change(new_run: NewRun) -> None:
    evolution = new_run(population=3, keep_margin=0.03, generations=2)
    finish(evolution)
    again = resumed(evolution, generations=5)
    assert again.config == EvolveConfig(**{**asdict(evolution.config), "generations": 5})


# --- Going back by hand -----------------------------------------------------------------------------------


def check_sole_parent(evolution: Evolution, name: str) -> None:
    assert evolution.best == name
    assert {slot.start for slot in evolution.slots} == {name}
    (sole,) = [slot for slot in evolution.slots if slot.status == "restored"]
    assert all(slot.partner == sole.id for slot in evolution.slots if slot is not sole)
    assert {**sole.config, "seed": 0} == {**evolution.archive[name].config, "seed": 0}
    assert evolution.store.requests() == []
    (event,) = events(evolution, kind="request")
    assert (event["decision"], event["checkpoint"]) == ("restored", name)
    assert event["composite"] == evolution.archive[name].composite


@pytest.mark.parametrize("age", [0, 1, 2])
def test_a_rollback_by_hand_takes_effect_at_the_next_border(new_run: NewRun, age: int) -> None:
    evolution = new_run(generations=6)
    play_to(evolution, World(gain=children_gain(0.1)), 3)
    name = max(name for name in evolution.archive if name.startswith(f"generation_000{age}"))
    evolution.store.request(name)
    before = [asdict(slot) for slot in evolution.slots]
    assert [asdict(slot) for slot in evolution.slots] == before
    play_to(evolution, World(gain=children_gain(0.1)), 1)
    check_sole_parent(evolution, name)
    finish(evolution)
    assert evolution.finished == "6 generations"


@pytest.mark.parametrize("generations", [3, 2])
def test_a_rollback_by_hand_takes_effect_on_resume(new_run: NewRun, generations: int) -> None:
    """Of a run that stopped within a generation, or that is finished and is to go on."""
    evolution = new_run(generations=generations)
    play_to(evolution, World(), 3 if generations == 2 else 2)
    name = min(evolution.archive)
    evolution.store.request(name)
    again = resumed(evolution, generations=6)
    check_sole_parent(again, name)
    finish(again)
    assert again.finished == "6 generations"
    assert len(events(again, kind="request")) == 1


def test_the_last_of_several_requests_counts_and_all_are_logged(new_run: NewRun) -> None:
    evolution = new_run()
    play_to(evolution, World(), 2)
    names = sorted(evolution.archive)[:2]
    for name in names:
        evolution.store.request(name)
    play_to(evolution, World(), 1)
    assert evolution.best == names[-1]
    assert {slot.start for slot in evolution.slots} == {names[-1]}
    assert [event["checkpoint"] for event in events(evolution, kind="request")] == names
    assert evolution.store.requests() == []


def test_a_request_of_a_finished_run_counts_when_it_goes_on(new_run: NewRun) -> None:
    """Though a resume that has nothing else to do carries it out before."""
    evolution = finish(new_run(generations=2))
    name = min(evolution.archive)
    evolution.store.request(name)
    again = resumed(evolution)
    assert again.best == name
    check_sole_parent(resumed(again, generations=4), name)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"checkpoint": "generation_0009_trial_0"}'])
def test_a_request_that_makes_no_sense_is_refused_and_said(new_run: NewRun, content: str) -> None:
    evolution = new_run()
    (evolution.store.folder / "requests" / "1.json").write_text(content)
    play_to(evolution, World(), 2)
    (event,) = events(evolution, kind="request")
    assert event["decision"] == "refused"
    assert "keeps no checkpoint" in event["reason"]
    assert evolution.store.requests() == []


def test_a_request_within_generation_0_can_be_carried_out(new_run: NewRun) -> None:
    """Though the other trials have no checkpoint yet."""
    evolution = new_run()
    next(play(evolution, World()))
    (name,) = evolution.archive
    evolution.store.request(name)
    again = resumed(evolution)
    check_sole_parent(again, name)
    finish(again)


def test_a_request_after_the_death_of_all_is_carried_out(new_run: NewRun) -> None:
    evolution = new_run(max_failures=9)
    play_to(evolution, World(), 2)
    finish(evolution, World(accident=lambda *_: "died"))
    name = min(evolution.archive)
    evolution.store.request(name)
    check_sole_parent(resumed(evolution), name)


def test_a_request_for_a_checkpoint_of_this_generation_keeps_it(new_run: NewRun) -> None:
    """The trial that wrote it does not write over it."""
    evolution = new_run(generations=4, survivors=1)
    play_to(evolution, World(), 1)
    answers = play(evolution, World())
    while not evolution.slots[0].ended:
        next(answers)
    name = evolution.slots[0].checkpoint
    assert name is not None
    evolution.store.request(name)
    skill = skill_of(evolution, name)
    again = resumed(evolution)
    assert again.best == name
    answers = play(again, World(gain=lambda *_: -0.01))
    while next(answers) != "border":
        assert skill_of(again, name) == skill
        assert again.archive[name].composite == evolution.archive[name].composite


@pytest.mark.parametrize("written", [0.0, 1.0])
def test_a_crash_while_a_request_is_carried_out_loses_nothing(new_run: NewRun, written: float) -> None:
    """Either the border has not been passed and the request is there, or both are done."""
    evolution = new_run(generations=4, store=MortalStore)
    play_to(evolution, World(gain=children_gain(0.1)), 2)
    name = min(evolution.archive)
    evolution.store.request(name)
    world = World(gain=children_gain(0.1))
    answers = play(evolution, world)
    while any(not slot.ended for slot in evolution.living):
        next(answers)
    generation = evolution.generation
    evolution.store.__dict__.update(kill_at=1, written=written)
    with pytest.raises(Killed):
        next(answers)
    shutil.rmtree(evolution.store.folder / "requests") if written else None  # the file was deleted, too
    again = resumed(evolution)
    if again.generation == generation:
        for slot in again.slots:
            sizes = {key: slot.config[key] for key in ("state_dim", "hidden_dim", "num_layers")}
            start = again.archive[slot.start or ""].config
            assert on_probation(slot) or sizes == {key: start[key] for key in sizes}
        play_to(again, world, 1)
    assert {slot.start for slot in again.slots} == {name}


# --- Disk and state ---------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=12)
@given(
    seed=seeds,
    population=st.integers(2, 5),
    survivors=st.integers(0, 4),
    keep_generations=st.integers(0, 3),
    trend=st.sampled_from([0.05, 0.0, -0.05]),
    order=seeds,
)
def test_whatever_happens_the_best_stays_and_the_disk_does_not_fill(
    new_run: NewRun, seed: int, population: int, survivors: int, keep_generations: int, trend: float, order: int
) -> None:
    """Rise or fall, failures, crashes, deaths, requests and kills; see `check` and `check_border`."""
    rng = np.random.default_rng(order)
    evolution = new_run(
        seed=seed,
        population=population,
        survivors=survivors % population,
        keep_generations=keep_generations,
        generations=5,
        max_failures=int(rng.integers(3, 12)),
    )
    chance = accidents(0.1)
    deaths = {(int(rng.integers(population)), int(rng.integers(1, 9)))}

    def accident(slot: Slot, generation: int) -> str | None:
        return "died" if (slot.id, generation) in deaths else chance.accident(slot, generation)

    world = World(gain=lambda *_: trend, noise=0.05, failure=chance.failure, accident=accident)
    lifetimes = [0] * population
    best = -1.0
    requested = 0
    for happened in play(evolution, world, pick=lambda at_work: int(rng.choice(at_work))):
        now = [slot.lifetime_steps for slot in evolution.slots]
        assert all(new >= old for new, old in zip(now, lifetimes))
        lifetimes = now
        if happened == "border":
            assert evolution.best is not None
            composite = evolution.archive[evolution.best].composite
            asked = len(events(evolution, kind="request"))
            assert composite >= best or asked > requested
            best, requested = composite, asked
            if rng.random() < 0.2:
                evolution.store.request(str(rng.choice(sorted(evolution.archive))))
    assert evolution.finished
    assert (evolution.best is None) == (not evolution.archive or evolution.floor is None)


@pytest.mark.slow
@settings(max_examples=12)
@given(
    seed=seeds,
    population=st.integers(2, 4),
    chance=st.sampled_from([0.0, 0.1]),
    lives=st.lists(st.tuples(st.integers(0, 25), st.booleans()), min_size=1, max_size=4),
    deaths=st.sets(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=4),
    trend=st.sampled_from([0.03, -0.06]),
)
def test_a_run_that_is_killed_again_and_again_arrives(
    new_run: NewRun,
    seed: int,
    population: int,
    chance: float,
    lives: list[tuple[int, bool]],
    deaths: set[tuple[int, int]],
    trend: float,
) -> None:
    """With failures, deaths and requests before any of its resumptions."""
    evolution = new_run(seed=seed, population=population, generations=3, max_failures=5, keep_generations=2)
    unkind = accidents(chance)

    def accident(slot: Slot, generation: int) -> str | None:
        return "died" if (slot.id, generation) in deaths else unkind.accident(slot, generation)

    world = World(gain=lambda *_: trend, noise=0.02, failure=unkind.failure, accident=accident)
    for steps, asks in lives:
        for _ in itertools.islice(play(evolution, world), steps):
            pass
        if asks and evolution.archive:
            evolution.store.request(min(evolution.archive))
        before = [slot.lifetime_steps for slot in evolution.slots]
        evolution = resumed(evolution)
        assert [slot.lifetime_steps for slot in evolution.slots] == before
        assert evolution.store.requests() == []
    deaths.clear()
    finish(evolution, World())
    again = resumed(evolution, generations=evolution.generation + 1)
    finish(again, World())
    assert again.generation == evolution.generation + 1


VIEW = {"id", "parent", "sizes", "learning_rates", "metrics", "composite", "status", "lineage_steps"}
VIEW |= {"lifetime_steps", "checkpoint"}
EVENT = {"time", "generation", "trial", "parent", "kind", "before", "after", "metrics", "composite", "interval"}
EVENT |= {"decision", "reason", "checkpoint"}


def test_the_state_is_what_others_read(new_run: NewRun) -> None:
    evolution = new_run(generations=3)
    lost = World(wobble=0.05)
    for happened in play(evolution, lost):
        state = read_state(evolution.store.folder.parent)
        strict_json((evolution.store.folder / "state.json").read_text())
        assert {"generation", "best", "trials"} <= set(state)
        assert len(state["trials"]) == 4
        for trial in state["trials"]:
            assert set(trial) >= VIEW
            assert trial["sizes"] == {key: trial["config"][key] for key in ("state_dim", "hidden_dim", "num_layers")}
            assert set(trial["learning_rates"]) == {"inner_lr", "outer_lr", "inner_steps"}
            record = state["archive"].get(trial["checkpoint"])
            assert trial["composite"] == (record and record["composite"])
            assert trial["metrics"] == (record["metrics"] if record else {})
        if happened == "border":
            assert all(0 <= trial["composite"] <= 1 for trial in state["trials"])
    for line in (evolution.store.folder / "events.jsonl").read_text().splitlines():
        assert set(strict_json(line)) >= EVENT


def test_every_event_names_a_checkpoint_that_there_was(new_run: NewRun) -> None:
    """Also where a child is under the floor at half its budget, without a checkpoint of its own."""
    evolution = new_run(generations=2)
    finish(evolution, World(gain=lambda slot, _: -0.5 if on_probation(slot) and not slot.restarts else 0.02))
    assert events(evolution, kind="failure")
    for event in evolution.store.events():
        assert event["checkpoint"] is None or event["checkpoint"].startswith("generation_")


def test_a_policy_that_lost_every_task_is_the_worst_and_still_json(new_run: NewRun) -> None:
    evolution = new_run(generations=2)
    play_to(evolution, World(), 1)
    nothing = [[None, None]] * TASKS
    history = [*evolution.assignment(0)["history"][0][1:], [None] * TASKS]
    trial = next(slot for slot in evolution.slots if slot.status == "continued").id
    report = {"validation": nothing, "shifted": nothing, "history": history, "history_steps": [0, STEPS]}
    answer = evolution.report(
        trial, Report(spent=STEPS, lineage_steps=STEPS, trained=STEPS, assessment=report, ended=True, checkpoint="x")
    )
    check(evolution)
    assert answer == "restart"
    (event,) = events(evolution, kind="failure")
    assert event["composite"] == 0.0
