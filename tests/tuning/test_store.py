"""A crash at any moment loses no decision; what is damaged or foreign is refused in one sentence."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssm_metarl.algorithms.parameters import expected_shapes
from ssm_metarl.algorithms.spec import PolicySpec
from ssm_metarl.storage.checkpoint import save_checkpoint
from ssm_metarl.storage.contents import Checkpoint, CheckpointError
from ssm_metarl.tuning.store import FORMAT_VERSION, RunStore, read_state, request_rollback


def tiny_checkpoint(path: Path) -> Path:
    """A complete checkpoint of the smallest policy."""
    spec = PolicySpec(1, 1, False, hidden_dim=1, state_dim=2)
    policy = {name: np.zeros(shape, np.float32) for name, shape in expected_shapes(spec).items()}
    return save_checkpoint(path, Checkpoint(spec, {}, {}, policy, {}))


@contextmanager
def new_store() -> Iterator[RunStore]:
    """Of a run that has begun, in a folder of its own: Hypothesis has no tmp_path."""
    with tempfile.TemporaryDirectory() as folder:
        store = RunStore(Path(folder))
        store.create()
        yield store


class Killed(BaseException):
    """The process is gone."""


class Journal:
    """Commits numbered events as `Evolution` does: it counts what it has logged, and reads it back on resume."""

    def __init__(self, store: RunStore, state: dict[str, Any] | None = None) -> None:
        self.store = store
        self.logged = 0 if state is None else state["events_before"] + len(state["events"])

    def commit(self, count: int) -> None:
        events = [{"number": self.logged + i, "text": "a\u2028b\n"} for i in range(count)]
        self.store.commit({"events_before": self.logged, "committed": self.logged + count}, events)
        self.logged += count


# --- Crashes ----------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(
    lives=st.lists(
        st.tuples(st.lists(st.integers(0, 3), max_size=4), st.integers(0, 3), st.sampled_from(["state", "log"])),
        max_size=4,
    ),
    torn=st.floats(0, 1),
)
def test_no_decision_is_lost_or_told_twice(lives: list[tuple[list[int], int, str]], torn: float) -> None:
    """Lives that end while the state is replaced, or while the log is written, at any byte of it."""
    with new_store() as store, pytest.MonkeyPatch.context() as fast, pytest.MonkeyPatch.context() as patch:
        fast.setattr("os.fsync", lambda descriptor: None)
        journal, told = Journal(store), 0
        journal.commit(1)
        for counts, last, where in lives:
            for count in counts:
                journal.commit(count)
            told = journal.logged
            if where == "state":
                patch.setattr("os.replace", _killed)
            else:
                patch.setattr(store, "_append", lambda events: _tear(store, events, torn))
                told += last
            with pytest.raises(Killed):
                journal.commit(last)
            patch.undo()
            whole = store._events.read_text().split("\n")[:-1]
            state = store.load()
            assert state["committed"] == told
            numbers = [event["number"] for event in store.events()]
            assert numbers == list(range(told))
            assert store._events.read_text().split("\n")[: len(whole)] == whole
            assert store.load() == state  # loading is no decision
            journal = Journal(store, state)


def _killed(*_: Any) -> None:
    raise Killed


def _tear(store: RunStore, events: Any, share: float) -> None:
    text = "".join(json.dumps(event) + "\n" for event in events)
    with store._events.open("a") as log:
        log.write(text[: round(share * len(text))])
    raise Killed


def test_a_failed_write_leaves_the_last_state_and_nothing_else(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.create()
    store.commit({"events_before": 0})
    before = sorted(path.name for path in store.folder.iterdir())
    with pytest.raises(TypeError):
        store.commit({"events_before": 0, "not JSON": object()})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.replace", _killed)
        with pytest.raises(Killed):
            store.commit({"events_before": 7})
    assert sorted(path.name for path in store.folder.iterdir()) == before
    assert store.load()["events_before"] == 0


def test_a_log_that_lost_lines_is_refused(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.create()
    journal = Journal(store)
    journal.commit(3)
    journal.commit(0)
    log = store.folder / "events.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:2]))
    with pytest.raises(ValueError, match=r"events\.jsonl has lost lines: 2 instead of 3\.$"):
        store.load()


def test_the_last_events_are_in_the_state_itself(tmp_path: Path) -> None:
    """Hence a crash of the machine may take the log's last lines with it."""
    store = RunStore(tmp_path)
    store.create()
    journal = Journal(store)
    journal.commit(2)
    journal.commit(3)
    log = store.folder / "events.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:2]))
    store.load()
    assert [event["number"] for event in store.events()] == [0, 1, 2, 3, 4]


