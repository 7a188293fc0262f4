"""Signals that end a run after its iteration, or a program that is still being loaded."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_log = logging.getLogger(__name__)

_received: list[list[int]] = []
"""Of the runs that `interrupts` ends; one at most in practice."""


@contextmanager
def interrupts(what: str) -> Iterator[list[int]]:
    """A list that gets the number of the first SIGINT, SIGTERM or SIGHUP; the second ends the process at once.

    SIGHUP, which a closed terminal sends, stays ignored where it is, as under nohup. Signals are received in the main
    thread only.

    Args:
        what: the run does before it ends, such as "The iteration is being finished", which the first signal tells.

    Raises:
        KeyboardInterrupt: the second signal is SIGINT.
        SystemExit: it is another; with 128 and its number.
    """
    received: list[int] = []
    _received.append(received)
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        numbers.remove(signal.SIGHUP)
    if threading.current_thread() is not threading.main_thread():
        numbers.clear()

    def note(number: int, _frame: object) -> None:
        if not received:
            received.append(number)
            again = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
            with suppress(RuntimeError):  # it interrupted the writing of a line
                _log.warning("%s; another %s ends it at once.", what, again)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise SystemExit(128 + number)

    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield received
    finally:
        _received.remove(received)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def loading() -> Iterator[None]:
    """Meanwhile Ctrl-C ends the process at once, in silence and with 130.

    For imports: a KeyboardInterrupt in the midst of one may meet C++ code, which aborts the process with words of its
    own. Where SIGINT is ignored or handled otherwise, or in another thread, nothing changes.
    """
    mine = threading.current_thread() is threading.main_thread()
    if not mine or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, lambda _number, _frame: os._exit(128 + signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def hang_up() -> None:
    """Nobody reads what this process writes: a run ends after its iteration, anything else at once.

    Raises:
        SystemExit: with 141, as if by SIGPIPE.
    """
    for received in _received:
        received.append(signal.SIGPIPE)
    if not _received:
        raise SystemExit(128 + signal.SIGPIPE)
