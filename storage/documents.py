"""The only way in which a file of a run is read: nothing endless, no link, and JSON of a form that is known."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import sys
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ssm_metarl.checks import brief

DEEPEST = 32
"""Levels of lists and objects in a JSON file; ours have at most 8."""

SMALL = 2**20
"""Bytes at most of a JSON file, or of a line of a log."""

LARGE = 2**28
"""Bytes at most of a log, or of the state of a population."""


class CheckpointError(ValueError):
    """A checkpoint cannot be loaded, found or written: one sentence that names the file and the reason."""


# --- Files ------------------------------------------------------------------------------------------------


def read_file(path: Path, most: int | None = None) -> bytes:
    """Content of a regular file; neither follows a link nor waits for the other end of a pipe.

    Args:
        path: of the file.
        most: bytes; a larger file is not read at all.

    Raises:
        CheckpointError: it is not there, no regular file, too large or unreadable.
    """
    try:
        with open(path, "rb", opener=_open_itself) as file:
            found = os.fstat(file.fileno())
            if stat.S_ISREG(found.st_mode):
                if most is not None and found.st_size > most:
                    raise CheckpointError(f"{path} is too large: it has {found.st_size:,} bytes, at most {most:,}.")
                return file.read(found.st_size if most is None else most)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.") from None
    except (OSError, MemoryError) as error:
        if isinstance(error, OSError) and error.errno == errno.ELOOP:
            raise CheckpointError(f"{path} is a symbolic link, which is not followed.") from None
        raise CheckpointError(f"{path} is unreadable: {getattr(error, 'strerror', 'too large')}.") from None
    raise CheckpointError(f"{path} is not a regular file.")


def file_size(path: Path) -> int:
    """Bytes of a regular file, without reading it; 0 for what is none, which `read_file` refuses."""
    try:
        found = os.lstat(path)
    except (OSError, ValueError):
        return 0
    return found.st_size if stat.S_ISREG(found.st_mode) else 0


def _open_itself(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


# --- JSON -------------------------------------------------------------------------------------------------


def decode_json(path: Path, content: bytes, *, constants: bool = False) -> dict[str, Any]:
    """The JSON object of a file: not deeper than `DEEPEST`, with text that can be written again.

    Args:
        path: of the file, for the error.
        content: of it.
        constants: NaN and the infinities are numbers, as Python writes them; otherwise they are refused.

    Raises:
        CheckpointError: it is none.
    """
    try:
        values = json.loads(content.decode(), parse_constant=float if constants else _refuse_constant)
        _check_tree(values)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({textwrap.shorten(str(error), 300)}).") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is foreign: it holds no JSON object.")
    return values


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _check_tree(values: Any) -> None:
    """Refuse what is nested too deeply, and halves of characters, which nothing can print."""
    level = [values]
    for _ in range(DEEPEST + 1):
        if not level:
            return
        below: list[Any] = []
        for value in level:
            if isinstance(value, str):
                value.encode()  # UnicodeEncodeError, a ValueError
            elif isinstance(value, dict):
                below += value
                below += value.values()
            elif isinstance(value, list):
                below += value
        level = below
    raise ValueError(f"it is nested deeper than {DEEPEST} levels")


# --- Forms ------------------------------------------------------------------------------------------------

Form = Callable[[str, Any], None]
"""Refuses, with a ValueError, a value that is not as it must be; the text says where in the file the value is."""


def read_object(path: Path, form: Form, most: int = SMALL, *, constants: bool = False) -> dict[str, Any]:
    """A JSON file of a known form.

    Args:
        path: of the file.
        form: of its content.
        most: bytes.
        constants: see `decode_json`.

    Raises:
        CheckpointError: it is missing, too large, no JSON, or of another form; one sentence that names the file.
    """
    values: dict[str, Any] = checked(path, decode_json(path, read_file(path, most), constants=constants), form)
    return values


def checked(path: Path | str, values: Any, form: Form) -> Any:
    """The values themselves, if they are of a form.

    Raises:
        CheckpointError: they are not; one sentence that names the file.
    """
    try:
        form("", values)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged or foreign: {str(error).strip()}.") from None
    return values


def read_lines(path: Path, form: Form, *, constants: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a log of JSON objects, each as text and as values; a last one that a crash tore is left out.

    Raises:
        CheckpointError: the log is too large, or a line is no JSON or of another form; the sentence says which.
    """
    lines = read_file(path, LARGE).split(b"\n")
    for number, line in enumerate(lines[:-1], 1):  # what comes after the last line break is torn, or nothing
        where = Path(f"{path}, line {number}")
        if len(line) > SMALL:
            raise CheckpointError(f"{where} is too large: it has {len(line):,} bytes, at most {SMALL:,}.")
        values = checked(where, decode_json(where, line, constants=constants), form)
        yield line.decode(), values


