"""`msmil demo`: the main job on data it makes itself, from phantoms to the table of results."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from launch.arguments import at_least_one
from launch.ranks import default_ranks
from msmil.config_io import load_config

if TYPE_CHECKING:
    from msmil.config import Config

CONFIG: Final = "configs/experiment/demo.yaml"
HEIGHT_PX, WIDTH_PX = 384, 240
TRAINING_EXAMS, TEST_EXAMS = 400, 100
VALIDATION_FRACTION = 0.125


def add_parser(subparsers: Any) -> None:
    """Add `msmil demo`."""
    parser = subparsers.add_parser(
        "demo",
        help="phantoms -> shards -> training -> evaluation, in minutes",
        description="Make phantoms, pack them, train the demo's experiment and evaluate it. What is done already is "
        "kept: the same command again goes on where it was stopped.",
        epilog=f"example: msmil demo --data data/demo --config {CONFIG} seed=11 name=demo_11",
    )
    parser.add_argument("--data", default="data/demo", help="folder for phantoms and shards (default: data/demo)")
    parser.add_argument("--config", default=CONFIG, help=f"experiment (default: {CONFIG})")
    parser.add_argument("--seed", type=int, default=1, help="seed of the phantoms (default: 1)")
    parser.add_argument(
        "--processes",
        type=at_least_one,
        metavar="N",
        help="processes that make phantoms and shards (default: all cores)",
    )
    parser.add_argument(
        "--ranks", type=at_least_one, metavar="N", help="processes that train (default: one per GPU, else 2)"
    )
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="options of the experiment")
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
    start_s = time.monotonic()
    for command in (
        ["phantom", str(data / "phantoms"), "--seed", str(args.seed), *_phantom_size(), *processes],
        ["pack", str(data / "shards"), *_pack_source(data / "phantoms"), *processes],
        ["verify", str(data / "shards")],
        ["train", args.config, *overrides, *ranks],
        ["evaluate", run_folder, *ranks],
    ):
        _announce(command)
        code = main(command)
        if code != 0:
            return code
    minutes = (time.monotonic() - start_s) / 60
    print(f"\nThe demo took {minutes:.1f} minutes. Metrics, predictions and figures are in {run_folder}.")
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
