"""The models that come with the package: found, light, as their cards say."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ssm_metarl import compare_modes, load_pretrained, pretrained
from ssm_metarl.cli.main import main
from ssm_metarl.storage.contents import CheckpointError
from ssm_metarl.storage.run_folder import resolve_checkpoint

NAMES = ("cartpole", "navigation-2d")
each = pytest.mark.parametrize("name", NAMES)


def test_both_are_there() -> None:
    assert set(NAMES) <= set(pretrained.names())


@each
def test_loads_in_under_a_second_without_ray(name: str, tmp_path: Path) -> None:
    """In a process of its own, from another directory; what is timed is loading, not the import of torch."""
    code = (
        "import sys, time, torch, ssm_metarl; load = ssm_metarl.load_pretrained; start = time.perf_counter(); "
        f"policy, checkpoint = load({name!r}); print(time.perf_counter() - start); "
        "assert 'ray' not in sys.modules; assert checkpoint.replay is not None"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.0


@each
def test_the_card_is_of_these_files(name: str) -> None:
    folder = pretrained.folder(name)
    card = json.loads((folder / "card.json").read_text())
    for file, digest in card["sha256"].items():
        assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == digest
    policy, checkpoint = load_pretrained(name)
    assert card["config"] == checkpoint.config
    assert card["seed"] == checkpoint.config["seed"]
    assert card["environment_steps"] == checkpoint.progress["env_steps"]
    assert card["parameters"] == sum(value.size for value in policy.numpy_weights().values())
    assert checkpoint.replay is not None
    assert card["replay_episodes"] == len(checkpoint.replay)
    for bound in ("ci_low", "ci_high"):
        assert len(card["evaluation"][bound]) == 4


def test_they_are_small() -> None:
    sizes = {"policy": 0, "replay": 0}
    for name in pretrained.names():
        for part in sizes:
            sizes[part] += (pretrained.folder(name) / f"{part}.safetensors").stat().st_size
    assert sizes["policy"] < 2 * 2**20
    assert sizes["replay"] < 4 * 2**20


def test_cartpole_balances_after_adaptation() -> None:
    """20 of the 200 held-out tasks of its card."""
    found = compare_modes("pretrained:cartpole", ("none", "standard"), episodes=10, num_tasks=20)
    summary = found.summary()["modes"]
    assert summary["standard"]["mean"]["value"] > 420
    assert summary["standard"]["gain"]["ci_low"] > 0


def test_navigation_arrives_after_adaptation() -> None:
    found = compare_modes("pretrained:navigation-2d", ("none", "standard"), episodes=20, num_tasks=20)
    summary = found.summary()["modes"]
    assert summary["standard"]["mean"]["value"] > -3
    assert np.isfinite(summary["none"]["mean"]["value"])


def test_wherever_a_checkpoint_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", "pretrained:cartpole", "--num-tasks", "2", "--steps", "0", "--episodes", "1", "--json"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["num_tasks"] == 2
    start = time.perf_counter()
    assert resolve_checkpoint("pretrained:cartpole") == pretrained.folder("cartpole")
    assert time.perf_counter() - start < 1


def test_an_unknown_name_lists_those_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CheckpointError, match="cartpole, navigation-2d"):
        load_pretrained("cartpol")
    assert main(["adapt", "pretrained:cartpol"]) == 2
    assert "There is no pretrained model 'cartpol'" in capsys.readouterr().err
