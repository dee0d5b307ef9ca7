"""The README says what is true: its table of options, its files, its commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launch.cli import build_parser, parse
from launch.reference import markdown

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    msmil (.+)$", TEXT, flags=re.MULTILINE)


def test_the_table_of_options_is_the_generated_one() -> None:
    assert markdown() in TEXT, "run python -m launch.reference and paste its table"


def test_every_row_of_the_table_of_options_has_three_cells() -> None:
    for row in markdown().splitlines():
        assert len(re.findall(r"(?<!\\)\|", row)) == 4, row


@pytest.mark.parametrize("path", sorted(set(re.findall(r"configs/\S+\.yaml", TEXT))))
def test_named_files_exist(path: str) -> None:
    assert (ROOT / path).is_file()


def test_every_row_of_the_paper_is_named_and_is_there() -> None:
    files = {path.name for path in (ROOT / "configs" / "experiment" / "paper").iterdir()}
    assert set(re.findall(r"`paper/(\S+\.yaml)`", TEXT)) == files


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command: str) -> None:
    assert callable(parse(command.split()).run)


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(f"\n{target}:" in makefile for target in ("demo", "test", "test-fast"))


COMMANDS = ["demo", "phantom", "pack", "verify", "convert", "extract", "train", "evaluate", "report", "repeat"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help_text_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"\n    {command} " in build_parser().format_help()
    with pytest.raises(SystemExit, match="0"):
        parse([command, "--help"])
    assert f"msmil {command}" in capsys.readouterr().out.partition("example")[2]
