"""Alterations of a run's files, drawn from a seed: what a disk, another version or an attacker can make of them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ODD: list[Any] = [
    None, True, False, "", "x", "3", -1, 0, 1, 3.5, -0.0, 1e-320, 1e308, 10**30, 10**400, 2**63, float("nan"),
    float("inf"), [], {}, [1], ["x"], {"a": 1}, "\ud800", "../../etc/passwd", "os:abort", "x" * 100_000, "\x1b[2J",
    [[[]]],
]  # fmt: skip
"""Values that stand where another one belongs."""


def nested(depth: int) -> Any:
    """A list in a list, so many times."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values in a JSON value."""
    yield path
    for key, each in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(each, (*path, key))


def alter_json(value: Any, rng: np.random.Generator) -> tuple[Any, str]:
    """A JSON value of which one place is altered, and words for what was done."""
    found = list(places(value))
    path = found[rng.integers(len(found))]
    if not path:
        return ODD[rng.integers(len(ODD))], "the whole"
    value = json.loads(json.dumps(value))
    *above, last = path
    owner = value
    for key in above:
        owner = owner[key]
    how = rng.integers(8)
    if how == 0:
        del owner[last]
    elif how == 1 and isinstance(owner, dict):
        owner[f"{last}_"] = owner.pop(last)
    elif how == 2 and isinstance(owner, dict):
        owner["unknown"] = owner[last]
    elif how == 3 and isinstance(owner[last], int | float) and not isinstance(owner[last], bool):
        owner[last] = [str(owner[last]), float(owner[last]) + 0.5, -owner[last] - 1, [owner[last]]][rng.integers(4)]
    elif how == 4 and isinstance(owner[last], list):
        owner[last] = [owner[last] * 2, owner[last][:-1], owner[last][::-1]][rng.integers(3)]
    elif how == 5:
        owner[last] = nested(int(rng.choice([40, 5000])))
    else:
        owner[last] = ODD[rng.integers(len(ODD))]
    return value, f"{path}: {how}"


def dumped(value: Any) -> bytes:
    """JSON as an attacker may write it, NaN and all; what Python cannot write is written by hand."""
    try:
        return json.dumps(value).encode()
    except RecursionError:
        return b"[" * 5000 + b"]" * 5000


def alter_bytes(content: bytes, rng: np.random.Generator) -> tuple[bytes, str]:
    """Bytes of which some are other ones, too few or too many."""
    how = rng.integers(5)
    place = int(rng.integers(max(len(content), 1)))
    if how == 0:
        return content[:place], f"cut to {place}"
    if how == 1:
        return content[:place] + bytes(rng.integers(0, 256, 3, np.uint8)) + content[place + 3 :], f"bytes at {place}"
    if how == 2:
        return content + bytes(rng.integers(0, 256, 50, np.uint8)), "more"
    if how == 3:
        return bytes(rng.integers(0, 256, 200, np.uint8)), "noise"
    return b"", "empty"


def alter_arrays(content: bytes, rng: np.random.Generator) -> tuple[bytes, str]:
    """A safetensors file whose header is altered, or with an array of odd numbers, or of another kind."""
    size = struct.unpack("<Q", content[:8])[0]
    header, body = json.loads(content[8 : 8 + size]), bytearray(content[8 + size :])
    how = rng.integers(4)
    if how == 0:
        header, words = alter_json(header, rng)
    elif how == 1 and body:
        place = 4 * int(rng.integers(len(body) // 4))
        body[place : place + 4] = struct.pack("<f", float(rng.choice([np.nan, np.inf, -1e38, -1.0])))
        words = f"number at {place}"
    else:
        name = list(header)[rng.integers(len(header))]
        if isinstance(header[name], dict) and "dtype" in header[name]:
            header[name]["dtype"] = str(rng.choice(["F64", "I32", "U8", "BF16", "F16", "BOOL", "I64", "F8_E4M3", "X"]))
        words = f"dtype of {name}"
    text = dumped(header)
    return struct.pack("<Q", len(text)) + text + bytes(body), words


def alter_place(path: Path, rng: np.random.Generator) -> str:
    """Put something else than the file in its place."""
    content = path.read_bytes()
    path.unlink()
    how = rng.integers(5)
    if how == 0:
        return "missing"
    if how == 1:
        os.mkfifo(path)
        return "a pipe"
    if how == 2:
        path.mkdir()
        return "a folder"
    if how == 3:
        elsewhere = path.with_name(f"{path.name}.elsewhere")
        elsewhere.write_bytes(content)
        path.symlink_to(elsewhere)
        return "a link"
    with path.open("wb") as file:
        file.write(content)
        file.truncate(3 * 2**30)
    return "3 GiB"


def alter(path: Path, rng: np.random.Generator) -> str:
    """Alter a file; words for what was done."""
    if rng.random() < 0.06:
        return alter_place(path, rng)
    content = path.read_bytes()
    if rng.random() < 0.1:
        content, words = alter_bytes(content, rng)
    elif path.suffix == ".safetensors":
        content, words = alter_arrays(content, rng)
    elif path.suffix == ".jsonl":
        lines = content.splitlines()
        number = int(rng.integers(len(lines)))
        value, words = alter_json(json.loads(lines[number]), rng)
        lines[number] = dumped(value)
        content = b"\n".join(lines) + b"\n"
    else:
        value, words = alter_json(json.loads(content), rng)
        content = dumped(value)
    path.write_bytes(content)
    return words


def seal(folder: Path) -> None:
    """Write the manifest that belongs to a checkpoint's files as they are."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_bytes())
    for name in manifest["sha256"]:
        if (folder / name).is_file() and (folder / name).stat().st_size < 2**30:
            content = (folder / name).read_bytes()
            manifest["sha256"][name], manifest["bytes"][name] = hashlib.sha256(content).hexdigest(), len(content)
    if any((folder / name).is_file() and (folder / name).stat().st_size >= 2**30 for name in manifest["sha256"]):
        manifest.pop("bytes")
    path.write_text(json.dumps(manifest))


class Altered:
    """A copy of a run's folder that is altered and put back:

    altered = Altered(pristine, tmp_path / "run")
    words = altered.file("best.json", rng)
    ...
    altered.restore()
    """

    def __init__(self, pristine: Path, place: Path) -> None:
        self._pristine, self.place = pristine, place
        shutil.copytree(pristine, place)

    def file(self, name: str, rng: np.random.Generator) -> str:
        """Alter a file, and sign its checkpoint again if it is in one."""
        path = self.place / name
        words = alter(path, rng)
        if path.parent.name.startswith("checkpoint_") and path.name != "manifest.json":
            seal(path.parent)
        return f"{name}: {words}"

    def restore(self) -> None:
        """Make the copy equal to the run again."""
        for path in sorted(self.place.rglob("*"), reverse=True):
            original = self._pristine / path.relative_to(self.place)
            if not original.exists():
                (shutil.rmtree if path.is_dir() and not path.is_symlink() else os.unlink)(path)
        for original in self._pristine.rglob("*"):
            path = self.place / original.relative_to(self._pristine)
            if original.is_dir():
                path.mkdir(exist_ok=True)
                continue
            if path.is_symlink() or not path.is_file():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
            small = path.is_file() and path.stat().st_size < 2**30
            if not small or path.read_bytes() != original.read_bytes():
                path.unlink(missing_ok=True)
                shutil.copy(original, path)
