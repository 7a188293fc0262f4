"""A checkpoint is data: reading one from elsewhere runs nothing that it names, by commands, Python or the page."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from command_line import Command
from evolved import fresh_run, save
from ssm_metarl import adapt_checkpoint, evaluate_checkpoint, load_player, load_policy, pretrained
from ssm_metarl.app import adaptation_tab, evolution_tab, pretrained_tab, training_tab
from ssm_metarl.app.workspace import Workspace
from ssm_metarl.config import TrainConfig
from ssm_metarl.storage import trust
from ssm_metarl.storage.contents import CheckpointError
from ssm_metarl.tasks import names_code

MODULE = """
open({ran!r}, "a").write("imported\\n")
from ssm_metarl.tasks.cartpole import CartPole as go
"""

SMALL = ["--iterations", "1", "--meta-batch", "2", "--episodes", "2", "--eval-tasks", "2"]
SMALL += ["--learner-threads", "1", "--num-workers", "0"]


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that is there once the foreign code ran; the module that writes it is in the working folder."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    path = tmp_path / "RAN"
    (tmp_path / "named_by_checkpoint.py").write_text(MODULE.format(ran=str(path)))
    before = list(sys.path)
    yield path
    sys.path[:] = before
    sys.modules.pop("named_by_checkpoint", None)


def rename_task(checkpoint: Path, task: str) -> None:
    """Let the config of a checkpoint name another task, and sign it again."""
    config = json.loads((checkpoint / "config.json").read_text())
    config["train"]["task"] = task
    (checkpoint / "config.json").write_text(json.dumps(config))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["sha256"] = {
        name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in manifest["sha256"]
    }
    manifest.pop("bytes", None)
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def foreign(tmp_path: Path, ran: Path) -> Path:
    """A run from elsewhere whose checkpoint names code."""
    run = tmp_path / "foreign"
    shutil.copytree(pretrained.folder("cartpole"), run / "checkpoint_000001")
    rename_task(run / "checkpoint_000001", "named_by_checkpoint:go")
    return run


@pytest.fixture
def evolved(tmp_path: Path, ran: Path) -> Path:
    """A self-improving run from elsewhere that names code."""
    run = tmp_path / "evolved"
    save(fresh_run(run))
    path = run / "rsi" / "state.json"
    path.write_text(re.sub('"task": "[^"]*"', '"task": "named_by_checkpoint:go"', path.read_text()))
    return run


COMMANDS = [
    "evaluate {foreign}",
    "evaluate {foreign} --modes none standard",
    "adapt {foreign}",
    "train --from {foreign}",
    "train --from {foreign} --algorithm maml",
    "train --resume --run-dir {foreign}",
    "evolve --from {foreign}",
    "evolve --resume --run-dir {evolved}",
]


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_refuses_to_run_what_a_checkpoint_names(
    words: str, command: Command, foreign: Path, evolved: Path, ran: Path
) -> None:
    done = command(*words.format(foreign=foreign, evolved=evolved).split())
    assert done.code == 2
    assert "names the task 'named_by_checkpoint:go', which is code" in done.err
    assert "--task named_by_checkpoint:go or --trust-checkpoint-code" in done.err
    assert "Traceback" not in done.err
    assert not ran.exists()


@pytest.mark.parametrize("words", [*(f"{words} --help" for words in COMMANDS), "plot {foreign}", "plot {evolved}"])
def test_help_and_plots_run_nothing(words: str, command: Command, foreign: Path, evolved: Path, ran: Path) -> None:
    done = command(*words.format(foreign=foreign, evolved=evolved).split())
    assert "Traceback" not in done.err
    assert done.code == (0 if "--help" in words else 2)
    assert not ran.exists()


def test_whoever_names_the_same_task_or_trusts_the_checkpoint_runs_it(
    command: Command, foreign: Path, ran: Path
) -> None:
    small = ["--num-tasks", "2", "--steps", "0", "--episodes", "1"]
    assert command("evaluate", foreign, *small, "--task", "named_by_checkpoint:go").code == 0
    assert ran.exists()
    ran.unlink()
    sys.modules.pop("named_by_checkpoint")
    assert command("evaluate", foreign, *small, "--trust-checkpoint-code").code == 0
    assert ran.exists()


def test_another_task_than_the_checkpoints_is_enough(command: Command, foreign: Path, ran: Path) -> None:
    assert command("evaluate", foreign, "--num-tasks", "2", "--steps", "0", "--task", "cartpole").code == 0
    assert command("train", "--from", foreign, "--task", "cartpole", "--run-dir", "own", *SMALL).code == 0
    assert not ran.exists()


def test_a_run_that_was_started_here_is_resumed_without_a_question(command: Command, ran: Path, tmp_path: Path) -> None:
    task = ["--task", "named_by_checkpoint:go"]
    assert command("train", *task, "--run-dir", "mine", *SMALL).code == 0
    assert command("train", "--resume", "--run-dir", "mine", "--iterations", "2", "--eval-tasks", "2").code == 0
    assert trust.runs_file().stat().st_mode & 0o777 == 0o600
    # A copy elsewhere was not started here; and what is recorded is the task, not only the folder.
    shutil.copytree("mine", "copy")
    assert "which is code" in command("train", "--resume", "--run-dir", "copy").err
    for checkpoint in Path("mine").glob("checkpoint_*"):
        rename_task(checkpoint, "os:abort")
    assert "which is code" in command("train", "--resume", "--run-dir", "mine").err
    # Whoever else can write the record could put a run into it.
    trust.runs_file().chmod(0o666)
    assert not trust.is_own(tmp_path / "mine", "named_by_checkpoint:go")


def test_a_foreign_schedule_names_no_code_either(command: Command, ran: Path, tmp_path: Path) -> None:
    config = TrainConfig.for_task("cartpole").to_dict() | {"task": "named_by_checkpoint:go"}
    schedule = {"iterations": 2, "weights": "last", "options": [[0, config]]}
    (tmp_path / "schedule.json").write_text(json.dumps(schedule))
    done = command("train", "--schedule", tmp_path / "schedule.json")
    assert (done.code, "which is code" in done.err, ran.exists()) == (2, True, False)
    changes = [[0, config | {"task": "cartpole"}], [1, {"task": "named_by_checkpoint:go"}]]
    (tmp_path / "schedule.json").write_text(json.dumps(schedule | {"options": changes}))
    done = command("train", "--schedule", tmp_path / "schedule.json")
    assert (done.code, ran.exists()) == (2, False)


def test_python_runs_nothing_either_unless_told(foreign: Path, ran: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(foreign.parent)
    player = load_player(foreign)
    assert player.act(np.zeros(4, np.float32)) in (0, 1)
    load_policy(foreign)
    for ask in (evaluate_checkpoint, adapt_checkpoint):
        with pytest.raises(CheckpointError, match="which is code"):
            ask(foreign, num_tasks=2) if ask is evaluate_checkpoint else ask(foreign)  # type: ignore[operator]
    assert not ran.exists()
    assert evaluate_checkpoint(foreign, num_tasks=2, steps=0, trust_checkpoint_code=True).returns.shape == (2, 1)
    assert ran.exists()


def test_the_page_never_does(foreign: Path, evolved: Path, ran: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where the command line would: for a run that was started here."""
    monkeypatch.chdir(foreign.parent)
    trust.remember(foreign, "named_by_checkpoint:go")
    trust.remember(evolved, "named_by_checkpoint:go")
    workspace = Workspace(foreign.parent)
    monkeypatch.setattr(Workspace, "start", lambda *_: pytest.fail("a job was started"))
    monkeypatch.setattr(Workspace, "jobs", lambda self: [])
    assert "named_by_checkpoint:go" in pretrained_tab.describe(workspace, "foreign")
    quiet: dict[str, Any] = {"progress": lambda *_, **__: None}
    boxes = [9.8, 1.0, 0.1, 0.5, 10.0, -1, 0.0, 0.0, "{}"]
    evolution = evolution_tab.Handlers(workspace)
    asked = [
        lambda: pretrained_tab.Handlers(workspace).assess("foreign", "test", 5, 0),
        lambda: adaptation_tab.Handlers(workspace).adapt("foreign", "none", 1, 1, 0.0, False, *boxes),
        lambda: adaptation_tab.Handlers(workspace).compare("foreign", "test", 5, 1, 1),
        lambda: training_tab.Handlers(workspace).go_on("foreign", 3, **quiet),
        lambda: evolution.go_on("evolved", 3, 0, **quiet),
        lambda: evolution.start("foreign", "cartpole", ["inner_lr"], 1, 1, 0, 0, **quiet),
    ]
    for ask in asked:
        with pytest.raises(Exception, match="which is code: the page starts none"):
            ask()
    for task in ("named_by_checkpoint:go", ":named_by_checkpoint:go"):
        with pytest.raises(Exception, match="no task family"):
            training_tab.defaults(task, None)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("task", "code"),
    [
        ("cartpole", False),
        ("ml1:reach-v3", False),
        ("gym:CartPole-v1", False),
        ("gym:HalfCheetah-v5", False),
        ("gym:nobody:CartPole-v1", True),
        ("gym:Unregistered-v0", True),
        ("gym:GymV26Environment-v0", True),
        ("os:abort", True),
        (":os:abort", True),
        ("gym:", True),
        ("", False),
        (5, False),
    ],
)
def test_which_names_are_code(task: object, code: bool) -> None:
    assert names_code(task) is code


