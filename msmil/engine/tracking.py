"""What a person watches while it trains: TensorBoard, the log, the progress lines. Rank 0 only."""

from __future__ import annotations

import logging
import re
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Final

import torch
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter, summary
from tqdm.contrib.logging import logging_redirect_tqdm

from shards.errors import UserError
from shards.progress import Progress, progress

log = logging.getLogger("msmil")

# communication: of losses, behind the last backward, in which the ranks exchange gradients
PHASES: Final = ("wait", "forward", "backward", "communication", "optimizer")


def open_log(file: Path | None, *, quiet: bool = False) -> None:
    """Send the log to stderr and, on rank 0, to log.txt. Other ranks (file None) log errors alone."""
    log.handlers.clear()
    log.propagate = False
    log.setLevel(logging.INFO if file is not None else logging.ERROR)
    console = logging.StreamHandler(sys.stderr)
    console.setFormatter(logging.Formatter("%(message)s"))
    console.setLevel(logging.WARNING if quiet else logging.INFO)
    log.addHandler(console)
    if file is not None:
        try:
            handler = _LogFile(file, encoding="utf-8")
        except OSError as error:
            fix = "make the run folder writable"
            raise UserError(f"the log cannot be written ({error.strerror})", file=file, fix=fix) from None
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(handler)


class _LogFile(logging.FileHandler):
    """A log on a full disk loses lines, and says nothing more: the save that follows gives the reason."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Instead of logging's traceback."""


class PhaseTimer:
    """Seconds of each phase of a step. The device is waited for only in steps whose times are shown."""

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self._synchronize = synchronize
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.exact = False
        self._last = time.perf_counter()

    def start(self, *, exact: bool) -> None:
        """Begin a step."""
        self.exact = exact
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._tick()

    def mark(self, phase: str) -> None:
        """Count the time since the last mark to a phase."""
        last = self._last
        self._tick()
        self.seconds[phase] += self._last - last

    @property
    def total_s(self) -> float:
        """Seconds of the step so far."""
        return sum(self.seconds.values())

    def _tick(self) -> None:
        if self.exact:
            self._synchronize()
        self._last = time.perf_counter()


class Tracker:
    """Writes scalars, text and the log of one run; continues its curves from a step without overlap.

    `failed` is told the error where curves cannot be written, since the other ranks, which write none, have to hear it.
    """

    def __init__(
        self, folder: Path, *, start_step: int, total_steps: int, failed: Callable[[UserError], object]
    ) -> None:
        # events of steps that are trained again are dropped, so that a resumed curve does not overlap
        _date_before(folder, int(time.time()))
        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1, flush_secs=10)
        self._folder, self._failed = folder, failed
        _hush_full_disk()
        self._start_step = start_step
        self._total_steps = total_steps
        self._stack = ExitStack()
        self._bar: Progress | None = None

    def open_progress(self, *, quiet: bool = False) -> None:
        """Show the progress over all steps of the run."""
        if sys.stderr.isatty() and not quiet:
            self._stack.enter_context(logging_redirect_tqdm([log]))
        context: AbstractContextManager[Progress] = progress(self._total_steps, "training", "steps", quiet=quiet)
        self._bar = self._stack.enter_context(context)
        self._bar.update(self._start_step)

    def advance(self) -> None:
        """One more step is done."""
        if self._bar is not None:
            self._bar.update(1)

    def text(self, name: str, text: str) -> None:
        """A text, such as the configuration."""
        self._writer.add_text(name, f"```\n{text}\n```", 0)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Scalars of one step (1-based: the number of finished steps)."""
        self.add([summary.scalar(name, value) for name, value in values.items()], step)

    def add(self, summaries: Iterable[Summary], step: int) -> None:
        """Anything that TensorBoard shows, at a step."""
        try:
            for one in summaries:
                self._writer._get_file_writer().add_summary(one, step)
        except OSError as error:
            fix = "free space or choose another output_dir, then start the same command again: it resumes"
            self._failed(UserError(f"curves cannot be written ({error})", file=self._folder, fix=fix))

    def close(self) -> None:
        """Flush and end."""
        self._stack.close()
        try:
            self._writer.close()
        except OSError as error:  # must not hide the reason for which the run ends
            print(f"msmil: the last curves could not be written ({error})", file=sys.stderr)


def _date_before(folder: Path, now_s: int) -> None:
    """TensorBoard reads event files in the order of their names, which begin with the second of their start.

    Those of earlier starts get an earlier one where it does not lie before this start: two starts within a second, or
    another machine, whose clock is behind. Read in the wrong order, a start would drop what came after it.
    """
    later_s = now_s
    for file in sorted(folder.glob("events.out.tfevents.*"), reverse=True):
        named = re.fullmatch(r"(events\.out\.tfevents)\.(\d+)\.(.+)", file.name)
        if named is None:
            continue
        stamp_s = int(named[2])
        if stamp_s >= later_s:
            stamp_s = later_s - 1
            while (other := folder / f"{named[1]}.{stamp_s:010d}.{named[3]}").exists():
                stamp_s -= 1
            file.rename(other)
        later_s = stamp_s


def _hush_full_disk() -> None:
    """TensorBoard writes in a thread of its own, whose OSError would be a traceback; the next scalar says it."""
    otherwise = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not issubclass(args.exc_type, OSError):
            otherwise(args)

    threading.excepthook = hook


def memory_bytes(device: torch.device) -> int:
    """Peak memory: of the GPU since the start, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
