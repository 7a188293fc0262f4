"""A schedule of options replayed by `train`: the incumbent's weights, bit for bit, and what is refused."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssm_metarl.config import TrainConfig
from ssm_metarl.distributed.schedule import SCHEDULE, Schedule
from ssm_metarl.distributed.train import train
from ssm_metarl.storage.checkpoint import load_checkpoint
from ssm_metarl.storage.contents import Checkpoint
from ssm_metarl.tuning.config import EvolveConfig
from ssm_metarl.tuning.evolve import evolve
from ssm_metarl.tuning.member_trainer import MemberTrainer
from ssm_metarl.tuning.options import Options
from ssm_metarl.tuning.race import RaceRule
from ssm_metarl.tuning.records import Assignment

SMALL = TrainConfig.for_task(
    "navigation-2d", meta_batch=4, episodes=3, hidden_dim=8, state_dim=4, epochs=2, lr_schedule="constant", seed=3
)
CHANGES: list[tuple[int, dict[str, Any]]] = [
    (2, {"state_dim": 6, "hidden_dim": 7}),
    (4, {"outer_lr": 3e-3, "seed": 11}),
    (5, {"num_layers": 2}),
]
ITERATIONS = 7


class NoExchange:
    """Of a member that is told what to do by its test."""

    def next(self, member: int, after: int) -> None: ...

    def threads(self, member: int) -> None: ...

    def offer(self, key: str, rollouts: Any) -> None: ...

    def fetch(self, key: str) -> tuple[()]:
        return ()


def write_schedule(path: Path, first: int = 0, **changes: Any) -> Path:
    values = {"iterations": ITERATIONS, "weights": "last", "options": [[first, SMALL.to_dict()], *CHANGES]}
    path.write_text(json.dumps(values | changes))
    return path


def bred(archive: Path) -> Checkpoint:
    """What a member of a population arrives at, from checkpoint to checkpoint with other options each."""
    machine = {"num_workers": 0, "learner_threads": 1, "device": "cpu"}
    member = MemberTrainer(
        {"member": 0, "exchange": NoExchange(), "archive": str(archive), "mean_iterations": 4, "machine": machine}
    )
    config, start, ends = SMALL.to_dict(), None, [at for at, _ in CHANGES] + [ITERATIONS]
    for number, (end, (_, changes)) in enumerate(zip(ends, [(0, {}), *CHANGES], strict=True)):
        config = {**config, **changes}
        done = 0 if number == 0 else ends[number - 1]
        name = f"at_{end}"
        assignment = Assignment(number=number, config=config, start=start, iterations=end - done, checkpoint=name)
        *_, last = member.carry_out(assignment)
        assert last.failure is None
        start = name
    member.stop()
    return load_checkpoint(archive / f"at_{ITERATIONS}")


def assert_same(one: Checkpoint, other: Checkpoint) -> None:
    assert one.spec == other.spec
    assert one.progress == other.progress
    for arrays, others in ((one.policy, other.policy), (one.optimizer, other.optimizer)):
        assert arrays.keys() == others.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, others[name])


def test_a_schedule_gives_the_weights_of_a_member_also_when_it_is_resumed(tmp_path: Path) -> None:
    expected = bred(tmp_path / "archive")
    schedule = write_schedule(tmp_path / "found.json")
    config = Schedule.read(schedule).config
    result = train(config, tmp_path / "run", schedule=schedule)
    assert_same(load_checkpoint(result.checkpoint), expected)
    train(config.replace(iterations=4), tmp_path / "halted", schedule=schedule)
    schedule.unlink()
    result = train(config, tmp_path / "halted", resume=True)
    assert_same(load_checkpoint(result.checkpoint), expected)
    assert [json.loads(line)["iteration"] for line in (tmp_path / "halted" / "metrics.jsonl").open()] == [*range(1, 8)]


def test_a_schedule_that_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    """Of a run that evolve began from a trained policy, at that policy's iteration and with its optimiser."""
    config = SMALL.replace(iterations=2)
    start = train(config, tmp_path / "start").checkpoint
    straight = load_checkpoint(train(config.replace(iterations=4), tmp_path / "straight").checkpoint)
    schedule = write_schedule(tmp_path / "found.json", iterations=4, options=[[2, SMALL.to_dict()]])
    with pytest.raises(ValueError, match="begins at meta-iteration 2: start must be the checkpoint"):
        train(Schedule.read(schedule).config, tmp_path / "run", schedule=schedule)
    result = train(Schedule.read(schedule).config, tmp_path / "run", start=start, schedule=schedule)
    assert_same(load_checkpoint(result.checkpoint), straight)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"options": []}, "it has no options"),
        ({"iteration": 3}, "did you mean 'iterations'"),
        ({"options": [[0, SMALL.to_dict() | {"outer_rl": 1}]]}, "outer_rl"),
        ({"options": [[0, SMALL.to_dict()], [2, {"outer_lr": -1}]]}, "outer_lr must be"),
        ({"options": [[0, SMALL.to_dict()], [2, {"task": "cartpole"}]]}, "it changes task, which a run cannot"),
        ({"options": [[2, SMALL.to_dict()], [1, {}]]}, "must ascend"),
    ],
)
def test_what_is_no_schedule_is_one_sentence(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    write_schedule(tmp_path / SCHEDULE, **changes)
    with pytest.raises(ValueError, match=rf"^{tmp_path}.*schedule.json is no schedule of options: .*{sentence}"):
        Schedule.read(tmp_path)
    (tmp_path / SCHEDULE).write_text("[")
    with pytest.raises(ValueError, match=rf"^{tmp_path}.*schedule.json is not valid JSON"):
        Schedule.read(tmp_path)


def test_a_schedule_is_for_a_new_run_of_meta_training(tmp_path: Path) -> None:
    schedule = write_schedule(tmp_path / "found.json")
    with pytest.raises(ValueError, match="resumed with its own schedule"):
        train(SMALL, tmp_path / "run", resume=True, schedule=schedule)
    with pytest.raises(ValueError, match="algorithm cannot be policy-gradient"):
        train(TrainConfig.for_task("cartpole", algorithm="policy-gradient"), tmp_path / "run", schedule=schedule)
    with pytest.raises(ValueError, match="There is no schedule"):
        train(SMALL, tmp_path / "run", schedule=tmp_path / "nowhere.json")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_schedule_gives_the_weights_of_an_evolved_incumbent(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any challenger that is not worse wins; every second race is about a size."""
    options = itertools.cycle(("outer_lr", "state_dim"))
    monkeypatch.setattr(Options, "challenges", lambda self, config, *_, **__: self.moves(next(options), config))
    rule = RaceRule(rounds=1, win=1e-6, behind=(0.0,))
    rules = EvolveConfig(
        cycles=6, proposals=2, evolve=("outer_lr", "state_dim"), race=rule, stretch=2, losers_share=1.0
    )
    result = evolve(SMALL, rules, tmp_path / "evolved")
    schedule = json.loads((tmp_path / "evolved" / SCHEDULE).read_text())
    assert {name for _, changes in schedule["options"][1:] for name in changes} == {"outer_lr", "state_dim"}
    replayed = train(Schedule.read(tmp_path / "evolved").config, tmp_path / "run", schedule=tmp_path / "evolved")
    best = result.state["progress"]["best"]
    assert_same(load_checkpoint(replayed.checkpoint), load_checkpoint(tmp_path / "evolved/rsi/checkpoints" / best))
