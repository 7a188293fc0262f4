"""Ray as a run starts or joins it."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from ssm_metarl.distributed import cluster
from ssm_metarl.distributed.cluster import start_ray


@pytest.fixture
def ray_starts(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of every `ray.init`, which starts nothing here."""
    starts: list[dict[str, Any]] = []

    def init(**how: Any) -> SimpleNamespace:
        starts.append(how)
        return SimpleNamespace(dashboard_url="127.0.0.1:8265")

    monkeypatch.setattr(cluster.ray, "init", init)
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: bool(starts))
    monkeypatch.setattr(cluster, "available_cores", lambda: 2)
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE"):  # another test's Ray may have set the mode
        monkeypatch.delenv(name, raising=False)
    return starts


@pytest.mark.parametrize("own", [False, True])
def test_a_mode_of_the_users_counts_but_where_the_cluster_is_our_own(
    monkeypatch: pytest.MonkeyPatch, own: bool
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    modes = []
    monkeypatch.setattr(cluster.ray_shim, "enable_token", lambda: modes.append(os.environ.get("RAY_AUTH_MODE")))
    cluster.send_token(own=own)
    assert modes == [None if own else "disabled"]


@pytest.mark.parametrize(("num_workers", "cpus"), [(1, 2), (2, 3), (5, 6)])
def test_a_ray_of_our_own_is_local_and_has_a_cpu_for_the_learner_and_each_worker(
    ray_starts: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], num_workers: int, cpus: int
) -> None:
    start_ray(0)
    assert ray_starts == []
    start_ray(num_workers)
    start_ray(num_workers)
    (how,) = ray_starts
    assert (how["address"], how["num_cpus"], how["dashboard_host"]) == ("local", cpus, "127.0.0.1")
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert capsys.readouterr() == ("", "Ray dashboard: http://127.0.0.1:8265\n")


def test_the_line_of_a_dashboard_that_asks_for_a_token_says_where_it_is(
    ray_starts: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster, "ensure_token", lambda: monkeypatch.setenv("RAY_AUTH_MODE", "token"))
    start_ray(1)
    line = "Ray dashboard: http://127.0.0.1:8265 (it asks for the token that `ray get-auth-token` prints)\n"
    assert capsys.readouterr() == ("", line)


def test_a_cluster_that_the_environment_names_is_joined(
    ray_starts: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    start_ray(4)
    (how,) = ray_starts
    assert {"address", "num_cpus"}.isdisjoint(how), "ray.init takes the address, and refuses a number of CPUs"
