"""Tasks over processes: results in order, one error for all, and nobody left running."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest

from shards.errors import UserError
from shards.pool import run_tasks


def double(task: int, tick: Callable[[], object]) -> int:
    tick()
    time.sleep(0.05 if task == 0 else 0)
    return 2 * task


def fail_at_three(task: int, tick: Callable[[], object]) -> int:
    """The third task fails; the others would run for minutes if nothing stopped them."""
    if task == 3:
        raise UserError("broken", fix="mend it", file="x")
    for _ in range(6000):
        tick()
        time.sleep(0.02)
    return task


def die(task: int, tick: Callable[[], object]) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return task


@pytest.mark.parametrize("processes", [1, 3])
def test_results_come_in_the_order_of_the_tasks(processes: int) -> None:
    tasks = list(range(20))
    results = run_tasks(double, tasks, processes=processes, what="doubling", unit="tasks", total=20, quiet=True)
    assert results == [2 * task for task in tasks]


def test_progress_counts_what_was_done_before_and_what_processes_do(capsys: pytest.CaptureFixture[str]) -> None:
    run_tasks(double, [1, 2, 3], processes=2, what="doubling", unit="tasks", total=10, done=7)
    assert capsys.readouterr().err.startswith("doubling: 10/10 tasks (100 %)")


def test_no_tasks_are_no_work() -> None:
    assert run_tasks(double, [], processes=4, what="doubling", unit="tasks", total=0, quiet=True) == []


def test_an_error_stops_the_others_and_arrives_as_it_was() -> None:
    start_s = time.monotonic()
    with pytest.raises(UserError, match="broken") as caught:
        run_tasks(fail_at_three, [0, 3], processes=2, what="failing", unit="tasks", total=2, quiet=True)
    assert (caught.value.fix, caught.value.file) == ("mend it", "x")
    assert time.monotonic() - start_s < 30


def test_a_process_that_is_killed_is_an_error_with_a_way_on() -> None:
    with pytest.raises(UserError, match=r"a process died while packing .* Fix: run the same command again"):
        run_tasks(die, [0, 1], processes=2, what="packing", unit="images", total=2, quiet=True)
