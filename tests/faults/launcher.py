"""Worlds of forked ranks (tests.forked), started, killed and waited for by a test."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests import forked
from tests.faults.places import read_place
from tests.worlds import alive, children_running, environment


@dataclass(frozen=True)
class Started:
    """Ranks that run; their files lie in `folder`."""

    folder: Path
    pids: list[int]
    since_s: float

    def send(self, signum: int, *ranks: int) -> None:
        """Send a signal to some ranks, or to all."""
        for rank in ranks or range(len(self.pids)):
            os.kill(self.pids[rank], signum)

    def place(self, rank: int) -> str:
        """Where a rank is: "step 12, backward"."""
        return read_place(self.folder / f"rank_{rank}.place")

    def said(self, rank: int = 0) -> str:
        """What a rank printed."""
        file = self.folder / f"rank_{rank}.txt"
        return file.read_text(encoding="utf-8") if file.exists() else ""

    @property
    def failures(self) -> list[str]:
        """Reasons that ranks gave for ending with exit code 2; `msmil train` prints the first."""
        file = self.folder / "failure.txt"
        return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


class Launcher:
    """Starts worlds, one after another; what they print goes to files of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._numbers = folder, itertools.count()
        self._running: Started | None = None

    def start(
        self, *arguments: object, ranks: int = 2, program: str = "rank", fault: str = "", peer_wait_s: float = 0.5
    ) -> Started:
        """Start ranks of `python -m launch.train` with these arguments, or one process of `msmil`.

        Args:
            arguments: the experiment and overrides.
            ranks: how many.
            program: "rank" or "msmil".
            fault: "module:function" that is called with (rank, folder) in each rank before it trains.
            peer_wait_s: how long a rank that has lost another one waits to be ended; 10 in real life.
        """
        folder = self._folder / f"start_{next(self._numbers)}"
        folder.mkdir(parents=True)
        settings = {"folder": str(folder), "program": program, "fault": fault, "peer_wait_s": peer_wait_s}
        since_s, environments = time.time(), [environment()]
        if program == "rank":
            base = environment(MSMIL_FAILURE_FILE=str(folder / "failure.txt"))
            environments = forked.rank_environments(base, ranks)
        command = [json.dumps(settings), *(str(argument) for argument in arguments)]
        pids = forked.start_ranks("tests.faults.rank", command, environments)
        self._running = Started(folder, pids, since_s)
        return self._running

    def wait(self, started: Started, *, deadline_s: float = 120, end_others: bool = True) -> list[int]:
        """Exit codes of all ranks (signals are negative); fails when they hang.

        `end_others` says whether a rank that fails ends the others, as launchers see to.
        """
        ended = forked.wait_for_ranks(deadline_s=deadline_s, end_others=end_others)
        self._running = None
        texts = [(started.place(rank), started.said(rank)) for rank in range(len(started.pids))]
        assert not ended["hung"], f"hung for {deadline_s} s: {texts}"
        codes: list[int] = ended["codes"]
        return codes

    def end(self) -> None:
        """Kill what a test that failed has left running."""
        if self._running is None:
            return
        for pid in self._running.pids:
            for process in [*children_running("launch.train", pid), pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        forked.wait_for_ranks(deadline_s=10)
        self._running = None


def left_behind(started: Started) -> list[int]:
    """Processes of these ranks' sessions that still run, their decoding processes for example."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):  # it has just ended
                session = int((folder / "stat").read_text().rpartition(")")[2].split()[3])
                if session in started.pids and alive(int(folder.name)):
                    found.append(int(folder.name))
    return found


def poll(condition: Callable[[], bool], *, deadline_s: float, every_s: float = 0.005) -> None:
    """Wait for something that lasts for milliseconds."""
    end_s = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end_s, f"not within {deadline_s} s"
        time.sleep(every_s)


def half_written(started: Started, checkpoints: Path) -> list[Path]:
    """Checkpoints that these ranks have begun and not finished."""
    found = []
    for folder in checkpoints.glob(".step_*"):
        with contextlib.suppress(FileNotFoundError):  # it has just got its name
            if folder.stat().st_mtime >= started.since_s:
                found.append(folder)
    return found


def kill_inside_a_save(started: Started, checkpoints: Path, *, deadline_s: float) -> None:
    """SIGKILL rank 0, which writes, while a checkpoint lies there under its temporary name.

    It is stopped first, so that what is seen on the disk is what it leaves.
    """
    end_s = time.monotonic() + deadline_s
    while time.monotonic() < end_s:
        if half_written(started, checkpoints):
            started.send(signal.SIGSTOP, 0)
            if half_written(started, checkpoints):
                started.send(signal.SIGKILL, 0)
                return
            started.send(signal.SIGCONT, 0)
        time.sleep(0.001)
    raise AssertionError(f"no save was met within {deadline_s} s")


def digests(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of each file of weights, moments and averaged weights: the same bytes are the same bits."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in checkpoint.glob("*.safetensors")}
