"""Progress of long work: a bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Protocol, TextIO

LINE_SHARE: Final = 0.1
SHORTEST_S: Final = 5.0
LONGEST_S: Final = 60.0


class Progress(Protocol):
    """Counts what is done."""

    def update(self, n: int = 1) -> object:
        """Report that `n` more are done."""


class _Quiet:
    def update(self, n: int = 1) -> None:
        pass


class _Lines:
    """A line per tenth of the work or per minute, and never two within five seconds: a log file stays readable."""

    def __init__(self, total: int, what: str, unit: str, stream: TextIO) -> None:
        self.total, self.what, self.unit, self.stream = total, what, unit, stream
        self.done = self.line_done = 0
        self.start_s = self.line_s = time.monotonic()

    def update(self, n: int = 1) -> None:
        self.done += n
        waited_s = time.monotonic() - self.line_s
        enough = self.done - self.line_done >= LINE_SHARE * self.total or waited_s >= LONGEST_S
        if waited_s >= SHORTEST_S and enough:
            self.write()

    def write(self) -> None:
        """Write what is done so far, and how long the rest takes at this speed."""
        self.line_s, self.line_done = time.monotonic(), self.done
        elapsed_s = self.line_s - self.start_s
        share = 100 * self.done // self.total if self.total else 100
        text = f"{self.what}: {self.done}/{self.total} {self.unit} ({share} %) in {elapsed_s:.0f} s"
        if 0 < self.done < self.total:
            text += f", about {elapsed_s * (self.total - self.done) / self.done:.0f} s left"
        print(text, file=self.stream, flush=True)


@contextmanager
def progress(total: int, what: str, unit: str, *, quiet: bool = False) -> Iterator[Progress]:
    """Show on stderr how far a piece of work is.

    Args:
        total: how many units there are.
        what: the work, for example "packing".
        unit: the plural of what is counted, for example "images".
        quiet: show nothing.
    """
    if quiet:
        yield _Quiet()
    elif sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, desc=what, unit=f" {unit}", file=sys.stderr, dynamic_ncols=True) as bar:
            yield bar
    else:
        lines = _Lines(total, what, unit, sys.stderr)
        yield lines
        lines.write()
