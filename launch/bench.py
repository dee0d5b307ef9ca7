"""`msmil bench WHAT`: numbers of this machine, each beside its baseline."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any, Final

from launch import bench_scaling
from launch.arguments import add_json, add_overrides, at_least_one, image_size
from launch.commands import Commands, HelpFormatter
from msmil.config_io import load_config

_SUBJECT: Final = "configs/experiment/vindr_mass_fpn_abmil.yaml"
_EXAMPLES: Final = (
    "msmil bench train configs/experiment/demo.yaml",
    f"msmil bench train {_SUBJECT} --synthetic 1520x912 train.batch_size=2",
    f"msmil bench train {_SUBJECT} --modes each --find-batch",
    f"msmil bench loader {_SUBJECT}",
    f"msmil bench scaling {_SUBJECT} --synthetic 1520x912",
)


def add_parser(commands: Commands) -> None:
    """Add `msmil bench` and what it measures."""
    parser = commands.add_parser(
        "bench",
        help="measure this machine: a training step, the loader, several ranks",
        description="Measure a training step (train), the reading of images (loader), or a step on more and more "
        "ranks (scaling). Every number stands beside its baseline, measured in the same run.",
        examples=_EXAMPLES,
    )
    parts = parser.add_subparsers(metavar="WHAT", required=True, help="what is measured; each has its own --help")
    for name, help, add in PARTS:
        part = parts.add_parser(name, help=help, description=f"{help}.", formatter_class=HelpFormatter)
        add(part)


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="experiment whose step is measured, on one rank")
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), help="where it computes (default: a GPU where there is one)")
    _add_synthetic(parser)
    steps = "steps of a loop and rounds of a comparison (default: 20 on a GPU, 3 on a CPU)"
    add("--steps", type=at_least_one, metavar="N", help=steps)
    add("--find-batch", action="store_true", help="find the largest batch: GPU by trying, CPU by memory per image")
    modes = "compare precision, memory format, compilation: each alone and all together, or all (default: neither)"
    add("--modes", choices=("each", "all"), help=modes)
    add_json(parser, "all numbers")
    add_overrides(parser)
    parser.set_defaults(run=_run_train)


def _add_loader(parser: argparse.ArgumentParser) -> None:
    subject = "experiment whose data.shards are read, or a packed folder"
    parser.add_argument("config", metavar="CONFIG", help=subject)
    add = parser.add_argument
    _add_synthetic(parser)
    add("--images", type=at_least_one, default=32, metavar="N", help="images of a round (default: %(default)s)")
    add("--rounds", type=at_least_one, default=9, metavar="N", help="rounds in turn (default: %(default)s)")
    add_json(parser, "all numbers")
    add_overrides(parser)
    parser.set_defaults(run=_run_loader)


def _add_synthetic(parser: argparse.ArgumentParser) -> None:
    size = "measure on drawn images of this size instead of those of data.shards, for example 1520x912 (default: none)"
    parser.add_argument("--synthetic", type=image_size, metavar="HxW", help=size)


def _run_train(args: argparse.Namespace) -> int:
    from msmil.engine.bench.train import Options, bench_train

    config = load_config(args.config, args.overrides)
    options = Options(
        device=args.device,
        size_hw=args.synthetic,
        steps=args.steps,
        find_batch=args.find_batch,
        modes=args.modes,
    )
    _show(args, lambda say: bench_train(config, options, say))
    return 0


def _run_loader(args: argparse.Namespace) -> int:
    from msmil.engine.bench.loader import bench_loader, subject

    config = subject(args.config, args.overrides)
    _show(args, lambda say: bench_loader(config, args.synthetic, images=args.images, rounds=args.rounds, say=say))
    return 0


def _show(args: argparse.Namespace, measure: Callable[[Callable[[str], None]], dict[str, Any]]) -> None:
    """Lines as they are known, or one document at the end."""
    if args.json:
        print(json.dumps(measure(lambda _: None), indent=2))
    else:
        measure(lambda line: print(line, flush=True))


# what is measured: its name, what it is, and its arguments
PARTS: Final[tuple[tuple[str, str, Callable[[argparse.ArgumentParser], None]], ...]] = (
    ("train", "Where the time of a training step goes, its speed and memory, beside the published way", _add_train),
    ("loader", "Images per second and core of each codec, beside the bare decoding of the same bytes", _add_loader),
    ("scaling", bench_scaling.HELP, bench_scaling.add),
)
