"""Signals that the launcher gets reach the ranks: once each, those that meet it later too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.forwarding import forwarding
from tests.worlds import environment, wait_for

RANK = """
    import signal, sys, time
    from pathlib import Path
    from launch.forwarding import meet
    heard, folder = [], Path(sys.argv[1])
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, lambda signum, _: heard.append(signum))
    meet(folder)
    (folder / "met").touch()
    while not heard:
        time.sleep(0.01)
    time.sleep(0.2)
    sys.exit(heard[0] if len(heard) == 1 else f"heard {heard}")
"""


def start(folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(RANK), str(folder)], env=environment())


@pytest.fixture(params=[signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP])
def signum(request: pytest.FixtureRequest) -> Iterator[signal.Signals]:
    """A signal that is not ignored, as nohup would have it."""
    before = signal.getsignal(request.param)
    if before is signal.SIG_IGN:
        signal.signal(request.param, signal.SIG_DFL)
    yield request.param
    signal.signal(request.param, before)


def test_a_rank_hears_what_its_launcher_is_told(signum: signal.Signals, tmp_path: Path) -> None:
    before = signal.getsignal(signum)
    rank = start(tmp_path)
    wait_for((tmp_path / "met").exists, deadline_s=60)
    with forwarding(tmp_path) as asked:
        os.kill(os.getpid(), signum)
        code = rank.wait(30)
    heard = signal.SIGTERM if signum == signal.SIGHUP else signum
    assert (code, asked.signum, asked.killed) == (heard, heard, False)
    assert signal.getsignal(signum) is before


def test_a_rank_that_meets_later_hears_it_then(tmp_path: Path) -> None:
    with forwarding(tmp_path):
        os.kill(os.getpid(), signal.SIGUSR2)
        assert start(tmp_path).wait(30) == signal.SIGUSR2


def test_a_second_ctrl_c_kills(tmp_path: Path) -> None:
    rank = start(tmp_path)
    wait_for((tmp_path / "met").exists, deadline_s=60)
    os.kill(rank.pid, signal.SIGSTOP)
    with forwarding(tmp_path) as asked:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert rank.wait(30) == -signal.SIGKILL
    assert asked.ended(-signal.SIGKILL) == signal.SIGINT


def test_what_is_ignored_stays_so(tmp_path: Path) -> None:
    """nohup ignores that the terminal is closed."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with forwarding(tmp_path) as asked:
            os.kill(os.getpid(), signal.SIGHUP)
        assert asked.signum == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_rank_that_ends_at_once_has_obeyed_the_signal(tmp_path: Path) -> None:
    with forwarding(tmp_path) as asked:
        assert asked.ended(-signal.SIGTERM) == 0
        os.kill(os.getpid(), signal.SIGTERM)
    assert asked.ended(-signal.SIGTERM) == asked.ended(128 + signal.SIGTERM) == signal.SIGTERM
    assert asked.ended(1) == asked.ended(-signal.SIGKILL) == 0


def test_a_rank_leaves_the_group_of_the_terminal(tmp_path: Path) -> None:
    rank = start(tmp_path)
    wait_for((tmp_path / "met").exists, deadline_s=60)
    assert os.getpgid(rank.pid) == rank.pid != os.getpgrp()
    rank.send_signal(signal.SIGTERM)
    assert rank.wait(30) == signal.SIGTERM
