"""Checkpoints: a crash at any moment leaves a complete one, and one is read only if every byte is as written.

A run folder holds `checkpoint_000123/` folders and `best.json`. A checkpoint holds

    policy.safetensors, optimizer.safetensors, config.json, progress.json, manifest.json

and, of a run with `--replay-episodes`, replay.safetensors. The manifest, written last, has the format's version, the
SHA-256 and the size of each other file: no manifest, no checkpoint. A checkpoint is made in a hidden folder beside its
place and renamed. One that is to be replaced is first renamed to `.checkpoint_000123.old`, which stands in for it
should the process die before the new one is in place.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from ssm_metarl import pretrained
from ssm_metarl.storage.atomic import naming, sync_folder, temporary_beside, write_new
from ssm_metarl.storage.contents import (
    MANIFEST,
    Checkpoint,
    CheckpointError,
    check_sizes,
    decode,
    encode,
    manifest_of,
    read_contents,
)
from ssm_metarl.storage.run_folder import discard, present, resolve_checkpoint, stand_in

if TYPE_CHECKING:
    from ssm_metarl.algorithms.policy import SSMPolicy


def save_checkpoint(directory: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint; whatever happens, one that was there before stays until the new one is complete.

    Args:
        directory: the final folder, such as `run/checkpoint_000123`: absent, empty, or a checkpoint, which
            is then replaced.
        checkpoint: what to write.

    Returns:
        `directory`.

    Raises:
        CheckpointError: where `load_checkpoint` would refuse the result (NaN or infinite numbers, arrays
            that do not fit the spec, values that are not JSON), or the folder holds anything else; nothing on
            disk changes.
        OSError: where the disk refuses.
    """
    directory = Path(directory)
    contents = encode(directory, checkpoint)
    decode(directory, contents)
    check_sizes(directory, checkpoint, contents)
    manifest = manifest_of(contents)
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(directory)
    try:
        temporary.mkdir()
        for name, content in (*contents.items(), (MANIFEST, manifest)):
            with naming(directory / name):
                write_new(temporary / name, content)
        sync_folder(temporary)
        _move_into_place(temporary, directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return directory


def load_checkpoint(path: Path | str) -> Checkpoint:
    """Read a checkpoint folder; nothing is returned before everything in it is verified.

    Args:
        path: the checkpoint's folder, under any name (`resolve_checkpoint` finds one in a run folder).

    Raises:
        CheckpointError: where a file is missing, unreadable, truncated, altered, a link, too large, of an
            unknown format, or does not fit the policy that `config.json` describes.
    """
    folder = present(Path(path))
    if not os.path.isdir(folder):
        raise CheckpointError(f"{folder} is not a checkpoint: there is no such folder.")
    if not os.path.lexists(folder / MANIFEST):
        raise CheckpointError(f"{folder} is not a complete checkpoint: it has no {MANIFEST}.")
    return decode(folder, read_contents(folder))


def load_policy(path: str | Path) -> tuple[SSMPolicy, Checkpoint]:
    """The policy of a checkpoint, of a run's best one, or of `pretrained:NAME`, and the checkpoint itself.

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


def _move_into_place(temporary: Path, directory: Path) -> None:
    """Rename a complete new checkpoint to its place, by way of a stand-in where an older one is there."""
    old = stand_in(directory)
    try:
        os.rename(temporary, directory)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not os.path.isfile(directory / MANIFEST):
            reason = "it is neither empty nor a checkpoint"
            raise CheckpointError(f"{directory} is not replaced: {reason}.") from None
        if os.path.lexists(old):
            discard(old)
        os.rename(directory, old)
        os.rename(temporary, directory)
    sync_folder(directory.parent)
    if os.path.lexists(old):
        discard(old)
