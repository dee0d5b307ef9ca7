"""A signal stops all ranks behind the same step, with everything saved, and the exit code says which it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from msmil.engine.checkpoint import load_checkpoint
from msmil.engine.checkpoint_state import newest
from msmil.engine.preemption import StopRequest
from tests.experiments import write_tiny
from tests.worlds import ROOT, children_running, environment, wait_for


def test_a_handler_only_sets_a_flag_and_a_second_ctrl_c_is_obeyed_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    request = StopRequest()
    request.watch()
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert request.signum == signal.SIGUSR1
        os.kill(os.getpid(), signal.SIGINT)
        assert request.signum == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        request.restore()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
def test_a_job_that_is_preempted_saves_and_goes_on(tmp_path: Path, packed: Path) -> None:
    """SIGTERM to the launcher; then SIGUSR1 to it; then SIGTERM to one rank alone. Nothing is saved but at a stop."""
    config = write_tiny(tmp_path, packed, name="job", train={"epochs": 5000}, evaluate={"every_epochs": 5000})
    folder = tmp_path / "runs" / "job"
    done = 0
    for number, signum in enumerate((signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM)):
        command = [sys.executable, "-m", "launch.cli", "train", str(config), "--ranks", "2", "checkpoint.keep_last=1"]
        process = subprocess.Popen(command, env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True)
        lines = len(text.splitlines()) if (text := _log(folder)) else 0
        wait_for(lambda lines=lines: _log(folder).count("loss") > _count(folder, lines) + 1, deadline_s=90)
        ranks = children_running("launch.train", process.pid)
        assert len(ranks) == 2
        os.kill(ranks[1] if number == 2 else process.pid, signum)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 128 + signum, err
        assert f"msmil: stopped by {signum.name} behind step" in err
        assert "Traceback" not in err
        checkpoint = newest(folder / "checkpoints")
        assert checkpoint is not None
        state = load_checkpoint(checkpoint).state
        assert state.step > done
        assert number == 0 or f"step {done})" in err, "it went on from the step that was saved"
        done = state.step


def _log(folder: Path) -> str:
    file = folder / "log.txt"
    return file.read_text() if file.exists() else ""


def _count(folder: Path, lines: int) -> int:
    return "\n".join(_log(folder).splitlines()[:lines]).count("loss")
