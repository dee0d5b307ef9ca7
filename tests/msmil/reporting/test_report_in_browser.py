"""The report in a real Chromium: no error, no missing picture, nothing loaded, readable on wide and narrow screens."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from selenium import webdriver

from msmil.reporting.report import write_report
from tests.browser import broken_images, browser, console_errors, overflow_px
from tests.run_folders import make_run

pytestmark = pytest.mark.slow

LONG = "Architectural_Distortion_or_Asymmetry_of_the_Whole_Breast"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A report of one run, whose images are much wider than high, and one of two runs with long names."""
    folder = tmp_path_factory.mktemp("reports")
    wide = make_run(folder / "wide", labels=("Mass", LONG), shape=(24, 120))
    other = make_run(folder / ("other_" + "x" * 80), labels=(LONG,), shape=(60, 9), seed=1)
    write_report([wide], folder / "one.html", split="test", show_ids=False)
    write_report([wide, other], folder / "two.html", split="test", show_ids=True)
    return [folder / "one.html", folder / "two.html"]


def resize(page: webdriver.Chrome, width_px: int) -> None:
    metrics = {"width": width_px, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def beyond(page: webdriver.Chrome) -> list[str]:
    """What a reader would have to scroll to, sideways, within the page or one of its tables."""
    outside = "e => e.getBoundingClientRect().right > innerWidth + 1"
    found: list[str] = page.execute_script(
        f"return [...document.querySelectorAll('main *')].filter({outside}).map(e => e.textContent)"
    )
    return found


def smaller_than(page: webdriver.Chrome, size_px: int) -> list[str]:
    """Text of the page in letters smaller than this."""
    small = f"e => parseFloat(getComputedStyle(e).fontSize) < {size_px}"
    found: list[str] = page.execute_script(
        f"return [...document.querySelectorAll('p, td, th, li, dd, .ci')].filter({small}).map(e => e.textContent)"
    )
    return found


def test_it_is_whole_and_readable(pages: list[Path]) -> None:
    with browser(1280) as page:
        for file in pages:
            page.get(file.as_uri())
            page.execute_script("document.querySelectorAll('details').forEach(d => { d.open = true; })")
            for width_px in (1280, 400):
                resize(page, width_px)
                assert (overflow_px(page), beyond(page), smaller_than(page, 11)) == (0, [], [])
                assert broken_images(page) == []
            loaded = page.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
            assert [name for name in loaded if not name.startswith("data:")] == []
        assert console_errors(page) == []


def test_a_link_opens_what_is_folded_and_print_opens_all(pages: list[Path]) -> None:
    with browser(1280) as page:
        page.get(pages[1].as_uri())
        assert not page.find_element("id", "run-2-results").is_displayed()
        page.get(f"{pages[1].as_uri()}#run-2-results")
        assert page.find_element("id", "run-2-results").is_displayed()
        assert not page.find_element("id", "run-1-results").is_displayed()
        pdf = page.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})
        assert base64.b64decode(pdf["data"]).count(b"/Type /Page\n") > 6
        assert page.find_element("id", "run-1-results").is_displayed(), "print opened it"
        assert console_errors(page) == []
