"""Ray: started or joined, and whether it has what a run needs."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import ray

from ssm_metarl.config import available_cores
from ssm_metarl.distributed import ray_shim
from ssm_metarl.storage.atomic import replace_file

if TYPE_CHECKING:
    from ssm_metarl.distributed.trainer import MetaTrainer

_log = logging.getLogger(__name__)

ON_LOOPBACK = {ray_shim.CLUSTERS_VARIABLE: "0"}
"""Environment of Ray's processes that keeps all of their sockets on loopback; without it Ray takes the address of a
network for its own, and most of them listen on every address. It means that no other machine can join."""

TOKEN_MODE = {"RAY_AUTH_MODE": "token"}
"""Environment of Ray's processes in which each asks for this user's token."""

ANSWER_SECONDS = 10.0
"""What a cluster has to answer before it counts as dead."""

WAY_IN = "it asks for the token that `ray get-auth-token` prints"
"""Of a dashboard: how to get in."""


def start_ray(num_workers: int, num_learners: int = 0, *, always: bool = False) -> None:
    """Have Ray in this process if it is wanted: join the cluster of `RAY_ADDRESS`, or start one on loopback.

    A Ray that is started here listens on loopback alone, and asks for this user's token even there. Usage reporting is
    off, and the dashboard's address is printed to stderr.

    Args:
        num_workers, num_learners: of one trainer; 0 and 0: Ray is not needed.
        always: it is needed without workers, too, for the trials of Tune.
    """
    if not (num_workers or num_learners or always) or ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address := os.environ.get("RAY_ADDRESS"):
        context = _join(address)
    else:
        ensure_token()
        if os.environ.get("RAY_AUTH_MODE") != "token":
            os.environ.pop("RAY_AUTH_MODE", None)  # then ray.init sets it, for itself and for its children
        with _on_loopback():
            context = ray.init(
                address="local",
                num_cpus=max(available_cores(), 1 + num_workers + num_learners),
                include_dashboard=True,
                dashboard_host="127.0.0.1",
                _node_ip_address="127.0.0.1",
                logging_level="ERROR",
                log_to_driver=False,
            )
    if context.dashboard_url:
        way_in = f" ({WAY_IN})" if os.environ.get("RAY_AUTH_MODE") == "token" else ""
        print(f"Ray dashboard: http://{context.dashboard_url}{way_in}", file=sys.stderr)


def ensure_token() -> None:
    """Make this user's token, which Ray's processes ask each other for, unless there is one; nobody else may read it.

    Raises:
        ValueError: it cannot be written.
    """
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    path = Path.home() / ".ray" / "auth_token"
    try:
        if path.is_file() and path.stat().st_size:
            if path.stat().st_mode & 0o077:  # as Ray writes it
                path.chmod(0o600)
            return
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        replace_file(path, secrets.token_hex(32).encode(), mode=0o600)
    except OSError as error:
        raise ValueError(f"{path}, the token of this user's Ray, cannot be written: {error.strerror}.") from None


def send_token(*, own: bool = False) -> None:
    """Let this process send this user's token to a cluster that it joins, if there is one and nothing forbids it.

    Args:
        own: the cluster was started here, and asks for the token whatever the environment says.
    """
    if own:
        os.environ.pop("RAY_AUTH_MODE", None)
    ray_shim.enable_token()


def forget_cluster(address: str) -> None:
    """Remove Ray's record of a cluster of this machine that has ended, to which "auto" would lead."""
    with suppress(OSError):
        if ray_shim.recorded_address() == address:
            ray_shim.forget_address()


def _only_on_loopback(address: str) -> bool:
    """Whether a cluster, that of this machine for "auto", listens on loopback alone, as those that are started here."""
    if address == "auto":
        address = ray_shim.recorded_address()
    host, _, port = address.rpartition(":")
    if host not in ("127.0.0.1", "localhost") or not port.isdigit():
        return False
    try:
        with socket.create_connection((ray_shim.node_address(), int(port)), timeout=2.0):
            return False
    except OSError:
        return True


@contextmanager
def _on_loopback() -> Iterator[None]:
    """While Ray is started or joined here, 127.0.0.1 is this machine's address, which Ray would replace otherwise."""
    before = {name: os.environ.get(name) for name in ON_LOOPBACK}
    os.environ.update(ON_LOOPBACK)
    try:
        with ray_shim.loopback_alone():
            yield
    finally:
        restore_environment(before)


