"""`adapt` and `evaluate --modes`: what they print, write and refuse."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageSequence
from scipy import stats

from ssm_metarl import AdaptOptions, EvaluationConfig, TrainConfig, adapt_checkpoint, compare_modes, load_policy, train
from ssm_metarl.cli.main import main
from ssm_metarl.storage.checkpoint import load_checkpoint
from ssm_metarl.storage.contents import CheckpointError
from ssm_metarl.tasks import make
from ssm_metarl.tasks.cartpole import CartPole

ROOT = Path(__file__).resolve().parents[2]
NAMES, BOUNDS = ("mean", "iqm", "gain"), ("ci_low", "ci_high")
SMALL = {"iterations": 2, "meta_batch": 6, "episodes": 4, "hidden_dim": 8, "state_dim": 4, "learner_threads": 1}


@pytest.fixture(scope="module", params=["cartpole", "navigation-2d"])
def trained(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a replay."""
    run = tmp_path_factory.mktemp("adapt") / request.param
    train(TrainConfig.for_task(request.param, **{**SMALL, "replay_episodes": 9}), run)
    return run


@pytest.fixture(scope="module")
def cartpole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without a replay."""
    run = tmp_path_factory.mktemp("adapt") / "plain"
    train(TrainConfig.for_task("cartpole", **SMALL), run)
    return run


def printed(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def run(*words: object) -> int:
    return main([str(word) for word in words])


def frames(path: Path) -> np.ndarray:
    """Brightness of an animation's frames, from 0 to 1."""
    with Image.open(path) as film:
        return np.stack([np.asarray(frame.convert("L"), float) / 255 for frame in ImageSequence.Iterator(film)])


@pytest.mark.slow
def test_the_command_of_the_readme_makes_its_animation(tmp_path: Path) -> None:
    found = re.search(r"`python run_local\.py (adapt .*?)`", (ROOT / "README.md").read_text())
    assert found is not None
    assert run(*shlex.split(found[1]), "--out", tmp_path) == 0
    made, shown = frames(tmp_path / "before_after.gif"), frames(ROOT / "docs" / "assets" / "adaptation.gif")
    assert made.shape == shown.shape
    assert np.abs(made - shown).mean() < 0.002, "as far as the last digits of arithmetic let it"


