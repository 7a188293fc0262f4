"""A copy beside a run: who may write it, and that the run waits for nothing but a stated time at its end."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from object_store import ObjectStore, Proxy, proxy
from ssm_metarl.storage import run_copy
from ssm_metarl.storage.lock import Holder, RunInUse
from ssm_metarl.storage.remote import Remote
from ssm_metarl.storage.run_copy import OWNER, RunCopy
from ssm_metarl.storage.uri import StorageError, join

FILES = ("policy.safetensors", "optimizer.safetensors", "config.json", "progress.json", "manifest.json")
FOREIGN = Holder("1", "elsewhere", "another boot", 4711, 1.0, "2026-01-01 00:00:00")


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_copy, "SETTLE", 0.05)


@pytest.fixture
def way(s3: ObjectStore) -> Iterator[Proxy]:
    """A proxy before the server."""
    with proxy(s3) as found:
        yield found


def save(run: Path, number: int) -> None:
    """Something in the place of a checkpoint, and lines."""
    folder = run / f"checkpoint_{number:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (folder / name).write_text(f"{number} {name}")
    (run / "metrics.jsonl").write_text(f"{number}")
    (run / "best.json").write_text(f"{number}")


def there(uri: str) -> set[str]:
    with Remote(uri) as remote:
        return {name for name in remote.files() if not name.startswith(".")}


def here(run: Path) -> set[str]:
    return {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def put_owner(uri: str, holder: Holder) -> None:
    with Remote(uri) as remote:
        remote.put({OWNER: holder.content()})


def test_a_run_is_followed_and_its_end_lets_others_write(tmp_path: Path, s3: ObjectStore) -> None:
    run, uri = tmp_path / "run", join(s3.uri("followed"), "my rün #1 100%")
    said: list[str] = []
    copy = RunCopy(run, uri, say=said.append)
    save(run, 0)
    copy.open(resume=False)
    for number in (1, 2, 3):
        save(run, number)
        shutil.rmtree(run / f"checkpoint_{number - 1:06d}")
        copy.update()
    assert copy.close()
    assert there(uri) == here(run)
    assert (said, copy.summary()["complete"]) == ([], True)
    with Remote(uri) as remote:
        assert OWNER not in remote.files()
    again = RunCopy(tmp_path / "elsewhere", uri, say=said.append)
    again.open(resume=True)
    assert again.close()
    assert here(tmp_path / "elsewhere") == here(run)
    assert said[0].startswith(
        "Fetched the run from its copy at s3://***@bucket/followed/my%20r%C3%BCn%20%231%20100%25?"
    )


def test_one_checkpoint_is_a_few_rounds_of_parallel_requests(tmp_path: Path, s3: ObjectStore, way: Proxy) -> None:
    run, uri = tmp_path / "run", s3.uri("rounds", way.port)
    save(run, 0)
    with RunCopy(run, uri) as copy:
        copy.open(resume=False)
        until(lambda: there(s3.uri("rounds")) == here(run))
        way.fault, way.delay = "late", 0.3
        save(run, 1)
        before, begin = len(s3.lines), time.monotonic()
        copy.update()
        assert time.monotonic() - begin < 0.2, "the run does not wait"
        until(lambda: any("best.json" in line for line in s3.lines[before:]))
        # Who owns the copy (two requests), files, manifest, pointer.
        assert time.monotonic() - begin < 8 * way.delay
        written = [line for line in s3.lines[before:] if line.startswith("PUT")]
        assert len(written) == len(FILES) + 2
        way.fault = "none"


class TestFirstWrite:
    """Before anything trains it is known whether the copy can be written."""

    @pytest.mark.parametrize(
        ("wrong", "sentence"),
        [
            (("bucket/", "nobucket/"), "cannot be written: The specified bucket does not exist."),
            (("region=", "regionn="), "cannot be listed: Unexpected query parameter in S3 URI: 'regionn'."),
        ],
    )
    def test_what_is_wrong_is_one_sentence(
        self, tmp_path: Path, s3: ObjectStore, wrong: tuple[str, str], sentence: str
    ) -> None:
        copy = RunCopy(tmp_path / "run", s3.uri("first").replace(*wrong))
        with pytest.raises(StorageError) as error, copy:
            copy.open(resume=False)
        assert str(error.value).startswith("s3://***@")
        assert str(error.value).endswith(sentence)
        assert not (tmp_path / "run").exists()

    def test_storage_that_does_not_answer_is_given_up_after_a_stated_time(
        self, tmp_path: Path, s3: ObjectStore, way: Proxy
    ) -> None:
        way.fault = "stall"
        copy, begin = RunCopy(tmp_path / "run", s3.uri("first", way.port), patience=0.5), time.monotonic()
        with pytest.raises(StorageError, match=r"does not answer\.$"), copy:
            copy.open(resume=False)
        assert time.monotonic() - begin < 5


class TestOwner:
    """Two runs never write one copy."""

    def test_a_new_run_is_refused_where_there_is_one(self, tmp_path: Path, s3: ObjectStore) -> None:
        uri = s3.uri("taken")
        save(tmp_path / "first", 7)
        with RunCopy(tmp_path / "first", uri) as copy:
            copy.open(resume=False)
        before = there(uri)
        with pytest.raises(StorageError, match=r"holds a run already \(checkpoint_000007\): resume it, or"):
            RunCopy(tmp_path / "second", uri).open(resume=False)
        assert there(uri) == before

    def test_another_process_keeps_it_while_it_gives_signs_of_life(
        self, tmp_path: Path, s3: ObjectStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        uri = s3.uri("leased")
        put_owner(uri, FOREIGN)
        sentence = (
            r"is written by process 4711 on elsewhere since 2026-01-01 00:00:00\. If it has died, try again in \d+"
        )
        with pytest.raises(RunInUse, match=sentence):
            RunCopy(tmp_path / "run", uri).open(resume=False)
        monkeypatch.setattr(run_copy, "LEASE", 0)
        with RunCopy(tmp_path / "run", uri) as copy:
            copy.open(resume=False)

    def test_a_process_of_this_machine_keeps_it_while_it_lives(self, tmp_path: Path, s3: ObjectStore) -> None:
        uri, living = s3.uri("living"), Holder.here()
        put_owner(uri, living)
        with pytest.raises(RunInUse, match=f"process {living.pid} on"):
            RunCopy(tmp_path / "run", uri).open(resume=False)
        put_owner(uri, Holder("1", living.host, living.boot, 2**22 + 1, 1.0, "then"))
        with RunCopy(tmp_path / "run", uri) as copy:
            copy.open(resume=False)

    def test_a_copy_that_another_took_is_left_alone(self, tmp_path: Path, s3: ObjectStore) -> None:
        uri, said = s3.uri("lost"), list[str]()
        save(tmp_path / "run", 1)
        copy = RunCopy(tmp_path / "run", uri, say=said.append)
        copy.open(resume=False)
        until(lambda: there(uri) == here(tmp_path / "run"))
        put_owner(uri, FOREIGN)
        save(tmp_path / "run", 2)
        copy.update()
        until(lambda: copy.behind_since)
        assert not copy.close()
        assert not any("checkpoint_000002" in name for name in there(uri))
        assert "is written by process 4711 on elsewhere" in said[0]
        assert not copy.summary()["complete"]


class TestFaults:
    """The storage fails while a run goes on."""

    @pytest.mark.parametrize("fault", ["stall", pytest.param("refuse", marks=pytest.mark.slow)])
    def test_a_copy_falls_behind_and_catches_up(self, tmp_path: Path, s3: ObjectStore, way: Proxy, fault: str) -> None:
        uri, said = s3.uri(f"behind-{fault}", way.port), list[str]()
        save(tmp_path / "run", 1)
        copy = RunCopy(tmp_path / "run", uri, say=said.append, patience=3.0)
        copy.open(resume=False)
        until(lambda: there(s3.uri(f"behind-{fault}")) == here(tmp_path / "run"))
        way.fault = fault  # type: ignore[assignment]
        for number in (2, 3):
            save(tmp_path / "run", number)
            begin = time.monotonic()
            copy.update()
            assert time.monotonic() - begin < 0.2
        until(lambda: said)
        assert said[0].startswith("The copy is behind since ")
        assert not copy.summary()["complete"]
        way.fault = "none"
        until(lambda: len(said) == 2)
        assert "is up to date again, after" in said[1]
        assert copy.close()
        assert there(s3.uri(f"behind-{fault}")) == here(tmp_path / "run")

    def test_the_end_waits_for_a_stated_time_only(self, tmp_path: Path, s3: ObjectStore, way: Proxy) -> None:
        said: list[str] = []
        save(tmp_path / "run", 1)
        copy = RunCopy(tmp_path / "run", s3.uri("stalled", way.port), say=said.append)  # patience: a minute
        copy.open(resume=False)
        until(lambda: there(s3.uri("stalled")) == here(tmp_path / "run"))
        way.fault = "stall"
        save(tmp_path / "run", 2)
        copy.update()
        begin = time.monotonic()
        assert not copy.close(wait=0.5)
        assert time.monotonic() - begin < 3, "no request is waited for"
        assert said[-1].startswith("The copy at s3://***@bucket/stalled?")
        assert "is incomplete: it is behind since " in said[-1]
        assert copy.summary()["behind_since"]


def test_members_write_checkpoints_and_others_leave_requests(
    tmp_path: Path, s3: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of the copy of `evolve`: of checkpoints in the making nothing is deleted."""
    monkeypatch.setattr(run_copy, "POLL", 0.1)
    run, uri = tmp_path / "run", s3.uri("evolved")
    run.mkdir()
    with RunCopy(run, uri, ("rsi/checkpoints",), "rsi/requests") as copy:
        copy.open(resume=False)
        with Remote(uri) as remote:
            for name in ("a", "b", "making"):
                remote.put({f"rsi/checkpoints/{name}/{file}": b"" for file in FILES})
            remote.put({"rsi/requests/1.json": b"{}"})
            copy.keep("rsi/checkpoints", ["a", "b"])
            copy.keep("rsi/checkpoints", ["b"])
            until(lambda: not any(name.startswith("rsi/checkpoints/a/") for name in remote.files()))
            assert {name.split("/")[2] for name in remote.files("rsi/checkpoints")} == {"b", "making"}
            until(lambda: (run / "rsi" / "requests" / "1.json").exists())
            (run / "rsi" / "requests" / "1.json").unlink()
            copy.update()
            until(lambda: "rsi/requests/1.json" not in remote.files())
            time.sleep(0.3)
            assert not (run / "rsi" / "requests" / "1.json").exists(), "carried out once"
