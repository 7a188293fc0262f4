"""A checkpoint is data: the code that its config names runs only if the person who gives the command wants it to.

A task `module:attribute`, and an environment `gym:ID` that is not gymnasium's own, is code somewhere on the Python path
or in the working folder. Whoever names it in a command runs it knowingly; a file that names it does not. A run that
was started here is remembered outside of its folder, with the task that was named, so that it is resumed without a
question.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssm_metarl import pretrained
from ssm_metarl.storage.atomic import replace_file
from ssm_metarl.storage.documents import CheckpointError, list_of, read_object, record, text
from ssm_metarl.tasks import names_code

MOST = 2000
"""Runs that are remembered, the newest ones."""

_FORM = record({"runs": list_of(record({"folder": text, "task": text}))})


def runs_file() -> Path:
    """Where this user's runs are remembered."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "ssm-metarl" / "runs.json"


def remember(run: Path, task: str) -> None:
    """Note that this user started a run of a task in a folder; where that cannot be written, nothing is noted."""
    entry = {"folder": str(run.resolve()), "task": task}
    known = [each for each in _known() if each["folder"] != entry["folder"]]
    path = runs_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        replace_file(path, json.dumps({"runs": [*known, entry][-MOST:]}, indent=1).encode(), mode=0o600)
    except OSError:
        return  # then resuming asks


def is_own(folder: Path, task: str) -> bool:
    """Whether this user started a run of the task in the folder, or in one that the folder is in."""
    own = {each["folder"] for each in _known() if each["task"] == task}
    place = folder.resolve()
    return any(str(each) in own for each in (place, *place.parents))


def check_task(
    path: str | Path,
    task: str,
    *,
    options: Mapping[str, Any] | None = None,
    given: str | None = None,
    trusted: bool = False,
) -> None:
    """Refuse to run the code that a checkpoint or a run names, unless it is wanted.

    Options of a gym: environment go to its constructor, which may read the files that they name: with any, it counts as
    code, too.

    Args:
        path: of the checkpoint, or of the run.
        task: that its config names.
        options: of the task, as far as its config has them.
        given: the task that the command itself names.
        trusted: the command says that the checkpoint's code may run.

    Raises:
        CheckpointError: nobody wants it; one sentence that says how to.
    """
    if not (names_code(task) or (task.startswith("gym:") and options)) or task == given or trusted:
        return
    if not str(path).startswith(pretrained.PREFIX) and is_own(Path(path), task):
        return
    raise CheckpointError(
        f"{path} names the task {task!r}, which is code that a file does not start by itself: if you know it, say "
        f"--task {task} or --trust-checkpoint-code."
    )


def _known() -> list[dict[str, str]]:
    """What is remembered, if the file is this user's own and nobody else's to write."""
    path = runs_file()
    try:
        found = os.lstat(path)
        if found.st_uid != os.getuid() or found.st_mode & 0o022:
            return []
        runs: list[dict[str, str]] = read_object(path, _FORM)["runs"]
    except (OSError, CheckpointError):
        return []
    return runs
