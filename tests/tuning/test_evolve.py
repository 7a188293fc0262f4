"""Self-improvement under Ray Tune: decisions carried out, deaths survived, and the driver killed and resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from builders import wait_until
from scripted_trainers import STEPS, MortalTrainer, ScriptedTrainer, write_faults
from ssm_metarl.config import TrainConfig
from ssm_metarl.distributed.train import train
from ssm_metarl.distributed.trainer import MetaTrainer
from ssm_metarl.storage.checkpoint import load_checkpoint
from ssm_metarl.storage.contents import CheckpointError
from ssm_metarl.storage.run_folder import checkpoints, resolve_checkpoint
from ssm_metarl.tasks import registry as base
from ssm_metarl.tasks.navigation import Navigation2D
from ssm_metarl.tuning import evolution as evolution_module
from ssm_metarl.tuning import evolve as run_module
from ssm_metarl.tuning.evolve import EvolutionFailure, EvolveResult, evolve, export_best
from ssm_metarl.tuning.member_trainer import EvolvingTrainer
from ssm_metarl.tuning.mutation import Proposal
from ssm_metarl.tuning.population import EvolveConfig, checkpoint_bound
from ssm_metarl.tuning.scheduler import RecursiveSelfImprovement
from ssm_metarl.tuning.store import RunStore, read_state, request_rollback

TESTS = Path(__file__).resolve().parents[1]
SMALL = {"hidden_dim": 8, "state_dim": 4, "learner_threads": 1}
REAL = {**SMALL, "meta_batch": 4, "episodes": 2, "epochs": 1}
RULES = {"population": 3, "generations": 3, "generation_steps": 5 * STEPS}
REAL_RULES = {**RULES, "generations": 2, "generation_steps": 2000, "validation_tasks": 4, "validation_episodes": 2}

pytestmark = pytest.mark.usefixtures("ray_session")


def scripted(run: Path, resume: bool = False, **rules: Any) -> EvolveResult:
    config = TrainConfig.for_task("navigation-2d", **SMALL)
    return evolve(config, EvolveConfig(**{**RULES, **rules}), run, resume=resume, trainable=ScriptedTrainer)


def real(run: Path, trainable: type = EvolvingTrainer, start: Path | None = None, **rules: Any) -> EvolveResult:
    config = TrainConfig.for_task("navigation-2d", **REAL)
    return evolve(config, EvolveConfig(**{**REAL_RULES, **rules}), run, start=start, trainable=trainable)


def decisions(run: Path) -> list[dict[str, Any]]:
    """The log without what depends on time."""
    return [{k: v for k, v in event.items() if k != "time"} for event in RunStore(run).events()]


def kinds(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in decisions(run) if event["kind"] == kind]


def forcing(after: dict[str, Any]) -> Callable[..., Proposal]:
    """Every mutation is this one."""

    def propose(parent: str, config: dict[str, Any], *_: Any) -> Proposal:
        return Proposal(parent, {name: config[name] for name in after}, after)

    return propose


@pytest.fixture(scope="module")
def undisturbed(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    scripted(run)
    return run


def test_a_run_improves_and_leaves_an_ordinary_checkpoint(undisturbed: Path) -> None:
    state = read_state(undisturbed)
    assert state["finished"] == "3 generations"
    assert state["archive"][state["best"]]["composite"] > state["floor"]
    assert kinds(undisturbed, "probation")
    exported = load_checkpoint(resolve_checkpoint(undisturbed))
    assert exported.config == state["archive"][state["best"]]["config"]
    kept = len(list((undisturbed / "rsi" / "checkpoints").iterdir())) + len(checkpoints(undisturbed))
    assert kept <= checkpoint_bound(EvolveConfig(**RULES))
    assert state["best"] in os.listdir(undisturbed / "rsi" / "checkpoints")


@pytest.mark.slow
def test_the_best_is_an_ordinary_checkpoint_after_every_generation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a run that is killed leaves it, too; and one that breaks down in Ray says so in a sentence."""
    exported = []

    def export_and_note(run: Path, store: RunStore) -> Path | None:
        path = export_best(run, store)
        exported.append(None if path is None else resolve_checkpoint(run))
        if len(exported) == 2:
            raise OSError("the disk is full")
        return path

    monkeypatch.setattr(run_module, "export_best", export_and_note)
    with pytest.raises(EvolutionFailure, match="broke down: OSError: the disk is full; what was decided is kept"):
        scripted(tmp_path)
    assert exported[0] is not None
    result = scripted(tmp_path, resume=True)
    assert result.state["finished"] == "3 generations"
    assert exported[-1] == result.checkpoint


