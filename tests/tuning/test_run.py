"""The folder of a run: opened once, resumed with its own options, and what it hands over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from builders import assert_equal_arrays, make_checkpoint
from scripted_trainers import ScriptedMember
from simulated import World, drive
from ssm_metarl.config import TrainConfig
from ssm_metarl.storage.checkpoint import load_checkpoint, save_checkpoint
from ssm_metarl.storage.run_folder import resolve_checkpoint
from ssm_metarl.tuning.config import WITHOUT_EFFECT, EvolveConfig
from ssm_metarl.tuning.run import START, Run, export_best, open_run
from ssm_metarl.tuning.store import read_state

SMALL = {"hidden_dim": 8, "state_dim": 4, "meta_batch": 20, "episodes": 4}
RULES = EvolveConfig(cycles=2, proposals=2, stretch=2)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def config(**changes: Any) -> TrainConfig:
    return TrainConfig.for_task("navigation-2d", **{**SMALL, **changes})


def play(run: Run) -> Run:
    store = run.population.store
    drive(run.population, World(), process=lambda number: ScriptedMember(store.archive, number))
    return run


def test_a_run_does_not_depend_on_options_without_effect(tmp_path: Path) -> None:
    run = open_run(config(lr_schedule="linear", learner_threads=3, iterations=7), RULES, tmp_path)
    base = read_state(tmp_path)["base"]
    assert (base["lr_schedule"], base["learner_threads"]) == ("constant", 1)
    assert run.export() is None
    run.population.store.close()
    again = open_run(config(lr_schedule="cosine", iterations=9), RULES, tmp_path, resume=True)
    assert read_state(tmp_path)["base"] == base
    again.population.store.close()
    assert not set(WITHOUT_EFFECT) & set(yaml.safe_load((tmp_path / "config.yaml").read_text()))


def test_what_is_handed_over_is_an_ordinary_checkpoint(tmp_path: Path) -> None:
    """With the options that led to it, as a schedule."""
    run = play(open_run(config(), RULES, tmp_path))
    path = run.export()
    assert path == resolve_checkpoint(tmp_path)
    best = run.population.archive[run.population.progress.best or ""]
    archived = load_checkpoint(run.population.store.checkpoints / best.exported)
    exported = load_checkpoint(path)
    assert_equal_arrays(exported.policy, archived.policy)
    assert exported.progress == archived.progress
    marked = json.loads((tmp_path / "best.json").read_text())
    assert marked == {"checkpoint": path.name, "level": best.level}
    schedule = json.loads((tmp_path / "schedule.json").read_text())
    assert schedule == {"iterations": best.iteration, "weights": best.handed_over, "options": best.path}
    assert schedule["options"][0] == [0, read_state(tmp_path)["base"]]


@pytest.mark.parametrize("weights", ["last", "mean"])
def test_the_better_weights_are_exported(tmp_path: Path, weights: str) -> None:
    run = play(open_run(config(), RULES, tmp_path))
    best = run.population.archive[run.population.progress.best or ""]
    best.handed_over = weights
    run.population._boundary()
    exported = export_best(tmp_path, run.population.store)
    assert exported is not None
    skill = load_checkpoint(run.population.store.checkpoints / best.name).progress["skill"]
    gain = World().mean if weights == "mean" else 0.0
    assert load_checkpoint(exported).progress["skill"] == pytest.approx(skill + gain)


def test_a_run_goes_on_with_its_own_options(tmp_path: Path) -> None:
    """Rules may change, and where it runs."""
    play(open_run(config(), RULES, tmp_path))
    again = open_run(config(num_workers=3), EvolveConfig(cycles=3, proposals=2, stretch=4), tmp_path, resume=True)
    assert (again.population.config.cycles, again.population.config.stretch) == (3, 4)
    assert play(again).population.finished == "3 cycles"


@pytest.mark.parametrize(
    ("options", "rules", "match"),
    [
        ({"inner_lr": 0.5}, {}, r"inner_lr cannot change on resume: it is .* in .*, not 0\.5\."),
        ({"hidden_dim": 16}, {}, "hidden_dim cannot change on resume: it is 8"),
        ({}, {"proposals": 4}, "proposals cannot change on resume: it is 2"),
        ({}, {"mutate": False}, "mutate cannot change on resume: it is True"),
    ],
)
def test_what_decisions_depend_on_cannot_change(
    tmp_path: Path, options: dict[str, Any], rules: dict[str, Any], match: str
) -> None:
    open_run(config(), RULES, tmp_path)
    changed = EvolveConfig(**{"cycles": 2, "proposals": 2, "stretch": 2, **rules})
    with pytest.raises(ValueError, match=match):
        open_run(config(**options), changed, tmp_path, resume=True)


def test_a_folder_is_used_once(tmp_path: Path) -> None:
    open_run(config(), RULES, tmp_path)
    with pytest.raises(ValueError, match="not empty"):
        open_run(config(), RULES, tmp_path)
    with pytest.raises(ValueError, match="is no run of evolve"):
        open_run(config(), RULES, tmp_path / "other", resume=True)


def test_a_run_starts_from_a_checkpoint(tmp_path: Path) -> None:
    spec = config().policy_spec(config().family())
    start = save_checkpoint(
        tmp_path / "start", make_checkpoint(3, spec, progress={"iteration": 7, "env_steps": 900, "skill": 0.5})
    )
    run = open_run(config(), RULES, tmp_path / "run", start)
    archived = load_checkpoint(run.population.store.checkpoints / START)
    assert_equal_arrays(archived.policy, load_checkpoint(start).policy)
    incumbent = run.population.incumbent
    assert (incumbent.checkpoint, incumbent.iteration, incumbent.env_steps) == (START, 7, 900)
    assert incumbent.path[0][0] == 7
    play(run)
    assert run.population.progress.spent["total"] < run.population.incumbent.env_steps * 3
    first = run.population.archive[START]
    assert (first.iteration, first.env_steps, first.config) == (7, 900, run.population.base)
    assert first.level == first.metrics["average_return"] > 0
    assert all(record.iteration > 7 for name, record in run.population.archive.items() if name != START)


def test_a_start_of_other_sizes_is_refused(tmp_path: Path) -> None:
    spec = config(hidden_dim=12).policy_spec(config().family())
    start = save_checkpoint(tmp_path / "start", make_checkpoint(3, spec))
    with pytest.raises(ValueError, match="does not have the sizes asked for, or the spaces of 'navigation-2d'"):
        open_run(config(), RULES, tmp_path / "run", start)
    assert not (tmp_path / "run").exists()


def test_only_what_is_meta_trained_evolves(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="evolve meta-trains: algorithm cannot be"):
        open_run(config(algorithm="policy-gradient"), RULES, tmp_path / "run")
