"""Checkpoints: a crash at any moment leaves a complete one, and one is read only if every byte is as written.

A run folder holds ``checkpoint_000123/`` folders and ``best.json``. A checkpoint holds

    policy.safetensors, optimizer.safetensors, config.json, progress.json, manifest.json

and, of a run with ``--replay-episodes``, replay.safetensors. The manifest, written last, has the format's version and
the SHA-256 of each other file: no manifest, no checkpoint. A checkpoint is made in a hidden folder beside its place and
renamed. One that is to be replaced is first renamed to ``.checkpoint_000123.old``, which stands in for it should the
process die before the new one is in place.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import reprlib
import shutil
import stat
import textwrap
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from ssm_metarl import pretrained
from ssm_metarl.algorithms.inference import CRITIC_UNITS, PolicySpec, step_size
from ssm_metarl.algorithms.replay import ReplayBuffer
from ssm_metarl.algorithms.rollouts import Array

if TYPE_CHECKING:
    from ssm_metarl.algorithms.policy import SSMPolicy

FORMAT_VERSION = 1
"""Version of the folder's content. A change that an older reader would misread raises it."""

POLICY, OPTIMIZER, REPLAY = "policy.safetensors", "optimizer.safetensors", "replay.safetensors"
CONFIG, PROGRESS = "config.json", "progress.json"
MANIFEST, BEST = "manifest.json", "best.json"
_FILES = (POLICY, OPTIMIZER, CONFIG, PROGRESS)

_NAME = re.compile(r"checkpoint_([0-9]+)")
_STAND_IN = re.compile(r"\.(checkpoint_[0-9]+)\.old")
_LEFTOVER = re.compile(r"\.(checkpoint_[0-9]+|best\.json)\.[0-9a-f]{32}\.tmp")


