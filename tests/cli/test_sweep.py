"""A search over options: what its file may say, and what it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray import tune

from ssm_metarl.cli.main import main
from ssm_metarl.cli.parsing import parse
from ssm_metarl.cli.sweep import domain, sweep_file


def test_a_space_is_of_tunes_functions() -> None:
    assert (domain("outer_lr", {"loguniform": [1e-4, 1e-2]}).lower, domain("x", {"uniform": [0, 1]}).upper) == (1e-4, 1)
    assert domain("epochs", [1, 2, 5]).categories == [1, 2, 5]
    assert domain("epochs", {"choice": [1, 2]}).categories == [1, 2]
    assert domain("epochs", {"grid_search": [1, 2]}) == tune.grid_search([1, 2])


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        (3, r"The space of x must be a list of values, or one of uniform, .* with its arguments, not 3\.$"),
        ([], r"must be a list of values"),
        ({"uniform": [0, 1], "choice": [1]}, r"must be a list of values"),
        ({"unifrm": [0, 1]}, r"The space of x: there is no function 'unifrm', did you mean 'uniform'"),
        ({"run": [0, 1]}, r"there is no function 'run'"),
        ({"uniform": [0, 1, 2, 3]}, r"The space of x, uniform: .*argument"),
        ({"loguniform": [-1, 1]}, r"The space of x, loguniform: "),
    ],
)
def test_a_wrong_space_is_one_sentence(spec: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        domain("x", spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({}, "has no space"),
        ({"space": 3}, "has no space"),
        ({"space": {"outer_lrr": [1]}}, "there is no option to search over 'outer_lrr', did you mean 'outer_lr'"),
        ({"space": {"task": ["os:abort"]}}, "there is no option to search over 'task'"),
        ({"space": {"device": ["cpu"]}}, "there is no option to search over 'device'"),
        ({"task": "os:abort", "space": {"epochs": [1]}}, "names the task 'os:abort', which is code that a file does"),
        ({"iteratons": 2, "space": {"epochs": [1]}}, "there is no option 'iteratons', did you mean 'iterations'"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path: Path, content: dict[str, Any], sentence: str) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=sentence):
        sweep_file(path)
    assert main(["sweep", str(path), "--run-dir", str(tmp_path / "run")]) == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_search_of_optuna_with_trials_that_asha_stops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = {"hidden_dim": 8, "state_dim": 4, "meta_batch": 3, "episodes": 2, "iterations": 9}
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({**small, "space": {"outer_lr": {"loguniform": [1e-4, 1e-2]}}}))
    words = ["sweep", str(path), "--samples", "6", "--search", "optuna", "--scheduler", "asha", "--json"]
    assert main([*words, "--run-dir", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out.splitlines()[-1])["trials"] == 6
    done = [line.split()[1] for line in shown.err.splitlines() if "outer_lr " in line]
    assert len(done) == 6
    assert 1 <= done.count("9") < 6, "some are stopped, and one goes to the end"


@pytest.mark.slow
def test_a_search_leaves_the_best_options_for_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = {"hidden_dim": 8, "state_dim": 4, "meta_batch": 3, "episodes": 2, "iterations": 3}
    space = {"outer_lr": {"loguniform": [1e-4, 1e-2]}, "epochs": [1, 2]}
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({"task": "navigation-2d", **small, "space": space}))
    assert main(["sweep", str(path), "--samples", "2", "--run-dir", str(tmp_path / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["trials"] == 2
    config = parse(["train", "--config", str(tmp_path / "run" / "best.yaml")]).options().config  # type: ignore[union-attr]
    assert {name: value for name, value in config.to_dict().items() if name in small} == small  # type: ignore[union-attr]
    assert {name: config.to_dict()[name] for name in space} == found["best"]  # type: ignore[union-attr]
    assert main(["sweep", str(path), "--run-dir", str(tmp_path / "run")]) == 2, "the folder is not empty"
