"""Groups of runs compared: statistics by hand, intervals that cover, and what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ssm_metarl
from evolved import fresh_run
from ssm_metarl.cli.main import main
from ssm_metarl.evaluation.groups import Group, Run, compare_groups, read_group, resampled
from ssm_metarl.storage.documents import CheckpointError


def run(score: float, task: str = "a", returns: tuple[float, ...] = (0.0, 1.0)) -> Run:
    return Run(Path("x"), task, score, np.arange(1.0, len(returns) + 1), np.array(returns))


def group(name: str, *scores: float, task: str = "a") -> Group:
    return Group(name, [run(score, task) for score in scores])


def test_aggregates_by_hand() -> None:
    found = compare_groups([group("one", 1.0, 2.0, 3.0, 10.0), group("two", 2.0, 4.0)])
    one, two = found["groups"]["one"], found["groups"]["two"]
    assert (one["runs"], one["mean"]["value"], one["iqm"]["value"]) == (4, 4.0, 2.5)
    assert one["mean"]["ci_low"] < 4.0 < one["mean"]["ci_high"]
    assert "improvement" not in one
    # Of eight pairs, 2 and 4 are above 1, 2 (a tie), 3, 10 in 1.5 and 3.
    assert two["improvement"]["value"] == pytest.approx(4.5 / 8)
    assert 0 <= two["improvement"]["ci_low"] <= two["improvement"]["ci_high"] <= 1
    assert one["profile"][0] == 3 / 4, "all but the worst are above the least threshold"
    assert one["profile"][-1] == two["profile"][-1] == 0
    assert found["thresholds"][0] == 1.0
    assert found["thresholds"][-1] == 10.0


def test_several_tasks_are_put_on_one_scale_first() -> None:
    one = Group("one", [run(0.0, "a"), run(100.0, "b")])
    two = Group("two", [run(1.0, "a"), run(300.0, "b")])
    found = compare_groups([one, two])
    assert found["normalised"] is True
    assert [found["groups"][name]["mean"]["value"] for name in ("one", "two")] == [0.0, 1.0]
    assert found["groups"]["two"]["improvement"]["value"] == 1.0
    assert found["groups"]["one"]["curve"] is None
    assert found["groups"]["one"]["mean"]["ci_low"] is None, "one run a task tells no chance"


def test_a_curve_is_over_the_steps_that_all_runs_have() -> None:
    runs = [run(0.0, returns=(0.0, 2.0, 4.0)), Run(Path("x"), "a", 0.0, np.array([2.0, 5.0]), np.array([4.0, 10.0]))]
    curve = compare_groups([Group("one", runs)])["groups"]["one"]["curve"]
    assert (curve["steps"][0], curve["steps"][-1]) == (2.0, 3.0)
    assert (curve["iqm"][0], curve["iqm"][-1]) == (3.0, 5.0)
    assert all(low <= middle <= high for low, middle, high in zip(curve["low"], curve["iqm"], curve["high"]))


@pytest.mark.parametrize("runs", [4, pytest.param(10, marks=pytest.mark.slow)])
def test_intervals_cover(runs: int) -> None:
    """95 of 100: here of 400, with three standard errors for chance and the bootstrap's approximation."""
    rng, covered = np.random.default_rng(runs), 0
    for _ in range(400):
        scores = {task: level + rng.normal(size=runs) for task, level in (("a", 0.0), ("b", 3.0))}
        found = resampled(scores, lambda values: float(np.mean([each.mean() for each in values])), rng)
        covered += found["ci_low"] <= 1.5 <= found["ci_high"]
    assert 0.91 <= covered / 400 <= 0.99


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssm_metarl.evaluation.groups.RESAMPLES", 200)


