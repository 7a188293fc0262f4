"""What all tests share: one BLAS thread, reproducible inputs, one local Ray, and no silent skips in CI."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

# Read when NumPy, torch, Ray and matplotlib are loaded: hence before any import of them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("MPLBACKEND", "Agg")
# What this user's runs and heads are remembered in is left alone.
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="ssm-metarl-state-")

from collections.abc import Iterator

import hypothesis
import pytest

TESTS = Path(__file__).resolve().parent
IN_CI = bool(os.environ.get("CI"))

hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, database=None, print_blob=True)
hypothesis.settings.load_profile("ci" if IN_CI else "local")


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local Ray of four logical CPUs for all tests that ask for it.

    Its workers find the helper modules beside this file: a class defined in one of them travels by reference.
    """
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
        object_store_memory=300 * 2**20,
        runtime_env={"env_vars": {"PYTHONPATH": str(TESTS)}},
        _node_ip_address="127.0.0.1",
    )
    yield
    ray.shutdown()


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training and evaluation fail where they would start Ray."""

    def refuse(num_workers: int, num_learners: int = 0, *, always: bool = False) -> None:
        assert num_workers == num_learners == 0, "Ray would have been started"
        assert not always, "Ray would have been started"

    for module in ("distributed.train", "evaluation.tasks"):
        monkeypatch.setattr(f"ssm_metarl.{module}.start_ray", refuse)


@pytest.fixture
def no_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No cluster, no head, an empty working folder."""
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """In CI a test that was to run and was skipped fails the run, and is named."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if IN_CI and reporter else []
    if not skipped:
        return
    reporter.ensure_newline()
    reporter.section("skipped, which CI counts as failed", red=True)
    for report in skipped:
        reporter.line(f"{report.nodeid}: {report.longrepr[2] if report.longrepr else ''}")
    if session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
