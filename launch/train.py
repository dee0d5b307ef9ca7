"""`msmil train CONFIG`, and the program of one rank: `accelerate launch -m launch.train CONFIG`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.arguments import at_least_one
from launch.ranks import default_ranks, rank_program, start_ranks
from msmil.config_io import load_config, reference

if TYPE_CHECKING:
    from msmil.config import Config

_EXAMPLE = "example: msmil train configs/experiment/demo.yaml train.epochs=3 optim.lr=1e-3"


def add_parser(subparsers: Any) -> None:
    """Add `msmil train`."""
    parser = subparsers.add_parser(
        "train",
        help="train an experiment on every GPU of this machine, or go on with it",
        description="Check the experiment, then train it on every GPU of this machine (without one: on 2 CPU ranks). "
        "The same command again goes on from the last checkpoint.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"{_EXAMPLE}\n\noptions of an experiment (default):\n" + "\n".join(_reference_lines()),
    )
    _add_arguments(parser)
    parser.add_argument(
        "--ranks", type=at_least_one, metavar="N", help="processes on this machine (default: one per GPU, else 2)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train one experiment."""
    return start(args.config, args.overrides, ranks=args.ranks)


def start(file: str, overrides: Sequence[str], *, ranks: int | None) -> int:
    """Check everything that can be checked, start the ranks (None: one per GPU) and return their exit code."""
    config = load_config(file, overrides)
    ranks = default_ranks() if ranks is None else ranks
    from msmil.engine.preflight import check_experiment

    check_experiment(config, ranks)
    arguments = [file, *overrides]
    log = Path(config.output_dir) / config.name / "log.txt"
    return start_ranks("launch.train", arguments, ranks=ranks, precision=config.train.precision, log=log)


def main(config: Config) -> None:
    """Train in this process, one rank of the world that the launcher made."""
    from msmil.engine.preflight import check_experiment
    from msmil.engine.runtime import Runtime
    from msmil.engine.train import train

    runtime = Runtime(config.train)
    check_experiment(config, runtime.world)
    train(config, runtime)
    runtime.close()


def rank_main(argv: Sequence[str] | None = None) -> int:
    """What a launcher starts: parse, train, exit code."""
    parser = argparse.ArgumentParser(prog="python -m launch.train", description="one rank of a training")
    _add_arguments(parser)
    args = parser.parse_args(argv)
    return rank_program(lambda: main(load_config(args.config, args.overrides)))


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="experiment, for example configs/experiment/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="options that replace those of the file")


def _reference_lines() -> list[str]:
    return [f"  {o.key} ({o.default})\n      {o.doc} [{o.kind}]".replace("%", "%%") for o in reference()]


if __name__ == "__main__":
    sys.exit(rank_main())
