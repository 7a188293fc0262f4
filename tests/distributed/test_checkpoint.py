"""Checkpoints come back as they were saved, survive a crash at any moment, and no damage goes unnoticed."""

from __future__ import annotations

import builtins
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ssm_metarl.algorithms.parameters import expected_shapes
from ssm_metarl.algorithms.policy import SSMPolicy
from ssm_metarl.algorithms.spec import PolicySpec
from ssm_metarl.storage.checkpoint import load_checkpoint, save_checkpoint
from ssm_metarl.storage.contents import FORMAT_VERSION, Checkpoint, CheckpointError
from ssm_metarl.storage.run_folder import checkpoints, mark_best, prune, resolve_checkpoint

CONTENT = ("policy.safetensors", "optimizer.safetensors", "config.json", "progress.json")
FILES = (*CONTENT, "manifest.json")

specs = st.builds(
    PolicySpec,
    observation_size=st.integers(1, 5),
    action_size=st.integers(1, 4),
    discrete=st.booleans(),
    hidden_dim=st.integers(1, 9),
    state_dim=st.integers(1, 5).map(lambda pairs: 2 * pairs),
    num_layers=st.integers(0, 3),
    gated=st.booleans(),
    inputs=st.sampled_from(["full", "observation"]),
    initial_std=st.floats(1e-3, 10.0),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
json_objects = st.dictionaries(st.text(), json_values, max_size=4)


def make_checkpoint(seed: int = 0, spec: PolicySpec | None = None, **changes: Any) -> Checkpoint:
    """A checkpoint of random numbers, all of which depend on the seed."""
    spec = spec or PolicySpec(3, 2, discrete=False, hidden_dim=4, state_dim=4)
    rng = np.random.default_rng(seed)
    policy = {name: rng.normal(size=shape).astype(np.float32) for name, shape in expected_shapes(spec).items()}
    optimizer = {f"exp_avg.{name}": rng.normal(size=a.shape).astype(np.float32) for name, a in policy.items()}
    optimizer["step"] = np.asarray(seed, np.int64)
    config = {"seed": seed, "task": "navigation-2d", "step_weights": [0.0, 1.0]}
    checkpoint = Checkpoint(spec, config, {"iteration": seed, "env_steps": 40_000 * seed}, policy, optimizer)
    return replace(checkpoint, **changes)


def assert_equal(a: Checkpoint, b: Checkpoint) -> None:
    """Equal to the bit, types included."""
    assert a.spec == b.spec
    assert json.dumps([a.config, a.progress]) == json.dumps([b.config, b.progress])
    for ours, theirs in ((a.policy, b.policy), (a.optimizer, b.optimizer)):
        assert set(ours) == set(theirs)
        for name, array in ours.items():
            assert array.dtype == theirs[name].dtype
            assert array.shape == theirs[name].shape
            assert array.tobytes() == theirs[name].tobytes()


def refused(path: Path, *words: str) -> str:
    """Loading fails with one sentence that has these words; returns it."""
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path)
    message = str(error.value)
    assert message.endswith(".")
    assert "\n" not in message
    assert len(message) < len(str(path)) + 500
    for word in words:
        assert word in message
    return message


def seal(folder: Path, **manifest: Any) -> None:
    """Write the manifest that belongs to the files as they are: damage that no digest gives away."""
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in CONTENT}
    values = {"format": FORMAT_VERSION, "sha256": digests} | manifest
    (folder / "manifest.json").write_text(json.dumps(values))


