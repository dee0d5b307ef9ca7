"""The rows that a process will read, for what lies elsewhere. M rows in the order of use."""

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
