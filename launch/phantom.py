"""`msmil phantom OUT`: synthetic exams in the layout of the published archive, to try everything on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from launch.arguments import at_least_one


def add_parser(subparsers: Any) -> None:
    """Add `msmil phantom`."""
    parser = subparsers.add_parser(
        "phantom",
        help="make synthetic mammograms with known lesions",
        description="Draw exams of four views with masses and clusters of microcalcifications, and write them as "
        "vindrmammo_grouped_df.csv and images_png/, the layout of VinDr-Mammo's PNG release. Interrupted, the same "
        "command goes on where it stopped; the same options give the same bytes for any number of processes.",
        epilog="example: msmil phantom data/phantoms --exams-training 400 --exams-test 100",
    )
    add = parser.add_argument
    add("out", metavar="OUT", type=Path, help="folder for the table and the images")
    add("--exams-training", type=int, default=400, metavar="N", help="exams marked as training (%(default)s)")
    add("--exams-test", type=int, default=100, metavar="N", help="exams marked as test (%(default)s)")
    add("--height", type=at_least_one, default=384, metavar="PX", help="height of the images, 200 mm (%(default)s)")
    add("--width", type=at_least_one, default=240, metavar="PX", help="width of the images (%(default)s)")
    add("--seed", type=int, default=0, help="everything drawn is a function of it (%(default)s)")
    add("--processes", type=at_least_one, metavar="N", help="processes (one per core)")
    add("--quiet", action="store_true", help="no progress, no table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Draw the archive and print what it holds."""
    from shards.sources.phantom import write_phantoms

    report = write_phantoms(
        args.out,
        exams={"training": args.exams_training, "test": args.exams_test},
        height_px=args.height,
        width_px=args.width,
        seed=args.seed,
        processes=args.processes,
        quiet=args.quiet,
    )
    if not args.quiet:
        print(report)
    return 0
