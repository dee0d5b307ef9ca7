"""The README says what is true; its commands are run by tests/docs/test_commands.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launch.reference import with_reference

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_says_what_it_has_to() -> None:
    headings = re.findall(r"^## (.+)$", TEXT, flags=re.MULTILINE)
    assert set(headings) >= {"Who it is for, and who not", "Two commands", "Daily work", "Models"}
    assert set(headings) >= {"What a GPU job costs in memory", "What is proven, and what is not"}
    assert "No accuracy on real mammograms is claimed: none was measured." in TEXT
    memory = TEXT.partition("## What a GPU job costs in memory")[2].partition("## ")[0]
    assert "**Computed**" in memory
    assert "H100 two rows were measured beside it" in memory


def test_its_reference_is_that_of_the_dataclasses() -> None:
    assert with_reference(TEXT) == TEXT, "python -m launch.reference README.md writes it anew"


def test_its_figures_are_there_and_small() -> None:
    figures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", TEXT)
    assert figures == ["docs/images/method.png", "docs/images/result.jpg"]
    assert all((ROOT / figure).stat().st_size < 200_000 for figure in figures)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"configs/\S+\.yaml", TEXT))))
def test_named_files_exist(path: str) -> None:
    assert (ROOT / path).is_file()


def test_every_row_of_the_paper_is_named_and_is_there() -> None:
    files = {path.name for path in (ROOT / "configs" / "experiment" / "paper").iterdir()}
    assert set(re.findall(r"`paper/(\S+\.yaml)`", TEXT)) == files


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(f"\n{target}:" in makefile for target in ("demo", "test", "test-fast", "docs", "figures"))
