"""A run's folder: its checkpoints, which of them is the best, and what a crash left behind."""

from __future__ import annotations

import atexit
import functools
import json
import math
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Literal

from ssm_metarl import pretrained
from ssm_metarl.storage.atomic import delete, replace_file, temporary_beside
from ssm_metarl.storage.contents import BEST, MANIFEST
from ssm_metarl.storage.documents import CheckpointError, named, number, read_object, record
from ssm_metarl.storage.uri import is_uri, refuse_mangled

_NAME = re.compile(r"checkpoint_([0-9]+)")
_STAND_IN = re.compile(r"\.(checkpoint_[0-9]+)\.old")
_BEST_FORM = record({"checkpoint": named(_NAME, "the name of a checkpoint")}, {"return": number(), "level": number()})
_LEFTOVER = re.compile(r"\.(checkpoint_[0-9]+|best\.json)\.[0-9a-f]{32}\.tmp")


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run folder, by iteration ascending; empty where there is no such folder."""
    return list(_complete(Path(run)).values())


def resolve_checkpoint(path: Path | str) -> Path:
    """The checkpoint folder that `path` means: itself, or a run's best, or its last while none is marked.

    `pretrained:NAME` is a model that comes with the package. A URI is fetched, once in a process.

    Raises:
        CheckpointError: where there is none, or the best cannot be told.
        StorageError: storage at a URI refuses or does not answer, or holds none.
    """
    if str(path).startswith(pretrained.PREFIX):
        try:
            return pretrained.folder(str(path).removeprefix(pretrained.PREFIX))
        except ValueError as error:
            raise CheckpointError(str(error)) from None
    refuse_mangled(path)
    folder = _fetched(str(path)) if is_uri(path) else present(Path(path))
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


@functools.cache
def _fetched(uri: str) -> Path:
    """A run or a checkpoint at a URI, in a folder that goes with this process."""
    from ssm_metarl.storage.mirror import fetch_checkpoint  # it builds on this module

    parent = tempfile.mkdtemp(prefix="ssm-metarl-")
    atexit.register(shutil.rmtree, parent, ignore_errors=True)
    return fetch_checkpoint(uri, Path(parent))


def prune(run: Path, keep_last: int = 3) -> None:
    """Delete all checkpoints of a run but the last and the best, and what a crash left behind.

    The trainer calls it after each save; no other process may be writing to the run. While `best.json` is
    unreadable, no checkpoint is deleted.

    Args:
        run: the run folder.
        keep_last: how many of the last checkpoints stay, at least 1.

    Raises:
        ValueError: for `keep_last` below 1.
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
            discard(path)


def mark_best(run: Path, checkpoint: Path, value: float, measure: Literal["return", "level"] = "return") -> None:
    """Record which checkpoint is the best, in `best.json`, replaced atomically.

    Args:
        run: the run folder.
        checkpoint: a complete checkpoint in it.
        value: that made it the best.
        measure: what the value is: a return of train, or a level of evolve, normalised.

    Raises:
        ValueError: for a NaN or infinite value.
        CheckpointError: where the run has no such complete checkpoint.
        OSError: where the disk refuses.
    """
    run, name = Path(run), Path(checkpoint).name
    if not math.isfinite(value):
        raise ValueError(f"The {measure} of {name} must be a finite number to be the best, not {value!r}.")
    if name not in _complete(run):
        raise CheckpointError(f"{checkpoint} is not a complete checkpoint of {run}.")
    replace_file(run / BEST, json.dumps({"checkpoint": name, measure: float(value)}).encode())


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


def present(folder: Path) -> Path:
    """`folder`, or what stands in for it since a crash in the middle of its replacement."""
    old = stand_in(folder)
    return old if not os.path.lexists(folder) and os.path.isfile(old / MANIFEST) else folder


def best_return(run: Path) -> float | None:
    """The return that made the best checkpoint the best, or None while none is marked by its return.

    Raises:
        CheckpointError: it cannot be told.
    """
    value = read_object(run / BEST, _BEST_FORM).get("return") if os.path.lexists(run / BEST) else None
    return None if value is None else float(value)


def _best(run: Path) -> str | None:
    """Name of the best checkpoint, or None while none is marked; CheckpointError where it cannot be told."""
    return str(read_object(run / BEST, _BEST_FORM)["checkpoint"]) if os.path.lexists(run / BEST) else None


def _clean_up(run: Path) -> None:
    """Delete what a crash left behind in a run folder, and put stand-ins back into their place."""
    for path in list(run.iterdir()) if run.is_dir() else []:
        if _LEFTOVER.fullmatch(path.name):
            delete(path)
        elif match := _STAND_IN.fullmatch(path.name):
            place = run / match[1]
            if not os.path.isfile(path / MANIFEST) or os.path.isfile(place / MANIFEST):
                discard(path)
            elif not os.path.lexists(place):
                os.rename(path, place)


def discard(folder: Path) -> None:
    """Delete a checkpoint folder, under another name first: what looks like a checkpoint is always whole."""
    temporary = temporary_beside(folder.with_name(folder.name.removeprefix(".").removesuffix(".old")))
    os.rename(folder, temporary)
    delete(temporary)


def stand_in(folder: Path) -> Path:
    """The folder that stands in for a checkpoint while it is replaced."""
    return folder.parent / f".{folder.name}.old"


BEGUN = frozenset(("run.json", "config.yaml", "schedule.json"))
"""What a run writes before its first checkpoint."""


def prepare_run(run: Path) -> None:
    """Make the folder of a new run.

    Raises:
        ValueError: it is not empty, or cannot be made.
    """
    check_new(run)
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{run} cannot be made: {error.strerror}.") from None


def check_new(run: Path) -> None:
    """Refuse a folder that is not empty, or a URI that became one; one of a run that was killed as it began is as new.

    Raises:
        ValueError: it is.
    """
    refuse_mangled(run)
    names = {path.name for path in run.iterdir() if not path.name.startswith(".")} if run.is_dir() else set()
    if names and not ("run.json" in names and names <= BEGUN):
        raise ValueError(f"{run} is not empty; resume the run in it, or choose another folder.")
