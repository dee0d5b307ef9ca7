"""`msmil completion SHELL`: a script with which a shell completes commands, options, files and experiment keys."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any, Final

from launch.commands import Commands
from msmil.config_io import reference

SHELLS: Final = ("bash", "zsh", "fish")
_FILES: Final = ("CONFIG", "FILE", "CSV", "IN")
_FOLDERS: Final = ("DIR", "RUN", "FOLDER", "OUT")
_SETUP: Final = """\
set up, then open a new shell:
  bash with the package bash-completion
    msmil completion bash > ~/.local/share/bash-completion/completions/msmil
  zsh, FOLDER being one of $fpath
    msmil completion zsh > FOLDER/_msmil
  fish
    msmil completion fish > ~/.config/fish/completions/msmil.fish

Write it again after an update of msmil. The script is text alone: completing starts no Python.
"""
# the keys of an experiment end in "=": no space after them, so that the value is typed next
_PREAMBLE: Final = {
    "bash": """\
_msmil_overrides() {{
  compgen -W "{keys}" -- "$1"
}}
""",
    "zsh": """\
_msmil_overrides() {{
  compadd -S '' -- {keys}
}}
""",
}
_AFTERWARDS: Final = {
    "bash": """
_msmil() {
  _shtab_msmil "$@"
  [[ ${COMPREPLY[0]-} != *= ]] || compopt -o nospace 2>/dev/null || :
}
complete -o bashdefault -F _msmil msmil
"""
}


def add_parser(commands: Commands) -> None:
    """Add `msmil completion`."""
    parser = commands.add_parser(
        "completion",
        help="a script that lets the shell complete msmil's commands",
        description="Print the completion script of a shell: commands, options, their choices, files and folders, "
        "and the keys of an experiment (a.b=).",
        examples=("msmil completion bash",),
        epilog=_SETUP,
    )
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help=f"{', '.join(SHELLS)} (required)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    print(script(args.shell))
    return 0


def script(shell: str) -> str:
    """The completion script of a shell, made from the parsers themselves."""
    import shtab

    from launch.cli import build_parser

    parser = build_parser()
    keys = " ".join(f"{option.key}=" for option in reference())
    for action in _actions(parser):
        complete = _completes(action, keys)
        if complete is not None:
            action.complete = complete  # type: ignore[attr-defined]
    made = str(shtab.complete(parser, shell=shell, preamble=_PREAMBLE.get(shell, "").format(keys=keys)))
    return made + _AFTERWARDS.get(shell, "")


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            action.help = None  # shtab leaves out what --help hides, which lists the commands in its own way
            for command in action.choices.values():
                yield from _actions(command)
        else:
            yield action


def _completes(action: argparse.Action, keys: str) -> dict[str, Any] | None:
    """How shtab completes an argument, by what its metavar calls it."""
    import shtab

    if action.dest == "overrides":
        return {"bash": "_msmil_overrides", "zsh": "_msmil_overrides", "fish": keys}
    if action.metavar in _FILES:
        return dict(shtab.FILE)
    return dict(shtab.DIRECTORY) if action.metavar in _FOLDERS else None