@pytest.mark.slow
def test_a_killed_trial_keeps_its_state(undisturbed: Path, tmp_path: Path) -> None:
    """Its generation is played again from its assignment: every decision is the same, but for the failure noted."""
    write_faults(tmp_path, {"trial": 1, "generation": 2, "kind": "kill"})
    scripted(tmp_path)
    ours = [event for event in decisions(tmp_path) if event["kind"] != "failure"]
    theirs = decisions(undisturbed)
    for event in (*ours, *theirs):
        del event["lifetime_steps"]  # what was lost is counted
    assert ours == theirs
    (failure,) = kinds(tmp_path, "failure")
    assert (failure["trial"], failure["generation"], failure["decision"]) == (1, 2, "restarted")


@pytest.mark.slow
def test_a_trial_that_dies_for_good_does_not_hold_the_others(tmp_path: Path) -> None:
    write_faults(tmp_path, {"trial": 0, "generation": 1, "kind": "kill", "times": 100})
    state = scripted(tmp_path, max_failures=10).state
    assert [trial["status"] == "dead" for trial in state["trials"]] == [True, False, False]
    assert state["finished"] == "3 generations"
    assert {event["generation"] for event in kinds(tmp_path, "training")} == {0, 1, 2, 3}


@pytest.mark.slow
def test_three_failures_in_a_row_stop_everything_and_keep_the_best(tmp_path: Path) -> None:
    write_faults(tmp_path, *({"trial": trial, "generation": 2, "kind": "not finite"} for trial in range(3)))
    result = scripted(tmp_path)
    assert result.state["finished"].startswith("emergency stop: 3 failures in a row")
    best = result.state["archive"][result.state["best"]]
    assert best["generation"] == 1
    assert result.checkpoint is not None
    assert load_checkpoint(result.checkpoint).config == best["config"]


@pytest.mark.slow
def test_a_ruinous_mutation_is_rolled_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evolution_module, "propose", forcing({"outer_lr": 0.5}))
    state = scripted(tmp_path, generations=2, floor_margin=10.0).state
    judged = kinds(tmp_path, "probation")
    assert judged
    assert all(event["decision"] == "rolled back" for event in judged)
    assert all(trial["learning_rates"]["outer_lr"] == 0.001 for trial in state["trials"])
    assert len({trial["checkpoint"] for trial in state["trials"] if trial["status"] == "rolled back"}) <= 2


