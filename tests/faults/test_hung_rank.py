"""A rank that stops answering is named by the others within the timeout, and the world ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.ranks import EXIT_HUNG
from msmil.engine.watchdog import EXIT_HUNG as ENGINES_EXIT_HUNG
from tests.experiments import write_tiny
from tests.faults.launcher import Launcher
from tests.worlds import ROOT, alive, children_running, environment, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

TIMEOUT_S = 6
SLOW_START_S = 15  # while real launchers start on a busy machine, one rank imports what another has long imported
LAUNCHERS_PATIENCE_S = 30  # torch's, until it kills a process that does not end on SIGTERM
COMMANDS = {
    "msmil train": ["-m", "launch.cli", "train", "CONFIG", "--ranks", "2"],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "launch.train", "CONFIG"],
}


def test_both_sides_mean_the_same_code() -> None:
    assert EXIT_HUNG == ENGINES_EXIT_HUNG


@pytest.mark.parametrize(("launcher", "engine", "stopped"), [("msmil train", "ddp", 1), ("torchrun", "deepspeed", 0)])
def test_a_stopped_rank_is_named_and_nothing_is_left(
    tmp_path: Path, packed: Path, launcher: str, engine: str, stopped: int
) -> None:
    train = {"epochs": 5000, "timeout_s": SLOW_START_S, "engine": engine, "zero_stage": 2}
    config = write_tiny(tmp_path, packed, train=train, evaluate={"every_epochs": 5000})
    log = tmp_path / "runs" / "tiny" / "log.txt"
    command = [str(config) if word == "CONFIG" else word for word in COMMANDS[launcher]]
    process = subprocess.Popen(
        [sys.executable, *command], env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for(lambda: log.exists() and log.read_text().count("loss") > 1, deadline_s=240)
        ranks = children_running("launch.train", process.pid)
        assert len(ranks) == 2
        by_rank = sorted(ranks, key=rank_of)
        os.kill(by_rank[stopped], signal.SIGSTOP)
        start_s = time.monotonic()
        wait_for(lambda: not alive(by_rank[1 - stopped]), deadline_s=4 * SLOW_START_S)
        assert time.monotonic() - start_s > SLOW_START_S / 2
        _, err = process.communicate(timeout=LAUNCHERS_PATIENCE_S + 30)
    finally:
        process.kill()
    assert not any(alive(pid) for pid in ranks)
    last = log.read_text().splitlines()[-1]
    assert re.search(rf"msmil: rank {stopped} \(pid {by_rank[stopped]} on .+\) did not answer within \d+ s", last), last
    assert err.count("did not answer within") == 1, err
    if launcher == "msmil train":
        assert process.returncode == EXIT_HUNG
        assert "the same command again goes on" in last
        assert "Traceback" not in err
    else:
        assert process.returncode != 0


@pytest.mark.parametrize(
    ("engine", "fault"),
    [("ddp", "stopped_in_the_settling_step"), ("deepspeed", "stopped_while_the_engine_is_made")],
)
def test_a_rank_that_stops_before_the_first_step_is_named_too(
    launcher: Launcher, tmp_path: Path, packed: Path, engine: str, fault: str
) -> None:
    config = write_tiny(tmp_path, packed, train={"timeout_s": TIMEOUT_S, "engine": engine, "zero_stage": 3})
    started = launcher.start(config, fault=f"tests.faults.hooks:{fault}")
    stopped = started.folder / "stopped_at"
    wait_for(stopped.exists, deadline_s=60)
    start_s = time.monotonic()
    wait_for(lambda: not alive(started.pids[0]), deadline_s=4 * TIMEOUT_S)
    assert time.monotonic() - start_s > TIMEOUT_S / 2
    started.send(signal.SIGKILL, 1)
    assert launcher.wait(started) == [EXIT_HUNG, -signal.SIGKILL]
    said = (started.folder / "hung.txt").read_text()
    assert re.fullmatch(rf"rank 1 \(pid {started.pids[1]} on .+\) did not answer within \d+ s", said), said
    assert started.place(1) == "start"


def rank_of(pid: int) -> int:
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return int(next(text for text in variables if text.startswith(b"RANK=")).partition(b"=")[2])
