"""One micro-batch ahead on a GPU: the next one is copied while the current one computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from shards.errors import UserError
from shards.types import Batch

T = TypeVar("T")
Copying = tuple[Batch, Batch, torch.cuda.Event]
"""The batch on the host, which has to live until it is copied; its copy; what says that the copy is there."""


def on_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches in the same order; on a GPU their tensors lie on it, but for sample_B, which the host reads.

    Pinned batches are copied on a stream of their own, while what was launched before computes.
    """
    if device.type != "cuda":
        return batches
    copies = _Copies(device)
    return one_ahead(batches, copies.start, copies.finish)


def one_ahead(batches: Iterator[Batch], start: Callable[[Batch], T], finish: Callable[[T], Batch]) -> Iterator[Batch]:
    """Call `start` on the next batch before the current one, `finish`ed, is handed over.

    A UserError of the batches is raised in its place: behind the batches that came before it.
    """
    current: T | None = None
    while True:
        try:
            batch = next(batches, None)
        except UserError:
            if current is not None:
                yield finish(current)
            raise
        following = None if batch is None else start(batch)
        if current is not None:
            yield finish(current)
        if following is None:
            return
        current = following


class _Copies:
    """Copies to one GPU on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def start(self, batch: Batch) -> Copying:
        """Begin to copy a batch; the host goes on."""
        with torch.cuda.stream(self._stream):
            copy = _each(batch, lambda tensor: tensor.to(self._device, non_blocking=True))
            return batch, copy, self._stream.record_event()

    def finish(self, copying: Copying) -> Batch:
        """The copy, for work that is launched from here on: it waits for the copy, on the device."""
        _, copy, copied = copying
        computing = torch.cuda.current_stream(self._device)
        computing.wait_event(copied)

        def used(tensor: Tensor) -> Tensor:
            # allocated on the copying stream, which must not use the memory again before the work on it is done
            tensor.record_stream(computing)
            return tensor

        return _each(copy, used)


def _each(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    return replace(
        batch,
        image_B1HW=None if batch.image_B1HW is None else change(batch.image_B1HW),
        label_BK=change(batch.label_BK),
        weight_B=change(batch.weight_B),
        levels=None if batch.levels is None else {level: change(x) for level, x in batch.levels.items()},
    )
