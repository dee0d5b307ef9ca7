"""`msmil bench scaling CONFIG`, and the program of one of its ranks."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from launch.arguments import add_json, add_overrides, add_ranks, at_least_one, image_size
from launch.ranks import default_ranks, rank_program, start_ranks
from msmil.config_io import dump_config, load_config
from shards.errors import UserError

if TYPE_CHECKING:
    from msmil.config import Config
    from msmil.engine.bench.projection import Links
    from msmil.engine.bench.scaling import Measured

HELP: Final = "The same batch per rank on 1 to N ranks, and what to expect of 8, 64 and 512 GPUs"
_ABOUT: Final = """\
Trains a few steps on 1, 2, 4, .. N ranks with the same batch on each, one that is held in memory. Prints images/s,
efficiency, what a rank sends in a step and the seconds of that alone; then projects 8, 64 and 512 GPUs from the step of
one rank and the volume of each engine, for links whose rates are printed, and says what the loader and the file system
must give. Nothing is saved.
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `msmil bench scaling`."""
    parser.epilog = _ABOUT
    parser.add_argument("config", metavar="CONFIG", help="experiment whose data are packed")
    add_ranks(parser)
    size = "measure on drawn images of this size instead of those of data.shards, for example 1520x912"
    parser.add_argument("--synthetic", type=image_size, metavar="HxW", help=size)
    parser.add_argument(
        "--images", type=at_least_one, metavar="N", help="images per rank and micro-step (default: the experiment's)"
    )
    _number(parser, "--steps", 10, "steps to measure")
    _number(parser, "--gpus-per-node", 8, "number of GPUs of a machine, for the projection")
    link = "gigabytes per second that {}, as measured by `msmil doctor --collectives` (default: three stated links)"
    parser.add_argument("--gpu-link", type=float, metavar="GB", help=link.format("a GPU sends to its neighbour"))
    parser.add_argument("--node-link", type=float, metavar="GB", help=link.format("a machine sends to the next"))
    told = "milliseconds of a {} on one rank, measured elsewhere: no rank is started (default: measured here)"
    parser.add_argument("--step-ms", type=float, metavar="MS", help=told.format("step"))
    parser.add_argument("--backward-ms", type=float, metavar="MS", help=told.format("micro-step's backward"))
    add_json(parser, "all numbers")
    add_overrides(parser)
    parser.set_defaults(run=run)


def _number(parser: argparse.ArgumentParser, name: str, default: int, what: str) -> None:
    parser.add_argument(name, type=at_least_one, metavar="N", default=default, help=f"{what} (default: {default})")


def run(args: argparse.Namespace) -> int:
    """Measure every world, then project."""
    config, links = load_config(args.config, args.overrides), _links(args.gpu_link, args.node_link)
    from msmil.engine.bench.images import packed_for
    from msmil.engine.bench.scaling import images_of_a_rank

    ranks = args.ranks or default_ranks()
    images = args.images or images_of_a_rank(config, ranks)
    batch = images * ranks * config.train.accumulation
    with packed_for(config, args.synthetic, batch) as filled:
        return _measure_and_tell(args, filled, links, ranks=ranks, images=images)


def _measure_and_tell(
    args: argparse.Namespace, config: Config, links: Sequence[Links], *, ranks: int, images: int
) -> int:
    from msmil.engine.bench.projection import worlds
    from msmil.engine.bench.scaling import parameters_of, reading_of
    from msmil.engine.bench.scaling_report import report, tables
    from msmil.engine.data import open_data

    manifest = open_data(config)
    parameters, reading = parameters_of(config, manifest), reading_of(manifest)
    found = _told(args, config, images)
    for world in () if found else worlds(ranks):
        code, measured = _measure(args, config, world, images=images, most=ranks)
        if measured is None:
            return code
        found.append(measured)
    told = report(config, found, parameters, reading, links=links, gpus_per_node=args.gpus_per_node)
    print(json.dumps(told, indent=2) if args.json else tables(told), flush=True)
    return 0


def _told(args: argparse.Namespace, config: Config, images: int) -> list[Measured]:
    """One rank, where its times were measured elsewhere; empty where they are measured here."""
    from msmil.engine.bench.scaling import Measured

    if args.step_ms is None and args.backward_ms is None:
        return []
    if args.step_ms is None or args.backward_ms is None or not 0 < args.backward_ms < args.step_ms:
        fix = "give --step-ms and --backward-ms, of which the backward takes the smaller part"
        raise UserError("a projection needs the times of a step and of its backward", fix=fix)
    per_rank = images * config.train.accumulation
    return [
        Measured(
            ranks=1,
            device="measured elsewhere",
            threads=0,
            images_per_rank=per_rank,
            steps=0,
            images_per_s=1e3 * per_rank / args.step_ms,
            step_s=args.step_ms / 1e3,
            backward_s=args.backward_ms / 1e3,
            collectives=(),
            alone_s=0.0,
        )
    ]


def _links(gpu: float | None, node: float | None) -> tuple[Links, ...]:
    from msmil.engine.bench.projection import LINKS, Links

    if gpu is None and node is None:
        return LINKS
    if gpu is None or node is None or min(gpu, node) <= 0:
        raise UserError("a projection needs the rates of both links", fix="give --gpu-link and --node-link above 0")
    return (Links(name="as given", gpu_bytes_per_s=gpu * 1e9, node_bytes_per_s=node * 1e9),)


def _measure(
    args: argparse.Namespace, config: Config, world: int, *, images: int, most: int
) -> tuple[int, Measured | None]:
    """One world: its exit code, and what it told, None where it failed."""
    from msmil.engine.bench.scaling import measured_from_json

    batch = images * world * config.train.accumulation
    threads = max(1, len(os.sched_getaffinity(0)) // most)  # as many for one rank alone as for each of many
    with tempfile.TemporaryDirectory(prefix="msmil_") as folder:
        out = Path(folder) / "measured.json"
        file = Path(folder) / "config.yaml"
        measured = replace(config, train=replace(config.train, batch_size=batch))
        file.write_text(dump_config(measured), encoding="utf-8")
        words = [str(file), "--out", str(out), "--steps", str(args.steps), "--threads", str(threads)]
        precision = config.train.precision
        code = start_ranks("launch.bench_scaling", words, ranks=world, precision=precision, log=Path(folder) / "log")
        return code, measured_from_json(out.read_text(encoding="utf-8")) if code == 0 else None


def main(config: Config, *, out: Path, steps: int, threads: int) -> None:
    """One rank; rank 0 writes what was measured."""
    import torch

    from msmil.engine.bench.scaling import measure
    from msmil.engine.runtime import Runtime

    torch.set_num_threads(threads)
    with Runtime(config.train, quiet=True) as runtime:
        torch.set_num_threads(threads)  # accelerate may have chosen its own
        measured = measure(config, runtime, steps=steps)
        if runtime.is_main:
            out.write_text(json.dumps(asdict(measured)), encoding="utf-8")


def rank_main(argv: Sequence[str] | None = None) -> int:
    """What a launcher starts."""
    parser = argparse.ArgumentParser(prog="python -m launch.bench_scaling", description="one rank of a measurement")
    parser.add_argument("config")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    add_overrides(parser)
    args = parser.parse_args(argv)
    config = load_config(args.config, args.overrides)
    return rank_program(lambda: main(config, out=args.out, steps=args.steps, threads=args.threads))


if __name__ == "__main__":
    sys.exit(rank_main())
