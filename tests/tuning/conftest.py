"""What the tests of simulated runs share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither waits for the disk nor draws many resamples."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    monkeypatch.setattr("ssm_metarl.tuning.metrics.RESAMPLES", 5)


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[Path]:
    """One after the other, each new."""
    return (tmp_path / str(number) for number in range(1000))
