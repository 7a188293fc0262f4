"""Background jobs: commands of this package as Ray Jobs, on any cluster or on a head of this machine's own.

A job outlives the terminal that started it. Its driver runs on the cluster; the package travels with it.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import ray
import requests
from packaging.requirements import Requirement

import ssm_metarl
from ssm_metarl.config import available_cores
from ssm_metarl.distributed.cluster import (
    ANSWER_SECONDS,
    ON_LOOPBACK,
    TOKEN_MODE,
    check_answers,
    ensure_token,
    forget_cluster,
    restore_environment,
    send_token,
)
from ssm_metarl.distributed.ray_shim import server_version
from ssm_metarl.storage.atomic import replace_file

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

STOP_WAIT_SECONDS = 600
"""What a stopped job has to end its iteration and write a checkpoint, before Ray kills it."""

MARK = "ssm-metarl"
"""Key of a job's metadata: its run folder."""

HEAD_ADDRESS = "127.0.0.1"
"""Of a head on this machine: loopback."""

KILLED_SECONDS = 3.0
"""What killed processes have at most to be gone."""

PACKAGE = Path(ssm_metarl.__file__).parent
"""The package's folder, which travels with a job."""

EXCLUDED = ("__pycache__",)
"""Of the package's folder: patterns of what does not travel."""

ENDED = ("STOPPED", "SUCCEEDED", "FAILED")
"""Statuses of a job that is over."""

_PROBE = """
import importlib.metadata, json, sys
def has(name):
    try: return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError: return False
print(json.dumps({"python": sys.version_info[:2], "missing": [name for name in sys.argv[1:] if not has(name)]}))
"""


class JobError(RuntimeError):
    """A cluster or a job is not as needed; one sentence that says what would be right."""


