"""`msmil train CONFIG`, and the program of one rank: `accelerate launch -m launch.train CONFIG`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launch.arguments import add_overrides, add_quiet, add_ranks
from launch.commands import Commands
from launch.ranks import cause_in, default_ranks, rank_program, start_ranks
from msmil.config_io import load_config, reference

if TYPE_CHECKING:
    from msmil.config import Config

_EXAMPLES = (
    "msmil train configs/experiment/demo.yaml train.epochs=3",
    "msmil train configs/experiment/demo.yaml name=demo_lr optim.lr=1e-3",
)


def add_parser(commands: Commands) -> None:
    """Add `msmil train`."""
    parser = commands.add_parser(
        "train",
        help="train an experiment on all GPUs of this machine, or go on",
        description="Check the experiment, then train it on every GPU of this machine (without one: on 2 CPU ranks). "
        "The same command again goes on from the last checkpoint.",
        examples=_EXAMPLES,
        epilog="options of an experiment (default):\n" + "\n".join(_reference_lines()),
    )
    _add_arguments(parser)
    add_ranks(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train one experiment."""
    return start(args.config, args.overrides, ranks=args.ranks, quiet=args.quiet)


def start(file: str, overrides: Sequence[str], *, ranks: int | None, quiet: bool = False) -> int:
    """Check everything that can be checked, start the ranks (None: one per GPU) and return their exit code."""
    config = load_config(file, overrides)
    ranks = default_ranks() if ranks is None else ranks
    from msmil.engine.preflight import check_experiment, fetch_pretrained

    manifest = check_experiment(config, ranks)
    fetch_pretrained(config, manifest)
    arguments = [file, *overrides, *["--quiet"] * quiet]
    return start_ranks("launch.train", arguments, ranks=ranks, precision=config.train.precision, log=_log_of(config))


def main(config: Config, *, quiet: bool = False) -> None:
    """Train in this process, one rank of the world that the launcher made."""
    from msmil.engine.preflight import check_experiment
    from msmil.engine.runtime import Runtime
    from msmil.engine.train import train

    with Runtime(config.train, quiet=quiet) as runtime:
        check_experiment(config, runtime.world)
        with cause_in(_log_of(config)):
            train(config, runtime)


def rank_main(argv: Sequence[str] | None = None) -> int:
    """What a launcher starts: parse, train, exit code."""
    parser = argparse.ArgumentParser(prog="python -m launch.train", description="one rank of a training")
    _add_arguments(parser)
    args = parser.parse_args(argv)
    return rank_program(lambda: main(load_config(args.config, args.overrides), quiet=args.quiet))


def _log_of(config: Config) -> Path:
    return Path(config.output_dir) / config.name / "log.txt"


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="experiment, for example configs/experiment/demo.yaml")
    add_quiet(parser)
    add_overrides(parser)


def _reference_lines() -> list[str]:
    return [f"  {o.key} ({o.default})\n      {o.doc} [{o.kind}]".replace("%", "%%") for o in reference()]


if __name__ == "__main__":
    sys.exit(rank_main())
