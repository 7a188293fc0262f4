"""The page as a person meets it: Debian's Chromium drives the app that the command opens."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from browsing import PATIENCE, WIDTHS, choose, in_sight, iteration, picture, put, tab, toast, visit, wait_for_iteration

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]


def test_a_model_has_a_card_and_is_evaluated(page: Page, tmp_path: Path) -> None:
    choose(page, "#model", "point")
    page.locator("#card h3", has_text="point").wait_for()
    card = page.locator("#card").inner_text()
    assert "navigation-2d" in card
    assert "hidden_dim 16, state_dim 8" in card
    put(page, "Number of tasks", 6)
    page.get_by_role("button", name="Evaluate").click()
    page.locator("#evaluation tbody tr").nth(3).wait_for()
    assert "6 tasks of split test" in page.locator("#evaluation").inner_text()
    assert in_sight(page.locator("#evaluate"))
    assert in_sight(page.locator("#evaluation table"))
    command = page.locator("#evaluate-command textarea")
    assert re.search(r"ssm-metarl evaluate \S*/point --split test --num-tasks 6 --steps 3$", command.input_value())
    assert page.locator("#evaluate-command button").first.get_attribute("aria-label") == "Copy"
    picture(page, tmp_path, "pretrained")


def test_a_policy_adapts_to_a_task_set_by_sliders(page: Page, runs: Path, tmp_path: Path) -> None:
    tab(page, "Test-time adaptation")
    choose(page, "#adapt-model", "point")
    slider = page.get_by_label("range slider for Hidden goal, x")
    slider.focus()
    for _ in range(5):
        slider.press("ArrowRight")
    put(page, "Hidden goal, y", 0.25)
    put(page, "Episodes a step", 20)
    page.get_by_label("Keep the adapted policy").check()
    page.get_by_role("button", name="Adapt", exact=True).click()
    page.locator("#after").wait_for()
    before, after = (float(page.locator(name).inner_text()) for name in ("#before", "#after"))
    assert after > before
    assert '{"goal": [0.35, 0.25]}' in page.locator("#adapt-result").inner_text()
    assert "Kept as" in page.locator("#adapt-result").inner_text()
    assert [path.parent.name for path in runs.glob("*adapt-standard*/policy/manifest.json")] == ["policy"]
    assert page.locator("#adapt-pictures img").count() == 2
    assert page.evaluate(
        "[...document.querySelectorAll('#adapt-pictures img')].every(i => i.complete && i.naturalWidth)"
    )
    put(page, "Number of tasks", 5)
    page.get_by_role("button", name="Compare").click()
    page.locator("#modes tbody tr").nth(3).wait_for()
    cells = page.locator("#modes tbody td:first-child")
    assert cells.all_inner_texts() == ["none", "standard", "replay", "hybrid"]
    picture(page, tmp_path, "adaptation")


def test_the_pretrained_model_adapts_to_a_cart_and_an_episode_is_shown(page: Page, tmp_path: Path) -> None:
    assert page.locator("#model input").input_value() == "pretrained:cartpole"
    tab(page, "Test-time adaptation")
    put(page, "Gravity", 7)
    page.get_by_label("left").check()
    page.get_by_label("hybrid").check()
    page.get_by_role("button", name="Adapt", exact=True).click()
    page.locator("#after").wait_for()
    before, after = (float(page.locator(name).inner_text()) for name in ("#before", "#after"))
    assert after > before + 100
    assert '"gravity": 7' in page.locator("#adapt-result").inner_text()
    assert '"direction": -1' in page.locator("#adapt-result").inner_text()
    animation = page.locator("#adapt-pictures img[src^='data:image/gif']")
    for seen in (page.locator("#adapt"), page.locator("#adapt-result .headline"), animation):
        assert in_sight(seen)
    picture(page, tmp_path, "cart")


def test_an_error_is_a_sentence_and_the_page_goes_on(page: Page, runs: Path) -> None:
    choose(page, "#model", "../../etc")
    page.locator("#card", has_text="is not in the runs folder").wait_for()
    assert page.locator("#evaluate").is_disabled()
    damaged = runs / "damaged"
    damaged.mkdir()
    (damaged / "manifest.json").write_text("{}")
    os.utime(damaged / "manifest.json", (0, 0))  # not the newest, which is chosen when the page opens
    choose(page, "#model", "damaged")
    page.locator("#card", has_text="manifest.json").wait_for()
    choose(page, "#model", "point")
    page.locator("#card h3", has_text="point").wait_for()
    assert page.locator("#evaluate").is_enabled()
    assert "Traceback" not in page.content()
    shutil.rmtree(damaged)


def test_each_tab_answers_wrong_input_with_a_sentence_and_goes_on(page: Page) -> None:
    def press(name: str) -> str:
        page.get_by_role("button", name=name, exact=True).click()
        return toast(page)

    tab(page, "Meta-training")
    page.get_by_role("button", name="Policy, replay and seed").click()
    put(page, "Seed", "")
    assert "Seed: a number is missing." in press("Start meta-training")
    put(page, "Seed", 0)
    put(page, "State variables (state_dim)", 7)
    assert "state_dim must be even" in press("Start meta-training")
    choose(page, "#train-run", "../../etc")
    page.locator("#train-status", has_text="is not in the runs folder").wait_for()
    choose(page, "#train-run", "nothing")
    page.locator("#train-status", has_text="There is no run 'nothing'.").wait_for()
    assert page.locator("#train-stop").is_disabled()
    assert page.locator("#train-resume").is_disabled()
    choose(page, "#train-run", "point")
    page.locator("#train-status", has_text="iteration 6 of 6").wait_for()
    assert page.locator("#train-stop").is_disabled()
    assert page.locator("#train-resume").is_enabled()

    tab(page, "Test-time adaptation")
    choose(page, "#adapt-model", "/etc")
    page.locator("#adapt-result", has_text="is not in the runs folder").wait_for()
    assert page.locator("#adapt").is_disabled()
    assert page.locator("#compare").is_disabled()
    choose(page, "#adapt-model", "point")
    page.locator("#adapt-result", has_text="press Adapt").wait_for()
    put(page, "Seed", "")
    assert "Seed: a number is missing." in press("Adapt")

    tab(page, "Self-improvement")
    put(page, "Environment steps in all", "")
    assert "Environment steps in all: a number is missing." in press("Start self-improvement")
    put(page, "Environment steps in all", 0)
    choose(page, "#evolve-run", "point")
    page.locator("#evolve-status", has_text="point · no job").wait_for()
    for button in ("#evolve-stop", "#evolve-resume", "#rollback"):
        assert page.locator(button).is_disabled()
    assert "Traceback" not in page.content()


@pytest.mark.parametrize("width", WIDTHS)
def test_every_tab_and_its_button_are_reached_with_the_keyboard(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})

    def reach(found: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate(f"(() => {{ const e = document.activeElement; return {found} }})()"):
                return
        pytest.fail(f"not reached at {width} pixels: {found}")

    buttons = {"Meta-training": "train-start", "Test-time adaptation": "adapt", "Self-improvement": "evolve-start"}
    for title, button in buttons.items():
        page.evaluate("scrollTo(0, 0)")
        page.mouse.click(2, 2)  # from here on Tab goes through the page
        reach(f"e.getAttribute('role') == 'tab' && e.innerText.trim() == '{title}'")
        page.keyboard.press("Enter")
        page.locator(f"#{button}").wait_for()
        reach(f"e.id == '{button}'")


def test_a_meta_training_is_started_watched_found_again_and_stopped(
    page: Page, browser: Browser, site: str, runs: Path, tmp_path: Path
) -> None:
    tab(page, "Meta-training")
    put(page, "Iterations", 500)
    page.get_by_role("button", name="Experience and learning").click()
    put(page, "Tasks an iteration", 6)
    put(page, "Episodes a task", 8)
    page.get_by_role("button", name="Start meta-training").click()
    page.locator("#train-status", has_text="Starting…").wait_for()
    page.locator("#train-status", has_text=re.compile("running.* iteration")).wait_for()
    assert page.locator("#train-stop").is_enabled()
    assert page.locator("#train-resume").is_disabled()
    wait_for_iteration(page, 3)
    name = page.locator("#train-run input").input_value()
    assert (runs / name / "metrics.jsonl").is_file()
    seen = iteration(page)
    wait_for_iteration(page, seen + 2)
    assert page.locator(".vega-embed canvas, .vega-embed svg").count() >= 3

    visit(page, site)
    tab(page, "Meta-training")
    wait_for_iteration(page, seen + 2)
    assert page.locator("#train-run input").input_value() == name
    picture(page, tmp_path, "training", WIDTHS[:1])
    with browser.new_context(viewport={"width": WIDTHS[1], "height": 900}, color_scheme="dark") as context:
        second = context.new_page()
        visit(second, site)
        tab(second, "Meta-training")
        second.locator("#train-status", has_text="running").wait_for(timeout=PATIENCE)
        assert second.locator("#train-run input").input_value() == name
        picture(second, tmp_path, "training", WIDTHS[1:])

    page.get_by_role("button", name="Stop with a checkpoint").click()
    page.locator("#train-status", has_text="stopped").wait_for()
    saved = int(re.findall(r"checkpoint of iteration (\d+)", page.locator("#train-status").inner_text())[0])
    assert saved == iteration(page) > seen
    assert (runs / name / f"checkpoint_{saved:06d}" / "manifest.json").is_file()
    page.locator("#train-stop:disabled").wait_for()
    page.locator("#train-resume:enabled").wait_for()

    put(page, "Iterations", 2)
    page.get_by_role("button", name="Go on for more iterations").click()
    page.locator("#train-status", has_text=f"iteration {saved + 2} of {saved + 2}").wait_for()
    page.locator("#train-status", has_text="succeeded").wait_for()
    page.locator("#train-evaluation tbody tr").first.wait_for()


def test_a_cycle_of_self_improvement_ends_with_a_decision(page: Page, runs: Path, tmp_path: Path) -> None:
    tab(page, "Self-improvement")
    choose(page, "#evolve-model", "point")
    put(page, "Cycles", 1)
    put(page, "Proposals a cycle", 1)
    page.get_by_role("button", name="Start self-improvement").click()
    page.locator("#population tbody tr").first.wait_for()
    page.locator("#population", has_text="iterations").first.wait_for()
    page.locator("#decisions tbody tr", has_text=re.compile("accepted|rejected")).first.wait_for()
    page.locator("#evolve-status", has_text=re.compile("succeeded.* 1 cycle(?!s)")).wait_for()
    assert page.locator("#evolution-pictures img").count() == 1  # one stretch: the metrics would be one point
    assert "from the second assessed stretch on" in page.locator("#evolution-pictures").inner_text()
    page.get_by_role("button", name="Roll back to it").click()
    page.locator("#rollback-answer", has_text="will be the incumbent").wait_for()
    name = page.locator("#evolve-run input").input_value()
    assert len(list((runs / name / "rsi" / "requests").iterdir())) == 1
    picture(page, tmp_path, "evolution")

    put(page, "Cycles", 10)
    page.get_by_role("button", name="Go on for more cycles").click()
    page.locator("#evolve-status", has_text=re.compile("running.* of 11")).wait_for()
    page.locator("#decisions tbody tr", has_text="asked for").first.wait_for()
    page.get_by_role("button", name="Stop", exact=True).click()
    page.locator("#evolve-status", has_text="stopped").wait_for()
    page.locator("#population tbody tr").first.wait_for()
