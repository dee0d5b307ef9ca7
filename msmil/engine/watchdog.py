"""A rank that does not answer is named, and the others end, instead of waiting for it for ever.

Every rank tells the launcher's key-value store now and then that it lives and how far it is, in a thread of its own. A
rank that has waited for the others for `timeout_s` looks who has fallen silent (stopped, swapped out, its machine gone)
or behind (its main thread hangs somewhere), says it, and ends. It knows no backend: gloo would raise an error that
names nobody, and NCCL's own watchdog kills the process without a word of ours.
"""

from __future__ import annotations

import itertools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

EXIT_HUNG: Final = 75  # sysexits.h: a failure that passes, try again
END_GRACE_S: Final = 60.0  # how much later the backend's own timeout comes: a second net
_LARGEST_INTERVAL_S: Final = 10.0
_ANSWER_S: Final = 30.0  # of the store, at most
_SECOND_SPEAKER_S: Final = 5.0
_T = TypeVar("_T")


@dataclass(frozen=True)
class Beat:
    """What a rank told last: how often it has told something, how many waits it has begun, and where it runs."""

    count: int
    waits: int
    place: str

    def __str__(self) -> str:
        return f"{self.count} {self.waits} {self.place}"


def parse_beat(text: str) -> Beat:
    """The inverse of str()."""
    count, waits, place = text.split(" ", 2)
    return Beat(int(count), int(waits), place)


def verdict(before: Mapping[int, Beat], now: Mapping[int, Beat], waited_s: float) -> tuple[str, set[int]]:
    """Who is to blame for a wait, in words, and their ranks (empty where it cannot be told).

    Args:
        before: what each rank had told some time ago.
        now: what it has told by now.
        waited_s: seconds that were waited.
    """
    silent = {rank for rank, beat in now.items() if beat.count == before[rank].count}
    if silent:
        who, what = silent, f"did not answer within {waited_s:.0f} s"
    else:
        fewest, most = (choose(beat.waits for beat in now.values()) for choose in (min, max))
        if fewest == most:
            return f"no rank went on for {waited_s:.0f} s, and all answer: they wait for each other", set()
        who = {rank for rank, beat in now.items() if beat.waits == fewest}
        what = f"kept the others waiting for {waited_s:.0f} s (alive, but behind)"
    return f"rank {min(who)} ({now[min(who)].place}){_more(who)} {what}", who


def _more(who: set[int]) -> str:
    return f" and {len(who) - 1} more" if len(who) > 1 else ""