def test_a_foreign_config_does_not_say_where_and_with_how_much(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten thousand workers and threads on a device of its own: what is there is used."""
    from ssm_metarl.cli.options import Train
    from ssm_metarl.cli.parsing import parse

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    run = tmp_path / "run"
    shutil.copytree(pretrained.folder("cartpole"), run / "checkpoint_000001")
    config = json.loads((run / "checkpoint_000001" / "config.json").read_text())
    config["train"] |= {"num_workers": 10_000, "learner_threads": 10_000, "device": "meta"}
    (run / "checkpoint_000001" / "config.json").write_text(json.dumps(config))
    rename_task(run / "checkpoint_000001", "cartpole")
    cores = len(os.sched_getaffinity(0))
    for words in (["train", "--from", str(run)], ["train", "--resume", "--run-dir", str(run)]):
        options = parse(words).options()
        assert isinstance(options, Train)
        machine = options.config.machine
        assert options.num_workers == "auto"
        assert machine.learner_threads <= cores
        assert machine.device == "auto"
    assert command("evaluate", run, "--num-tasks", "2", "--steps", "0").code == 0


def test_options_of_an_environment_that_a_file_names_are_not_passed_on(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They go to its constructor, which may read the files that they name."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    small = ("--task", "gym:CartPole-v1", "--task-options", '{"sutton_barto_reward": true}', *SMALL)
    assert command("train", *small, "--hidden-dim", "8", "--run-dir", tmp_path / "own").code == 0
    evaluated = ("--num-tasks", "2", "--steps", "0", "--episodes", "1")
    assert command("evaluate", tmp_path / "own", *evaluated).code == 0, "this user's own"
    shutil.copytree(tmp_path / "own", tmp_path / "foreign")
    refused = command("evaluate", tmp_path / "foreign", *evaluated)
    assert refused.code == 2
    assert "names the task 'gym:CartPole-v1', which is code that a file does not start" in refused.err
    assert command("train", "--from", tmp_path / "foreign", "--run-dir", tmp_path / "new", *SMALL).code == 2
    again = command("evaluate", tmp_path / "foreign", *evaluated, "--trust-checkpoint-code")
    assert again.code == 0
