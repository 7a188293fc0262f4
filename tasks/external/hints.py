"""Hints of gymnasium's environment checker on an environment that is not ours.

The checker runs in a process of its own. There it takes none of the run's random numbers, leaves no environment open,
prints nothing, and takes nothing down with it where a step ends the process.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium.utils.env_checker import check_env

from ssm_metarl.tasks.external.family import AdaptedFamily
from ssm_metarl.tasks.external.lending import close_all
from ssm_metarl.tasks.external.names import from_name

SECONDS = 20.0
"""Longest that the checker may take."""

MOST = 5
"""Most hints."""

IRRELEVANT = re.compile(
    "-infinity|infinity. This is probably too high"  # observations are normalised, and actions may have no bounds
    "|symmetric and normalized"  # actions are mapped to the bounds
    "|different from the unwrapped version"
    "|truncates after 1 step"
    "|Casting input x to numpy array"  # said again of what is no array
)
"""Findings that do not matter here."""


def hints(name: str, options: Mapping[str, Any] = {}, ranges: Mapping[str, Any] = {}) -> list[str]:
    """Findings of `gymnasium.utils.env_checker` on the environment of a family `gym:ID` or `module:attribute`.

    Args:
        name: of the family.
        options, ranges: of the family.

    Returns:
        A sentence each; none where nothing was found, or where the environment could not be checked.
    """
    path = os.pathsep.join(entry for entry in sys.path if isinstance(entry, str))
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__],
            input=json.dumps([name, dict(options), dict(ranges)]).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
            timeout=SECONDS,
            check=True,
        )
        found: list[str] = json.loads(done.stdout)
    except (subprocess.SubprocessError, OSError, TypeError, ValueError):
        return []
    return [f"Hint for {name}, from gymnasium's environment checker: {sentence}" for sentence in found[:MOST]]


_checked: set[str] = set()


def new_hints(name: str, options: Mapping[str, Any] = {}, ranges: Mapping[str, Any] = {}) -> list[str]:
    """`hints`, the first time that this process asks for those of a family."""
    key = repr((name, options, ranges))
    if key in _checked:
        return []
    _checked.add(key)
    return hints(name, options, ranges)


def findings(family: AdaptedFamily) -> list[str]:
    """What the checker finds in an environment of a family, in this process."""
    (task,) = family.sample(1, np.random.default_rng(0))
    env = family.environment(task)
    found = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            check_env(env, skip_render_check=True)
        except (AssertionError, gymnasium.error.Error) as error:
            found.append(str(error))
        except Exception:
            pass
        finally:
            close_all([env])
    found += [str(each.message) for each in warned]
    plain = [" ".join(re.sub(r"\x1b\[[\d;]*m", "", text).split()).removeprefix("WARN: ") for text in found]
    return [text for text in dict.fromkeys(plain) if text and not IRRELEVANT.search(text)]


def _main() -> None:
    """Read a name, options and ranges from stdin; write the findings to stdout, which is nobody else's."""
    kept = os.dup(1)
    os.dup2(2, 1)
    name, options, ranges = json.load(sys.stdin)
    family = from_name(name, ranges, **options)
    found = findings(family) if isinstance(family, AdaptedFamily) else []
    with os.fdopen(kept, "w") as out:
        json.dump(found, out)


if __name__ == "__main__":
    _main()
