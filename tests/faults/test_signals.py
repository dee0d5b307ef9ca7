"""A signal stops all ranks behind the same step, with everything saved, and the exit code says which it was."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from launch.ranks import rank_program
from msmil.engine.checkpoint import load_checkpoint
from msmil.engine.checkpoint_state import newest
from msmil.engine.preemption import Stopped, StopRequest
from tests.experiments import write_tiny
from tests.faults.launcher import Launcher, Started, poll
from tests.faults.places import step_of
from tests.worlds import alive, children_running, wait_for

TORCHS_PATIENCE_S = 30
LONG = {"train": {"epochs": 5000}, "evaluate": {"every_epochs": 5000}, "checkpoint": {"keep_last": 1}}


def test_a_handler_only_sets_a_flag_and_a_second_ctrl_c_is_obeyed_at_once() -> None:
    before, ended = signal.getsignal(signal.SIGINT), threading.Event()
    request = StopRequest(at_second=ended.set)
    request.watch()
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert request.signum == signal.SIGUSR1
        os.kill(os.getpid(), signal.SIGINT)
        assert request.signum == signal.SIGINT
        assert not ended.wait(0.1)
        os.kill(os.getpid(), signal.SIGINT)
        assert ended.wait(10)
    finally:
        request.restore()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(("rank", "said"), [("0", 1), ("1", 0)])
def test_a_rank_that_has_stopped_hears_no_sigterm_while_it_ends(
    rank: str, said: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """srun --kill-on-bad-exit sends one as soon as another rank has ended; the exit code would be that of SIGTERM."""

    def body() -> None:
        raise Stopped(signal.SIGUSR1, 7)

    monkeypatch.setenv("RANK", rank)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert rank_program(body) == 128 + signal.SIGUSR1
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err.count("msmil: stopped by SIGUSR1 behind step 7;") == said


@pytest.mark.slow
def test_ranks_stop_together_save_and_go_on(launcher: Launcher, tmp_path: Path, packed: Path) -> None:
    """SIGTERM to all ranks, to one of them; then each of the other signals. Nothing is saved but at a stop."""
    config, done = write_tiny(tmp_path, packed, name="job", **LONG), 0
    asked = [(signal.SIGTERM, (0, 1)), (signal.SIGTERM, (1,)), (signal.SIGUSR1, (1,)), (signal.SIGUSR2, (0, 1))]
    for signum, ranks in [*asked, (signal.SIGINT, (0,))]:
        started = launcher.start(config)
        poll(lambda s=started, d=done: step_of(s.place(0)) > d + 1, deadline_s=60)
        started.send(signum, *ranks)
        assert launcher.wait(started, end_others=False) == [128 + signum] * 2
        assert done == 0 or f"step {done})" in started.said(), "it went on from the step that was saved"
        checkpoint = newest(tmp_path / "runs" / "job" / "checkpoints")
        assert checkpoint is not None
        state = load_checkpoint(checkpoint).state
        assert state.step > done
        assert (
            f"{signum} stopped by {signum.name} behind step {state.step}"
            in (started.folder / "stopped.txt").read_text()
        )
        assert not any("Traceback" in started.said(rank) for rank in range(2))
        done = state.step


@pytest.mark.slow
def test_a_second_ctrl_c_ends_ranks_that_hang(launcher: Launcher, tmp_path: Path, packed: Path) -> None:
    """Rank 0 waits in a collective for rank 1, which never comes: there the first Ctrl-C cannot be obeyed."""
    started = launcher.start(write_tiny(tmp_path, packed, **LONG), fault="tests.faults.hooks:hanging_step")
    wait_for((started.folder / "hangs").exists, deadline_s=60)
    started.send(signal.SIGINT)
    time.sleep(1)
    assert all(alive(pid) for pid in started.pids)
    started.send(signal.SIGINT)
    assert launcher.wait(started, deadline_s=60, end_others=False) == [130, 130]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_msmil_train_gives_ranks_their_time_and_a_second_ctrl_c_takes_it(
    launcher: Launcher, tmp_path: Path, packed: Path
) -> None:
    """Both while the ranks do not answer. torch, which starts them, would kill them 30 s after SIGTERM."""
    arguments = ["train", write_tiny(tmp_path, packed, name="job", **LONG), "--ranks", "2"]
    started, ranks = training(launcher, arguments, tmp_path)
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    started.send(signal.SIGTERM)
    time.sleep(TORCHS_PATIENCE_S + 3)
    assert all(alive(pid) for pid in [*ranks, *started.pids])
    for pid in ranks:
        os.kill(pid, signal.SIGCONT)
    assert launcher.wait(started) == [128 + signal.SIGTERM]
    assert "msmil: stopped by SIGTERM behind step" in started.said()
    assert "Traceback" not in started.said()

    started, ranks = training(launcher, arguments, tmp_path)
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    started.send(signal.SIGINT)
    time.sleep(1)
    assert all(alive(pid) for pid in [*ranks, *started.pids])
    started.send(signal.SIGINT)
    assert launcher.wait(started, deadline_s=60) == [130]
    assert not any(alive(pid) for pid in ranks)
    assert "msmil: ended at once by SIGINT" in started.said()
    assert "Traceback" not in started.said()


@pytest.mark.slow
def test_ctrl_c_of_a_terminal_stops_a_single_rank_once(launcher: Launcher, tmp_path: Path, packed: Path) -> None:
    """A terminal tells all processes of its group; the rank saves, and `msmil train` waits for it."""
    arguments = ["train", write_tiny(tmp_path, packed, name="job", **LONG), "--ranks", "1"]
    started, ranks = training(launcher, arguments, tmp_path)
    os.killpg(started.pids[0], signal.SIGINT)
    assert launcher.wait(started) == [130]
    assert not any(alive(pid) for pid in ranks)
    assert "msmil: stopped by SIGINT behind step" in started.said()
    assert "Traceback" not in started.said()
    assert newest(tmp_path / "runs" / "job" / "checkpoints") is not None


def training(launcher: Launcher, arguments: list[Any], folder: Path) -> tuple[Started, list[int]]:
    """`msmil train`, as soon as its ranks have trained some steps; and their pids."""
    log = folder / "runs" / "job" / "log.txt"
    before = log.read_text().count("loss") if log.exists() else 0
    started = launcher.start(*arguments, program="msmil")
    wait_for(lambda: log.exists() and log.read_text().count("loss") > before + 1, deadline_s=200)
    ranks = children_running("launch.train", started.pids[0])
    assert len(ranks) == int(arguments[-1])
    return started, ranks
