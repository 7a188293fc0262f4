"""What a checkpoint's files say, as bytes and back; nothing is believed before it is verified."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import reprlib
import stat
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from ssm_metarl.algorithms.parameters import expected_shapes
from ssm_metarl.algorithms.replay import ReplayBuffer
from ssm_metarl.algorithms.rollouts import Array
from ssm_metarl.algorithms.spec import PolicySpec

FORMAT_VERSION = 1
"""Version of the folder's content. A change that an older reader would misread raises it."""

POLICY, OPTIMIZER, REPLAY = "policy.safetensors", "optimizer.safetensors", "replay.safetensors"
CONFIG, PROGRESS = "config.json", "progress.json"
MANIFEST, BEST = "manifest.json", "best.json"
_FILES = (POLICY, OPTIMIZER, CONFIG, PROGRESS)


class CheckpointError(ValueError):
    """A checkpoint cannot be loaded, found or written: one sentence that names the file and the reason."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """All that continues a run or runs its policy.

    Attributes:
        spec: sizes and form of the policy.
        config: the run's configuration, JSON values.
        progress: iteration, environment steps and the like, JSON values.
        policy: float32 arrays by parameter name, as `expected_shapes(spec)` has them.
        optimizer: arrays by name; empty where nothing is to be continued.
        replay: episodes of meta-training; None where none were kept.
    """

    spec: PolicySpec
    config: dict[str, Any]
    progress: dict[str, Any]
    policy: dict[str, Array]
    optimizer: dict[str, Array]
    replay: ReplayBuffer | None = None


# Content: what the files say, as bytes and back.


def encode(folder: Path, checkpoint: Checkpoint) -> dict[str, bytes]:
    """The content of each file of a checkpoint.

    Raises:
        CheckpointError: something cannot be written, such as NaN.
    """
    config = {"policy": checkpoint.spec.to_dict(), "train": checkpoint.config}
    replay = checkpoint.replay
    return {
        POLICY: _encode_arrays(folder / POLICY, checkpoint.policy),
        OPTIMIZER: _encode_arrays(folder / OPTIMIZER, checkpoint.optimizer),
        CONFIG: _encode_json(folder / CONFIG, config),
        PROGRESS: _encode_json(folder / PROGRESS, checkpoint.progress),
        **({REPLAY: _encode_arrays(folder / REPLAY, replay.arrays())} if replay else {}),
    }


def decode(folder: Path, contents: Mapping[str, bytes]) -> Checkpoint:
    """The checkpoint that the contents say; CheckpointError naming the file of `folder` that says none."""
    config = decode_json(folder / CONFIG, contents[CONFIG])
    if set(config) != {"policy", "train"} or not all(isinstance(part, dict) for part in config.values()):
        raise CheckpointError(f"{folder / CONFIG} is foreign: it must hold the objects 'policy' and 'train'.")
    try:
        spec = PolicySpec.from_dict(config["policy"])
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        reason = textwrap.shorten(str(error), 300).rstrip(".")
        raise CheckpointError(f"{folder / CONFIG} does not describe a policy: {reason}.") from None
    if not spec.discrete and "action_low" not in config["policy"]:
        raise CheckpointError(
            f"{folder} was written by version 0.1, whose continuous actions were in the unit of the environment and "
            "not in [-1, 1]: train the policy anew, or use it with that version."
        )
    progress = decode_json(folder / PROGRESS, contents[PROGRESS])
    policy = _decode_arrays(folder / POLICY, contents[POLICY])
    optimizer = _decode_arrays(folder / OPTIMIZER, contents[OPTIMIZER])
    policy = _fitting(folder / POLICY, policy, spec)
    for path, arrays in ((folder / POLICY, policy), (folder / OPTIMIZER, optimizer)):
        for name, array in arrays.items():
            if array.dtype.kind in "fc" and not np.isfinite(array).all():
                raise CheckpointError(f"{path} holds NaN or infinite numbers in {brief(name)}.")
    replay = None
    if REPLAY in contents:
        try:
            replay = ReplayBuffer.from_arrays(_decode_arrays(folder / REPLAY, contents[REPLAY]), spec)
        except ValueError as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{folder / REPLAY} holds no episodes of this policy: {error}.") from None
    return Checkpoint(spec, config["train"], progress, policy, optimizer, replay)


def _fitting(path: Path, arrays: Mapping[str, Array], spec: PolicySpec) -> dict[str, Array]:
    """`arrays` in the order of `expected_shapes(spec)`, if they are exactly those."""
    misfit = f"{path} does not fit the policy that {CONFIG} describes"
    # Before anything is built for each layer: an altered number of layers can be any number.
    if spec.num_layers > len(arrays):
        raise CheckpointError(f"{misfit}: {spec.num_layers} layers need more than {len(arrays)} arrays.")
    shapes = expected_shapes(spec)
    for name, shape in shapes.items():
        if name not in arrays:
            raise CheckpointError(f"{misfit}: {name!r} is missing.")
        array = arrays[name]
        if array.shape != shape or array.dtype != np.float32:
            raise CheckpointError(
                f"{misfit}: {name!r} is {array.dtype} {list(array.shape)} instead of float32 {list(shape)}."
            )
    for name in arrays:
        if name not in shapes:
            raise CheckpointError(f"{misfit}: it has no {brief(name)}.")
    return {name: arrays[name] for name in shapes}


def _encode_arrays(path: Path, arrays: Mapping[str, Array]) -> bytes:
    # safetensors reads an array's memory in order, whatever its strides are.
    try:
        return safetensors.numpy.save({name: np.asarray(array, order="C") for name, array in arrays.items()})
    except (SafetensorError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be written: {textwrap.shorten(str(error), 300)}.") from None


def _decode_arrays(path: Path, content: bytes) -> dict[str, Array]:
    try:
        return safetensors.numpy.load(content)
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        reason = textwrap.shorten(str(error), 300)
        raise CheckpointError(f"{path} is not a safetensors file of NumPy arrays ({reason}).") from None


def _encode_json(path: Path, values: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(values, indent=1, allow_nan=False).encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be written: {textwrap.shorten(str(error), 300)}.") from None


def decode_json(path: Path, content: bytes) -> dict[str, Any]:
    """The JSON object of a file.

    Raises:
        CheckpointError: it is none.
    """
    try:
        values = json.loads(content.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({textwrap.shorten(str(error), 300)}).") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is foreign: it holds no JSON object.")
    return values


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def read_digests(path: Path) -> dict[str, str]:
    """The SHA-256 of each file by the manifest at `path`, which may name our files and no other."""
    manifest = decode_json(path, read_file(path))
    version, digests = manifest.get("format"), manifest.get("sha256")
    if type(version) is not int or version != FORMAT_VERSION:
        reads = f"this version of ssm-metarl reads format {FORMAT_VERSION}"
        raise CheckpointError(f"{path} is of format {brief(version)}, but {reads}.")
    if not isinstance(digests, dict):
        raise CheckpointError(f"{path} is foreign: it has no object 'sha256'.")
    for name in (*_FILES, *digests):
        if name not in digests:
            raise CheckpointError(f"{path} does not list {name}.")
        if name not in (*_FILES, REPLAY):
            raise CheckpointError(f"{path} lists {brief(name)}, which is no file of a checkpoint.")
    return digests


def sha256(content: bytes) -> str:
    """SHA-256 in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def brief(value: Any) -> str:
    """`value` on one line of bearable length."""
    brief = reprlib.Repr()
    brief.maxstring = 80
    return brief.repr(value)


def read_file(path: Path) -> bytes:
    """Content of a regular file; neither follows a link nor waits for the other end of a pipe."""
    try:
        with open(path, "rb", opener=_open_itself) as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return file.read()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.") from None
    except (OSError, MemoryError) as error:
        if isinstance(error, OSError) and error.errno == errno.ELOOP:
            raise CheckpointError(f"{path} is a symbolic link, which is not followed.") from None
        raise CheckpointError(f"{path} is unreadable: {getattr(error, 'strerror', 'too large')}.") from None
    raise CheckpointError(f"{path} is not a regular file.")


def _open_itself(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
