"""The order of samples: pure functions of (rows, their shards, seed, epoch, batch size). numpy only.

M samples of a split, B samples of a global batch (one optimizer step over all ranks).

A global batch is the same set of samples at any number of ranks and decoding processes: the epoch is cut into
global batches first, then ranks take columns of each batch and decoding processes take whole batches. What has
been seen is therefore one number, the batches done, and a run resumes by arithmetic on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError

Int64: TypeAlias = NDArray[np.int64]
Float32: TypeAlias = NDArray[np.float32]

# Tells these random numbers from others that are drawn from the same seed and epoch.
_STREAM = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class EpochPlan:
    """Which samples every global batch of one epoch holds.

    Shards are permuted, cut into blocks of `block_shards`, and samples are permuted inside a block, so that a batch
    reads from few shards. Both permutations are functions of (seed, epoch) alone.

    rows_M: int64 manifest rows of the split, each once; shard_M: the shard of each. `last_batch`: "pad" fills the
    last batch with repeated rows of weight 0, "drop" leaves the samples out that do not fill a batch.

    Raises:
        UserError: fewer samples than one global batch, or a seed below 0.
    """

    rows_M: Int64
    shard_M: NDArray[np.integer[Any]]
    seed: int
    epoch: int
    batch_size: int
    last_batch: Literal["pad", "drop"]
    block_shards: int

    def __post_init__(self) -> None:
        assert self.rows_M.shape == self.shard_M.shape == (len(self.rows_M),)
        assert self.epoch >= 0
        assert self.batch_size >= 1
        assert self.block_shards >= 1
        if self.seed < 0:
            raise UserError(f"the seed is {self.seed}", fix="give a seed that is not negative")
        samples = len(self.rows_M)
        if samples < self.batch_size:
            raise UserError(
                f"there are {samples} samples for a global batch of {self.batch_size}",
                fix=f"lower the batch size to at most {samples}, or pack more images into this split"
                if samples
                else "pack images into this split",
            )

    @property
    def num_batches(self) -> int:
        """Global batches of the epoch."""
        whole, rest = divmod(len(self.rows_M), self.batch_size)
        return whole + int(self.last_batch == "pad" and rest > 0)

    def batch(self, g: int) -> tuple[Int64, Float32]:
        """Rows and weights [batch_size] of global batch g; weight 0 marks padding."""
        rows_GB, weight_GB = self.batches
        return rows_GB[g], weight_GB[g]

    @cached_property
    def batches(self) -> tuple[Int64, Float32]:
        """Rows and weights [num_batches, batch_size] of the epoch."""
        size = self.num_batches * self.batch_size
        order_M = self._order()
        weight = np.ones(size, np.float32)
        if size > len(order_M):
            last = order_M[size - self.batch_size :]
            # Rows of this very batch: their shards are being read anyway.
            rows = np.concatenate([order_M[: size - self.batch_size], np.resize(last, self.batch_size)])
            weight[len(order_M) :] = 0
        else:
            rows = order_M[:size]
        return rows.reshape(-1, self.batch_size), weight.reshape(-1, self.batch_size)

    def _order(self) -> Int64:
        shards, member_M = np.unique(self.shard_M, return_inverse=True)
        # Raw words of a bit generator, sorted: numpy promises their stream, and not that of Generator.permutation.
        words = np.random.Philox(np.random.SeedSequence((self.seed, self.epoch), spawn_key=(_STREAM,)))
        place_S = np.empty(len(shards), np.int64)
        place_S[np.argsort(words.random_raw(len(shards)), kind="stable")] = np.arange(len(shards))
        block_M = (place_S // self.block_shards)[member_M]
        within_M = np.argsort(words.random_raw(len(self.rows_M)), kind="stable")
        return self.rows_M[within_M[np.argsort(block_M[within_M], kind="stable")]]


def rank_slice(batch_size: int, world: int, rank: int, accumulation: int) -> tuple[slice, ...]:
    """Columns of a global batch that a rank takes, one slice per micro-step of gradient accumulation.

    Micro-step m of all ranks together is one contiguous piece of the batch.

    Raises:
        UserError: batch_size is no multiple of world x accumulation.
    """
    assert 0 <= rank < world
    assert accumulation >= 1
    parts = world * accumulation
    micro, rest = divmod(batch_size, parts)
    if micro == 0 or rest:
        near = " or ".join(str(n * parts) for n in (micro, micro + 1) if n)
        raise UserError(
            f"a batch size of {batch_size} does not divide into {world} ranks x {accumulation} accumulation steps",
            fix=f"make the batch size a multiple of {parts} (for example {near}), "
            "or change the number of ranks or of accumulation steps",
        )
    starts = [(m * world + rank) * micro for m in range(accumulation)]
    return tuple(slice(start, start + micro) for start in starts)


def rank_columns(batch_size: int, world: int, ranks: Sequence[int], accumulation: int) -> Int64:
    """Columns of a global batch that some ranks take, in order of ranks and micro-steps; errors as `rank_slice`."""
    parts = [part for rank in ranks for part in rank_slice(batch_size, world, rank, accumulation)]
    return np.concatenate([np.arange(part.start, part.stop) for part in parts])


def worker_batches(num_batches: int, start: int, workers: int, worker: int) -> range:
    """Batches that decoding process `worker` makes; taken from the processes in turn, they come in order."""
    assert 0 <= worker < workers
    assert start >= 0
    return range(start + worker, num_batches, workers)


def evaluation_span(num_samples: int, world: int, rank: int) -> range:
    """This rank's samples of an evaluation: contiguous, each sample on one rank, sizes differ by at most one."""
    assert 0 <= rank < world
    assert num_samples >= 0
    return range(rank * num_samples // world, (rank + 1) * num_samples // world)
