"""Signals: a handler only sets a flag; ranks agree on it with the loss of a step, and stop together behind it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any, Final

STOPPING: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class Stopped(Exception):  # noqa: N818 - no error: the run is saved and goes on later
    """All ranks stopped at the same step boundary, and the state is saved.

    Attributes:
        signum: the signal that asked for it.
        step: optimizer steps that are done.
    """

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} behind step {step}")
        self.signum, self.step = signum, step


class StopRequest:
    """Whether a signal has asked this process to stop; 0 or the signal's number.

    Args:
        at_second: called in a thread at the second Ctrl-C; by default the process ends at once.
    """

    def __init__(self, at_second: Callable[[], object] = lambda: os._exit(128 + signal.SIGINT)) -> None:
        self.signum = 0
        self._at_second = at_second
        self._stack = ExitStack()
        self._before: dict[int, Any] = {}

    def watch(self) -> None:
        """Take over the signals by which schedulers, launchers and people stop a job."""
        for signum in STOPPING:
            self._before[signum] = signal.signal(signum, self._note)
        self._stack.enter_context(second_interrupt(self._at_second))

    def restore(self) -> None:
        """Give them back."""
        self._stack.close()
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before.clear()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum


@contextmanager
def second_interrupt(action: Callable[[], object]) -> Iterator[None]:
    """Call `action` in a thread at the second Ctrl-C from now on.

    A handler would not do: Python runs none while the main thread waits in a collective for a rank that hangs.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)  # gets a byte for each signal, at once
    thread = threading.Thread(target=_count_interrupts, args=(reading, action), name="second-ctrl-c", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writing)
        thread.join()
        os.close(reading)


def _count_interrupts(reading: int, action: Callable[[], object]) -> None:
    seen = 0
    while signals := os.read(reading, 64):
        before, seen = seen, seen + signals.count(signal.SIGINT)
        if before < 2 <= seen:
            action()
