"""The rows that a process will read, for what lies elsewhere. M rows in the order of use, T tars, S shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from shards.features import Features
    from shards.header import ShardInfo
    from shards.manifest import Manifest
    from shards.plan import EpochPlan


@dataclass(frozen=True, eq=False)
class Coming:
    """Rows of the coming batches of all ranks of this machine, `size` to a batch."""

    row_M: npt.NDArray[np.integer[Any]]
    size: int


def elsewhere(*folders: Manifest | Features | None) -> bool:
    """Whether something that is read lies on no disk of this machine."""
    return any(folder is not None and folder.remote is not None for folder in folders)


def coming(row_M: npt.NDArray[np.integer[Any]], size: int, *folders: Manifest | Features | None) -> Coming | None:
    """The coming rows, where one of these folders lies elsewhere.

    Raises:
        UserError: the cache is too small for the batches that it has to hold.
    """
    if not elsewhere(*folders):
        return None
    for folder in folders:
        if folder is not None and folder.remote is not None:
            folder.remote.check_room(size * mean_bytes(folder.shards))
    return Coming(row_M, size)


def mean_bytes(shards: Sequence[ShardInfo]) -> float:
    """Bytes that a sample takes in its tar, about."""
    return sum(shard.num_bytes for shard in shards) / max(1, sum(shard.num_samples for shard in shards))


def check_whole_shards(plan: EpochPlan, manifest: Manifest, features: Features | None) -> None:
    """See that the cache holds the whole tars that training reads at a time, where a server refuses ranges.

    Those are two blocks of the shuffle, of which one is read while the next one comes; drawn from classes, each of
    which goes through the folder by itself, they are all tars.

    Raises:
        UserError: the cache is too small for them.
    """
    folder = manifest if features is None else features
    if folder.remote is None or folder.remote.ranges:
        return
    tar_M = folder.shard_N()[plan.rows_M]
    size_T = np.sort([folder.shards[tar].num_bytes for tar in np.unique(tar_M)])[::-1]
    together = len(size_T)
    if plan.class_MC is None:
        shard_M = plan.shard_M
        if plan.exam_M is not None:  # all of an exam comes with its first image
            _, first_E, exam_M = np.unique(plan.exam_M, return_index=True, return_inverse=True)
            shard_M = shard_M[first_E][exam_M]
        pairs = np.unique(np.stack([shard_M, tar_M]), axis=1)
        tars_S = np.sort(np.bincount(pairs[0]))[::-1]  # which hold the images of a shard: itself, or its features
        together = min(together, int(tars_S[: 2 * plan.block_shards].sum()))
    folder.remote.check_whole(size_T.tolist(), together)
