"""A self-improving run whose checkpoints are in an object store alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from object_store import ObjectStore, proxy
from scripted_trainers import ScriptedTrainer
from ssm_metarl.config import TrainConfig
from ssm_metarl.storage.checkpoint import load_checkpoint
from ssm_metarl.storage.remote import Remote
from ssm_metarl.storage.run_folder import resolve_checkpoint
from ssm_metarl.storage.uri import join
from ssm_metarl.tuning.config import EvolveConfig
from ssm_metarl.tuning.evolve import EvolveResult, evolve
from ssm_metarl.tuning.store import RunStore, request_rollback

OPTIONS = {"hidden_dim": 8, "state_dim": 4, "learner_threads": 1, "meta_batch": 20, "episodes": 4}
RULES = {"proposals": 2, "stretch": 2}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def go(run: Path, uri: str, resume: bool, cycles: int) -> EvolveResult:
    config, rules = TrainConfig.for_task("navigation-2d", **OPTIONS), EvolveConfig(**RULES, cycles=cycles)
    return evolve(config, rules, run, resume=resume, trainable=ScriptedTrainer, mirror=uri)


def test_it_goes_on_where_its_disk_is_lost(tmp_path: Path, s3: ObjectStore, ray_session: None) -> None:
    """From an empty folder, with a request to go back that was made meanwhile, through a late connection."""
    with proxy(s3) as way:
        way.fault, way.delay = "late", 0.05
        run, uri = tmp_path / "run", join(s3.uri("evolved runs", way.port), "run #1")
        best = go(run, uri, False, 1).state["progress"]["best"]
        shutil.rmtree(run)
        request_rollback(run, best, uri)
        assert not run.exists(), "it is left in the copy"
        result = go(run, uri, True, 2)
    assert result.state["progress"]["finished"] == "2 cycles"
    rolled = [event["checkpoint"] for event in RunStore(run).events() if event["decision"] == "rolled back"]
    assert rolled == [best]
    with Remote(join(s3.uri("evolved runs"), "run #1")) as remote:
        names = remote.files()
    kept = {name.split("/")[2] for name in names if name.startswith("rsi/checkpoints/")}
    assert kept == {each + mean for each in result.state["archive"] for mean in ("", "_mean")}
    assert not [name for name in names if name.startswith("rsi/requests/")]
    assert not [name for name in names if name.startswith(".")]
    assert result.checkpoint is not None
    assert load_checkpoint(resolve_checkpoint(join(s3.uri("evolved runs"), "run #1"))).progress["iteration"] > 0
