"""Every private name of Ray that is used here; `tests/distributed/test_ray_shim.py` names one that a new Ray changed.

Ray has no public way to say that a head listens on loopback alone, to send the token of this user to a cluster that is
joined, to read and remove its record of the cluster of this machine, to tell without a dashboard whether an actor has a
node, to name one of RLlib's workers, or to tell by what Tune's `get_best_result` compares trials.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import ray
from ray._common.utils import reset_ray_address
from ray._private import ray_constants, services, state
from ray._private.authentication import authentication_token_setup
from ray._private.utils import read_ray_address

if TYPE_CHECKING:
    from ray.actor import ActorHandle
    from ray.job_submission import JobSubmissionClient
    from ray.rllib.env.env_runner_group import EnvRunnerGroup
    from ray.tune import ResultGrid

CLUSTERS_VARIABLE: str = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
"""Environment variable that, at 0, makes a Ray that is started listen on loopback alone."""


@contextmanager
def loopback_alone() -> Iterator[None]:
    """Meanwhile a Ray that this process starts listens on loopback alone; the variable is read when Ray is imported."""
    enabled, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = enabled


def enable_token() -> None:
    """Let this process send the token that it finds, and say nothing where there is none."""
    logging.getLogger(authentication_token_setup.__name__).setLevel(logging.ERROR)
    authentication_token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def recorded_address() -> str:
    """Address of the cluster of this machine that was started last, to which "auto" leads; empty without one."""
    return read_ray_address() or ""


def forget_address() -> None:
    """Remove that record."""
    reset_ray_address()


def node_address() -> str:
    """Address of this machine by which others reach it."""
    address: str = services.get_node_ip_address()
    return address


def has_no_node(actor: ActorHandle[Any]) -> bool:
    """Whether an actor that ended is to be started again and no node has taken it yet.

    Until a node starts its process, its address is empty, or that of the node manager at whose door it waits.
    """
    found = state.actors(actor._actor_id.hex())
    if found["State"] != "RESTARTING":
        return False
    address = found["Address"]["IPAddress"], found["Address"]["Port"]
    return not address[0] or address in {(node["NodeManagerAddress"], node["NodeManagerPort"]) for node in ray.nodes()}


def kill_env_runner(group: EnvRunnerGroup, worker: int) -> None:
    """End the process of one of RLlib's workers; Ray starts another."""
    ray.kill(group._worker_manager.actors()[worker], no_restart=False)


def server_version(client: JobSubmissionClient) -> str:
    """Version of Ray that a job server runs."""
    version: str = client._server_ray_version
    return version


def trial_levels(results: ResultGrid, metric: str, scope: str) -> list[float]:
    """Of each trial what `get_best_result` with this metric and scope compares; NaN where it has reported nothing."""
    trials = results._experiment_analysis.trials
    return [trial.metric_analysis.get(metric, {}).get(scope, float("nan")) for trial in trials]
