"""What a run is beside its checkpoints: its identity, its options of the end, and where it is resumed."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

from ssm_metarl.storage.atomic import delete, replace_file
from ssm_metarl.storage.checkpoint import load_checkpoint
from ssm_metarl.storage.contents import BEST
from ssm_metarl.storage.documents import CheckpointError, flag, list_of, read_object, record, text, whole
from ssm_metarl.storage.run_folder import checkpoints, resolve_checkpoint

RECORD = "run.json"
"""File of a run's identity and of the options that its checkpoints do not hold."""

_FORM = record(
    {"id": text},
    {"iterations": whole(1), "eval_tasks": whole(1), "log": list_of(text), "elastic": flag, "copy": text},
    others=True,
)


def read_record(run: Path) -> dict[str, Any]:
    """What a run keeps, empty where nothing was written: "id", and where it has them "iterations", how many it is to
    have, "eval_tasks", "log", "elastic", and the place of its "copy".

    Raises:
        CheckpointError: the file is damaged.
    """
    path = Path(run) / RECORD
    return read_object(path, _FORM) if os.path.lexists(path) else {}


def write_record(run: Path, **options: Any) -> dict[str, Any]:
    """Keep options of a run beside its identity, which it gets with the first."""
    old = read_record(run)
    new = {"id": uuid.uuid4().hex, **old, **options}
    if new != old:
        replace_file(Path(run) / RECORD, json.dumps(new, indent=1).encode())
    return new


def checkpoint_to_resume(run: Path, name: str | None = None) -> Path:
    """The newest checkpoint of a run, or the one of a name.

    Raises:
        ValueError: there is none.
        CheckpointError: it is damaged, and the sentence names the one before, if that is whole; or there is none of the
            name, and the sentence lists those that there are.
    """
    if name is not None:
        return _named(run, name)[1]
    found = checkpoints(run) if run.is_dir() else []
    if not found:
        raise ValueError(f"There is no checkpoint in {run} to resume from.")
    try:
        load_checkpoint(found[-1])
    except CheckpointError as error:
        for before in reversed(found[:-1]):
            try:
                load_checkpoint(before)
            except CheckpointError:
                continue
            name = before.name.removeprefix(".").removesuffix(".old")
            raise CheckpointError(f"{error} The one before is whole: resume with --resume-from {name}.") from None
        raise
    return found[-1]


def set_aside_later(run: Path, name: str) -> Path:
    """Let a checkpoint be the newest of its run: later ones are renamed to `.NAME.aside`, which nothing reads.

    Raises:
        CheckpointError: the run has no such checkpoint, or it is damaged, and nothing changes.
    """
    found, kept = _named(run, name)
    load_checkpoint(kept)
    names = list(found)
    for later in names[names.index(name) + 1 :]:
        place = run / f".{later}.aside"
        if os.path.lexists(place):
            delete(place)
        os.rename(found[later], place)
    try:
        resolve_checkpoint(run)
    except CheckpointError:  # what was the best is aside
        delete(run / BEST)
    return kept


def _named(run: Path, name: str) -> tuple[dict[str, Path], Path]:
    """The checkpoints of a run by their names, and the one of a name."""
    found = {path.name.removeprefix(".").removesuffix(".old"): path for path in checkpoints(run)}
    if name not in found:
        raise CheckpointError(f"{run} has no checkpoint {name!r}; it has {', '.join(found) or 'none'}.")
    return found, found[name]
