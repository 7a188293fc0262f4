"""What a browser gives back is taken only where it fits; a command shown does what a click does; runs compared."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest
from PIL import Image

from evolved import event, race
from ssm_metarl import TrainConfig, pretrained, train
from ssm_metarl.app import adaptation_tab, comparison_tab, evolution_tab, forms, overlay, pretrained_tab, training_tab
from ssm_metarl.app.workspace import Workspace
from ssm_metarl.cli.options import Adapt, Evaluate, JobStart, Rollback
from ssm_metarl.cli.parsing import parse
from ssm_metarl.evaluation.config import EvaluationConfig

ROOT = Path(__file__).resolve().parents[2]
SMALL: dict[str, Any] = {"meta_batch": 2, "episodes": 2, "hidden_dim": 8, "state_dim": 4, "learner_threads": 1}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Two seeds of one run, and one without inner steps; no cluster."""
    runs = tmp_path_factory.mktemp("forms") / "runs"
    for name, more in (("one", {}), ("two", {"seed": 1}), ("alone", {"algorithm": "rl2", "inner_steps": 0})):
        train(TrainConfig.for_task("navigation-2d", iterations=2, replay_episodes=2, **SMALL, **more), runs / name)
    return Workspace(runs)


# --- What a browser kept ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("box", "good", "bad"),
    [
        (gr.Slider(1, 5, 2), [1, 4.5], [0, 6, "3", True, None, float("nan"), 10**400]),
        (gr.Number(0, minimum=0), [0, 1e9], [-1, "", float("inf")]),
        (gr.Checkbox(), [True, False], [1, "x"]),
        (gr.Dropdown(["a", "b"]), ["b"], ["c", ["a"], None]),
        (gr.Radio([("right", 1), ("left", -1)]), [1, -1], [2, "x"]),
        (gr.Dropdown([], allow_custom_value=True), ["runs/mine"], ["", "\0", "x" * 5000, 3]),
        (gr.Dropdown(["a", "b"], multiselect=True), [["a"], []], [["c"], "a", [1]]),
        (gr.Dropdown([], multiselect=True, allow_custom_value=True), [["any"]], [[1], ["\n"], {}]),
        (gr.Textbox(), ["{}"], [3, "x" * 5000]),
    ],
)
def test_a_box_is_given_back_only_what_it_can_hold(box: Any, good: list[Any], bad: list[Any]) -> None:
    assert [forms.box_value(box, value) for value in good] == good
    assert [forms.box_value(box, value) for value in bad] == [gr.skip()] * len(bad)


# --- Commands ---------------------------------------------------------------------------------------------


def test_a_command_that_is_shown_does_what_the_click_does(workspace: Workspace) -> None:
    [words] = pretrained_tab.Handlers(workspace).command("one", "shifted", 12, 2)
    found = parse(words).options()
    assert isinstance(found, Evaluate)
    assert found.checkpoint == workspace.folder("one")
    same = dataclasses.replace(found.config, num_workers=0)
    assert same == EvaluationConfig(split="shifted", num_tasks=12, steps=2)
    [words] = pretrained_tab.Handlers(workspace).command("alone", "test", 12, 2)
    assert words[-2:] == ["--steps", "0"]

    boxes = [9.0, 1.0, 0.1, 0.5, 10.0, -1, 0.3, -0.4, "{}"]
    do = adaptation_tab.Handlers(workspace)
    [words] = do.adapt_command("one", "hybrid", 4, 6, 3.0, True, *boxes)
    adapted = parse(words).options()
    assert isinstance(adapted, Adapt)
    assert (adapted.mode, adapted.params) == ("hybrid", {"goal": [0.3, -0.4]})
    assert (adapted.config.steps, adapted.config.episodes, adapted.config.seed) == (4, 6, 3)
    [words] = do.compare_command("one", "test", 7, 2, 5)
    compared = parse(words).options()
    assert isinstance(compared, Evaluate)
    assert (compared.modes, compared.config.num_tasks) == (adaptation_tab.MODES, 7)


