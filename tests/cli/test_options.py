"""Options of the command line: what is refused and in which words, the help, and defaults."""

from __future__ import annotations

import inspect
import re
import shlex
import signal
import sys
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path

import pytest

from command_line import Command, join_ray
from ssm_metarl.cli.options import COMMANDS, Train
from ssm_metarl.cli.parsing import parse
from ssm_metarl.cli.train import checked_config
from ssm_metarl.config import TrainConfig
from ssm_metarl.tuning.config import WITHOUT_EFFECT


def written(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


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
        ("--algorithm policy-gradient --inner-steps 1", "inner_steps must be 0 for policy-gradient, not 1."),
        ("--algorithm policy-gradient --scale-rewards", "policy-gradient keeps the normaliser of the checkpoint"),
        ("evolve --algorithm policy-gradient", "algorithm cannot be policy-gradient, which only train runs."),
        (
            "--elastic --num-workers 0",
            "elastic needs a meta-learning algorithm with workers: num_workers of 1 or more.",
        ),
        ("--elastic --seeds 0 1", "--elastic is for a run alone."),
        ("--from absent", "absent is neither a checkpoint nor a run"),
        ("--from {run} --hidden-dim 24", "its policy has hidden_dim 16 instead of 24."),
        ("--step-weights 1 2 3", "step_weights needs one weight for each of 0..1 inner steps"),
        ("--device abacus", "device 'abacus' cannot be used here"),
        (
            "--device cuda:1 --num-learners 1",
            "device must be 'cuda' for learners, which have a GPU each, not 'cuda:1'.",
        ),
        ("--resume", "--resume needs --run-dir"),
        ("--resume --run-dir absent", "There is no checkpoint in absent to resume from."),
        ("--resume --run-dir {run} --hidden-dim 24", "its policy has hidden_dim 16 instead of 24."),
        ("--resume --run-dir {run} --task cartpole", "is of the task navigation-2d, which --resume does not change"),
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
    ("task", "sentence"),
    [
        ("own", "own.py is here: name what is in it, too, as own:CLASS."),
        ("own.py", "own.py is here: name what is in it, too, as own:CLASS."),
        ("own.py:Line", "A module is named without .py: own, not own.py."),
        ("elsewhere:Line", "; go where it is, or set PYTHONPATH."),
    ],
)
def test_a_module_that_is_named_in_part_is_told(command: Command, tmp_path: Path, task: str, sentence: str) -> None:
    (tmp_path / "own.py").write_text("")
    outcome = command("--task", task)
    assert outcome.code == 2
    assert sentence in outcome.err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--iner-lr 0.1", "--inner-lr"),
        ("--iterations ten", "Error parsing --iterations: a whole number is wanted, not 'ten'"),
        ("--outer-lr fast", "Error parsing --outer-lr: a number is wanted, not 'fast'"),
        ("--iterations", "--iterations"),
        ("--task", "--task"),
        ("--run-dir", "--run-dir"),
        ("--inputs nothing", "observation"),
        ("--algorithm mamlet", "'promp', 'rl2', 'maml', 'fomaml', 'policy-gradient'"),
        ("--lr-schedule never", "'constant', 'linear', 'cosine'"),
        ("--baseline none", "'linear', 'critic', 'privileged', 'time'"),
        ("adapt {run} --mode standart", "'none', 'standard', 'replay', 'hybrid'"),
        ("adapt {run} --optimizer adan", "'sgd', 'adam'"),
        ("adapt {run} --num-tasks 3", "--num-tasks"),
        ("evaluate {run} --modes standard hybird", "'none', 'standard', 'replay', 'hybrid'"),
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
    assert named in " ".join(outcome.err.replace("│", " ").split())
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
        (
            "train -h",
            ["{promp,rl2,maml,fomaml,policy-gradient}", "{linear,critic,privileged,time", "{constant,linear,cosine}"],
        ),
        ("train --help --task cartpole", ["(default: cartpole)", "(default: 0.3)"]),
        ("train --help --task bandit --algorithm=promp", ["(default: bandit)", "(default: promp)"]),
        ('train --help --task_options={"arms":3} --task bandit', ["arms"]),
        ("train --help --resume --run-dir absent --storage s3://bucket/runs", ["(default: navigation-2d)"]),
        (
            "evolve --help",
            ["--budget FLOAT", "environment steps of all members", "--proposals INT", "--checkpoint-every INT"],
        ),
        ("evaluate --help", ["{train,validation,test,shifted,shifted-test}", "--num-tasks INT", "--steps", "--json"]),
        ("adapt --help", ["{none,standard,replay,hybrid}", "{sgd,adam}", "--step-size"]),
        ("plot --help", ["PATH"]),
    ],
)
def test_help_shows_the_options(command: Command, tmp_path: Path, arguments: str, shown: list[str]) -> None:
    outcome = command(*arguments.split())
    assert outcome.code == 0
    text = " ".join(outcome.out.replace("│", " ").split())
    assert [words for words in shown if words not in text] == []
    assert list(tmp_path.iterdir()) == []


