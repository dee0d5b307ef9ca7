"""What a terminal changes: colours, width. Piped text has no colours."""

from __future__ import annotations

import os
import shutil
import sys
from typing import Final, Literal, TextIO

Colour = Literal["red", "green", "yellow", "dim"]

_CODES: Final[dict[Colour, str]] = {"red": "31", "green": "32", "yellow": "33", "dim": "2"}
_WIDEST: Final = 100  # longer lines read badly


def columns() -> int:
    """How many characters a line of text may have."""
    return min(shutil.get_terminal_size().columns, _WIDEST)


def has_colours(stream: TextIO) -> bool:
    """Whether a stream shows colours: a terminal that can, and a user who does not say NO_COLOR (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, colour: Colour, stream: TextIO | None = None) -> str:
    """The text in a colour where the stream (stdout) shows colours, else as it is."""
    return f"\x1b[{_CODES[colour]}m{text}\x1b[0m" if has_colours(stream or sys.stdout) else text


def print_error(text: str) -> None:
    """One line on stderr that says who speaks and that it is an error."""
    print(f"msmil: {paint('error', 'red', sys.stderr)}: {text}", file=sys.stderr, flush=True)
