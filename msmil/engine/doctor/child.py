"""Questions to a child process, so that a crash or a hang in a library is an answer too."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

_TIDY_UP_S: Final = 5.0


@dataclass(frozen=True)
class Answer:
    """What a child process found out.

    facts: all that it told before it ended.
    failure: why it ended early, or "" where it did not.
    """

    facts: Mapping[str, Any]
    failure: str = ""


def tell(**facts: object) -> None:
    """In the child: say what is known so far."""
    print(json.dumps(facts), flush=True)


def ask(command: Sequence[str], *, deadline_s: float, **environment: str) -> Answer:
    """Run a command that tells facts as lines of JSON; all its processes are killed at the deadline."""
    out, failure = run(command, deadline_s=deadline_s, **environment)
    facts: dict[str, Any] = {}
    for line in out.splitlines():
        if line.startswith("{"):  # libraries print what they like
            try:
                facts |= json.loads(line)
            except ValueError:
                continue
    return Answer(facts, failure)


def ask_module(name: str, arguments: Sequence[str] = (), *, deadline_s: float, **environment: str) -> Answer:
    """Run a module of ours that tells facts."""
    return ask([sys.executable, "-m", name, *arguments], deadline_s=deadline_s, **environment)


def run(command: Sequence[str], *, deadline_s: float, **environment: str) -> tuple[str, str]:
    """What a command printed, and why it failed ("" where it did not)."""
    try:
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        return "", f"{command[0]} cannot be started ({error.strerror})"
    try:
        out, err = process.communicate(timeout=deadline_s)
    except subprocess.TimeoutExpired:
        return _end(process), f"no answer within {deadline_s:.0f} s"
    except BaseException:  # Ctrl-C does not reach a session of its own
        _end(process)
        raise
    return out, _failure(process.returncode, err)


def _end(process: subprocess.Popen[str]) -> str:
    """End a command and all that it started, and return what it had printed; a moment is left to it to tidy up."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        return process.communicate(timeout=_TIDY_UP_S)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()[0]


def _failure(code: int, err: str) -> str:
    if code == 0:
        return ""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    said = [line.strip() for line in err.splitlines() if line.strip()]
    return said[-1] if said else f"exit code {code}"