def test_the_version(command: Command) -> None:
    outcome = command("--version")
    assert (outcome.code, outcome.out) == (0, f"ssm-metarl {metadata.version('ssm-metarl')}\n")


@pytest.mark.parametrize("name", ["train", "evolve"])
def test_help_has_options_in_groups(command: Command, name: str) -> None:
    text = command(name, "--help").out
    heads = re.findall(r"^\W+(config[.\w]* options)\W+$", text, re.MULTILINE)
    assert heads == ["config options", *(f"config.{part} options" for part in PARTS)]
    ends = [text.index(head) for head in heads] + [len(text)]
    options = ["--task", "--state-dim", "--inner-lr", "--seed", "--device"]
    for begin, end, option in zip(ends, ends[1:], options, strict=False):
        assert f" {option} " in text[begin:end]


PARTS = ("policy", "meta", "experience", "machine")
"""Of a run's options."""


@pytest.mark.parametrize("option", WITHOUT_EFFECT)
def test_evolve_has_no_option_without_effect(command: Command, option: str) -> None:
    flag = f"--{option.replace('_', '-')}"
    assert f" {flag} " in command("train", "--help").out
    assert f" {flag} " not in command("evolve", "--help").out
    outcome = command("evolve", flag, "3")
    assert (outcome.code, outcome.out) == (2, "")
    assert f"Unrecognized options: {flag}, 3" in outcome.err


@pytest.mark.parametrize("columns", [80, 60])
@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_fits_the_terminal(command: Command, monkeypatch: pytest.MonkeyPatch, name: str, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = command(*name.split(), "--help").out.splitlines()
    assert max(map(len, lines)) <= columns
    assert "show this help message" in " ".join(lines)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_what_a_command_does_without_its_attributes(command: Command, name: str) -> None:
    outcome = command(*name.split(), "--help")
    assert outcome.code == 0
    assert inspect.getdoc(COMMANDS[name]).splitlines()[0] in " ".join(outcome.out.split())
    assert "Attributes" not in outcome.out


@pytest.mark.parametrize(
    ("called", "program"),
    [
        ("/usr/bin/ssm-metarl", "ssm-metarl"),
        ("../a b/run_local.py", "python '../a b/run_local.py'"),
        ("/lib/ssm_metarl/__main__.py", "python -m ssm_metarl"),
    ],
)
def test_interrupted_seeds_are_resumed_by_the_line_that_is_printed(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, called: str, program: str
) -> None:
    monkeypatch.setattr(sys, "argv", [called])
    monkeypatch.setattr("ssm_metarl.cli.seeds.interrupts", lambda what: nullcontext([signal.SIGTERM]))
    outcome = command("--seeds", "0", "1", "--run-dir", "two runs")
    assert outcome.code == 128 + signal.SIGTERM
    said = outcome.err.splitlines()[-1]
    assert said == f"Interrupted; resume with: {program} train --resume --run-dir 'two runs' --seeds 0 1"
    words = said.partition("resume with: ")[2].removeprefix(f"{program} ")
    line = parse(shlex.split(words))
    assert (line.given["run_dir"], line.given["seeds"]) == (Path("two runs"), (0, 1))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            "--num-workers 7",
            "7 workers and the learner need 8 CPUs, but this Ray cluster has 4; use num_workers=3 or fewer.",
        ),
        (
            "--num-workers 4 --num-learners 1",
            "4 workers, 1 learner and the trainer need 6 CPUs, but this Ray cluster has 4; use num_workers=2 or fewer.",
        ),
        (
            "--num-workers 0 --num-learners 2 --device cuda",
            "2 learners need a GPU each, but this Ray cluster has 0: --device cpu.",
        ),
    ],
)
def test_more_actors_than_the_cluster_has_cpus_are_refused_in_one_sentence(
    command: Command, tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch, words: str, sentence: str
) -> None:
    join_ray(monkeypatch)
    outcome = command(*words.split(), "--run-dir", tmp_path / "run")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.splitlines() == [f"Run folder: {tmp_path / 'run'}", f"error: {sentence}"]