def test_a_job_that_is_shown_is_the_one_that_starts(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workspace, "jobs", lambda self: [])
    own = TrainConfig.for_task("navigation-2d").to_dict()
    values = [own[name] for name in training_tab.OPTIONS]
    [words] = training_tab.Handlers(workspace).start_command("navigation-2d", "promp", *values)
    split = words.index("--")
    job = parse(["job start", *words[2:split]]).options()
    assert isinstance(job, JobStart)
    assert job.storage == str(workspace.runs.resolve())
    assert words[split + 1 :] == training_tab.started("navigation-2d", "promp", values)
    [words] = training_tab.Handlers(workspace).run_command("one", 3)
    assert words[words.index("--") + 1 :] == training_tab.Handlers(workspace).resumed("one", 3)
    running = {"job": "job-7", "status": "RUNNING", "run_dir": str(workspace.folder("one")), "command": "train"}
    monkeypatch.setattr(Workspace, "jobs", lambda self: [running])
    assert training_tab.Handlers(workspace).run_command("one", 3) == [["job", "stop", "job-7"]]
    [words] = evolution_tab.Handlers(workspace).start_command("one", "bandit", ["outer_lr"], 2, 1, 0, 5)
    assert words[words.index("--") + 1 :][:3] == ["evolve", "--from", str(workspace.folder("one"))]
    [words] = evolution_tab.Handlers(workspace).back_command("one", "iteration_2")
    assert isinstance(parse(["evolve rollback", *words[2:]]).options(), Rollback)


def test_a_command_can_be_pasted_and_what_no_command_takes_is_said(workspace: Workspace) -> None:
    do = adaptation_tab.Handlers(workspace)
    with gr.Blocks() as page:
        boxes = [gr.Textbox(), gr.Radio(adaptation_tab.MODES), gr.Slider(), gr.Slider(), gr.Number(), gr.Checkbox()]
        forms.command_line(do.adapt_command, boxes)
    [made] = page.fns.values()
    task = [9.0, 1.0, 0.1, 0.5, 10.0, -1, 0.3, -0.4, "{}"]
    text = made.fn("one", "standard", 3, 5, 0, False, *task)
    assert text.startswith("ssm-metarl adapt ")
    assert parse(shlex.split(text)[1:]).options()
    assert made.fn("one", "standard", 3, 5, None, False, *task) == "Seed: a number is missing."
    assert "is not in the runs folder" in made.fn("/etc", "standard", 3, 5, 0, False, *task)


# --- What is seen -----------------------------------------------------------------------------------------


def test_the_animation_that_is_seen_first_plays_and_is_that_of_the_documentation() -> None:
    assert pretrained_tab.ANIMATION.read_bytes() == (ROOT / "docs" / "assets" / "adaptation.gif").read_bytes(), (
        "copy docs/assets/adaptation.gif to app/"
    )
    with Image.open(pretrained_tab.ANIMATION) as film:
        assert film.n_frames > 10  # type: ignore[attr-defined]
    assert pretrained_tab.SHOWN_FIRST in pretrained.names()
    shown = pretrained_tab.animation_html()
    assert "data:image/gif" in shown
    assert "prefers-reduced-motion" in shown
    assert shown.startswith("<details open>")


def test_a_card_has_the_evaluation_of_its_own_checkpoint_alone(workspace: Workspace) -> None:
    """A run writes one at its end, of its last checkpoint; its card is of the best one."""
    run = workspace.folder("one")
    values = {"return": [-9.5], "ci_low": [None], "ci_high": [None], "episode_length": [10.0]}
    evaluation = {"task": "navigation-2d", "split": "test", "num_tasks": 4, "checkpoint": "checkpoint_000002", **values}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    best = {"checkpoint": "checkpoint_000002", "return": -1.0}
    (run / "best.json").write_text(json.dumps(best))
    assert "-9.50" in pretrained_tab.describe(workspace, "one")
    os.utime(run / "evaluation.json", (1, 1))  # a run that was resumed and stopped since
    assert pretrained_tab.OTHER_EVALUATION in pretrained_tab.describe(workspace, "one")
    os.utime(run / "evaluation.json")
    (run / "best.json").write_text(json.dumps(best | {"checkpoint": "checkpoint_000000"}))
    shown = pretrained_tab.describe(workspace, "one")
    assert "-9.50" not in shown
    assert pretrained_tab.OTHER_EVALUATION in shown
    (run / "evaluation.json").unlink()


