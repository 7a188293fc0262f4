"""A checkpoint's files: no damage goes unnoticed, and what could not be loaded is not written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import example, given, settings
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
from ssm_metarl.algorithms.spec import PolicySpec
from ssm_metarl.storage.checkpoint import load_checkpoint, save_checkpoint
from ssm_metarl.storage.contents import FORMAT_VERSION, Checkpoint, CheckpointError
from ssm_metarl.storage.run_folder import resolve_checkpoint


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
        assert_same_checkpoint(load_checkpoint(place), make_checkpoint(0))

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
    @example("progress.json", '{"iteration": 1, "env_steps": 2, "more": [3]}')
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
            else:  # more than the counts may be in there
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
    @given(plain_specs, plain_specs)
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
        assert_same_checkpoint(load_checkpoint(folder), make_checkpoint())
        (folder / "notes.txt").unlink()
