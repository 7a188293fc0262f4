"""Self-improvement on the command line: what it prints, what it refuses, and the pictures."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from builders import PNG
from ssm_metarl.cli.main import main
from ssm_metarl.cli.plots import plot_evolution
from ssm_metarl.cli.population import PopulationView, population_table
from ssm_metarl.config import TrainConfig
from ssm_metarl.distributed.train import train
from ssm_metarl.storage.checkpoint import load_policy
from ssm_metarl.tuning import evolve as run_module
from ssm_metarl.tuning.evolution import Evolution
from ssm_metarl.tuning.population import EvolveConfig
from ssm_metarl.tuning.store import RunStore, read_state

SMALL = ["--hidden-dim", "8", "--state-dim", "4", "--meta-batch", "4", "--episodes", "2", "--epochs", "1"]
SMALL += ["--generation-steps", "2000", "--validation-tasks", "4", "--validation-episodes", "2"]


def outcome(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = int(end.code or 0)
    return (code, *capsys.readouterr())


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """A run that has not begun."""
    store = RunStore(tmp_path / "run")
    store.create()
    evolution = Evolution(EvolveConfig(population=2), TrainConfig().to_dict(), store)
    evolution.commit()
    return tmp_path / "run"


@pytest.mark.slow
def test_from_evolve_to_rollback(ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    arguments = ["evolve", *SMALL, "--cycles", "2", "--proposals", "1", "--run-dir", run, "--json"]
    code, out, err = outcome(capsys, *arguments)
    assert code == 0, err
    (line,) = out.splitlines()
    summary = json.loads(line)
    assert (summary["generation"], summary["finished"], summary["interrupted"]) == (2, "2 generations", False)
    assert summary["kept"] + summary["rolled_back"] + summary["failures"] > 0
    assert [Path(path).read_bytes()[:6] for path in summary["pictures"]] == [PNG, PNG]
    assert "on probation" in err
    assert load_policy(run)[0].spec.hidden_dim == summary["sizes"]["hidden_dim"]
    code, out, err = outcome(capsys, "evaluate", run, "--num-tasks", "3", "--json")
    assert code == 0, err
    assert outcome(capsys, "plot", run)[0] == 0
    name = min(read_state(run)["archive"])
    code, _, err = outcome(capsys, "evolve", "rollback", run, name)
    assert code == 0, err
    code, out, err = outcome(capsys, "evolve", "--resume", "--run-dir", run, "--generations", "3", "--json")
    assert code == 0, err
    requests = [event for event in RunStore(run).events() if event["kind"] == "request"]
    assert [event["checkpoint"] for event in requests] == [name]
    assert json.loads(out)["generation"] == 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--population", "1"], "population must be an integer of 2 or more"),
        (["--survivors", "4"], "survivors must be below population"),
        (["--generation-steps", "-1"], "generation_steps must be"),
        (["--keep-margin", "nan"], "keep_margin must be a number"),
        (["--cycles", "2", "--proposals", "0"], "proposals must be 1 or more"),
        (["--hidden-dim", "0"], "hidden_dim must be"),
        (["--task", "navigatoin-2d"], "did you mean 'navigation-2d'?"),
        (["--resume"], "--resume needs --run-dir"),
        (["--resume", "--run-dir", "nowhere"], "is no run of evolve"),
        (["--from", "nowhere"], "nowhere"),
        (["rollback", "nowhere", "x"], "is no run of evolve"),
    ],
)
def test_bad_options_are_one_sentence_before_ray_starts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    monkeypatch.setattr(run_module, "start_ray", lambda *_, **__: pytest.fail("Ray would have been started"))
    monkeypatch.chdir(tmp_path)
    code, out, err = outcome(capsys, "evolve", *arguments)
    assert (code, out) == (2, "")
    assert sentence in err.replace("\n", " ")
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_and_another_size_are_refused(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_module, "start_ray", lambda *_, **__: pytest.fail("Ray would have been started"))
    code, _, err = outcome(capsys, "evolve", "--run-dir", fresh)
    assert code == 2
    assert "is not empty" in err
    small = TrainConfig.for_task("navigation-2d", iterations=1, meta_batch=2, episodes=2, hidden_dim=8, state_dim=4)
    start = train(small, tmp_path / "start").checkpoint
    code, _, err = outcome(capsys, "evolve", "--from", start, "--hidden-dim", "9", "--run-dir", tmp_path / "other")
    assert code == 2
    assert "does not have the sizes asked for" in err
    code, _, err = outcome(capsys, "evolve", "--resume", "--run-dir", fresh, "--population", "3")
    assert code == 2
    assert "population cannot change on resume" in err
    code, _, err = outcome(capsys, "evolve", "--resume", "--run-dir", fresh, "--inner-lr", "0.7")
    assert code == 2
    assert "inner_lr cannot change on resume: it is 0.1" in err.replace("\n", " ")
    code, _, err = outcome(capsys, "evolve", "rollback", fresh, "generation_0007_trial_1")
    assert code == 2
    assert "keeps no checkpoint 'generation_0007_trial_1'" in err


def test_the_table_fits_a_terminal(fresh: Path) -> None:
    state = read_state(fresh)
    trial = state["trials"][0]
    trial["sizes"] = {"state_dim": 256, "hidden_dim": 256, "num_layers": 4}
    trial["learning_rates"] = {"inner_lr": 0.01234, "outer_lr": 0.0001234, "inner_steps": 3}
    trial["metrics"] = dict.fromkeys(("average_return", "adaptation_speed", "stability"), 0.123)
    trial["composite"], trial["status"] = 0.5, "on probation"
    text = io.StringIO()
    Console(file=text, width=80).print(population_table(state))
    (row,) = (line for line in text.getvalue().splitlines() if "on probation" in line)
    assert "256/256/4" in row
    assert "…" not in row
    assert "0.12" not in row, "these are its parent's figures"
    trial["status"] = "kept"
    text = io.StringIO()
    Console(file=text, width=80).print(population_table(state))
    (row,) = (line for line in text.getvalue().splitlines() if "kept" in line)
    assert "0.12" in row


def test_what_happens_is_said_without_a_terminal(fresh: Path) -> None:
    text = io.StringIO()
    with PopulationView(fresh, Console(file=text, width=200)):
        RunStore(fresh).commit({**read_state(fresh), "events_before": 0}, [_event(1, "probation", "rolled back")])
    assert "generation 1, trial 0: hidden_dim 8 → 10: rolled back (worse)" in text.getvalue()


def test_pictures_of_a_population(fresh: Path) -> None:
    with pytest.raises(ValueError, match="no generation"):
        plot_evolution(fresh, "a task")
    events = [_event(generation, "training", "continued") for generation in range(3)]
    events += [_event(1, "probation", "kept"), _event(2, "probation", "rolled back")]
    RunStore(fresh).commit({**read_state(fresh), "events_before": 0}, events)
    events[1]["interval"] = [None, None]  # of a single task
    files = plot_evolution(fresh, "a task")
    assert [path.name for path in files] == ["lineage.png", "evolution.png"]
    assert all(path.read_bytes()[:6] == PNG for path in files)


def _event(generation: int, kind: str, decision: str) -> dict[str, Any]:
    changes = {} if kind == "training" else {"hidden_dim": 8}
    return {
        "generation": generation,
        "trial": 0,
        "start": f"generation_{generation - 1}",
        "checkpoint": f"generation_{generation}",
        "kind": kind,
        "decision": decision,
        "reason": "worse" if decision == "rolled back" else "",
        "before": changes,
        "after": {name: value + 2 for name, value in changes.items()},
        "metrics": {"average_return": 0.5, "stability": 0.4},
        "composite": 0.5 + generation / 10,
        "interval": [0.4, 0.6],
    }
