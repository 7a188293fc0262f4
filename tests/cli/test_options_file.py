"""A file of options: written by every run, read by --config, and not trusted more than a checkpoint."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from builders import small_config
from ssm_metarl.cli.main import main
from ssm_metarl.cli.options import Train
from ssm_metarl.cli.parsing import parse
from ssm_metarl.config import TrainConfig
from ssm_metarl.distributed.train import train
from ssm_metarl.storage.options_file import read_options


def options(*words: str) -> Any:
    return parse(["train", *words]).options()


FORMS = {
    "run.toml": 'task = "cartpole"\nlog = ["csv"]\n[meta]\nouter_lr = 1e-3\n[experience]\niterations = 7\n',
    "run.yaml": "task: cartpole\nlog: [csv]\nmeta:\n  outer_lr: 1e-3\niterations: 7\n",
    "run.json": '{"task": "cartpole", "log": ["csv"], "outer_lr": 0.001, "iterations": 7}',
}


@pytest.mark.parametrize("name", FORMS)
def test_options_come_from_a_file_and_flags_win(tmp_path: Path, name: str) -> None:
    """The others are the task's own."""
    path = tmp_path / name
    path.write_text(FORMS[name])
    found = options("--config", str(path), "--iterations", "9")
    expected = TrainConfig.for_task("cartpole", outer_lr=1e-3, iterations=9, device="auto").to_dict()
    assert {**found.config.to_dict(), "num_workers": 0} == expected
    assert found.log == ("csv",)


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_what_is_saved_is_read_back(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"saved.{suffix}"
    words = ["--task", "navigation-2d", "--outer-lr", "1e-5", "--eval-tasks", "3", "--step-weights", "1", "2"]
    assert main(["train", *words, "--save-config", str(path)]) == 0
    assert options("--config", str(path)) == options(*words)
    made = (yaml.safe_load if suffix == "yaml" else json.loads)(path.read_text())["made"]
    assert {"ssm-metarl", "python", "torch", "ray", "gymnasium", "numpy", "host", "time"} <= set(made)


def test_a_run_names_the_commit_that_it_was_made_with(
    tmp_path: Path, without_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one of the working folder, with a mark where a file differs from it."""
    monkeypatch.chdir(tmp_path)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]
    (tmp_path / "own.py").write_text("")
    for words in (["init", "--quiet"], ["add", "own.py"], ["commit", "--quiet", "--message", "One"]):
        subprocess.run([*git, *words], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    for name, mark in (("clean", ""), ("changed", "-dirty")):
        run = train(small_config(iterations=1), tmp_path.parent / f"{tmp_path.name}-{name}").run_dir
        assert yaml.safe_load((run / "config.yaml").read_text())["made"]["commit"] == f"{commit}{mark}"
        (tmp_path / "own.py").write_text("changed")


def test_options_of_evolve_are_saved_too(tmp_path: Path) -> None:
    path = tmp_path / "evolve.yaml"
    words = ["evolve", "--cycles", "3", "--evolve", "outer_lr", "inner_lr", "--bounds", '{"outer_lr": [1e-4, 1e-2]}']
    assert main([*words, "--save-config", str(path)]) == 0
    assert parse(["evolve", "--config", str(path)]).options() == parse(words).options()


def test_every_run_writes_what_repeats_it(tmp_path: Path, without_ray: None) -> None:
    run = train(small_config(iterations=2), tmp_path / "run").run_dir
    found = options("--config", str(run / "config.yaml"), "--device", "cpu")
    assert found.config == small_config(iterations=2)
    train(small_config(iterations=3), run, resume=True)
    assert options("--config", str(run / "config.yaml")).config.experience.iterations == 2, "as it began"


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.toml", "iteratons = 3", "a.toml: there is no option 'iteratons', did you mean 'iterations'"),
        ("a.toml", "iterations = ", "a.toml cannot be read: "),
        ("a.yaml", "a: [", "a.yaml cannot be read: "),
        ("a.yaml", "a: &x [1]\nb: *x", r"a.yaml cannot be read: references \(\*name\) are not followed."),
        ("a.yaml", "!!python/object/apply:os.abort []", "a.yaml cannot be read: "),
        ("a.yaml", "- 1", r"a.yaml must hold options by name, not \[1\]"),
        ("a.json", "[" * 100000, "a.json cannot be read: "),
        ("a.json", '{"command": "evolve"}', "a.json has the options of evolve, not of train."),
        ("a.json", '{"iterations": "ten"}', "iterations must be an integer of 1 or more, not 'ten'."),
        ("a.json", '{"outer_lr": null}', "outer_lr must be"),
        ("a.json", '{"run_dir": "/x"}', "there is no option 'run_dir'"),
        ("a.json", '{"trust_checkpoint_code": true}', "there is no option 'trust_checkpoint_code'"),
        ("a.ini", "", "--config takes .toml, .yaml, .yml, .json, not 'a.ini'."),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path: Path, name: str, text: str, sentence: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=sentence) as caught:
        options("--config", str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_code_that_a_file_names_does_not_run(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("task: os:abort\n")
    with pytest.raises(ValueError, match="names the task 'os:abort', which is code that a file does not start"):
        options("--config", str(path))
    assert main(["train", "--config", str(path), "--save-config", str(tmp_path / "b.yaml")]) == 2
    with pytest.raises(SystemExit) as end:
        main(["train", "--config", str(path), "--help"])
    assert end.value.code == 0


def test_what_has_no_effect_on_evolve_is_no_mistake_in_a_file(tmp_path: Path) -> None:
    """Runs of before named it in theirs."""
    path = tmp_path / "a.yaml"
    path.write_text("command: evolve\ncycles: 3\niterations: 7\nlr_schedule: linear\nlearner_threads: 2\n")
    assert parse(["evolve", "--config", str(path)]).options() == parse(["evolve", "--cycles", "3"]).options()


def test_a_file_of_a_larger_machine_fits_this_one(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("num_workers: 4000\nlearner_threads: 4000\n")
    found = options("--config", str(path))
    assert found.num_workers == "auto"
    assert found.config.machine.learner_threads == TrainConfig().machine.learner_threads


def test_a_file_that_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.yaml is missing"):
        read_options(tmp_path / "a.yaml", "train", {Train.__name__})
