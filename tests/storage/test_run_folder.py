"""The checkpoints of a run's folder: which there are, which is best, and which are pruned."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from builders import (
    assert_same_checkpoint,
    json_values,
    make_checkpoint,
)
from ssm_metarl.storage.checkpoint import load_checkpoint, save_checkpoint
from ssm_metarl.storage.contents import CheckpointError
from ssm_metarl.storage.run_folder import best_return, check_new, checkpoints, mark_best, prune, resolve_checkpoint


def names(run: Path) -> list[str]:
    return [path.name for path in checkpoints(run)]


class TestRun:
    def test_by_iteration(self, run: Path) -> None:
        order = [9, 10, 30, 2_000_000, 10_000_000]
        assert names(run) == [f"checkpoint_{i:06d}" for i in order]
        assert [load_checkpoint(path).progress["iteration"] for path in checkpoints(run)] == order

    def test_what_is_no_checkpoint_is_not_listed(self, run: Path) -> None:
        before = names(run)
        for other in ("checkpoint_", "checkpoint_-00001", "checkpoint_00000x", "xcheckpoint_000001", "rsi"):
            shutil.copytree(run / before[0], run / other)
        (run / "checkpoint_000002").mkdir()
        (run / "checkpoint_000003").write_text("")
        shutil.copytree(run / before[0], run / "checkpoint_000004")
        (run / "checkpoint_000004" / "manifest.json").unlink()
        assert names(run) == before
        assert checkpoints(run / "absent") == []
        assert checkpoints(run / "checkpoint_000003") == []

    def test_a_run_means_its_best_or_else_its_last(self, run: Path) -> None:
        assert resolve_checkpoint(run) == run / "checkpoint_10000000"
        mark_best(run, run / "checkpoint_000010", -17.5)
        assert json.loads((run / "best.json").read_bytes()) == {
            "checkpoint": "checkpoint_000010",
            "return": -17.5,
        }
        assert resolve_checkpoint(str(run)) == run / "checkpoint_000010"
        mark_best(run, run / "checkpoint_000030", -16.0)
        assert resolve_checkpoint(run) == run / "checkpoint_000030"
        assert resolve_checkpoint(run / "checkpoint_000009") == run / "checkpoint_000009"
        assert best_return(run) == -16.0

    def test_a_level_is_no_return(self, run: Path) -> None:
        mark_best(run, run / "checkpoint_000010", 0.5, "level")
        assert json.loads((run / "best.json").read_bytes()) == {"checkpoint": "checkpoint_000010", "level": 0.5}
        assert resolve_checkpoint(run) == run / "checkpoint_000010"
        assert best_return(run) is None

    def test_a_run_without_checkpoint(self, tmp_path: Path) -> None:
        for path, reason in [(tmp_path, "holds no checkpoint"), (tmp_path / "absent", "no such folder")]:
            with pytest.raises(CheckpointError, match=reason) as error:
                resolve_checkpoint(path)
            assert str(path) in str(error.value)

    @given(content=st.binary(max_size=40) | json_values.map(lambda value: json.dumps(value).encode()))
    @example(b'{"checkpoint": "../elsewhere", "return": 1.0}')
    @example(b'{"checkpoint": "checkpoint_000001", "return": 1.0}')
    @example(b'{"checkpoint": "checkpoint_000777", "return": 1.0}')
    @example(b"[" * 100_000)
    @settings(max_examples=50)
    def test_a_damaged_best_json_is_an_error_and_costs_no_checkpoint(self, folder: Path, content: bytes) -> None:
        run = folder.parent
        (run / "best.json").write_bytes(content)
        try:
            if b"_000001" in content:
                assert resolve_checkpoint(run) == folder
            else:
                with pytest.raises(CheckpointError, match=r"best\.json"):
                    resolve_checkpoint(run)
            prune(run)
            assert checkpoints(run) == [folder]
        finally:
            (run / "best.json").unlink()

    def test_pruning_keeps_the_last_and_the_best(self, run: Path) -> None:
        mark_best(run, run / "checkpoint_000009", 1.0)
        (run / "metrics.jsonl").write_text("")
        prune(run)
        assert names(run) == [
            "checkpoint_000009",
            "checkpoint_000030",
            "checkpoint_2000000",
            "checkpoint_10000000",
        ]
        prune(run, keep_last=1)
        assert names(run) == ["checkpoint_000009", "checkpoint_10000000"]
        mark_best(run, run / "checkpoint_10000000", 2.0)
        prune(run, keep_last=1)
        assert names(run) == ["checkpoint_10000000"]
        assert sorted(path.name for path in run.iterdir()) == [
            "best.json",
            "checkpoint_10000000",
            "metrics.jsonl",
        ]
        prune(run / "absent")

    def test_nothing_is_deleted_while_the_best_cannot_be_told(self, run: Path) -> None:
        (run / "best.json").write_text("{")
        prune(run, keep_last=1)
        assert len(names(run)) == 5

    def test_only_our_leftovers_are_deleted(self, run: Path) -> None:
        leftover = run / f".checkpoint_000031.{'0' * 32}.tmp"
        shutil.copytree(run / "checkpoint_000009", leftover)
        (run / f".best.json.{'f' * 32}.tmp").write_text("{")
        (run / ".old").mkdir()
        (run / ".checkpoint_000031.tmp").mkdir()
        assert len(names(run)) == 5
        prune(run, keep_last=5)
        assert len(names(run)) == 5
        assert sorted(path.name for path in run.glob(".*")) == [".checkpoint_000031.tmp", ".old"]

    def test_a_linked_checkpoint_is_unlinked_and_its_target_stays(self, run: Path, tmp_path: Path) -> None:
        target = save_checkpoint(tmp_path / "elsewhere" / "kept", make_checkpoint(1))
        (run / "checkpoint_000001").symlink_to(target)
        prune(run, keep_last=5)
        assert len(names(run)) == 5
        assert_same_checkpoint(load_checkpoint(target), make_checkpoint(1))

    @pytest.mark.parametrize("keep_last", [0, -1])
    def test_the_last_is_never_pruned(self, run: Path, keep_last: int) -> None:
        with pytest.raises(ValueError, match="keep_last"):
            prune(run, keep_last)
        assert len(names(run)) == 5

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_the_best_has_a_finite_return(self, run: Path, value: float) -> None:
        with pytest.raises(ValueError, match="finite"):
            mark_best(run, run / "checkpoint_000009", value)
        assert not (run / "best.json").exists()

    def test_the_best_is_a_checkpoint_of_the_run(self, run: Path) -> None:
        with pytest.raises(CheckpointError, match="checkpoint_000777 is not a complete checkpoint of"):
            mark_best(run, run / "checkpoint_000777", 1.0)
        assert not (run / "best.json").exists()


def test_a_run_that_was_killed_as_it_began_can_begin_again(tmp_path: Path) -> None:
    """It has a record, and nothing to resume from; a folder of a person's own is refused all the same."""
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(ValueError, match="is not empty"):
        check_new(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    check_new(tmp_path)
    (tmp_path / "checkpoint_000000").mkdir()
    with pytest.raises(ValueError, match="is not empty"):
        check_new(tmp_path)
