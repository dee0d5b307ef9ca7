"""The console script `msmil`: one command per file, errors of users as one line and exit code 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import msmil
from launch import convert, demo, evaluate, extract, pack, phantom, repeat, train, verify, watch
from shards.errors import UserError

EXIT_OK = 0
EXIT_USER = 2
EXIT_INTERRUPTED = 130
_COMMANDS = (demo, phantom, pack, verify, convert, extract, train, evaluate, repeat, watch)


def build_parser() -> argparse.ArgumentParser:
    """The parser with every command; imports no torch."""
    parser = argparse.ArgumentParser(
        prog="msmil",
        description="Multi-scale attention MIL on full-resolution mammograms: shards, training, evaluation.",
        epilog="`msmil COMMAND --help` names the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"msmil {msmil.__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_parser(subparsers)
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line; overrides (a.b=c) may stand anywhere, before and after options."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    overrides = [text for text in rest if "=" in text and not text.startswith("-")]
    if len(overrides) < len(rest) or (rest and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    args = parse(argv)
    try:
        return int(args.run(args))
    except UserError as error:
        print(f"msmil: error: {error}", file=sys.stderr)
        return EXIT_USER
    except KeyboardInterrupt:
        print("msmil: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
