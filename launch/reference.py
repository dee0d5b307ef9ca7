"""The generated pages of the documentation: every option of an experiment, and every command.

`python -m launch.reference` prints the options; with README.md behind it, writes them there. The texts are the
dataclasses' own docs and the commands' own help.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, get_type_hints

from msmil.config import Config
from msmil.config_io import Option, reference

README_MARK: Final = "<!-- written by python -m launch.reference README.md -->"
_PIPE: Final = "\\|"  # a bare one would end the cell
_USAGE_WIDTH: Final = 84
_EVERY_OPTION: Final = "\n\noptions of an experiment"  # from here on `msmil train --help` repeats the other page


def configuration_page() -> str:
    """Markdown: a section per part of the configuration, with a table of its options."""
    lines = [
        "# Configuration reference",
        "",
        "Every option of an experiment. Set it in the file or on the command line (`optim.lr=1e-4`); an unknown key, a",
        "wrong type or a value out of range is one line with the fix. This page is made from the dataclasses of",
        "`msmil/config.py`; `msmil train --help` prints the same.",
    ]
    return "\n".join([*lines, *_sections("##")]) + "\n"


def with_reference(readme: str) -> str:
    """The text of README.md, whose end is the reference of all options, made anew.

    Raises:
        ValueError: the line is missing behind which it stands.
    """
    kept, mark, _ = readme.partition(README_MARK)
    if not mark:
        raise ValueError(f"no line {README_MARK}. Fix: write it where the reference shall begin")
    return "\n".join([f"{kept}{mark}", *_sections("###")]) + "\n"


def _sections(heading: str) -> list[str]:
    """Lines of Markdown: for each part of the configuration a heading, its doc, and a table of its options."""
    sections: dict[str, list[Option]] = {}
    for option in reference():
        sections.setdefault(option.key.rpartition(".")[0], []).append(option)
    docs = dict(_section_docs(Config, ""))
    lines = []
    for section, options in sections.items():
        lines += ["", f"{heading} {section or 'The experiment'}", "", docs[section], "", *_table(options)]
    return lines


def command_page() -> str:
    """Markdown: a section per command with its usage, arguments and examples."""
    from launch.cli import build_parser

    parser = build_parser()
    lines = ["# Command reference", "", str(parser.description), "", "This page is made from the commands' own help."]
    for name, command in commands(parser).items():
        usage = textwrap.fill(
            _sentence(command.format_usage()).removeprefix("usage: "),
            _USAGE_WIDTH,
            subsequent_indent="    ",
            break_on_hyphens=False,
            break_long_words=False,
        )
        lines += ["", f"## msmil {name}", "", _sentence(command.description), "", "```text", usage, "```", ""]
        lines += ["| argument | meaning |", "|---|---|"]
        lines += [f"| {_cell(_argument(action))} | {_cell(_help(command, action))} |" for action in _shown(command)]
        epilog = (command.epilog or "").partition(_EVERY_OPTION)[0].strip()
        if epilog:
            lines += ["", "```text", epilog, "```"]
        if _EVERY_OPTION in (command.epilog or ""):
            lines += ["", "Options `a.b=c` are those of the [configuration reference](configuration.md)."]
    return "\n".join(lines) + "\n"


def commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The commands of `msmil` by name, those below another one (`bench train`) behind it."""
    found: dict[str, argparse.ArgumentParser] = {}
    for name, command in _choices(parser).items():
        found[name] = command
        found |= {f"{name} {part}": below for part, below in _choices(command).items()}
    return found


def _choices(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    actions = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return {name: choice for action in actions for name, choice in action.choices.items()}


def _table(options: list[Option]) -> list[str]:
    rows = [(f"`{o.key}`", f"`{o.default}`", f"{o.doc} ({o.kind})") for o in options]
    return ["| option | default | meaning |", "|---|---|---|", *(f"| {' | '.join(map(_cell, row))} |" for row in rows)]


def _section_docs(kind: type, prefix: str) -> Iterator[tuple[str, str]]:
    """(dotted section, its dataclass's doc)."""
    yield prefix.rstrip("."), str(kind.__doc__)
    hints = get_type_hints(kind)
    for item in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[item.name]):
            yield from _section_docs(hints[item.name], f"{prefix}{item.name}.")


def _shown(command: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in command._actions if not isinstance(action, argparse._HelpAction)]


def _argument(action: argparse.Action) -> str:
    """As one types it: `--split {train,val,test}`, `CONFIG`."""
    value = action.metavar
    if value is None and action.choices is not None:
        value = f"{{{','.join(map(str, action.choices))}}}"
    if not action.option_strings:
        return f"`{value or action.dest}`"
    if action.nargs == 0:
        return f"`{', '.join(action.option_strings)}`"
    return f"`{', '.join(action.option_strings)} {value or action.dest.upper()}`"


def _help(command: argparse.ArgumentParser, action: argparse.Action) -> str:
    formatter = command._get_formatter()
    return formatter._expand_help(action) if action.help else ""


def _sentence(text: str | None) -> str:
    return re.sub(r"\s+", " ", text or "").strip()


def _cell(text: str) -> str:
    return _sentence(text).replace("|", _PIPE)


def main(files: Sequence[str]) -> None:
    """Print the options, or write them into files that have a place for them."""
    for file in map(Path, files):
        file.write_text(with_reference(file.read_text(encoding="utf-8")), encoding="utf-8")
    if not files:
        print(configuration_page(), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
