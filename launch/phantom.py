"""`msmil phantom OUT`: synthetic exams in the layout of the published archive, to try everything on."""

from __future__ import annotations

import argparse

from launch.arguments import add_processes, add_quiet, at_least_one, folder_here
from launch.commands import Commands


def add_parser(commands: Commands) -> None:
    """Add `msmil phantom`."""
    parser = commands.add_parser(
        "phantom",
        help="make synthetic mammograms with known lesions",
        description="Draw exams of four views with masses and clusters of microcalcifications, and write them as "
        "vindrmammo_grouped_df.csv and images_png/, the layout of VinDr-Mammo's PNG release. Interrupted, the same "
        "command goes on where it stopped; the same options give the same bytes for any number of processes.",
        examples=("msmil phantom data/phantoms --exams-training 40 --seed 7",),
    )
    add = parser.add_argument
    add("out", metavar="OUT", type=folder_here, help="folder for the table and the images")
    add("--exams-training", type=int, default=400, metavar="N", help="exams marked as training (default: %(default)s)")
    add("--exams-test", type=int, default=100, metavar="N", help="exams marked as test (default: %(default)s)")
    height = "height of the images in pixels; it stands for 200 mm (default: %(default)s)"
    add("--height", type=at_least_one, default=384, metavar="PX", help=height)
    width = "width of the images in pixels (default: %(default)s)"
    add("--width", type=at_least_one, default=240, metavar="PX", help=width)
    seed = "seed; all that is drawn is a function of it (default: %(default)s)"
    add("--seed", type=int, default=0, metavar="SEED", help=seed)
    add_processes(parser)
    add_quiet(parser, "no progress, no table; errors stay")
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