def test_train_takes_a_gpu_where_there_is_one_and_trials_do_not_queue_for_it() -> None:
    machines = [parse([command]).options().config.machine for command in ("train", "evolve")]
    assert [machine.device for machine in machines] == ["auto", "cpu"]


def test_the_algorithm_decides_on_the_other_options_defaults() -> None:
    def steps(*words: str) -> int:
        return int(parse(["train", *words]).options().config.meta.inner_steps)

    assert (steps("--task", "bandit"), steps("--task", "bandit", "--algorithm", "promp")) == (0, 1)
    assert (steps("--task", "cartpole"), steps("--task", "cartpole", "--algorithm", "rl2")) == (1, 0)


def test_an_unknown_task_is_refused_before_workers_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting them may start Ray, or join a cluster."""
    monkeypatch.setattr("ssm_metarl.cli.train.auto_workers", lambda *needed: pytest.fail("workers were counted"))
    with pytest.raises(ValueError, match="no task family 'cart-pole'"):
        checked_config(Train(config=TrainConfig(task="cart-pole")), trials=1)


def test_a_command_line_is_what_it_gives_and_can_be_written_again() -> None:
    words = ["train", "--task_options", '{"arms": 3}', "--step-weights", "0.5", "1", "--no-gated", "--seed", "0"]
    words += ["--from", "here", "--num-workers", "auto", "--sample-timeout-s", "None"]
    line = parse(words)
    expected = {"task_options": {"arms": 3}, "step_weights": (0.5, 1.0), "gated": False, "seed": 0}
    assert line.given == {**expected, "start": Path("here"), "num_workers": "auto", "sample_timeout_s": None}
    assert parse(line.words()) == line
    line = parse(["evaluate", "run", "--modes", "none", "hybrid", "--deterministic", "--json"])
    assert line.given == {"checkpoint": Path("run"), "modes": ("none", "hybrid"), "deterministic": True, "json": True}
    assert parse(line.words()) == line


def test_reading_a_command_line_fetches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run to resume comes from its copy when the command runs."""
    pulled: list[str] = []
    monkeypatch.setattr("ssm_metarl.cli.parsing.Mirror.pull", lambda mirror: pulled.append(mirror.uri))
    words = ["train", "--resume", "--run-dir", str(tmp_path / "run"), "--storage", f"file://{tmp_path}/copies"]
    line = parse(words)
    with pytest.raises(SystemExit):
        parse([*words, "--help"])
    assert not pulled
    with pytest.raises(ValueError, match="There is no run to resume, neither in"):
        line.options()
    assert pulled == [f"file://{tmp_path}/copies/run"]
