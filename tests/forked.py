"""Ranks that are forked from a process which has imported everything, where a launcher would start Python for each.

Python with torch and timm takes seconds of processor time to start, a fork takes milliseconds. The ranks are real
processes, with the environment that the launcher sets; only its own supervision is replaced, by the few lines of
`_world`: when a rank fails the others are ended. tests/launch/test_train_command.py and tests/faults start the real
launchers.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

_PRELOAD = ("launch.train", "launch.evaluate", "launch.extract", "msmil.engine.train", "msmil.engine.evaluate",
            "msmil.engine.extract", "deepspeed", "torch.utils.tensorboard", "matplotlib.pyplot")  # fmt: skip
_ROOT = Path(__file__).parents[1]
_KILL_AFTER_S = 15.0
_LONGEST = 1 << 20
_PR_SET_PDEATHSIG = 1


class World:
    """How a world of ranks ended: the rank that failed first with its exit code (-N: signal N), or (None, 0)."""

    def __init__(self, first: int | None, code: int) -> None:
        self.first, self.code = first, code


def run_ranks(
    module: str, arguments: Sequence[str], environments: Sequence[Mapping[str, str]], *, deadline_s: float
) -> World:
    """Run `python -m module arguments` once per environment; what they print goes where this process prints.

    Raises:
        AssertionError: they did not end within the deadline; they are killed.
    """
    port = _free_port()
    request = {
        "module": module,
        "arguments": list(arguments),
        "cwd": str(Path.cwd()),
        "deadline_s": deadline_s,
        "environments": [dict(one) | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} for one in environments],
    }
    channel = _server()
    socket.send_fds(channel, [json.dumps(request).encode()], [1, 2])
    first, code, hung = json.loads(channel.recv(_LONGEST))
    assert not hung, f"hung for {deadline_s} s: {module} {arguments}"
    return World(first, code)


def rank_environments(base: Mapping[str, str], ranks: int) -> list[dict[str, str]]:
    """What a launcher of one machine tells each rank."""
    return [
        dict(base) | {"RANK": str(n), "LOCAL_RANK": str(n), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        for n in range(ranks)
    ]


def launch_command(args: Any) -> None:
    """Stands in for accelerate's: the same checks and the same environment, ranks by fork.

    Raises:
        subprocess.CalledProcessError: a rank failed.
    """
    from accelerate.commands import launch

    args, _, _ = launch._validate_launch_command(args)
    if args.multi_gpu:
        environments = rank_environments(launch.prepare_multi_gpu_env(args), args.num_processes)
    else:
        _, environment = launch.prepare_simple_launcher_cmd_env(args)
        environments = [environment]
    base = dict(os.environ)
    world = run_ranks(
        args.training_script, args.training_script_args, [base | one for one in environments], deadline_s=200
    )
    if world.code:
        raise subprocess.CalledProcessError(world.code, args.training_script)


@cache
def _server() -> socket.socket:
    """The process that forks; it starts when it is first needed."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LONGEST)
    environment = dict(os.environ) | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "tests.forked", str(theirs.fileno())]
    process = subprocess.Popen(
        command, env=environment, cwd=_ROOT, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
    )
    theirs.close()

    def end() -> None:
        ours.close()
        process.kill()

    atexit.register(end)
    return ours


def serve(channel: socket.socket) -> None:
    """Fork worlds as they are asked for, until the other side closes."""
    for module in _PRELOAD:
        importlib.import_module(module)
    import torch

    torch.set_num_threads(1)
    while True:
        message, streams, _, _ = socket.recv_fds(channel, _LONGEST, 2)
        if not message:
            return
        first, code, hung = _world(json.loads(message), streams, channel)
        for stream in streams:
            os.close(stream)
        channel.send(json.dumps([first, code, hung]).encode())


def _world(request: dict[str, Any], streams: Sequence[int], channel: socket.socket) -> tuple[int | None, int, bool]:
    """Start the ranks and wait; when one fails, end the others as torchrun does."""
    pids = {}
    for rank, environment in enumerate(request["environments"]):
        pid = os.fork()
        if pid == 0:
            channel.close()
            _rank(request, environment, streams)
        pids[pid] = rank
    end_s = time.monotonic() + request["deadline_s"]
    first, code, hung, asked = None, 0, False, False
    while pids:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in pids:
            rank, ended = pids.pop(pid), os.waitstatus_to_exitcode(status)
            if ended and first is None:
                first, code = rank, ended
        late = time.monotonic() > end_s
        if late:
            hung = hung or not asked
        if pids and (late or (first is not None and not asked)):
            for other in pids:
                os.killpg(other, signal.SIGKILL if late else signal.SIGTERM)
            asked, end_s = True, time.monotonic() + _KILL_AFTER_S
        if not pid:
            time.sleep(0.01)
    return first, code, hung


def _rank(request: dict[str, Any], environment: Mapping[str, str], streams: Sequence[int]) -> None:
    """Become a rank: never returns."""
    code = 1
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # gone with the process that forked it
        for descriptor, stream in zip((1, 2), streams, strict=True):
            os.dup2(stream, descriptor)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = [request["module"], *request["arguments"]]
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # what Python prints of a program that ends so
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
