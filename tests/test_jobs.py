"""Background jobs without a cluster: what is sent, what is refused. The drills with real ones are in tests/cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray._private.runtime_env.packaging import create_package

from builders import package_files
from ssm_metarl.cli import job as job_cli
from ssm_metarl.cli.main import main
from ssm_metarl.distributed import jobs

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No cluster, no head, an empty working folder."""
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


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


def test_what_travels_with_a_job_is_the_whole_package(tmp_path: Path) -> None:
    """Packed as Ray packs ``py_modules``: the files that the links lead to, and nothing that Python compiled."""
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


def test_a_checkout_runs_without_being_installed() -> None:
    assert run(f"{IMPORTS}; print(ssm_metarl.tuning.evolve.__file__)", ROOT) == str(
        ROOT / "ssm_metarl/tuning/evolve.py"
    )


def test_paths_of_a_command_are_made_absolute(tmp_path: Path) -> None:
    here = tmp_path / "work"
    (here / "old").mkdir()
    command, run_dir = job_cli.prepared(["evolve", "--from", "old", "--storage=shared", "--seed", "1"], "runs")
    assert command[:5] == ["evolve", "--from", str(here / "old"), f"--storage={here / 'shared'}", "--seed"]
    assert run_dir is not None
    assert run_dir.startswith(str(here / "shared" / "navigation-2d-evolve-"))
    assert command[-2:] == ["--run-dir", run_dir]
    assert job_cli.prepared(["train", "--run_dir", "x", "--task", "old"], "runs") == (
        ["train", "--run-dir", str(here / "x"), "--task", "old"],
        str(here / "x"),
    )
    assert job_cli.prepared(["evaluate", "old"], "runs") == (["evaluate", str(here / "old")], None)
    command, run_dir = job_cli.prepared(["train"], "s3://bucket/runs")
    assert (run_dir or "").startswith("s3://bucket/runs/navigation-2d-train-")


def test_without_a_command_the_best_there_is_goes_on(tmp_path: Path) -> None:
    """The newest self-improving run, or the newest trained one, or initial weights."""
    runs = tmp_path / "work" / "runs"
    assert job_cli.prepared([], "runs")[0][:3] == ["evolve", "--generations", "0"]
    for age, name, file in ((3, "evolved", "rsi/state.json"), (2, "trained", "best.json"), (1, "other", "notes")):
        path = runs / name / file
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"checkpoint": "checkpoint_000001"}))
        os.utime(runs / name, (10**9 - age, 10**9 - age))
    (runs / "trained" / "checkpoint_000001").mkdir()
    (runs / "trained" / "checkpoint_000001" / "manifest.json").write_text("{}")
    os.utime(runs / "trained", (10**9, 10**9))
    best = str(runs / "trained" / "checkpoint_000001")
    assert job_cli.prepared([], "runs")[0][:5] == ["evolve", "--from", best, "--generations", "0"]
    os.utime(runs / "evolved", (10**9 + 1, 10**9 + 1))
    command, run_dir = job_cli.prepared([], "runs")
    assert command == ["evolve", "--resume", "--run-dir", str(runs / "evolved"), "--generations", "0"]
    assert run_dir == str(runs / "evolved")


@pytest.mark.parametrize(
    ("arguments", "sentence", "code"),
    [
        (["start", "--", "train", "--task", "navigatoin-2d"], "did you mean 'navigation-2d'?", 2),
        (["start", "--", "train", "--hidden-dim", "0"], "hidden_dim must be", 2),
        (["start", "--", "evolve", "--population", "1"], "population must be", 2),
        (["start", "--", "plot", "runs"], "A job can train, evolve or evaluate, not 'plot'.", 2),
        (["status"], "No cluster is known", 1),
        (["logs", "--follow"], "No cluster is known", 1),
        (["stop"], "No cluster is known", 1),
        (["list", "--json"], "No cluster is known", 1),
        (["shutdown"], "No head of this machine is running.", 1),
        (["list", "--address", "http://127.0.0.1:9"], "No Ray job server answers at http://127.0.0.1:9", 1),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
    code: int,
) -> None:
    monkeypatch.setattr(jobs, "start_head", lambda: pytest.fail("a head would have been started"))
    assert main(["job", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err.replace("\n", " ")
    assert "Traceback" not in err


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
    with pytest.raises(jobs.JobError, match=r"^The cluster at http://head:8265 runs Ray 2\.41\.0, but this"):
        jobs.connect("http://head:8265")


@pytest.fixture
def record(tmp_path: Path) -> Callable[[jobs.Head], Path]:
    def write(head: jobs.Head) -> Path:
        path = jobs.head_file()
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(head.__dict__))
        return path

    return write


def test_another_process_under_the_number_of_a_head_is_not_taken_for_it(record: Callable[[jobs.Head], Path]) -> None:
    path = record(jobs.Head(os.getpid(), 1.0, "127.0.0.2:1", "http://127.0.0.1:2"))
    assert jobs.recorded_head() is None
    jobs.end_head(jobs.Head(**json.loads(path.read_text())))  # does not end this process
    assert not path.exists()
    path.write_text("{")
    assert jobs.recorded_head() is None


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_the_status_of_a_run_is_read_where_the_run_is(tmp_path: Path, prefix: str) -> None:
    place = f"{prefix}{tmp_path}/run"
    assert job_cli._progress(place) == (None, None)
    (tmp_path / "run" / "rsi").mkdir(parents=True)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"iteration": 1}\n{"iteration": 2}\n')
    assert job_cli._progress(place) == (None, {"iteration": 2})
    state = {"format": 1, "generation": 3}
    (tmp_path / "run" / "rsi" / "state.json").write_text(json.dumps(state))
    assert job_cli._progress(place) == (state, None)
    assert job_cli._progress("nowhere://bucket/run") == (None, None)
