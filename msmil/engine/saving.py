"""Saving beside the training: rank 0 copies to host memory, and a thread of its writes while the next steps run.

The next save, a stop and the end wait for it. When it fails, the flag travels with the loss of the next step, and all
ranks stop with the one word.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self


class Saver:
    """Writes one checkpoint at a time, and knows when the next one is due by the clock.

    Used as a context, it waits at the end for what is being written, but not where a person interrupts.

    Attributes:
        written_s: seconds that the last write took, None before.
    """

    def __init__(self, *, every_minutes: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.written_s: float | None = None
        self._every_s = every_minutes * 60
        self._clock = clock
        self._last_s = clock()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def due(self) -> bool:
        """Whether the time since the last save is over (`checkpoint.every_minutes`; 0: never)."""
        return 0 < self._every_s <= self._clock() - self._last_s

    @property
    def failed(self) -> bool:
        """Whether something could not be written; `wait` raises the error."""
        return self._error is not None

    def fail(self, error: Exception) -> None:
        """Something else that this rank writes, such as the curves, could not be: all stop as for a checkpoint."""
        self._error = self._error or error

    def begin(self, write: Callable[[], object]) -> None:
        """Start writing; what was begun before has been waited for."""
        assert self._thread is None
        self._last_s = self._clock()
        # a daemon: a person who interrupts twice does not wait, and what is half written has no name yet
        self._thread = threading.Thread(target=self._write, args=(write,), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for what is being written, and raise the error that it ended with."""
        self._join()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or not issubclass(kind, KeyboardInterrupt):
            self._join()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, write: Callable[[], object]) -> None:
        start_s = time.perf_counter()
        try:
            write()
            self.written_s = time.perf_counter() - start_s
        except BaseException as error:
            self._error = error
