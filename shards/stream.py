"""Batches for one rank, read and decoded in processes of its own, in the order of shards.plan.

B images, H W pixels, K labels, M samples of this rank in order, G global batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from shards.errors import UserError
from shards.features import Features
from shards.manifest import Manifest
from shards.order import GroupBy, Sampling, train_plan
from shards.plan import LastBatch, rank_columns
from shards.remote.coming import check_whole_shards, elsewhere
from shards.share import Failure, Share
from shards.slots import SentBatch, slots_for
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
        node_ranks: the ranks of this machine (by default this one), which share its memory, and for which samples are
            fetched together from elsewhere.

    Raises:
        UserError: at once, when the samples or the ranks do not fit the batch size, a label is unknown, or the cache is
            too small; later, when a sample cannot be read and on_error is stop, in its place in the order.
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
    share = Share(
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
        check_whole_shards(plan, manifest, features)
        fetched = rank_columns(batch_size, world, node_ranks or [rank], accumulation)
        share.expect(plan.rows_GB[start_batch:, fetched].reshape(-1), size=len(fetched))
    ranks = len(node_ranks or [rank])
    batches = _serve(share, workers=workers, prefetch_batches=prefetch_batches, pin_memory=pin_memory, ranks=ranks)
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
    node_ranks: Sequence[int] = (0,),
) -> Iterator[Batch]:
    """The given manifest rows in order, each once, with weight 1; the last batch may be short.

    The arguments are those of `train_stream`, but `batch_size` counts the images of this rank's batch, and `images`
    says whether they are read too where there are `features`. A sample that cannot be read always ends the stream:
    metrics count every image once.
    """
    assert batch_size >= 1
    share = Share(
        manifest,
        labels=labels,
        row_M=np.asarray(rows, np.int32),
        counts_M=np.ones(len(rows), np.bool_),
        size=batch_size,
        features=features,
        images=images,
    )
    share.expect(share.row_M, size=batch_size)
    ranks = len(node_ranks)
    return _serve(share, workers=workers, prefetch_batches=prefetch_batches, pin_memory=pin_memory, ranks=ranks)


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


def _serve(share: Share, *, workers: int, prefetch_batches: int, pin_memory: bool, ranks: int) -> Iterator[Batch]:
    workers = min(workers, share.num_batches)
    if workers:
        check_shared_memory(workers, slots_for(prefetch_batches) * share.num_bytes, ranks=ranks)
    share.prepare(workers=workers, prefetch_batches=prefetch_batches)
    if not workers:
        return _here(share, pin_memory=pin_memory)
    loader = DataLoader(
        share,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        # Without its own the loader draws from torch's global generator, and so moves every later draw.
        generator=torch.Generator(),
        multiprocessing_context=start_server(),
        worker_init_fn=start_worker,
        prefetch_factor=prefetch_batches,
    )
    return _unwrapped(loader, workers)


def _here(share: Share, *, pin_memory: bool) -> Iterator[Batch]:
    for batch in map(_whole, share):
        yield batch.pin_memory() if pin_memory else batch


def _whole(made: Batch | SentBatch | Failure) -> Batch:
    if isinstance(made, Failure):
        raise UserError(made.thing, fix=made.fix, file=made.file)
    assert isinstance(made, Batch)
    return made


def _unwrapped(loader: DataLoader[Batch | SentBatch | Failure], workers: int) -> Iterator[Batch]:
    try:
        yield from map(_whole, loader)
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
        images = batch.sample_B.shape[0]
        if images <= size:
            yield batch
        else:
            yield from (batch.part(slice(start, start + size)) for start in range(0, images, size))
