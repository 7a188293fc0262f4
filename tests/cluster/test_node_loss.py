"""A node of a cluster is killed: training gives the same numbers, and self-improvement goes on deciding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ssm_metarl.config import TrainConfig
from ssm_metarl.distributed.schedule import Schedule
from ssm_metarl.distributed.train import train
from ssm_metarl.storage.checkpoint import load_checkpoint
from ssm_metarl.storage.run_folder import checkpoints
from ssm_metarl.tuning.store import RunStore, read_state
from three_nodes import EXPECTED, ITERATIONS, SMALL

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

PROGRAM = Path(__file__).resolve().parents[1] / "three_nodes.py"
VOLATILE = ("seconds", "restarts")


def program(what: str, folder: Path) -> dict[str, Any]:
    """The program's answer; it runs in a process of its own, for a process has one Ray."""
    answer = folder.with_suffix(".json")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    result = subprocess.run(
        [sys.executable, str(PROGRAM), what, str(folder), str(answer)],
        env={**environment, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=380,
    )
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(answer.read_text())
    return found


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in VOLATILE} for line in lines]


@pytest.mark.parametrize("kind", ["train", "learners"])
def test_training_does_not_notice_a_lost_node(tmp_path: Path, kind: str) -> None:
    answer = program(kind, tmp_path / "lost")
    assert answer["alive"] == 2
    assert len(answer["spread"]) >= 2, "workers and learners were spread"
    assert answer["lost"] >= 1, "one was on the node"
    train(TrainConfig.for_task("navigation-2d", **SMALL, iterations=ITERATIONS), tmp_path / "quiet")
    lost, quiet = metrics(tmp_path / "lost"), metrics(tmp_path / "quiet")
    assert len(lost) == ITERATIONS
    assert lost == quiet


def test_a_learner_without_a_processor_takes_the_place_of_a_worker(tmp_path: Path) -> None:
    answer = program("room", tmp_path / "lost")
    assert answer == {"learners": 1, "workers": 1}, "one of each was on the node, and one of two workers ended"
    train(TrainConfig.for_task("navigation-2d", **SMALL, iterations=ITERATIONS), tmp_path / "quiet")
    assert metrics(tmp_path / "lost") == metrics(tmp_path / "quiet")


def test_an_elastic_run_takes_the_processors_that_there_are(tmp_path: Path) -> None:
    answer = program("elastic", tmp_path / "elastic")
    assert answer["workers"] == {str(iteration): workers for iteration, workers in EXPECTED.items()}
    schedule = tmp_path / "schedule.json"
    train(Schedule.read(schedule).config, tmp_path / "quiet", schedule=schedule)
    assert metrics(tmp_path / "elastic") == metrics(tmp_path / "quiet")


def test_self_improvement_survives_the_node_of_a_member(tmp_path: Path) -> None:
    answer = program("evolve", tmp_path)
    assert answer["code"] == 0
    assert len(answer["killed"]) == 1
    run = tmp_path / "storage" / "evolved"
    state, events = read_state(run), RunStore(run).events()
    assert state["progress"]["finished"] == "6 cycles"
    # Whether the member had something to do when its node was lost, and a failure is counted, is chance.
    assert "gone" not in state["live"]["members"]
    races = [event["cycle"] for event in events if event["decision"] in ("accepted", "rejected")]
    assert races == list(range(6))
    assert load_checkpoint(checkpoints(run)[-1]).progress["env_steps"] > 0
