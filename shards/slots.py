"""Memory for the images of batches, used again and again.

A page of memory that a process touches for the first time costs the kernel more than the pixels that are written to
it: twice for batches of decoding processes, which write them and the training process, which maps them. So each
decoding process writes into a few slots of shared memory, made once. S slots, B images, H W pixels, R bytes of room.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Mapping
from math import prod
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from numpy.typing import NDArray

from shards.codecs import LEAD_BYTES, Pixels
from shards.types import Batch

# A batch that the training process works on, and one that it makes ready.
_IN_USE: Final = 2

_OF_THIS_PROCESS: Final = ("_taken", "_rooms", "_images", "_free", "_given")

_numbers = itertools.count()
_open: weakref.WeakValueDictionary[int, Slots] = weakref.WeakValueDictionary()


def slots_for(prefetch_batches: int) -> int:
    """How many slots a decoding process needs that keeps so many batches ready."""
    return prefetch_batches + _IN_USE


def room_bytes(shape_b1hw: tuple[int, ...], dtype: str) -> int:
    """The memory that images are decoded into (`shards.codecs.decode_into`)."""
    return LEAD_BYTES + prod(shape_b1hw) * np.dtype(dtype).itemsize


def images_in(room_R: NDArray[np.uint8], shape_b1hw: tuple[int, ...], dtype: npt.DTypeLike) -> Pixels:
    """The images that such memory holds."""
    pixels_B1HW: Pixels = room_R[LEAD_BYTES:].view(dtype).reshape(shape_b1hw)
    return pixels_B1HW


class Slots:
    """Slots for batches of one size, some for each writer.

    A writer claims a free slot and writes; the reader takes it as a tensor, and it is free again when nothing refers
    to that tensor, a view of it included. Where a reader keeps more batches than there are slots, `claim` finds none,
    and the writer takes fresh memory. It pickles into processes that are being started, as shared memory.

    Args:
        shape_b1hw: of the images of a whole batch.
        dtype: uint8 or uint16.
        writers: processes that write; 1 where this process does.
        per_writer: slots of each.
        shared: writers are other processes.
    """

    def __init__(self, shape_b1hw: tuple[int, ...], dtype: str, *, writers: int, per_writer: int, shared: bool) -> None:
        self._shape, self._dtype, self._per_writer = shape_b1hw, np.dtype(dtype), per_writer
        num_bytes = room_bytes(shape_b1hw, dtype)
        aligned = -(-num_bytes // LEAD_BYTES) * LEAD_BYTES
        self._memory_SR = torch.empty((writers * per_writer, aligned), dtype=torch.uint8)[:, :num_bytes]
        self._taken_S = torch.zeros(writers * per_writer, dtype=torch.uint8)
        if shared:
            self._memory_SR.share_memory_()
            self._taken_S.share_memory_()
        self._number = next(_numbers)
        self._view()
        _open[self._number] = self

    def _view(self) -> None:
        """See the memory as arrays: a tensor takes longer to say where a slot lies."""
        self._taken = self._taken_S.numpy()
        self._rooms: list[NDArray[np.uint8]] = [room_R.numpy() for room_R in self._memory_SR]
        self._images = [images_in(room_R, self._shape, self._dtype) for room_R in self._rooms]
        self._free = [functools.partial(_free, self._taken, slot) for slot in range(len(self._rooms))]
        self._given: list[weakref.ref[Pixels] | None] = [None] * len(self._rooms)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in _OF_THIS_PROCESS}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        self._view()

    def claim(self, writer: int) -> int | None:
        """A free slot of this writer, taken from now on; None where there is none."""
        start = writer * self._per_writer
        free = self._taken[start : start + self._per_writer].tobytes().find(0)
        if free < 0:
            return None
        self._taken[start + free] = 1
        return start + free

    def room(self, slot: int) -> NDArray[np.uint8]:
        """The memory of a slot, to be written: LEAD_BYTES, then its images."""
        return self._rooms[slot]

    def tensor(self, slot: int, images: int) -> torch.Tensor:
        """The same as a tensor; with the last reference to it the slot is free."""
        pixels_B1HW = self._images[slot][:images]
        # the tensor's storage, which all its views share, holds this one array
        self._given[slot] = weakref.ref(pixels_B1HW, self._free[slot])
        return torch.from_numpy(pixels_B1HW)

    def filled(self, slot: int, batch: Batch) -> Batch:
        """A batch of this process with the images of a slot."""
        batch.image_B1HW = self.tensor(slot, batch.sample_B.shape[0])
        return batch

    def sent(self, slot: int, batch: Batch) -> SentBatch:
        """A batch of a writer, the images of which are found in a slot where it is unpickled."""
        return SentBatch(self._number, slot, batch)


class SentBatch:
    """A batch on its way from a decoding process; it unpickles as the batch with the images of its slot.

    The few numbers of its samples travel as bytes: each tensor would take a file of shared memory of its own, and a
    connection by which it is handed over, which cost more than they do.
    """

    def __init__(self, slots: int, slot: int, batch: Batch) -> None:
        assert batch.image_B1HW is None
        self._slots, self._slot, self._batch = slots, slot, batch

    def __reduce__(self) -> tuple[object, tuple[Any, ...]]:
        batch = self._batch
        numbers = [tensor.numpy() for tensor in (batch.label_BK, batch.weight_B, batch.sample_B)]
        return _arrived, (self._slots, self._slot, numbers, batch.levels, batch.skipped)


def _arrived(
    slots: int,
    slot: int,
    numbers: list[NDArray[Any]],
    levels: dict[int, torch.Tensor] | None,
    skipped: Mapping[int, str],
) -> Batch:
    label_BK, weight_B, sample_B = map(torch.from_numpy, numbers)
    return _open[slots].filled(slot, Batch(None, label_BK, weight_B, sample_B, levels, skipped))


def _free(taken_S: NDArray[np.uint8], slot: int, _: object) -> None:
    taken_S[slot] = 0