@contextmanager
def restored(folder: Path) -> Iterator[None]:
    """Put the files back after each example."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    try:
        yield
    finally:
        for name, content in before.items():
            if not (folder / name).is_file() or (folder / name).read_bytes() != content:
                (folder / name).unlink(missing_ok=True)
                (folder / name).write_bytes(content)


@pytest.fixture(scope="module", autouse=True)
def quick_disk() -> Iterator[None]:
    """Do not wait for the disk: no test here ends with a power failure."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that examples damage within ``restored``."""
    return save_checkpoint(tmp_path_factory.mktemp("run") / "checkpoint_000001", make_checkpoint())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder of five checkpoints, none marked."""
    for i in (9, 10, 2_000_000, 10_000_000, 30):
        save_checkpoint(tmp_path / f"checkpoint_{i:06d}", make_checkpoint(i))
    return tmp_path


def names(run: Path) -> list[str]:
    return [path.name for path in checkpoints(run)]


class TestRoundTrip:
    @settings(max_examples=40)
    @given(specs)
    def test_expected_shapes_are_those_of_the_policy(self, spec: PolicySpec) -> None:
        parameters = SSMPolicy(spec).named_parameters()
        assert list(expected_shapes(spec).items()) == [(name, tuple(p.shape)) for name, p in parameters]

    @settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(specs, st.integers(0, 2**31), json_objects, json_objects)
    def test_what_is_loaded_is_what_was_saved(
        self, tmp_path: Path, spec: PolicySpec, seed: int, config: Any, progress: Any
    ) -> None:
        saved = make_checkpoint(seed, spec, config=config, progress=progress)
        loaded = load_checkpoint(save_checkpoint(tmp_path / "checkpoint_000001", saved))
        assert_equal(saved, loaded)
        assert list(loaded.policy) == list(expected_shapes(spec))
        # torch.from_numpy wants them writable
        assert all(array.flags.writeable for array in (*loaded.policy.values(), *loaded.optimizer.values()))

    @pytest.mark.parametrize("view", [lambda a: a.T.copy().T, lambda a: np.repeat(a, 2, 0)[::2]])
    def test_the_layout_in_memory_does_not_matter(self, tmp_path: Path, view: Callable[[Any], Any]) -> None:
        saved = make_checkpoint()
        strided = replace(saved, policy={name: view(array) for name, array in saved.policy.items()})
        assert not all(array.flags.c_contiguous for array in strided.policy.values())
        assert_equal(saved, load_checkpoint(save_checkpoint(tmp_path / "a", strided)))

    def test_the_optimizer_may_be_empty(self, tmp_path: Path) -> None:
        assert load_checkpoint(save_checkpoint(tmp_path / "a", make_checkpoint(optimizer={}))).optimizer == {}

    def test_the_folder_is_as_documented(self, folder: Path) -> None:
        assert {path.name for path in folder.iterdir()} == set(FILES)
        manifest = json.loads((folder / "manifest.json").read_bytes())
        digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in CONTENT}
        assert manifest == {"format": 1, "sha256": digests}
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
            assert_equal(load_checkpoint(str(place)), saved)
            assert [path.name for path in place.parent.glob(".*")] == []

    def test_no_torch_and_no_ray(self) -> None:
        code = "import sys, ssm_metarl.storage.checkpoint; print({'torch', 'ray'} & set(sys.modules))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "set()"


def with_array(name: str, array: Any) -> Checkpoint:
    return make_checkpoint(1, policy=make_checkpoint(1).policy | {name: array})


class TestRefusedWhenSaving:
    @pytest.mark.parametrize(
        ("wrong", "file"),
        [
            (with_array("encoder.bias", np.array([0, 1, np.nan, 3], np.float32)), "policy.safetensors"),
            (with_array("policy.log_std", np.array([0, -np.inf], np.float32)), "policy.safetensors"),
            (with_array("encoder.bias", np.zeros(5, np.float32)), "policy.safetensors"),
            (with_array("encoder.bias", np.zeros((1, 4), np.float32)), "policy.safetensors"),
            (with_array("encoder.bias", np.zeros(4)), "policy.safetensors"),
            (with_array("encoder.bias", np.zeros(4, ">i4")), "policy.safetensors"),
            (with_array("encoder.bias", np.zeros(4, object)), "policy.safetensors"),
            (with_array("foreign", np.zeros(4, np.float32)), "policy.safetensors"),
            (with_array("__metadata__", np.zeros(4, np.float32)), "policy.safetensors"),
            (make_checkpoint(1, policy={}), "policy.safetensors"),
            (make_checkpoint(1, optimizer={"m": np.array([np.inf])}), "optimizer.safetensors"),
            (make_checkpoint(1, optimizer={"m": np.array(["text"])}), "optimizer.safetensors"),
            (make_checkpoint(1, optimizer={"\ud800": np.zeros(1)}), "optimizer.safetensors"),
            (make_checkpoint(1, config={"inner_lr": float("nan")}), "config.json"),
            (make_checkpoint(1, config={"path": Path("runs")}), "config.json"),
            (make_checkpoint(1, progress={"env_steps": np.int64(3)}), "progress.json"),
            (make_checkpoint(1, progress={"best": float("-inf")}), "progress.json"),
        ],
    )
    def test_what_could_not_be_loaded_is_not_written(self, tmp_path: Path, wrong: Checkpoint, file: str) -> None:
        place = save_checkpoint(tmp_path / "checkpoint_000001", make_checkpoint(0))
        for directory in (place, tmp_path / "checkpoint_000002"):
            with pytest.raises(CheckpointError, match=file) as error:
                save_checkpoint(directory, wrong)
            assert str(directory / file) in str(error.value)
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_000001"]
        assert_equal(load_checkpoint(place), make_checkpoint(0))

    def test_a_folder_of_something_else_is_not_replaced(self, tmp_path: Path) -> None:
        home = tmp_path / "home"
        home.mkdir()
        (home / "thesis.tex").write_text("precious")
        with pytest.raises(CheckpointError, match="home is not replaced"):
            save_checkpoint(home, make_checkpoint())
        assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == [
            "home",
            "home/thesis.tex",
        ]


class TestDamage:
    @pytest.mark.parametrize("name", FILES)
    def test_a_missing_file(self, folder: Path, name: str) -> None:
        with restored(folder):
            (folder / name).unlink()
            refused(folder, str(folder), name)

    @settings(max_examples=80)
    @given(name=st.sampled_from(FILES), data=st.data())
    def test_truncation(self, folder: Path, name: str, data: st.DataObject) -> None:
        content = (folder / name).read_bytes()
        length = data.draw(st.integers(0, len(content) - 1))
        with restored(folder):
            (folder / name).write_bytes(content[:length])
            refused(folder, str(folder / name))

    @settings(max_examples=100)
    @given(name=st.sampled_from(FILES), data=st.data())
    def test_flipped_bits(self, folder: Path, name: str, data: st.DataObject) -> None:
        content = bytearray((folder / name).read_bytes())
        for bit in data.draw(st.sets(st.integers(0, 8 * len(content) - 1), min_size=1, max_size=4)):
            content[bit // 8] ^= 1 << bit % 8
        with restored(folder):
            (folder / name).write_bytes(content)
            # Where the manifest was hit, the file whose digest no longer fits may be the one that is named.
            refused(folder, str(folder) if name == "manifest.json" else str(folder / name))

    def test_every_byte_and_every_length_of_the_manifest(self, folder: Path) -> None:
        """The manifest has no digest of its own, so what it says must be what it is written as."""
        content = (folder / "manifest.json").read_bytes()
        damaged = [content[:length] for length in range(len(content))]
        for i in range(len(content)):
            for bit in (i % 8, 5):  # the sixth bit is a letter's case
                damaged.append(content[:i] + bytes([content[i] ^ 1 << bit]) + content[i + 1 :])
        with restored(folder):
            for changed in damaged:
                (folder / "manifest.json").write_bytes(changed)
                with pytest.raises(CheckpointError):
                    load_checkpoint(folder)

    @settings(max_examples=100)
    @given(name=st.sampled_from(CONTENT), data=st.data())
    def test_damage_under_a_fitting_manifest_raises_nothing_else(
        self, folder: Path, name: str, data: st.DataObject
    ) -> None:
        content = bytearray((folder / name).read_bytes())
        for bit in data.draw(st.sets(st.integers(0, 8 * min(len(content), 900) - 1), max_size=3)):
            content[bit // 8] ^= 1 << bit % 8
        with restored(folder):
            (folder / name).write_bytes(content[: data.draw(st.integers(0, len(content)))])
            seal(folder)
            with suppress(CheckpointError):
                loaded = load_checkpoint(folder)
                assert {n: a.shape for n, a in loaded.policy.items()} == expected_shapes(loaded.spec)
                assert all(np.isfinite(array).all() for array in loaded.policy.values())

    @settings(max_examples=40)
    @given(name=st.sampled_from(FILES), content=st.binary(max_size=60) | json_values.map(json.dumps))
    @example("config.json", "[" * 100_000)
    @example("manifest.json", "[" * 100_000)
    @example("manifest.json", "9" * 10_000)
    @example("progress.json", '{"return": NaN}')
    @example("progress.json", '{"return": -Infinity}')
    @example("progress.json", "{}".encode("utf-16"))
    @example("policy.safetensors", struct.pack("<Q", 2**63) + b"{}")
    def test_foreign_content(self, folder: Path, name: str, content: str | bytes) -> None:
        with restored(folder):
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
            if name != "manifest.json":
                refused(folder, str(folder / name), "truncated or altered")
                seal(folder)
            try:
                loaded = load_checkpoint(folder)
            except CheckpointError:
                refused(folder, str(folder / name))
            else:  # any object will do as progress
                assert name == "progress.json"
                assert loaded.progress == json.loads(content)
                json.dumps(loaded.progress, allow_nan=False)

    @pytest.mark.parametrize(
        ("dtype", "shape", "size"),
        [
            ("BF16", [2], 4),
            ("F4", [2], 1),
            ("F32", [2**63], 4),
            ("F32", [0, 2**63], 0),
            ("F32", [0, 2**62, 2], 0),
            ("F32", [0] * 100, 0),
            ("F32", [-1], 4),
        ],
    )
    @pytest.mark.parametrize("name", ["policy.safetensors", "optimizer.safetensors"])
    def test_strange_arrays(self, folder: Path, name: str, dtype: str, shape: list[int], size: int) -> None:
        header = json.dumps({"x": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}).encode()
        with restored(folder):
            (folder / name).write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))
            seal(folder)
            refused(folder, name)

    @settings(max_examples=40)
    @given(st.dictionaries(st.sampled_from(list(make_checkpoint().spec.to_dict())), json_values, min_size=1))
    @example({"num_layers": 10**12})
    @example({"hidden_dim": 10**40})
    @example({"initial_std": 10**400})
    @example({"inputs": ["full"]})
    @example({"state_dim": 5})
    @example({"hiden_dim": 4})
    @example({"hidden_dim": "x" * 100_000})
    def test_a_spec_that_the_arrays_do_not_fit(self, folder: Path, changes: dict[str, Any]) -> None:
        with restored(folder):
            config = json.loads((folder / "config.json").read_bytes())
            config["policy"] |= changes
            (folder / "config.json").write_text(json.dumps(config))
            seal(folder)
            try:
                loaded = load_checkpoint(folder)
            except CheckpointError:
                refused(folder, "config.json")
            else:
                assert loaded.spec.to_dict() == config["policy"]
                assert {n: a.shape for n, a in loaded.policy.items()} == expected_shapes(loaded.spec)

    @settings(max_examples=50)
    @given(specs, specs)
    def test_another_size_is_refused(self, folder: Path, ours: PolicySpec, theirs: PolicySpec) -> None:
        with restored(folder):
            save_checkpoint(folder, make_checkpoint(0, ours))
            config = json.loads((folder / "config.json").read_bytes())
            (folder / "config.json").write_text(json.dumps(config | {"policy": theirs.to_dict()}))
            seal(folder)
            if expected_shapes(ours) == expected_shapes(theirs):
                assert load_checkpoint(folder).spec == theirs
            else:
                refused(folder, "policy.safetensors does not fit the policy that config.json describes")

    def test_what_is_wrong_is_named(self, folder: Path) -> None:
        good = make_checkpoint().policy
        log_std = good["policy.log_std"]
        for arrays, reason in [
            (good | {"encoder.bias": np.zeros(9, np.float32)}, "float32 [9] instead of float32 [4]"),
            (good | {"encoder.bias": np.zeros(4)}, "float64 [4] instead of float32 [4]"),
            (good | {"blocks.1.nu": np.zeros(2, np.float32)}, "it has no 'blocks.1.nu'"),
            ({n: a for n, a in good.items() if n != "encoder.bias"}, "'encoder.bias' is missing"),
            (good | {"policy.log_std": log_std * np.float32("nan")}, "NaN or infinite numbers in 'policy.l"),
        ]:
            with restored(folder):
                (folder / "policy.safetensors").write_bytes(safetensors.numpy.save(arrays))
                seal(folder)
                refused(folder, f"{folder / 'policy.safetensors'} ", reason)

    @pytest.mark.parametrize("version", [0, 2, 1.0, True, "1", None, [1], 10**50])
    def test_another_format_version(self, folder: Path, version: Any) -> None:
        with restored(folder):
            seal(folder, format=version)
            refused(folder, "manifest.json is of format", "reads format 1")

    @pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../config.json", "./config.json", "x" * 9999])
    def test_the_manifest_cannot_name_other_files(
        self, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with restored(folder):
            seal(folder)
            digests = json.loads((folder / "manifest.json").read_bytes())["sha256"]
            seal(folder, sha256=digests | {name: "0" * 64})
            opened = []
            real = os.open

            def recording(path: Any, *args: Any) -> int:
                opened.append(str(path))
                return real(path, *args)

            monkeypatch.setattr(os, "open", recording)
            refused(folder, "manifest.json lists", "no file of a checkpoint")
            assert opened == [str(folder / "manifest.json")]
            seal(folder, sha256={name: "0" * 64})
            refused(folder, "manifest.json does not list policy.safetensors")

    @pytest.mark.parametrize("name", FILES)
    def test_only_regular_files_are_read(self, folder: Path, tmp_path: Path, name: str) -> None:
        path = folder / name
        with restored(folder):
            shutil.move(path, tmp_path / name)
            path.symlink_to(tmp_path / name)
            refused(folder, f"{path} is a symbolic link")
            path.unlink()
            os.mkfifo(path)
            refused(folder, f"{path} is not a regular file")
            path.unlink()
            path.mkdir()
            refused(folder, str(path))
            path.rmdir()

    @pytest.mark.parametrize("path", ["", "absent", "/dev/null", "a\0b", "x" * 5000, "a\nb" * 3])
    def test_paths_that_are_none(self, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(CheckpointError):
            load_checkpoint(path)
        with pytest.raises(CheckpointError):
            resolve_checkpoint(path)

    def test_other_files_in_the_folder_do_not_matter(self, folder: Path) -> None:
        (folder / "notes.txt").write_text("seed 3 was lucky")
        assert_equal(load_checkpoint(folder), make_checkpoint())
        (folder / "notes.txt").unlink()


class Crash(BaseException):
    """The process is gone: nothing that it would do afterwards happens."""


@contextmanager
def crash_at(call: int) -> Iterator[list[str]]:
    """Let the process die at its ``call``-th change to the disk, and give the changes made until then."""
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
        """For each change that ``act`` makes, a run in which it died before it; the last one is whole."""
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
                assert_equal(checkpoint, make_checkpoint(checkpoint.progress["iteration"]))
            assert_equal(load_checkpoint(resolve_checkpoint(run)), found[-1])
            if replacing:
                assert_equal(load_checkpoint(run / place), found[-1])
                assert_equal(load_checkpoint(resolve_checkpoint(run / place)), found[-1])
            # A new process tidies up without changing what is there, and can do what the old one could not.
            prune(run)
            assert_equal(load_checkpoint(checkpoints(run)[-1]), found[-1])
            assert {path.name for path in run.iterdir()} <= {"checkpoint_000001", place, "best.json"}
            save_checkpoint(run / place, make_checkpoint(4))
            assert_equal(load_checkpoint(run / place), make_checkpoint(4))
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

        files_written = 10  # before that, a crash leaves no more than the hidden folder
        for run in self.crashes(tmp_path, save(3), save(2), first=files_written):
            for call in range(files_written, 100):
                with crash_at(call) as calls:
                    save(4)(run)
                (found,) = checkpoints(run)
                assert load_checkpoint(found).progress["iteration"] in (2, 3, 4)
                if len(calls) < call:
                    break
            assert_equal(load_checkpoint(run / "checkpoint_000002"), make_checkpoint(4))

    def test_pruning(self, tmp_path: Path) -> None:
        def before(run: Path) -> None:
            for i in range(4):
                save_checkpoint(run / f"checkpoint_{i:06d}", make_checkpoint(i))
            mark_best(run, run / "checkpoint_000000", 1.0)

        for run in self.crashes(tmp_path, lambda run: prune(run, keep_last=1), before):
            found = [load_checkpoint(path).progress["iteration"] for path in checkpoints(run)]
            assert found in ([0, 1, 2, 3], [0, 2, 3], [0, 3])
            prune(run, keep_last=1)
            left = sorted(path.name for path in run.iterdir())
            assert left == ["best.json", "checkpoint_000000", "checkpoint_000003"]

    def test_marking_the_best(self, tmp_path: Path) -> None:
        def before(run: Path) -> None:
            for i in range(3):
                save_checkpoint(run / f"checkpoint_{i:06d}", make_checkpoint(i))
            mark_best(run, run / "checkpoint_000000", 1.0)

        def act(run: Path) -> None:
            mark_best(run, run / "checkpoint_000001", 2.0)
            mark_best(run, run / "checkpoint_000000", 3.0)

        for run in self.crashes(tmp_path, act, before):
            assert resolve_checkpoint(run).name in ("checkpoint_000000", "checkpoint_000001")
            prune(run)
            assert len(list(run.iterdir())) == 4

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
        assert_equal(load_checkpoint(place), make_checkpoint(1))


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
        assert_equal(load_checkpoint(target), make_checkpoint(1))

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
