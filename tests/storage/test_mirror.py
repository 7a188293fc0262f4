"""A run's copy at a URI: complete at any moment, and enough to resume from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from builders import make_policy, make_spec
from object_store import ObjectStore, proxy
from ssm_metarl.config import TrainConfig
from ssm_metarl.storage.arrow_process import _Storage
from ssm_metarl.storage.checkpoint import load_checkpoint, save_checkpoint
from ssm_metarl.storage.contents import Checkpoint
from ssm_metarl.storage.mirror import Mirror, fetch_checkpoint, local_folder, write_folder
from ssm_metarl.storage.remote import Remote, Unreachable
from ssm_metarl.storage.run_folder import resolve_checkpoint
from ssm_metarl.storage.run_record import checkpoint_to_resume, write_record
from ssm_metarl.storage.uri import StorageError, for_arrow

SPEC = make_spec(hidden_dim=4, state_dim=2, observation_size=2, action_size=2, discrete=False)


def files(folder: Path) -> dict[str, bytes]:
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if not Path(name).name.startswith(".")}


def checkpoint(number: int, seed: int = 0) -> Checkpoint:
    progress = {"iteration": number, "env_steps": 0}
    return Checkpoint(SPEC, TrainConfig().to_dict(), progress, make_policy(SPEC, seed).numpy_weights(), {})


def save(run: Path, number: int, seed: int = 0) -> None:
    """A checkpoint, which becomes the best, and the lines of the iterations so far."""
    path = save_checkpoint(run / f"checkpoint_{number:06d}", checkpoint(number, seed))
    (run / "best.json").write_text(json.dumps({"checkpoint": path.name, "return": number}))
    (run / "metrics.jsonl").write_text("".join(f'{{"iteration": {i + 1}}}\n' for i in range(number)))


@contextmanager
def mirrored(local: Path, uri: str, **options: Any) -> Iterator[Mirror]:
    with closing(Mirror(local, uri, **options)) as mirror:
        yield mirror


def push(mirror: Mirror) -> None:
    mirror.send(mirror.image())


def test_the_copy_follows_the_folder(tmp_path: Path) -> None:
    local, there = tmp_path / "run", tmp_path / "there"
    with mirrored(local, f"file://{there}/", skip=["rsi/tune"]) as mirror:
        for name in ("a", "checkpoint_000001/manifest.json", "checkpoint_000001/x", "rsi/tune/y", ".hidden"):
            (local / name).parent.mkdir(parents=True, exist_ok=True)
            (local / name).write_text(name)
        push(mirror)
        assert set(files(there)) == {"a", "checkpoint_000001/manifest.json", "checkpoint_000001/x"}
        shutil.rmtree(local / "checkpoint_000001")
        (local / "a").write_text("changed")
        (there / "theirs").write_text("")
        push(mirror)
        assert files(there) == {"a": b"changed", "theirs": b""}, "what is not ours stays"
        assert sorted(path.name for path in there.iterdir()) == ["a", "theirs"]


def test_storage_of_no_known_kind_is_one_sentence(tmp_path: Path) -> None:
    with mirrored(tmp_path, "gopher://key:secret@hole/runs") as mirror, pytest.raises(StorageError) as error:
        mirror.remote.files()
    assert str(error.value).startswith("gopher://***@hole/runs cannot be listed: ")
    assert str(error.value).endswith(".")


class TestResume:
    """The folder and its copy, of which one has come further."""

    @pytest.fixture
    def uri(self, tmp_path: Path) -> str:
        """A copy of a run of two checkpoints."""
        save(tmp_path / "first", 1)
        save(tmp_path / "first", 2)
        write_record(tmp_path / "first")
        with mirrored(tmp_path / "first", f"file://{tmp_path}/there") as mirror:
            push(mirror)
        return mirror.uri

    def test_an_empty_folder_gets_the_run(self, tmp_path: Path, uri: str) -> None:
        with mirrored(tmp_path / "second", uri) as mirror:
            sentence = mirror.pull()
        assert sentence == f"Fetched the run from its copy at {uri}, which has checkpoint_000002."
        assert files(tmp_path / "second") == files(tmp_path / "first")

    def test_a_folder_that_is_ahead_stays_as_it_is(self, tmp_path: Path, uri: str) -> None:
        save(tmp_path / "first", 3)
        (tmp_path / "first" / "my notes.txt").write_text("mine")
        before = files(tmp_path / "first")
        with mirrored(tmp_path / "first", uri) as mirror:
            assert mirror.pull() == (
                f"Going on from {tmp_path / 'first'}, which has checkpoint_000003; the copy at {uri} has "
                "checkpoint_000002 and is brought up to date."
            )
            assert files(tmp_path / "first") == before
            push(mirror)
        assert files(tmp_path / "there") == before

    def test_a_folder_that_is_behind_gets_what_is_newer_and_loses_nothing(self, tmp_path: Path, uri: str) -> None:
        shutil.copytree(tmp_path / "first", tmp_path / "second")
        shutil.rmtree(tmp_path / "second" / "checkpoint_000002")
        (tmp_path / "second" / "my notes.txt").write_text("mine")
        with mirrored(tmp_path / "second", uri) as mirror:
            assert str(mirror.pull()).endswith(f"checkpoint_000002; {tmp_path / 'second'} had checkpoint_000001.")
        assert files(tmp_path / "second") == {**files(tmp_path / "first"), "my notes.txt": b"mine"}

    def test_a_file_of_the_same_name_in_a_folder_without_a_run_is_kept(self, tmp_path: Path, uri: str) -> None:
        (tmp_path / "second").mkdir()
        (tmp_path / "second" / "metrics.jsonl").write_text("mine")
        with mirrored(tmp_path / "second", uri) as mirror:
            mirror.pull()
        assert files(tmp_path / "second") == {**files(tmp_path / "first"), "metrics.jsonl.local": b"mine"}

    def test_the_copy_of_another_run_is_refused(self, tmp_path: Path, uri: str) -> None:
        save(tmp_path / "second", 1)
        write_record(tmp_path / "second")
        before = files(tmp_path / "second")
        with mirrored(tmp_path / "second", uri) as mirror, pytest.raises(StorageError, match="is the copy of another"):
            mirror.pull()
        assert files(tmp_path / "second") == before

    def test_without_a_copy_nothing_is_fetched(self, tmp_path: Path) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "a").write_text("")
        with mirrored(tmp_path / "run", f"file://{tmp_path}/nowhere") as mirror:
            assert mirror.pull() is None
        assert files(tmp_path / "run") == {"a": b""}
        with pytest.raises(FileNotFoundError, match="There is nothing at"):
            local_folder(f"file://{tmp_path}/nowhere", tmp_path)

    def test_equal_checkpoints_are_not_sent_again(
        self, tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sent: list[str] = []
        before = Remote.put
        monkeypatch.setattr(Remote, "put", lambda remote, contents: sent.extend(contents) or before(remote, contents))
        with mirrored(tmp_path / "first", uri) as mirror:
            mirror.pull()
            push(mirror)
        assert not any(name.startswith("checkpoint_") for name in sent)


def whole(uri: str, folder: Path) -> int:
    """Fetch a copy to an empty folder, from which a run must be able to resume; its newest checkpoint."""
    shutil.rmtree(folder, ignore_errors=True)
    with mirrored(folder, uri) as mirror:
        mirror.pull()
    found = load_checkpoint(checkpoint_to_resume(folder)).progress["iteration"]
    load_checkpoint(resolve_checkpoint(folder))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert len(lines) >= found, "the lines of the iterations up to the checkpoint"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    load_checkpoint(resolve_checkpoint(fetch_checkpoint(uri, folder)))
    return int(found)


class InProcess:
    """Storage that does one request after another, in this process, and breaks after some that change it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left: int | None = None
        monkeypatch.setattr(Remote, "_all", lambda remote, done, requests: self._all(remote, requests))

    def _all(self, remote: Remote, requests: list[tuple[str, str, bytes]]) -> list[bytes | None]:
        storage, answers = _Storage(for_arrow(remote.uri)), list[bytes | None]()
        for do, name, content in requests:
            if self.left is not None and do not in ("get", "list"):
                self.left -= 1
                if self.left < 0:
                    raise Unreachable("the network is gone.")
            try:
                answers.append(getattr(storage, do)(name, content))
            except FileNotFoundError:
                answers.append(None)
        return answers


