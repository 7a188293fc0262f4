"""What the tests of the page in a browser share: runs, the app, Chromium, and a page at its first tab."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from browsing import CHROMIUM, FLAGS, PATIENCE, SMALL, WIDTHS, visit
from ssm_metarl import TrainConfig, train
from ssm_metarl.distributed import jobs

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, one more that has another seed, and one without inner steps."""
    folder = tmp_path_factory.mktemp("app") / "runs"
    alone = {"algorithm": "rl2", "inner_steps": 0}
    for name, more in (("single", alone), ("dot", {"seed": 1}), ("point", {})):
        iterations = 6 if name == "point" else 2
        train(TrainConfig.for_task("navigation-2d", iterations=iterations, **SMALL, **more), folder / name)
    return folder


@pytest.fixture(scope="module")
def opened(runs: Path) -> Iterator[tuple[str, int]]:
    """The app as the command opens it, with a head's record of its own: address and process; none is left behind."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(runs.parent / "state"))
        for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
            patch.delenv(name, raising=False)
        words = ["app", "--port", str(port), "--storage", str(runs)]
        with (runs.parent / "app.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "ssm_metarl", *words], cwd=runs.parent, stdout=log, stderr=log, env=os.environ
            )
        address = f"http://127.0.0.1:{port}"
        try:
            end = time.monotonic() + 120
            while time.monotonic() < end and process.poll() is None:
                try:
                    urllib.request.urlopen(address, timeout=10).close()
                    break
                except OSError:
                    time.sleep(0.2)
            yield address, process.pid
            assert "Traceback" not in (runs.parent / "app.log").read_text()
        finally:
            process.terminate()
            process.wait(30)
            if head := jobs.recorded_head():
                jobs.end_head(head)


@pytest.fixture(scope="module")
def site(opened: tuple[str, int]) -> str:
    return opened[0]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, site: str) -> Iterator[Page]:
    """The page at its first tab. Whatever a test does, nothing is fetched from elsewhere and nothing fails in it."""
    context = browser.new_context(viewport={"width": WIDTHS[0], "height": 900})
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    wrong: list[str] = []

    def fetched(request: Any) -> None:
        if not request.url.startswith((site, "data:", "blob:")):
            wrong.append(request.url)

    page.on("request", fetched)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    visit(page, site)
    yield page
    context.close()
    assert wrong == []
