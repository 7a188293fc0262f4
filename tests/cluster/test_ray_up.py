"""From laptop to cluster and back: Ray's launcher and `cluster.yaml`, over ssh to two loopback addresses.

Laptop, head and worker are three home folders. `cluster.yaml` is edited as docs/guides/cluster.md says for machines of
one's own; its mounts, its setup commands and, but for ports and sizes, its start commands run as they are.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from ssm_metarl.storage.checkpoint import load_checkpoint
from ssm_metarl.storage.run_folder import checkpoints

ROOT = Path(__file__).resolve().parents[2]
HEAD, WORKER = "127.0.0.2", "127.0.0.3"
SMALL = {"meta-batch": 4, "episodes": 2, "hidden-dim": 8, "state-dim": 4, "epochs": 1, "eval-tasks": 2}

# `ray stop` ends every Ray on the machine. Run by this, it sees the processes of its own home folder only.
RAY_STOP = """
    import os
    from ray.scripts import scripts

    def is_of_this_machine(process):
        try:
            return process.environ().get("HOME") == os.environ["HOME"]
        except scripts.psutil.Error:
            return False

    every_process = scripts.psutil.process_iter
    scripts.psutil.process_iter = lambda *names: filter(is_of_this_machine, every_process(*names))
    scripts.main()
    """


def free_port() -> int:
    """A port that is free on all addresses, and not of 10002–19999, from which Ray's workers take theirs."""
    while True:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port: int = probe.getsockname()[1]
        if not 10002 <= port <= 19999:
            return port


def answers(address: str, port: int) -> bool:
    """Whether somebody listens there."""
    with socket.socket() as probe:
        return probe.connect_ex((address, port)) == 0


def until(seconds: float, what: str, condition: Callable[[], Any]) -> Any:
    """The first true answer of `condition`, asked twice a second."""
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.5)
    return answer


