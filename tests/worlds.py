"""Real worlds of processes, with a deadline that kills a hung one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def environment(**more: str) -> dict[str, str]:
    """The environment of a rank on a CPU: one thread, no accelerator, the repository importable."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_")}
    path = os.pathsep.join([str(ROOT), clean.get("PYTHONPATH", "")])
    return clean | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": path} | more


def run(command: Sequence[str], *, deadline_s: float, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a session of its own; when the deadline passes, kill all of it and fail."""
    process = subprocess.Popen(
        command,
        env=environment(**more),
        cwd=ROOT,
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


def torchrun(module: str, arguments: Sequence[str], *, ranks: int, deadline_s: float = 120) -> str:
    """Run a module in a world of `ranks` processes and return what it printed; fail when it fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m", module]
    done = run([*command, *arguments], deadline_s=deadline_s)
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def msmil(*arguments: str, deadline_s: float = 120, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does."""
    return run([sys.executable, "-m", "launch.cli", *arguments], deadline_s=deadline_s, **more)
