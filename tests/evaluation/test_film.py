"""Videos of a policy in an environment that renders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssm_metarl import TrainConfig, adapt_checkpoint, train
from ssm_metarl.cli.main import main
from ssm_metarl.evaluation import film as film_module
from ssm_metarl.evaluation.film import Film, film_report

MODULE = '''
import gymnasium, numpy as np
from gymnasium.spaces import Box

class Dot(gymnasium.Env):
    """A point that is drawn where it is; a task is where it should be."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    horizon = 12
    observation_space = Box(-9, 9, (1,), np.float32)
    action_space = Box(-1, 1, (1,), np.float32)

    def __init__(self, render_mode=None, grey=False, breaks=False):
        self.render_mode, self.grey, self.breaks = render_mode, grey, breaks

    def sample_tasks(self, n, rng):
        return [{"goal": goal} for goal in rng.uniform(-2, 2, n).tolist()]

    def set_task(self, task):
        self.goal = task["goal"]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = np.zeros(1, np.float32)
        return self.place, {}

    def step(self, action):
        self.place = np.clip(self.place + 0.2 * action, -3, 3).astype(np.float32)
        return self.place, -abs(float(self.place[0]) - self.goal), False, False, {}

    def render(self):
        if self.breaks:
            raise RuntimeError("no brush")
        frame = np.full((40, 660, 3), 255, np.uint8)
        at = int(330 + 100 * self.place[0])
        frame[10:30, max(at - 5, 0) : at + 5] = 0
        return frame[..., 0] if self.grey else frame


def blind():
    return Dot()
'''


@pytest.fixture(scope="module")
def dots(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run on the environment, whose module is in the run's parent and importable."""
    folder = tmp_path_factory.mktemp("film")
    (folder / "film_dots.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        small = {"iterations": 1, "meta_batch": 2, "episodes": 2, "hidden_dim": 8, "state_dim": 4, "num_workers": 0}
        train(TrainConfig.for_task("film_dots:Dot", **small), folder / "run")
        yield folder / "run"


@pytest.mark.parametrize("command", ["adapt", "evaluate"])
def test_a_video_shows_before_and_after(dots: Path, tmp_path: Path, command: str) -> None:
    out = ["--out", str(tmp_path / "out")] if command == "adapt" else ["--num-tasks", "2"]
    words = [command, str(dots), "--task", "film_dots:Dot", *out, "--video", str(tmp_path / "new" / "video.gif")]
    assert main(words) == 0
    with Image.open(tmp_path / "new" / "video.gif") as video:
        assert video.n_frames == 13  # type: ignore[attr-defined]
        assert video.info["duration"] == 100
        assert video.size == (2 * 320, 24 + round(40 * 320 / 660))
        video.seek(0)
        first = np.asarray(video.convert("L"))[24:]
        for panel in (first[:, :320], first[:, 320:]):
            dark = np.argwhere(panel < 100)
            assert abs(dark[:, 1].mean() - 160) < 2, "the point starts in the middle"


def test_a_film_is_of_the_task_and_counts_its_return(dots: Path) -> None:
    report = adapt_checkpoint(dots, {"goal": 1.5}, trust_checkpoint_code=True)
    films = film_report(report, seed=3)
    assert list(films) == ["before", "after"]
    for found in films.values():
        assert len(found.frames) == len(found.returns) == 13
        assert found.returns[:2] == pytest.approx([0.0, -1.5], abs=0.21)
        assert np.all(np.diff(found.returns) < 0)
        assert found.seconds == pytest.approx(0.1)
    again = film_report(report, seed=3)["after"]
    np.testing.assert_array_equal(np.stack(again.frames), np.stack(films["after"].frames))


def test_long_episodes_are_rendered_in_part(dots: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(film_module, "MOST", 4)
    found = film_report(adapt_checkpoint(dots, trust_checkpoint_code=True))["before"]
    assert isinstance(found, Film)
    assert len(found.frames) == 5  # every third, and the last
    assert found.seconds == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["pretrained:cartpole", "--video", "a.gif"], "cartpole has no environment that renders"),
        (["pretrained:cartpole", "--video", "a.mp4"], "--video writes an animated GIF: name it .gif, not 'a.mp4'."),
        (
            ["--task-options", '{"grey": true}', "--video", "a.gif"],
            "cannot be filmed: it renders uint8 [40, 660], not [height, width, 3]",
        ),
        (["--task-options", '{"breaks": true}', "--video", "a.gif"], "cannot be filmed: RuntimeError: no brush"),
        (["--task", "film_dots:blind", "--video", "a.gif"], "cannot render pictures (render_mode='rgb_array')"),
    ],
)
def test_what_cannot_be_shown_is_said(
    dots: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    named = words if words[0].startswith("pretrained") else [str(dots), "--task", "film_dots:Dot", *words]
    for command in (["adapt", *named, "--out", "out"], ["evaluate", *named, "--num-tasks", "2"]):
        assert main(command) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert sentence in said
        assert "tasks of split" not in said, "refused before anything is evaluated"
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*.gif"))
