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
from gradio.events import Dependency
from rich.table import Table

from ssm_metarl.app.guard import check_types
from ssm_metarl.app.workspace import Kind, Workspace, job_of, runs_on
from ssm_metarl.distributed.jobs import JobError
from ssm_metarl.distributed.play import EnvironmentFailure

COMPUTE: Mapping[str, Any] = {"concurrency_id": "compute", "concurrency_limit": 1}
"""Of events that play episodes in this process: one after the other, the others wait in the queue."""

JOBS: Mapping[str, Any] = {"concurrency_id": "jobs", "concurrency_limit": 1}
"""Of events that start or stop jobs: the limit on jobs is checked by one at a time."""

POLL: Mapping[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "undocumented"}
"""Of events that only look: they pass by the queue."""

LOOK: Mapping[str, Any] = {"concurrency_id": "look", "concurrency_limit": 4, "show_progress": "hidden"}
"""Of events that show what a person chose: they take no time, and their errors are to be seen."""

POLL_SECONDS, REST_SECONDS = 2.0, 5.0
"""Between two looks at the runs while a job runs, and while none does."""

TOAST_SECONDS = 10.0
"""How long an error stays on the page unless it is closed."""

Show: TypeAlias = Callable[[], dict[str, Any]]
"""Makes new values of the components that show a run, by their names in the tab."""

Look: TypeAlias = Callable[[str, Path, dict[str, Any] | None, Mapping[str, Any]], tuple[dict[str, Any], Show]]
"""Takes a run's name, its folder, its job, and what was seen last time; gives what is seen now, and what shows it.

What is seen holds `resumable`, whether a job could resume the run.
"""

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
            raise gr.Error(html.escape(sentence(error)), duration=TOAST_SECONDS, print_exception=False) from None

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
        shown: the components that show the run, by name; `status`, `start`, `stop` and `resume` are of `controls`.
        look: see `Look`.
    """
    memory, run, status = gr.State({}), controls.run, controls.status
    timer = gr.Timer(POLL_SECONDS)
    buttons = {"start": controls.start, "stop": controls.stop, "resume": controls.resume}
    parts = {"status": status, **buttons, **shown}

    def news(name: str | None, seen: dict[str, Any]) -> dict[Any, Any]:
        found = workspace.jobs()
        runs = workspace.list_runs(kind, found)
        chosen = name or next(iter(runs), None)
        can = {"start": workspace.room(found), "stop": False, "resume": False}
        if chosen is None:
            return {status: line_html("No run yet."), **pressable(buttons, can)}
        folder = workspace.folder(chosen)
        job = job_of(found, folder)
        if job is None and not folder.is_dir():
            raise ValueError(f"There is no run {chosen!r}.")
        stamp, show = look(chosen, folder, job, seen)
        can["stop"] = runs_on(job)
        can["resume"] = can["start"] and stamp["resumable"] and not can["stop"]
        now = {**stamp, "run": chosen, "status": job and job["status"], "can": can}
        pace = POLL_SECONDS if any(map(runs_on, found)) else REST_SECONDS
        values: dict[Any, Any] = {memory: {**now, "runs": runs, "pace": pace}}
        if pace != seen.get("pace"):
            values[timer] = gr.Timer(pace)
        if name is None:
            values[run] = gr.update(choices=runs, value=chosen)
        elif runs != seen.get("runs"):
            values[run] = gr.update(choices=runs)
        if not now.items() <= seen.items():
            values |= {parts[part]: value for part, value in show().items()} | pressable(buttons, can)
        return values

    def handle(name: str | None, seen: dict[str, Any]) -> dict[Any, Any]:
        try:
            check_types(handle, (name,))
            return news(name, seen)
        except Exception as error:
            nothing = dict.fromkeys(("stop", "resume"), False)
            return {status: line_html(sentence(error)), memory: {}, **pressable(buttons, nothing)}

    gr.on(
        [page.load, run.change, timer.tick],
        handle,
        [run, memory],
        [run, *parts.values(), memory, timer],
        **POLL,
    )


def pressable(buttons: Mapping[str, gr.Button], can: Mapping[str, bool]) -> dict[Any, Any]:
    """Buttons by name as what does something when pressed, or nothing."""
    return {buttons[name]: gr.update(interactive=does) for name, does in can.items()}


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


def sentence(error: Exception) -> str:
    """What the page says of an error; one that nobody foresaw goes to the terminal."""
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
            + "".join(f'<td class="{column.justify}">{_lines(cell)}</td>' for column, cell in pairs)
            + "</tr>"
        )
    title = f"<caption>{text_html(table.title)}</caption>" if table.title else ""
    legend = f'<p class="legend">{text_html(table.caption)}</p>' if table.caption else ""
    # Wide tables scroll sideways: with the keyboard, too, once they have the focus.
    body = f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="scroll" tabindex="0">{body}</div>{legend}'


def _lines(cell: object) -> str:
    return text_html(cell).replace("\n", "<br>")


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
    """What starts a run, chooses one, says how it stands, ends its job and lets it go on."""

    start: gr.Button
    run: gr.Dropdown
    status: gr.HTML
    stop: gr.Button
    resume: gr.Button


def run_controls(kind: Kind, start: gr.Button, stop: str, resume: str) -> RunControls:
    """Those of a kind of run; a name is checked when it is used, for a page can be older than the server it asks.

    Args:
        kind: of the runs; begins the ids of the components.
        start: the button that starts a run.
        stop, resume: what the buttons say.
    """
    words = "a job continues when this page is closed"
    run = gr.Dropdown([], label="Run", info=words, allow_custom_value=True, elem_id=f"{kind}-run")
    status = gr.HTML(line_html("No run yet."), elem_id=f"{kind}-status")
    with gr.Row(equal_height=True):
        end = gr.Button(stop, variant="stop", elem_id=f"{kind}-stop", interactive=False)
        again = gr.Button(resume, elem_id=f"{kind}-resume", interactive=False)
    return RunControls(start, run, status, end, again)


def offer_models(
    restored: Dependency, tab: gr.Tab, workspace: Workspace, model: gr.Dropdown, before: Sequence[str] = ()
) -> None:
    """Fill a list of models whenever its tab is opened, and when the form has been put back as it was.

    Args:
        restored: see `forms.remember`.
        tab: of the list.
        workspace: with the models.
        model: the list; its first entry is the default.
        before: what is offered before the models.
    """

    @readable
    def offer(name: str | None) -> Any:
        names = [*before, *workspace.models()]
        # What is chosen stays out of the answer: a person may have chosen another one meanwhile.
        return gr.update(choices=names) if name else gr.update(choices=names, value=next(iter(names), None))

    restored.then(offer, model, model, **POLL)
    tab.select(offer, model, model, **POLL)


def job_words(job: Mapping[str, Any] | None, begun: bool = True) -> list[str]:
    """A job's status, and of one that failed the last line that it printed.

    Args:
        job: of the run.
        begun: whether the run has an iteration; a job without one is starting, whatever Ray says of it.
    """
    if job is None:
        return ["no job"]
    if not begun and runs_on(job):
        return ["Starting… Ray and the workers come up, then the first iteration is played"]
    last = (job["message"] or "").strip().splitlines()[-1:] if job["status"] == "FAILED" else []
    return [job["status"].lower(), *last]


def option_words(options: Mapping[str, object]) -> list[str]:
    """Options as the command line takes them."""
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
