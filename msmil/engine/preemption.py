"""Signals: a handler only sets a flag; ranks agree on it with the loss of a step, and stop together behind it."""

from __future__ import annotations

import signal
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

    A second Ctrl-C is obeyed at once.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._before: dict[int, Any] = {}

    def watch(self) -> None:
        """Take over the signals by which schedulers, launchers and people stop a job."""
        for signum in STOPPING:
            self._before[signum] = signal.signal(signum, self._note)

    def restore(self) -> None:
        """Give them back."""
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before.clear()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self.signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = signum
