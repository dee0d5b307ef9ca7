"""`msmil extract CONFIG OUT`, and the program of one of its ranks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from launch.arguments import add_json, add_overrides, add_quiet, add_ranks, at_least_one, folder_here
from launch.commands import Commands
from launch.ranks import default_ranks, rank_program, start_ranks
from msmil.config_io import load_config
from shards.errors import UserError

if TYPE_CHECKING:
    from msmil.config import Config

_OFFLINE = "configs/experiment/vindr_mass_fpn_abmil_offline.yaml"
_EXAMPLES = (
    "msmil extract my_experiment.yaml data/features --dtype bf16",
    f"msmil extract {_OFFLINE} data/vindr/features --sizes",
    f"msmil train {_OFFLINE} data.features=data/vindr/features",
)


def add_parser(commands: Commands) -> None:
    """Add `msmil extract`."""
    parser = commands.add_parser(
        "extract",
        help="encode a packed folder once: shards of features to train from",
        description="Encode every image of data.shards with the backbone in eval mode, on every GPU of this machine "
        "(without one: on 2 CPU ranks of one thread), and store what it gives. The size is printed first. "
        "Interrupted, the same command goes on where it stopped.",
        examples=_EXAMPLES,
    )
    _add_arguments(parser)
    add_ranks(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check what can be checked, then start the ranks."""
    if args.json and not args.sizes:
        raise UserError(
            "--json without --sizes", fix="add --sizes: an extraction has nothing else to print for scripts"
        )
    config = load_config(args.config, args.overrides)
    ranks = default_ranks() if args.ranks is None else args.ranks
    from msmil.engine.data import open_data

    open_data(config)
    if args.sizes:
        ranks = 1
    arguments = [args.config, str(args.out), *args.overrides]
    arguments += ["--dtype", args.dtype, "--images-per-shard", str(args.images_per_shard)]
    arguments += ["--zstd"] * args.zstd + ["--sizes"] * args.sizes
    arguments += ["--quiet"] * args.quiet + ["--json"] * args.json
    log = args.out / "log.txt"
    return start_ranks("launch.extract", arguments, ranks=ranks, precision=config.train.precision, log=log)


def main(config: Config, args: argparse.Namespace) -> None:
    """Extract in this process, one rank of the world that the launcher made."""
    from msmil.engine.environment import without_engine
    from msmil.engine.extract import Storage, extract
    from msmil.engine.runtime import Runtime

    storage = Storage(dtype=args.dtype, zstd=args.zstd, images_per_shard=args.images_per_shard)
    with Runtime(without_engine(config.train), quiet=args.quiet) as runtime:
        extract(config, args.out, runtime, storage, only_sizes=args.sizes, as_json=args.json)


def rank_main(argv: Sequence[str] | None = None) -> int:
    """What a launcher starts: parse, extract, exit code."""
    parser = argparse.ArgumentParser(prog="python -m launch.extract", description="one rank of an extraction")
    _add_arguments(parser)
    args = parser.parse_args(argv)
    return rank_program(lambda: main(load_config(args.config, args.overrides), args))


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("config", metavar="CONFIG", help="experiment; its data, bags and model sections say what is encoded")
    add("out", metavar="OUT", type=folder_here, help="folder for the shards of features")
    add("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="how numbers are stored (default: fp32)")
    add("--zstd", action="store_true", help="compress, which costs time when they are read")
    add("--images-per-shard", type=at_least_one, default=64, metavar="N", help="images in a tar (default: %(default)s)")
    add("--sizes", action="store_true", help="print what every way to store them takes, in bytes, and stop")
    add_quiet(parser, "no progress, no sizes unless --sizes asks for them; errors stay")
    add_json(parser, "the sizes (with --sizes)")
    add_overrides(parser)


if __name__ == "__main__":
    sys.exit(rank_main())
