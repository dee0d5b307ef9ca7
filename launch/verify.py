"""`msmil verify DIR`: read a packed folder, or one of features, again and tell all that is wrong."""

from __future__ import annotations

import argparse
import json

from launch.arguments import add_json, add_processes, add_quiet
from launch.commands import Commands

_EXIT_BROKEN = 2


def add_parser(commands: Commands) -> None:
    """Add `msmil verify`."""
    parser = commands.add_parser(
        "verify",
        help="re-read a packed folder, or one of features; check everything",
        description="Check the size and checksum of every tar, the checksum, size and type of every image, and that "
        "the tars, samples.arrow and manifest.json agree; of features likewise. Exit code 2 if anything is wrong.",
        examples=("msmil verify data/shards", "msmil verify data/shards --quiet --json | jq .problems"),
    )
    parser.add_argument(
        "folder", metavar="DIR", help="folder that `msmil pack` or `msmil extract` wrote, or its address"
    )
    add_processes(parser)
    add_quiet(parser, "no progress, and no word where nothing is wrong")
    add_json(parser, "what was read and what is wrong")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Verify, print what is wrong, exit code 2 if anything is."""
    from shards.manifest import FEATURES_FORMAT, folder_format

    if folder_format(args.folder) == FEATURES_FORMAT:
        from shards.feature_verify import verify_features as verify
    else:
        from shards.verify import verify
    report = verify(args.folder, processes=args.processes, quiet=args.quiet)
    if args.json:
        print(json.dumps(report.summary(), indent=2))
    elif not (report.ok and args.quiet):
        print(report)
    return 0 if report.ok else _EXIT_BROKEN
