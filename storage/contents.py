"""What a checkpoint's files say, as bytes and back; nothing is believed before it is verified."""

from __future__ import annotations

import hashlib
import json
import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from ssm_metarl.algorithms.parameters import expected_shapes
from ssm_metarl.algorithms.replay import MOST_EPISODES, ReplayBuffer
from ssm_metarl.algorithms.rollouts import Array
from ssm_metarl.algorithms.spec import LATER, PolicySpec
from ssm_metarl.checks import brief
from ssm_metarl.storage.documents import (
    LARGE,
    SMALL,
    CheckpointError,
    anything,
    checked,
    decode_json,
    file_size,
    list_of,
    number,
    read_file,
    record,
    whole,
)

__all__ = [
    "BEST",
    "CONFIG",
    "FORMAT_VERSION",
    "MANIFEST",
    "OPTIMIZER",
    "POLICY",
    "PROGRESS",
    "REPLAY",
    "Checkpoint",
    "CheckpointError",
    "decode",
    "encode",
    "read_contents",
    "sha256",
]

FORMAT_VERSION = 1
"""Version of the folder's content. A change that an older reader would misread raises it."""

POLICY, OPTIMIZER, REPLAY = "policy.safetensors", "optimizer.safetensors", "replay.safetensors"
CONFIG, PROGRESS = "config.json", "progress.json"
MANIFEST, BEST = "manifest.json", "best.json"
_FILES = (POLICY, OPTIMIZER, CONFIG, PROGRESS)


MOST_BYTES = 2**31
"""Of a file of arrays."""

MOST_ARRAYS = 100_000
"""Of a policy."""

_MOST_HEADER = 400
"""Bytes of an array's entry in a safetensors file at most: name, dtype, shape and offsets."""

_MOMENTS = record({"count": whole(), "mean": list_of(number()), "squares": list_of(number(low=0.0))})

