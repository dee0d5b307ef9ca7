"""Types of command line arguments that several commands share."""

from __future__ import annotations

import argparse
from typing import Literal


def at_least_one(text: str) -> int:
    """A whole number from 1 on, as the `type` of an argument.

    Raises:
        argparse.ArgumentTypeError: the text is no such number.
    """
    number = _whole_number(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return number


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


def _whole_number(text: str) -> int:
    """The number, or 0, which nothing here accepts, where the text is none."""
    try:
        return int(text)
    except ValueError:
        return 0
