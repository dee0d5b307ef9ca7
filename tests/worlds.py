"""Real worlds of processes, with a deadline that kills a hung one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO
from unittest import mock

from launch.cli import main
from tests import forked

ROOT = Path(__file__).parents[1]


def environment(**more: str) -> dict[str, str]:
    """The environment of a rank on a CPU: one thread, no accelerator, the repository importable."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_")}
    path = os.pathsep.join([str(ROOT), clean.get("PYTHONPATH", "")])
    return clean | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": path} | more


def run(
    command: Sequence[str], *, deadline_s: float, cwd: Path = ROOT, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run a command in a session of its own; when the deadline passes, kill all of it and fail."""
    process = subprocess.Popen(
        command,
        env=environment(**more),
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=deadline_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"hung for {deadline_s} s: {command}\n{out}\n{err}") from None
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def world(module: str, arguments: Sequence[str], *, ranks: int, deadline_s: float = 120) -> None:
    """Run a module in a world of `ranks` processes (see tests.forked); fail when it fails."""
    ended = forked.run_ranks(module, arguments, forked.rank_environments(environment(), ranks), deadline_s=deadline_s)
    assert ended.code == 0, f"rank {ended.first} of {module} ended with {ended.code}; what it printed is above"


def torchrun(module: str, arguments: Sequence[str], *, ranks: int, deadline_s: float = 120) -> str:
    """The same, started by torchrun; gives what it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m", module]
    done = run([*command, *arguments], deadline_s=deadline_s)
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def msmil(*arguments: str, launcher: bool = False, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in this process, since Python with torch takes seconds to start.

    The ranks that it starts are processes as always, and what they print is caught too. They are forked for the same
    reason (tests.forked); `launcher` starts them with accelerate's own.
    """
    with ExitStack() as stack:
        if not launcher:
            stack.enter_context(mock.patch("accelerate.commands.launch.launch_command", forked.launch_command))
        stack.enter_context(mock.patch.dict(os.environ, environment(**more), clear=True))
        stack.enter_context(contextlib.chdir(ROOT))
        out = stack.enter_context(_caught(sys.stdout, 1, contextlib.redirect_stdout))
        err = stack.enter_context(_caught(sys.stderr, 2, contextlib.redirect_stderr))
        try:
            code = main(arguments)
        except SystemExit as end:  # argparse
            code = int(end.code or 0)
        texts = [_content(out), _content(err)]
    return subprocess.CompletedProcess(arguments, code, *texts)


@contextmanager
def _caught(stream: TextIO, descriptor: int, redirect: Callable[[TextIO], Any]) -> Iterator[TextIO]:
    """Send a stream of this process and of its children to a file for a while."""
    stream.flush()
    before = os.dup(descriptor)
    with tempfile.TemporaryFile("w+", encoding="utf-8") as file, redirect(file):
        os.dup2(file.fileno(), descriptor)
        try:
            yield file
        finally:
            os.dup2(before, descriptor)
            os.close(before)


def _content(file: TextIO) -> str:
    file.flush()
    file.seek(0)
    return file.read()


def wait_for(condition: Callable[[], bool], *, deadline_s: float) -> None:
    """Wait until a condition holds; fail after the deadline."""
    end_s = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end_s, f"not within {deadline_s} s"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    return Path(f"/proc/{pid}").exists() and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()


def children_running(module: str, ancestor: int) -> list[int]:
    """Pids of the descendants that run a module, in the order they were started."""
    found, frontier = [], [ancestor]
    while frontier:
        pid = frontier.pop()
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                children = [int(child) for child in task.read_text().split()]
                frontier += children
                found += [c for c in children if module in Path(f"/proc/{c}/cmdline").read_text()]
    return sorted(found)