@dataclass(frozen=True)
class Head:
    """A Ray head on this machine that `start_head` started.

    Attributes:
        pid, created: of the process whose end ends all others of the head; the time tells it from a later process.
        address: of the cluster, for `RAY_ADDRESS`.
        dashboard: URL of dashboard and job server.
    """

    pid: int
    created: float
    address: str
    dashboard: str

    def alive(self) -> bool:
        """Whether its process is still there."""
        try:
            process = psutil.Process(self.pid)
            return process.create_time() == self.created and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def head_file() -> Path:
    """Where this user's head is recorded."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "ssm-metarl" / "head.json"


def recorded_head() -> Head | None:
    """This user's head, if it runs."""
    try:
        head = Head(**json.loads(head_file().read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return head if head.alive() else None


def start_head(timeout_s: float = 90.0) -> Head:
    """Start a Ray head on loopback with a job server, and record it in `head_file`.

    All of its sockets are on loopback, and ask for this user's token even there.

    Raises:
        JobError: it did not come up; the sentence names its log.
    """
    record = head_file()
    record.parent.mkdir(parents=True, exist_ok=True)
    log = record.with_name("head.log")
    gcs, dashboard, client, agent, grpc = _free_ports(5)
    options = {
        "node-ip-address": HEAD_ADDRESS,
        "port": gcs,
        "include-dashboard": "true",
        "dashboard-host": "127.0.0.1",
        "dashboard-port": dashboard,
        "ray-client-server-port": client,
        "dashboard-agent-listen-port": agent,
        "dashboard-agent-grpc-port": grpc,
        "num-cpus": available_cores(),
    }
    ray_command = [sys.executable, "-m", "ray.scripts.scripts"]
    ensure_token()
    command = [*ray_command, "start", "--head", "--block", "--disable-usage-stats"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, *(f"--{name}={value}" for name, value in options.items())],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # it outlives the terminal
            env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0", **ON_LOOPBACK, **TOKEN_MODE},
        )
    created = psutil.Process(process.pid).create_time()
    head = Head(process.pid, created, f"{HEAD_ADDRESS}:{gcs}", f"http://127.0.0.1:{dashboard}")
    replace_file(record, json.dumps(asdict(head)).encode())
    end = time.monotonic() + timeout_s
    while time.monotonic() < end and process.poll() is None:
        try:
            _client(head.dashboard)
            return head
        except JobError:
            time.sleep(0.3)
    end_head(head)
    raise JobError(f"A Ray head did not come up within {timeout_s:.0f} s; see {log}.")


def end_head(head: Head, timeout_s: float = 1.0) -> None:
    """End exactly the processes of a head, and forget it; what it still runs is lost.

    Its raylet is asked to end, which ends the workers. The others are killed: nothing that they hold is kept, and Ray
    itself would ask one after the other, each with a second's patience.

    Args:
        head: that `start_head` started.
        timeout_s: what the raylet has.
    """
    if head.alive():
        process = psutil.Process(head.pid)
        family = [process, *process.children(recursive=True)]
        raylet = [each for each in family if _name(each) == "raylet"]
        for each in raylet:
            _end(each, signal.SIGTERM)
        _left(raylet, timeout_s)
        for each in _left(family, 0.0):
            _end(each, signal.SIGKILL)
        _left(family, KILLED_SECONDS)
    forget_cluster(head.address)
    head_file().unlink(missing_ok=True)


def _name(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return str(process.name())
    return ""


def _end(process: psutil.Process, number: signal.Signals) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def _left(processes: Sequence[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Those that run after a while at most. One that has ended counts as gone, also if its parent never looks."""

    def runs(process: psutil.Process) -> bool:
        with suppress(psutil.NoSuchProcess):
            return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
        return False

    end = time.monotonic() + timeout_s
    while (left := [process for process in processes if runs(process)]) and time.monotonic() < end:
        time.sleep(0.05)
    return left


def connect(address: str | None = None, *, start: bool = False) -> JobSubmissionClient:
    """A client of a cluster's job server.

    Args:
        address: such as "http://head:8265"; None: that of `RAY_API_SERVER_ADDRESS` or `RAY_ADDRESS`, else this
            user's own head.
        start: without any of them, start a head.

    Raises:
        JobError: nothing answers there, or a Ray of another version; or there is no cluster.
    """
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    if not address:
        head = recorded_head() or (start_head() if start else None)
        if head is None:
            raise JobError("No cluster is known: start a job, or name one with --address http://HEAD:8265.")
        address = head.dashboard
    return _client(address)


def _client(address: str) -> JobSubmissionClient:
    from ray.exceptions import AuthenticationError, RayError
    from ray.job_submission import JobSubmissionClient  # loads much

    try:
        head = recorded_head()
        send_token(own=head is not None and head.dashboard == address)
        if address.startswith(("http://", "https://")):
            requests.head(address, timeout=ANSWER_SECONDS)  # Ray's own request would wait for ever
        else:
            check_answers(address)
        with _only(address):
            client = JobSubmissionClient(address)
    except AuthenticationError:
        raise JobError(
            f"The cluster at {address} asks for a token: put its own into ~/.ray/auth_token or RAY_AUTH_TOKEN."
        ) from None
    except requests.Timeout:
        raise JobError(f"No Ray job server answers at {address} within {ANSWER_SECONDS:.0f} s.") from None
    except requests.ConnectionError:
        raise JobError(f"No Ray job server answers at {address}: nothing listens there.") from None
    except ValueError as error:
        raise JobError(" ".join(str(error).split())) from None
    except (ConnectionError, RuntimeError, OSError, RayError) as error:
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise JobError(f"No Ray job server answers at {address}: {reason[0]}") from None
    version = server_version(client)
    if version != ray.__version__:
        raise JobError(
            f"The cluster at {address} runs Ray {version}, but this environment has {ray.__version__}: "
            f"install ray=={version} here, or {ray.__version__} there."
        )
    return client


@contextmanager
def _only(address: str) -> Iterator[None]:
    """Meanwhile Ray takes this job server, where it would rather take that of RAY_API_SERVER_ADDRESS or RAY_ADDRESS."""
    before = os.environ.get("RAY_API_SERVER_ADDRESS")
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    try:
        yield
    finally:
        restore_environment({"RAY_API_SERVER_ADDRESS": before})


def submit(command: Sequence[str], run_dir: str | None, address: str | None = None) -> str:
    """Start a command of this package as a job.

    Args:
        command: such as ["train", "--task", "cartpole"]; paths in it are the cluster's.
        run_dir: the run's folder, for `jobs` and the job's status; None for a command without.
        address: see `connect`; a head is started where there is no cluster.

    Returns:
        The job's id.

    Raises:
        JobError: see `connect`; or the cluster lacks ray's or torch's part of our requirements.
    """
    client = connect(address, start=True)
    environment: dict[str, Any] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_SECONDS)}}
    python = "python"
    head = recorded_head()
    if head is not None and client.get_address() == head.dashboard:
        python = shlex.quote(sys.executable)  # the head's own
    elif missing := missing_requirements(client):
        environment["pip"] = missing
    environment |= {"py_modules": [str(PACKAGE)], "excludes": list(EXCLUDED)}
    return client.submit_job(
        entrypoint=f"exec {python} -m ssm_metarl {shlex.join(command)}",
        runtime_env=environment,
        metadata={MARK: run_dir or ""},
    )


def missing_requirements(client: JobSubmissionClient) -> list[str]:
    """Our requirements that a cluster's Python lacks, but for ray and torch.

    Raises:
        JobError: it lacks torch, or is of another Python.
    """
    wanted = {}
    for text in metadata.requires("ssm-metarl") or []:
        requirement = Requirement(text)
        if requirement.marker is None and requirement.name != "ray":
            wanted[requirement.name] = text
    job = client.submit_job(entrypoint=shlex.join(["python", "-c", _PROBE, *wanted]))
    status = await_end(client, job)
    lines = client.get_job_logs(job).strip().splitlines()
    client.delete_job(job)
    try:
        found = json.loads(lines[-1])
    except (IndexError, ValueError):
        raise JobError(f"The cluster could not say what it has installed (job {job}: {status}).") from None
    if tuple(found["python"]) != sys.version_info[:2]:
        there, here = (".".join(map(str, version)) for version in (found["python"], sys.version_info[:2]))
        raise JobError(f"The cluster runs Python {there}, but this environment {here}: they must be equal.")
    if "torch" in found["missing"]:  # gigabytes for every job; and another ray beside the cluster's would break it
        raise JobError(f"The cluster lacks torch: install {wanted['torch']!r} on its nodes.")
    return [wanted[name] for name in found["missing"]]


def jobs(client: JobSubmissionClient) -> list[JobDetails]:
    """The jobs that `submit` started, oldest first."""
    ours = [job for job in client.list_jobs() if MARK in (job.metadata or {}) and job.submission_id]
    return sorted(ours, key=lambda job: job.start_time or 0)


def choose(client: JobSubmissionClient, job: str | None) -> JobDetails:
    """The named job, or the newest one, those that run first.

    Raises:
        JobError: there is none, or none of this name; the sentence lists those that there are.
    """
    known = jobs(client)
    if job is None:
        running = [each for each in known if each.status not in ENDED]
        if chosen := (running or known)[-1:]:
            return chosen[0]
        raise JobError("The cluster has no job of ssm-metarl.")
    for each in known:
        if each.submission_id == job:
            return each
    names = ", ".join(each.submission_id or "" for each in known) or "none"
    raise JobError(f"The cluster has no job {job!r} of ssm-metarl; it has {names}.")


def await_end(client: JobSubmissionClient, job: str, timeout_s: float = STOP_WAIT_SECONDS + 30.0) -> str:
    """Wait for a job's end; its status then.

    Raises:
        JobError: it did not end in time.
    """
    end = time.monotonic() + timeout_s
    while (status := str(client.get_job_status(job).value)) not in ENDED:
        if time.monotonic() > end:
            raise JobError(f"Job {job} is still {status} after {timeout_s:.0f} s.")
        time.sleep(0.3)
    return status


def follow(client: JobSubmissionClient, job: str) -> AsyncIterator[str]:
    """A job's output as it comes, until its end."""
    return client.tail_job_logs(job)


def _free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody uses, outside the range from which Ray's workers take theirs."""
    found: list[int] = []
    for port in range(20000 + os.getpid() % 10000, 2**15):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise JobError("No free ports on the loopback address.")
