"""A rank that stops answering is named by the others within the timeout, and the world ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from launch.ranks import EXIT_HUNG
from msmil.engine.watchdog import EXIT_HUNG as ENGINES_EXIT_HUNG
from tests.distributed.runs import zero
from tests.experiments import write_tiny
from tests.faults.launcher import Launcher
from tests.worlds import ROOT, alive, children_running, environment, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

TIMEOUT_S = 6
SLOW_START_S = 25  # while real launchers start on a busy machine, one rank imports what another has long imported
VALIDATION_S = 15
LAUNCHERS_PATIENCE_S = 30  # torch's, until it kills a process that does not end on SIGTERM
COMMANDS = {
    "msmil train": ["-m", "launch.cli", "train", "CONFIG", "--ranks", "2"],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "launch.train", "CONFIG"],
}


def test_both_sides_mean_the_same_code() -> None:
    assert EXIT_HUNG == ENGINES_EXIT_HUNG


CASES = [("msmil train", "ddp", 1), ("torchrun", "deepspeed", 0)]


@dataclass
class World:
    """Two ranks that a launcher has started, and the pid of each by its rank."""

    process: subprocess.Popen[str]
    log: Path
    stopped: int
    pids: list[int] = field(default_factory=list)
    since_s: float = 0.0
    waited_s: float = 0.0

    def advance(self) -> bool:
        """Stop one rank as soon as both train; whether the other one has ended by now, and how long it has waited."""
        if not self.pids:
            if self.log.exists() and self.log.read_text().count("loss") > 1:
                self.pids = sorted(children_running("launch.train", self.process.pid), key=rank_of)
                assert len(self.pids) == 2
                os.kill(self.pids[self.stopped], signal.SIGSTOP)
                self.since_s = time.monotonic()
        elif not self.waited_s and not alive(self.pids[1 - self.stopped]):
            self.waited_s = time.monotonic() - self.since_s
        return self.waited_s > 0


def start(folder: Path, packed: Path, launcher: str, engine: str, stopped: int) -> World:
    folder.mkdir()
    train = {"epochs": 5000, "timeout_s": SLOW_START_S, "engine": engine}
    config = write_tiny(folder, packed, train=train, evaluate={"every_epochs": 5000})
    command = [str(config) if word == "CONFIG" else word for word in COMMANDS[launcher]]
    process = subprocess.Popen(
        [sys.executable, *command], env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    return World(process, folder / "runs" / "tiny" / "log.txt", stopped)


def test_a_stopped_rank_is_named_and_nothing_is_left(tmp_path: Path, packed: Path) -> None:
    """Under both launchers at once: most of it is waiting."""
    worlds: list[World] = []
    try:
        for launcher, engine, stopped in CASES:
            worlds.append(start(tmp_path / engine, packed, launcher, engine, stopped))
        wait_for(lambda: sum(world.advance() for world in worlds) == len(worlds), deadline_s=240)
        said = [world.process.communicate(timeout=LAUNCHERS_PATIENCE_S + 30)[1] for world in worlds]
    finally:
        for world in worlds:
            world.process.kill()
    for world, (launcher, _, _), err in zip(worlds, CASES, said, strict=True):
        told(world, launcher, err)


def told(world: World, launcher: str, err: str) -> None:
    """What is left, in the log and on the terminal."""
    assert not any(alive(pid) for pid in world.pids)
    last, pid = world.log.read_text().splitlines()[-1], world.pids[world.stopped]
    assert re.search(rf"msmil: rank {world.stopped} \(pid {pid} on .+\) did not answer within \d+ s", last), last
    assert SLOW_START_S / 2 < world.waited_s < 4 * SLOW_START_S
    assert err.count("did not answer within") == 1, err
    if launcher == "msmil train":
        assert world.process.returncode == EXIT_HUNG
        assert "the same command again goes on" in last
        assert "Traceback" not in err
    else:
        assert world.process.returncode != 0


@pytest.mark.parametrize(
    ("engine", "fault"),
    [("ddp", "stopped_in_the_settling_step"), ("deepspeed", "stopped_while_the_engine_is_made")],
)
def test_a_rank_that_stops_before_the_first_step_is_named_too(
    launcher: Launcher, tmp_path: Path, packed: Path, engine: str, fault: str
) -> None:
    assert named_by_the_other(launcher, tmp_path, packed, engine, fault) == "start"


def test_a_rank_that_stops_while_weights_are_validated_together_is_named_too(
    launcher: Launcher, tmp_path: Path, packed: Path
) -> None:
    fault = "stopped_between_forwards_of_a_validation"
    more = {"evaluate": {"batch_size": 1}}
    place = named_by_the_other(launcher, tmp_path, packed, "deepspeed", fault, timeout_s=VALIDATION_S, **more)
    assert place.endswith("validation")


def named_by_the_other(
    launcher: Launcher,
    tmp_path: Path,
    packed: Path,
    engine: str,
    fault: str,
    *,
    timeout_s: int = TIMEOUT_S,
    **sections: Any,
) -> str:
    """Rank 0 names rank 1, which has stopped, and ends; gives where rank 1 was."""
    train = {"timeout_s": timeout_s} | (zero(3) if engine == "deepspeed" else {})
    config = write_tiny(tmp_path, packed, train=train, **sections)
    started = launcher.start(config, fault=f"tests.faults.hooks:{fault}")
    stopped = started.folder / "stopped_at"
    wait_for(stopped.exists, deadline_s=120)
    start_s = time.monotonic()
    wait_for(lambda: not alive(started.pids[0]), deadline_s=4 * timeout_s)
    assert time.monotonic() - start_s > timeout_s / 2
    started.send(signal.SIGKILL, 1)
    assert launcher.wait(started) == [EXIT_HUNG, -signal.SIGKILL]
    said = (started.folder / "hung.txt").read_text()
    assert re.fullmatch(rf"rank 1 \(pid {started.pids[1]} on .+\) did not answer within \d+ s", said), said
    return started.place(1)


def rank_of(pid: int) -> int:
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return int(next(text for text in variables if text.startswith(b"RANK=")).partition(b"=")[2])
