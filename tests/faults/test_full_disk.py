"""A disk that fills up while a run saves: one clear error, and what was saved stays whole."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from msmil.engine.checkpoint import load_checkpoint
from msmil.engine.checkpoint_state import newest
from tests.experiments import write_tiny
from tests.worlds import ROOT, environment, wait_for

pytestmark = pytest.mark.long

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


def test_all_ranks_stop_with_one_error_and_the_run_resumes(small_disk: Path, packed: Path) -> None:
    sections = {"train": {"epochs": 300}, "checkpoint": {"every_steps": 1, "keep_last": 1}}
    config = write_tiny(small_disk, packed, **sections)
    command = [sys.executable, "-m", "launch.cli", "train", str(config), "--ranks", "2"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    checkpoints = small_disk / "runs" / "tiny" / "checkpoints"
    wait_for(lambda: newest(checkpoints) is not None, deadline_s=60)
    fill(small_disk / "ballast")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2, err
    errors = [line for line in err.splitlines() if line.startswith("msmil: error:")]
    assert len(errors) == 1, err
    assert "free space" in errors[0]
    assert "Traceback" not in err
    before = load_checkpoint(newest(checkpoints) or Path()).state.step
    (small_disk / "ballast").unlink()
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    wait_for(lambda: int((newest(checkpoints) or Path("step_0")).name[5:]) > before, deadline_s=60)
    process.terminate()
    process.communicate(timeout=60)
