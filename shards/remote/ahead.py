"""Samples of coming batches, fetched in threads before they are used. M rows in the order of use."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from shards.errors import UserError
from shards.members import Place, Places
from shards.remote.coming import Coming
from shards.remote.folder import LEAST_BATCHES
from shards.remote.members import GAP_BYTES, RemoteMembers

_THREADS: Final = 4
# Of a request: more would keep the first of its samples waiting.
_REQUEST_BYTES: Final = 16 << 20
# What is fetched ahead in one sweep over the shards; two sweeps are on their way.
_SWEEP_BYTES: Final = 2 << 30


class Group(NamedTuple):
    """Places of one shard, close together, in the order of their offsets; the first and last batch that need them."""

    first: int
    last: int
    places: list[Place]


class Ahead:
    """Fetches for one process, in step with the others of its machine, whom it finds in the cache.

    The coming batches are swept over in growing pieces: the first batch alone, that the start be quick, then more and
    more of them together, that many of their samples are neighbours. Every process of the machine that has the same
    rows makes the same pieces of them, and takes those that nobody has taken.

    Args:
        members: what fetches.
        places: of rows.
        coming: rows that are going to be read.
        sample_bytes: of a sample, about.
    """

    def __init__(
        self,
        members: RemoteMembers,
        places: Callable[[npt.NDArray[np.int64]], Places],
        coming: Coming,
        sample_bytes: float,
    ) -> None:
        self._members = members
        self._places = places
        self._row_M = coming.row_M
        self._size = coming.size
        limit_bytes = members.remote.options.limit_bytes
        budget_bytes = min(_SWEEP_BYTES, limit_bytes // LEAST_BATCHES)
        self._most_batches = max(1, int(budget_bytes / (coming.size * sample_bytes)))
        self._groups = self._plan()
        self._position = 0
        self._stopped = False
        self._moved = threading.Condition()
        self._threads = [
            threading.Thread(target=self._work, name=f"fetch-ahead-{i}", daemon=True) for i in range(_THREADS)
        ]
        for thread in self._threads:
            thread.start()

    def reach(self, batch: int) -> None:
        """This process is at a batch."""
        with self._moved:
            self._position = batch
            self._moved.notify_all()

    def stop(self) -> None:
        """End the threads: those that wait at once, those inside a request when it ends."""
        with self._moved:
            self._stopped = True
            self._moved.notify_all()
        self._members.stop()
        for thread in self._threads:
            thread.join(timeout=1.0)

    def _work(self) -> None:
        while (group := self._next()) is not None:
            try:
                self._members.fetch(group.places)
            except UserError:
                # It is fetched again, and the error told, by the reader who needs it, in its place in the order.
                continue

    def _next(self) -> Group | None:
        """The next group, once this process is so far that it may be fetched; None at the end."""
        with self._moved:
            while not self._stopped:
                found = next(self._groups, None)
                if found is None:
                    return None
                gate, group = found
                while self._position < gate and not self._stopped:
                    self._moved.wait()
                if group.last >= self._position and not self._stopped:
                    return group
        return None

    def _plan(self) -> Iterator[tuple[int, Group]]:
        """Groups, with the batch from which on each may be fetched: the start of the sweep before its own."""
        batches = -(-len(self._row_M) // self._size)
        gate, start, count = 0, 0, 1
        while start < batches:
            stop = min(batches, start + count)
            for group in self._sweep(start, stop):
                yield gate, group
            gate, start, count = start, stop, min(2 * count, self._most_batches)

    def _sweep(self, start: int, stop: int) -> list[Group]:
        """What batches start..stop need, in groups, those first that are needed first."""
        row_M = self._row_M[start * self._size : stop * self._size]
        row_U, first_U = np.unique(row_M, return_index=True)
        found = self._places(row_U)
        order = np.lexsort((found.offset_M, found.shard_M))
        batch_U = start + first_U // self._size
        groups: list[Group] = []
        for i in order.tolist():
            place = Place(
                int(found.shard_M[i]),
                int(found.offset_M[i]),
                int(found.num_bytes_M[i]),
                found.sha256_M32[i].tobytes(),
            )
            batch = int(batch_U[i])
            if groups and _belongs(place, groups[-1].places):
                first, last, places = groups[-1]
                places.append(place)
                groups[-1] = Group(min(first, batch), max(last, batch), places)
            else:
                groups.append(Group(batch, batch, [place]))
        return sorted(groups, key=lambda group: group.first)


def _belongs(place: Place, places: list[Place]) -> bool:
    """Whether a place is read in one request with those before it."""
    before, start = places[-1], places[0].offset_bytes
    end = place.offset_bytes + place.num_bytes
    near = place.offset_bytes - before.offset_bytes - before.num_bytes <= GAP_BYTES
    return place.shard == before.shard and near and end - start <= _REQUEST_BYTES
