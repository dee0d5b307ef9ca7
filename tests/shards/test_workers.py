"""Decoding processes: deaf to the job's signals, gone with the training process, and their death is told."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from shards.errors import UserError
from shards.manifest import read_manifest
from shards.stream import train_stream
from shards.workers import start_server, start_worker
from tests.archives import LABELS

ROOT = Path(__file__).parents[2]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

pytestmark = pytest.mark.slow


def stream_of(packed, workers=2, epoch=0):
    return train_stream(
        read_manifest(packed), labels=LABELS, seed=0, epoch=epoch, batch_size=2, accumulation=1, world=1, rank=0,
        start_batch=0, last_batch="drop", block_shards=4, workers=workers, prefetch_batches=1, pin_memory=False,
    )  # fmt: skip


def stat(pid: int) -> list[str]:
    """State, parent, ... of a process; ["Z"] when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ["Z"]


def alive(pid: int) -> bool:
    return stat(pid)[0] != "Z"


def wait_until(happened, timeout_s: float = 15.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.05)
    return happened()


def workers_of_this_process() -> list[int]:
    return [child.pid for child in multiprocessing.active_children()]


def test_processes_end_with_the_stream_and_start_anew_each_epoch(packed):
    for epoch in range(2):
        stream = stream_of(packed, epoch=epoch)
        next(stream)
        pids = workers_of_this_process()
        assert len(pids) == 2
        stream.close()
        assert wait_until(lambda pids=pids: not any(map(alive, pids)))


def test_the_jobs_signals_reach_neither_the_processes_nor_their_server(packed):
    stream = stream_of(packed)
    count = 1 + len([next(stream)])
    pids = workers_of_this_process()
    server = int(stat(pids[0])[1])
    assert server != os.getpid()
    for pid in (*pids, server):
        for number in SIGNALS:
            # From another process, as a scheduler does; our own SIGTERM is how the loader stops a process.
            subprocess.run(["kill", f"-{int(number)}", str(pid)], check=True)
    count += len(list(stream))
    assert count == 1 + len(list(stream_of(packed, workers=0)))
    assert alive(server)


def test_our_own_sigterm_ends_a_process(packed):
    stream = stream_of(packed)
    next(stream)
    pid = workers_of_this_process()[0]
    os.kill(pid, signal.SIGTERM)
    assert wait_until(lambda: not alive(pid))
    stream.close()


def test_a_killed_process_is_a_users_error(packed):
    stream = stream_of(packed)
    next(stream)
    for pid in workers_of_this_process():
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"decoding process was killed.*Fix: give the job more memory"):
        list(stream)


def test_a_decoding_process_computes_with_one_thread(packed):
    with start_server().Pool(1, initializer=start_worker, initargs=(0,)) as pool:
        assert pool.apply(torch.get_num_threads) == 1


SCRIPT = """
import multiprocessing, sys, time
from tests.shards.test_workers import stream_of
if __name__ == "__main__":
    stream = stream_of(sys.argv[1])
    next(stream)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    time.sleep(60 if sys.argv[2] == "wait" else 0.5)
"""


@pytest.fixture
def start_script(packed, tmp_path):
    """Starts a program that takes one batch; gives it, its decoding processes and their server."""
    started = []

    def start(then: str) -> tuple[subprocess.Popen[str], list[int], int]:
        script = tmp_path / "script.py"
        script.write_text(SCRIPT)
        command = [sys.executable, str(script), str(packed), then]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        started.append(process.pid)
        assert process.stdout is not None
        pids = [int(word) for word in process.stdout.readline().split()]
        assert len(pids) == 2
        server = int(stat(pids[0])[1])
        started.extend([*pids, server])
        return process, pids, server

    yield start
    for pid in filter(alive, started):
        os.kill(pid, signal.SIGKILL)


def test_killing_the_training_process_ends_its_processes_and_their_server(start_script):
    process, pids, server = start_script("wait")
    assert all(map(alive, (*pids, server)))
    process.kill()
    process.wait()
    assert wait_until(lambda: not any(map(alive, (*pids, server))))


def test_a_program_that_ends_in_the_middle_of_an_epoch_ends(start_script):
    process, pids, server = start_script("end")
    assert process.wait(timeout=60) == 0
    assert wait_until(lambda: not any(map(alive, (*pids, server))))
