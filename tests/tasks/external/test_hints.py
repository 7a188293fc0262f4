"""Hints of gymnasium's environment checker, and what they must leave alone."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from external_environments import LINE
from ssm_metarl.config import TrainConfig
from ssm_metarl.distributed.train import train
from ssm_metarl.tasks.external import hints as checker
from ssm_metarl.tasks.external.hints import hints


def place(name: str) -> str:
    return f"{'odd_observations' if name.startswith('Obs') else 'habits'}:{name}"


@pytest.mark.parametrize("name", ["Base", "ObsBytes", "ObsNested", "ActMDStart", "Act2d", "Prints", "NoOptions"])
def test_nothing_is_said_where_nothing_is_found(name: str) -> None:
    expected = [] if name != "NoOptions" else ["The `reset` method does not provide an `options`"]
    found = hints(place(name))
    assert len(found) == len(expected)
    assert all(part in sentence for part, sentence in zip(expected, found, strict=True))


@pytest.mark.parametrize(
    ("name", "finding"),
    [
        ("ObsWrongShape", "by `env.reset()` is not within the observation space"),
        ("OldStep", "written in old step API"),
        ("OldReset", "not a tuple of the form `(obs, info)`"),
        ("RewText", "reward returned by `step()` must be a float"),
        ("ObsList", "expecting a numpy array, actual type: <class 'list'>"),
    ],
)
def test_a_finding_is_a_line(name: str, finding: str) -> None:
    found = hints(place(name))
    assert any(finding in sentence for sentence in found)
    for sentence in found:
        assert sentence.startswith(f"Hint for {place(name)}, from gymnasium's environment checker: ")
        assert sentence.isprintable()
        assert "WARN" not in sentence


def test_options_and_ranges_reach_the_environment() -> None:
    assert not hints("habits:Sized", {"size": 3, "horizon": 5})
    assert not hints("gym:Pendulum-v1", {}, {"g": [8, 12]})


def test_an_environment_that_ends_its_process_or_cannot_be_made_gives_no_hint(
    module: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    deadly = LINE.replace("        assert action in self.action_space\n", "        import os; os._exit(0)\n")
    slow = LINE.replace("        assert action in self.action_space\n", "        import time; time.sleep(60)\n")
    assert deadly != LINE != slow
    assert not hints(f"{module(deadly)}:Line")
    assert not hints("habits:Exits")
    assert not hints("habits:Sized")
    assert not hints("no_such_module:Env")
    monkeypatch.setattr(checker, "SECONDS", 2.0)
    assert not hints(f"{module(slow)}:Line")


def test_environments_are_closed_in_the_checkers_process(
    module: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    source = LINE.replace("    horizon = 12\n", "    horizon = 12\n" + COUNT.format(str(log)))
    assert not hints(f"{module(source)}:Line")
    words = log.read_text().split()
    assert words.count("made") == words.count("closed") > 1


COUNT = """
    def __init__(self):
        self.said = False
        self.say("made")

    def close(self):
        if not self.said:
            self.said = True
            self.say("closed")

    def say(self, word):
        with open({!r}, "a") as log:
            log.write(word + " ")
"""


def test_the_first_run_hints_and_plays_as_the_second_which_does_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither the run's own random numbers nor global ones are taken."""

    def run(name: str, iterations: int = 1, resume: bool = False) -> dict[str, Any]:
        options = {"meta_batch": 2, "episodes": 2, "hidden_dim": 4, "state_dim": 2}
        config = TrainConfig.for_task("odd_observations:ObsList", iterations=iterations, **options)
        with caplog.at_level(logging.WARNING, "ssm_metarl"):
            metrics = train(config, tmp_path / name, resume=resume).metrics
        return {key: value for key, value in metrics.items() if "second" not in key}

    np.random.seed(0)  # noqa: NPY002
    first = run("first")
    after = np.random.random()  # noqa: NPY002
    said = [record.getMessage() for record in caplog.records if "Hint for" in record.getMessage()]
    assert len(said) == len(set(said)) > 0
    caplog.clear()
    np.random.seed(0)  # noqa: NPY002
    second = run("second")
    assert after == np.random.random()  # noqa: NPY002
    assert first["return_by_step"] == second["return_by_step"]
    run("first", iterations=2, resume=True)
    assert not [record for record in caplog.records if "Hint for" in record.getMessage()]