def test_a_curve_has_every_stage_for_the_plot_and_names_its_own() -> None:
    seconds = {"total": 1.0}
    lines = [{"iteration": 1, "env_steps": 100, "return_by_step": [1.0, 2.0], "seconds": seconds}]
    for given, own in ((lines, ["before adaptation", "after 1 inner step"]), ([], [])):
        returns = training_tab.curves(given)[0]
        whole = training_tab.with_all_stages(returns)
        assert set(whole["stage"]) == {training_tab.stage_name(step) for step in range(training_tab.STAGES)}
        assert list(whole.dropna()["stage"]) == own
        assert all("iteration" not in frame.columns for frame in training_tab.curves(given))
    assert training_tab.legend(["a"], ["a"]) == (gr.skip(), gr.skip())


def test_a_picture_of_one_point_is_not_drawn() -> None:
    stretch = event("stretch", "continued", metrics={"average_return": 0.5}, curve=[0.5])
    assert evolution_tab.points_drawn([stretch]) == {"lineage.png": 1, "evolution.png": 1}
    assert evolution_tab.points_drawn([stretch, race(1, True), stretch]) == {"lineage.png": 11, "evolution.png": 2}


# --- Runs side by side ------------------------------------------------------------------------------------


def test_runs_that_differ_in_their_seed_alone_are_a_group(workspace: Workspace) -> None:
    do = comparison_tab.Handlers(workspace)
    groups = overlay.grouped(do.curves(["one", "alone", "two"]))
    assert [[run.name for run in group.runs] for group in groups] == [["one", "two"], ["alone"]]
    assert [group.label for group in groups] == ["algorithm promp (2 seeds)", "algorithm rl2 (1 seed)"]
    steps, mean, low, high = groups[0].mean()
    last = [run.after[-1] for run in groups[0].runs]
    if groups[0].runs[0].steps[-1] == groups[0].runs[1].steps[-1] == steps[-1]:
        assert mean[-1] == pytest.approx(np.mean(last))
    assert (low <= mean).all()
    assert (mean <= high).all()


def test_runs_are_measured_on_held_out_tasks(workspace: Workspace) -> None:
    do = comparison_tab.Handlers(workspace)
    shown, table, button = do.show(["one", "two"], "test", 5)
    assert "<img" in shown
    assert "held-out" not in table
    assert button["interactive"]
    do.measure(["one", "two"], "test", 5)
    assert "held-out mean" in do.show(["one", "two"], "test", 5)[1]
    assert "held-out" not in do.show(["one", "two"], "test", 6)[1]
    assert "held-out" not in do.show(["one", "two"], "train", 5)[1]
    (curve,) = do.curves(["one"])
    found = do.with_held_out(curve, "test", 5).held_out
    assert found is not None
    assert list(found.steps) == sorted(found.steps)
    assert len(found.mean) == len(do.command(["one"], "test", 5)) == 2
    assert (found.low < found.mean).all()
    assert do.show([], "test", 5)[0] == comparison_tab.NO_RUNS
    refused, _, button = do.show(["nothing"], "test", 5)
    assert "is not the folder of a run" in refused
    assert not button["interactive"]
    shutil.rmtree(workspace.folder("alone") / "checkpoint_000000")
    shutil.rmtree(workspace.folder("alone") / "checkpoint_000002")
    assert "alone has no checkpoint yet." in do.show(["alone"], "test", 5)[0]
