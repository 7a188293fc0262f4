"""The one place with private names of Ray: that it is one, and that this version of Ray still has them."""

from __future__ import annotations

import ast
import importlib
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

import ssm_metarl
from ssm_metarl.distributed import ray_shim

PACKAGE = Path(ssm_metarl.__file__).parent
SHIM = "distributed/ray_shim.py"

NAMES = {
    "ray._common.utils": ["reset_ray_address"],
    "ray._private.ray_constants": ["ENABLE_RAY_CLUSTERS_ENV_VAR", "ENABLE_RAY_CLUSTER"],
    "ray._private.services": ["get_node_ip_address"],
    "ray._private.authentication.authentication_token_setup": ["maybe_enable_token_auth_if_token_available"],
    "ray._private.state": ["actors"],
    "ray._private.utils": ["read_ray_address"],
}


@pytest.mark.parametrize("module", NAMES)
def test_this_ray_has_the_private_names(module: str) -> None:
    found = importlib.import_module(module)
    missing = [name for name in NAMES[module] if not hasattr(found, name)]
    assert not missing, f"Ray changed {module}: it has no {', '.join(missing)} any more, which {SHIM} uses"


def test_a_job_client_tells_its_servers_version() -> None:
    source = Path(importlib.import_module("ray.dashboard.modules.dashboard_sdk").__file__ or "").read_text()
    assert "self._server_ray_version" in source, f"Ray changed its job client: {SHIM} asks it for _server_ray_version"


def test_a_group_of_rllib_has_the_workers_actors() -> None:
    source = Path(importlib.import_module("ray.rllib.env.env_runner_group").__file__ or "").read_text()
    manager = importlib.import_module("ray.rllib.utils.actor_manager").FaultTolerantActorManager
    assert "self._worker_manager = FaultTolerantActorManager" in source, f"Ray changed its workers: see {SHIM}"
    assert callable(manager.actors)


def test_results_have_what_trials_are_compared_by() -> None:
    grid = Path(importlib.import_module("ray.tune.result_grid").__file__ or "").read_text()
    assert "self._experiment_analysis = experiment_analysis" in grid, f"Ray changed ResultGrid: see {SHIM}"
    trial = importlib.import_module("ray.tune.experiment.trial").Trial("x", stub=True)
    assert trial.metric_analysis == {}


@pytest.mark.parametrize(
    ("state", "address", "port", "expected"),
    [
        ("RESTARTING", "", 0, True),  # of no node yet, or of one that was asked
        ("RESTARTING", "192.0.2.2", 44175, True),  # another node sent it on to this one, which is full
        ("RESTARTING", "192.0.2.2", 38127, False),  # its process starts
        ("ALIVE", "192.0.2.2", 38127, False),
        ("DEAD", "", 0, False),
    ],
)
def test_who_waits_for_a_node(
    monkeypatch: pytest.MonkeyPatch, state: str, address: str, port: int, expected: bool
) -> None:
    """Tables as Ray 2.60 fills them."""
    table = {"State": state, "Address": {"IPAddress": address, "Port": port, "NodeID": "17e84f"}}
    managers = [("192.0.2.2", 37045), ("192.0.2.2", 44175)]
    nodes = [{"NodeManagerAddress": own, "NodeManagerPort": at} for own, at in managers]
    monkeypatch.setattr(ray_shim.state, "actors", lambda actor: table)
    monkeypatch.setattr(ray_shim.ray, "nodes", lambda: nodes)
    assert ray_shim.has_no_node(SimpleNamespace(_actor_id=b"\x01")) is expected  # type: ignore[arg-type]


def private(module: str) -> bool:
    return module.partition(".")[0] == "ray" and any(part.startswith("_") for part in module.split("."))


def test_nothing_else_imports_what_is_private() -> None:
    users = set()
    files = [Path(at) / name for at, _, names in os.walk(PACKAGE, followlinks=True) for name in names]
    for path in files:
        if path.suffix != ".py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [each.name for each in node.names] if isinstance(node, ast.Import) else []
            if any(map(private, names)):
                users.add(path.relative_to(PACKAGE).as_posix())
    assert users == {SHIM}