def write(folder: Path, score: float, task: str = "cartpole") -> None:
    folder.mkdir(parents=True)
    lines = [
        {"iteration": i, "env_steps": 10 * i, "return_by_step": [0.0, score - 3 + i], "seconds": {"total": 1.0}}
        for i in range(1, 4)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    each: dict[str, Any] = {"return": [0.0, score], "ci_low": [None] * 2, "ci_high": [None] * 2}
    each |= {"task": task, "split": "test", "episode_length": [5.0, 5.0], "num_tasks": 3}
    (folder / "evaluation.json").write_text(json.dumps(each))


def test_a_folder_of_runs_is_a_group(tmp_path: Path) -> None:
    for seed, score in enumerate((3.0, 1.0, 2.0)):
        write(tmp_path / "many" / f"seed-{seed}", score)
    (tmp_path / "many" / "seed-7").mkdir()
    (tmp_path / "many" / "seed-7" / "metrics.jsonl").write_text("")  # not evaluated
    found = read_group(str(tmp_path / "many"))
    assert found.name == "many"
    assert found.scores("cartpole").tolist() == [3.0, 1.0, 2.0]
    assert found.missing == [tmp_path / "many" / "seed-7"]
    alone = read_group(f"one={tmp_path / 'many' / 'seed-1'}")
    assert (alone.name, alone.scores("cartpole").tolist()) == ("one", [1.0])
    with pytest.raises(ValueError, match="holds no run that was evaluated"):
        read_group(str(tmp_path / "many" / "seed-7"))
    write(tmp_path / "lost", float("nan"))
    with pytest.raises(ValueError, match="lost cannot be compared: its evaluation has no return"):
        read_group(str(tmp_path / "lost"))
    (tmp_path / "many" / "seed-0" / "evaluation.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"evaluation\.json is damaged"):
        read_group(str(tmp_path / "many"))


def test_the_command_prints_numbers_and_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, better in (("one", 0.0), ("<two>", 10.0)):
        for seed in range(3):
            write(tmp_path / name / f"seed-{seed}", seed + better)
    page = tmp_path / "report.html"
    words = ["compare", str(tmp_path / "one"), str(tmp_path / "<two>"), "--out", str(page), "--json"]
    assert main(words) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert found["groups"]["<two>"]["improvement"]["value"] == 1.0
    assert all(len(line) <= 80 for line in shown.err.splitlines() if not line.startswith("Report: "))
    text = page.read_text()
    assert text.count("<img") == 3
    assert "&lt;two&gt;" in text
    assert "<two>" not in text
    assert "http" not in text, "nothing is loaded from elsewhere"
    assert f"ssm-metarl {ssm_metarl.__version__}, " in text
    assert str(tmp_path / "one" / "seed-2") in text


def test_what_cannot_be_compared_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a", 1.0)
    write(tmp_path / "b", 1.0, task="bandit")
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert "b has runs of bandit, a of cartpole: only runs of the same tasks compare." in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "a")]) == 2
    assert "Two groups are called 'a'" in capsys.readouterr().err


def test_a_run_of_evolve_is_told_what_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "runs" / "trained", 1.0)
    evolved = tmp_path / "runs" / "evolved"
    fresh_run(evolved)
    assert main(["compare", str(evolved)]) == 2
    said = f"{evolved} is a run of evolve, which evaluates no return: train --schedule {evolved} repeats it"
    assert said in capsys.readouterr().err
    beside = read_group(str(tmp_path / "runs"))
    assert [run.folder.name for run in beside.runs] == ["trained"]
    assert beside.missing == [evolved], "which is told"


@pytest.mark.slow
def test_seeds_train_side_by_side_and_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--hidden-dim", "8", "--state-dim", "4", "--meta-batch", "3", "--episodes", "2", "--eval-tasks", "3"]
    words = ["train", *small, "--iterations", "3", "--run-dir", str(tmp_path / "runs"), "--json"]
    assert main([*words, "--seeds", "0", "2", "2"]) == 2
    assert main([*words, "--seeds", "0", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["exit_codes"] == {"0": 0, "2": 0}
    assert found["comparison"]["groups"]["runs"]["runs"] == 2
    assert (tmp_path / "runs" / "report.html").is_file()
    assert main([*words, "--seeds", "0", "2"]) == 2, "the folder is not empty"
    assert (
        main(["train", "--resume", "--run-dir", str(tmp_path / "runs"), "--iterations", "5", "--seeds", "0", "2"]) == 0
    )
    for seed in (0, 2):
        lines = (tmp_path / "runs" / f"seed-{seed}" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["iteration"] for line in lines] == [1, 2, 3, 4, 5]
