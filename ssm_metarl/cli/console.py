"""The terminal that commands write to: what they say to stderr, and what they answer to stdout."""

from __future__ import annotations

import io
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from typing import Any, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from ssm_metarl.distributed.signals import hang_up

RUNS = "runs"
"""Parent of the run folders."""

FROM_RAY = "(raylet)"
"""What Ray prints on its own contains this; its log files have it, too."""


class _Stderr(io.TextIOBase):
    """What sys.stderr is at the moment; where nobody reads any more, the command is told so once, and goes on."""

    _lost = False

    @property
    def _file(self) -> Any:
        return getattr(sys.stderr, "rich_proxied_file", sys.stderr)  # what rich has put in its place writes here

    def write(self, text: str) -> int:
        self._attempt("write", text)
        return len(text)

    def flush(self) -> None:
        self._attempt("flush")

    def _attempt(self, method: str, *arguments: str) -> None:
        if self._lost or self._file is None:
            return
        try:
            getattr(self._file, method)(*arguments)
        except OSError:  # the reader of a pipe has ended, or the terminal is closed
            self._lost = True
            hang_up()

    def isatty(self) -> bool:
        return bool(self._file is not None and self._file.isatty())

    def fileno(self) -> int:
        if self._file is None:
            raise io.UnsupportedOperation("fileno")
        return int(self._file.fileno())

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._file, "encoding", None) or "utf-8"


console = Console(file=_Stderr())  # type: ignore[arg-type]

_answers: list[TextIO] = []


def progress_bar(*words: str) -> Progress:
    """A bar of iterations on the terminal, without effect where there is none.

    Args:
        words: fields of its tasks that are shown, too.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *(TextColumn(f"{{task.fields[{word}]}}") for word in words),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        redirect_stdout=False,  # it goes to stderr
    )


def say(line: str) -> None:
    """A line to stderr as it is: paths may be long and hold brackets."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def answer(text: str, end: str = "\n") -> None:
    """What a command was asked for, to stdout; where nobody reads it, the command ends."""
    try:
        print(text, end=end, flush=True, file=_answers[-1] if _answers else None)
    except BrokenPipeError:
        hang_up()


def complain(error: Exception) -> None:
    """Say what went wrong, in the one sentence of an exception and its notes."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}."
    else:
        text = str(error)
    text = " ".join([text, *getattr(error, "__notes__", ())])
    console.print(f"error: {text}", style="bold red", markup=False, highlight=False, soft_wrap=True)


class _Kept(io.StringIO):
    """Keeps what is printed to stdout, which may depend on what stdout can show."""

    def __init__(self) -> None:
        super().__init__()
        self._out = sys.stdout

    def isatty(self) -> bool:
        return bool(self._out and self._out.isatty())

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._out, "encoding", None) or "utf-8"


@contextmanager
def folded() -> Iterator[None]:
    """What is printed meanwhile comes at the end, in lines of the terminal's width."""
    kept, shown = _Kept(), io.StringIO()
    try:
        with redirect_stdout(kept):
            yield
    finally:
        width = shutil.get_terminal_size().columns
        page = Console(file=shown, width=width, force_terminal=kept.isatty(), color_system="standard")
        page.print(Text.from_ansi(kept.getvalue()), end="")
        answer(shown.getvalue(), end="")


class _Notes(io.TextIOBase):
    """What environments and libraries print: to stderr, but for lines of Ray's own."""

    def __init__(self) -> None:
        self._begun = ""

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            if FROM_RAY not in line and sys.stderr is not None:
                with suppress(OSError):
                    sys.stderr.write(line + "\n")
        return len(text)

    def flush(self) -> None:
        if self._begun and FROM_RAY not in self._begun:
            self.write("\n")


@contextmanager
def own_stdout() -> Iterator[None]:
    """Keep stdout for `answer`: what else is printed, also by libraries in C, goes to stderr."""
    with ExitStack() as stack:
        out = sys.stdout
        with suppress(OSError, ValueError, AttributeError):  # closed, or replaced by something that is no file
            if out.fileno() == 1:
                out.flush()
                kept = os.dup(1)
                stack.callback(os.close, kept)
                os.dup2(2, 1)
                stack.callback(os.dup2, kept, 1)
                out = open(kept, "w", encoding=out.encoding, errors=out.errors, closefd=False)  # noqa: SIM115
        _answers.append(out)
        stack.callback(_answers.pop)
        notes = stack.enter_context(redirect_stdout(_Notes()))
        stack.callback(notes.flush)
        yield


class _Saying(logging.Handler):
    """What this package logs, said."""

    def emit(self, record: logging.LogRecord) -> None:
        """Say a line; a signal's handler may have interrupted one."""
        with suppress(RuntimeError):
            say(record.getMessage())


@contextmanager
def log_said() -> Iterator[None]:
    """Say what this package logs from warnings on."""
    log, handler = logging.getLogger("ssm_metarl"), _Saying(logging.WARNING)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