def test_every_prefix_of_a_push_is_a_copy_to_resume_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new checkpoint, one rewritten under its name, and one that is gone: what is broken off is gone on with."""
    storage, seeds, newest, count = InProcess(monkeypatch), set(), [], 0
    first, second = checkpoint(2, 0).policy, checkpoint(2, 1).policy
    for count in range(100):
        run, there = tmp_path / f"run{count}", tmp_path / f"there{count}"
        with mirrored(run, f"file://{there}") as mirror:
            save(run, 1)
            save(run, 2)
            push(mirror)
            shutil.rmtree(run / "checkpoint_000001")
            save(run, 2, seed=1)
            save(run, 3)
            storage.left = count
            try:
                push(mirror)
            except Unreachable:
                storage.left = None
                newest.append(whole(mirror.uri, tmp_path / "elsewhere"))
                with mirrored(tmp_path / "elsewhere" / "two", mirror.uri) as other:
                    other.fetch()
                weights = load_checkpoint(tmp_path / "elsewhere" / "two" / "checkpoint_000002").policy
                seeds |= {n for n, own in enumerate((first, second)) if all((weights[k] == own[k]).all() for k in own)}
                push(mirror)
                assert storage.left is None
            assert files(there) == files(run), "another try goes on where this one ended"
            assert not list(there.glob(".checkpoint*"))
            if storage.left is not None:
                break
    assert newest == sorted(newest)
    assert len(newest) > 15
    assert seeds == {0, 1}, "the checkpoint under the same name is the one or the other"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_every_prefix_of_a_push_to_an_object_store(tmp_path: Path, s3: ObjectStore) -> None:
    with proxy(s3) as way:
        for count in range(0, 40, 3):  # each refusal is tried three times by Arrow, which takes seconds
            run, uri = tmp_path / f"run{count}", s3.uri(f"prefixes/{count}", way.port)
            with mirrored(run, uri) as mirror:
                save(run, 1)
                push(mirror)
                save(run, 1, seed=1)
                save(run, 2)
                way.writes_left = count
                try:
                    push(mirror)
                    break
                except Unreachable:
                    way.writes_left, way.fault = None, "none"
                    assert whole(uri, tmp_path / "elsewhere") in (1, 2)
        assert count > 15


def test_a_checkpoint_goes_to_a_uri_and_comes_back(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/there/checkpoint_000001"
    write_folder(uri, lambda folder: save_checkpoint(folder, checkpoint(1)))
    (tmp_path / "here").mkdir()
    assert load_checkpoint(local_folder(uri, tmp_path / "here")).spec == SPEC
    assert local_folder(str(tmp_path), tmp_path) == tmp_path
    assert load_checkpoint(resolve_checkpoint(uri)).spec == SPEC
    with pytest.raises(StorageError, match="is neither a checkpoint nor a run"):
        resolve_checkpoint(f"file://{tmp_path}/nowhere")


def test_a_copy_leads_nowhere_outside_the_folder(tmp_path: Path) -> None:
    there = tmp_path / "there"
    for name in ("a", ".hidden", "rsi/.x/b"):
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        (there / name).write_text("")
    with mirrored(tmp_path / "run", f"file://{there}") as mirror:
        found = mirror.remote.files()
        found |= {"../up": found["a"], "x/../../up": found["a"]}
        mirror.fetch(found)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()].count("up") == 0
    assert list(files(tmp_path / "run")) == ["a"]
