"""Types of command line arguments that several commands share."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Literal

from shards.remote.url import is_url


def at_least_one(text: str) -> int:
    """A whole number from 1 on, as the `type` of an argument.

    Raises:
        argparse.ArgumentTypeError: the text is no such number.
    """
    number = _whole_number(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return number


def folder_here(text: str) -> Path:
    """A folder that is written, as the `type` of an argument.

    Raises:
        argparse.ArgumentTypeError: the text is an address.
    """
    if is_url(text):
        raise argparse.ArgumentTypeError(f"{text!r} is an address; give a folder, and copy it there when it is whole")
    return Path(text)


def number_of_folds(text: str) -> int | Literal["table"]:
    """A whole number from 2 on, or table, as the `type` of an argument.

    Raises:
        argparse.ArgumentTypeError: the text is neither.
    """
    if text == "table":
        return "table"
    number = _whole_number(text)
    if number < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is neither table nor a whole number of at least 2")
    return number


def image_size(text: str) -> tuple[int, int]:
    """HEIGHTxWIDTH in pixels, as the `type` of an argument.

    Raises:
        argparse.ArgumentTypeError: the text is no such size.
    """
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH in pixels, such as 1520x912")
    return int(found[1]), int(found[2])


def _whole_number(text: str) -> int:
    """The number, or 0, which nothing here accepts, where the text is none."""
    try:
        return int(text)
    except ValueError:
        return 0


def add_overrides(parser: argparse.ArgumentParser, what: str = "options that replace those of the file") -> None:
    """Add `a.b=c ...`."""
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help=f"{what} (default: none)")


def add_ranks(parser: argparse.ArgumentParser) -> None:
    """Add `--ranks N`."""
    parser.add_argument(
        "--ranks", type=at_least_one, metavar="N", help="processes on this machine (default: one per GPU, else 2)"
    )


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Add `--processes N`."""
    parser.add_argument(
        "--processes", type=at_least_one, metavar="N", help="processes that work at a time (default: one per core)"
    )


def add_quiet(
    parser: argparse.ArgumentParser, what: str = "no progress, no information; results and errors stay"
) -> None:
    """Add `--quiet`."""
    parser.add_argument("--quiet", action="store_true", help=what)


def add_json(parser: argparse.ArgumentParser, what: str) -> None:
    """Add `--json`: stdout then holds one JSON document."""
    parser.add_argument("--json", action="store_true", help=f"print {what} as one JSON document, for scripts")
