"""The command line: commands with examples, options with default and unit, completion, colours for terminals alone."""

from __future__ import annotations

import argparse
import io
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import terminal
from launch.cli import COMMANDS, EXIT_NO_READER, EXIT_USER, build_parser, main, parse
from launch.completion import script
from tests.worlds import ROOT, environment

UNITS = r"pixels|images|exams|share|processes|runs?\b|folds?\b|seed|number of|bytes|seconds|step"


def parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of each command."""
    for action in build_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    raise AssertionError("there are no commands")


def arguments() -> Iterator[tuple[str, argparse.Action]]:
    for name, parser in parsers().items():
        for action in parser._actions:
            if not isinstance(action, argparse._HelpAction):
                yield f"{name} {'/'.join(action.option_strings) or action.metavar}", action


ARGUMENTS = dict(arguments())


def test_help_lists_every_command_in_its_group_with_an_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = build_parser().format_help()
    assert max(map(len, text.splitlines())) <= 80
    position = 0
    for (group, _), name in zip(COMMANDS, parsers(), strict=True):
        assert f"\n{group}:\n" in text
        at = text.index(f"\n    {name} ")
        assert at > position, "in the order of the table"
        position = at
        assert re.search(rf"\n +\$ .*msmil {name}\b", text[at:]), name


@pytest.mark.parametrize("name", parsers())
def test_the_examples_of_a_command_parse(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    shown = capsys.readouterr().out.partition("\nexample")[2].partition("\n\n")[0]
    lines = [line.strip() for line in shown.splitlines()[1:]]
    own = [line for line in lines if re.search(rf"\bmsmil {name}\b", line)]
    assert own, shown
    for line in lines:
        words = shlex.split(re.sub(r" [|>].*", "", line))
        assert words[0] == "msmil"
        assert callable(parse(words[1:]).run), line


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_argument_names_its_default_and_its_unit(name: str) -> None:
    action = ARGUMENTS[name]
    text = (action.help or "") % {"default": action.default}
    optional = action.option_strings or action.nargs in ("?", "*")
    if optional and action.nargs != 0:
        told = re.search(r"\(default: ([^)]+)\)|\(required\b", text)
        assert told, f"{name}: {text}"
        default = action.default[0] if isinstance(action.default, list) and action.default else action.default
        if default not in (None, []) and told[1] is not None:
            assert str(default) in told[1], f"{name}: {text}"
    kind = getattr(action.type, "__name__", "")
    if kind in ("int", "float", "at_least_one", "number_of_folds"):
        assert re.search(UNITS, text), f"{name}: {text}"


def test_msmil_alone_shows_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == EXIT_USER
    assert "msmil demo" in capsys.readouterr().err


def test_a_misspelt_command_is_guessed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["trian", "x.yaml"])
    assert "no command 'trian'; did you mean train?" in capsys.readouterr().err


def test_no_reader_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    command = [sys.executable, "-m", "launch.cli", "runs", str(tmp_path)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == EXIT_NO_READER


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "variables", "coloured"),
    [
        (Terminal(), {}, True),
        (io.StringIO(), {}, False),
        (Terminal(), {"NO_COLOR": "1"}, False),
        (Terminal(), {"TERM": "dumb"}, False),
    ],
)
def test_colours_are_for_terminals(
    stream: io.StringIO, variables: dict[str, str], coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"TERM": "xterm", "NO_COLOR": "", **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", stream)
    terminal.print_error("no such file")
    word = "\x1b[31merror\x1b[0m" if coloured else "error"
    assert stream.getvalue() == f"msmil: {word}: no such file\n"


COMPLETED = {
    "msmil tr": {"train"},
    "msmil train --ra": {"--ranks"},
    "msmil train configs/experiment/demo.yaml train.ep": {"train.epochs="},
    "msmil train configs/experiment/demo.yaml seed=1 train.ep": {"train.epochs="},
    "msmil train configs/experiment/de": {"configs/experiment/demo.yaml"},
    "msmil evaluate conf": {"configs"},
    "msmil pack out --codec ": {"png", "zstd"},
}


def test_bash_completes(tmp_path: Path) -> None:
    (tmp_path / "msmil.bash").write_text(script("bash"), encoding="utf-8")
    lines = [f". {tmp_path}/msmil.bash", "complete -p msmil >&2"]
    for line in COMPLETED:
        words = shlex.join(line.split(" "))  # the last one may be empty
        lines.append(f"COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))")
        lines.append("_msmil 2>/dev/null; echo ${COMPREPLY[@]}")
    done = subprocess.run(["bash", "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.strip().endswith(" msmil")
    assert [set(line.split()) for line in done.stdout.splitlines()] == list(COMPLETED.values())


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_read_their_script(shell: str, tmp_path: Path) -> None:
    text = script(shell)
    assert "train.epochs=" in text
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"no {shell} here")
    file = tmp_path / "script"
    file.write_text(text, encoding="utf-8")
    subprocess.run([program, "-n", str(file)], check=True, timeout=60)
