"""Ranks that are forked from a process which has imported everything, where a launcher would start Python for each.

Python with torch and timm takes seconds of processor time to start, a fork takes milliseconds. The ranks are real
processes, with the environment that the launcher sets; only its own supervision is replaced, by the few lines of
`_world`: when a rank fails the others are ended. tests/launch/test_train_command.py and tests/faults start the real
launchers.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
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

from launch.ranks import collect_seldom

_PRELOAD = ("launch.train", "launch.evaluate", "launch.extract", "msmil.engine.train", "msmil.engine.evaluate",
            "msmil.engine.extract", "deepspeed", "torch.utils.tensorboard", "matplotlib.pyplot",
            "launch.cli", "accelerate.commands.launch", "torch.distributed.run", "torch._dynamo", "PIL.PngImagePlugin",
            "deepspeed.runtime.zero.muon.original_muon", "transformers.integrations")  # fmt: skip
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}  # pyarrow's jemalloc
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
    start_ranks(module, arguments, environments)
    ended = wait_for_ranks(deadline_s=deadline_s)
    assert not ended["hung"], f"hung for {deadline_s} s: {module} {arguments}"
    return World(ended["first"], 0 if ended["first"] is None else ended["codes"][ended["first"]])


def start_ranks(module: str, arguments: Sequence[str], environments: Sequence[Mapping[str, str]]) -> list[int]:
    """Start ranks as `run_ranks` does, and return their pids; `wait_for_ranks` has to follow."""
    port = _free_port()
    request = {
        "module": module,
        "arguments": list(arguments),
        "cwd": str(Path.cwd()),
        "environments": [dict(one) | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} for one in environments],
    }
    pids: list[int] = _ask(request)
    return pids


def wait_for_ranks(*, deadline_s: float, end_others: bool = True) -> dict[str, Any]:
    """Wait for the ranks that were started last.

    `end_others` says whether a rank that fails ends the others, as launchers see to.

    Returns:
        codes: exit code of each rank (-N: signal N); first: the rank that failed first, or None; hung: whether the
        deadline passed first, and they were killed.
    """
    ended: dict[str, Any] = _ask({"deadline_s": deadline_s, "end_others": end_others})
    return ended


def _ask(request: dict[str, Any]) -> Any:
    channel = _server()
    socket.send_fds(channel, [json.dumps(request).encode()], [1, 2])
    answer = channel.recv(_LONGEST)
    assert answer, "the process that forks has ended"
    return json.loads(answer)


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
    environment = dict(os.environ) | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **_ONE_THREAD}
    command = [sys.executable, "-m", "tests.forked", str(theirs.fileno())]
    nothing = subprocess.DEVNULL  # DeepSpeed greets on stdout; each rank has the streams of its test
    process = subprocess.Popen(
        command, env=environment, cwd=_ROOT, pass_fds=[theirs.fileno()], stdin=nothing, stdout=nothing
    )
    theirs.close()

    def end() -> None:
        ours.close()
        process.kill()

    atexit.register(end)
    return ours


def serve(channel: socket.socket) -> None:
    """Fork worlds as they are asked for, until the other side closes."""
    collect_seldom()
    for module in _PRELOAD:
        importlib.import_module(module)
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # a rank that looked at what it shares with this process would copy it
    pids: list[int] = []
    while True:
        message, streams, _, _ = socket.recv_fds(channel, _LONGEST, 2)
        if not message:
            return
        request = json.loads(message)
        if "module" in request:
            pids = _start(request, streams, channel)
            answer: Any = pids
        else:
            answer = _wait(pids, request["deadline_s"], end_others=request["end_others"])
        for stream in streams:
            os.close(stream)
        channel.send(json.dumps(answer).encode())


def _start(request: dict[str, Any], streams: Sequence[int], channel: socket.socket) -> list[int]:
    threads = len(list(Path("/proc/self/task").iterdir()))
    assert threads == 1, f"a fork of a process with {threads} threads copies locks that nobody opens"
    pids = []
    for environment in request["environments"]:
        pid = os.fork()
        if pid == 0:
            channel.close()
            _rank(request, environment, streams)
        pids.append(pid)
    return pids


def _wait(pids: Sequence[int], deadline_s: float, *, end_others: bool) -> dict[str, Any]:
    """Wait for the ranks; when one fails, end the others as torchrun does."""
    left, codes = dict(enumerate(pids)), [0] * len(pids)
    end_s = time.monotonic() + deadline_s
    first, hung, asked = None, False, False
    while left:
        for rank, pid in list(left.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del left[rank]
                codes[rank] = os.waitstatus_to_exitcode(status)
                first = rank if first is None and codes[rank] else first
        late = time.monotonic() > end_s
        hung = hung or (late and not asked)
        if late or (end_others and first is not None and not asked):
            for pid in left.values():
                os.killpg(pid, signal.SIGKILL if late else signal.SIGTERM)
            asked, end_s = True, time.monotonic() + _KILL_AFTER_S
        time.sleep(0.01)
    return {"codes": codes, "first": first, "hung": hung}


def _rank(request: dict[str, Any], environment: Mapping[str, str], streams: Sequence[int]) -> None:
    """Become a rank: never returns."""
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # some shells ignore it in what they start aside
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
