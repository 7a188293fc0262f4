"""Self-improvement under Ray Tune: decisions carried out, deaths survived, and the driver killed and resumed."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import tune

from builders import wait_until
from scripted_trainers import MortalTrainer, ScriptedTrainer, write_faults
from ssm_metarl.cli.console import log_said
from ssm_metarl.config import TrainConfig
from ssm_metarl.distributed.train import train
from ssm_metarl.storage.checkpoint import load_checkpoint
from ssm_metarl.storage.run_folder import checkpoints, resolve_checkpoint
from ssm_metarl.tasks import registry as base
from ssm_metarl.tasks.navigation import Navigation2D
from ssm_metarl.tuning import run as run_module
from ssm_metarl.tuning.config import EvolveConfig
from ssm_metarl.tuning.evolve import EvolutionFailure, EvolveResult, evolve
from ssm_metarl.tuning.member_trainer import MemberTrainer
from ssm_metarl.tuning.records import START
from ssm_metarl.tuning.run import export_best
from ssm_metarl.tuning.scheduler import RecursiveSelfImprovement
from ssm_metarl.tuning.store import RunStore, read_state, request_rollback

TESTS = Path(__file__).resolve().parents[1]
SIZES = {"hidden_dim": 8, "state_dim": 4, "learner_threads": 1}
SCRIPTED = {**SIZES, "meta_batch": 20, "episodes": 4}
REAL = {**SIZES, "meta_batch": 4, "episodes": 2, "epochs": 1}
RULES: dict[str, Any] = {"cycles": 2, "proposals": 2, "stretch": 2}

pytestmark = pytest.mark.usefixtures("ray_session")


def scripted(run: Path, resume: bool = False, options: dict[str, Any] | None = None, **rules: Any) -> EvolveResult:
    config = TrainConfig.for_task("navigation-2d", **{**SCRIPTED, **(options or {})})
    return evolve(config, EvolveConfig(**{**RULES, **rules}), run, resume=resume, trainable=ScriptedTrainer)


def real(run: Path, trainable: type = MemberTrainer, start: Path | None = None, **rules: Any) -> EvolveResult:
    config = TrainConfig.for_task("navigation-2d", **REAL)
    return evolve(config, EvolveConfig(**{**RULES, "assess_tasks": 4, **rules}), run, start=start, trainable=trainable)


def decisions(run: Path) -> list[dict[str, Any]]:
    """The log without what depends on time, and on what had to be played again."""
    volatile = ("time", "spent", "losers")
    return [{name: value for name, value in event.items() if name not in volatile} for event in RunStore(run).events()]


def of_kind(run: Path, *kinds: str) -> list[dict[str, Any]]:
    return [event for event in decisions(run) if event["decision"] in kinds]


def but_failures(run: Path) -> list[dict[str, Any]]:
    return [event for event in decisions(run) if event["decision"] != "failed"]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_members_workers_and_learners_share_the_processors_that_there_are(tmp_path: Path) -> None:
    """Nine processes on four processors, which decide as three do that have their own."""
    for name, machine in (("shared", {"num_workers": 1, "num_learners": 1}), ("alone", {})):
        config = TrainConfig.for_task("navigation-2d", **REAL, **machine)
        evolve(config, EvolveConfig(**{**RULES, "cycles": 1, "assess_tasks": 4}), tmp_path / name)
    assert of_kind(tmp_path / "shared", "failed") == []
    assert decisions(tmp_path / "shared") == decisions(tmp_path / "alone")


def in_background(condition: Callable[[], bool], action: Callable[[], object]) -> threading.Thread:
    """Do something as soon as a condition holds."""

    def watch() -> None:
        wait_until(condition, 100.0)
        action()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def logged(run: Path, count: int) -> Callable[[], bool]:
    log = run / "rsi" / "events.jsonl"
    return lambda: log.exists() and len(log.read_text().splitlines()) >= count


@pytest.fixture(scope="module")
def undisturbed(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    scripted(run)
    return run


# --- Runs -------------------------------------------------------------------------------------------------


def test_a_run_improves_and_leaves_an_ordinary_checkpoint(undisturbed: Path) -> None:
    state = read_state(undisturbed)
    assert state["progress"]["finished"] == "2 cycles"
    best = state["archive"][state["progress"]["best"]]
    accepted = of_kind(undisturbed, "accepted")
    assert accepted[0]["accepted"][0] == {"option": "outer_lr", "before": 0.001, "after": 0.004}
    exported = load_checkpoint(resolve_checkpoint(undisturbed))
    assert exported.config["outer_lr"] == best["config"]["outer_lr"] >= 0.004
    assert exported.progress["iteration"] == best["iteration"]
    schedule = json.loads((undisturbed / "schedule.json").read_text())
    assert schedule == {"iterations": best["iteration"], "weights": best["handed_over"], "options": best["path"]}
    assert state["live"]["members"].count("gone") == 0


def test_the_disk_holds_what_the_run_keeps(undisturbed: Path) -> None:
    archive = set(read_state(undisturbed)["archive"])
    on_disk = {path.name for path in (undisturbed / "rsi" / "checkpoints").iterdir()}
    assert on_disk == archive | {f"{name}_mean" for name in archive}
    assert len(checkpoints(undisturbed)) <= 4


def test_the_state_and_the_log_are_strict_json(undisturbed: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    json.loads((undisturbed / "rsi" / "state.json").read_text(), parse_constant=refuse)
    for line in (undisturbed / "rsi" / "events.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


@pytest.mark.slow
def test_a_tuner_of_ones_own_ends_by_itself(undisturbed: Path, tmp_path: Path) -> None:
    """And decides as `evolve` does."""
    config = TrainConfig.for_task("navigation-2d", **SCRIPTED)
    improvement = RecursiveSelfImprovement.for_config(
        config, EvolveConfig(**RULES), tmp_path / "run", trainable=ScriptedTrainer
    )
    results = tune.Tuner(
        improvement.trainable,
        param_space=improvement.param_space,
        tune_config=tune.TuneConfig(scheduler=improvement),
        run_config=tune.RunConfig(storage_path=str(tmp_path / "tune"), verbose=0),
    ).fit()
    assert results.num_errors == 0
    assert len(results) == 3
    assert improvement.population.finished == "2 cycles"
    assert improvement.checkpoint == resolve_checkpoint(tmp_path / "run")
    assert decisions(tmp_path / "run") == decisions(undisturbed)


@pytest.mark.slow
def test_the_script_of_the_documentation_runs(tmp_path: Path) -> None:
    """In a process of its own, without Ray at first, on as many processors as there are; with a small policy."""
    documented = inspect.getdoc(RecursiveSelfImprovement) or ""
    lines = [line for line in documented.splitlines() if line.startswith("    ")]
    code = textwrap.dedent("\n".join(lines[: next(i for i, line in enumerate(lines) if "print(" in line) + 1]))
    full, small = 'for_task("navigation-2d")', f'for_task("navigation-2d", **{REAL})'
    assert code.count(full) == 1
    imports = (
        "from ray import tune\n"
        "from ssm_metarl.config import TrainConfig\n"
        "from ssm_metarl.tuning.config import EvolveConfig\n"
        "from ssm_metarl.tuning.scheduler import RecursiveSelfImprovement\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", imports + code.replace(full, small)],
        cwd=tmp_path,
        env={**environment, "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().splitlines()[-1].startswith("2 cycles ")
    assert load_checkpoint(resolve_checkpoint(tmp_path / "runs" / "improved")).progress["iteration"] > 4


@pytest.mark.slow
def test_the_best_is_an_ordinary_checkpoint_after_every_decision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a run that is killed leaves it, too; and one that breaks down in Ray says so in a sentence."""
    exported = []

    def export_and_note(run: Path, store: RunStore) -> Path | None:
        path = export_best(run, store)
        exported.append(path and resolve_checkpoint(run))
        if len(exported) == 3:
            raise OSError("the disk is full")
        return path

    monkeypatch.setattr(run_module, "export_best", export_and_note)
    with pytest.raises(EvolutionFailure, match="broke down: OSError: the disk is full; what was decided is kept"):
        scripted(tmp_path)
    assert exported[-1] is not None
    result = scripted(tmp_path, resume=True)
    assert result.state["progress"]["finished"] == "2 cycles"
    assert exported[-1] == result.checkpoint


