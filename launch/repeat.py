"""`msmil repeat CONFIG --runs N | --folds K`: train and evaluate several times, and summarise."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from launch import evaluate, train
from launch.arguments import add_overrides, add_quiet, add_ranks, at_least_one, number_of_folds
from launch.commands import Commands
from launch.ranks import default_ranks
from msmil.config_io import load_config
from shards.errors import UserError

if TYPE_CHECKING:
    from msmil.config import Config
    from shards.folds import Folds

_RUN: Final = "run_"
_FOLD: Final = "fold_"


@dataclass(frozen=True)
class Part:
    """One of the runs: its folder's name, the overrides that make it, its configuration, its data."""

    name: str
    overrides: tuple[str, ...]
    config: Config
    fingerprint: str


def add_parser(commands: Commands) -> None:
    """Add `msmil repeat`."""
    parser = commands.add_parser(
        "repeat",
        help="several seeds or cross-validation; mean and spread in a table",
        description="Train an experiment several times, one run after the other, evaluate each on the test split, and "
        "write summary.csv and summary.json into its folder. The same command again does only what is missing.",
        examples=(
            "msmil repeat configs/experiment/demo.yaml --folds 5",
            "msmil repeat configs/experiment/demo.yaml --runs 3 name=demo_lr optim.lr=1e-3",
        ),
    )
    parser.add_argument("config", metavar="CONFIG", help="experiment, for example configs/experiment/demo.yaml")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument(
        "--runs",
        type=at_least_one,
        metavar="N",
        help="N runs on the same split, with the seeds seed, seed+1, ... (required: this or --folds)",
    )
    kind.add_argument(
        "--folds",
        type=number_of_folds,
        metavar="K",
        help="a run per fold, which validates while the others train: K folds of all patients outside the test "
        "split, stratified by the labels and drawn by data.fold_seed; or table: the folds of the packed table "
        "(required: this or --runs)",
    )
    add_ranks(parser)
    add_quiet(parser)
    add_overrides(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check all runs, then train and evaluate one after the other, and write the summary."""
    ranks = default_ranks() if args.ranks is None else args.ranks
    from msmil.engine.run_folder import RunFolder, read_results
    from msmil.evaluation.summary import summarise, summary_table, write_summary

    config = load_config(args.config, args.overrides)
    root = Path(config.output_dir) / config.name
    parts = make_parts(args.config, args.overrides, runs=args.runs, folds=args.folds, ranks=ranks)
    for position, part in enumerate(parts, start=1):
        _inform(f"\n{root / part.name} ({position} of {len(parts)})", quiet=args.quiet)
        code = _complete(args.config, part, root / part.name, ranks, quiet=args.quiet)
        if code != 0:
            return code
    summary = summarise({part.name: read_results(RunFolder(root / part.name), "test") for part in parts})
    write_summary(root, summary)
    print(f"\n{summary_table(summary, config.data.labels)}\nAll numbers: {root / 'summary.csv'}", flush=True)
    return 0


def make_parts(file: str, overrides: Sequence[str], *, runs: int | None, folds: Folds | None, ranks: int) -> list[Part]:
    """The runs, each checked as far as it can be before the first one starts.

    Raises:
        UserError: as check_experiment for any of them; a folder of something else; other folds in the experiment
            itself; no test images.
    """
    from msmil.engine.preflight import check_experiment

    config = load_config(file, overrides)
    root = Path(config.output_dir) / config.name
    _check_root(root, other=_FOLD if folds is None else _RUN)
    parts = []
    for name, own in (_seeds(config, runs) if folds is None else _folds(config, folds)).items():
        # with the slash no YAML takes the path for a number
        more = (*overrides, f"output_dir={config.output_dir}/{config.name}", f"name={name}", *own)
        one = load_config(file, more)
        manifest = check_experiment(one, ranks)
        if len(manifest.rows("test")) == 0:
            fix = "pack a table that marks test images, since every run is judged on them"
            raise UserError("there are no test images", file=manifest.place, fix=fix)
        parts.append(Part(name, more, one, manifest.fingerprint))
    return parts


def _seeds(config: Config, runs: int | None) -> dict[str, tuple[str, ...]]:
    assert runs is not None
    return {f"{_RUN}{i}": (f"seed={config.seed + i}",) for i in range(runs)}


def _folds(config: Config, folds: Folds) -> dict[str, tuple[str, ...]]:
    from msmil.engine.data import open_data
    from shards.folds import fold_numbers

    if config.data.folds not in ("none", folds):
        fix = f"give --folds {config.data.folds}, set data.folds=none, or repeat this one fold with --runs"
        raise UserError(f"the experiment sets data.folds: {config.data.folds} itself", fix=fix)
    numbers = fold_numbers(open_data(config), folds)
    return {f"{_FOLD}{i}": (f"data.folds={folds}", f"data.fold={i}") for i in numbers}


def _check_root(root: Path, *, other: str) -> None:
    """Refuse a folder in which the summary would stand beside runs that it does not speak of."""
    fix = "choose another name"
    if (root / "checkpoints").exists():
        raise UserError("is the folder of a single run", file=root, fix=fix)
    if any(root.glob(f"{other}*")):
        kind = {_RUN: "repeated runs", _FOLD: "a cross-validation"}[other]
        raise UserError(f"holds {kind}", file=root, fix=fix)


def _complete(file: str, part: Part, folder: Path, ranks: int, *, quiet: bool) -> int:
    """Train and evaluate a run as far as it is not done; 0, or the exit code of what failed."""
    from msmil.engine.done import is_evaluated, is_trained
    from msmil.engine.run_folder import RunFolder

    run_folder = RunFolder(folder)
    if is_trained(run_folder, part.config):
        _inform("trained already", quiet=quiet)
    else:
        code = train.start(file, part.overrides, ranks=ranks, quiet=quiet)
        if code != 0:
            return code
    if is_evaluated(run_folder, "test", part.fingerprint):
        _inform("evaluated already", quiet=quiet)
        return 0
    return evaluate.start(str(folder), ranks=ranks, quiet=quiet)


def _inform(text: str, *, quiet: bool) -> None:
    if not quiet:
        print(text, flush=True)
