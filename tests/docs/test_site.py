"""The built site: no warnings, nothing from elsewhere, all options and commands, readable on any screen, searchable."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import mkdocs.config
import pytest
from mkdocs.commands.build import build
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from launch.cli import build_parser
from launch.reference import commands
from msmil.config_io import reference
from tests.browser import broken_images, browser, console_errors, overflow_px
from tests.docs.pages import ROOT

PAGES = ("index", "quickstart", "concepts", "training", "extending", "reference/configuration", "reference/commands")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make docs` does, where a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    build(mkdocs.config.load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    return folder


def text(site: Path, page: str) -> str:
    return (site / f"{page}.html").read_text(encoding="utf-8")


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        html = page.read_text(encoding="utf-8")
        assert not re.findall(r'src="(?:https?:)?//[^"]+"', html), page.name
        assert not re.findall(r'<link[^>]+href="(?:https?:)?//[^"]+"', html), page.name
    styles = "".join(file.read_text(encoding="utf-8") for file in site.rglob("*.css"))
    assert not re.findall(r"url\([\"']?https?:", styles)


def test_sources_of_the_site_are_not_part_of_it(site: Path) -> None:
    assert not list(site.rglob("*.py"))


def test_every_option_has_its_row(site: Path) -> None:
    html = text(site, "reference/configuration")
    for option in reference():
        assert f"<td><code>{option.key}</code></td>" in html
    assert "none | table or whole number" in html


def test_every_command_has_its_arguments(site: Path) -> None:
    html = text(site, "reference/commands")
    for name, command in commands(build_parser()).items():
        section = html.partition(f'<h2 id="msmil-{name.replace(" ", "-")}">')[2].partition("<h2")[0]
        assert section, name
        flags = [
            flag for action in command._actions if action.help != argparse.SUPPRESS for flag in action.option_strings
        ]
        for flag in set(flags) - {"-h", "--help"}:
            assert flag in section, f"{name} {flag}"


def test_the_first_page_is_the_readme(site: Path) -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    html = text(site, "index")
    assert len(headings) > 5
    assert all(f">{heading}<" in html for heading in headings)


@pytest.mark.slow
def test_pages_are_whole_on_a_desk_and_on_a_telephone(site: Path) -> None:
    with browser() as page:
        for width in (1280, 400):
            metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
            page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            for name in PAGES:
                page.get((site / f"{name}.html").as_uri())
                assert console_errors(page) == [], name
                assert broken_images(page) == [], name
                assert overflow_px(page) == 0, f"{name} at {width} px"


@pytest.mark.slow
def test_the_search_finds_an_option_without_a_server(site: Path) -> None:
    with browser() as page:
        page.get((site / "index.html").as_uri())
        field = page.find_element(By.CSS_SELECTOR, "input.md-search__input")
        field.click()
        field.send_keys("inducing")
        found = WebDriverWait(page, 20).until(lambda p: p.find_elements(By.CSS_SELECTOR, ".md-search-result__link"))
        assert any("reference/configuration.html" in (link.get_attribute("href") or "") for link in found)
