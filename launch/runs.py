"""`msmil runs [FOLDER ...]`: run folders with their state, progress and best metric."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from launch.arguments import add_json
from launch.commands import Commands
from launch.terminal import Colour, columns, paint
from shards.tables import aligned

if TYPE_CHECKING:
    from msmil.engine.run_list import RunSummary, State

_HEAD: Final = ("run", "state", "epoch", "step", "best AUROC", "test AUROC", "changed")
_DISPENSABLE: Final = ("changed", "step")  # left out where a terminal is too narrow, in this order
_COLOURS: Final[dict[State, Colour]] = {
    "training": "green",
    "stopped": "yellow",
    "failed": "red",
    "unreadable": "red",
    "no checkpoint": "yellow",
}
_STATES: Final = """\
states:
  training       a process trains into it now
  evaluated      trained to the last epoch, and metrics of the test split are there
  trained        trained to the last epoch
  stopped        cut off; the same `msmil train` command goes on with it
  failed         ended with an error, which is named below the table; log.txt has all of it
  no checkpoint  nothing is saved yet
  converted      weights of `msmil convert` or `msmil export`
  unreadable     cut off in the middle of a copy, or of another version

Progress is that of the newest checkpoint. AUROC is the mean over labels: the best one on the validation images @ its
step, and that of the last evaluation on the test images; a dash where it is not defined or not known.

On a network file system that keeps no locks, a training on another machine reads as stopped.
"""
_UNITS: Final = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def add_parser(commands: Commands) -> None:
    """Add `msmil runs`."""
    parser = commands.add_parser(
        "runs",
        help="run folders with state, progress and best metric",
        description="List the run folders in FOLDER, those of `msmil repeat` too. Nothing is changed, and a training "
        "that goes on or starts is not disturbed.",
        examples=(
            "msmil runs",
            "msmil runs runs /scratch/runs --json | jq '.[] | select(.state == \"failed\").folder'",
        ),
        epilog=_STATES,
    )
    folders = "where run folders lie, or one itself (default: runs)"
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("runs")], metavar="FOLDER", help=folders)
    add_json(parser, "the list")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Find the runs, read each, print."""
    from msmil.engine.run_list import find_runs, read_run

    found = dict.fromkeys(path for folder in args.folders for path in find_runs(folder))
    runs = [read_run(path) for path in found]
    if args.json:
        print(json.dumps([_as_json(one) for one in runs], indent=2, allow_nan=False))
    elif runs:
        print("\n".join(_table(runs, now_s=time.time())))
    else:
        print(f"no run folders in {', '.join(map(str, args.folders))}")
    return 0


def _as_json(run: RunSummary) -> dict[str, Any]:
    values = asdict(run)
    changed = datetime.fromtimestamp(values.pop("changed_s")).astimezone()
    return values | {"folder": str(run.folder), "changed": changed.isoformat(timespec="seconds")}


def _table(runs: Sequence[RunSummary], *, now_s: float) -> list[str]:
    rows = [list(_HEAD)]
    rows += [[str(run.folder), run.state, *_numbers(run), _ago(now_s - run.changed_s)] for run in runs]
    lines = aligned(rows, left=2)
    for name in _DISPENSABLE if sys.stdout.isatty() else ():
        if max(map(len, lines)) > shutil.get_terminal_size().columns:
            column = rows[0].index(name)
            rows = [row[:column] + row[column + 1 :] for row in rows]
            lines = aligned(rows, left=2)
    start = max(len(row[0]) for row in rows) + 2
    shown = [paint(lines[0], "dim")]
    for run, line in zip(runs, lines[1:], strict=True):
        end = start + len(run.state)
        colour = _COLOURS.get(run.state)
        state = paint(line[start:end], colour, sys.stdout) if colour else line[start:end]
        shown.append(line[:start] + state + line[end:])
    notes = [f"{run.folder}: {run.note}" for run in runs if run.note]
    wrapped = [textwrap.fill(note, columns(), subsequent_indent="  ", break_on_hyphens=False) for note in notes]
    return [*shown, *([""] if wrapped else []), *wrapped]


def _numbers(run: RunSummary) -> list[str]:
    epoch = _of(run.epoch, run.epochs)
    step = _of(run.step, run.total_steps)
    at = "" if run.best_step is None else f" @ {run.best_step}"
    best = "-" if run.best_auroc is None else f"{run.best_auroc:.3f}{at}"
    return [epoch, step, best, "-" if run.test_auroc is None else f"{run.test_auroc:.3f}"]


def _of(done: int | None, total: int | None) -> str:
    if done is None:
        return "-"
    return str(done) if total is None else f"{done}/{total}"


def _ago(seconds: float) -> str:
    for size, unit in _UNITS:
        if seconds >= size:
            return f"{int(seconds // size)} {unit} ago"
    return "now"
