"""The command line; `python -m ssm_metarl`, `ssm-metarl` and `run_local.py` begin here."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import NoReturn


def main() -> int:
    """Carry out the command of this process's arguments; returns the exit code."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook's, which its terminals inherit, is not to be had here
    _fill_missing_streams()
    try:
        from ssm_metarl.distributed.signals import loading

        with loading():
            from ssm_metarl.cli.main import main as carry_out
        return carry_out(end=_end_at_once)
    except KeyboardInterrupt:
        return _end_at_once(130)


def _fill_missing_streams() -> None:
    """Where stdin, stdout or stderr is closed, have its number taken, or the next file would get what is printed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free


def _end_at_once(code: int) -> NoReturn:
    """End this process without what Python and Ray do at an exit: a Ray that was being started crashes there at times.

    The kernel ends the processes of such a Ray.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # nobody reads it, or it is closed
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    raise SystemExit(main())
