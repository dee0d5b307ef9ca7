"""The console script `msmil`: one command per file, errors of users as one line and exit code 2."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from typing import Final

import msmil
from launch import (
    bench,
    completion,
    convert,
    demo,
    doctor,
    evaluate,
    export,
    extract,
    pack,
    phantom,
    repeat,
    report,
    runs,
    train,
    verify,
    watch,
)
from launch.commands import Commands, HelpFormatter
from launch.ranks import collect_seldom
from launch.terminal import print_error
from shards.errors import UserError

EXIT_USER = 2
EXIT_INTERRUPTED = 130
EXIT_NO_READER = 141
# one line per command: where `msmil --help` lists it, and its file
COMMANDS: Final = (
    ("the main job", demo),
    ("data", phantom),
    ("data", pack),
    ("data", verify),
    ("data", extract),
    ("training", train),
    ("training", repeat),
    ("judging", evaluate),
    ("looking", runs),
    ("looking", watch),
    ("looking", report),
    ("weights", convert),
    ("weights", export),
    ("this machine", doctor),
    ("this machine", bench),
    ("this machine", completion),
)


def build_parser() -> argparse.ArgumentParser:
    """The parser with every command; imports no torch."""
    parser = argparse.ArgumentParser(
        prog="msmil",
        usage="msmil [-h] [--version] COMMAND ...",
        description="Multi-scale attention MIL on full-resolution mammograms: shards, training, evaluation.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"msmil {msmil.__version__}")
    subparsers = parser.add_subparsers(prog="msmil", metavar="COMMAND", required=True, help=argparse.SUPPRESS)
    commands = Commands(subparsers)
    for group, command in COMMANDS:
        commands.group = group
        command.add_parser(commands)
    parser.epilog = f"{commands.listing()}\n\n`msmil COMMAND --help` names the options of a command."
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line; overrides (a.b=c) may stand anywhere, before and after options."""
    parser = build_parser()
    words = sys.argv[1:] if argv is None else argv
    if not words:
        parser.print_help(sys.stderr)
        sys.exit(EXIT_USER)
    _refuse_misspelt(words[0], parser)
    args, rest = parser.parse_known_args(words)
    overrides = [text for text in rest if "=" in text and not text.startswith("-")]
    if len(overrides) < len(rest) or (rest and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def _refuse_misspelt(command: str, parser: argparse.ArgumentParser) -> None:
    names = [module.__name__.rpartition(".")[2] for _, module in COMMANDS]
    near = difflib.get_close_matches(command, names, n=1)
    if command not in names and near:
        parser.error(f"no command {command!r}; did you mean {near[0]}?")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    collect_seldom()
    try:
        args = parse(argv)
        code = int(args.run(args))
        sys.stdout.flush()
        return code
    except UserError as error:
        print_error(str(error))
        return EXIT_USER
    except KeyboardInterrupt:
        print("msmil: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `msmil runs | head`: nobody reads on, and nothing more can be said on stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_NO_READER


if __name__ == "__main__":
    sys.exit(main())