@pytest.mark.slow
def test_the_real_trainer_rolls_back_to_the_parents_very_parameters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit-equal parameters, and assessing them again gives the recorded metrics."""
    monkeypatch.setattr(evolution_module, "propose", forcing({"outer_lr": 0.5, "hidden_dim": 12}))
    state = real(tmp_path / "run", generations=1, population=2).state
    (judged,) = kinds(tmp_path / "run", "probation")
    assert judged["decision"] == "rolled back"
    assert judged["resize_error"] == pytest.approx(0, abs=1e-5)
    child, parent = (state["trials"][i] for i in (judged["trial"], 1 - judged["trial"]))
    assert child["checkpoint"] == parent["checkpoint"]
    assert child["sizes"]["hidden_dim"] == 8
    record = state["archive"][child["checkpoint"]]
    folder = tmp_path / "run" / "rsi" / "checkpoints" / record["name"]
    trainer = EvolvingTrainer({**child["config"], "assignment": assignment(tmp_path, state)})
    trainer.load_checkpoint(str(folder))
    for name, value in load_checkpoint(folder).policy.items():
        np.testing.assert_array_equal(trainer.learner.weights()[name], value)
    (report,) = trainer.step()["report"]
    trainer.stop()
    assert report["assessment"]["validation"] == record["assessment"]["validation"]
    assert report["assessment"]["shifted"] == record["assessment"]["shifted"]


def assignment(folder: Path, state: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """One that only assesses."""
    rules = {name: state["config"][name] for name in state["config"] if name.startswith("validation")}
    place = {"trial": 0, "generation": 1, "budget": 0, "probation": False, "history": []}
    return {**rules, **place, "checkpoints": str(folder / "again"), "seed": state["seed"], **changes}


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_rolls_back_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evolution_module, "propose", forcing({"inner_lr": 1e38}))
    state = real(tmp_path, generations=1, population=2).state
    (failure,) = kinds(tmp_path, "failure")
    assert failure["decision"] == "rolled back"
    assert not kinds(tmp_path, "probation")
    child = state["trials"][failure["trial"]]
    assert child["learning_rates"]["inner_lr"] == state["base"]["inner_lr"] < 1
    assert child["status"] == "continued"
    assert abs(child["lineage_steps"] - REAL_RULES["generation_steps"]) <= 800  # half an iteration


@pytest.mark.slow
def test_the_real_trainer_survives_a_kill(tmp_path: Path) -> None:
    real(tmp_path / "quiet", generation_steps=4000)
    write_faults(tmp_path / "killed", {"trial": 2, "generation": 2, "kind": "kill"})
    real(tmp_path / "killed", MortalTrainer, generation_steps=4000)
    quiet, killed = decisions(tmp_path / "quiet"), decisions(tmp_path / "killed")
    assert sum(event["kind"] == "failure" for event in killed) == 1
    for event in (*quiet, *killed):
        del event["lifetime_steps"]
    assert [event for event in killed if event["kind"] != "failure"] == quiet


@pytest.mark.slow
def test_a_run_starts_from_a_checkpoint(tmp_path: Path) -> None:
    """Whatever critic it has."""
    config = TrainConfig.for_task("navigation-2d", iterations=1, baseline="privileged", **REAL)
    start = train(config, tmp_path / "start").checkpoint
    state = real(tmp_path / "run", start=start, generations=1, survivors=1).state
    first = [event["composite"] for event in kinds(tmp_path / "run", "training") if event["generation"] == 0]
    assert len(set(first)) == 1
    assert all(trial["lineage_steps"] > load_checkpoint(start).progress["env_steps"] for trial in state["trials"])


@pytest.mark.parametrize(
    "changes", [{"state_dim": 8}, {"hidden_dim": 12, "num_layers": 2}, {"state_dim": 2, "hidden_dim": 6}]
)
def test_only_the_evolving_trainer_takes_another_size(tmp_path: Path, changes: dict[str, int]) -> None:
    """Growing keeps the policy's outputs, hence its returns; the mutated learning rates are the ones that train."""
    options = TrainConfig.for_task("navigation-2d", **REAL).to_dict()
    state = {"config": {"validation_tasks": 4, "validation_episodes": 2, "validation_steps": 1}, "seed": 0}
    old = EvolvingTrainer({**options, "assignment": assignment(tmp_path, state)})
    old.learner.update([old.learner.batch(old.learner.weights(), _rollouts(old)) for _ in range(2)])
    old.save_checkpoint(str(tmp_path / "small"))
    other = {**options, **changes, "outer_lr": 0.0123, "inner_lr": 0.3}
    with pytest.raises(CheckpointError, match="instead of"):
        MetaTrainer(other).load_checkpoint(str(tmp_path / "small"))
    new = EvolvingTrainer({**other, "assignment": assignment(tmp_path, state)})
    new.load_checkpoint(str(tmp_path / "small"))
    assert new.learner.optimizer.param_groups[0]["lr"] == 0.0123
    with pytest.raises(RuntimeError, match="instead of"):
        new.learner.check_rates(0.3, 0.001)
    before, after = (np.array(trainer.step()["report"][0]["assessment"]["validation"]) for trainer in (old, new))
    if changes.get("hidden_dim", 9) > 8:
        assert new.resize_error == pytest.approx(0, abs=1e-5)
        np.testing.assert_allclose(after[:, 0], before[:, 0], atol=1e-4)
    else:
        assert new.resize_error is not None
        assert new.resize_error > 0