# --- Reading ----------------------------------------------------------------------------------------------


def _no_state(path: Path) -> None:
    path.unlink()


def _cut(path: Path) -> None:
    path.write_text(path.read_text()[:-3])


def _no_text(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00")


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _content(values: Any) -> Callable[[Path], None]:
    return lambda path: path.write_text(json.dumps(values)) and None


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (_no_state, r"is no run of evolve: there is no .*state\.json"),
        (_cut, r"state\.json cannot be read"),
        (_no_text, r"state\.json cannot be read"),
        (_folder, r"state\.json cannot be read"),
        (_content([1]), r"state\.json is of format None"),
        (_content({"generation": 3}), r"state\.json is of format None"),
        (_content({"format": FORMAT_VERSION + 1}), r"state\.json is of format 2, but this version .* reads 1"),
    ],
    ids=["missing", "cut", "no text", "a folder", "a list", "foreign", "newer"],
)
def test_a_damaged_state_is_one_sentence(tmp_path: Path, damage: Callable[[Path], None], match: str) -> None:
    store = RunStore(tmp_path)
    store.create()
    store.commit({"events_before": 0})
    damage(tmp_path / "rsi" / "state.json")
    for read in (lambda: read_state(tmp_path), store.load, lambda: request_rollback(tmp_path, "x")):
        with pytest.raises(ValueError, match=match) as caught:
            read()
        assert "\n" not in str(caught.value)
        assert str(caught.value).endswith(".")


def test_no_folder_at_all_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no run of evolve"):
        read_state(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be read"):
        read_state(tmp_path / "file")


# --- Checkpoints and requests -----------------------------------------------------------------------------


def test_pruning_deletes_all_that_is_not_kept(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.create()
    names = ["generation_0001_trial_0", "generation_0001_trial_1", ".generation_0001_trial_0.0123.tmp", "start"]
    for name in names:
        (store.checkpoints / name).mkdir()
        (store.checkpoints / name / "content").write_text(name)
    store.prune({names[1], "never there"})
    assert [path.name for path in store.checkpoints.iterdir()] == [names[1]]
    assert (store.checkpoints / names[1] / "content").read_text() == names[1]


def test_a_rollback_is_asked_for_by_name_or_path(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.create()
    paths = [tiny_checkpoint(store.checkpoints / f"generation_000{i}_trial_0") for i in range(3)]
    store.commit({"events_before": 0, "archive": {path.name: {} for path in paths}})
    asked = [paths[2].name, str(paths[0]), paths[1].name]
    files = [request_rollback(tmp_path, name) for name in asked]
    assert store.requests() == list(zip(files, [paths[2].name, paths[0].name, paths[1].name]))
    assert all(file.parent == tmp_path / "rsi" / "requests" for file in files)


def test_a_rollback_to_what_the_run_does_not_keep_is_refused(tmp_path: Path) -> None:
    """Unknown; in the archive but deleted; on disk but not in the archive; damaged."""
    store = RunStore(tmp_path)
    store.create()
    good = tiny_checkpoint(store.checkpoints / "generation_0001_trial_0")
    damaged = tiny_checkpoint(store.checkpoints / "generation_0002_trial_0")
    stray = tiny_checkpoint(store.checkpoints / "generation_0003_trial_0")
    archive = {name: {} for name in (good.name, damaged.name, "generation_0004_trial_0")}
    store.commit({"events_before": 0, "archive": archive})
    (damaged / "policy.safetensors").write_bytes(b"")
    for name in ("generation_0009_trial_9", "generation_0004_trial_0", stray.name, "../../etc", ""):
        with pytest.raises(ValueError, match=r"keeps no checkpoint .*; it has generation_0001_trial_0, \w+_0002"):
            request_rollback(tmp_path, name)
    with pytest.raises(CheckpointError, match=r"policy\.safetensors is truncated or altered"):
        request_rollback(tmp_path, damaged.name)
    assert store.requests() == []
    store.commit({"events_before": 0, "archive": {}})
    with pytest.raises(ValueError, match="it has none"):
        request_rollback(tmp_path, good.name)


def test_a_run_from_before_its_first_request_has_none(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    assert store.requests() == []
    store.create()
    shutil.rmtree(tmp_path / "rsi" / "requests")
    assert store.requests() == []
    assert store.request("x").is_file()
