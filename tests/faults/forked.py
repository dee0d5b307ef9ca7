"""A launcher whose ranks are forked from it: it has imported everything, so that a start costs no import of torch.

`python -m tests.faults.forked` reads requests from stdin, a line of JSON each, and answers on stdout; the other end is
tests.faults.launcher. It has one thread and computes nothing, so that a forked rank starts with a clean state. A rank
is a process in a session of its own, with the variables that launchers set and the program that they start; it ends
without Python's clean-up, which is harsher than real life. As torchrun does, the launcher sends SIGTERM to the others
when a rank fails, and SIGKILL to those that have not ended half a minute later.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

import torch

import launch.ranks
import launch.train
from launch.cli import main as msmil
from shards.workers import _PRELOAD
from tests.faults.places import mark_places

GRACE_S = 30.0  # torchrun's
_POLL_S = 0.01
_PR_SET_PDEATHSIG = 1
# What ranks and launchers import only when they first use it.
_LATER = (
    "accelerate.commands.launch", "msmil.engine.preflight", "msmil.engine.train", "torch._dynamo",
    "torch.distributed.run", "torch.utils.data.graph_settings",
)  # fmt: skip


class World:
    """The processes of one start."""

    def __init__(self, request: dict[str, Any]) -> None:
        threads = len(list(Path("/proc/self/task").iterdir()))
        assert threads == 1, f"a fork of a process with {threads} threads copies locks that nobody opens"
        folder = Path(request["folder"])
        folder.mkdir(parents=True)
        port = _free_port()
        self.codes: dict[int, int] = {}
        self.pids: list[int] = []
        for rank in range(request["ranks"]):
            pid = os.fork()
            if pid == 0:
                _be_rank(request, folder, rank, port)
            self.pids.append(pid)

    def wait(self, deadline_s: float, *, end_others: bool) -> dict[str, Any]:
        """Wait until all have ended: exit codes (signals are negative), and whether the deadline has passed."""
        end_s, kill_s, hung = time.monotonic() + deadline_s, float("inf"), False
        while len(self.codes) < len(self.pids):
            self._collect()
            now_s = time.monotonic()
            if kill_s == float("inf") and end_others and any(self.codes.values()):
                self._send(signal.SIGTERM)
                kill_s = now_s + GRACE_S
            if now_s > end_s or now_s > kill_s:
                hung = hung or now_s > end_s
                self._send(signal.SIGKILL)
            time.sleep(_POLL_S)
        return {"codes": [self.codes[rank] for rank in range(len(self.pids))], "hung": hung}

    def _collect(self) -> None:
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes and (status := os.waitpid(pid, os.WNOHANG))[0]:
                self.codes[rank] = os.waitstatus_to_exitcode(status[1])

    def _send(self, signum: int) -> None:
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                os.kill(pid, signum)


def _be_rank(request: dict[str, Any], folder: Path, rank: int, port: int) -> NoReturn:
    """What a forked process does, to its end."""
    code = 1
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        _redirect(folder / f"rank_{rank}.txt")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if request["program"] == "msmil":
            code = msmil(request["arguments"])
        else:
            _as_a_launcher_says(folder, rank, request["ranks"], port)
            launch.ranks._PEER_WAIT_S = request["peer_wait_s"]
            sys.modules["__main__"] = launch.train  # decoding processes import the program that starts them
            mark_places(folder / f"rank_{rank}.place")
            if fault := request["fault"]:
                module, _, name = fault.partition(":")
                getattr(importlib.import_module(module), name)(rank, folder)
            code = launch.train.rank_main(request["arguments"])
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _as_a_launcher_says(folder: Path, rank: int, world: int, port: int) -> None:
    """The variables of torchrun, and where `msmil train` wants the reason of a failure."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "MSMIL_FAILURE_FILE": str(folder / "failure.txt"),
    }


def _redirect(file: Path) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def main() -> None:
    """Serve until stdin ends."""
    torch.set_num_threads(1)
    for name in (*_LATER, *_PRELOAD):
        importlib.import_module(name)
    world: World | None = None
    print("{}", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "start":
            world = World(request)
            answer: dict[str, Any] = {"pids": world.pids}
        else:
            assert world is not None
            answer = world.wait(request["deadline_s"], end_others=request["end_others"])
        print(json.dumps(answer), flush=True)
    os._exit(0)  # all of torch takes its time to be torn down


if __name__ == "__main__":
    main()
