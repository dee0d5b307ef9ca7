"""A list of tasks over processes, with a count of what is done; the processes end when their parent is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from shards.errors import UserError
from shards.progress import progress

Task = TypeVar("Task")
Result = TypeVar("Result")

_LOOK_EVERY_S: Final = 0.2


class StoppedError(Exception):
    """Another task failed, so that this one need not go on."""


@dataclass(slots=True)
class _Shared:
    """What a worker process shares with its parent: how many are done, and whether to stop."""

    done: Any
    stop: Any


_shared: _Shared | None = None


def default_processes() -> int:
    """As many as this process may use cores."""
    return len(os.sched_getaffinity(0))


def run_tasks(
    function: Callable[[Task, Callable[[], object]], Result],
    tasks: Sequence[Task],
    *,
    processes: int,
    what: str,
    unit: str,
    total: int,
    done: int = 0,
    quiet: bool = False,
) -> list[Result]:
    """Call `function(task, tick)` for every task; results come in the order of the tasks.

    Args:
        function: a function of a module, since other processes import it; it calls `tick()` once per unit done.
        tasks: its arguments.
        processes: how many at a time; 1 works in this process.
        what: the work, for the progress display.
        unit: what is counted.
        total: how many units there are in all.
        done: how many of them were done before.
        quiet: show no progress.

    Raises:
        UserError: the first that a task raised; tasks that run stop at their next tick.
    """
    with progress(total, what, unit, quiet=quiet) as shown:
        shown.update(done)
        processes = min(processes, len(tasks))
        if processes <= 1:
            return [function(task, shown.update) for task in tasks]
        context = multiprocessing.get_context("spawn")
        shared = _Shared(done=context.Value("q", 0), stop=context.Event())
        pool = ProcessPoolExecutor(processes, context, initializer=_start, initargs=(shared,))
        seen = 0
        try:
            futures = [pool.submit(_call, function, task) for task in tasks]
            left: set[Future[Result]] = set(futures)
            while left:
                finished, left = wait(left, timeout=_LOOK_EVERY_S, return_when=FIRST_EXCEPTION)
                shown.update(shared.done.value - seen)
                seen = shared.done.value
                for future in finished:
                    future.result()
            return [future.result() for future in futures]
        except BrokenProcessPool as error:
            fix = "run the same command again, with fewer --processes if memory was short"
            raise UserError(f"a process died while {what} (killed, or out of memory)", fix=fix) from error
        finally:
            shared.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)


def _call(function: Callable[[Task, Callable[[], object]], Result], task: Task) -> Result:
    return function(task, _tick)


def _tick() -> None:
    assert _shared is not None
    if _shared.stop.is_set():
        raise StoppedError
    with _shared.done.get_lock():
        _shared.done.value += 1


def _start(shared: _Shared) -> None:
    """First thing in a worker: a Ctrl-C is the parent's to handle, and without a parent there is nothing to do."""
    global _shared  # noqa: PLW0603 -- set once, before the first task
    _shared = shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="end-with-parent", daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
