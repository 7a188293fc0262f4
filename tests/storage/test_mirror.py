"""A run's copy at a URI: complete at any moment, and enough to resume from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from builders import make_policy, make_spec
from ssm_metarl.cli.main import main
from ssm_metarl.config import TrainConfig
from ssm_metarl.distributed.train import train
from ssm_metarl.storage import mirror as storage_module
from ssm_metarl.storage.checkpoint import load_checkpoint, save_checkpoint
from ssm_metarl.storage.contents import Checkpoint
from ssm_metarl.storage.mirror import Mirror, local_folder, write_folder
from ssm_metarl.storage.run_folder import checkpoints

SMALL = {"meta_batch": 2, "episodes": 2, "hidden_dim": 8, "state_dim": 4, "epochs": 1, "learner_threads": 1}


def files(folder: Path) -> dict[str, bytes]:
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if not Path(name).name.startswith(".")}


def test_the_copy_follows_the_folder(tmp_path: Path) -> None:
    local, there = tmp_path / "run", tmp_path / "there"
    mirror = Mirror(local, f"file://{there}/", skip=["rsi/tune"])
    for name in ("a", "checkpoint_000001/manifest.json", "checkpoint_000001/x", "rsi/tune/y", ".hidden"):
        (local / name).parent.mkdir(parents=True, exist_ok=True)
        (local / name).write_text(name)
    mirror.push()
    assert set(files(there)) == {"a", "checkpoint_000001/manifest.json", "checkpoint_000001/x"}
    shutil.rmtree(local / "checkpoint_000001")
    (local / "a").write_text("changed")
    mirror.push()
    assert files(there) == {"a": b"changed"}
    assert [path.name for path in there.iterdir()] == ["a"]
    again = Mirror(tmp_path / "elsewhere", f"file://{there}")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "stale").write_text("")
    assert again.pull()
    assert files(tmp_path / "elsewhere") == {"a": b"changed"}
    (tmp_path / "elsewhere" / "a").unlink()
    again.push()
    assert files(there) == {}, "also what was fetched is followed"


def test_without_a_copy_nothing_is_fetched_or_deleted(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a").write_text("")
    assert not Mirror(tmp_path / "run", f"file://{tmp_path}/nowhere").pull()
    assert files(tmp_path / "run") == {"a": b""}
    with pytest.raises(FileNotFoundError, match="There is nothing at"):
        local_folder(f"file://{tmp_path}/nowhere", tmp_path)


def test_storage_of_no_known_kind_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^gopher://hole/runs cannot be used as storage: .*\.$"):
        Mirror(tmp_path, "gopher://hole/runs")


@pytest.mark.parametrize("crash_after", range(12))
def test_whenever_copying_ends_the_copy_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash_after: int
) -> None:
    """What it names is there, and every checkpoint with a manifest can be read."""
    spec = make_spec(hidden_dim=4, state_dim=2, observation_size=2, action_size=2, discrete=False)
    weights = make_policy(spec, 0).numpy_weights()
    local, there = tmp_path / "run", tmp_path / "there"

    def save(number: int) -> None:
        progress = {"iteration": number, "env_steps": 0}
        path = local / f"checkpoint_{number:06d}"
        save_checkpoint(path, Checkpoint(spec, TrainConfig().to_dict(), progress, weights, {}))
        (local / "best.json").write_text(json.dumps({"checkpoint": path.name, "return": number}))

    mirror = Mirror(local, f"file://{there}")
    save(1)
    mirror.push()
    save(2)
    shutil.rmtree(local / "checkpoint_000001")
    calls = 0

    def breaking(method: Any) -> Any:
        def run(self: Mirror, *arguments: Any) -> None:
            nonlocal calls
            calls += 1
            if calls > crash_after:
                raise OSError("the network is gone")
            method(self, *arguments)

        return run

    monkeypatch.setattr(storage_module.Mirror, "_send", breaking(Mirror._send))
    monkeypatch.setattr(storage_module.Mirror, "_delete", breaking(Mirror._delete))
    try:
        mirror.push()
    except OSError:
        assert crash_after < 11
    named = json.loads((there / "best.json").read_text())["checkpoint"]
    assert load_checkpoint(there / named).spec == spec
    for manifest in there.glob("*/manifest.json"):
        load_checkpoint(manifest.parent)


def test_a_checkpoint_goes_to_a_uri_and_comes_back(tmp_path: Path) -> None:
    spec = make_spec(hidden_dim=4, state_dim=2, observation_size=2, action_size=2, discrete=False)
    checkpoint = Checkpoint(spec, TrainConfig().to_dict(), {"iteration": 1}, make_policy(spec, 0).numpy_weights(), {})
    uri = f"file://{tmp_path}/there/checkpoint_000001"
    write_folder(uri, lambda folder: save_checkpoint(folder, checkpoint))
    (tmp_path / "here").mkdir()
    assert load_checkpoint(local_folder(uri, tmp_path / "here")).spec == spec
    assert local_folder(str(tmp_path), tmp_path) == tmp_path


def test_a_head_that_is_lost_with_its_disk_loses_no_finished_checkpoint(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/bucket/run"
    # A linear schedule would depend on the number of iterations, which the first run has fewer of.
    config = TrainConfig.for_task("navigation-2d", **SMALL, lr_schedule="constant", iterations=4, checkpoint_every=2)
    train(config, tmp_path / "quiet")
    train(TrainConfig.from_dict({**config.to_dict(), "iterations": 2}), tmp_path / "run", mirror=uri)
    shutil.rmtree(tmp_path / "run")
    result = train(config, tmp_path / "run", resume=True, mirror=uri)
    ours, theirs = (load_checkpoint(checkpoints(tmp_path / run)[-1]) for run in ("run", "quiet"))
    assert result.metrics["iteration"] == ours.progress["iteration"] == 4
    for name, value in theirs.policy.items():
        assert (ours.policy[name] == value).all()
    assert files(tmp_path / "bucket" / "run").keys() == files(tmp_path / "run").keys()


def test_storage_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    command = [*options, "--num-workers=0", "--eval-tasks=2", "--storage", f"file://{tmp_path}/bucket", "--json"]
    assert main(["train", *command, "--iterations=1", "--run-dir=one"]) == 0
    assert {"evaluation.json", "metrics.jsonl"} <= {path.name for path in (tmp_path / "bucket" / "one").iterdir()}
    shutil.rmtree(tmp_path / "one")
    capsys.readouterr()
    resume = ["train", "--resume", "--run-dir=one", f"--storage=file://{tmp_path}/bucket", "--iterations=2", "--json"]
    assert main([*resume, "--eval-tasks=2"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["iteration"] == 2
    assert main(["train", *command[:-3], "--storage", str(tmp_path / "shared"), "--iterations=1"]) == 0
    (run,) = (tmp_path / "shared").iterdir()
    assert checkpoints(run)
