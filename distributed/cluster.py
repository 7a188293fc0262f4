"""Ray: started or joined, and whether it has what a run needs."""

from __future__ import annotations

import os
import sys
from typing import Any

import ray

from ssm_metarl.config import available_cores


def start_ray(num_workers: int, *, always: bool = False) -> None:
    """Have Ray in this process if it is wanted: join the cluster of `RAY_ADDRESS`, or start one on loopback.

    Usage reporting is off, and the dashboard's address is printed to stderr.

    Args:
        num_workers: workers of one trainer; 0: Ray is not needed.
        always: it is needed without workers, too, for the trials of Tune.
    """
    if not (num_workers or always) or ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address := os.environ.get("RAY_ADDRESS"):
        context = _join(address)
    else:
        context = ray.init(
            address="local",
            num_cpus=max(available_cores(), 1 + num_workers),
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            _node_ip_address="127.0.0.1",
            logging_level="ERROR",
            log_to_driver=False,
        )
    if context.dashboard_url:
        print(f"Ray dashboard: http://{context.dashboard_url}", file=sys.stderr)


def _join(address: str) -> Any:
    """Connect to a running cluster.

    Raises:
        ValueError: none answers, or one of another version; one sentence.
    """
    try:
        return ray.init(logging_level="ERROR", log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"The Ray cluster at {address} (--address, RAY_ADDRESS) cannot be joined: {reason}") from None


def auto_workers(trials: int = 1) -> int:
    """Workers for each of as many trials: the free processors of the cluster that is joined, less one a learner.

    Without a cluster to join (`RAY_ADDRESS`), this machine's cores: there the learner and its workers take turns.
    """
    if not (os.environ.get("RAY_ADDRESS") or ray.is_initialized()):
        return available_cores() if trials == 1 else 0
    if not ray.is_initialized():
        start_ray(0, always=True)
    return max(int(ray.available_resources().get("CPU", 0.0)) // trials - 1, 0)


def check_resources(num_workers: int) -> None:
    """Refuse more workers than a started Ray has processors for: Tune's placement groups would wait for ever.

    Raises:
        ValueError: one sentence with both figures.
    """
    if num_workers == 0 or not ray.is_initialized():
        return
    cpus = ray.cluster_resources().get("CPU", 0.0)
    if 1 + num_workers > cpus:
        raise ValueError(
            f"{num_workers} worker{'s' * (num_workers > 1)} and the learner need {1 + num_workers} CPUs, "
            f"but this Ray cluster has {cpus:g}; use num_workers={max(int(cpus) - 1, 0)} or fewer."
        )