PROGRESS_FORM = record(
    {"iteration": whole(), "env_steps": whole()},
    {
        "normalizer": record({}, dict.fromkeys(("observations", "rewards", "returns", "tasks"), _MOMENTS)),
        "longest": whole(1),
        "mean_iterations": whole(),
        "adapted_to": anything,
    },
    others=True,
)
"""What `progress.json` holds: counts of a run so far, and the moments that its inputs are normalised with."""


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
    spec, config = _decode_config(folder / CONFIG, contents[CONFIG])
    progress = _decode_progress(folder / PROGRESS, contents[PROGRESS])
    _check_moments(folder / PROGRESS, progress.get("normalizer", {}), spec)
    policy = _fitting(folder / POLICY, _decode_arrays(folder / POLICY, contents[POLICY]), spec)
    optimizer = _decode_arrays(folder / OPTIMIZER, contents[OPTIMIZER])
    for path, arrays in ((folder / POLICY, policy), (folder / OPTIMIZER, optimizer)):
        for name, array in arrays.items():
            if array.dtype.kind in "fc" and not np.isfinite(array).all():
                raise CheckpointError(f"{path} holds NaN or infinite numbers in {brief(name)}.")
    _check_optimizer(folder / OPTIMIZER, optimizer, policy)
    replay = None
    if REPLAY in contents:
        try:
            replay = ReplayBuffer.from_arrays(_decode_arrays(folder / REPLAY, contents[REPLAY]), spec)
        except (ValueError, RecursionError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{folder / REPLAY} holds no episodes of this policy: {error}.") from None
    return Checkpoint(spec, config, progress, policy, optimizer, replay)


def _decode_config(path: Path, content: bytes) -> tuple[PolicySpec, dict[str, Any]]:
    """The policy's sizes and the run's configuration, the latter as it is."""
    config = decode_json(path, content)
    if set(config) != {"policy", "train"} or not all(isinstance(part, dict) for part in config.values()):
        raise CheckpointError(f"{path} is foreign: it must hold the objects 'policy' and 'train'.")
    policy = config["policy"]
    try:
        spec = PolicySpec.from_dict(policy)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        reason = textwrap.shorten(str(error), 300).rstrip(".")
        raise CheckpointError(f"{path} does not describe a policy: {reason}.") from None
    if not spec.discrete and "action_low" not in policy:
        raise CheckpointError(
            f"{path.parent} was written by version 0.1, whose continuous actions were in the unit of the environment "
            "and not in [-1, 1]: train the policy anew, or use it with that version."
        )
    optional = [name for name in spec.to_dict() if name in LATER or name.startswith("action_")]
    missing = [name for name in spec.to_dict() if name not in policy and name not in optional]
    if missing:
        raise CheckpointError(f"{path} does not describe a policy: it has no {', '.join(missing)}.")
    return spec, config["train"]


def _decode_progress(path: Path, content: bytes) -> dict[str, Any]:
    progress: dict[str, Any] = checked(path, decode_json(path, content), PROGRESS_FORM)
    return progress


def _check_moments(path: Path, normalizer: Mapping[str, Any], spec: PolicySpec) -> None:
    """Refuse moments of another number of values than the policy's inputs have."""
    sizes = {"observations": spec.observation_size, "tasks": spec.task_size}
    for name, moments in normalizer.items():
        size = sizes.get(name, 1)
        if not len(moments["mean"]) == len(moments["squares"]) == size:
            raise CheckpointError(f"{path} does not fit the policy: the moments of {name} must be of {size} numbers.")


def _check_optimizer(path: Path, arrays: Mapping[str, Array], policy: Mapping[str, Array]) -> None:
    """Refuse anything but Adam's three numbers for some of the parameters."""
    for key, array in arrays.items():
        name, _, moment = key.rpartition(".")
        if name not in policy or moment not in ("step", "exp_avg", "exp_avg_sq"):
            raise CheckpointError(f"{path} does not fit the policy: {brief(key)} is of none of its parameters.")
        shape = () if moment == "step" else policy[name].shape
        if array.shape != shape or array.dtype != np.float32:
            found = f"{array.dtype} {list(array.shape)} instead of float32 {list(shape)}"
            raise CheckpointError(f"{path} does not fit the policy: {key!r} is {found}.")
        if moment != "exp_avg" and (array < 0).any():
            raise CheckpointError(f"{path} holds negative numbers in {key!r}.")
        for other in ("step", "exp_avg", "exp_avg_sq"):
            if f"{name}.{other}" not in arrays:
                raise CheckpointError(f"{path} does not fit the policy: {f'{name}.{other}'!r} is missing.")


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


# Reading: nothing is read before its size is known to be possible.


def read_contents(folder: Path) -> dict[str, bytes]:
    """The files of a checkpoint's folder, each with the SHA-256 that the manifest has, and of a possible size.

    The sizes of the policy follow from `config.json`, those of the optimiser from the policy's, those of a replay from
    the steps and episodes that the run has had and keeps; a manifest says the bytes of each file, too. What is larger
    is refused without being read.

    Raises:
        CheckpointError: a file is missing, unreadable, too large, truncated or altered.
    """
    digests, sizes = _read_manifest(folder / MANIFEST)
    contents = {CONFIG: _read_verified(folder / CONFIG, digests[CONFIG], SMALL)}
    spec, config = _decode_config(folder / CONFIG, contents[CONFIG])
    most = _limits(folder, spec)
    contents[PROGRESS] = _read_verified(folder / PROGRESS, digests[PROGRESS], most[PROGRESS])
    if REPLAY in digests:
        most[REPLAY] = _most_of_replay(spec, config, _decode_progress(folder / PROGRESS, contents[PROGRESS]))
    for name in digests:
        size = file_size(folder / name)
        if name in sizes and size and size != sizes[name]:
            wanted = f"{size:,} bytes instead of the {sizes[name]:,} of {MANIFEST}"
            raise CheckpointError(f"{folder / name} is truncated or altered: it has {wanted}.")
        if name in (POLICY, OPTIMIZER, REPLAY) and size > most[name]:
            what = f"run that {CONFIG} and {PROGRESS} describe" if name == REPLAY else f"policy that {CONFIG} describes"
            raise CheckpointError(
                f"{folder / name} does not fit the {what}: {size:,} bytes are more than the {most[name]:,} that it can "
                "need."
            )
    for name in digests:
        if name not in contents:
            contents[name] = _read_verified(folder / name, digests[name], most[name])
    return {name: contents[name] for name in digests}


def manifest_of(contents: Mapping[str, bytes]) -> bytes:
    """The content of `manifest.json` for the contents of the other files."""
    digests = {name: sha256(content) for name, content in contents.items()}
    sizes = {name: len(content) for name, content in contents.items()}
    return json.dumps({"format": FORMAT_VERSION, "sha256": digests, "bytes": sizes}, indent=1).encode()


def _limits(folder: Path, spec: PolicySpec) -> dict[str, int]:
    """Bytes of each file that a checkpoint of such a policy has at most."""
    count, data = _arrays_of(folder / POLICY, spec)
    return {
        CONFIG: SMALL,
        POLICY: min(data + _MOST_HEADER * (count + 1), MOST_BYTES),
        OPTIMIZER: min(2 * data + (4 + 3 * _MOST_HEADER) * (count + 1), MOST_BYTES),
        PROGRESS: SMALL + 100 * (spec.observation_size + spec.task_size),
    }


def _most_of_replay(spec: PolicySpec, config: Mapping[str, Any], progress: Mapping[str, Any]) -> int:
    """Bytes that a replay has at most: no more episodes than are kept, of no more steps than were played."""
    kept = config.get("replay_episodes")
    episodes = kept if type(kept) is int and 0 <= kept <= MOST_EPISODES else MOST_EPISODES
    data = ReplayBuffer.bound(spec, 1, progress["env_steps"]) + episodes * (4 * spec.observation_size + 8)
    return int(min(data + min(episodes * SMALL, LARGE) + 12 * _MOST_HEADER, MOST_BYTES))


def check_sizes(folder: Path, checkpoint: Checkpoint, contents: Mapping[str, bytes]) -> None:
    """Refuse to write what `read_contents` would refuse to read.

    Raises:
        CheckpointError: a file is too large.
    """
    limits = _limits(folder, checkpoint.spec)
    limits[REPLAY] = _most_of_replay(checkpoint.spec, checkpoint.config, checkpoint.progress)
    for name, most in limits.items():
        if len(contents.get(name, b"")) > most:
            size = f"{len(contents[name]):,} bytes, at most {most:,}"
            raise CheckpointError(f"{folder / name} would be too large: {size}.")


def _arrays_of(path: Path, spec: PolicySpec) -> tuple[int, int]:
    """How many arrays a policy has, and their bytes; found without a list of them, which could be any length."""

    def total(layers: int) -> tuple[int, int]:
        shapes = expected_shapes(replace(spec, num_layers=layers))
        return len(shapes), 4 * sum(map(math.prod, shapes.values()))

    without, one = total(0), total(1)
    count, data = (none + spec.num_layers * (first - none) for none, first in zip(without, one, strict=True))
    if count > MOST_ARRAYS or data > MOST_BYTES:
        raise CheckpointError(
            f"{path} does not fit the policy that {CONFIG} describes: that would have {count:,} arrays of {data:,} "
            f"bytes, at most {MOST_ARRAYS:,} of {MOST_BYTES:,} are read."
        )
    return count, data


def _read_verified(path: Path, digest: str, most: int) -> bytes:
    content = read_file(path, most)
    if sha256(content) != digest:
        raise CheckpointError(f"{path} is truncated or altered: its SHA-256 is not that of {MANIFEST}.")
    return content


def _read_manifest(path: Path) -> tuple[dict[str, str], dict[str, int]]:
    """The SHA-256 of each file by the manifest at `path`, which may name our files and no other; and their bytes.

    Manifests of version 0.2.0 and before have no bytes.
    """
    manifest = decode_json(path, read_file(path, SMALL))
    version, digests, sizes = manifest.get("format"), manifest.get("sha256"), manifest.get("bytes", {})
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
    if "bytes" in manifest:
        checked(path, sizes, record(dict.fromkeys(digests, whole())))
    if unknown := sorted(set(manifest) - {"format", "sha256", "bytes"}):
        raise CheckpointError(f"{path} is foreign: it has an unknown {brief(unknown[0])}.")
    return digests, sizes


def sha256(content: bytes) -> str:
    """SHA-256 in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()