class Watchdog:
    """Watches the waits of this rank; `waiting()` says when it waits for the others.

    Attributes:
        log_file: of the run, once it is known.

    Args:
        rank, world: which rank this is, of how many.
        connect: makes a client of the launcher's store, for this thread alone.
        timeout_s: the longest wait.
    """

    def __init__(self, rank: int, world: int, connect: Callable[[], Any], *, timeout_s: float) -> None:
        self.rank, self.world, self.timeout_s = rank, world, timeout_s
        self.log_file: Path | None = None
        self._since_s: float | None = None
        self._depth, self._waits, self._count = 0, 0, 0
        self._over = threading.Event()
        self._place = f"pid {os.getpid()} on {socket.gethostname()}"
        self._store = connect()
        self._keys = [f"msmil/beat/{rank}" for rank in range(world)]
        self._answer_s = min(_ANSWER_S, timeout_s)
        self._meet()
        self._thread = threading.Thread(target=self._watch, name="msmil watchdog", daemon=True)
        self._thread.start()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What happens in here ends only when all ranks have come so far. May be nested: the outermost counts."""
        if self._depth == 0:
            self._since_s = time.monotonic()
            self._waits += 1
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._since_s = None

    def close(self) -> None:
        """Stop watching."""
        self._over.set()
        self._thread.join(_ANSWER_S)

    def _meet(self) -> None:
        """Tell, and wait until every rank has told something; one that has not is known by its number alone."""
        patience = timedelta(seconds=self.timeout_s)
        try:
            answered(self._tell, self._answer_s)
            try:
                answered(lambda: self._store.wait(self._keys, patience), self.timeout_s + self._answer_s)
            except RuntimeError:
                if silent := answered(self._silent, self._answer_s):  # else the last one has just come
                    who = f"rank {min(silent)}{_more(silent)}"
                    self._speak(f"{who} did not answer within {self.timeout_s:.0f} s of the start", silent, None)
        except (RuntimeError, TimeoutError):
            end(_no_store(self.timeout_s), None)

    def _silent(self) -> set[int]:
        return {rank for rank, key in enumerate(self._keys) if not self._store.check([key])}

    def _tell(self) -> None:
        self._count += 1
        self._store.set(self._keys[self.rank], str(Beat(self._count, self._waits, self._place)))

    def _heard(self) -> dict[int, Beat]:
        return {rank: parse_beat(value.decode()) for rank, value in enumerate(self._store.multi_get(self._keys))}

    def _watch(self) -> None:
        interval_s = min(_LARGEST_INTERVAL_S, self.timeout_s / 10)
        before: dict[int, Beat] | None = None
        since_s = None
        while not self._over.wait(interval_s):
            begun_s = self._since_s
            waited_s = 0.0 if begun_s is None else time.monotonic() - begun_s
            try:
                answered(self._tell, self._answer_s)
                if waited_s < self.timeout_s / 2:
                    before = None
                elif before is None or begun_s != since_s:  # a new wait has its own beginning
                    before, since_s = answered(self._heard, self._answer_s), begun_s
                elif waited_s > self.timeout_s:
                    self._speak(*verdict(before, answered(self._heard, self._answer_s), waited_s), begun_s)
                    before = None
            except (RuntimeError, TimeoutError):  # torch's DistStoreError and DistNetworkError, and ours
                if begun_s is None or begun_s != self._since_s:  # what it waited for has come
                    continue
                waited_s = time.monotonic() - begun_s
                if waited_s > self.timeout_s:
                    end(_no_store(waited_s), self.log_file)

    def _speak(self, text: str, blamed: set[int], begun_s: float | None) -> None:
        """The first rank that is not to blame has the word; the next ones follow only if it does not end the world."""
        innocent = [rank for rank in range(self.world) if rank not in blamed]
        if self.rank not in innocent[:1] and self._over.wait(_SECOND_SPEAKER_S):
            return
        if self._since_s == begun_s:  # it still waits
            end(text, self.log_file)


def answered(ask: Callable[[], _T], within_s: float) -> _T:
    """What `ask` gives, asked in a thread of its own: where the process that holds the store is stopped, as rank 0 may
    be, torch's client waits for ever, whatever its timeout.

    Raises:
        TimeoutError: there was no answer.
    """
    answer: Future[_T] = Future()

    def call() -> None:
        try:
            answer.set_result(ask())
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=call, name="msmil watchdog asks", daemon=True).start()
    return answer.result(within_s)


def _no_store(waited_s: float) -> str:
    return f"the store of the launcher (or of rank 0) did not answer within {waited_s:.0f} s"


def end(text: str, log_file: Path | None) -> NoReturn:
    """Say why, and end this process whatever its main thread waits for."""
    on_hang(text, log_file)
    os._exit(EXIT_HUNG)


def _on_stderr(text: str, log_file: Path | None) -> None:
    os.write(2, f"msmil: {text}\n".encode())
    if log_file is not None and log_file.exists():
        with log_file.open("a", encoding="utf-8") as file:
            file.write(f"msmil: {text}\n")


on_hang: Callable[[str, Path | None], None] = _on_stderr  # how it is said; a launcher of ours says it in another way


def connect_to_launcher() -> Any:
    """A client of the key-value store that the ranks met through, with a connection of its own."""
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=_ANSWER_S),
        wait_for_workers=False,
    )
    # a process may make one Runtime after another: each has beats of its own
    return PrefixStore(f"msmil/{next(_connections)}", store)


_connections = itertools.count()