class Loopback:
    """One folder that holds all of a laptop, a head and a worker, and the ssh server that leads to the latter two.

    Attributes:
        root: the folder. Every process of the three names it in its command or environment.
        laptop, head, worker: their home folders.
        checkout: the laptop's copy of this repository, with a `cluster.yaml` for the loopback machines.
        head_port, dashboard_port: of the head's Ray, and of its dashboard.
        token: that its user must have.
    """

    def __init__(self) -> None:
        # Short: Ray's sockets are below it, and a socket's path has 107 characters at most.
        self.root = Path(tempfile.mkdtemp(prefix="ray-up-", dir="/tmp"))
        self.laptop, self.head, self.worker = (self.root / name for name in ("laptop", "head", "worker"))
        self.checkout = self.laptop / "checkout"
        self.ssh_port, self.head_port, self.dashboard_port = free_port(), free_port(), free_port()
        self._started: list[subprocess.Popen[bytes]] = []

    def make(self) -> None:
        self._programs()
        for home in (self.laptop, self.head, self.worker):
            home.mkdir(mode=0o700)
            # Where cluster.yaml has the virtual environment.
            (home / "venv").symlink_to(self.root / "venv")
            # A login over ssh starts in the home folder of the password file, which is not ours. Ray's folder must be
            # ours, too. PYTHONPATH stands in for the installation of the mounted repository.
            (home / ".bashrc").write_text(
                'cd; export PATH="$HOME/venv/bin:$PATH" RAY_TMPDIR="$HOME" PYTHONPATH="$HOME/ssm-metarl"\n'
            )
        self._ssh()
        kept_out = (".git", ".venv", "venv", "runs", "build", "dist", "*cache*", ".hypothesis", "*.egg-info")
        shutil.copytree(ROOT, self.checkout, ignore=shutil.ignore_patterns(*kept_out))
        (self.checkout / "runs/old").mkdir(parents=True)
        (self.checkout / "cluster.yaml").write_text(yaml.safe_dump(self._cluster()))
        self.token = self.run("ray", "get-auth-token", "--generate").splitlines()[-1]

    def _programs(self) -> None:
        """The programs that a login shell finds first."""
        bin_folder = self.root / "venv/bin"
        bin_folder.mkdir(parents=True)
        programs = {
            "python": f'exec {sys.executable} "$@"',
            "ray": f"""
                [ "$1" = stop ] && exec {sys.executable} {self.root}/ray_stop.py stop
                exec {sysconfig.get_path("scripts")}/ray "$@"
                """,
            # Installing takes minutes; this Python has everything. Only what is asked for is noted.
            "pip": 'echo "$@" >>"$HOME/pip.log"',
            # ssh goes by the home folder of the password file, too.
            "ssh": f'exec {shutil.which("ssh")} -F {self.root}/ssh_config "$@"',
        }
        for name, lines in programs.items():
            (bin_folder / name).write_text(f"#!/bin/sh\n{textwrap.dedent(lines).strip()}\n")
            (bin_folder / name).chmod(0o700)
        (self.root / "ray_stop.py").write_text(textwrap.dedent(RAY_STOP))

    def _ssh(self) -> None:
        """Keys, configurations and a running server on the addresses of head and worker."""
        for key in ("key", "host_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.root / key], check=True)
        (self.root / "ssh_config").write_text(
            f"Port {self.ssh_port}\nIdentityFile {self.root}/key\nBatchMode yes\nLogLevel ERROR\n"
        )
        (self.root / "sshd_config").write_text(
            textwrap.dedent(f"""\
                Port {self.ssh_port}
                ListenAddress {HEAD}
                ListenAddress {WORKER}
                HostKey {self.root}/host_key
                AuthorizedKeysFile {self.root}/key.pub
                AuthenticationMethods publickey
                AllowUsers {getpass.getuser()}
                PermitRootLogin yes
                StrictModes no
                UsePAM no
                PidFile none
                Match LocalAddress {HEAD}
                    SetEnv HOME={self.head}
                Match LocalAddress {WORKER}
                    SetEnv HOME={self.worker}
                """)
        )
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd wants it; only Debian's init script makes it
        sshd = shutil.which("sshd", path=os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/usr/local/sbin"]))
        assert sshd, "no ssh server is installed"
        self.start(sshd, "-D", "-E", f"{self.root}/sshd.log", "-f", f"{self.root}/sshd_config")
        until(30, "the ssh server listens", lambda: answers(HEAD, self.ssh_port) and answers(WORKER, self.ssh_port))

    def _cluster(self) -> dict[str, Any]:
        """`cluster.yaml` for the loopback machines."""
        config: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
        for aws in ("available_node_types", "head_node_type", "initialization_commands"):
            del config[aws]
        config |= {
            "cluster_name": self.root.name,
            "max_workers": 1,
            "provider": {"type": "local", "head_ip": HEAD, "worker_ips": [WORKER]},
            "auth": {"ssh_user": getpass.getuser(), "ssh_private_key": str(self.root / "key")},
        }
        # The head has no processor for rollouts, so that all are the worker's. Other Rays may have the default ports.
        options = {
            "head": f"--node-ip-address={HEAD} --num-cpus=0 --dashboard-port={self.dashboard_port} "
            f"--ray-client-server-port={free_port()}",
            "worker": f"--node-ip-address={WORKER} --num-cpus=2 --temp-dir={self.worker}/ray",
        }
        for node, own in options.items():
            own += f" --dashboard-agent-listen-port={free_port()} --min-worker-port=0 --max-worker-port=0"
            own += " --object-store-memory=80000000"
            stop, start = config[f"{node}_start_ray_commands"]
            assert "6379" in start
            start = start.replace("6379", str(self.head_port)).replace("ray start", f"ray start {own}")
            config[f"{node}_start_ray_commands"] = [stop, start]
        return config

    def environment(self) -> dict[str, str]:
        """Of the laptop's commands."""
        return {
            "HOME": str(self.laptop),
            "PATH": f"{self.root}/venv/bin:{os.environ['PATH']}",
            "TMPDIR": str(self.laptop),
            "RAY_TMPDIR": str(self.laptop),
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_UP_enable_autoscaler_v2": "0",
        }

    def start(self, *command: str, output: Any = None, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start a command in the checkout; it ends with everything else, at the latest."""
        folder = self.checkout if self.checkout.exists() else self.root
        process = subprocess.Popen(
            command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        self._started.append(process)
        return process

    def run(self, *command: str, seconds: float = 60) -> str:
        """What one of the laptop's commands prints; it must succeed."""
        with tempfile.TemporaryFile() as output:
            process = self.start(*command, output=output, env=self.environment())
            try:
                code: int | str = process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                code = f"nothing in {seconds:g} s"
            output.seek(0)
            printed = output.read().decode(errors="replace")
        print(f"$ {shlex.join(command)}\n{printed}")
        assert code == 0, f"`{shlex.join(command[:3])}` ended with {code}"
        return printed

    def shell(self, address: str, command: str) -> str:
        """What a command prints on a machine, in a shell such as Ray's launcher uses."""
        login = f"source ~/.bashrc; {command}"
        key = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
        return self.run("ssh", "-tt", *key, address, "bash", "--login", "-c", "-i", shlex.quote(login))

    def ask(self, path: str, token: str | None) -> Any:
        """Answer of the dashboard; None as long as there is none."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.dashboard_port}{path}")
        if token:
            request.add_header("Authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError:
            raise
        except OSError:
            return None

    def nodes(self) -> dict[str, str]:
        """Address by node id, of the nodes that are up."""
        answer = self.ask("/nodes?view=summary", self.token)
        raylets = [node["raylet"] for node in answer["summary"]] if answer else []
        return {node["nodeId"]: node["nodeManagerAddress"] for node in raylets if node.get("state") == "ALIVE"}

    def processes(self) -> list[int]:
        """All processes of the laptop, the head, the worker and the ssh server."""
        parents, ours = {}, set()
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if str(self.root).encode() in (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes():
                    ours.add(int(entry.name))
        # The ssh server's children have neither its command nor its environment.
        while children := {pid for pid, parent in parents.items() if parent in ours} - ours:
            ours |= children
        return sorted(ours)

    def close(self) -> None:
        """End everything, by process id, and remove the folder."""

        def nothing_left() -> bool:
            left = self.processes()
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not left

        until(30, "end of all processes", nothing_left)
        for process in self._started:
            process.wait(10)
        for log in (*self.root.glob("sshd.log"), *self.head.glob("ray/session_latest/logs/monitor.*")):
            print(f"{log}, the end:\n{log.read_text(errors='replace')[-2000:]}")
        # Ray keeps the sockets of its ssh connections here.
        name = hashlib.sha256(self.root.name.encode()).hexdigest()[:10]
        for folder in (self.root, *Path("/tmp").glob(f"ray_ssh_*/{name}")):
            shutil.rmtree(folder)


@pytest.fixture
def loopback() -> Iterator[Loopback]:
    machines = Loopback()
    try:
        machines.make()
        yield machines
    finally:
        machines.close()


@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_from_laptop_to_cluster_and_back(loopback: Loopback) -> None:
    for address, home in ((HEAD, loopback.head), (WORKER, loopback.worker)):
        assert f"{home}/venv/bin/ray" in loopback.shell(address, "command -v ray"), "it would stop every Ray"
    # `ray stop` knows Ray's processes by their names. To it, this is another Ray's.
    (loopback.root / "gcs_server").symlink_to(shutil.which("sleep") or "")
    other = loopback.start(f"{loopback.root}/gcs_server", "900")

    for _ in range(3):  # Ray gives a node 30 s to start, too little on a busy machine; `ray up` may be repeated
        with contextlib.suppress(AssertionError):
            loopback.run("ray", "up", "-y", "cluster.yaml", seconds=120)
            until(90, "the worker joins", lambda: WORKER in loopback.nodes().values())
            break
    status = ("ray", "exec", "cluster.yaml", "ray status")
    until(60, "`ray status` knows it", lambda: "2 local.cluster.node" in loopback.run(*status))
    for home in (loopback.head, loopback.worker):
        assert (home / "ssm-metarl/pyproject.toml").is_file()
        assert not (home / "ssm-metarl/runs").exists()
        assert f"-e {home}/ssm-metarl" in (home / "pip.log").read_text()
        assert (home / ".ray/auth_token").read_text() == loopback.token
        assert (home / ".ray/auth_token").stat().st_mode & 0o077 == 0

    with pytest.raises(urllib.error.HTTPError, match="401"):
        loopback.ask("/nodes?view=summary", None)
    assert not answers(HEAD, loopback.dashboard_port)

    submit = ["ray", "submit", "cluster.yaml", "run_local.py", "--", "train", "--num-workers", "auto"]
    small = [f"--{name}={value}" for name, value in SMALL.items()]
    loopback.run(*submit, "--iterations", "2", *small, seconds=180)
    loopback.run("ray", "rsync-down", "cluster.yaml", "~/runs/", "runs/")
    (run,) = loopback.head.glob("runs/*")
    assert load_checkpoint(checkpoints(loopback.checkout / "runs" / run.name)[-1]).progress["iteration"] == 2

    forward = ["ray", "dashboard", "cluster.yaml", "--port", str(local_port := free_port())]
    forward += ["--remote-port", str(loopback.dashboard_port)]
    loopback.start(*forward, env=loopback.environment())
    until(30, "the dashboard is forwarded", lambda: answers("127.0.0.1", local_port))
    job = ["ray", "job", "submit", "--address", f"http://127.0.0.1:{local_port}", "--working-dir", ".", "--"]
    job += ["python", "run_local.py", "train", "--resume", "--run-dir", str(run), "--iterations", "3"]
    job += ["--eval-tasks", "2"]
    loopback.run(*job, seconds=180)
    assert load_checkpoint(checkpoints(run)[-1]).progress["iteration"] == 3

    actors = loopback.ask("/api/v0/actors?detail=true", loopback.token)["result"]["result"]
    nodes = until(30, "the dashboard knows the nodes", loopback.nodes)
    rollouts = [nodes[actor["node_id"]] for actor in actors if actor["class_name"] == "RolloutWorker"]
    assert rollouts == [WORKER] * 4  # of two trainings, and of their evaluations

    loopback.run("ray", "down", "-y", "cluster.yaml")
    assert not answers(HEAD, loopback.head_port)
    assert other.poll() is None
