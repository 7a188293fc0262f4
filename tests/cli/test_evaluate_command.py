"""The commands evaluate and plot: what they print, and how an interrupted one ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from command_line import EVALUATION, IN_PROCESS, Command, only_object
from ssm_metarl.evaluation.evaluate import evaluate_checkpoint


@pytest.mark.parametrize(
    ("end", "code"),
    [(KeyboardInterrupt(), 130), (SystemExit(int(signal.SIGTERM)), 143)],  # the latter by the handler that Ray installs
)
def test_an_interrupted_evaluation_has_the_exit_code_of_its_signal(
    command: Command, trained: Path, monkeypatch: pytest.MonkeyPatch, end: BaseException, code: int
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise end

    monkeypatch.setattr("ssm_metarl.cli.evaluate.evaluate_checkpoint", interrupted)
    outcome = command("evaluate", trained, "--json")
    assert (outcome.code, outcome.out) == (code, "")
    assert "Traceback" not in outcome.err


def test_evaluate_prints_one_json_object(command: Command, trained: Path) -> None:
    arguments = ("--split", "shifted", "--num-tasks", "4", "--steps", "2", "--seed", "3")
    outcome = command("evaluate", trained, *arguments, "--json")
    assert outcome.code == 0, outcome.err
    report = only_object(outcome.out)
    assert report.keys() == EVALUATION
    assert {name: report[name] for name in ("task", "split", "num_tasks")} == {
        "task": "navigation-2d",
        "split": "shifted",
        "num_tasks": 4,
    }
    for name in ("return", "ci_low", "ci_high", "episode_length"):
        assert len(report[name]) == 3
    same = evaluate_checkpoint(trained, split="shifted", num_tasks=4, steps=2, seed=3).summary()
    assert {**report, "seconds": 0} == {**same, "seconds": 0}
    without = command("evaluate", trained, *arguments)
    assert (without.code, without.out) == (0, "")
    assert f"{report['return'][2]:.2f}" in without.err


def test_evaluating_a_checkpoint_again_gives_what_training_ended_with(command: Command, tmp_path: Path) -> None:
    command("--iterations", "2", *IN_PROCESS, "--seed", "7", "--run-dir", tmp_path / "run")
    ended = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    outcome = command("evaluate", tmp_path / "run" / "checkpoint_000002", "--num-tasks", "3", "--seed", "7", "--json")
    assert ended.pop("checkpoint") == "checkpoint_000002"
    assert {**only_object(outcome.out), "seconds": 0} == {**ended, "seconds": 0}


def test_plot_names_the_pictures_that_it_drew(command: Command, trained: Path) -> None:
    outcome = command("plot", trained)
    assert outcome.code == 0
    assert outcome.out.splitlines() == [str(trained / "learning_curve.png")]
    (trained / "learning_curve.png").unlink()


def test_without_workers_ray_is_not_loaded() -> None:
    program = "import sys; from ssm_metarl.cli.main import main; main(sys.argv[1:]); print('ray' in sys.modules)"
    words = ["evaluate", "pretrained:cartpole", "--num-tasks", "1", "--episodes", "1", "--steps", "0"]
    found = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"
