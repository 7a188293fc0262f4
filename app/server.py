"""Serves the page on one address, without any call to the outside."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Collection
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is loaded

import gradio as gr
from gradio.themes.utils.colors import red
from starlette.middleware import Middleware

from ssm_metarl.app import adaptation_tab, comparison_tab, evolution_tab, pretrained_tab, training_tab
from ssm_metarl.app.forms import browser_store
from ssm_metarl.app.guard import HostCheck, guard_inputs, is_loopback
from ssm_metarl.app.workspace import Workspace

TABS = {
    "Pretrained": pretrained_tab.build,
    "Meta-training": training_tab.build,
    "Comparison": comparison_tab.build,
    "Test-time adaptation": adaptation_tab.build,
    "Self-improvement": evolution_tab.build,
}

WAITING = 16
"""Most requests that wait for their turn; more are refused."""


def build(workspace: Workspace) -> gr.Blocks:
    """The page, without a server."""
    with gr.Blocks(title="SSM-MetaRL", analytics_enabled=False) as page:
        gr.Markdown(
            "# SSM-MetaRL\nPolicies that learn to adapt: look at one, train one, set it a task, let it improve."
        )
        stores = {title: browser_store(title) for title in TABS}
        with gr.Tabs(overflow_behavior="wrap"):  # all in sight on a narrow screen, too
            for title, build_tab in TABS.items():
                with gr.Tab(title) as tab:
                    build_tab(page, tab, workspace, stores[title])
    guard_inputs(page)
    page.queue(max_size=WAITING, default_concurrency_limit=4)
    let_rest(page)
    return page


def let_rest(page: gr.Blocks) -> None:
    """Look for waiting requests ten times a second: Gradio's own 1,000 take 5 % of a core from an idle page."""
    page._queue.sleep_when_free, page._queue.progress_update_sleep_when_free = 0.1, 0.2


def theme() -> gr.Theme:
    """Fonts of the machine, where Gradio's own themes bring theirs; small print and buttons that can be read."""
    plain = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    fills: dict[str, str] = {}
    # A stop button is of the kind cancel.
    for kind, rest, hover in (("primary", "*primary_700", "*primary_800"), ("cancel", red.c700, red.c800)):
        for mode in ("", "_dark"):
            fills |= {
                f"button_{kind}_background_fill{state}{mode}": fill for state, fill in (("", rest), ("_hover", hover))
            }
            fills |= {f"button_{kind}_text_color{state}{mode}": "white" for state in ("", "_hover")}
    return plain.set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        **fills,
    )


def launch(page: gr.Blocks, host: str, port: int, names: Collection[str] = ()) -> int:
    """Serve the page from threads of this process, and return.

    Args:
        page: see `build`.
        host, port: to listen on; 0: a free port.
        names: other names of this machine by which a browser may ask, see `HostCheck`.

    Returns:
        The port.

    Raises:
        ValueError: the port is taken, or the address is not one of this machine.
    """
    port = _free_port(host, port)
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        inbrowser=False,
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        footer_links=[],
        app_kwargs={"middleware": [Middleware(HostCheck, host=host, names=tuple(names))]},
        max_file_size=0,  # no box takes a file, but Gradio's address for them would
        theme=theme(),
        css_paths=Path(__file__).with_name("page.css"),
    )
    return port


def serve(
    host: str, port: int, runs: Path, address: str | None, say: Callable[[str], None], names: Collection[str] = ()
) -> None:
    """Open the page and serve it until interrupted; jobs that it started continue.

    Args:
        host, port: to listen on; 0: a free port.
        runs: parent of the run folders, made where it is not there.
        address: of the job server, see `distributed.jobs.connect`.
        say: prints a line.
        names: other names of this machine by which a browser may ask for the page.

    Raises:
        ValueError: the port is taken, or the address is not one of this machine.
    """
    runs.mkdir(parents=True, exist_ok=True)
    page = build(Workspace(runs.resolve(), address))
    port = launch(page, host, port, names)
    say(f"The page is at http://{host}:{port} (Ctrl-C ends it; jobs continue, and `job shutdown` ends them).")
    if not is_loopback(host):
        say("Whoever reaches this address can start work on this machine: there is no password.")
    try:
        page.block_thread()
    finally:
        page.close(verbose=False)


def _free_port(host: str, port: int) -> int:
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ValueError(f"The page cannot listen on {host}:{port}: {reason}. Choose another --port.") from None
