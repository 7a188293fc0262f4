"""Checks of what people write: each refuses a wrong value with one sentence that names the option."""

from __future__ import annotations

import difflib
import math
import reprlib
import sys
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import numpy as np


def brief(value: Any) -> str:
    """`value` on one line of bearable length."""
    short = reprlib.Repr()
    short.maxstring, short.maxlong, short.maxother = 80, 40, 80
    return short.repr(value)


LARGEST = 2**63 - 1
"""Integer that arrays can hold."""


def check_count(name: str, value: object, least: int, most: int | None = None) -> int:
    """An integer of at least `least`, and at most `most` where that is given.

    Raises:
        ValueError: the value is anything else; one sentence that names the option.
    """
    integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if integer and least <= value <= (LARGEST if most is None else most):  # type: ignore[operator]
        return int(value)  # type: ignore[call-overload]
    if integer and value > LARGEST:  # type: ignore[operator]
        raise ValueError(f"{name} must be an integer below 2**63, which the one given is not.")
    bounds = f"of {least} or more" if most is None else f"from {least} to {most}"
    raise ValueError(f"{name} must be an integer {bounds}, not {brief(value)}.")


def check_flag(name: str, value: object) -> None:
    """Refuse what is neither true nor false.

    Raises:
        ValueError: with one sentence that names the option.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, not {brief(value)}.")


def check_text(name: str, value: object) -> None:
    """Refuse what is no text, or none of one line.

    Raises:
        ValueError: with one sentence that names the option.
    """
    if not isinstance(value, str) or not value or not value.isprintable():
        raise ValueError(f"{name} must be a text of one line, not {brief(value)}.")


def check_mapping(name: str, value: object) -> None:
    """Refuse what is no mapping from text.

    Raises:
        ValueError: with one sentence that names the option.
    """
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{name} must be values by name, not {brief(value)}.")


def check_number(
    name: str, value: float, *, above: float = -math.inf, low: float = -math.inf, high: float = math.inf
) -> None:
    """Refuse what is not a finite number above `above` and in [`low`, `high`].

    Raises:
        ValueError: with one sentence that names the option.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if number and above < value and low <= value <= high:
        return
    bounds = [f"above {above:g}"] if above > -math.inf else []
    bounds += [f"at least {low:g}"] if low > -math.inf else []
    bounds += [f"at most {high:g}"] if high < math.inf else []
    raise ValueError(f"{name} must be a number {' and '.join(bounds)}, not {brief(value)}.")


def check_keys(values: Mapping[str, Any], known: set[str], what: str) -> None:
    """Refuse keys that are not `known`, naming the nearest valid one.

    Raises:
        ValueError: with one sentence, for the first unknown key.
    """
    for key in values:
        if key not in known:
            near = nearest(key, known)
            hint = f"did you mean {near!r}?" if near else f"valid keys are {', '.join(sorted(known))}."
            raise ValueError(f"Unknown {what} key {brief(key)}: {hint}")


Value = TypeVar("Value")


def lookup(entries: Mapping[str, Value], key: str, noun: str) -> Value:
    """Take an entry by a name that a person may have mistyped.

    Args:
        entries: what can be asked for, by name.
        key: what was asked for.
        noun: what an entry is called in the error's sentence.

    Raises:
        ValueError: there is no such entry; the sentence gives the nearest name and lists all.
    """
    try:
        return entries[key]
    except (KeyError, TypeError):
        raise ValueError(f"There is {no_such(noun, key, entries)}") from None


def no_such(noun: str, key: object, valid: Iterable[str]) -> str:
    """The rest of a sentence that begins with "There is": which name is wrong and which are right."""
    valid = sorted(valid)
    near = nearest(key, valid)
    hint = f", did you mean {near!r}?" if near else ""
    return f"no {noun} {brief(key)}{hint} (valid: {', '.join(valid)})."


def nearest(key: object, valid: Iterable[str]) -> str | None:
    """The valid name that a mistyped one most likely stands for; None where none is alike."""
    return next(iter(difflib.get_close_matches(str(key).lower()[:200], sorted(valid), n=1, cutoff=0.5)), None)
