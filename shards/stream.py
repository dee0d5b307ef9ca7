"""Batches for one rank, read and decoded in processes of its own, in the order of shards.plan.

B images, H W pixels, K labels, M samples of this rank in order, G global batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from shards.errors import UserError
from shards.feature_codec import TYPES
from shards.features import FeatureReader, Features
from shards.manifest import Manifest
from shards.order import GroupBy, Sampling, train_plan
from shards.plan import LastBatch, rank_columns, worker_batches
from shards.reader import ShardReader
from shards.remote.coming import Coming, coming, elsewhere
from shards.types import Batch
from shards.workers import check_shared_memory, start_server, start_worker


def train_stream(
    manifest: Manifest,
    *,
    labels: Sequence[str],
    seed: int,
    epoch: int,
    batch_size: int,
    accumulation: int,
    world: int,
    rank: int,
    start_batch: int,
    last_batch: LastBatch,
    block_shards: int,
    workers: int,
    prefetch_batches: int,
    pin_memory: bool,
    sampling: Sampling = "uniform",
    group_by: GroupBy = "none",
    features: Features | None = None,
    on_error: Literal["stop", "skip"] = "stop",
    node_ranks: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """This rank's micro-batches of an epoch in order, `accumulation` for each global batch from `start_batch` on.

    Args:
        manifest: the packed folder; the split is "train".
        labels: columns of label_BK, in this order.
        seed: of the order of samples, with `epoch`.
        epoch: counts from 0.
        batch_size: images of a global batch, over all ranks and micro-steps.
        accumulation: micro-batches of a global batch.
        world: number of ranks.
        rank: this one.
        start_batch: global batches of this epoch that are done.
        last_batch: fill the last global batch with weight 0, leave its samples out, or fill it with the first ones.
        block_shards: samples are shuffled inside blocks of so many shards.
        workers: decoding processes; 0 decodes in this process.
        prefetch_batches: batches each decoding process keeps ready.
        pin_memory: page-locked memory, for copies to a GPU.
        sampling: each image once, or draws from the classes of `labels` in turn (shards.balance).
        group_by: exam keeps the images of an exam in one global batch (shards.exams).
        features: what to read instead of images.
        on_error: a sample that cannot be read ends the stream, or is skipped (`Batch.skipped`).
        node_ranks: the ranks of this machine (by default this one), whose samples are fetched together from elsewhere.

    Raises:
        UserError: at once, when the samples or the ranks do not fit the batch size, or a label is unknown; later,
            when a sample cannot be read and on_error is stop, in its place in the order.
    """
    plan = train_plan(
        manifest,
        seed=seed,
        epoch=epoch,
        batch_size=batch_size,
        last_batch=last_batch,
        block_shards=block_shards,
        sampling=sampling,
        group_by=group_by,
        labels=labels,
    )
    assert 0 <= start_batch <= plan.num_batches
    columns = rank_columns(batch_size, world, [rank], accumulation)
    share = _Share(
        manifest,
        labels=labels,
        row_M=plan.rows_GB[start_batch:, columns].reshape(-1),
        counts_M=(columns < plan.filled_G[start_batch:, None]).reshape(-1),
        size=len(columns),
        features=features,
        images=features is None,
        on_error=on_error,
    )
    if elsewhere(manifest, features):
        fetched = rank_columns(batch_size, world, node_ranks or [rank], accumulation)
        share.expect(plan.rows_GB[start_batch:, fetched].reshape(-1), size=len(fetched))
    batches = _serve(share, workers=workers, prefetch_batches=prefetch_batches, pin_memory=pin_memory)
    return _micro_batches(batches, len(columns) // accumulation)


def evaluation_stream(
    manifest: Manifest,
    *,
    labels: Sequence[str],
    rows: NDArray[np.int64],
    batch_size: int,
    workers: int,
    prefetch_batches: int,
    pin_memory: bool,
    features: Features | None = None,
    images: bool = True,
) -> Iterator[Batch]:
    """The given manifest rows in order, each once, with weight 1; the last batch may be short.

    The arguments are those of `train_stream`, but `batch_size` counts the images of this rank's batch, and `images`
    says whether they are read too where there are `features`. A sample that cannot be read always ends the stream:
    metrics count every image once.
    """
    assert batch_size >= 1
    share = _Share(
        manifest,
        labels=labels,
        row_M=np.asarray(rows, np.int32),
        counts_M=np.ones(len(rows), np.bool_),
        size=batch_size,
        features=features,
        images=images,
    )
    share.expect(share.row_M, size=batch_size)
    return _serve(share, workers=workers, prefetch_batches=prefetch_batches, pin_memory=pin_memory)


def blank_batch(manifest: Manifest, size: int, *, labels: int, features: Features | None) -> Batch:
    """A batch of black images (or of features that are 0) of weight 0: what shapes and types real ones have."""
    hw = (manifest.height_px, manifest.width_px)
    image_B1HW = None if features is not None else torch.from_numpy(np.zeros((size, 1, *hw), manifest.dtype))
    levels = None
    if features is not None:
        levels = {level: torch.zeros((size, *shape)) for level, shape in features.levels.items()}
    return Batch(
        image_B1HW=image_B1HW,
        label_BK=torch.zeros((size, labels), dtype=torch.int8),
        weight_B=torch.zeros(size),
        sample_B=torch.zeros(size, dtype=torch.int64),
        levels=levels,
    )


@dataclass(frozen=True, slots=True)
class _Failure:
    """A UserError on its way out of a decoding process: a DataLoader keeps only the text of an exception."""

    thing: str
    fix: str
    file: str | None


class _Share(IterableDataset[Batch | _Failure]):
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
        self.num_batches = -(-len(row_M) // size)
        image_bytes = manifest.height_px * manifest.width_px * np.dtype(manifest.dtype).itemsize if images else 0
        self.num_bytes = size * (image_bytes + (0 if features is None else features.num_bytes))
        self.coming: Coming | None = None

    def expect(self, row_M: NDArray[np.int32], *, size: int) -> None:
        """Fetch these rows, `size` to a batch, before they are used, where they lie elsewhere."""
        self.coming = coming(row_M, size, self.manifest if self.images else None, self.features)

    def __iter__(self) -> Iterator[Batch | _Failure]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        with ExitStack() as stack:
            images = stack.enter_context(ShardReader(self.manifest, self.coming)) if self.images else None
            features = None
            if self.features is not None:
                features = stack.enter_context(FeatureReader(self.features, self.coming))
            for g in worker_batches(self.num_batches, 0, workers, worker):
                for reader in (images, features):
                    if reader is not None:
                        reader.reach(g)
                try:
                    made: Batch | _Failure = self._batch(images, features, slice(g * self.size, (g + 1) * self.size))
                except UserError as error:
                    made = _Failure(error.thing, error.fix, error.file)
                yield made

    def _batch(self, images: ShardReader | None, features: FeatureReader | None, part: slice) -> Batch:
        row_B, weight_B = self.row_M[part], self.counts_M[part].astype(np.float32)
        broken: dict[int, str] = {}
        image_B1HW = None if images is None else self._images(images, row_B, broken)
        levels = None if features is None else self._levels(features, row_B, broken)
        skipped = {place: text for place, text in broken.items() if weight_B[place] > 0}  # padding is in no epoch
        weight_B[list(skipped)] = 0
        return Batch(
            image_B1HW=image_B1HW,
            label_BK=torch.from_numpy(self.manifest.label_NK(self.labels, row_B)),
            weight_B=torch.from_numpy(weight_B),
            sample_B=torch.from_numpy(row_B.astype(np.int64)),
            levels=levels,
            skipped=skipped,
        )

    def _images(self, reader: ShardReader, row_B: NDArray[np.int32], broken: dict[int, str]) -> torch.Tensor:
        manifest = self.manifest
        image_B1HW = np.zeros((len(row_B), 1, manifest.height_px, manifest.width_px), manifest.dtype)
        for place, row in enumerate(row_B.tolist()):
            with self._skipping(place, broken):
                image_B1HW[place, 0] = reader.read(row)
        return torch.from_numpy(image_B1HW)

    def _levels(
        self, reader: FeatureReader, row_B: NDArray[np.int32], broken: dict[int, str]
    ) -> dict[int, torch.Tensor]:
        kind, shapes = TYPES[reader.features.header.dtype], reader.features.levels.items()
        levels = {level: torch.zeros((len(row_B), *shape), dtype=kind) for level, shape in shapes}
        for place, row in enumerate(row_B.tolist()):
            with self._skipping(place, broken):
                for level, stored in reader.read(row).items():
                    levels[level][place] = stored
        return levels

    @contextmanager
    def _skipping(self, place: int, broken: dict[int, str]) -> Iterator[None]:
        """Write down why a sample cannot be read, where such samples are skipped."""
        try:
            yield
        except UserError as error:
            if not self.skips:
                raise
            broken[place] = f"{error.file}: {error.thing}"


def _serve(share: _Share, *, workers: int, prefetch_batches: int, pin_memory: bool) -> Iterator[Batch]:
    workers = min(workers, share.num_batches)
    options: dict[str, Any] = {}
    if workers:
        check_shared_memory(workers, (prefetch_batches + 1) * share.num_bytes)
        options = {
            "multiprocessing_context": start_server(),
            "worker_init_fn": start_worker,
            "prefetch_factor": prefetch_batches,
        }
    loader = DataLoader(
        share,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        # Without its own the loader draws from torch's global generator, and so moves every later draw.
        generator=torch.Generator(),
        **options,
    )
    return _unwrapped(loader, workers)


def _unwrapped(loader: DataLoader[Batch | _Failure], workers: int) -> Iterator[Batch]:
    try:
        for made in loader:
            if isinstance(made, _Failure):
                raise UserError(made.thing, fix=made.fix, file=made.file)
            yield made
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise UserError(
            "a decoding process was killed, as happens when memory runs out",
            fix=f"give the job more memory, or lower the number of decoding processes ({workers}) or of batches "
            "that each keeps ready",
        ) from error


def _micro_batches(batches: Iterator[Batch], size: int) -> Iterator[Batch]:
    for batch in batches:
        for start in range(0, len(batch.sample_B), size):
            yield batch.part(slice(start, start + size))