def test_the_mutated_learning_rate_is_the_one_that_trains(tmp_path: Path) -> None:
    """Parameters move ten times as far in the first step after a restore, whatever the checkpoint was trained with."""
    options = TrainConfig.for_task("navigation-2d", **REAL, outer_lr=1e-4).to_dict()
    state = {"config": {"validation_tasks": 4, "validation_episodes": 2, "validation_steps": 1}, "seed": 0}
    start = str(tmp_path / "start")
    moved = []
    for rate in (1e-4, 1e-3, 1e-2):
        trainer = EvolvingTrainer({**options, "outer_lr": rate, "assignment": assignment(tmp_path, state, budget=1)})
        if rate == 1e-4:
            trainer.step()
            trainer.save_checkpoint(start)
            continue
        trainer.load_checkpoint(start)
        before = trainer.learner.weights()
        trainer.step()
        moved.append(trainer.learner.weights()["encoder.weight"] - before["encoder.weight"])
    np.testing.assert_allclose(moved[1], 10 * moved[0], rtol=0.05, atol=1e-7)
    assert np.abs(moved[1]).max() > 1e-5


@pytest.mark.parametrize(("budget", "iterations"), [(1, 1), (1100, 1), (1300, 2), (1990, 2), (2010, 3)])
def test_a_generation_ends_with_the_nearest_iteration(tmp_path: Path, budget: int, iterations: int) -> None:
    """An iteration of two tasks, two episodes and two stages of 100 steps is 800 steps long."""
    options = TrainConfig.for_task("navigation-2d", **{**REAL, "meta_batch": 2}).to_dict()
    state = {"config": {"validation_tasks": 2, "validation_episodes": 1, "validation_steps": 1}, "seed": 0}
    trainer = EvolvingTrainer({**options, "assignment": assignment(tmp_path, state, budget=budget)})
    report = trainer.step()["report"][0]
    while not report["ended"]:
        report = trainer.step()["report"][0]
    trainer.stop()
    assert trainer.meta_iteration == iterations
    assert report["trained"] == trainer.env_steps


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kill in reset", "error in reset"])
def test_a_process_that_dies_while_it_is_handed_on_costs_nothing(tmp_path: Path, kind: str) -> None:
    """More trials than processors: Tune gives a trial that waits the process of one at the border."""
    # Twice each: then those at the border have no process left to give, and one has to be started.
    write_faults(tmp_path, *({"trial": trial, "generation": 1, "kind": kind, "times": 2} for trial in range(6)))
    state = scripted(tmp_path, population=6, generations=2, max_failures=20).state
    assert state["finished"] == "2 generations"
    assert "dead" not in [trial["status"] for trial in state["trials"]]
    failures = kinds(tmp_path, "failure")
    assert failures, "no process was handed on"
    assert len(failures) == len(list(tmp_path.glob(".fault-*")))


def _rollouts(trainer: MetaTrainer) -> Any:
    tasks = trainer.distribution.sample(4, np.random.default_rng(0))
    seeds = [np.random.SeedSequence(i) for i in range(4)]
    return trainer.pool.collect(trainer.learner.weights(), tasks, seeds, 2)


