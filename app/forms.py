"""What a person has set: kept in the browser over a reload, and shown as the command that a click runs."""

from __future__ import annotations

import functools
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gradio as gr
from gradio.components import Component
from gradio.events import Dependency

from ssm_metarl.app.guard import check_types, is_number
from ssm_metarl.app.view import POLL, sentence

PROGRAM = "ssm-metarl"

NO_SECRET = "what is set in boxes"
"""Gradio encrypts what it keeps in a browser with a key that the page shows; a fixed one outlives the server."""

AGAIN = "Stop it, or go on with it, from the command line"

LONGEST = 2000
"""Most characters of a text that is taken back from a browser."""


def browser_store(key: str) -> gr.BrowserState:
    """A place in the browser's own storage for a form; outside of all tabs, for one that is not seen is not read."""
    return gr.BrowserState({}, storage_key=f"{PROGRAM} {key}", secret=NO_SECRET)


def remember(
    page: gr.Blocks, store: gr.BrowserState, boxes: Mapping[str, Any], set_by: Sequence[Dependency] = ()
) -> Dependency:
    """Keep what a person sets in the browser's own storage, and put it back when the page is opened.

    Args:
        page: that the boxes are on.
        store: for this form.
        boxes: by name.
        set_by: events that set boxes by themselves.

    Returns:
        The event that has put the values back; what a page shows first can follow it.
    """
    names, kept = json.dumps(list(boxes)), {"outputs": store, "inputs": list(boxes.values()), "show_progress": "hidden"}
    # In the browser alone: the server is not asked.
    kept["js"] = f"(...values) => Object.fromEntries({names}.map((name, i) => [name, values[i]]))"
    # A list of several has no event of its own for what a person chose.
    gr.on([box.change if getattr(box, "multiselect", False) else box.input for box in boxes.values()], None, **kept)
    for event in set_by:
        event.then(None, **kept)

    def restore(saved: object) -> list[Any]:
        known = saved if isinstance(saved, dict) else {}
        values = [box_value(box, known.get(name)) for name, box in boxes.items()]
        return values if len(values) > 1 else values[0]

    restored: Dependency = page.load(restore, store, list(boxes.values()), **POLL)
    return restored


def box_value(box: Component, value: Any) -> Any:
    """A value that a browser kept, if the box can hold it; else what leaves the box as it is."""
    match box:
        case gr.Slider():
            fits = is_number(value) and box.minimum <= value <= box.maximum
        case gr.Number():
            low = -float("inf") if box.minimum is None else box.minimum
            high = float("inf") if box.maximum is None else box.maximum
            fits = is_number(value) and low <= value <= high
        case gr.Checkbox():
            fits = isinstance(value, bool)
        case gr.Dropdown() if box.allow_custom_value and not box.multiselect:
            fits = isinstance(value, str) and value.isprintable() and 0 < len(value) < LONGEST
        case gr.Dropdown() if box.multiselect:
            fits = isinstance(value, list) and (bool(box.allow_custom_value) or set(map(str, value)) <= _choices(box))
            fits = fits and all(isinstance(each, str) and each.isprintable() for each in value)
        case gr.Dropdown() | gr.Radio():
            fits = isinstance(value, str | int) and str(value) in _choices(box)
        case _:
            fits = isinstance(value, str) and len(value) < LONGEST
    return value if fits else gr.skip()


def command_line(
    make: Callable[..., Sequence[Sequence[str]]],
    inputs: Sequence[Any],
    restored: Dependency | None = None,
    *more: Any,
    label: str = "The same from the command line",
    **options: Any,
) -> gr.Textbox:
    """A box with the command that a click runs, to copy; while the boxes hold what no command takes, it says why.

    Args:
        make: takes the boxes' values, gives the words of a command, or of several.
        inputs: the boxes.
        restored: see `remember`; the command is first made after it. None: with the first change.
        more: other events after which the command is made anew.
        label: of the box.
        options: of the box.
    """
    shown = gr.Textbox(label=label, lines=2, max_lines=8, interactive=False, buttons=["copy"], **options)

    @functools.wraps(make)
    def command(*values: Any) -> str:
        try:
            check_types(make, values)
            return "\n".join(f"{PROGRAM} {shlex.join(words)}" for words in make(*values))
        except Exception as error:
            return sentence(error)

    events = [box.change for box in inputs]
    gr.on([*events, *more], command, list(inputs), shown, trigger_mode="always_last", **POLL)
    if restored:
        restored.then(command, list(inputs), shown, **POLL)
    return shown


def _choices(box: Any) -> set[str]:
    return {str(value) for _, value in box.choices}
