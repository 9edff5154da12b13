# SPDX-License-Identifier: Apache-2.0
"""reports/report.html as a reader has it: opened from a file in headless Chromium, at a phone's width and a desk's, light and dark."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.pipeline.chromium import EXECUTABLE, Browser
from tests.pipeline.pages import claims, made_repository, write_csv

pytestmark = pytest.mark.skipif(EXECUTABLE is None, reason="Chromium is not installed")
PHONE, DESK = 390, 1280
VISIBLE = "(element) => element.checkVisibility()"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with made_repository(tmp_path_factory) as made:
        file = made.root / "report.html"
        file.write_text(made.render(claims_csv=write_csv(made.root / "claims.csv", claims(made.evaluations))))
        yield file


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("profile"))
    try:
        yield opened
    finally:
        opened.close()


def brightness(browser: Browser) -> float:
    """Of the page's upper part as it is seen."""
    image = Image.open(io.BytesIO(browser.screenshot())).convert("L")
    return sum(image.resize((32, 32)).tobytes()) / 1024


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_it_opens_without_errors_and_asks_for_nothing(browser: Browser, page: Path, width: int, theme: str) -> None:
    browser.events.clear()
    browser.open(page, width, theme)
    browser.value("window.scrollTo(0, document.body.scrollHeight)")
    assert browser.problems() == []
    assert browser.requests() == [page.resolve().as_uri()]
    assert browser.value("document.documentElement.scrollWidth") == width, "the page is wider than the window"
    broken = "[...document.images].filter((one) => !one.complete || !one.naturalWidth).length"
    assert browser.value(broken) == 0
    assert (brightness(browser) > 128) == (theme == "light")


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_nothing_moves_while_it_loads(browser: Browser, page: Path, width: int) -> None:
    browser.open(page, width, "light")
    shifts: Any = browser.value(
        """new Promise((done) => {
          let sum = 0;
          new PerformanceObserver((list) => { for (const one of list.getEntries()) sum += one.value; })
            .observe({ type: "layout-shift", buffered: true });
          setTimeout(() => done(sum), 300);
        })"""
    )
    assert shifts <= 0.01


def test_text_is_nowhere_cut_or_laid_over(browser: Browser, page: Path) -> None:
    """On a phone: no text sticks out of the window but within what scrolls."""
    browser.open(page, PHONE, "light")
    out = browser.value(
        f"""[...document.querySelectorAll("main *, header *, nav *")].filter((one) => {{
          if (one.closest(".scroll, .paper, svg") || !({VISIBLE})(one)) return false;
          const box = one.getBoundingClientRect();
          return box.width && (box.right > {PHONE} + 1 || box.left < -1);
        }}).map((one) => one.outerHTML.slice(0, 90))"""
    )
    assert out == []


def test_the_slider_turns_both_columns_by_key(browser: Browser, page: Path) -> None:
    browser.open(page, DESK, "light")
    first = "document.querySelector('.gallery')"  # of several models; each has its slider
    shown = (
        f"[...{first}.querySelectorAll('.frame')].filter({VISIBLE}).map((one) => one.textContent.trim() || 'picture')"
    )
    pictures = f"[...{first}.querySelectorAll('.frame img')].filter({VISIBLE}).map((one) => one.alt)"
    said = "document.querySelector('.gallery input').getAttribute('aria-valuetext')"
    assert [text.split(", ")[1:] for text in browser.value(pictures)] == [
        ["1 step", "at guidance 1"],
        ["2 steps", "at guidance 1"],
    ]
    browser.value("document.querySelector('.gallery input').focus()")
    browser.press("ArrowRight", 39)
    assert browser.value(said) == "1.5"
    assert [text.rpartition(" ")[2] for text in browser.value(pictures)] == ["1.5", "1.5"]
    browser.press("End", 35)
    assert browser.value(said) == "2"
    assert len(browser.value(pictures)) == 1  # two steps were sampled at two scales only
    assert "Missing at guidance 2" in browser.value(shown)
    assert browser.value("document.querySelector('.gallery output').textContent") == "2"


def test_the_theme_can_be_chosen_and_stays(browser: Browser, page: Path) -> None:
    browser.open(page, DESK, "light")
    try:
        browser.value("document.getElementById('theme').focus()")
        browser.press("Enter", 13)
        browser.press("Enter", 13)
        assert browser.value("document.getElementById('theme').textContent") == "Theme: dark"
        assert brightness(browser) < 128
        browser.open(page, DESK, "light")
        assert browser.value("document.documentElement.dataset.theme") == "dark"
        assert brightness(browser) < 128
    finally:
        browser.value("localStorage.clear()")


def test_a_number_leads_to_its_run_which_opens(browser: Browser, page: Path) -> None:
    """By keyboard: focus on a number of ours, Enter; the run's stage was folded."""
    browser.open(page, DESK, "light")
    target = browser.value(
        """(() => {
          const link = document.querySelector("#table2-rows tbody.ours td a.run");
          link.focus();
          return link.hash.slice(1);
        })()"""
    )
    entry = f"document.getElementById('{target}')"
    assert not browser.value(f"({VISIBLE})({entry})")
    browser.press("Enter", 13)
    browser.until(f"location.hash === '#{target}' && ({VISIBLE})({entry})")
    browser.until(f"Math.abs({entry}.getBoundingClientRect().top) < innerHeight")


def test_published_rows_unfold_by_key(browser: Browser, page: Path) -> None:
    browser.open(page, DESK, "light")
    rows = f"[...document.querySelectorAll('#table2-rows tbody.published tr')].filter({VISIBLE}).length"
    assert browser.value(rows) == 0
    browser.value("document.querySelector('[data-unfold=table2-rows]').focus()")
    browser.press(" ", 32)
    assert browser.value(rows) == 16  # with the heading
    assert browser.value("document.activeElement.getAttribute('aria-expanded')") == "true"


def test_the_keyboard_reaches_everything_and_focus_is_seen(browser: Browser, page: Path) -> None:
    """The first key leads past the contents; after it every stop is another element and has an outline."""
    browser.open(page, PHONE, "light")
    browser.press("Tab", 9)
    assert browser.value("document.activeElement.className") == "skip"
    stops = set()
    for _ in range(12):
        browser.press("Tab", 9)
        name, style = browser.value(
            "[[...document.all].indexOf(document.activeElement), getComputedStyle(document.activeElement).outlineStyle]"
        )
        stops.add(name)
        assert style != "none", name
    assert len(stops) == 12


def test_without_scripts_nothing_is_hidden(browser: Browser, page: Path) -> None:
    browser("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(page, DESK, "light")
        hidden = f"[...document.querySelectorAll('.frame, section > .scroll tbody.published tr')].filter((one) => !({VISIBLE})(one)).length"
        assert browser.value(hidden) == 0
        assert browser.value("getComputedStyle(document.getElementById('theme')).display") == "none"
    finally:
        browser("Emulation.setScriptExecutionDisabled", value=False)
