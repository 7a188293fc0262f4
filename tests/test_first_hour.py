"""The script of a first hour runs, and leaves what its page says."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ssm_metarl import evaluate_checkpoint, load_policy

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "first_hour.sh"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # the script is to take less


@pytest.fixture(scope="module")
def hour(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The script's folder and what it printed. Its pipe ends only when the page has ended, too."""
    folder = tmp_path_factory.mktemp("work") / "hour"
    commands = Path(sys.executable).parent
    process = subprocess.Popen(
        ["bash", str(SCRIPT), str(folder)],
        cwd=folder.parent,
        env=os.environ | {"PATH": f"{commands}{os.pathsep}{os.environ['PATH']}"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate()
    finally:
        if process.poll() is None:  # the test was ended: its commands end with it
            os.killpg(process.pid, signal.SIGTERM)
    assert process.returncode == 0, printed
    return folder, printed


def returns(run: Path) -> list[float]:
    """Returns on held-out tasks after 0, 1, … inner steps, as a run leaves them."""
    found: list[float] = json.loads((run / "evaluation.json").read_text())["return"]
    return found


def test_training_leaves_a_policy_that_adapts(hour: tuple[Path, str]) -> None:
    run = hour[0] / "runs" / "first"
    assert load_policy(run / "checkpoint_000015")[1].progress["iteration"] == 15
    before, after = returns(run)
    assert after > before + 3, "one step finds the goal's side"


def test_two_algorithms_and_their_report(hour: tuple[Path, str]) -> None:
    folder, _ = hour
    for group, steps in (("promp", 1), ("rl2", 0)):
        runs = sorted(path.parent for path in (folder / "runs" / group).glob("*/evaluation.json"))
        assert [run.name for run in runs] == ["seed-0", "seed-1", "seed-2"]
        assert [len(returns(run)) for run in runs] == [steps + 1] * 3
    report = (folder / "report.html").read_text()
    assert re.findall(r"<tr><td>(\w+)</td><td>(\d+)</td>", report) == [("promp", "3"), ("rl2", "3")]
    assert report.count("<img ") == 3


def test_adaptation_and_the_loop(hour: tuple[Path, str]) -> None:
    folder, printed = hour
    outcome = json.loads((folder / "adapted" / "adaptation.json").read_text())
    assert outcome["parameters"] == {"goal": 0.7}
    assert outcome["after"]["return"] > outcome["before"]["return"] + 3
    trained, adapted = map(float, re.findall(r"^one episode: return (\S+) as", printed, re.MULTILINE))
    assert adapted > trained + 3


def test_evolve_hands_a_policy_over(hour: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, printed = hour
    assert "race 1 " in printed
    assert "Ended: the budget is spent" in printed
    run = folder / "runs" / "evolved"
    best = json.loads((run / "best.json").read_text())["checkpoint"]
    assert best == f"checkpoint_{load_policy(run)[1].progress['iteration']:06}"
    monkeypatch.syspath_prepend(str(folder))
    report = evaluate_checkpoint(run, task="own_family:HiddenGoal", split="test", num_tasks=40, steps=1)
    before, after = report.summary()["return"]
    assert after > before + 3


def test_page_answers(hour: tuple[Path, str]) -> None:
    page = (hour[0] / "page.html").read_text()
    assert '<meta property="og:title" content="SSM-MetaRL" />' in page
    for tab in ("Pretrained", "Meta-training", "Comparison", "Test-time adaptation", "Self-improvement"):
        assert f'"label":"{tab}"' in page
