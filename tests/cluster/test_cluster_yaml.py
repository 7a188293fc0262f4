"""`cluster.yaml`: valid for Ray's launcher, and a login shell finds the cluster after its setup commands."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from jsonschema import ValidationError  # type: ignore[import-untyped]
from ray.autoscaler._private.util import prepare_config, validate_config

CLUSTER = Path(__file__).resolve().parents[2] / "cluster.yaml"


@pytest.fixture
def config() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(CLUSTER.read_text())
    return loaded


def test_is_valid_by_the_schema_of_ray(config: dict[str, Any]) -> None:
    validate_config(prepare_config(config))
    with pytest.raises(ValidationError, match="max_worker"):
        validate_config(prepare_config(config | {"max_worker": 1}))


def test_is_what_the_launcher_runs_and_nothing_by_default(config: dict[str, Any]) -> None:
    """Ray's defaults for AWS install a nightly Ray, and show the dashboard to the world."""
    prepared = prepare_config(config)
    for commands in ("setup_commands", "head_setup_commands", "head_start_ray_commands", "worker_start_ray_commands"):
        assert set(config[commands]) <= set(prepared[commands]) <= {*config["setup_commands"], *config[commands]}
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]


def test_bounds_of_autoscaling_are_in_order(config: dict[str, Any]) -> None:
    types = config["available_node_types"]
    workers = [node for name, node in types.items() if name != config["head_node_type"]]
    assert all(0 < node["min_workers"] <= node["max_workers"] <= config["max_workers"] for node in workers)


def login(home: Path, command: str) -> str:
    """What a command prints in a shell such as Ray's launcher uses."""
    result = subprocess.run(
        ["bash", "--login", "-c", "-i", f"source ~/.bashrc; {command}"],
        cwd=home,
        env={"HOME": str(home), "PATH": os.defpath},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        start_new_session=True,  # without a terminal
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_login_shell_of_the_head_finds_the_cluster(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / ".bashrc").write_text("# the machine's own\n")
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("secret")
    pip = tmp_path / "venv/bin/pip"
    pip.parent.mkdir(parents=True)
    pip.write_text('#!/bin/sh\necho "$@" >>~/pip.log\n')
    pip.chmod(0o700)
    for _ in range(2):  # `ray up` runs them again when the file changes
        for command in config["setup_commands"] + config["head_setup_commands"]:
            login(tmp_path, command)
    seen = login(tmp_path, 'echo "$PATH" $RAY_ADDRESS $RAY_AUTH_MODE $RAY_USAGE_STATS_ENABLED').split()
    assert seen[0].startswith(f"{tmp_path}/venv/bin:")
    assert seen[1:] == ["auto", "token", "0"]
    assert (tmp_path / ".bashrc").read_text().count(".ssm-metarl") == 1
    assert (tmp_path / ".ray/auth_token").stat().st_mode & 0o077 == 0
    assert f"-e {tmp_path}/ssm-metarl" in (tmp_path / "pip.log").read_text()
    assert config["file_mounts"]["~/ssm-metarl"] == "."
