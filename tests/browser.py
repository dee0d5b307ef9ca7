"""A real headless Chromium: pages are opened as a reader opens them, and say what went wrong in them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

_SWITCHES = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip


@contextmanager
def browser(width_px: int = 1280, height_px: int = 900) -> Iterator[webdriver.Chrome]:
    """A browser with a window of this size and a profile of its own; skips where Chromium is not installed."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    with tempfile.TemporaryDirectory(prefix="msmil_chromium_") as profile:
        options = Options()
        options.binary_location = chromium
        for switch in (*_SWITCHES, f"--user-data-dir={profile}", f"--window-size={width_px},{height_px}"):
            options.add_argument(switch)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        page = webdriver.Chrome(options=options, service=Service(driver))
        try:
            # Chromium's windows have a least width; this one is as narrow as asked
            metrics = {"width": width_px, "height": height_px, "deviceScaleFactor": 1, "mobile": False}
            page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            yield page
        finally:
            page.quit()


def console_errors(page: webdriver.Chrome) -> list[str]:
    """What the page wrote to its console as an error or a warning."""
    return [entry["message"] for entry in page.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def broken_images(page: webdriver.Chrome) -> list[str]:
    """Pictures that did not load."""
    found: list[str] = page.execute_script(
        "return [...document.images].filter(i => !i.complete || i.naturalWidth === 0).map(i => i.src.slice(0, 80))"
    )
    return found


def overflow_px(page: webdriver.Chrome) -> int:
    """How far the page is wider than its window: a reader would have to scroll sideways."""
    wider: int = page.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
    return max(0, wider)
