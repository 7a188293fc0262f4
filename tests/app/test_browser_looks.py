"""The page as it looks and lasts: what is seen first, contrast, narrow windows, reloads, several runs, and at rest."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from browsing import WIDTHS, choose, in_sight, picture, put, tab, visit

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]

TABS = ("Pretrained", "Meta-training", "Comparison", "Test-time adaptation", "Self-improvement")
AA = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]
STOPS = {"Meta-training": "train-stop", "Self-improvement": "evolve-stop"}
"""Buttons that a run alone enables."""

ENABLE = "document.querySelectorAll('button:disabled').forEach(button => { button.disabled = false })"
"""What is disabled has no contrast to keep, and axe passes it by."""

RUN_AXE = "tags => axe.run(document, {runOnly: {type: 'tag', values: tags}})"


@pytest.mark.parametrize(("width", "scheme"), list(zip(WIDTHS, ("light", "dark"), strict=True)))
def test_what_is_seen_first_and_contrast_and_cut_tables(
    width: int, scheme: Any, browser: Browser, site: str, tmp_path: Path
) -> None:
    """One visit of the page in a wide window, light, and one in a narrow one, dark."""
    with browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme) as context:
        window = context.new_page()
        visit(window, site)
        _a_policy_that_adapts_plays_before_anything_is_pressed(window)
        _a_table_that_is_cut_has_a_shadow(window, width)
        picture(window, tmp_path, "first", (width,))
        window.set_viewport_size({"width": width, "height": 900})
        _no_tab_violates_an_aa_rule(window)


def _a_policy_that_adapts_plays_before_anything_is_pressed(window: Page) -> None:
    animation = window.locator("#first img[src^='data:image/gif']")
    assert in_sight(animation)
    place, choices = animation.bounding_box(), window.locator("#model").bounding_box()
    assert place is not None
    assert choices is not None
    assert place["y"] + place["height"] < choices["y"]
    first = animation.screenshot()
    end = time.monotonic() + 20
    while animation.screenshot() == first and time.monotonic() < end:
        window.wait_for_timeout(100)
    assert animation.screenshot() != first
    assert re.search(r"Return \d+ → \d+", window.locator("#first").inner_text())
    window.locator("#first summary").click()
    assert not animation.is_visible()


def _a_table_that_is_cut_has_a_shadow(window: Page, width: int) -> None:
    """It stands at the side where there is more; what covers it moves away with the content."""
    widths = "e => [e.scrollWidth - e.clientWidth, getComputedStyle(e).backgroundAttachment]"
    beyond, attached = window.locator("#card .scroll").last.evaluate(widths)
    assert attached == "local, local, scroll, scroll"
    assert beyond > 0 or width == WIDTHS[0]


def _no_tab_violates_an_aa_rule(window: Page) -> None:
    from axe_playwright_python.base import AXE_FILE_PATH

    window.evaluate(Path(AXE_FILE_PATH).read_text())
    found: dict[str, list[str]] = {}
    for title in TABS:
        tab(window, title)
        for fold in window.locator("button.label-wrap:visible").all():
            if fold.get_attribute("aria-expanded") != "true":
                fold.click()
        if title == "Meta-training":
            window.locator("#curve svg").first.wait_for()
        window.evaluate(ENABLE)
        window.wait_for_timeout(500)  # what fades in has come
        result = window.evaluate(RUN_AXE, AA)
        assert len(result["passes"]) > 10
        if title in STOPS:
            rules = [rule for rule in result["passes"] + result["violations"] if rule["id"] == "color-contrast"]
            assert f'id="{STOPS[title]}"' in str([node["html"] for rule in rules for node in rule["nodes"]])
        found[title] = [f"{rule['id']}: {node['html']}" for rule in result["violations"] for node in rule["nodes"]]
    assert found == {title: [] for title in TABS}


def test_each_run_is_drawn_with_its_own_stages(page: Page) -> None:
    """Of a run without inner steps there is one; the plot once kept it for all runs that came later."""
    tab(page, "Meta-training")
    for name, stages in (("single", ["before adaptation"]), ("point", ["before adaptation", "after 1 inner step"])):
        choose(page, "#train-run", name)
        page.locator("#train-status", has_text=f"{name} ·").wait_for()
        found = "[...document.querySelectorAll('#curve .role-legend-label text')].map(e => e.textContent)"
        page.wait_for_function(f"stages => {found}.join() == stages.join()", arg=stages)
        lines = "[...document.querySelectorAll('#curve .mark-line path')].filter(e => /L/.test(e.getAttribute('d')))"
        page.wait_for_function(f"n => {lines}.length == n", arg=len(stages))
    titles = page.locator("[id=curve] .role-axis-title").all_text_contents()
    assert "environment steps" in titles
    assert page.locator(".role-axis-title", has_text="iteration").count() == 0


def test_a_message_goes_by_itself_and_lets_clicks_through(page: Page) -> None:
    tab(page, "Meta-training")
    page.get_by_role("button", name="Policy, replay and seed").click()
    put(page, "State variables (state_dim)", 7)
    page.locator("#train-command").evaluate("box => box.scrollIntoView({block: 'center'})")
    assert "state_dim must be even" in page.locator("#train-command textarea").input_value()
    page.locator("#train-start").click()
    message = page.locator(".toast-body").first
    message.wait_for()
    # Of a grid of points over the message, those that a click would not reach what lies below it.
    caught = """box => { const found = []
        for (let x = box.x + 4; x < box.x + box.width; x += 8)
            for (let y = box.y + 4; y < box.y + box.height; y += 8) {
                const e = document.elementFromPoint(x, y)
                if (e && e.closest('.toast-wrap') && !e.closest('button')) found.push(e.outerHTML) }
        return found }"""
    assert page.evaluate(caught, message.bounding_box()) == []
    message.wait_for(state="detached", timeout=15_000)


def test_runs_are_compared_and_forms_survive_a_reload(page: Page, site: str) -> None:
    put(page, "Number of tasks", 17)
    tab(page, "Meta-training")
    put(page, "Iterations", 77)
    tab(page, "Comparison")
    assert page.locator("#measure").is_disabled()
    for name in ("point", "dot", "single"):
        choose(page, "#compared", name)
    page.locator("#aggregates tbody tr").nth(2).wait_for()
    page.keyboard.press("Escape")
    put(page, "Number of tasks", 5)

    visit(page, site)
    assert page.get_by_label("number input for Number of tasks").first.input_value() == "17"
    page.locator("#evaluate-command textarea").wait_for()
    assert "--num-tasks 17" in page.locator("#evaluate-command textarea").input_value()
    tab(page, "Meta-training")
    assert page.get_by_label("number input for Iterations").input_value() == "77"
    assert "train --task navigation-2d --algorithm promp --iterations 77" in (
        page.locator("#train-command textarea").input_value()
    )
    tab(page, "Comparison")
    page.locator("#overlay img").wait_for()
    page.get_by_role("button", name="Measure on held-out tasks").click()
    page.locator("#aggregates th", has_text="held-out").wait_for()
    assert "--num-tasks 5" in page.locator("#measure-command textarea").input_value()


def test_an_idle_page_takes_next_to_nothing(page: Page, opened: tuple[str, int]) -> None:
    """Under 1 % of a core with a tab that follows runs; Gradio alone takes five. The least of some windows counts:
    other programs take the caches, and make the same work longer.
    """
    tab(page, "Self-improvement")
    page.wait_for_timeout(3000)
    process, shares = psutil.Process(opened[1]), []
    for _ in range(4):
        before, begin = sum(process.cpu_times()[:2]), time.monotonic()
        page.wait_for_timeout(10_000)
        shares.append((sum(process.cpu_times()[:2]) - before) / (time.monotonic() - begin))
    assert 0 < min(shares) < 0.01
