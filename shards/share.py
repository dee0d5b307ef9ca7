"""Rows made into batches: read, decoded and put together, in a decoding process or in this one.

B images, H W pixels, R bytes of room for them, K labels, M samples of this rank in order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from shards.codecs import LEAD_BYTES
from shards.errors import UserError
from shards.feature_codec import TYPES
from shards.feature_reader import FeatureReader
from shards.features import Features
from shards.manifest import Manifest
from shards.plan import worker_batches
from shards.reader import ShardReader
from shards.remote.coming import Coming, coming
from shards.slots import SentBatch, Slots, images_in, room_bytes, slots_for
from shards.types import Batch

# The few numbers of so many batches are looked up at once: a batch's alone take longer than reading an image's bytes.
_AT_ONCE: Final = 64


@dataclass(frozen=True, slots=True)
class Failure:
    """A UserError on its way out of a decoding process: a DataLoader keeps only the text of an exception."""

    thing: str
    fix: str
    file: str | None


class _Numbers(NamedTuple):
    """What a batch is but for its images and features: rows of the manifest, labels int8, weights, and rows again."""

    row_B: list[int]
    label_BK: torch.Tensor
    weight_B: torch.Tensor
    sample_B: torch.Tensor


class Share(IterableDataset[Batch | SentBatch | Failure]):
    """Rows cut into batches of `size`; a decoding process makes whole batches of them, in turn with the others.

    A process gets the rows of this rank, whether each counts, and the name of the manifest's folder: five bytes a row.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        labels: Sequence[str],
        row_M: NDArray[np.int32],
        counts_M: NDArray[np.bool_],
        size: int,
        features: Features | None = None,
        images: bool = True,
        on_error: Literal["stop", "skip"] = "stop",
    ) -> None:
        assert images or features is not None
        manifest.label_NK(labels, row_M[:0])  # an unknown label is said here, before a process starts
        self.manifest = manifest.packed()
        self.labels = tuple(labels)
        self.skips = on_error == "skip"
        self.features = features
        self.images = images
        self.row_M = row_M
        self.counts_M = counts_M
        self.size = size
        self._shape = (size, 1, manifest.height_px, manifest.width_px)
        self.num_batches = -(-len(row_M) // size)
        image_bytes = manifest.height_px * manifest.width_px * np.dtype(manifest.dtype).itemsize if images else 0
        self.num_bytes = size * (image_bytes + (0 if features is None else features.num_bytes))
        self.coming: Coming | None = None
        self.slots: Slots | None = None

    def expect(self, row_M: NDArray[np.int32], *, size: int) -> None:
        """Fetch these rows, `size` to a batch, before they are used, where they lie elsewhere."""
        self.coming = coming(row_M, size, self.manifest if self.images else None, self.features)

    def prepare(self, *, workers: int, prefetch_batches: int) -> None:
        """Take the memory for images that so many decoding processes (0: this one) use again and again."""
        if self.images:
            self.slots = Slots(
                self._shape,
                self.manifest.dtype,
                writers=max(workers, 1),
                per_writer=slots_for(prefetch_batches if workers else 0),
                shared=workers > 0,
            )

    def __iter__(self) -> Iterator[Batch | SentBatch | Failure]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        with ExitStack() as stack:
            images = stack.enter_context(ShardReader(self.manifest, self.coming)) if self.images else None
            features = None
            if self.features is not None:
                features = stack.enter_context(FeatureReader(self.features, self.coming))
            batches = worker_batches(self.num_batches, 0, workers, worker)
            for g, numbers in zip(batches, self._numbers(batches), strict=True):
                for reader in (images, features):
                    if reader is not None:
                        reader.reach(g)
                slot = None if self.slots is None else self.slots.claim(worker)
                room_R = self._room(slot)
                try:
                    batch = self._batch(images, features, numbers, room_R)
                except UserError as error:
                    yield Failure(error.thing, error.fix, error.file)
                    continue
                if slot is not None and self.slots is not None:
                    yield self.slots.sent(slot, batch) if info is not None else self.slots.filled(slot, batch)
                else:
                    if room_R is not None:
                        pixels_B1HW = images_in(room_R, self._shape, self.manifest.dtype)
                        batch.image_B1HW = torch.from_numpy(pixels_B1HW[: len(batch.sample_B)])
                    yield batch

    def _room(self, slot: int | None) -> NDArray[np.uint8] | None:
        """Where the images of a batch are written: its slot, or fresh memory; None where no images are read."""
        if slot is not None and self.slots is not None:
            return self.slots.room(slot)
        return np.empty(room_bytes(self._shape, self.manifest.dtype), np.uint8) if self.images else None

    def _numbers(self, batches: range) -> Iterator[_Numbers]:
        """Those of these batches, in turn."""
        for start in range(0, len(batches), _AT_ONCE):
            first_G = np.asarray(batches[start : start + _AT_ONCE]) * self.size
            places = (first_G[:, None] + np.arange(self.size)).reshape(-1)
            row_M = self.row_M[places[places < len(self.row_M)]]  # only an epoch's last batch may be short
            weight_M = self.counts_M[places[: len(row_M)]].astype(np.float32)
            tensors = (self.manifest.label_NK(self.labels, row_M), weight_M, row_M.astype(np.int64))
            parts = zip(*(torch.from_numpy(x).split(self.size) for x in tensors), strict=True)
            for place, (label_BK, weight_B, sample_B) in enumerate(parts):
                row_B = row_M[place * self.size : (place + 1) * self.size].tolist()
                yield _Numbers(row_B, label_BK, weight_B, sample_B)

    def _batch(
        self,
        images: ShardReader | None,
        features: FeatureReader | None,
        numbers: _Numbers,
        room_R: NDArray[np.uint8] | None,
    ) -> Batch:
        """The batch of these rows but for its images, which are written to `room_R`."""
        row_B, label_BK, weight_B, sample_B = numbers
        broken: dict[int, str] = {}
        if images is not None and room_R is not None:
            self._write_images(images, row_B, broken, room_R)
        levels = None if features is None else self._levels(features, row_B, broken)
        skipped = {place: text for place, text in broken.items() if weight_B[place] > 0}  # padding is in no epoch
        if skipped:
            weight_B[list(skipped)] = 0
        return Batch(None, label_BK, weight_B, sample_B, levels, skipped)

    def _write_images(
        self, reader: ShardReader, row_B: list[int], broken: dict[int, str], room_R: NDArray[np.uint8]
    ) -> None:
        num_bytes = (len(room_R) - LEAD_BYTES) // self.size
        for place, row in enumerate(row_B):
            # what lies before an image, the end of the one before it, is left as it is
            part_R = room_R[place * num_bytes : LEAD_BYTES + (place + 1) * num_bytes]
            try:
                reader.read_into(part_R, row)
            except UserError as error:
                broken[place] = self._skipped(error)
                part_R[LEAD_BYTES:] = 0

    def _levels(self, reader: FeatureReader, row_B: list[int], broken: dict[int, str]) -> dict[int, torch.Tensor]:
        kind, shapes = TYPES[reader.features.header.dtype], reader.features.levels.items()
        levels = {level: torch.zeros((len(row_B), *shape), dtype=kind) for level, shape in shapes}
        for place, row in enumerate(row_B):
            try:
                for level, stored in reader.read(row).items():
                    levels[level][place] = stored
            except UserError as error:
                broken[place] = self._skipped(error)
        return levels

    def _skipped(self, error: UserError) -> str:
        """Why a sample cannot be read, where such samples are skipped; elsewhere that is the end."""
        if not self.skips:
            raise error
        return f"{error.file}: {error.thing}"
