"""How commands present themselves: in groups, each with an example, in lines that fit the terminal."""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from launch.terminal import columns

_GAP: Final = 2
_INDENT: Final = 4


class HelpFormatter(argparse.HelpFormatter):
    """Fits the terminal. Indented lines stay lines, and what is to be copied is not broken."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=columns() - 2)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(_filled(line, width, indent) for line in _joined(text.splitlines()))


def _joined(lines: Sequence[str]) -> list[str]:
    """Lines that are not indented make paragraphs, which end before an empty or an indented line, or with a colon."""
    joined = [""]
    for line in lines:
        before = joined[-1]
        if before and line and before[0] != " " and line[0] != " " and before[-1] != ":":
            joined[-1] += f" {line}"
        else:
            joined.append(line)
    return joined[1:]


def _filled(line: str, width: int, indent: str) -> str:
    text = line.lstrip()
    if text.startswith(("msmil ", "$ ")):
        return indent + line
    lead = indent + line[: len(line) - len(text)]
    # a word and what it means: the meaning goes on beneath itself
    hanging = re.match(r"\S+(?: \S+)* {2,}", text) if lead else None
    below = lead + " " * (hanging.end() if hanging else 0)
    return textwrap.fill(
        text, width, initial_indent=lead, subsequent_indent=below, break_long_words=False, break_on_hyphens=False
    )


@dataclass(frozen=True)
class Listed:
    """A command as `msmil --help` lists it."""

    group: str
    name: str
    help: str
    example: str


class Commands:
    """Where command files add their parsers."""

    def __init__(self, subparsers: Any) -> None:
        self._subparsers = subparsers
        self.listed: list[Listed] = []
        self.group = ""

    def add_parser(
        self, name: str, *, help: str, description: str, examples: Sequence[str], epilog: str = ""
    ) -> argparse.ArgumentParser:
        """Add a command.

        Args:
            name: what is typed.
            help: what it does, for the list of commands.
            description: what it does, for its own help.
            examples: command lines; the first one stands in the list of commands too.
            epilog: what its own help says beneath its options and examples; line breaks are kept.
        """
        self.listed.append(Listed(self.group, name, help, examples[0]))
        head = "example" if len(examples) == 1 else "examples"
        shown = "\n".join([f"{head}:", *(f"  {example}" for example in examples)])
        parser: argparse.ArgumentParser = self._subparsers.add_parser(
            name,
            help=help,
            description=description,
            epilog=f"{shown}\n\n{epilog}" if epilog else shown,
            formatter_class=HelpFormatter,
        )
        return parser

    def listing(self) -> str:
        """All commands by group, for `msmil --help`."""
        width = max(len(command.name) for command in self.listed)
        column = " " * (_INDENT + width + _GAP)
        lines: list[str] = []
        for group in dict.fromkeys(command.group for command in self.listed):
            lines += ["", f"{group}:"]
            for command in (one for one in self.listed if one.group == group):
                name = f"{' ' * _INDENT}{command.name:<{width}}{' ' * _GAP}"
                lines += textwrap.wrap(command.help, columns() - 2, initial_indent=name, subsequent_indent=column)
                lines.append(f"{column}$ {command.example}")
        return "\n".join(lines[1:])
