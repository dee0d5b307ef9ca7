"""`msmil evaluate RUN`, and the program of one of its ranks."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from launch.arguments import add_json, add_quiet, add_ranks
from launch.commands import Commands
from launch.ranks import default_ranks, rank_program, start_ranks
from msmil.config_io import load_config
from shards.errors import UserError
from shards.types import SPLITS

if TYPE_CHECKING:
    from msmil.config import Config


def add_parser(commands: Commands) -> None:
    """Add `msmil evaluate`."""
    parser = commands.add_parser(
        "evaluate",
        help="metrics with intervals, figures, and where a trained run looks",
        description="Evaluate a run on a split: predictions, metrics at a threshold chosen on validation, "
        "heat-maps, and how often their peak lies in a box. Writes into the run folder.",
        examples=("msmil evaluate runs/demo --split test", "msmil evaluate runs/demo --quiet --json > demo.json"),
    )
    _add_arguments(parser)
    add_ranks(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Evaluate one run."""
    return start(
        args.folder,
        split=args.split,
        checkpoint=args.checkpoint,
        shards=args.shards,
        features=args.features,
        ranks=args.ranks,
        quiet=args.quiet,
        as_json=args.json,
    )


def start(
    folder: str,
    *,
    split: str = "test",
    checkpoint: str = "best",
    shards: str | None = None,
    features: str | None = None,
    ranks: int | None = None,
    quiet: bool = False,
    as_json: bool = False,
) -> int:
    """Check what can be checked, start the ranks (None: one per GPU) and return their exit code."""
    config = _as_this_machine_can(_config(folder, shards, features))
    ranks = default_ranks() if ranks is None else ranks
    from msmil.engine.checkpoint_state import read_state
    from msmil.engine.data import check_trained_on, open_data
    from msmil.engine.evaluate import find_checkpoint
    from msmil.engine.features import open_features
    from msmil.engine.run_folder import RunFolder

    found = find_checkpoint(RunFolder(folder), checkpoint, other_data=shards is not None)
    manifest = open_data(config)
    if shards is None:
        check_trained_on(found, read_state(found)[0], manifest)
    open_features(config, manifest)
    log = RunFolder(folder).log
    arguments = [folder, "--split", split, "--checkpoint", checkpoint]
    if shards is not None:
        arguments += ["--shards", shards]
    if features is not None:
        arguments += ["--features", features]
    arguments += ["--quiet"] * quiet + ["--json"] * as_json
    return start_ranks("launch.evaluate", arguments, ranks=ranks, precision=config.train.precision, log=log)


def main(
    config: Config,
    folder: str,
    *,
    split: Any,
    checkpoint: str,
    other_data: bool,
    quiet: bool = False,
    as_json: bool = False,
) -> None:
    """Evaluate in this process, one rank of the world that the launcher made; rank 0 prints the results."""
    from msmil.engine.environment import without_engine
    from msmil.engine.evaluate import evaluate
    from msmil.engine.run_folder import RunFolder
    from msmil.engine.runtime import Runtime
    from msmil.evaluation.results import results_table

    can = _as_this_machine_can(config)
    with Runtime(without_engine(can.train), quiet=quiet) as runtime:
        if can is not config and runtime.is_main and not quiet:
            print("msmil: no GPU here: evaluating in fp32", file=sys.stderr, flush=True)
        results = evaluate(can, RunFolder(folder), runtime, split=split, checkpoint=checkpoint, other_data=other_data)
        if runtime.is_main:
            table = results_table(results, results["localisation"])
            print(json.dumps(results, indent=2, allow_nan=False) if as_json else table, flush=True)


def rank_main(argv: Sequence[str] | None = None) -> int:
    """What a launcher starts: parse, evaluate, exit code."""
    parser = argparse.ArgumentParser(prog="python -m launch.evaluate", description="one rank of an evaluation")
    _add_arguments(parser)
    args = parser.parse_args(argv)
    choice = {"split": args.split, "checkpoint": args.checkpoint, "other_data": args.shards is not None}
    choice |= {"quiet": args.quiet, "as_json": args.json}
    return rank_program(lambda: main(_config(args.folder, args.shards, args.features), args.folder, **choice))


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN", help="run folder, for example runs/demo")
    parser.add_argument("--split", choices=SPLITS, default="test", help="images to judge (default: test)")
    name = "best, latest or step_N (default: best)"
    parser.add_argument("--checkpoint", default="best", metavar="NAME", help=name)
    parser.add_argument(
        "--features",
        metavar="DIR",
        help="features of these data, or none: encode the images (default: those it was trained on, if any)",
    )
    shards = "other packed data to judge it on, or their address (default: those it was trained on)"
    parser.add_argument("--shards", metavar="DIR", help=shards)
    add_quiet(parser)
    add_json(parser, "the metrics")


def _config(folder: str, shards: str | None, features: str | None) -> Config:
    from msmil.engine.run_folder import RunFolder

    file = RunFolder(folder).config
    if not file.exists():
        raise UserError("is no run folder (no config.yaml)", file=folder, fix="name a folder beneath runs/")
    config = load_config(file)
    if shards is not None:
        config = replace(config, data=replace(config.data, shards=shards))
    if features is not None:
        config = replace(config, data=replace(config.data, features="" if features == "none" else features))
    return config


def _as_this_machine_can(config: Config) -> Config:
    """Without a GPU an fp16 run is evaluated in fp32, and synchronised statistics are plain ones."""
    from msmil.engine.runtime import gpu_in_use

    if gpu_in_use() or (config.train.precision != "fp16" and config.train.batch_norm != "sync"):
        return config
    last = replace(config.data, last_batch="drop")
    return replace(config, data=last, train=replace(config.train, precision="fp32", batch_norm="train"))


if __name__ == "__main__":
    sys.exit(rank_main())