@pytest.mark.slow
def test_a_family_of_ones_own_evolves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Registered in this process alone."""

    class Windy(Navigation2D):
        name = "windy"

    monkeypatch.setitem(base._FACTORIES, "windy", Windy)
    config = TrainConfig().replace(task="windy", **REAL)
    rules = EvolveConfig(**{**REAL_RULES, "population": 2, "generations": 1})
    assert evolve(config, rules, tmp_path / "run").state["finished"] == "1 generation"
    monkeypatch.setattr(Windy, "reference", None)
    with pytest.raises(ValueError, match="'windy' needs a reference"):
        evolve(config, rules, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_asynchronous_generations_are_refused() -> None:
    with pytest.raises(ValueError, match="synch must be True"):
        RecursiveSelfImprovement(None, synch=False)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_run_resumed_for_longer_equals_one_that_was_not_stopped(undisturbed: Path, tmp_path: Path) -> None:
    scripted(tmp_path / "run", generations=1)
    scripted(tmp_path / "run", resume=True, generations=3)
    assert decisions(tmp_path / "run") == decisions(undisturbed)


@pytest.mark.slow
def test_a_run_at_a_uri_goes_on_where_its_disk_is_lost(undisturbed: Path, tmp_path: Path) -> None:
    """Trials write their checkpoints there; state, log and the best follow with every decision."""
    uri = f"file://{tmp_path}/bucket/run"
    config = TrainConfig.for_task("navigation-2d", **SMALL)

    def go(resume: bool, **rules: Any) -> EvolveResult:
        rules_ = EvolveConfig(**{**RULES, **rules})
        return evolve(config, rules_, tmp_path / "run", resume=resume, trainable=ScriptedTrainer, mirror=uri)

    go(False, generations=1)
    shutil.rmtree(tmp_path / "run")
    (name,) = {read_state(tmp_path / "bucket" / "run")["best"]}
    request_rollback(tmp_path / "run", name, uri)
    shutil.rmtree(tmp_path / "run")
    result = go(True, generations=3)
    assert result.state["finished"] == "3 generations"
    requests = [event for event in decisions(tmp_path / "run") if event["kind"] == "request"]
    assert [event["checkpoint"] for event in requests] == [name]
    kept = {path.name for path in (tmp_path / "bucket" / "run" / "rsi" / "checkpoints").iterdir()}
    assert kept == set(result.state["archive"])
    assert not list((tmp_path / "bucket" / "run" / "rsi" / "requests").glob("*.json"))
    assert result.checkpoint is not None
    assert (
        load_checkpoint(tmp_path / "bucket" / "run" / result.checkpoint.name).config
        == (result.state["archive"][result.state["best"]]["config"])
    )


@pytest.mark.slow
def test_the_driver_killed_at_any_point_resumes(undisturbed: Path, tmp_path: Path) -> None:
    """What was logged stays a prefix, and the whole log is that of an undisturbed run."""
    run, seen = tmp_path / "run", list[str]()
    log = run / "rsi" / "events.jsonl"
    pauses = [1, 9]  # events to wait for
    for attempt in range(len(pauses) + 1):
        driver = subprocess.Popen(
            [sys.executable, __file__, str(run), *(["resume"] if attempt else [])],
            env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address, "PYTHONPATH": str(TESTS)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        if attempt < len(pauses):
            wait_until(lambda: log.exists() and len(log.read_text().splitlines()) >= pauses[attempt], 60.0)  # noqa: B023
            driver.send_signal(signal.SIGKILL)
        driver.wait(120)
        lines = log.read_text().splitlines()
        assert lines[: len(seen)] == seen
        seen = lines
    assert decisions(run) == decisions(undisturbed)


@pytest.mark.slow
def test_an_interrupted_run_says_so_and_goes_on(undisturbed: Path, tmp_path: Path) -> None:
    """A signal ends the run at once; every generation that ended is on disk."""
    log = tmp_path / "run" / "rsi" / "events.jsonl"

    def interrupt() -> None:
        wait_until(lambda: log.exists() and len(log.read_text().splitlines()) > 4, 60.0)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    result = scripted(tmp_path / "run")
    thread.join()
    assert result.signal == signal.SIGINT
    assert result.state["finished"] is None
    scripted(tmp_path / "run", resume=True)
    assert decisions(tmp_path / "run") == decisions(undisturbed)


def test_the_state_is_strict_json(undisturbed: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    json.loads((undisturbed / "rsi" / "state.json").read_text(), parse_constant=refuse)


if __name__ == "__main__":
    ray.init(logging_level="ERROR", log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": str(TESTS)}})
    scripted(Path(sys.argv[1]), resume=len(sys.argv) > 2)
