"""`msmil bench WHAT CONFIG`: what training costs on this machine, and what limits it."""

from __future__ import annotations

from typing import Final

from launch import bench_scaling
from launch.commands import Commands, HelpFormatter

SUBCOMMANDS: Final = (bench_scaling,)


def add_parser(commands: Commands) -> None:
    """Add `msmil bench` and its subcommands."""
    parser = commands.add_parser(
        "bench",
        help="measure what training costs here, beside a baseline in the same run",
        description="Measure what training costs on this machine. `msmil bench WHAT --help` names the options.",
        examples=tuple(example for command in SUBCOMMANDS for example in command.EXAMPLES),
    )
    subcommands = parser.add_subparsers(metavar="WHAT", required=True, help="scaling")
    for command in SUBCOMMANDS:
        command.add_parser(subcommands, formatter_class=HelpFormatter)
