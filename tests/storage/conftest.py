"""Checkpoints on a disk that nobody waits for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from builders import make_checkpoint
from object_store import ObjectStore, object_store
from ssm_metarl.storage.checkpoint import save_checkpoint


@pytest.fixture(scope="module", autouse=True)
def quick_disk() -> Iterator[None]:
    """Do not wait for the disk: no test here ends with a power failure."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that examples damage within `restored`."""
    return save_checkpoint(tmp_path_factory.mktemp("run") / "checkpoint_000001", make_checkpoint())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder of five checkpoints, none marked."""
    for i in (9, 10, 2_000_000, 10_000_000, 30):
        save_checkpoint(tmp_path / f"checkpoint_{i:06d}", make_checkpoint(i))
    return tmp_path


@pytest.fixture(scope="session")
def s3() -> Iterator[ObjectStore]:
    """An S3 server on the loopback address."""
    with object_store() as store:
        yield store
