"""`msmil report RUN [RUN ...]`: one self-contained page about a run, or about several side by side."""

from __future__ import annotations

import argparse
from pathlib import Path

from launch.arguments import add_quiet
from launch.commands import Commands
from shards.errors import UserError
from shards.files import human_bytes
from shards.types import SPLITS

_NAME = "report.html"


def add_parser(commands: Commands) -> None:
    """Add `msmil report`."""
    parser = commands.add_parser(
        "report",
        help="one HTML file about a run, or about several side by side",
        description="Write what a run was trained on, its results with intervals, curves and pictures into one file "
        "that needs nothing beside it: no network, no shards, no GPU. Run folders of any age and state are taken; what "
        "is missing is said.",
        examples=("msmil report runs/demo", "msmil report runs/a runs/b --output compared.html"),
    )
    parser.add_argument(
        "folders", metavar="RUN", nargs="+", type=Path, help="run folder, for example runs/demo (required)"
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        help=f"file to write (default: RUN/{_NAME} of a single run; required for several)",
    )
    parser.add_argument("--split", choices=SPLITS, default="test", help="evaluated images (default: %(default)s)")
    parser.add_argument(
        "--show-ids", action="store_true", help="name images, exams and patients (default: numbers of images alone)"
    )
    add_quiet(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the report and say where it is."""
    from msmil.reporting.report import write_report

    folders = list({folder.resolve(): folder for folder in args.folders}.values())
    output = args.output
    if output is None:
        if len(folders) > 1:
            raise UserError(
                f"a report of {len(folders)} runs has no folder of its own", fix="name a file with --output"
            )
        output = folders[0] / _NAME
    num_bytes = write_report(folders, output, split=args.split, show_ids=args.show_ids)
    if not args.quiet:
        print(f"report: {output} ({human_bytes(num_bytes)})")
    return 0
