"""Who is to blame for a wait, and who says it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]

from msmil.engine import watchdog
from msmil.engine.watchdog import Beat, Watchdog, parse_beat, verdict

TIMEOUT_S = 1.0


def beats(*told: tuple[int, int]) -> dict[int, Beat]:
    return {rank: Beat(count, waits, f"pid {rank} on node") for rank, (count, waits) in enumerate(told)}


def test_a_beat_is_read_as_it_was_told() -> None:
    beat = Beat(3, 4, "pid 5 on a node")
    assert parse_beat(str(beat)) == beat


def test_a_silent_rank_is_blamed_before_one_that_is_behind() -> None:
    before, now = beats((5, 7), (5, 7), (5, 6)), beats((9, 7), (5, 7), (9, 6))
    assert verdict(before, now, 60) == ("rank 1 (pid 1 on node) did not answer within 60 s", {1})


def test_a_rank_that_is_alive_and_behind_is_blamed() -> None:
    text, blamed = verdict(beats((5, 7), (5, 6)), beats((9, 7), (9, 6)), 60)
    assert blamed == {1}
    assert text == "rank 1 (pid 1 on node) kept the others waiting for 60 s (alive, but behind)"


def test_several_are_counted() -> None:
    text, blamed = verdict(beats((5, 7), (5, 7), (5, 7)), beats((9, 7), (5, 7), (5, 7)), 60)
    assert blamed == {1, 2}
    assert text.startswith("rank 1 (pid 1 on node) and 1 more did not answer")


def test_where_all_wait_for_each_other_nobody_is_blamed() -> None:
    assert verdict(beats((5, 7), (5, 7)), beats((9, 7), (9, 7)), 60)[1] == set()


class Ended(Exception):
    """In place of the end of the process."""


class SilentStore:
    """A store that lets its clients wait for ever once it is silent, as that of a stopped process does."""

    def __init__(self) -> None:
        self.store, self.silent = HashStore(), threading.Event()

    def set(self, key: str, value: str) -> None:
        if self.silent.is_set():
            threading.Event().wait()
        self.store.set(key, value)

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        self.store.wait(keys, timeout)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[list[Watchdog], list[str]]]:
    """Three ranks in one process, and what was said."""
    store, said = HashStore(), []

    def end(text: str, log_file: Path | None) -> None:
        said.append(text)

    monkeypatch.setattr(watchdog, "end", end)
    made: dict[int, Watchdog] = {}

    def make(rank: int) -> None:
        made[rank] = Watchdog(rank, 3, lambda: store, timeout_s=TIMEOUT_S)

    threads = [threading.Thread(target=make, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    yield [made[rank] for rank in range(3)], said
    for one in made.values():
        one.close()


def test_a_rank_that_fell_silent_is_named_by_the_first_one_that_waits(world: Any) -> None:
    ranks, said = world
    ranks[0].close()  # tells nothing any more
    with ranks[1].waiting(), ranks[2].waiting():
        time.sleep(2.5 * TIMEOUT_S)
    assert len(said) >= 1
    assert all(text.startswith("rank 0 (pid ") and "did not answer within" in text for text in said)


def test_a_rank_that_tells_nothing_at_the_start_is_named_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    store, said = HashStore(), []
    monkeypatch.setattr(watchdog, "end", lambda text, log_file: said.append(text))
    Watchdog(0, 2, lambda: store, timeout_s=TIMEOUT_S).close()
    assert said == ["rank 1 did not answer within 1 s of the start"]


def test_a_store_that_does_not_answer_is_named_where_rank_0_may_hold_it(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(watchdog, "end", lambda text, log_file: said.append(text))
    store = SilentStore()
    one = Watchdog(0, 1, lambda: store, timeout_s=TIMEOUT_S)
    store.silent.set()
    with one.waiting():
        time.sleep(2 * TIMEOUT_S)
    one.close()
    assert said
    assert said[0].startswith("the store of the launcher (or of rank 0) did not answer within")


def test_a_rank_that_does_not_come_is_named_although_it_answers(world: Any) -> None:
    ranks, said = world
    with ranks[0].waiting(), ranks[2].waiting():
        time.sleep(2 * TIMEOUT_S)
    assert said
    assert said[0].startswith("rank 1 (")
    assert "alive, but behind" in said[0]


def test_many_short_waits_and_long_work_between_them_are_no_hang(world: Any) -> None:
    ranks, said = world
    end_s = time.monotonic() + 2 * TIMEOUT_S
    while time.monotonic() < end_s:
        with ExitStack() as stack:
            for rank in ranks:
                stack.enter_context(rank.waiting())
                stack.enter_context(rank.waiting())  # nested
            time.sleep(TIMEOUT_S / 5)
    time.sleep(1.5 * TIMEOUT_S)  # nobody waits
    assert said == []
