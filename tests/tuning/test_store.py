"""A crash at any moment loses no decision; what is damaged or foreign is refused in one sentence."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import make_checkpoint
from simulated import new_population
from ssm_metarl.storage.checkpoint import save_checkpoint
from ssm_metarl.storage.contents import CheckpointError
from ssm_metarl.tuning.records import Record
from ssm_metarl.tuning.store import FORMAT_VERSION, RunStore, read_state, request_rollback


def tiny_checkpoint(path: Path) -> Path:
    """A complete checkpoint of a small policy."""
    return save_checkpoint(path, make_checkpoint())


@functools.cache
def beginning() -> str:
    """The state of a run that has not begun."""
    with tempfile.TemporaryDirectory() as folder:
        new_population(Path(folder), cycles=1)
        return (Path(folder) / "rsi" / "state.json").read_text()


def state_with(**changes: Any) -> dict[str, Any]:
    """That state with some values changed."""
    return {**json.loads(beginning()), **changes}


def record_of(name: str) -> dict[str, Any]:
    """What the archive knows of a checkpoint."""
    return asdict(Record(name=name, iteration=1, env_steps=1600, cycle=0, config=state_with()["base"]))


def event_of(number: int) -> dict[str, Any]:
    """A decision with a number, and text that a careless reader takes for several lines."""
    spent = {"total": 0, "losers": 0, "charged": 0, "assessments": 0}
    place = {"time": 0.0, "cycle": 0, "phase": "stretch", "iteration": 0, "env_steps": 0, "spent": spent}
    return {**place, "decision": "failed", "member": 0, "reason": "a\u2028b\n", "number": number}


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
    """Commits numbered events as `Population` does: it counts what it has logged, and reads it back on resume."""

    def __init__(self, store: RunStore, state: dict[str, Any] | None = None) -> None:
        self.store = store
        self.logged = 0 if state is None else state["events_before"] + len(state["events"])

    def commit(self, count: int) -> None:
        events = [event_of(self.logged + i) for i in range(count)]
        self.store.commit(state_with(events_before=self.logged, committed=self.logged + count), events)
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
    store.commit(state_with())
    before = sorted(path.name for path in store.folder.iterdir())
    with pytest.raises(TypeError):
        store.commit(state_with(more=object()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.replace", _killed)
        with pytest.raises(Killed):
            store.commit(state_with(events_before=7))
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
        (_cut, r"state\.json is not valid JSON"),
        (_no_text, r"state\.json is not valid JSON"),
        (_folder, r"state\.json is unreadable: Is a directory"),
        (_content([1]), r"state\.json is foreign: it holds no JSON object"),
        (_content({"generation": 3}), r"state\.json is of format None"),
        (_content({"format": 1, "generation": 3}), r"state\.json is of format 1, but this version .* reads 3"),
        (_content({"format": FORMAT_VERSION + 1}), r"state\.json is of format 4, but this version .* reads 3"),
    ],
    ids=["missing", "cut", "no text", "a folder", "a list", "foreign", "older", "newer"],
)
def test_a_damaged_state_is_one_sentence(tmp_path: Path, damage: Callable[[Path], None], match: str) -> None:
    store = RunStore(tmp_path)
    store.create()
    store.commit(state_with())
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
    with pytest.raises(ValueError, match="is no run of evolve"):
        read_state(tmp_path / "file")


# --- Checkpoints and requests -----------------------------------------------------------------------------


def test_pruning_deletes_all_that_is_not_kept(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.create()
    names = ["iteration_000001_000001", "iteration_000001_000001_mean", ".iteration_000001_000001.0123.tmp", "start"]
    for name in names:
        (store.checkpoints / name).mkdir()
        (store.checkpoints / name / "content").write_text(name)
    store.prune({names[1], "never there"})
    assert [path.name for path in store.checkpoints.iterdir()] == [names[1]]
    assert (store.checkpoints / names[1] / "content").read_text() == names[1]


def test_a_rollback_is_asked_for_by_name_or_path(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.create()
    paths = [tiny_checkpoint(store.checkpoints / f"iteration_00000{i}_000000") for i in range(3)]
    store.commit(state_with(archive={path.name: record_of(path.name) for path in paths}))
    asked = [paths[2].name, str(paths[0]), paths[1].name]
    files = [request_rollback(tmp_path, name) for name in asked]
    assert store.requests() == list(zip(files, [paths[2].name, paths[0].name, paths[1].name]))
    assert all(file.parent == tmp_path / "rsi" / "requests" for file in files)


def test_a_rollback_to_what_the_run_does_not_keep_is_refused(tmp_path: Path) -> None:
    """Unknown; in the archive but deleted; on disk but not in the archive; damaged."""
    store = RunStore(tmp_path)
    store.create()
    good = tiny_checkpoint(store.checkpoints / "iteration_000001_000000")
    damaged = tiny_checkpoint(store.checkpoints / "iteration_000002_000000")
    stray = tiny_checkpoint(store.checkpoints / "iteration_000003_000000")
    archive = {name: record_of(name) for name in (good.name, damaged.name, "iteration_000004_000000")}
    store.commit(state_with(archive=archive))
    (damaged / "policy.safetensors").write_bytes(b"")
    for name in ("iteration_000009_000009", "iteration_000004_000000", stray.name, "../../etc", ""):
        with pytest.raises(
            ValueError, match=r"keeps no checkpoint .*; it has iteration_000001_000000, iteration_000002_"
        ):
            request_rollback(tmp_path, name)
    with pytest.raises(CheckpointError, match=r"policy\.safetensors is truncated or altered"):
        request_rollback(tmp_path, damaged.name)
    assert store.requests() == []
    store.commit(state_with(archive={}))
    with pytest.raises(ValueError, match="it has none"):
        request_rollback(tmp_path, good.name)


def test_a_run_from_before_its_first_request_has_none(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    assert store.requests() == []
    store.create()
    shutil.rmtree(tmp_path / "rsi" / "requests")
    assert store.requests() == []
    assert store.request("x").is_file()
