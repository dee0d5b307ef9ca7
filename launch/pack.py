"""`msmil pack OUT`: an archive of mammograms becomes WebDataset tars and a manifest."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from launch.arguments import add_json, add_processes, add_quiet, at_least_one, folder_here
from launch.commands import Commands
from shards.errors import UserError

if TYPE_CHECKING:
    from shards.sources.base import Archive

_FOLDER_HELP = """\
--source folder reads a CSV with a row per image:
  image        path below --images             patient_id
  laterality   L or R                          view         CC or MLO
  one column per label: 1, 0 or empty (unknown)
  optional: image_id, exam_id, split (training, validation, test), fold, manufacturer, density, birads
--boxes adds a CSV with image, label, x0, y0, x1, y1 in pixels of the image file (x1, y1 exclusive).
"""


def add_parser(commands: Commands) -> None:
    """Add `msmil pack`."""
    parser = commands.add_parser(
        "pack",
        help="images + table -> WebDataset tars + manifest",
        description="Pack an archive. Interrupted, the same command goes on where it stopped; "
        "the same input gives the same bytes for any number of processes.",
        examples=(
            "msmil pack data/shards --table table.csv --images images_png",
            "msmil pack data/mine --source folder --table mine.csv --images pictures --recipe mammoclip",
        ),
        epilog=_FOLDER_HELP,
    )
    add = parser.add_argument
    default = "(default: %(default)s)"
    add("out", metavar="OUT", type=folder_here, help="folder for the tars and the manifest")
    add("--table", type=Path, required=True, metavar="CSV", help="the archive's table (required)")
    add("--images", type=Path, required=True, metavar="DIR", help="folder of the archive's images (required)")
    add("--source", choices=("grouped", "folder"), default="grouped", help=f"layout of table and folder {default}")
    add("--boxes", type=Path, metavar="CSV", help="table of boxes, with --source folder (default: none)")
    add("--labels", nargs="+", metavar="LABEL", help="labels to keep (default: all that the source offers)")
    add("--recipe", choices=("as_is", "mammoclip"), default="as_is", help=f"preparation of pixels {default}")
    size = "stored {} in pixels (default: mammoclip {}, as_is the first image's)"
    add("--height", type=at_least_one, metavar="PX", help=size.format("height", 1520))
    add("--width", type=at_least_one, metavar="PX", help=size.format("width", 912))
    add("--codec", choices=("png", "zstd"), default="png", help=f"png is smaller, zstd decodes faster {default}")
    validation = parser.add_mutually_exclusive_group()
    validation.add_argument(
        "--validation-fraction",
        type=float,
        metavar="X",
        help="share, 0 to 1, of the training patients that validates (default: the images that the table marks, "
        "else 0.15)",
    )
    fold = "number of the table's fold that validates (default: none)"
    validation.add_argument("--validation-fold", type=int, metavar="K", help=fold)
    add("--seed", type=int, default=0, metavar="SEED", help=f"seed of the validation split and of the order {default}")
    add("--samples-per-shard", type=at_least_one, default=256, metavar="N", help=f"most images in a tar {default}")
    add_processes(parser)
    add("--on-broken", choices=("stop", "drop"), default="stop", help=f"what a broken image does {default}")
    add_quiet(parser, "no progress, no table; errors stay")
    add_json(parser, "what was packed")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Read the archive, pack it, print what was packed."""
    from shards.pack import pack
    from shards.recipes import make_recipe
    from shards.splits import Validation

    recipe = make_recipe(args.recipe, height_px=args.height, width_px=args.width)
    report = pack(
        _read(args),
        args.out,
        recipe=recipe,
        codec=args.codec,
        labels=args.labels,
        validation=Validation(fraction=args.validation_fraction, fold=args.validation_fold),
        seed=args.seed,
        samples_per_shard=args.samples_per_shard,
        processes=args.processes,
        drop_broken=args.on_broken == "drop",
        quiet=args.quiet,
    )
    if args.json:
        print(json.dumps(report.summary(), indent=2))
    elif not args.quiet:
        print(report)
    return 0


def _read(args: argparse.Namespace) -> Archive:
    if not args.images.is_dir():
        raise UserError("is no folder", fix="give the folder of the images with --images", file=args.images)
    if args.source == "folder":
        from shards.sources.image_folder import read_image_folder

        return read_image_folder(args.table, args.images, labels=args.labels, boxes=args.boxes)
    if args.boxes is not None:
        raise UserError("--boxes with --source grouped", fix="leave it out: that table holds its boxes itself")
    from shards.sources.grouped_table import read_grouped_table

    return read_grouped_table(args.table, args.images)
