"""How decoding processes are started, what they ignore, and when they end.

They are forked from a server process that has imported torch and holds nothing else (forkserver): a fork of the
training process would copy its threads' locks, its CUDA state and its sockets, which NCCL and gloo do not survive on
all networks (torch's notes on DistributedDataParallel say so), and a spawned process would import torch each time.
The server starts once per training process, in some seconds and beside other work; a decoding process then in tens
of milliseconds.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Final

import torch

from shards.errors import UserError
from shards.files import human_bytes
from shards.host_memory import keep_freed_memory

# What schedulers and terminals send to every process of a job. Only the training process answers: it saves and ends,
# for which it needs its decoding processes alive.
_NOT_OURS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_CHECK_EVERY_S: Final = 1.0
_SHARED_MEMORY: Final = Path("/dev/shm")
_KEPT_BYTES: Final = 256 << 20  # what decoding the largest mammogram takes, several times over

# What a decoding process imports, with what torch, numpy and Pillow import only when they are first used.
_PRELOAD: Final = (
    "shards.stream", "torch.utils.data.graph_settings", "numpy.random", "pyarrow.compute", "PIL.BmpImagePlugin",
    "PIL.GifImagePlugin", "PIL.JpegImagePlugin", "PIL.PngImagePlugin", "PIL.PpmImagePlugin",
)  # fmt: skip


def start_server() -> ForkServerContext:
    """See that the server runs; gives the context that starts processes from it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOAD))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_OURS)
    try:
        resource_tracker.ensure_running()
        # The tracker's start has just unblocked two of them. The server and all its children inherit this mask.
        signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_OURS)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def start_worker(worker: int) -> None:
    """First thing in a decoding process: one thread, freed memory kept, deaf to the job's signals, and gone with the
    training process."""
    del worker
    torch.set_num_threads(1)
    keep_freed_memory(_KEPT_BYTES)
    signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_OURS)
    threading.Thread(target=_end_with_parent, name="end-with-parent", daemon=True).start()


def _end_with_parent() -> None:
    """End this process when the training process is dead, or asks for it by SIGTERM; nobody else's SIGTERM counts."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    while parent.is_alive():
        asked = signal.sigtimedwait({signal.SIGTERM}, _CHECK_EVERY_S)
        if asked is not None and asked.si_pid == parent.pid:
            break
    os._exit(1)


def check_shared_memory(workers: int, bytes_per_worker: int, *, ranks: int = 1) -> None:
    """Batches travel through /dev/shm, which containers keep small; when it is full, the loader hangs or dies.

    The ranks of a machine share it, and some of them may have taken theirs already: what all of them need is held
    against its size, what this one needs against what is free.

    Args:
        workers: decoding processes of this rank.
        bytes_per_worker: that each of them needs.
        ranks: of this machine, this one among them.

    Raises:
        UserError: there is too little for these decoding processes.
    """
    if not _SHARED_MEMORY.is_dir():
        return
    status = os.statvfs(_SHARED_MEMORY)
    if not status.f_blocks:
        return  # a file system without a limit tells no sizes (podman run --shm-size=0)
    size, free = (blocks * status.f_frsize for blocks in (status.f_blocks, status.f_bavail))
    needed = workers * bytes_per_worker
    if ranks * needed <= size and needed <= free:
        return
    who, there = f"{workers} decoding processes", f"{human_bytes(free)} are free"
    if ranks * needed > size:
        who += f" of each of {ranks} ranks" if ranks > 1 else ""
        needed, there = ranks * needed, f"there are {human_bytes(size)} in all"
    raise UserError(
        f"{who} need {human_bytes(needed)} of shared memory, {there}",
        fix="start the container with more (docker run --shm-size=16g), or lower the number of decoding processes "
        "or of batches that each keeps ready",
        file=_SHARED_MEMORY,
    )
