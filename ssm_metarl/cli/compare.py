"""`compare`, and what `train --seeds` shows at the end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssm_metarl.cli.console import answer, console, say
from ssm_metarl.cli.options import Compare
from ssm_metarl.cli.report import groups_table, write_report
from ssm_metarl.evaluation.groups import Group, compare_groups, read_group


def run_compare(options: Compare) -> int:
    """Carry out `compare`; returns the exit code."""
    if not options.runs:
        raise ValueError("compare needs runs: folders of runs, or of several each, such as runs/a runs/b.")
    groups = [read_group(words) for words in options.runs]
    names = [group.name for group in groups]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"Two groups are called {name!r}: NAME=FOLDER names them.")
    found = show_groups(groups, options.out)
    if options.json:
        answer(json.dumps(found))
    return 0


def show_groups(groups: Sequence[Group], out: Path | None) -> dict[str, Any]:
    """Print the table of some groups, and write the page where one is asked for; returns the numbers."""
    found = compare_groups(groups)
    console.print(groups_table(found))
    for folder in [folder for group in groups for folder in group.missing]:
        say(f"{folder} was not evaluated, and is left out.")
    if out is not None:
        say(f"Report: {write_report(found, groups, out)}")
    return found
