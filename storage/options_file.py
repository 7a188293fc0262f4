"""A file of options: what `--config` reads, and what every run folder holds beside where and with what it was made."""

from __future__ import annotations

import datetime
import json
import re
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable, Collection, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

import ssm_metarl
from ssm_metarl.checks import brief, no_such
from ssm_metarl.storage.atomic import replace_file
from ssm_metarl.storage.documents import SMALL, CheckpointError, read_file

CONFIG = "config.yaml"
"""A run's file of options."""

MADE = "made"
"""Entry of a file of options that says where and with what it was made; nothing reads it."""

COMMAND = "command"

PACKAGES = ("torch", "ray", "gymnasium", "numpy")


class _Loader(yaml.SafeLoader):
    """YAML with the floats of its version 1.2, such as 1e-3, and without references."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("references (*name) are not followed")
        return super().compose_node(parent, index)


_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def _read_yaml(text: str) -> Any:
    return yaml.load(text, _Loader)


READERS: Mapping[str, Callable[[str], Any]] = {
    ".toml": tomllib.loads,
    ".yaml": _read_yaml,
    ".yml": _read_yaml,
    ".json": json.loads,
}
"""How a file of a suffix is read."""


def save_options(path: Path, command: str, options: Mapping[str, Any]) -> None:
    """Write a file of options, YAML or JSON by its suffix.

    Args:
        path: .yaml, .yml or .json.
        command: whose options they are.
        options: JSON values by name, as on the command line.

    Raises:
        ValueError: another suffix.
    """
    content = {COMMAND: command, **json.loads(json.dumps(options)), MADE: made()}
    if path.suffix == ".json":
        replace_file(path, (json.dumps(content, indent=1) + "\n").encode())
    elif path.suffix in (".yaml", ".yml"):
        text: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        replace_file(path, text.encode())
    else:
        raise ValueError(f"Options are saved as .yaml, .yml or .json, not as {path.name!r}.")


def read_options(path: Path, command: str, names: Collection[str]) -> dict[str, Any]:
    """The options that a file gives. Tables in it, such as [policy] of TOML, only group them.

    Args:
        path: .toml, .yaml, .yml or .json.
        command: that reads it.
        names: of its options.

    Raises:
        ValueError: the file is damaged, of another command, or names an option that there is not; one sentence.
    """
    if path.suffix not in READERS:
        raise ValueError(f"--config takes {', '.join(READERS)}, not {path.name!r}.")
    try:
        content = READERS[path.suffix](read_file(path.resolve(), SMALL).decode())
    except CheckpointError:
        raise
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split()) or "too deep"
        raise ValueError(f"{path} cannot be read: {reason}.") from None
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"{path} must hold options by name, not {brief(content)}.")
    if content.get(COMMAND, command) != command:
        raise ValueError(f"{path} has the options of {content[COMMAND]}, not of {command}.")
    found: dict[str, Any] = {}
    for name, value in content.items():
        if name in (COMMAND, MADE):
            continue
        table = isinstance(value, Mapping) and name not in names
        for key, each in (value if table else {name: value}).items():
            if key not in names:
                raise ValueError(f"{path}: there is {no_such('option', str(key), names)}")
            found[key] = tuple(each) if isinstance(each, list) else each
    return found


def made() -> dict[str, Any]:
    """Where, when and with what something is made: versions, commit, host."""
    versions = {name: _version(name) for name in PACKAGES}
    return {
        "ssm-metarl": ssm_metarl.__version__,
        "python": ".".join(map(str, sys.version_info[:3])),
        **{name: version for name, version in versions.items() if version},
        **{key: commit for key, folder in _FOLDERS.items() if (commit := _commit(folder))},
        "host": socket.gethostname(),
        "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


_FOLDERS = {"commit": Path(), "ssm-metarl commit": Path(ssm_metarl.__file__).resolve().parent}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit(folder: Path) -> str | None:
    """The commit of the working tree that holds a folder, with a mark where files differ from it; None without one."""
    try:
        words = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
