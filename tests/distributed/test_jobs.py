"""Background jobs without a cluster: what travels, and what is asked of a cluster. The drills are in tests/cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from ray._private.runtime_env.packaging import create_package

from builders import package_files, wait_until
from ssm_metarl.distributed import jobs

pytestmark = pytest.mark.usefixtures("no_cluster")

ROOT = Path(__file__).resolve().parents[2]


def run(program: str, *path: Path) -> str:
    """What a fresh interpreter prints, in which an editable install of this package is not seen."""
    hide = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()];"
    result = subprocess.run(
        [sys.executable, "-c", f"{hide} {program}"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


PARTS = ("algorithms.objective", "tasks", "distributed.train", "tuning.evolve", "cli.main")
IMPORTS = "import ssm_metarl, " + ", ".join(f"ssm_metarl.{part}" for part in PARTS)


@pytest.mark.slow
def test_what_travels_with_a_job_is_the_whole_package(tmp_path: Path) -> None:
    """Packed as Ray packs `py_modules`: the files that the links lead to, and nothing that Python compiled."""
    packed = tmp_path / "package.zip"
    create_package(
        str(jobs.PACKAGE), packed, include_gitignore=True, include_parent_dir=True, excludes=list(jobs.EXCLUDED)
    )
    with zipfile.ZipFile(packed) as archive:
        archive.extractall(tmp_path / "there")
        assert {name for name in archive.namelist() if not name.endswith("/")} == package_files()
    where = run(
        f"{IMPORTS}; print(*(m.__file__ for n, m in sys.modules.items() if n.startswith('ssm_metarl')))",
        tmp_path / "there",
    )
    assert len(where.split()) > 20
    assert all(Path(file).is_relative_to(tmp_path / "there") for file in where.split())


@pytest.mark.slow
def test_a_checkout_runs_without_being_installed() -> None:
    assert run(f"{IMPORTS}; print(ssm_metarl.tuning.evolve.__file__)", ROOT) == str(
        ROOT / "ssm_metarl/tuning/evolve.py"
    )


class FakeClient:
    """A job server that answers as told."""

    def __init__(self, answer: str = "", version: str = "2.60.0") -> None:
        self.answer, self._server_ray_version = answer, version

    def submit_job(self, **_: Any) -> str:
        return "probe"

    def get_job_status(self, job: str) -> Any:
        return SimpleNamespace(value="SUCCEEDED")

    def get_job_logs(self, job: str) -> str:
        return self.answer

    def delete_job(self, job: str) -> None:
        pass


def probed(**found: Any) -> FakeClient:
    return FakeClient("a warning\n" + json.dumps({"python": sys.version_info[:2], "missing": [], **found}) + "\n")


def test_light_requirements_that_a_cluster_lacks_are_installed_heavy_ones_never() -> None:
    missing = jobs.missing_requirements(probed(missing=["tyro", "safetensors"]))  # type: ignore[arg-type]
    assert sorted(text.split(">")[0] for text in missing) == ["safetensors", "tyro"]
    with pytest.raises(jobs.JobError, match=r"The cluster lacks torch: install 'torch"):
        jobs.missing_requirements(probed(missing=["torch"]))  # type: ignore[arg-type]
    with pytest.raises(jobs.JobError, match=r"The cluster runs Python 3\.7"):
        jobs.missing_requirements(probed(python=[3, 7]))  # type: ignore[arg-type]
    with pytest.raises(jobs.JobError, match="could not say what it has installed"):
        jobs.missing_requirements(FakeClient("Killed"))  # type: ignore[arg-type]


def test_a_cluster_of_another_ray_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", lambda address: FakeClient(version="2.41.0"))
    monkeypatch.setattr("requests.head", lambda address, timeout: None)
    with pytest.raises(jobs.JobError, match=r"^The cluster at http://head:8265 runs Ray 2\.41\.0, but this"):
        jobs.connect("http://head:8265")


def test_a_process_that_has_ended_is_not_waited_for_though_its_parent_never_looks() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    process = psutil.Process(child.pid)
    wait_until(lambda: process.status() == psutil.STATUS_ZOMBIE)
    assert jobs._left([process], timeout_s=0.0) == []
    alive = psutil.Process()
    assert jobs._left([process, alive], timeout_s=0.0) == [alive]
    child.wait()
    assert jobs._left([process], timeout_s=0.0) == []


def test_the_users_own_head_gets_the_token_whatever_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, record: Callable[[jobs.Head], Path]
) -> None:
    """It asks for it; whether another cluster does is the user's to know."""
    sent = []
    monkeypatch.setattr(jobs, "send_token", lambda *, own: sent.append(own))
    record(jobs.Head(os.getpid(), psutil.Process().create_time(), "127.0.0.1:1", "http://127.0.0.1:9"))
    for address in ("http://127.0.0.1:9", "http://127.0.0.1:19"):
        with pytest.raises(jobs.JobError, match="nothing listens there"):
            jobs.connect(address)
    assert sent == [True, False]