@pytest.mark.parametrize("mode", ["none", "standard", "replay", "hybrid"])
def test_adapt_writes_report_pictures_and_policy(
    mode: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = {"cartpole": {"direction": -1, "gravity": 6.5}, "navigation-2d": {"goal": [0.3, -0.2]}}[trained.name]
    out = tmp_path / "out"
    words = ("--mode", mode, "--steps", 2, "--episodes", 3, "--test-episodes", 4, "--out", out, "--json")
    assert run("adapt", trained, "--params", json.dumps(params), *words) == 0
    report = printed(capsys)
    assert {name: report["parameters"][name] for name in params} == params
    assert len(report["curve"]) == (1 if mode == "none" else 3)
    assert report["mode"] == mode
    assert report["best_step"] == int(np.argmax(report["curve"]))
    written = json.loads((out / "adaptation.json").read_text())
    assert written == {name: value for name, value in report.items() if name != "pictures"}
    for bound in ("before", "after"):
        assert report[bound]["ci_low"] <= report[bound]["return"] <= report[bound]["ci_high"]
    effective = report["effective_replay_episodes"]
    assert all(0 < count <= 9 for count in effective) if mode in ("replay", "hybrid") else not any(effective)
    names = [
        "adaptation_curve.png",
        {"cartpole": "before_after.gif", "navigation-2d": "trajectories.png"}[trained.name],
    ]
    assert report["pictures"] == [str(out / name) for name in names]
    for name in names:
        with Image.open(out / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 1
            frames = getattr(picture, "n_frames", 1)
            assert (frames > 1) == name.endswith(".gif")
    policy, checkpoint = load_policy(report["checkpoint"])
    assert checkpoint.progress["adapted_to"] == report["parameters"]
    same = adapt_checkpoint(trained, params, mode=mode, options=AdaptOptions(test_episodes=4), steps=2, episodes=3)
    for name, value in same.policy.numpy_weights().items():
        np.testing.assert_array_equal(policy.numpy_weights()[name], value)
    assert same.summary()["after"] == report["after"]


def refuse_constant(word: str) -> None:
    raise AssertionError(f"{word} is no JSON")


def test_one_fresh_episode_gives_no_interval(
    cartpole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ("--steps", 1, "--episodes", 2, "--test-episodes", 1, "--out", out, "--json")
    assert run("adapt", cartpole, *words) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out, parse_constant=refuse_constant)
    for moment in ("before", "after"):
        assert report[moment]["return"] > 0
        assert report[moment]["ci_low"] is report[moment]["ci_high"] is None
    assert json.loads((out / "adaptation.json").read_text(), parse_constant=refuse_constant)["after"] == report["after"]
    assert "–" in printed.err
    assert (out / "adaptation_curve.png").exists()


@pytest.mark.parametrize("words", [(), ("--modes", "none", "standard")])
def test_one_task_gives_no_interval(words: tuple[str, ...], cartpole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("evaluate", cartpole, *words, "--num-tasks", 1, "--steps", 1, "--episodes", 2, "--json") == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out, parse_constant=refuse_constant)
    if words:
        bounds = [row[name][bound] for row in report["modes"].values() for name in NAMES for bound in BOUNDS]
        values = [row[name]["value"] for row in report["modes"].values() for name in NAMES]
        assert len(bounds) == 12
        assert [line.split() for line in printed.err.splitlines()].count(["–"] * 3) == 2
    else:
        bounds, values = [*report["ci_low"], *report["ci_high"]], report["return"]
        assert len(bounds) == 4
        assert printed.err.count("–") == 2
    assert set(bounds) == {None}
    assert np.isfinite(values).all()
    assert "nan" not in printed.err


def test_one_episode_a_task_gives_no_interval_but_of_the_gain(cartpole: Path) -> None:
    """The gain's is Student's over tasks, which holds the episodes' chance however few they are."""
    options = AdaptOptions(test_episodes=1)
    found = compare_modes(cartpole, ("none", "standard"), options=options, steps=1, episodes=2, num_tasks=4)
    gains = found.returns["standard"][:, 0] + [0.0, 1.0, 2.0, 3.0] - found.returns["none"][:, 0]
    returns = {"none": found.returns["none"], "standard": (found.returns["none"][:, 0] + gains)[:, None]}
    summary = json.loads(json.dumps(replace(found, returns=returns).summary(), allow_nan=False))
    row = summary["modes"]["standard"]
    for name in ("mean", "iqm"):
        assert row[name]["ci_low"] is row[name]["ci_high"] is None
    expected = stats.t.interval(0.95, 3, gains.mean(), stats.sem(gains))
    assert (row["gain"]["ci_low"], row["gain"]["ci_high"]) == pytest.approx(expected)


def test_what_is_not_given_is_drawn_and_the_seed_decides(cartpole: Path) -> None:
    small: dict[str, Any] = {"options": AdaptOptions(test_episodes=2), "steps": 1, "episodes": 2}
    one, same, other = (
        adapt_checkpoint(cartpole, {"direction": 1}, seed=seed, **small).parameters for seed in (1, 1, 2)
    )
    assert one == same
    assert one["gravity"] != other["gravity"]
    assert one["direction"] == other["direction"] == 1


def test_before_and_after_have_common_random_numbers(cartpole: Path) -> None:
    """Without adaptation they are the same episodes."""
    report = adapt_checkpoint(cartpole, mode="none", options=AdaptOptions(test_episodes=3))
    np.testing.assert_array_equal(report.before.rewards, report.after.rewards)
    np.testing.assert_array_equal(report.before.observations, report.after.observations)


def test_the_modes_side_by_side(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    modes = ("none", "standard", "replay", "hybrid")
    words = ("--num-tasks", 5, "--steps", 2, "--episodes", 2, "--json", "--split", "shifted-test")
    assert run("evaluate", trained, "--modes", *modes, *words) == 0
    out = capsys.readouterr()
    report = json.loads(out.out)
    assert tuple(report["modes"]) == modes
    assert (report["num_tasks"], report["split"], report["compared_with"]) == (5, "shifted-test", "none")
    for mode, row in report["modes"].items():
        assert mode in out.err
        for name in ("mean", "iqm", "gain"):
            assert row[name]["ci_low"] <= row[name]["value"] <= row[name]["ci_high"]
        assert len(row["curve"]) == (1 if mode == "none" else 3)
        assert 0 <= row["probability_of_improvement"] <= 1
        assert row["curve"][0] == pytest.approx(report["modes"]["none"]["curve"][0])
    none = report["modes"]["none"]
    assert none["gain"]["value"] == 0
    assert none["probability_of_improvement"] == 0.5
    assert none["unchanged_tasks"] == 1


def test_the_comparison_is_of_each_task_with_itself(cartpole: Path) -> None:
    small: dict[str, Any] = {"options": AdaptOptions(test_episodes=3), "steps": 1, "episodes": 2, "num_tasks": 4}
    found = compare_modes(cartpole, ("standard", "none"), **small)
    row = found.summary()["modes"]["none"]
    difference = found.returns["none"].mean(1) - found.returns["standard"].mean(1)
    assert row["gain"]["value"] == pytest.approx(difference.mean())
    again = compare_modes(cartpole, ("none", "standard"), **small)
    for mode in ("none", "standard"):
        np.testing.assert_array_equal(found.returns[mode], again.returns[mode])


def test_an_environment_that_the_user_hands_in(cartpole: Path) -> None:
    """The policy of one family on another one with its spaces, given as an object."""
    family = make("cartpole")
    config = EvaluationConfig(split="shifted", steps=1, episodes=2)
    options = AdaptOptions(test_episodes=2)
    report = adapt_checkpoint(cartpole, config=config, options=options, distribution=family)
    assert report.parameters["gravity"] >= 15
    assert report.task == "cartpole"


def test_a_gymnasium_environment_by_its_name(cartpole: Path, tmp_path: Path) -> None:
    words = ("--task", "gym:CartPole-v1", "--task-ranges", '{"length": [0.3, 1.2]}', "--params", '{"length": 1.1}')
    out = tmp_path / "gym"
    assert run("adapt", cartpole, *words, "--steps", 1, "--episodes", 2, "--test-episodes", 2, "--out", out) == 0
    assert json.loads((out / "adaptation.json").read_text())["parameters"] == {"length": 1.1}
    assert (out / "adaptation_curve.png").exists()


def test_parameters_of_tasks_that_have_none_are_refused(cartpole: Path) -> None:
    """A family's tasks may be any JSON values."""

    class Numbered(CartPole):
        name = "numbered"

        def sample(self, n: int, rng: Any, split: str = "train") -> Any:
            return list(range(n))

    with pytest.raises(ValueError, match="A task of numbered is 0 and has no parameters"):
        adapt_checkpoint(cartpole, {"direction": 1}, distribution=Numbered())


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_over_workers_the_result_is_the_same(cartpole: Path) -> None:
    options, config = AdaptOptions(test_episodes=2, kl_bound=0.01), EvaluationConfig(steps=2, episodes=2, num_tasks=4)
    one, two = (
        compare_modes(cartpole, ("none", "standard"), options=options, config=config, num_workers=workers)
        for workers in (0, 2)
    )
    for mode, found in one.adaptations.items():
        np.testing.assert_array_equal(found.returns, two.adaptations[mode].returns)
        np.testing.assert_array_equal(one.returns[mode], two.returns[mode])
        for name, value in found.weights.items():
            np.testing.assert_array_equal(two.adaptations[mode].weights[name], value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--mode", "hybrid"), "Hybrid adaptation needs a replay"),
        (("--params", '{"speed": 3}'), "has the parameters"),
        (("--params", '{"gravity": "strong"}'), "gravity"),
        (("--steps", "-1"), "steps must be"),
        (("--episodes", "0"), "episodes must be"),
        (("--test-episodes", "0"), "test_episodes must be"),
        (("--kl-bound", "nan"), "kl_bound must be"),
        (("--split", "tests"), "tests"),
        (("--task", "navigation-2d"), "its observations are of the size 4, not of the shape (2,)"),
    ],
)
def test_bad_input_is_one_sentence(
    words: tuple[str, ...], message: str, cartpole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("adapt", cartpole, *words, "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_parameters_that_are_no_json_are_named(cartpole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("adapt", cartpole, "--params", "gravity") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: 'gravity' is not a JSON object")


def test_a_full_folder_is_left_alone(cartpole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes").write_text("mine")
    assert run("adapt", cartpole, "--out", tmp_path) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--modes", "none", "hybrid"), "Hybrid adaptation needs a replay"),
        (("--modes", "none", "none"), "different ones"),
        (("--modes", "none", "--deterministic"), "leave deterministic out"),
    ],
)
def test_modes_that_cannot_be_compared(
    words: tuple[str, ...], message: str, cartpole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("evaluate", cartpole, *words, "--num-tasks", "2") == 2
    assert message in capsys.readouterr().err


class TestCheckpointedReplay:
    def test_a_resumed_run_has_the_replay_of_one_that_was_not_interrupted(self, tmp_path: Path) -> None:
        options = {**SMALL, "replay_episodes": 7, "iterations": 3, "lr_schedule": "constant"}
        whole = train(TrainConfig.for_task("cartpole", **options), tmp_path / "whole").checkpoint
        train(TrainConfig.for_task("cartpole", **{**options, "iterations": 2}), tmp_path / "parts")
        parts = train(TrainConfig.for_task("cartpole", **options), tmp_path / "parts", resume=True).checkpoint
        one, other = load_checkpoint(whole).replay, load_checkpoint(parts).replay
        assert one is not None
        assert other is not None
        assert len(one) == 7
        for name, array in one.arrays().items():
            np.testing.assert_array_equal(other.arrays()[name], array)

    def test_a_truncated_or_foreign_replay_is_refused(self, trained: Path, tmp_path: Path) -> None:
        checkpoint = load_checkpoint(sorted(trained.glob("checkpoint_*"))[-1])
        assert checkpoint.replay is not None
        folder = tmp_path / "copy"
        source = sorted(trained.glob("checkpoint_*"))[-1]
        for change in (lambda content: content[:-9], lambda content: content[:-1] + b"x"):
            folder.mkdir()
            for file in source.iterdir():
                content = file.read_bytes()
                (folder / file.name).write_bytes(change(content) if file.name == "replay.safetensors" else content)
            with pytest.raises(CheckpointError, match=r"replay.safetensors is truncated or altered"):
                load_checkpoint(folder)
            (folder / "replay.safetensors").unlink()
            with pytest.raises(CheckpointError, match=r"replay.safetensors is missing"):
                load_checkpoint(folder)
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
