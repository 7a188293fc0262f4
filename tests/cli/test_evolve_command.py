"""Self-improvement on the command line: what it prints, what it refuses, and the pictures."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from builders import PNG
from evolved import contenders, event, fresh_run, race
from ssm_metarl.cli import plots
from ssm_metarl.cli.evolve import room_words
from ssm_metarl.cli.main import main
from ssm_metarl.cli.options import Evolve
from ssm_metarl.cli.parsing import parse
from ssm_metarl.cli.plots import plot_evolution
from ssm_metarl.cli.population import (
    PopulationView,
    decisions_table,
    incumbent_table,
    phase_words,
    population_view,
    race_table,
)
from ssm_metarl.config import TrainConfig
from ssm_metarl.distributed.train import train
from ssm_metarl.storage.checkpoint import load_checkpoint, load_policy
from ssm_metarl.tuning import evolve as run_module
from ssm_metarl.tuning.config import EvolveConfig
from ssm_metarl.tuning.metrics import METRICS
from ssm_metarl.tuning.options import OPTIONS
from ssm_metarl.tuning.store import RunStore, read_state

SMALL = ["--hidden-dim", "8", "--state-dim", "4", "--meta-batch", "4", "--episodes", "2", "--epochs", "1"]


def outcome(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = int(end.code or 0)
    return (code, *capsys.readouterr())


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """A run that has not begun."""
    fresh_run(tmp_path / "run", proposals=2)
    return tmp_path / "run"


@pytest.mark.slow
def test_from_evolve_to_rollback_and_to_a_replay(
    ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    arguments = ["evolve", *SMALL, "--cycles", "2", "--proposals", "2", "--run-dir", run, "--json"]
    code, out, err = outcome(capsys, *arguments)
    assert code == 0, err
    (line,) = out.splitlines()
    summary = json.loads(line)
    assert (summary["cycle"], summary["finished"], summary["interrupted"]) == (2, "2 cycles", False)
    assert summary["accepted"] + summary["rejected"] == 2
    assert set(summary["best"]["metrics"]) == set(METRICS)
    assert set(summary["options"]) == set(OPTIONS)
    assert 0 < summary["losers_steps"] < summary["env_steps"]
    assert [Path(path).read_bytes()[:6] for path in summary["pictures"]] == [PNG, PNG]
    assert "race 1 " in err
    assert load_policy(run)[0].spec.hidden_dim == summary["sizes"]["hidden_dim"]
    code, out, err = outcome(capsys, "evaluate", run, "--num-tasks", "3", "--json")
    assert code == 0, err
    assert outcome(capsys, "plot", run)[0] == 0
    state = read_state(run)
    code, _, err = outcome(capsys, "train", "--schedule", summary["schedule"], "--run-dir", tmp_path / "replay")
    assert code == 0, err
    replayed = load_checkpoint(tmp_path / "replay" / f"checkpoint_{state['incumbent']['iteration']:06d}")
    last = load_checkpoint(run / "rsi" / "checkpoints" / state["incumbent"]["checkpoint"])
    for name, array in last.policy.items():
        np.testing.assert_array_equal(replayed.policy[name], array)
    name = min(state["archive"])
    code, _, err = outcome(capsys, "evolve", "rollback", run, name)
    assert code == 0, err
    code, out, err = outcome(capsys, "evolve", "--resume", "--run-dir", run, "--cycles", "3", "--json")
    assert code == 0, err
    assert (json.loads(out)["cycle"], json.loads(out)["rolled_back"]) == (3, 1)
    (back,) = (event for event in RunStore(run).events() if event["decision"] == "rolled back")
    assert (back["checkpoint"], back["reason"]) == (name, "asked for")


def test_a_budget_bounds_the_run_alone() -> None:
    def rules(*words: str) -> EvolveConfig:
        options = parse(["evolve", *words]).options()
        assert isinstance(options, Evolve)
        return options.evolution

    assert (rules().budget, rules().cycles) == (0.0, EvolveConfig.cycles)
    assert (rules("--budget", "5e6").budget, rules("--budget", "5e6").cycles) == (5e6, 0)
    assert rules("--budget", "5e6", "--cycles", "3").cycles == 3
    own = rules("--evolve", "outer_lr", "state_dim", "--bounds", '{"state_dim": [8, 64]}', "--no-mutate")
    assert (own.evolve, own.bounds, own.members) == (("outer_lr", "state_dim"), {"state_dim": [8, 64]}, 1)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--budget", "-1"], "budget must be"),
        (["--losers-share", "nan"], "losers_share must be a number"),
        (["--evolve", "outer_rl"], "invalid choice 'outer_rl'"),
        (["--bounds", '{"inner_lr": [1]}'], "must be a least and a greatest value"),
        (["--bounds", '{"width": [1, 2]}'], "Unknown bound key 'width'"),
        (["--cycles", "2", "--proposals", "0"], "proposals must be an integer of 1 or more"),
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
    code, _, err = outcome(capsys, "evolve", "--resume", "--run-dir", fresh, "--proposals", "3")
    assert code == 2
    assert "proposals cannot change on resume" in err
    code, _, err = outcome(capsys, "evolve", "--resume", "--run-dir", fresh, "--inner-lr", "0.7")
    assert code == 2
    assert "inner_lr cannot change on resume: it is" in err.replace("\n", " ")
    code, _, err = outcome(capsys, "evolve", "rollback", fresh, "iteration_000007_000001")
    assert code == 2
    assert "keeps no checkpoint 'iteration_000007_000001'" in err


def test_a_run_of_an_older_version_is_one_sentence(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {**read_state(fresh), "format": 1}
    (fresh / "rsi" / "state.json").write_text(json.dumps(state))
    code, _, err = outcome(capsys, "evolve", "--resume", "--run-dir", fresh)
    assert code == 2
    assert "is of format 1, but this version of ssm-metarl reads" in err.replace("\n", " ")


def shown(what: Any, width: int = 80) -> list[str]:
    """Lines of a terminal of so many columns."""
    text = io.StringIO()
    Console(file=text, width=width).print(what)
    return text.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 60])
def test_the_view_fits_a_terminal(fresh: Path, width: int) -> None:
    state = read_state(fresh)
    base = state["base"] | {"state_dim": 256, "hidden_dim": 256, "outer_lr": 0.00012345, "discount": 0.98765}
    state["base"], state["incumbent"]["config"] = base, {**base, "outer_lr": 0.012345, "inner_lr": 1.23456}
    metrics = dict.fromkeys(METRICS, 0.123)
    record = {"name": "a", "metrics": metrics, "intervals": {name: [0.101, 0.234] for name in METRICS}, "level": 0.1}
    state["archive"], state["progress"]["best"] = {"a": record}, "a"
    state["live"] |= {"returns": [-123.4, -56.7], "iteration": 12345, "spent": 1_234_567, "pace": 61.0, "left": 1}
    state["progress"] |= {"phase": "stretch", "left": 4, "length": 4}
    lines = shown(
        population_view(state, [event("stretch", "continued", metrics=metrics, intervals={}, curve=[])] * 9), width
    )
    assert not any("…" in line for line in lines)
    assert len(lines) <= 24
    text = "\n".join(lines)
    assert "incumbent at iteration 12345, return -123 → -56.7" in text
    assert text.count("0.10–0.23") == len(METRICS)
    assert "outer_lr 0.000123 → 0.0123" in text
    assert "stretch: 3 of 4 iterations" in text
    assert "ETA 0:01:01" in text
    assert "spent 1.23 M environment steps" in text
    assert text.count("level 0.123 after a stretch, composite 0.123") == 5
    state["live"]["race"] = contenders()
    text = "\n".join(shown(population_view(state, []), width))
    assert "stretch: " not in text
    assert "race 1: 2 of 3 contenders left" in text
    state["live"] |= {"race": [], "left": 0}
    assert "assessment" in "\n".join(shown(population_view(state, []), width))


@pytest.mark.parametrize("width", [80, 60])
def test_a_race_says_who_left_and_why(fresh: Path, width: int) -> None:
    state = read_state(fresh)
    state["live"]["race"] = contenders()
    lines = shown(race_table(state), width)
    assert not any("…" in line for line in lines)
    assert any("Race 1 of 6" in line for line in lines)
    (won,) = (line for line in lines if "outer_lr 0.001 → 0.01" in line)
    assert "+2.3" in won
    assert "left" not in won
    (lost,) = (line for line in lines if "outer_lr 0.001 → 0.0001" in line)
    assert "-1.2" in lost
    assert lines[lines.index(lost) + 1].strip() == "left: 1.2 standard errors behind"


def test_a_race_that_did_not_take_place_is_not_told(fresh: Path) -> None:
    """Where none is possible, the incumbent trains alone in its stead."""
    state = read_state(fresh)
    state["progress"] |= {"phase": "race", "left": 3, "length": 3}
    state["live"] |= {"left": 1}
    assert phase_words(state) == "stretch: 2 of 3 iterations"


def test_a_budget_without_room_for_a_race_is_told() -> None:
    config = TrainConfig.for_task("navigation-2d", meta_batch=10, episodes=5)  # up to 10,000 steps an iteration
    said = room_words(EvolveConfig(budget=1e5), config)
    assert "at up to 10,000 environment steps an iteration the first takes 150,000." in said
    for rules in ({"budget": 1.5e5}, {"budget": 0.0}, {"budget": 1e5, "mutate": False}):
        assert room_words(EvolveConfig(**rules), config) == ""
    assert room_words(EvolveConfig(budget=1e9, losers_share=0.0), config).startswith("There will be no race")


def test_an_unassessed_incumbent_has_dashes(fresh: Path) -> None:
    assert sum(line.count("–") for line in shown(incumbent_table(read_state(fresh)))) == len(METRICS) + 1


def test_what_happens_is_said_without_a_terminal(fresh: Path) -> None:
    text = io.StringIO()
    metrics = dict.fromkeys(METRICS, 0.5)
    events = [
        race(1, won=True),
        race(2, won=False),
        event("race", "failed", member=2, reason="a node was lost"),
        event("stretch", "rolled back", checkpoint="iteration_1", metrics=metrics, intervals={}, reason="asked for"),
        event("hand-over", "handed over", checkpoint="x", metrics=metrics, intervals={}, weights="mean"),
    ]
    with PopulationView(fresh, Console(file=text, width=200)):
        RunStore(fresh).commit({**read_state(fresh), "events_before": 0}, events)
    said = [line for line in text.getvalue().splitlines() if line.startswith("iteration ")]
    assert said == [
        "iteration 4: race 1 accepted outer_lr 0.001 → 0.01 (z +2.3)",
        "iteration 8: race 1 rejected outer_lr 0.001 → 0.01 or 0.0001",
        "iteration 3: failure of member 2 in the race: a node was lost",
        "iteration 3: rolled back to iteration_1: asked for",
        "iteration 3: handed over, the running mean of weights, composite 0.500",
    ]
    assert decisions_table(events).row_count == 5


def test_pictures_of_a_run(fresh: Path, figures: dict[str, Figure]) -> None:
    with pytest.raises(ValueError, match="no race"):
        plot_evolution(fresh, "a task")
    metrics = dict.fromkeys(METRICS, 0.5)
    known = {"metrics": metrics, "intervals": {name: [0.4, 0.6] for name in METRICS}, "checkpoint": "a"}
    single = {"metrics": metrics, "intervals": dict.fromkeys(METRICS), "checkpoint": "b"}  # of a single task
    events = [race(1, won=True), race(2, won=False)]
    RunStore(fresh).commit({**read_state(fresh), "events_before": 0}, events)
    assert [path.name for path in plot_evolution(fresh, "a task")] == ["lineage.png"]
    more = [
        event("stretch", "continued", iteration=20, curve=[0.5] * 9, **known),
        event("stretch", "rolled back", iteration=7, reason="worse", **known),
        event("stretch", "continued", iteration=12, curve=[0.6] * 4, **single),
    ]
    RunStore(fresh).commit({**read_state(fresh), "events_before": 2}, more)
    files = plot_evolution(fresh, "a task")
    assert [path.name for path in files] == ["lineage.png", "evolution.png"]
    assert all(path.read_bytes()[:6] == PNG for path in files)
    (axes,) = figures["lineage.png"].axes
    drawn = [line for line in axes.get_lines() if len(line.get_xdata())]
    won = [line for line in drawn if line.get_color() == plots._LEGEND["challenger that won"]["color"]]
    lost = [line for line in drawn if line.get_color() == plots._LEGEND["contender that lost"]["color"]]
    assert (len(won), len(lost)) == (2, 2 + 3), "a branch and its mark; every other contender's branch"
    assert [text.get_text() for text in axes.texts] == ["1", ""], "the change accepted, and the arrow back"
    before, given_up, after = (line for line in drawn if line.get_color() == plots._LEGEND["incumbent"]["color"])
    assert before.get_xdata()[-1] == given_up.get_xdata()[0] == after.get_xdata()[0] == 0.07
    (legend,) = figures["lineage.png"].legends
    assert [text.get_text() for text in legend.get_texts()] == ["1  outer_lr 0.001 → 0.01"]