def restore_environment(environment: Mapping[str, str | None]) -> None:
    """Give variables of this process's environment the values that they had; None: they were not there."""
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def check_answers(address: str) -> None:
    """Refuse an address where nothing speaks Ray's protocol: Ray itself would try for minutes, deaf to signals.

    Raises:
        ValueError: one sentence.
    """
    place = ray_shim.recorded_address() if address == "auto" else address.removeprefix("ray://")
    if not place or ":" not in place or os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
        return  # Ray says at once what is wrong; and encrypted ports answer only to it
    try:
        with grpc.insecure_channel(place, options=[("grpc.enable_http_proxy", 0)]) as channel:
            grpc.channel_ready_future(channel).result(timeout=ANSWER_SECONDS)
    except grpc.FutureTimeoutError:
        found = f"{place}, where Ray's record of this machine has one," if address == "auto" else address
        raise ValueError(
            f"No Ray cluster answers at {found} within {ANSWER_SECONDS:.0f} s (--address, RAY_ADDRESS): "
            "start one, or leave the address out."
        ) from None


def _join(address: str) -> Any:
    """Connect to a running cluster.

    Raises:
        ValueError: none answers, or one of another version; one sentence.
    """
    check_answers(address)
    local = _only_on_loopback(address)
    if local:
        send_token()
    try:
        with _on_loopback() if local else nullcontext():
            return ray.init(logging_level="ERROR", log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"The Ray cluster at {address} (--address, RAY_ADDRESS) cannot be joined: {reason}") from None


def auto_workers(trials: int = 1, num_learners: int = 0) -> int:
    """Workers for each of as many trials: the free processors of the cluster that is joined, less those of the others.

    Without a cluster to join (`RAY_ADDRESS`), this machine's cores: there learners and workers take turns.

    Args:
        trials: each has a trainer.
        num_learners: of each, beside the trainer.
    """
    if not (os.environ.get("RAY_ADDRESS") or ray.is_initialized()):
        return available_cores() if trials == 1 else 0
    if not ray.is_initialized():
        start_ray(0, always=True)
    return max(int(ray.available_resources().get("CPU", 0.0)) // trials - 1 - num_learners, 0)


def processors() -> int:
    """Of the nodes of the cluster that are alive."""
    return int(ray.cluster_resources().get("CPU", 0.0))


def left_workers(num_workers: int) -> int:
    """So many workers, or as many as the cluster still has processors for beside one for a trainer."""
    return min(num_workers, max(processors() - 1, 0))


class Elastic:
    """Workers of a trainer that follow the processors of the cluster: one more for each that joins, one less for each
    that leaves.

    Called between meta-iterations. What a run computes does not depend on its workers' number.

    Args:
        trainer: with one worker or more.
    """

    def __init__(self, trainer: MetaTrainer) -> None:
        self._trainer, self._others = trainer, processors() - trainer.pool.num_workers

    def __call__(self) -> None:
        """Look at the cluster, and have as many workers as it has room for, one at least."""
        count = max(processors() - self._others, 1)
        if count != self._trainer.pool.num_workers:
            _log.warning("The cluster has %d processors: %d workers from now on.", processors(), count)
            self._trainer.pool.resize(count)


def check_resources(num_workers: int, num_learners: int = 0, gpus: float = 0.0) -> None:
    """Refuse more workers and learners than a started Ray has processors and GPUs for: they would wait for ever.

    Raises:
        ValueError: one sentence with both figures.
    """
    if not (num_workers or num_learners) or not ray.is_initialized():
        return
    if gpus > (there := ray.cluster_resources().get("GPU", 0.0)):
        raise ValueError(f"{num_learners} learners need a GPU each, but this Ray cluster has {there:g}: --device cpu.")
    cpus, needed = ray.cluster_resources().get("CPU", 0.0), 1 + num_workers + num_learners
    if needed > cpus:
        named = {"worker": num_workers, "learner": num_learners}
        parts = [f"{number} {kind}{'s' * (number > 1)}" for kind, number in named.items() if number]
        raise ValueError(
            f"{', '.join(parts)} and the {'trainer' if num_learners else 'learner'} need {needed} CPUs, but this Ray "
            f"cluster has {cpus:g}; use num_workers={max(int(cpus) - 1 - num_learners, 0)} or fewer."
        )
