"""The command line; `python -m ssm_metarl`, `ssm-metarl` and `run_local.py` begin here."""

from __future__ import annotations

import os


def main() -> int:
    """Carry out the command of this process's arguments; returns the exit code."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook's, which its terminals inherit, is not to be had here
    try:  # Ctrl-C while the program is loaded ends it quietly, too
        from ssm_metarl.cli.main import main as carry_out

        return carry_out()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
