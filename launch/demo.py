"""`msmil demo`: the main job on data it makes itself, from phantoms to the table of results."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from launch.arguments import add_overrides, add_processes, add_quiet, add_ranks
from launch.commands import Commands
from launch.ranks import default_ranks
from msmil.config_io import load_config

if TYPE_CHECKING:
    from msmil.config import Config

CONFIG: Final = "configs/experiment/demo.yaml"
HEIGHT_PX, WIDTH_PX = 384, 240
TRAINING_EXAMS, TEST_EXAMS = 400, 100
VALIDATION_FRACTION = 0.125


def add_parser(commands: Commands) -> None:
    """Add `msmil demo`."""
    parser = commands.add_parser(
        "demo",
        help="phantoms -> shards -> training -> evaluation -> report, in minutes",
        description="Make phantoms, pack them, train the demo's experiment, evaluate and report it. What is done "
        "already is kept: the same command again goes on where it was stopped.",
        examples=("msmil demo", "msmil demo --data data/demo_2 --seed 2 seed=11 name=demo_11"),
    )
    add = parser.add_argument
    add("--data", default="data/demo", metavar="DIR", help="folder for phantoms and shards (default: %(default)s)")
    add("--config", default=CONFIG, metavar="CONFIG", help="experiment (default: %(default)s)")
    add("--seed", type=int, default=1, metavar="SEED", help="seed of the phantoms (default: %(default)s)")
    add_processes(parser)
    add_ranks(parser)
    add_quiet(parser)
    add_overrides(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the commands of the main job one after another, as a user would."""
    from launch.cli import main

    data = Path(args.data)
    config = load_config(args.config, args.overrides)
    config = replace(config, data=replace(config.data, shards=str(data / "shards")))
    run_folder = str(Path(config.output_dir) / config.name)
    overrides = [*args.overrides, f"data.shards={data / 'shards'}", *_batch_for(config, args.ranks)]
    processes = [] if args.processes is None else ["--processes", str(args.processes)]
    ranks = [] if args.ranks is None else ["--ranks", str(args.ranks)]
    quiet = ["--quiet"] * args.quiet
    start_s = time.monotonic()
    for command in (
        ["phantom", str(data / "phantoms"), "--seed", str(args.seed), *_phantom_size(), *processes, *quiet],
        ["pack", str(data / "shards"), *_pack_source(data / "phantoms"), *processes, *quiet],
        ["verify", str(data / "shards"), *quiet],
        ["train", args.config, *overrides, *ranks, *quiet],
        ["evaluate", run_folder, *ranks, *quiet],
        ["report", run_folder, *quiet],
    ):
        if not args.quiet:
            _announce(command)
        code = main(command)
        if code != 0:
            return code
    if args.quiet:
        return 0
    minutes = (time.monotonic() - start_s) / 60
    print(f"\nThe demo took {minutes:.1f} minutes. Metrics, predictions and figures are in {run_folder}.")
    print(f"Report: {Path(run_folder) / 'report.html'}")
    print(f"Curves: msmil watch {config.output_dir}")
    return 0


def _batch_for(config: Config, ranks: int | None) -> list[str]:
    """The demo runs on any number of GPUs: where its batch does not divide, the next larger one that does."""
    world = ranks or default_ranks()
    parts = world * config.train.accumulation
    size = -(-config.train.batch_size // parts) * parts
    return [] if size == config.train.batch_size else [f"train.batch_size={size}"]


def _phantom_size() -> list[str]:
    size = ["--height", str(HEIGHT_PX), "--width", str(WIDTH_PX)]
    return [*size, "--exams-training", str(TRAINING_EXAMS), "--exams-test", str(TEST_EXAMS)]


def _pack_source(phantoms: Path) -> list[str]:
    table, images = phantoms / "vindrmammo_grouped_df.csv", phantoms / "images_png"
    fraction = ["--validation-fraction", str(VALIDATION_FRACTION)]
    return ["--table", str(table), "--images", str(images), *fraction, "--samples-per-shard", "200"]


def _announce(command: Sequence[str]) -> None:
    print(f"\n$ msmil {' '.join(command)}", flush=True)
