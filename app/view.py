"""What the tabs share: errors as sentences, tables and pictures as HTML."""

from __future__ import annotations

import base64
import functools
import html
import logging
import math
import mimetypes
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeAlias, TypeVar

import gradio as gr
from rich.table import Table

from ssm_metarl.app.guard import check_types
from ssm_metarl.app.workspace import Kind, Workspace, job_of
from ssm_metarl.distributed.jobs import JobError
from ssm_metarl.distributed.pool import EnvironmentFailure

COMPUTE: Mapping[str, Any] = {"concurrency_id": "compute", "concurrency_limit": 1}
"""Of events that play episodes in this process: one after the other, the others wait in the queue."""

JOBS: Mapping[str, Any] = {"concurrency_id": "jobs", "concurrency_limit": 1}
"""Of events that start or stop jobs: the limit on jobs is checked by one at a time."""

POLL: Mapping[str, Any] = {"queue": False, "show_progress": "hidden"}
"""Of events that only look: they pass by the queue."""

LOOK: Mapping[str, Any] = {"concurrency_id": "look", "concurrency_limit": 4, "show_progress": "hidden"}
"""Of events that show what a person chose: they take no time, and their errors are to be seen."""

POLL_SECONDS = 2.0

Show: TypeAlias = Callable[[], dict[str, Any]]
"""Makes new values of the components that show a run, by their names in the tab."""

Look: TypeAlias = Callable[[str, Path, dict[str, Any] | None, Mapping[str, Any]], tuple[dict[str, Any], Show]]
"""Takes a run's name, its folder, its job, and what was seen last time; gives what is seen now, and what shows it."""

P = ParamSpec("P")
R = TypeVar("R")


