"""`msmil verify DIR`: read a packed folder, or one of features, again and tell all that is wrong."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from launch.arguments import at_least_one

_EXIT_BROKEN = 2


def add_parser(subparsers: Any) -> None:
    """Add `msmil verify`."""
    parser = subparsers.add_parser(
        "verify",
        help="re-read a packed folder, or one of features, and check everything",
        description="Check the size and checksum of every tar, the checksum, size and type of every image, and that "
        "the tars, samples.arrow and manifest.json agree; of features likewise. Exit code 2 if anything is wrong.",
        epilog="example: msmil verify data/shards",
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder that `msmil pack` or `msmil extract` wrote")
    parser.add_argument("--processes", type=at_least_one, metavar="N", help="processes (one per core)")
    parser.add_argument("--quiet", action="store_true", help="no progress, and no table where nothing is wrong")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Verify, print what is wrong, exit code 2 if anything is."""
    from shards.manifest import FEATURES_FORMAT, folder_format

    if folder_format(args.folder) == FEATURES_FORMAT:
        from shards.feature_verify import verify_features as verify
    else:
        from shards.verify import verify
    report = verify(args.folder, processes=args.processes, quiet=args.quiet)
    if not (report.ok and args.quiet):
        print(report)
    return 0 if report.ok else _EXIT_BROKEN
