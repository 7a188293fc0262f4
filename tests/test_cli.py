"""The command line: what it prints where, what it refuses, and how it is interrupted."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from faulty_tasks import FaultyNavigation
from ssm_metarl.cli.main import main
from ssm_metarl.cli.options import parse
from ssm_metarl.config import TrainConfig
from ssm_metarl.distributed import train as run_module
from ssm_metarl.distributed.learner import Learner
from ssm_metarl.distributed.train import train
from ssm_metarl.evaluation.evaluate import evaluate_checkpoint
from ssm_metarl.storage.checkpoint import load_checkpoint
from ssm_metarl.storage.run_folder import checkpoints
from ssm_metarl.tasks import Task
from ssm_metarl.tasks import registry as base

RUN_LOCAL = Path(__file__).resolve().parents[1] / "run_local.py"
PNG = b"\x89PNG\r\n"

SMALL: dict[str, Any] = {"meta_batch": 4, "episodes": 3, "hidden_dim": 16, "state_dim": 8, "epochs": 1}
# A schedule that ends with the last iteration would tell runs of different lengths apart.
SMALL["lr_schedule"] = "constant"
OPTIONS = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", str(value))]
IN_PROCESS = [*OPTIONS, "--num-workers", "0", "--eval-tasks", "3"]

EVALUATION = {"task", "split", "num_tasks", "return", "ci_low", "ci_high", "episode_length"}
EVALUATION |= {"environment_steps", "seconds"}


@dataclass
class Outcome:
    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command line in this process, in an empty folder, and fails where it would start Ray."""

    def refuse(num_workers: int, *, always: bool = False) -> None:
        assert num_workers == 0, "Ray would have been started"
        assert not always, "Ray would have been started"

    def run(*arguments: str | Path) -> Outcome:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = int(end.code or 0)
        return Outcome(code, *capsys.readouterr())

    monkeypatch.setattr(run_module, "start_ray", refuse)
    monkeypatch.chdir(tmp_path)
    return run


def only_object(out: str) -> dict[str, Any]:
    """The one JSON object that all of ``out`` is."""
    value = json.loads(out, parse_constant=pytest.fail)
    assert isinstance(value, dict)
    assert len(out.splitlines()) == 1
    return value


