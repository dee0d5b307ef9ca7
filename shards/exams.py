"""Whole exams in a global batch. numpy only.

M samples, E exams, T places for exams in order, G global batches.

How many exams of which size a batch holds is decided by the sizes alone, once for all epochs; which exams these are,
by the epoch's shuffle. So every epoch has the same number of batches and the same padding.
"""

from __future__ import annotations

import heapq
from array import array
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.shuffle import Int32, Shuffle


@dataclass(frozen=True, kw_only=True, eq=False)
class Packing:
    """The size of the exam at each place [T], batch after batch, and how many samples each batch holds [G]."""

    size_T: Int32
    filled_G: Int32


@dataclass(frozen=True, kw_only=True, eq=False)
class Exams:
    """Samples by exam: exam e is `sample_M[start_E[e] : start_E[e] + size_E[e]]`."""

    sample_M: Int32
    start_E: Int32
    size_E: Int32

    @classmethod
    def of(cls, exam_M: NDArray[np.integer[Any]]) -> Exams:
        """From the exam's number of each sample; numbers may have gaps."""
        count = np.bincount(exam_M)
        size_E = count[count > 0].astype(np.int32)
        sample_M = np.argsort(exam_M, kind="stable").astype(np.int32)
        return cls(sample_M=sample_M, start_E=(np.cumsum(size_E) - size_E).astype(np.int32), size_E=size_E)

    def packing(self, batch_size: int) -> Packing:
        """How exams of these sizes share out batches; the largest fits one."""
        sizes, counts = np.unique(self.size_E, return_counts=True)
        return _pack(tuple(sizes.tolist()), tuple(counts.tolist()), batch_size)


def place_exams(exams: Exams, shard_M: NDArray[np.integer[Any]], batch_size: int, shuffle: Shuffle) -> Int32:
    """Samples of all places of an epoch, [G * batch_size]; padding repeats samples of its own batch."""
    packing = exams.packing(batch_size)
    order_E = shuffle(shard_M[exams.sample_M[exams.start_E]])
    exam_T = np.empty_like(order_E)
    for size in np.unique(packing.size_T):
        exam_T[packing.size_T == size] = order_E[exams.size_E[order_E] == size]
    before_T = np.cumsum(packing.size_T, dtype=np.int32) - packing.size_T  # samples of earlier places
    # The k-th sample of all places comes from here, and goes there: each batch before it adds its padding.
    padding_G = np.cumsum(batch_size - packing.filled_G) - (batch_size - packing.filled_G)
    k = np.arange(len(exams.sample_M), dtype=np.int32)
    placed = exams.sample_M[k + np.repeat(exams.start_E[exam_T] - before_T, packing.size_T)]
    place = np.empty(len(packing.filled_G) * batch_size, np.int32)
    place[k + np.repeat(padding_G.astype(np.int32), packing.filled_G)] = placed
    place_GB = place.reshape(-1, batch_size)
    padded = np.flatnonzero(packing.filled_G < batch_size)
    again = np.arange(batch_size) % packing.filled_G[padded, None]
    place_GB[padded] = np.take_along_axis(place_GB[padded], again, axis=1)
    return place


@lru_cache(maxsize=4)
def _pack(sizes: tuple[int, ...], counts: tuple[int, ...], batch_size: int) -> Packing:
    """Fill batch after batch, each time with the size that lags behind most, among those that still fit.

    Sizes are used up evenly, so that a batch is like a random draw of exams; a batch is closed when it is full or no
    exam that is left would fit.
    """
    assert sizes[-1] <= batch_size
    if len(sizes) == 1:
        every = np.full(counts[0], sizes[0], np.int32)
        return _packing(every, np.arange(counts[0], dtype=np.int32) // (batch_size // sizes[0]))
    size_T, batch_T = array("i"), array("i")  # compact: one entry per exam
    total = dict(zip(sizes, counts, strict=True))
    placed = dict.fromkeys(sizes, 0)
    lagging = [(0.5 / total[size], size) for size in sizes]
    heapq.heapify(lagging)
    batch = 0
    while lagging:
        left, too_large = batch_size, []
        while lagging and left:
            size = lagging[0][1]
            if size > left:
                too_large.append(heapq.heappop(lagging))
                continue
            size_T.append(size)
            batch_T.append(batch)
            left -= size
            placed[size] += 1
            if placed[size] < total[size]:
                heapq.heapreplace(lagging, ((placed[size] + 0.5) / total[size], size))
            else:
                heapq.heappop(lagging)
        for waiting in too_large:
            heapq.heappush(lagging, waiting)
        batch += 1
    return _packing(np.frombuffer(size_T, np.int32), np.frombuffer(batch_T, np.int32))


def _packing(size_T: Int32, batch_T: Int32) -> Packing:
    filled_G = np.bincount(batch_T, weights=size_T).astype(np.int32)
    filled_G.setflags(write=False)  # shared by all epochs
    return Packing(size_T=size_T, filled_G=filled_G)