def readable(handler: Callable[P, R]) -> Callable[P, R]:
    """A handler whose errors the page shows as one sentence, and which leaves what was on the page as it was."""

    @functools.wraps(handler)
    def handle(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            check_types(handler, args)
            return handler(*args, **kwargs)
        except Exception as error:
            # The page shows the text as HTML, and an error can name what a person typed.
            raise gr.Error(html.escape(_sentence(error)), duration=None, print_exception=False) from None

    return handle


def follow(
    page: gr.Blocks,
    workspace: Workspace,
    kind: Kind,
    controls: RunControls,
    shown: Mapping[str, Any],
    look: Look,
) -> None:
    """Keep the list of runs, and what is shown of the chosen one, as they are; an error becomes the status line.

    Args:
        page: with its opening the following begins.
        kind: of the runs.
        controls: of the runs; a choice that was made is left alone, for it may be newer than the look.
        shown: the components that show the run, by name; `status` is one of `controls`.
        look: see `Look`.
    """
    memory, run, status = gr.State({}), controls.run, controls.status
    parts = {"status": status, **shown}

    def news(name: str | None, seen: dict[str, Any]) -> dict[Any, Any]:
        found = workspace.jobs()
        runs = workspace.list_runs(kind, found)
        chosen = name or next(iter(runs), None)
        if chosen is None:
            return {status: line_html("No run yet.")}
        folder = workspace.folder(chosen)
        job = job_of(found, folder)
        if job is None and not folder.is_dir():
            raise ValueError(f"There is no run {chosen!r}.")
        stamp, show = look(chosen, folder, job, seen)
        now = {**stamp, "run": chosen, "status": job and job["status"]}
        values: dict[Any, Any] = {memory: {**now, "runs": runs}}
        if name is None:
            values[run] = gr.update(choices=runs, value=chosen)
        elif runs != seen.get("runs"):
            values[run] = gr.update(choices=runs)
        if not now.items() <= seen.items():
            values |= {parts[part]: value for part, value in show().items()}
        return values

    def handle(name: str | None, seen: dict[str, Any]) -> dict[Any, Any]:
        try:
            check_types(handle, (name,))
            return news(name, seen)
        except Exception as error:
            return {status: line_html(_sentence(error)), memory: {}}

    gr.on(
        [page.load, run.change, gr.Timer(POLL_SECONDS).tick],
        handle,
        [run, memory],
        [run, *parts.values(), memory],
        **POLL,
    )


def start_job(workspace: Workspace, command: Sequence[str], progress: gr.Progress) -> str:
    """Start a command as a job, and say meanwhile what takes its time; the name of its run."""
    progress(0.3, desc="Starting the job, and Ray where it does not run yet")
    return workspace.start(command)


def numbers(labels: Iterable[str], values: Sequence[float | None]) -> list[float]:
    """What boxes hold.

    Raises:
        ValueError: one was left empty, or holds no finite number.
    """
    given = []
    for label, value in zip(labels, values, strict=True):
        if value is None or not math.isfinite(value):
            raise ValueError(f"{label}: a number is missing.")
        given.append(value)
    return given


def _sentence(error: Exception) -> str:
    if isinstance(error, ValueError | JobError | EnvironmentFailure | FloatingPointError | OSError):
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    logging.getLogger(__name__).error("A request of the page failed", exc_info=error)
    return "Something went wrong that nobody foresaw; the terminal of the app has the details."


def table_html(table: Table) -> str:
    """A table of the terminal as one of the page: the same figures, formatted once."""
    columns = table.columns
    head = "".join(f'<th scope="col" class="{column.justify}">{text_html(column.header)}</th>' for column in columns)
    rows = []
    for row, cells in zip(table.rows, zip(*(column.cells for column in columns), strict=True), strict=True):
        marked = ' class="best"' if row.style == "bold" else ""
        pairs = zip(columns, cells, strict=True)
        rows.append(
            f"<tr{marked}>"
            + "".join(f'<td class="{column.justify}">{text_html(cell)}</td>' for column, cell in pairs)
            + "</tr>"
        )
    title = f"<caption>{text_html(table.title)}</caption>" if table.title else ""
    legend = f'<p class="legend">{text_html(table.caption)}</p>' if table.caption else ""
    # Wide tables scroll sideways: with the keyboard, too, once they have the focus.
    body = f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="scroll" tabindex="0">{body}</div>{legend}'


def facts_html(facts: Mapping[str, object]) -> str:
    """Names and values as a list."""
    rows = "".join(f"<dt>{text_html(name)}</dt><dd>{text_html(value)}</dd>" for name, value in facts.items())
    return f'<dl class="facts">{rows}</dl>'


def pictures_html(pictures: Iterable[tuple[Path, str]]) -> str:
    """Pictures, each with the words for those who cannot see it; they travel within the page, no file is served."""
    figures = []
    for path, words in pictures:
        kind = mimetypes.guess_type(path.name)[0]
        content = base64.b64encode(path.read_bytes()).decode()
        figures.append(
            f'<div class="scroll" tabindex="0"><img alt="{text_html(words)}" src="data:{kind};base64,{content}"></div>'
        )
    return f'<div class="figures">{"".join(figures)}</div>'


def line_html(*parts: object) -> str:
    """A line that says how things stand, read out when it changes."""
    return f'<p class="status" role="status">{" · ".join(text_html(part) for part in parts if part)}</p>'


def text_html(value: object) -> str:
    """Any value as text of the page, whatever is in it."""
    return html.escape(str(value)).replace("\n", "<br>")


def model_choice(label: str, **options: Any) -> gr.Dropdown:
    """A list of models, in which any checkpoint of the runs folder can be typed."""
    return gr.Dropdown(
        [],
        label=label,
        info="pretrained:NAME, a run for its best checkpoint, or RUN/checkpoint_000010",
        allow_custom_value=True,
        **options,
    )


class RunControls(NamedTuple):
    """What chooses a run, says how it stands, ends its job and lets it go on."""

    run: gr.Dropdown
    status: gr.HTML
    stop: gr.Button
    resume: gr.Button


def run_controls(kind: Kind, stop: str, resume: str) -> RunControls:
    """Those of a kind of run; a name is checked when it is used, for a page can be older than the server it asks.

    Args:
        kind: of the runs; begins the ids of the components.
        stop, resume: what the buttons say.
    """
    words = "a job continues when this page is closed"
    run = gr.Dropdown([], label="Run", info=words, allow_custom_value=True, elem_id=f"{kind}-run")
    status = gr.HTML(line_html("No run yet."), elem_id=f"{kind}-status")
    with gr.Row(equal_height=True):
        end = gr.Button(stop, variant="stop", elem_id=f"{kind}-stop")
        return RunControls(run, status, end, gr.Button(resume, elem_id=f"{kind}-resume"))


def offer_models(triggers: Sequence[Any], workspace: Workspace, model: gr.Dropdown, before: Sequence[str] = ()) -> None:
    """Fill a list of models anew at some events, after what is offered before them; the first one is the default."""

    @readable
    def offer(name: str | None) -> Any:
        names = [*before, *workspace.models()]
        return gr.update(choices=names, value=name or next(iter(names), None))

    gr.on(triggers, offer, model, model, **POLL)


def job_words(job: Mapping[str, Any] | None) -> list[str]:
    """A job's status, and of one that failed the last line that it printed."""
    if job is None:
        return ["no job"]
    last = (job["message"] or "").strip().splitlines()[-1:] if job["status"] == "FAILED" else []
    return [job["status"].lower(), *last]


def option_words(options: Mapping[str, float]) -> list[str]:
    """Options as the command line takes them."""
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