def steady(run: Path) -> list[dict[str, Any]]:
    """What was logged and does not depend on time and on deaths."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in ("seconds", "restarts")} for line in lines]


def written(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two iterations."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    return train(TrainConfig.for_task("navigation-2d", iterations=2, inner_lr=0.2, **SMALL), folder).run_dir


# --- train ------------------------------------------------------------------------------------------------


def test_train_is_the_default_command_and_prints_one_json_object(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "a run [bold] with a long name, that holds spaces and brackets, and is longer than a line"
    outcome = command("--iterations", "3", *IN_PROCESS, "--run-dir", folder, "--json")
    assert outcome.code == 0, outcome.err
    summary = only_object(outcome.out)
    assert summary.keys() == {
        "run_dir",
        "checkpoint",
        "seconds",
        "interrupted",
        "metrics",
        "evaluation",
        "pictures",
    }
    assert summary["run_dir"] == str(folder)
    assert summary["checkpoint"] == str(folder / "checkpoint_000003")
    assert summary["interrupted"] is False
    assert summary["metrics"] == json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert summary["evaluation"].keys() == EVALUATION
    assert (summary["evaluation"]["num_tasks"], len(summary["evaluation"]["return"])) == (3, 2)
    assert [Path(picture).read_bytes()[: len(PNG)] for picture in summary["pictures"]] == [PNG, PNG]
    lines = outcome.err.splitlines()
    assert f"Run folder: {folder}" in lines, "as it is: neither wrapped nor read as markup"
    assert f"Checkpoint: {folder / 'checkpoint_000003'}" in lines
    for number in (1, 2, 3):
        assert any(line.startswith(f"iteration {number}/3: return -") for line in lines)


def test_without_json_nothing_is_printed_to_stdout(command: Command, tmp_path: Path) -> None:
    outcome = command("train", "--task", "cartpole", "--iterations", "1", *IN_PROCESS)
    assert (outcome.code, outcome.out) == (0, "")
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("cartpole-promp-2")
    assert load_checkpoint(run / "checkpoint_000001").config["inner_lr"] == 0.1, "cartpole's own default"
    assert "of split test" in outcome.err


def test_resume_takes_the_options_of_the_run_and_those_given_win(command: Command, tmp_path: Path) -> None:
    first = ["--iterations", "2", *IN_PROCESS, "--inner-lr", "0.2", "--outer-lr", "0.001", "--seed", "5"]
    first += ["--run-dir", tmp_path / "run"]
    assert command("train", *first).code == 0
    resume = ("train", "--resume", "--run-dir", tmp_path / "run", "--eval-tasks", "2")
    assert command(*resume, "--iterations", "4").code == 0
    assert command(*resume, "--iterations", "6", "--outer-lr", "0.01").code == 0
    configs = [load_checkpoint(path).config for path in checkpoints(tmp_path / "run")[-2:]]
    common = {**SMALL, "inner_lr": 0.2, "seed": 5, "num_workers": 0}
    for found, own in zip(
        configs, ({"iterations": 4, "outer_lr": 1e-3}, {"iterations": 6, "outer_lr": 0.01}), strict=True
    ):
        assert {**found, **common, **own} == found
    lines = steady(tmp_path / "run")
    assert [line["learning_rate"] for line in lines] == [1e-3] * 4 + [0.01] * 2
    unbroken = TrainConfig.for_task("navigation-2d", iterations=4, inner_lr=0.2, outer_lr=1e-3, seed=5, **SMALL)
    assert lines[:4] == steady(train(unbroken, tmp_path / "unbroken").run_dir)


def test_a_failing_environment_is_exit_code_1_with_its_traceback(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Falling(FaultyNavigation):
        def sample(self, *args: Any, **kwargs: Any) -> list[Task]:
            return [task | {"fault": "raise"} for task in super().sample(*args, **kwargs)]

    monkeypatch.setitem(base._FACTORIES, "falling", Falling)
    outcome = command("train", "--task", "falling", *IN_PROCESS, "--run-dir", tmp_path / "run", "--json")
    assert (outcome.code, outcome.out) == (1, "")
    assert "episodes (support) were lost" in outcome.err
    assert "OSError: the simulator of goal [" in outcome.err
    assert "faulty_tasks.py" in outcome.err
    assert "cli.py" not in outcome.err, "none of ours"


def test_an_update_that_is_not_finite_is_exit_code_1_and_one_sentence(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*args: Any, **kwargs: Any) -> None:
        raise FloatingPointError("The meta-gradient is not finite.")

    monkeypatch.setattr(Learner, "update", diverge)
    outcome = command(*IN_PROCESS, "--run-dir", tmp_path / "run", "--json")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.splitlines() == ["error: The meta-gradient is not finite."]


def test_workers_change_nothing(
    command: Command, tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "start_ray", lambda num_workers, always=False: None)
    results = []
    for workers in "02":
        folder = tmp_path / workers
        outcome = command("--iterations", "2", *IN_PROCESS, "--num-workers", workers, "--run-dir", folder, "--json")
        assert outcome.code == 0, outcome.err
        results.append((steady(folder), {**only_object(outcome.out)["evaluation"], "seconds": 0}))
    assert results[0] == results[1]


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


# --- evaluate and plot ------------------------------------------------------------------------------------


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
    assert {**only_object(outcome.out), "seconds": 0} == {**ended, "seconds": 0}


def test_plot_names_the_pictures_that_it_drew(command: Command, trained: Path) -> None:
    outcome = command("plot", trained)
    assert outcome.code == 0
    assert outcome.out.splitlines() == [str(trained / "learning_curve.png")]
    (trained / "learning_curve.png").unlink()


# --- Refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--iterations 0", "iterations must be an integer of 1 or more, not 0."),
        ("--state-dim 7", "state_dim must be even (complex modes are pairs), not 7."),
        ("--inner-lr nan", "inner_lr must be a number above 0, not nan."),
        ("--outer-lr -1", "outer_lr must be a number above 0, not -1.0."),
        ("--num-workers -1", "num_workers must be an integer of 0 or more, not -1."),
        ("--eval-tasks 0", "eval_tasks must be 1 or more, not 0."),
        (
            "--task cartpol",
            "There is no task family 'cartpol', did you mean 'cartpole'? (valid: ant-dir, ",
        ),
        ("train --help --task cartpol", "There is no task family 'cartpol', did you mean 'cartpole'?"),
        ("--algorithm mamlet", "algorithm must be one of promp, rl2, maml, fomaml, policy-gradient, not 'mamlet'."),
        ("--algorithm policy-gradient --inner-steps 1", "inner_steps must be 0 for policy-gradient, not 1."),
        ("--algorithm policy-gradient --scale-rewards", "policy-gradient keeps the normaliser of the checkpoint"),
        ("evolve --algorithm policy-gradient", "algorithm cannot be policy-gradient, which only train runs."),
        ("--from absent", "absent is neither a checkpoint nor a run"),
        ("--from {run} --hidden-dim 24", "its policy has hidden_dim 16 instead of 24."),
        ("--step-weights 1 2 3", "step_weights needs one weight for each of 0..1 inner steps"),
        ("--device abacus", "device 'abacus' cannot be used here"),
        ("--resume", "--resume needs --run-dir"),
        ("--resume --run-dir absent", "There is no checkpoint in absent to resume from."),
        ("--resume --run-dir {run} --hidden-dim 24", "its policy has hidden_dim 16 instead of 24."),
        ("--resume --run-dir {run} --task cartpole", "its policy has observation_size 2 instead of 4"),
        ("--run-dir {run}", "is not empty; resume the run in it, or choose another folder."),
        ("--run-dir {run}/metrics.jsonl", "metrics.jsonl cannot be made: File exists."),
        ("--run-dir {run}/metrics.jsonl/a", "metrics.jsonl/a cannot be made: Not a directory."),
        ("evaluate absent", "absent is neither a checkpoint nor a run"),
        ("evaluate {run}/metrics.jsonl", "metrics.jsonl is neither a checkpoint nor a run"),
        (
            "evaluate {run} --task cartpole",
            "cannot play 'cartpole': its observations are of the size 2, not of the shape (4,).",
        ),
        ("evaluate {run} --task cartpol", "did you mean 'cartpole'?"),
        ("evaluate {run} --split tset", "did you mean 'test'?"),
        ("evaluate {run} --num-tasks 0", "num_tasks must be an integer of 1 or more, not 0."),
        ("evaluate {run} --steps -1", "steps must be an integer of 0 or more, not -1."),
        ("evaluate {run} --num-workers -1", "num_workers must be an integer of 0 or more, not -1."),
        ("evaluate {run} --inner-lr 0", "inner_lr must be a number above 0, not 0.0."),
        ("plot absent", "absent is not the folder of a run: it has no metrics.jsonl."),
    ],
)
def test_bad_values_are_refused_in_one_sentence(
    command: Command, trained: Path, tmp_path: Path, arguments: str, sentence: str
) -> None:
    before = written(trained)
    outcome = command(*(word.format(run=trained) for word in arguments.split()))
    assert (outcome.code, outcome.out) == (2, "")
    (line,) = outcome.err.splitlines()
    assert line.startswith("error: ")
    assert sentence in line
    assert written(trained) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--iner-lr 0.1", "--inner-lr"),
        ("--iterations many", "--iterations"),
        ("--iterations", "--iterations"),
        ("--task", "--task"),
        ("--run-dir", "--run-dir"),
        ("--inputs nothing", "observation"),
        ("trian", "train"),
        ("train now", "now"),
        ("evaluate", "checkpoint"),
        ("evaluate {run} --nun-tasks 3", "--num-tasks"),
    ],
)
def test_bad_usage_is_refused_with_what_would_be_right(
    command: Command, trained: Path, tmp_path: Path, arguments: str, named: str
) -> None:
    outcome = command(*(word.format(run=trained) for word in arguments.split()))
    assert (outcome.code, outcome.out) == (2, "")
    assert named in outcome.err
    assert "Traceback" not in outcome.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", ["evaluate {run}", "evaluate {checkpoint}", "--resume --run-dir {run}", "plot {run}"]
)
@pytest.mark.parametrize("file", ["config.json", "manifest.json"])
def test_a_checkpoint_with_corrupt_json_is_refused_in_one_sentence(
    command: Command, trained: Path, tmp_path: Path, arguments: str, file: str
) -> None:
    checkpoint = trained / "checkpoint_000002"
    intact = (checkpoint / file).read_text()
    (checkpoint / file).write_text(intact[: len(intact) // 2])
    try:
        outcome = command(*(word.format(run=trained, checkpoint=checkpoint) for word in arguments.split()))
    finally:
        (checkpoint / file).write_text(intact)
    assert (outcome.code, outcome.out) == (2, "")
    (line,) = outcome.err.splitlines()
    assert line.startswith(f"error: {checkpoint / file} is ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ("--help", ["train", "evaluate", "plot"]),
        (
            "train --help",
            ["--task STR", "--iterations INT", "--num-workers INT", "--seed INT", "--run-dir", "--resume"],
        ),
        ("train --help --task cartpole", ["(default: cartpole)", "(default: 0.3)"]),
        ("evaluate --help", ["--split STR", "--num-tasks INT", "--steps", "--json"]),
        ("plot --help", ["PATH"]),
    ],
)
def test_help_shows_the_options(command: Command, tmp_path: Path, arguments: str, shown: list[str]) -> None:
    outcome = command(*arguments.split())
    assert outcome.code == 0
    assert [words for words in shown if words not in outcome.out] == []
    assert list(tmp_path.iterdir()) == []


def test_more_workers_than_the_cluster_has_cpus_are_refused_in_one_sentence(
    command: Command, tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "start_ray", lambda num_workers, always=False: None)
    outcome = command("--num-workers", "7", "--run-dir", tmp_path / "run")
    assert (outcome.code, outcome.out) == (2, "")
    sentence = "7 workers and the learner need 8 CPUs, but this Ray cluster has 4; use num_workers=3 or fewer."
    assert outcome.err.splitlines() == [f"error: {sentence}"]


# --- As processes -----------------------------------------------------------------------------------------

ENDLESS = [*OPTIONS, "--iterations", "100000", "--checkpoint-every", "50"]


def start(*arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
    """`python run_local.py` in a process group of its own, as a shell starts it."""
    return subprocess.Popen(
        [sys.executable, str(RUN_LOCAL), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        start_new_session=True,
    )


@pytest.mark.parametrize(("name", "num_workers"), [pytest.param("SIGINT", 1, marks=pytest.mark.slow), ("SIGTERM", 0)])
def test_an_interrupted_run_ends_with_a_checkpoint_and_goes_on(
    command: Command, tmp_path: Path, name: str, num_workers: int
) -> None:
    number, run = signal.Signals[name], tmp_path / "a run"
    process = start("train", *ENDLESS, "--num-workers", num_workers, "--run-dir", run, "--json")
    try:
        assert process.stderr is not None
        lines = until(process.stderr, "iteration 3/")
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does: to Ray's processes too
        else:
            process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + number, err
    lines += err.splitlines()
    assert not any("Traceback" in line for line in lines), lines
    deadline = time.monotonic() + 30
    while left := processes_of_session(process.pid):
        assert time.monotonic() < deadline, f"Ray left {left} behind"
        time.sleep(0.1)
    (iteration,) = (path.name for path in checkpoints(run) if path.name != "checkpoint_000000")
    count = len(steady(run))
    assert 3 <= count < 50
    assert iteration == f"checkpoint_{count:06d}"
    assert any(line.startswith("Ray dashboard: http://127.0.0.1:") for line in lines) == bool(num_workers)
    summary = only_object(out)
    assert summary["interrupted"] is True
    assert summary["checkpoint"] == str(run / iteration)
    # The last line says how to go on.
    said = lines[-1].partition("go on with: ")[2]
    assert shlex.split(said) == ["train", "--resume", "--run-dir", str(run)]
    outcome = command(*shlex.split(said), "--iterations", str(count + 3), "--num-workers", "0", "--eval-tasks", "2")
    assert outcome.code == 0, outcome.err
    unbroken = TrainConfig.for_task("navigation-2d", iterations=count + 3, **SMALL)
    assert steady(run) == steady(train(unbroken, tmp_path / "unbroken").run_dir)


def processes_of_session(session: int) -> list[str]:
    """Names of its living processes."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            name, _, fields = stat.read_text().partition("(")[2].rpartition(")")
            state, _parent, _group, own_session = fields.split()[:4]
            if int(own_session) == session and state not in "ZX":
                found.append(name)
    return found


def until(stream: Any, beginning: str) -> list[str]:
    """Lines up to the one that begins so."""
    lines = []
    for line in stream:
        lines.append(line)
        if line.startswith(beginning):
            return lines
    raise AssertionError(f"ended before {beginning!r}: {lines}")


def test_train_takes_a_gpu_where_there_is_one_and_trials_do_not_queue_for_it() -> None:
    assert [parse([command]).config.device for command in ("train", "evolve")] == ["auto", "cpu"]  # type: ignore[union-attr]


def test_the_algorithm_decides_on_the_other_options_defaults() -> None:
    def steps(*words: str) -> int:
        return parse(["train", *words]).config.inner_steps  # type: ignore[union-attr]

    assert (steps("--task", "bandit"), steps("--task", "bandit", "--algorithm", "promp")) == (0, 1)
    assert (steps("--task", "cartpole"), steps("--task", "cartpole", "--algorithm", "rl2")) == (1, 0)