def _refuse(at: str, wanted: str, value: Any) -> None:
    raise ValueError(f"{at or 'the content'} must be {wanted}, not {brief(value)}")


def whole(low: int = 0, high: int = 2**63 - 1) -> Form:
    """An integer from `low` to `high`."""

    def form(at: str, value: Any) -> None:
        if type(value) is not int or not low <= value <= high:
            wanted = f"from {low} to {high}" if high < 2**63 - 1 else f"of {low} or more"
            _refuse(at, f"an integer {wanted}", value)

    return form


def number(low: float = -sys.float_info.max, above: float | None = None) -> Form:
    """A finite number of `low` or more, or greater than `above`."""

    def form(at: str, value: Any) -> None:
        real = type(value) in (int, float) and low <= value <= sys.float_info.max
        if not real or (above is not None and value <= above):
            least = f" above {above:g}" if above is not None else f" of {low:g} or more" if low > -1e300 else ""
            _refuse(at, f"a finite number{least}", value)

    return form


def any_number(at: str, value: Any) -> None:
    """A number, NaN and the infinities among them."""
    if type(value) is int and abs(value) <= sys.float_info.max:
        return
    if type(value) is not float:
        _refuse(at, "a number", value)


def text(at: str, value: Any) -> None:
    """Any text."""
    if not isinstance(value, str):
        _refuse(at, "text", value)


def named(pattern: re.Pattern[str], what: str) -> Form:
    """Text that a pattern matches as a whole."""

    def form(at: str, value: Any) -> None:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            _refuse(at, what, value)

    return form


def flag(at: str, value: Any) -> None:
    """True or false."""
    if not isinstance(value, bool):
        _refuse(at, "true or false", value)


def anything(at: str, value: Any) -> None:
    """Any JSON value."""


def one_of(valid: Collection[str]) -> Form:
    """One of some texts."""

    def form(at: str, value: Any) -> None:
        if not isinstance(value, str) or value not in valid:
            _refuse(at, f"one of {', '.join(valid)}", value)

    return form


def maybe(inner: Form) -> Form:
    """Null, or another form."""

    def form(at: str, value: Any) -> None:
        if value is not None:
            inner(at, value)

    return form


def list_of(inner: Form, least: int = 0, most: int | None = None) -> Form:
    """A list of values of one form, from `least` to `most` of them."""

    def form(at: str, value: Any) -> None:
        if not isinstance(value, list) or len(value) < least or (most is not None and len(value) > most):
            count = f"{least}" if least == most else f"{least} or more" if most is None else f"{least} to {most}"
            _refuse(at, f"a list of {count} values" if least or most is not None else "a list", value)
        for index, each in enumerate(value):
            inner(f"{at}[{index}]", each)

    return form


def map_of(inner: Form) -> Form:
    """An object with any keys, and values of one form."""

    def form(at: str, value: Any) -> None:
        if not isinstance(value, dict):
            _refuse(at, "an object", value)
        for key, each in value.items():
            inner(f"{at}[{brief(key)}]" if at else brief(key), each)

    return form


def record(required: Mapping[str, Form], optional: Mapping[str, Form] | None = None, *, others: bool = False) -> Form:
    """An object with certain keys.

    Args:
        required: forms by key.
        optional: the same for keys that may be missing.
        others: further keys may be there, with any value.
    """
    known = {**required, **(optional or {})}

    def form(at: str, value: Any) -> None:
        where = f"{at} " if at else ""
        if not isinstance(value, dict):
            _refuse(at, "an object", value)
        for key in required:
            if key not in value:
                raise ValueError(f"{where}has no {key!r}")
        for key, each in value.items():
            if key in known:
                known[key](f"{at}[{key!r}]" if at else repr(key), each)
            elif not others:
                raise ValueError(f"{where}has an unknown {brief(key)}")

    return form


def both(*forms: Form) -> Form:
    """What several forms demand."""

    def form(at: str, value: Any) -> None:
        for each in forms:
            each(at, value)

    return form