RAYLET = """
import pathlib, signal, sys, time
def end(*_):
    pathlib.Path(sys.argv[1]).touch()
    sys.exit()
signal.signal(signal.SIGTERM, end)
print(flush=True)
time.sleep(100)
"""
HEAD = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
executable, raylet, asked = sys.argv[1:]
for program in (raylet, "import time; print(flush=True); time.sleep(100)"):
    child = subprocess.Popen([executable, "-c", program, asked], stdout=subprocess.PIPE)
    child.stdout.readline()
print(flush=True)
time.sleep(100)
"""
"""A head whose raylet notes that it was asked to end, beside processes that end only when they are killed."""


def test_a_head_ends_at_once_its_raylet_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: Callable[[jobs.Head], Path]
) -> None:
    """And Ray's record of this machine does not lead to it any more."""
    (tmp_path / "raylet").symlink_to(os.path.realpath(sys.executable))
    (tmp_path / "tmp" / "ray").mkdir(parents=True)
    known = tmp_path / "tmp" / "ray" / "ray_current_cluster"
    known.write_text("127.0.0.1:6379")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "tmp"))
    asked = tmp_path / "asked"
    process = subprocess.Popen(
        [sys.executable, "-c", HEAD, str(tmp_path / "raylet"), RAYLET, str(asked)], stdout=subprocess.PIPE
    )
    assert process.stdout
    process.stdout.readline()
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children()]
    assert len(family) == 3
    head = jobs.Head(process.pid, family[0].create_time(), "127.0.0.1:6379", "http://127.0.0.1:2")
    path, begin = record(head), time.monotonic()
    jobs.end_head(head)
    assert time.monotonic() - begin < 2.0
    assert asked.exists()
    assert jobs._left(family, timeout_s=0.0) == []
    assert not path.exists()
    assert not known.exists()
    process.wait()


def test_the_record_of_another_cluster_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp" / "ray").mkdir(parents=True)
    known = tmp_path / "tmp" / "ray" / "ray_current_cluster"
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "tmp"))
    jobs.forget_cluster("127.0.0.1:6379")  # where there is none
    known.write_text("10.0.0.1:6379")
    jobs.forget_cluster("127.0.0.1:6379")
    assert known.read_text() == "10.0.0.1:6379"


@pytest.fixture
def record(tmp_path: Path) -> Callable[[jobs.Head], Path]:
    def write(head: jobs.Head) -> Path:
        path = jobs.head_file()
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(head.__dict__))
        return path

    return write


def test_another_process_under_the_number_of_a_head_is_not_taken_for_it(record: Callable[[jobs.Head], Path]) -> None:
    path = record(jobs.Head(os.getpid(), 1.0, "127.0.0.1:1", "http://127.0.0.1:2"))
    assert jobs.recorded_head() is None
    jobs.end_head(jobs.Head(**json.loads(path.read_text())))  # does not end this process
    assert not path.exists()
    path.write_text("{")
    assert jobs.recorded_head() is None