class CheckpointError(ValueError):
    """A checkpoint cannot be loaded, found or written: one sentence that names the file and the reason."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """All that continues a run or runs its policy.

    Attributes:
        spec: sizes and form of the policy.
        config: the run's configuration, JSON values.
        progress: iteration, environment steps and the like, JSON values.
        policy: float32 arrays by parameter name, as ``expected_shapes(spec)`` has them.
        optimizer: arrays by name; empty where nothing is to be continued.
        replay: episodes of meta-training; None where none were kept.
    """

    spec: PolicySpec
    config: dict[str, Any]
    progress: dict[str, Any]
    policy: dict[str, Array]
    optimizer: dict[str, Array]
    replay: ReplayBuffer | None = None


def expected_shapes(spec: PolicySpec) -> dict[str, tuple[int, ...]]:
    """Shape of each array of such a policy by name, ordered as in ``SSMPolicy.numpy_weights()``."""
    width, state, actions = spec.hidden_dim, spec.state_dim, spec.action_size
    shapes: dict[str, tuple[int, ...]] = {}
    shapes |= {"encoder.weight": (spec.input_size, width), "encoder.bias": (width,)}
    for i in range(spec.num_layers):
        block = f"blocks.{i}."
        shapes |= {
            block + "nu": (state // 2,),
            block + "theta": (state // 2,),
            block + "B": (width, state),
            block + "C": (state, width),
            block + "D": (width,),
        }
        if spec.gated:  # in the order of a ParameterDict, which is the alphabet's
            shapes |= {block + "gate.bias": (width,), block + "gate.weight": (width,)}
        else:
            shapes |= {block + "out.weight": (width, width), block + "out.bias": (width,)}
        if spec.memory_slots:
            memory = block + "memory."
            shapes |= {memory + "weight": (width, width), memory + "bias": (width,)}
            shapes[memory + "address"] = (width, spec.memory_slots)
    shapes |= {"policy.weight": (width, actions), "policy.bias": (actions,)}
    if not spec.discrete:
        shapes["policy.log_std"] = (actions,)
    sizes = {step_size(name): shape for name, shape in shapes.items()} if spec.learned_step_sizes else {}
    shapes |= {"value.weight": (width, 1), "value.bias": (1,)}
    told, units = (spec.task_size,), (CRITIC_UNITS,)
    if spec.task_size:
        shapes |= {"critic.weight": (width, *units), "critic.bias": units}
        shapes |= {"critic.task": (*told, *units), "critic.out": (*units, 1)}
    shapes |= dict(sorted(sizes.items()))
    if spec.task_size:
        shapes |= {"task_mean": told, "task_scale": told}
    if spec.normalizes:
        shapes |= {"input_mean": (spec.input_size,), "input_scale": (spec.input_size,), "reward_scale": (1,)}
    return shapes


def save_checkpoint(directory: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint; whatever happens, one that was there before stays until the new one is complete.

    Args:
        directory: the final folder, such as ``run/checkpoint_000123``: absent, empty, or a checkpoint, which
            is then replaced.
        checkpoint: what to write.

    Returns:
        ``directory``.

    Raises:
        CheckpointError: where ``load_checkpoint`` would refuse the result (NaN or infinite numbers, arrays
            that do not fit the spec, values that are not JSON), or the folder holds anything else; nothing on
            disk changes.
        OSError: where the disk refuses.
    """
    directory = Path(directory)
    contents = _encode(directory, checkpoint)
    _decode(directory, contents)
    digests = {name: _sha256(content) for name, content in contents.items()}
    manifest = json.dumps({"format": FORMAT_VERSION, "sha256": digests}, indent=1).encode()
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(directory)
    try:
        temporary.mkdir()
        for name, content in (*contents.items(), (MANIFEST, manifest)):
            _write(temporary / name, content)
        _sync(temporary)
        _move_into_place(temporary, directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return directory


def load_checkpoint(path: Path | str) -> Checkpoint:
    """Read a checkpoint folder; nothing is returned before everything in it is verified.

    Args:
        path: the checkpoint's folder, under any name (:func:`resolve_checkpoint` finds one in a run folder).

    Raises:
        CheckpointError: where a file is missing, unreadable, truncated, altered, a link, of an unknown
            format, or does not fit the policy that ``config.json`` describes.
    """
    folder = _present(Path(path))
    if not os.path.isdir(folder):
        raise CheckpointError(f"{folder} is not a checkpoint: there is no such folder.")
    if not os.path.lexists(folder / MANIFEST):
        raise CheckpointError(f"{folder} is not a complete checkpoint: it has no {MANIFEST}.")
    digests = _digests(folder / MANIFEST)
    contents = {name: _read(folder / name) for name in digests}
    for name, content in contents.items():
        if _sha256(content) != digests[name]:
            raise CheckpointError(f"{folder / name} is truncated or altered: its SHA-256 is not that of {MANIFEST}.")
    return _decode(folder, contents)


def load_policy(path: str | Path) -> tuple[SSMPolicy, Checkpoint]:
    """The policy of a checkpoint, of a run's best one, or of ``pretrained:NAME``, and the checkpoint itself.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    from ssm_metarl.algorithms.policy import (
        SSMPolicy,  # only here: reading checkpoints needs no torch, which takes seconds
    )

    checkpoint = load_checkpoint(resolve_checkpoint(path))
    policy = SSMPolicy(checkpoint.spec)
    policy.load_numpy(checkpoint.policy)
    return policy, checkpoint


def load_pretrained(name: str) -> tuple[SSMPolicy, Checkpoint]:
    """A model that comes with the package, such as "cartpole", and its checkpoint; needs no Ray.

    Raises:
        CheckpointError: there is none of that name; the sentence lists those that there are.
    """
    return load_policy(pretrained.PREFIX + name)


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run folder, by iteration ascending; empty where there is no such folder."""
    return list(_complete(Path(run)).values())


def resolve_checkpoint(path: Path | str) -> Path:
    """The checkpoint folder that ``path`` means: itself, or a run's best, or its last while none is marked.

    ``pretrained:NAME`` is a model that comes with the package.

    Raises:
        CheckpointError: where there is none, or the best cannot be told.
    """
    if str(path).startswith(pretrained.PREFIX):
        try:
            return pretrained.folder(str(path).removeprefix(pretrained.PREFIX))
        except ValueError as error:
            raise CheckpointError(str(error)) from None
    folder = _present(Path(path))
    if os.path.lexists(folder / MANIFEST):
        return folder
    if not os.path.isdir(folder):
        raise CheckpointError(f"{folder} is neither a checkpoint nor a run: there is no such folder.")
    complete = _complete(folder)
    if not complete:
        raise CheckpointError(
            f"{folder} holds no checkpoint: neither a {MANIFEST} of its own nor a complete checkpoint folder."
        )
    best = _best(folder)
    if best is None:
        return list(complete.values())[-1]
    if best not in complete:
        raise CheckpointError(
            f"{folder / BEST} names {best!r}, which is not there: delete {BEST} to use the last checkpoint, "
            f"{list(complete)[-1]}."
        )
    return complete[best]


def prune(run: Path, keep_last: int = 3) -> None:
    """Delete all checkpoints of a run but the last and the best, and what a crash left behind.

    The trainer calls it after each save; no other process may be writing to the run. While ``best.json`` is
    unreadable, no checkpoint is deleted.

    Args:
        run: the run folder.
        keep_last: how many of the last checkpoints stay, at least 1.

    Raises:
        ValueError: for ``keep_last`` below 1.
        OSError: where the disk refuses.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last must be at least 1, not {keep_last!r}.")
    run = Path(run)
    _clean_up(run)
    try:
        best = _best(run)
    except CheckpointError:
        return
    for name, path in list(_complete(run).items())[:-keep_last]:
        if name != best:
            _discard(path)


def mark_best(run: Path, checkpoint: Path, value: float) -> None:
    """Record which checkpoint is the best, in ``best.json``, replaced atomically.

    Args:
        run: the run folder.
        checkpoint: a complete checkpoint in it.
        value: the return that made it the best.

    Raises:
        ValueError: for a NaN or infinite value.
        CheckpointError: where the run has no such complete checkpoint.
        OSError: where the disk refuses.
    """
    run, name = Path(run), Path(checkpoint).name
    if not math.isfinite(value):
        raise ValueError(f"The return of {name} must be a finite number to be the best, not {value!r}.")
    if name not in _complete(run):
        raise CheckpointError(f"{checkpoint} is not a complete checkpoint of {run}.")
    replace_file(run / BEST, json.dumps({"checkpoint": name, "return": float(value)}).encode())


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that a crash at any moment leaves the old one or the new one, whole.

    Raises:
        OSError: where the disk refuses; the old file stays.
    """
    temporary = _temporary(path)
    try:
        _write(temporary, content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


# Content: what the files say, as bytes and back.


def _encode(folder: Path, checkpoint: Checkpoint) -> dict[str, bytes]:
    config = {"policy": checkpoint.spec.to_dict(), "train": checkpoint.config}
    replay = checkpoint.replay
    return {
        POLICY: _encode_arrays(folder / POLICY, checkpoint.policy),
        OPTIMIZER: _encode_arrays(folder / OPTIMIZER, checkpoint.optimizer),
        CONFIG: _encode_json(folder / CONFIG, config),
        PROGRESS: _encode_json(folder / PROGRESS, checkpoint.progress),
        **({REPLAY: _encode_arrays(folder / REPLAY, replay.arrays())} if replay else {}),
    }


def _decode(folder: Path, contents: Mapping[str, bytes]) -> Checkpoint:
    """The checkpoint that the contents say; CheckpointError naming the file of ``folder`` that says none."""
    config = _decode_json(folder / CONFIG, contents[CONFIG])
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
    progress = _decode_json(folder / PROGRESS, contents[PROGRESS])
    policy = _decode_arrays(folder / POLICY, contents[POLICY])
    optimizer = _decode_arrays(folder / OPTIMIZER, contents[OPTIMIZER])
    policy = _fitting(folder / POLICY, policy, spec)
    for path, arrays in ((folder / POLICY, policy), (folder / OPTIMIZER, optimizer)):
        for name, array in arrays.items():
            if array.dtype.kind in "fc" and not np.isfinite(array).all():
                raise CheckpointError(f"{path} holds NaN or infinite numbers in {_brief(name)}.")
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
    """``arrays`` in the order of ``expected_shapes(spec)``, if they are exactly those."""
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
            raise CheckpointError(f"{misfit}: it has no {_brief(name)}.")
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


def _decode_json(path: Path, content: bytes) -> dict[str, Any]:
    try:
        values = json.loads(content.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({textwrap.shorten(str(error), 300)}).") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is foreign: it holds no JSON object.")
    return values


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _digests(path: Path) -> dict[str, str]:
    """The SHA-256 of each file by the manifest at ``path``, which may name our files and no other."""
    manifest = _decode_json(path, _read(path))
    version, digests = manifest.get("format"), manifest.get("sha256")
    if type(version) is not int or version != FORMAT_VERSION:
        reads = f"this version of ssm-metarl reads format {FORMAT_VERSION}"
        raise CheckpointError(f"{path} is of format {_brief(version)}, but {reads}.")
    if not isinstance(digests, dict):
        raise CheckpointError(f"{path} is foreign: it has no object 'sha256'.")
    for name in (*_FILES, *digests):
        if name not in digests:
            raise CheckpointError(f"{path} does not list {name}.")
        if name not in (*_FILES, REPLAY):
            raise CheckpointError(f"{path} lists {_brief(name)}, which is no file of a checkpoint.")
    return digests


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _brief(value: Any) -> str:
    """``value`` on one line of bearable length."""
    brief = reprlib.Repr()
    brief.maxstring = 80
    return brief.repr(value)


# Disk: what is in place, and how it gets there.


def _complete(run: Path) -> dict[str, Path]:
    """Complete checkpoints of a run by name, iteration ascending; a stand-in where the folder is missing."""
    if not os.path.isdir(run):
        return {}
    in_place, standing_in = {}, {}
    for path in run.iterdir():
        if not os.path.isfile(path / MANIFEST):
            continue
        if _NAME.fullmatch(path.name):
            in_place[path.name] = path
        elif match := _STAND_IN.fullmatch(path.name):
            standing_in[match[1]] = path
    found = standing_in | in_place
    return {name: found[name] for name in sorted(found, key=lambda name: (int(name.partition("_")[2]), name))}


def _present(folder: Path) -> Path:
    """``folder``, or what stands in for it since a crash in the middle of its replacement."""
    old = _stand_in(folder)
    return old if not os.path.lexists(folder) and os.path.isfile(old / MANIFEST) else folder


def _best(run: Path) -> str | None:
    """Name of the best checkpoint, or None while none is marked; CheckpointError where it cannot be told."""
    if not os.path.lexists(run / BEST):
        return None
    name = _decode_json(run / BEST, _read(run / BEST)).get("checkpoint")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise CheckpointError(f"{run / BEST} names no checkpoint: {_brief(name)}.")
    return name


def _move_into_place(temporary: Path, directory: Path) -> None:
    """Rename a complete new checkpoint to its place, by way of a stand-in where an older one is there."""
    old = _stand_in(directory)
    try:
        os.rename(temporary, directory)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not os.path.isfile(directory / MANIFEST):
            reason = "it is neither empty nor a checkpoint"
            raise CheckpointError(f"{directory} is not replaced: {reason}.") from None
        if os.path.lexists(old):
            _discard(old)
        os.rename(directory, old)
        os.rename(temporary, directory)
    _sync(directory.parent)
    if os.path.lexists(old):
        _discard(old)


def _clean_up(run: Path) -> None:
    """Delete what a crash left behind in a run folder, and put stand-ins back into their place."""
    for path in list(run.iterdir()) if run.is_dir() else []:
        if _LEFTOVER.fullmatch(path.name):
            _delete(path)
        elif match := _STAND_IN.fullmatch(path.name):
            place = run / match[1]
            if not os.path.isfile(path / MANIFEST) or os.path.isfile(place / MANIFEST):
                _discard(path)
            elif not os.path.lexists(place):
                os.rename(path, place)


def _discard(folder: Path) -> None:
    """Delete a checkpoint folder, under another name first: what looks like a checkpoint is always whole."""
    temporary = _temporary(folder.with_name(folder.name.removeprefix(".").removesuffix(".old")))
    os.rename(folder, temporary)
    _delete(temporary)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)  # what is left is deleted by the next prune
    else:
        path.unlink(missing_ok=True)


def _stand_in(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.old"


def _temporary(path: Path) -> Path:
    return path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"


def _read(path: Path) -> bytes:
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


def _write(path: Path, content: bytes) -> None:
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make the names in ``folder`` durable, where its file system knows of that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
