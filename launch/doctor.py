"""`msmil doctor [CONFIG]`: what this machine offers, and what would go wrong on it."""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

from launch.arguments import add_json, add_overrides, add_quiet, at_least_one
from launch.commands import Commands
from launch.terminal import Colour, columns, paint
from msmil.engine.doctor.check import worst
from shards.errors import UserError

if TYPE_CHECKING:
    from msmil.engine.doctor.check import Check, State

_EXIT: Final[dict[State, int]] = {"ok": 0, "warning": 1, "broken": 2}
_COLOURS: Final[dict[State, Colour]] = {"ok": "green", "warning": "yellow", "broken": "red"}
_STATE_WIDTH, _NAME_WIDTH = 9, 17
_EXIT_CODES: Final = """\
exit code:
  0  all is ok
  1  there are warnings: training works, but not everything does, or not as well as it could
  2  something is broken: training would fail

It takes half a minute: torch and DeepSpeed are tried in processes of their own, so that a crash there is a line here.
Nothing is changed; files to try a folder or a compiler with are removed again.

--collectives looks at nothing but communication, in every rank of a launcher; rank 0 prints:
  $ torchrun --nproc_per_node 2 -m launch.cli doctor --collectives
  $ accelerate launch --config_file configs/accelerate/gpus_8.yaml -m launch.cli doctor --collectives
  $ srun python -m launch.cli doctor --collectives
"""


def add_parser(commands: Commands) -> None:
    """Add `msmil doctor`."""
    parser = commands.add_parser(
        "doctor",
        help="what this machine offers and what would go wrong, with the fix",
        description="Check Python, packages, GPUs, precision, communication, compilers, DeepSpeed, cores, memory, "
        "folders, data and SLURM. With CONFIG, also all that `msmil train CONFIG` checks before it starts.",
        examples=(
            "msmil doctor",
            "msmil doctor configs/experiment/demo.yaml data.workers=0",
            "msmil doctor --json | jq '.checks[] | select(.state == \"broken\")'",
            "msmil doctor --collectives",
        ),
        epilog=_EXIT_CODES,
    )
    file = "experiment to check too (default: none; data are looked for in data/)"
    parser.add_argument("config", metavar="CONFIG", nargs="?", help=file)
    what = "whether the ranks of a launcher see each other, sum rightly, and how fast; alone without a launcher"
    parser.add_argument("--collectives", action="store_true", help=what)
    wait = "--collectives: seconds to wait for a rank before it is named (default: 60)"
    parser.add_argument("--timeout", metavar="N", type=at_least_one, default=60, help=wait)
    add_quiet(parser, "only the lines that are not ok")
    add_json(parser, "all lines and the worst state")
    add_overrides(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Look, print, and say the worst state by the exit code."""
    if args.collectives:
        return _collectives(args)
    from msmil.engine.doctor.examine import examine

    return _show(args, examine(args.config, args.overrides))


def _collectives(args: argparse.Namespace) -> int:
    """One rank: rank 0 prints. A rank whose peers are silent must not wait for them at its exit."""
    from msmil.engine.doctor.collectives import check_collectives

    if args.config is not None:
        raise UserError("--collectives looks at no experiment", fix="leave CONFIG out")
    found: list[Check] = []

    def spoken() -> Iterator[Check]:
        for check, say in check_collectives(timeout_s=args.timeout):
            found.append(check)
            if say:
                yield check

    _show(args, spoken())
    code = _EXIT[worst(found)]
    if code == _EXIT["broken"]:
        sys.stdout.flush()
        os._exit(code)
    return code


def _show(args: argparse.Namespace, found: Iterable[Check]) -> int:
    """Print every line as soon as it is known; the exit code of the worst."""
    checks = []
    for check in found:
        checks.append(check)
        if not args.json and not (args.quiet and check.state == "ok"):
            print(_line(check), flush=True)
    state = worst(checks)
    if not checks:
        return _EXIT[state]  # another rank has the word
    if args.json:
        print(json.dumps({"state": state, "checks": [asdict(check) for check in checks]}, indent=2))
    elif not args.quiet:
        print(f"\n{_summary(checks)}")
    return _EXIT[state]


def _line(check: Check) -> str:
    """State, name and finding, and the fix beneath it, in lines that fit the terminal."""
    column = " " * (_STATE_WIDTH + _NAME_WIDTH)
    head = f"{check.state:<{_STATE_WIDTH}}{check.name:<{_NAME_WIDTH}}"
    texts = [check.text, *([f"fix: {check.fix}"] if check.fix else [])]
    wrapped = [
        textwrap.fill(
            text,
            columns(),
            initial_indent=column,
            subsequent_indent=column + ("     " if i else ""),
            break_on_hyphens=False,
            break_long_words=False,
        )
        for i, text in enumerate(texts)
    ]
    text = head + "\n".join(wrapped)[len(head) :]
    return paint(check.state, _COLOURS[check.state], sys.stdout) + text[len(check.state) :]


def _summary(checks: list[Check]) -> str:
    count = {state: sum(check.state == state for check in checks) for state in _EXIT}
    plural = "" if count["warning"] == 1 else "s"
    return f"{count['ok']} ok, {count['warning']} warning{plural}, {count['broken']} broken"