@pytest.mark.slow
def test_what_a_member_warns_of_is_said_on_the_terminal_of_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once, as it comes, with the member's number; the same worker's next warning is heard, too."""
    write_faults(tmp_path, {"member": 1, "when": "race", "kind": "warn", "times": 2})
    with log_said():
        scripted(tmp_path, cycles=1)
    lines = capsys.readouterr().err.splitlines()
    assert lines.count("member 1: a worker has given no sign of life") == 2


# --- Members that die -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("member", [0, 1])
def test_a_killed_member_changes_no_decision(undisturbed: Path, tmp_path: Path, member: int) -> None:
    """It begins its assignment again: every decision is the same, but for the failure noted."""
    write_faults(tmp_path, {"member": member, "when": "race", "at": 4, "kind": "kill"})
    scripted(tmp_path)
    (failure,) = of_kind(tmp_path, "failed")
    assert failure["member"] == member
    ours, theirs = ([e for e in but_failures(run) if e["phase"] == "race"] for run in (tmp_path, undisturbed))
    assert [event["accepted"] for event in ours] == [event["accepted"] for event in theirs]
    assert read_state(tmp_path)["incumbent"]["config"] == read_state(undisturbed)["incumbent"]["config"]


@pytest.mark.slow
def test_a_member_that_dies_while_it_waits_costs_nothing(undisturbed: Path, tmp_path: Path) -> None:
    """It has no assignment, and does none that is over."""

    def kill() -> None:
        members = read_state(tmp_path)["live"]["members"]
        os.kill(int((tmp_path / f".pid-{members.index('idle')}").read_text()), signal.SIGKILL)

    def waits() -> bool:
        return logged(tmp_path, 2)() and "idle" in read_state(tmp_path)["live"]["members"]

    thread = in_background(waits, kill)
    state = scripted(tmp_path, cycles=4).state
    thread.join()
    assert state["progress"]["finished"] == "4 cycles"
    assert but_failures(tmp_path)[: len(decisions(undisturbed)) - 1] == decisions(undisturbed)[:-1]
    assert len(of_kind(tmp_path, "failed")) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kill", "the disk is full"])
def test_a_member_whose_process_fails_to_start_is_started_again(undisturbed: Path, tmp_path: Path, kind: str) -> None:
    write_faults(tmp_path, *({"member": member, "when": "start", "kind": kind, "times": 2} for member in (0, 1)))
    state = scripted(tmp_path, max_failures=20).state
    assert state["progress"]["finished"] == "2 cycles"
    assert but_failures(tmp_path) == decisions(undisturbed)
    assert len(list(tmp_path.glob(".fault-*"))) == 4


@pytest.mark.slow
def test_three_failures_in_a_row_stop_everything_and_keep_the_best(tmp_path: Path) -> None:
    write_faults(tmp_path, {"member": 1, "when": "race", "kind": "kill", "times": 100})
    result = scripted(tmp_path)
    assert result.state["progress"]["finished"] == "3 failures in a row"
    assert [event["member"] for event in of_kind(tmp_path, "failed")] == [1, 1, 1]
    assert result.checkpoint is not None
    best = result.state["archive"][result.state["progress"]["best"]]
    assert load_checkpoint(result.checkpoint).progress["iteration"] == best["iteration"] == 2


@pytest.mark.slow
def test_a_ruinous_challenger_leaves_the_race(tmp_path: Path) -> None:
    state = scripted(tmp_path, options={"outer_lr": 0.02}, evolve=("outer_lr",)).state
    races = of_kind(tmp_path, "accepted", "rejected")
    (ruinous,) = (entry for entry in races[0]["contenders"] if entry["value"] == pytest.approx(0.08))
    assert ruinous["status"] == "dropped"
    assert "standard errors behind" in ruinous["reason"]
    assert ruinous["iterations"] == 1
    assert state["incumbent"]["config"]["outer_lr"] < 0.05


@pytest.mark.slow
def test_a_challenger_that_diverges_leaves_the_race(tmp_path: Path) -> None:
    write_faults(tmp_path, {"member": 1, "when": "race", "kind": "the meta-gradient is not finite"})
    state = scripted(tmp_path).state
    assert state["progress"]["finished"] == "2 cycles"
    assert of_kind(tmp_path, "failed") == []
    first = of_kind(tmp_path, "accepted", "rejected")[0]["contenders"][1]
    assert (first["status"], first["reason"]) == ("dropped", "the meta-gradient is not finite")


@pytest.mark.slow
def test_an_incumbent_that_diverges_goes_back(tmp_path: Path) -> None:
    write_faults(tmp_path, {"member": 0, "when": "alone", "at": 2, "kind": "the meta-gradient is not finite"})
    state = scripted(tmp_path).state
    assert state["progress"]["finished"] == "2 cycles"
    (failure,) = of_kind(tmp_path, "failed")
    assert failure["reason"] == "the meta-gradient is not finite"
    assert state["incumbent"]["path"][1][1]["outer_lr"] == pytest.approx(0.0005)


# --- The driver -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_resumed_for_longer_goes_on(undisturbed: Path, tmp_path: Path) -> None:
    first = scripted(tmp_path / "run", cycles=1)
    assert first.state["progress"]["finished"] == "1 cycle"
    seen = decisions(tmp_path / "run")
    second = scripted(tmp_path / "run", resume=True, cycles=2)
    assert second.state["progress"]["finished"] == "2 cycles"
    assert decisions(tmp_path / "run")[: len(seen)] == seen
    ours, theirs = (of_kind(run, "accepted", "rejected") for run in (tmp_path / "run", undisturbed))
    assert [event["accepted"] for event in ours] == [event["accepted"] for event in theirs]


@pytest.mark.slow
def test_the_driver_killed_at_any_point_resumes(undisturbed: Path, tmp_path: Path) -> None:
    """What was logged stays a prefix, and the whole log is that of an undisturbed run."""
    run, seen = tmp_path / "run", list[str]()
    log = run / "rsi" / "events.jsonl"
    pauses = [1, 2]  # events to wait for
    for attempt in range(len(pauses) + 1):
        driver = subprocess.Popen(
            [sys.executable, __file__, str(run), *(["resume"] if attempt else [])],
            env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address, "PYTHONPATH": str(TESTS)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        if attempt < len(pauses):
            wait_until(logged(run, pauses[attempt]), 60.0)
            driver.send_signal(signal.SIGKILL)
        driver.wait(120)
        lines = log.read_text().splitlines()
        assert lines[: len(seen)] == seen
        seen = lines
    assert decisions(run) == decisions(undisturbed)


@pytest.mark.slow
def test_an_interrupted_run_says_so_and_goes_on(undisturbed: Path, tmp_path: Path) -> None:
    """A signal ends the run at once; every decision is on disk."""
    thread = in_background(logged(tmp_path / "run", 1), lambda: os.kill(os.getpid(), signal.SIGINT))
    result = scripted(tmp_path / "run")
    thread.join()
    assert result.signal == signal.SIGINT
    assert result.state["progress"]["finished"] is None
    scripted(tmp_path / "run", resume=True)
    assert decisions(tmp_path / "run") == decisions(undisturbed)


@pytest.mark.slow
def test_a_person_goes_back_while_the_run_goes_on(tmp_path: Path) -> None:
    asked = list[str]()

    def ask() -> None:
        asked.append(min(read_state(tmp_path)["archive"]))
        request_rollback(tmp_path, asked[0])

    thread = in_background(logged(tmp_path, 1), ask)
    state = scripted(tmp_path, cycles=4).state
    thread.join()
    (back,) = of_kind(tmp_path, "rolled back")
    assert (back["checkpoint"], back["reason"]) == (asked[0], "asked for")
    assert state["progress"]["finished"] == "4 cycles"
    assert RunStore(tmp_path).requests() == []


@pytest.mark.slow
def test_a_run_at_a_uri_goes_on_where_its_disk_is_lost(tmp_path: Path) -> None:
    """Members write their checkpoints there; state, log and the best follow with every decision."""
    uri, run = f"file://{tmp_path}/bucket/run", tmp_path / "run"
    config = TrainConfig.for_task("navigation-2d", **SCRIPTED)

    def go(resume: bool, **rules: Any) -> EvolveResult:
        rules_ = EvolveConfig(**{**RULES, **rules})
        return evolve(config, rules_, run, resume=resume, trainable=ScriptedTrainer, mirror=uri)

    go(False, cycles=1)
    shutil.rmtree(run)
    name = read_state(tmp_path / "bucket" / "run")["progress"]["best"]
    request_rollback(run, name, uri)
    result = go(True, cycles=2)
    assert result.state["progress"]["finished"] == "2 cycles"
    assert [event["checkpoint"] for event in of_kind(run, "rolled back")] == [name]
    kept = {path.name for path in (tmp_path / "bucket" / "run" / "rsi" / "checkpoints").iterdir()}
    archive = set(result.state["archive"])
    assert kept == archive | {f"{each}_mean" for each in archive}
    assert not list((tmp_path / "bucket" / "run" / "rsi" / "requests").glob("*.json"))
    assert result.checkpoint is not None
    exported = load_checkpoint(tmp_path / "bucket" / "run" / result.checkpoint.name)
    assert exported.progress["iteration"] == result.state["archive"][result.state["progress"]["best"]]["iteration"]


# --- The real trainer -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("member", [0, 1])
def test_the_real_trainer_survives_a_kill(tmp_path: Path, member: int) -> None:
    """The incumbent's parameters are the same to the last bit."""
    quiet = real(tmp_path / "quiet")
    write_faults(tmp_path / "killed", {"member": member, "when": "race", "at": 4, "kind": "kill"})
    killed = real(tmp_path / "killed", MortalTrainer)
    assert [event["member"] for event in of_kind(tmp_path / "killed", "failed")] == [member]
    assert quiet.checkpoint is not None
    assert killed.checkpoint is not None
    ours, theirs = load_checkpoint(killed.checkpoint), load_checkpoint(quiet.checkpoint)
    assert {name: value.tobytes() for name, value in ours.policy.items()} == {
        name: value.tobytes() for name, value in theirs.policy.items()
    }
    assert ours.progress["iteration"] == theirs.progress["iteration"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_real_trainers_ruinous_challengers_lose(tmp_path: Path) -> None:
    """One that cannot act any more, and one that trains at a rate a hundred times too high."""
    bounds = {"outer_lr": [0.001, 0.1]}
    config = TrainConfig.for_task("navigation-2d", **{**REAL, "meta_batch": 10}, outer_lr=0.025)
    rules = EvolveConfig(**{**RULES, "evolve": ("outer_lr",), "bounds": bounds, "assess_tasks": 4})
    state = evolve(config, rules, tmp_path / "run").state
    assert state["progress"]["finished"] == "2 cycles"
    assert state["incumbent"]["config"]["outer_lr"] <= 0.025


@pytest.mark.slow
def test_a_run_starts_from_a_checkpoint(tmp_path: Path) -> None:
    """Whatever critic it has."""
    config = TrainConfig.for_task("navigation-2d", iterations=2, baseline="privileged", **REAL)
    start = train(config, tmp_path / "start").checkpoint
    state = real(tmp_path / "run", start=start, cycles=1).state
    assert state["progress"]["finished"] == "1 cycle"
    begun = load_checkpoint(start).progress
    assert state["incumbent"]["path"][0][0] == begun["iteration"] == 2
    steps = {name: record["env_steps"] for name, record in state["archive"].items()}
    assert steps.pop(START) == begun["env_steps"]
    assert min(steps.values()) > begun["env_steps"]


@pytest.mark.slow
def test_a_family_of_ones_own_evolves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Registered in this process alone."""

    class Windy(Navigation2D):
        name = "windy"

    monkeypatch.setitem(base._FACTORIES, "windy", Windy)
    config = TrainConfig().replace(task="windy", **REAL)
    rules = EvolveConfig(**{**RULES, "proposals": 1, "cycles": 1})
    assert evolve(config, rules, tmp_path / "run").state["progress"]["finished"] == "1 cycle"
    monkeypatch.setattr(Windy, "reference", None)
    with pytest.raises(ValueError, match="'windy' needs a reference"):
        evolve(config, rules, tmp_path / "other")
    assert not (tmp_path / "other").exists()


if __name__ == "__main__":
    ray.init(logging_level="ERROR", log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": str(TESTS)}})
    scripted(Path(sys.argv[1]), resume=len(sys.argv) > 2)
