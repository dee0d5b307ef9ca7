"""The signals that a launcher of ranks gets are for the ranks, which live in sessions of their own."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

TORCH_TAKES: Final = {"signals_to_handle": "SIGQUIT"}  # torchrun's option: it kills ranks 30 s after a signal it takes
_PID: Final = ".pid"
_ASKED: Final = "asked.txt"
_HANDED_ON: Final = {signum: signum for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)} | {
    signal.SIGHUP: signal.SIGTERM  # the terminal was closed; ranks have none
}


@dataclass
class Asked:
    """The signal that was handed on last, or 0; and whether a second Ctrl-C has killed the ranks."""

    signum: int = 0
    killed: bool = False

    def ended(self, code: int) -> int:
        """The signal that a rank which ended with this code (negative: a signal) has obeyed at once, or 0."""
        if self.killed:
            return signal.SIGINT
        return self.signum if self.signum and code in (-self.signum, 128 + self.signum) else 0


@contextmanager
def forwarding(folder: Path) -> Iterator[Asked]:
    """Hand signals on to the ranks that have met in `folder`, however long they then take to stop and save.

    A second Ctrl-C kills them at once. What is ignored here (SIGHUP under nohup) is not handed on.
    """
    from msmil.engine.preemption import second_interrupt

    asked = Asked()

    def send(signum: int) -> None:
        for file in folder.glob(f"*{_PID}"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(file.name.removesuffix(_PID)), signum)

    def forward(signum: int, _: object = None) -> None:
        asked.signum = _HANDED_ON[signal.Signals(signum)]
        (folder / _ASKED).write_text(str(asked.signum), encoding="utf-8")  # for ranks that have not met yet
        send(asked.signum)

    def kill() -> None:
        asked.killed = True
        send(signal.SIGKILL)

    taken = [signum for signum in _HANDED_ON if signal.getsignal(signum) is not signal.SIG_IGN]
    before = {signum: signal.signal(signum, forward) for signum in taken}
    try:
        with second_interrupt(kill):
            yield asked
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def meet(folder: Path) -> None:
    """A rank tells its launcher where signals go from now on, and hears of one that has come before.

    It leaves the terminal's group of processes: Ctrl-C comes through the launcher, once.
    """
    if os.getpgrp() != os.getpid():
        os.setsid()
    (folder / f"{os.getpid()}{_PID}").touch()
    with contextlib.suppress(FileNotFoundError):
        os.kill(os.getpid(), int((folder / _ASKED).read_text(encoding="utf-8")))
