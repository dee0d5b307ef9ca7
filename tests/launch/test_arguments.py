"""Numbers on the command line that make no sense are refused before anything is read or written."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from launch.arguments import at_least_one
from launch.cli import EXIT_USER, main

PACK = ("pack", "OUT", "--table", "t.csv", "--images", "images")


@pytest.mark.parametrize(("text", "number"), [("1", 1), ("64", 64), (" 7 ", 7)])
def test_whole_numbers_from_one_on(text: str, number: int) -> None:
    assert at_least_one(text) == number


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "two", ""])
def test_anything_else_is_named(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"{text!r} is not a whole number of at least 1"):
        at_least_one(text)


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (PACK, "--processes"),
        (PACK, "--samples-per-shard"),
        (PACK, "--height"),
        (PACK, "--width"),
        (("verify", "DIR"), "--processes"),
        (("phantom", "OUT"), "--processes"),
        (("phantom", "OUT"), "--height"),
        (("phantom", "OUT"), "--width"),
    ],
)
@pytest.mark.parametrize("value", ["0", "-3"])
def test_commands_refuse_less_than_one(
    command: tuple[str, ...], option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command, option, value])
    assert caught.value.code == EXIT_USER
    assert f"argument {option}: '{value}' is not a whole number of at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(("training", "test"), [("0", "0"), ("-1", "5"), ("5", "-1")])
def test_phantoms_of_no_exam_are_refused(
    training: str, test: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["phantom", str(out), "--exams-training", training, "--exams-test", test]) == EXIT_USER
    assert f"{training} training and {test} test exams" in capsys.readouterr().err
    assert not out.exists()
