"""A disk that fills up while a run saves: one clear error, and what was saved stays whole."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from msmil.engine.checkpoint import load_checkpoint
from msmil.engine.checkpoint_state import newest
from tests.experiments import write_tiny
from tests.faults.launcher import Launcher
from tests.worlds import wait_for

pytestmark = pytest.mark.slow

SIZE = "24m"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a small tmpfs")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(file: Path) -> None:
    """Write until the disk is full."""
    chunk = bytes(1 << 16)
    with file.open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
        while True:
            ballast.write(chunk)


def test_all_ranks_stop_with_one_error_and_the_run_resumes(launcher: Launcher, small_disk: Path, packed: Path) -> None:
    sections = {"train": {"epochs": 300}, "checkpoint": {"every_steps": 1, "keep_last": 1}}
    config = write_tiny(small_disk, packed, **sections)
    checkpoints = small_disk / "runs" / "tiny" / "checkpoints"
    started = launcher.start(config)
    wait_for(lambda: newest(checkpoints) is not None, deadline_s=60)
    fill(small_disk / "ballast")
    assert launcher.wait(started, deadline_s=60, end_others=False) == [2, 2]
    assert len(set(started.failures)) == 1, started.failures
    assert "free space" in started.failures[0]
    assert not any("Traceback" in started.said(rank) for rank in range(2))

    before = load_checkpoint(newest(checkpoints) or Path()).state.step
    (small_disk / "ballast").unlink()
    started = launcher.start(config)
    wait_for(lambda: int((newest(checkpoints) or Path("step_0")).name[5:]) > before, deadline_s=60)
    started.send(signal.SIGTERM)
    assert launcher.wait(started, deadline_s=60, end_others=False) == [128 + signal.SIGTERM] * 2
