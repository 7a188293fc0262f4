"""Checkpoints come back as they were saved, also after a crash at any moment."""

from __future__ import annotations

import builtins
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from builders import (
    CONTENT,
    FILES,
    assert_same_checkpoint,
    json_values,
    make_checkpoint,
    plain_specs,
)
from ssm_metarl.algorithms.parameters import expected_shapes
from ssm_metarl.algorithms.policy import SSMPolicy
from ssm_metarl.algorithms.spec import PolicySpec
from ssm_metarl.storage.checkpoint import load_checkpoint, save_checkpoint
from ssm_metarl.storage.run_folder import checkpoints, mark_best, prune, resolve_checkpoint

json_objects = st.dictionaries(st.text(), json_values, max_size=4)


class TestRoundTrip:
    @settings(max_examples=40)
    @given(plain_specs)
    def test_expected_shapes_are_those_of_the_policy(self, spec: PolicySpec) -> None:
        parameters = SSMPolicy(spec).named_parameters()
        assert list(expected_shapes(spec).items()) == [(name, tuple(p.shape)) for name, p in parameters]

    @settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(plain_specs, st.integers(0, 2**31), json_objects, json_objects)
    def test_what_is_loaded_is_what_was_saved(
        self, tmp_path: Path, spec: PolicySpec, seed: int, config: Any, progress: Any
    ) -> None:
        progress = {**progress, "iteration": seed, "env_steps": 0}
        saved = make_checkpoint(seed, spec, config=config, progress=progress)
        loaded = load_checkpoint(save_checkpoint(tmp_path / "checkpoint_000001", saved))
        assert_same_checkpoint(saved, loaded)
        assert list(loaded.policy) == list(expected_shapes(spec))
        # torch.from_numpy wants them writable
        assert all(array.flags.writeable for array in (*loaded.policy.values(), *loaded.optimizer.values()))

    @pytest.mark.parametrize("view", [lambda a: a.T.copy().T, lambda a: np.repeat(a, 2, 0)[::2]])
    def test_the_layout_in_memory_does_not_matter(self, tmp_path: Path, view: Callable[[Any], Any]) -> None:
        saved = make_checkpoint()
        strided = replace(saved, policy={name: view(array) for name, array in saved.policy.items()})
        assert not all(array.flags.c_contiguous for array in strided.policy.values())
        assert_same_checkpoint(saved, load_checkpoint(save_checkpoint(tmp_path / "a", strided)))

    def test_the_optimizer_may_be_empty(self, tmp_path: Path) -> None:
        assert load_checkpoint(save_checkpoint(tmp_path / "a", make_checkpoint(optimizer={}))).optimizer == {}

    def test_the_folder_is_as_documented(self, folder: Path) -> None:
        assert {path.name for path in folder.iterdir()} == set(FILES)
        manifest = json.loads((folder / "manifest.json").read_bytes())
        digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in CONTENT}
        sizes = {name: (folder / name).stat().st_size for name in CONTENT}
        assert manifest == {"format": 1, "sha256": digests, "bytes": sizes}
        config = json.loads((folder / "config.json").read_bytes())
        assert config == {"policy": make_checkpoint().spec.to_dict(), "train": make_checkpoint().config}

    def test_a_folder_of_any_name_in_new_or_relative_or_empty_places(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        saved = make_checkpoint()
        (tmp_path / "empty").mkdir()
        monkeypatch.chdir(tmp_path)
        for place in (tmp_path / "empty", tmp_path / "new" / "er" / "one", Path("here")):
            assert save_checkpoint(place, saved) == place
            assert_same_checkpoint(load_checkpoint(str(place)), saved)
            assert [path.name for path in place.parent.glob(".*")] == []

    def test_no_torch_and_no_ray(self) -> None:
        code = "import sys, ssm_metarl.storage.checkpoint; print({'torch', 'ray'} & set(sys.modules))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "set()"


class Crash(BaseException):
    """The process is gone: nothing that it would do afterwards happens."""


@contextmanager
def crash_at(call: int) -> Iterator[list[str]]:
    """Let the process die at its `call`-th change to the disk, and give the changes made until then."""
    calls: list[str] = []

    def dying(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def change(*args: Any, **kwargs: Any) -> Any:
            if name == "open" and "b" in str(args[1:]) and "r" in args[1]:
                return real(*args, **kwargs)
            if len(calls) >= call:
                raise Crash
            calls.append(f"write {Path(args[0]).name}" if name == "open" else name)
            return real(*args, **kwargs)

        return change

    with pytest.MonkeyPatch.context() as patch, suppress(Crash):
        for name in ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync"):
            patch.setattr(os, name, dying(name, getattr(os, name)))
        patch.setattr(builtins, "open", dying("open", open))
        yield calls


class TestCrash:
    """The process dies before any one of its changes to the disk, and a new one goes on."""

    @staticmethod
    def crashes(
        tmp_path: Path, act: Callable[[Path], Any], before: Callable[[Path], Any], first: int = 0
    ) -> Iterator[Path]:
        """For each change that `act` makes, a run in which it died before it; the last one is whole."""
        for call in range(first, 200):
            run = tmp_path / f"run_{call}"
            before(run)
            with crash_at(call) as calls:
                act(run)
            yield run
            if len(calls) < call:
                assert call > 5
                return
        raise AssertionError("never done")

    @pytest.mark.parametrize("replacing", [True, False])
    def test_saving(self, tmp_path: Path, replacing: bool) -> None:
        place = "checkpoint_000002"

        def before(run: Path) -> None:
            save_checkpoint(run / "checkpoint_000001", make_checkpoint(1))
            if replacing:
                save_checkpoint(run / place, make_checkpoint(2))
                mark_best(run, run / place, 0.0)

        seen = []
        for run in self.crashes(tmp_path, lambda run: save_checkpoint(run / place, make_checkpoint(3)), before):
            found = [load_checkpoint(path) for path in checkpoints(run)]
            seen.append([checkpoint.progress["iteration"] for checkpoint in found])
            for checkpoint in found:
                assert_same_checkpoint(checkpoint, make_checkpoint(checkpoint.progress["iteration"]))
            assert_same_checkpoint(load_checkpoint(resolve_checkpoint(run)), found[-1])
            if replacing:
                assert_same_checkpoint(load_checkpoint(run / place), found[-1])
                assert_same_checkpoint(load_checkpoint(resolve_checkpoint(run / place)), found[-1])
            # A new process tidies up without changing what is there, and can do what the old one could not.
            prune(run)
            assert_same_checkpoint(load_checkpoint(checkpoints(run)[-1]), found[-1])
            assert {path.name for path in run.iterdir()} <= {"checkpoint_000001", place, "best.json"}
            save_checkpoint(run / place, make_checkpoint(4))
            assert_same_checkpoint(load_checkpoint(run / place), make_checkpoint(4))
        assert seen == sorted(seen)
        assert seen[0] == ([1, 2] if replacing else [1])
        assert seen[-1] == [1, 3]

    def test_the_name_is_given_when_all_is_on_the_disk(self, tmp_path: Path) -> None:
        with crash_at(1000) as calls:
            save_checkpoint(tmp_path / "checkpoint_000001", make_checkpoint(1))
        written = [call for call in calls if call != "mkdir"]
        assert sorted(written[0:10:2]) == sorted(f"write {name}" for name in FILES)
        assert written[8] == "write manifest.json"
        assert written[1:10:2] == ["fsync"] * 5
        assert written[10:] == ["fsync", "rename", "fsync"]

    def test_dying_again_without_having_tidied_up(self, tmp_path: Path) -> None:
        def save(i: int) -> Callable[[Path], Any]:
            return lambda run: save_checkpoint(run / "checkpoint_000002", make_checkpoint(i))

        def left(run: Path) -> int:
            (found,) = checkpoints(run)
            return int(load_checkpoint(found).progress["iteration"])

        files_written = 10  # before that, a crash leaves no more than the hidden folder
        first = []
        for run in self.crashes(tmp_path, save(3), save(2), first=files_written):
            first.append(left(run))
            seen = []
            for call in range(files_written, 100):
                with crash_at(call) as calls:
                    save(4)(run)
                seen.append(left(run))
                if len(calls) < call:
                    break
            # The one that the first death left, until the new one has its name.
            assert [number for number, _ in groupby(seen)] == [first[-1], 4]
            assert_same_checkpoint(load_checkpoint(run / "checkpoint_000002"), make_checkpoint(4))
        assert [number for number, _ in groupby(first)] == [2, 3]

    def test_pruning(self, tmp_path: Path) -> None:
        def before(run: Path) -> None:
            for i in range(4):
                save_checkpoint(run / f"checkpoint_{i:06d}", make_checkpoint(i))
            mark_best(run, run / "checkpoint_000000", 1.0)

        seen = []
        for run in self.crashes(tmp_path, lambda run: prune(run, keep_last=1), before):
            seen.append([load_checkpoint(path).progress["iteration"] for path in checkpoints(run)])
            prune(run, keep_last=1)
            left = sorted(path.name for path in run.iterdir())
            assert left == ["best.json", "checkpoint_000000", "checkpoint_000003"]
        assert [found for found, _ in groupby(seen)] == [[0, 1, 2, 3], [0, 2, 3], [0, 3]]

    def test_marking_the_best(self, tmp_path: Path) -> None:
        def before(run: Path) -> None:
            for i in range(3):
                save_checkpoint(run / f"checkpoint_{i:06d}", make_checkpoint(i))
            mark_best(run, run / "checkpoint_000000", 1.0)

        def act(run: Path) -> None:
            mark_best(run, run / "checkpoint_000001", 2.0)
            mark_best(run, run / "checkpoint_000000", 3.0)

        seen = []
        for run in self.crashes(tmp_path, act, before):
            seen.append(resolve_checkpoint(run).name)
            prune(run)
            assert len(list(run.iterdir())) == 4
        assert [name for name, _ in groupby(seen)] == [f"checkpoint_{number:06d}" for number in (0, 1, 0)]

    @pytest.mark.parametrize("failing", ["mkdir", "fsync", "rename"])
    def test_a_full_disk_leaves_what_was_there(
        self, tmp_path: Path, failing: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        place = save_checkpoint(tmp_path / "checkpoint_000001", make_checkpoint(1))

        def full(*args: Any, **kwargs: Any) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, failing, full)
            with pytest.raises(OSError, match="No space"):
                save_checkpoint(place, make_checkpoint(2))
            with pytest.raises(OSError, match="No space"):
                save_checkpoint(tmp_path / "checkpoint_000002", make_checkpoint(2))
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_000001"]
        assert_same_checkpoint(load_checkpoint(place), make_checkpoint(1))
