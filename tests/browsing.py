"""The page in Chromium: what its tests do with it again and again."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

CHROMIUM = "/usr/bin/chromium"
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
WIDTHS = (1280, 400)
SMALL: dict[str, Any] = {"meta_batch": 8, "hidden_dim": 16, "state_dim": 8, "learner_threads": 1, "replay_episodes": 16}
PATIENCE = 120_000  # ms; the machine may be busy, and Ray takes its time to start


def visit(page: Page, address: str) -> None:
    page.goto(address)
    page.locator("#card h3").wait_for()


def tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def choose(page: Page, selector: str, value: str) -> None:
    """Choose from a list by typing."""
    box = page.locator(f"{selector} input")
    box.fill(value)
    box.press("Enter")


def put(page: Page, label: str, value: object) -> None:
    """Type a number into a slider's or a number's box."""
    named = page.get_by_label(f"number input for {label}").locator("visible=true")
    box = (named if named.count() else page.get_by_label(label).locator("visible=true")).first
    box.fill(str(value))
    box.press("Tab")


def toast(page: Page) -> str:
    message = page.locator(".toast-body").first
    message.wait_for()
    text = message.inner_text()
    page.locator(".toast-close").first.click()
    message.wait_for(state="detached")
    return text


def picture(page: Page, folder: Path, name: str, widths: tuple[int, ...] = WIDTHS) -> None:
    """The whole page at some widths, dark where it is narrow; nothing sticks out to the right."""
    for width in widths:
        page.set_viewport_size({"width": width, "height": 900})
        page.evaluate(f"document.body.classList.toggle('dark', {'true' if width < 500 else 'false'})")
        page.wait_for_timeout(1500)  # the plots take a moment to follow
        page.screenshot(path=folder / f"{name}_{width}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{name} sticks out at {width} pixels"
    page.set_viewport_size({"width": WIDTHS[0], "height": 900})


def iteration(page: Page, selector: str = "#train-status") -> int:
    found = re.search(r"iteration (\d+)", page.locator(selector).inner_text())
    return int(found[1]) if found else 0


def wait_for_iteration(page: Page, number: int) -> None:
    found = "document.querySelector('#train-status').innerText.match(/iteration (\\d+)/)"
    page.wait_for_function(f"n => +({found} || [0, 0])[1] >= n", arg=number)


def in_sight(found: Locator) -> bool:
    """Whether all of an element is in the window as it stands."""
    box, size = found.bounding_box(), found.page.viewport_size
    assert box is not None
    assert size is not None
    return box["y"] >= 0 and box["y"] + box["height"] <= size["height"]
