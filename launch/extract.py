"""`msmil extract CONFIG OUT`, and the program of one of its ranks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.arguments import at_least_one
from launch.ranks import default_ranks, rank_program, start_ranks
from msmil.config_io import load_config

if TYPE_CHECKING:
    from msmil.config import Config

_EPILOG = """\
examples:
  msmil extract configs/experiment/vindr_mass_fpn_abmil.yaml data/vindr/features --dtype bf16
  msmil train configs/experiment/vindr_mass_fpn_abmil.yaml data.features=data/vindr/features train.encoder=frozen \\
      bags.augment.horizontal_flip=0 bags.augment.vertical_flip=0
"""


def add_parser(subparsers: Any) -> None:
    """Add `msmil extract`."""
    parser = subparsers.add_parser(
        "extract",
        help="encode a packed folder once with the frozen backbone: shards of features to train from",
        description="Encode every image of data.shards with the backbone in eval mode, on every GPU of this machine "
        "(without one: on 2 CPU ranks of one thread), and store what it gives. The size is printed first. "
        "Interrupted, the same command goes on where it stopped.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_EPILOG,
    )
    _add_arguments(parser)
    parser.add_argument(
        "--ranks", type=at_least_one, metavar="N", help="processes on this machine (default: one per GPU, else 2)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check what can be checked, then start the ranks."""
    config = load_config(args.config, args.overrides)
    ranks = default_ranks() if args.ranks is None else args.ranks
    from msmil.engine.pipeline import open_data

    open_data(config)
    if args.sizes:
        ranks = 1
    arguments = [args.config, str(args.out), *args.overrides]
    arguments += ["--dtype", args.dtype, "--images-per-shard", str(args.images_per_shard)]
    arguments += ["--zstd"] * args.zstd + ["--sizes"] * args.sizes
    log = args.out / "log.txt"
    return start_ranks("launch.extract", arguments, ranks=ranks, precision=config.train.precision, log=log)


def main(config: Config, args: argparse.Namespace) -> None:
    """Extract in this process, one rank of the world that the launcher made."""
    from msmil.engine.extract import Storage, extract
    from msmil.engine.runtime import Runtime

    runtime = Runtime(config.train)
    storage = Storage(dtype=args.dtype, zstd=args.zstd, images_per_shard=args.images_per_shard)
    extract(config, args.out, runtime, storage, only_sizes=args.sizes)
    runtime.close()


def rank_main(argv: Sequence[str] | None = None) -> int:
    """What a launcher starts: parse, extract, exit code."""
    parser = argparse.ArgumentParser(prog="python -m launch.extract", description="one rank of an extraction")
    _add_arguments(parser)
    args = parser.parse_args(argv)
    return rank_program(lambda: main(load_config(args.config, args.overrides), args))


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("config", metavar="CONFIG", help="experiment; its data, bags and model sections say what is encoded")
    add("out", metavar="OUT", type=Path, help="folder for the shards of features")
    add("overrides", nargs="*", metavar="a.b=c", help="options that replace those of the file")
    add("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="how numbers are stored (default: fp32)")
    add("--zstd", action="store_true", help="compress, which costs time when they are read")
    add("--images-per-shard", type=at_least_one, default=64, metavar="N", help="images in a tar (default: 64)")
    add("--sizes", action="store_true", help="print what every way to store them takes, and stop")


if __name__ == "__main__":
    sys.exit(rank_main())
