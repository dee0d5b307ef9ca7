"""The order of samples: pure functions of (rows, their shards, seed, epoch, batch size). numpy only.

M samples of a split, C classes, E exams, G global batches of an epoch, B samples of a global batch (one optimizer step
over all ranks).

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

from shards.balance import draw_classes
from shards.errors import UserError
from shards.exams import Exams, place_exams
from shards.shuffle import Int32, Shuffle

Float32: TypeAlias = NDArray[np.float32]
LastBatch: TypeAlias = Literal["pad", "drop", "wrap"]


@dataclass(frozen=True, kw_only=True, eq=False)
class EpochPlan:
    """Which samples every global batch of one epoch holds.

    Shards are permuted, cut into blocks of `block_shards`, and samples are permuted inside a block, so that a batch
    reads from few shards. Both permutations are functions of (seed, epoch) alone. How many samples each batch holds
    depends on neither: all epochs have the same steps.

    rows_M: manifest rows of the split, each once; shard_M: the shard of each. `last_batch`: "pad" fills the last batch
    with repeated rows of weight 0, "drop" leaves the samples out that do not fill a batch, "wrap" fills it with the
    first samples of this epoch's order, which weigh 1 again (as torch's DistributedSampler does).
    class_MC: draw from these classes in turn instead of taking each sample once (shards.balance); there "drop" and
    "wrap" draw just as many as fill the batches, "pad" as many as there are samples.
    exam_M: a number for each exam; its samples lie side by side in one batch (shards.exams). Places of a batch that no
    whole exam fills are padded; "drop" and "wrap" are not for exams.

    Raises:
        UserError: fewer samples than one global batch, an exam larger than it, or a seed below 0.
    """

    rows_M: NDArray[np.integer[Any]]
    shard_M: NDArray[np.integer[Any]]
    seed: int
    epoch: int
    batch_size: int
    last_batch: LastBatch
    block_shards: int
    class_MC: NDArray[np.bool_] | None = None
    exam_M: NDArray[np.integer[Any]] | None = None

    def __post_init__(self) -> None:
        assert self.rows_M.shape == self.shard_M.shape == (len(self.rows_M),)
        assert self.epoch >= 0
        assert self.batch_size >= 1
        assert self.block_shards >= 1
        assert self.exam_M is None or (self.class_MC is None and self.last_batch == "pad")
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
        largest = 0 if self._exams is None else int(self._exams.size_E.max())
        if largest > self.batch_size:
            raise UserError(
                f"the largest exam has {largest} images, a global batch {self.batch_size}",
                fix=f"raise the batch size to at least {largest}, or do not group by exam",
            )

    @property
    def num_batches(self) -> int:
        """Global batches of the epoch."""
        return len(self.filled_G)

    @cached_property
    def filled_G(self) -> Int32:  # noqa: N802
        """How many places of each global batch hold samples of weight 1: the first ones; the rest is padding."""
        if self._exams is not None:
            return self._exams.packing(self.batch_size).filled_G
        whole, rest = divmod(len(self.rows_M), self.batch_size)
        filled_G = np.full(whole + int(rest > 0 and self.last_batch != "drop"), self.batch_size, np.int32)
        if rest and self.last_batch == "pad":
            filled_G[-1] = rest
        return filled_G

    @cached_property
    def rows_GB(self) -> Int32:  # noqa: N802
        """Rows [num_batches, batch_size] of the epoch; padding repeats rows of its own batch."""
        place_GB = self._places().reshape(self.num_batches, self.batch_size)
        return self.rows_M.astype(np.int32)[place_GB]

    def batch(self, g: int) -> tuple[Int32, Float32]:
        """Rows and weights [batch_size] of global batch g; weight 0 marks padding."""
        return self.rows_GB[g], (np.arange(self.batch_size) < self.filled_G[g]).astype(np.float32)

    @cached_property
    def _exams(self) -> Exams | None:
        return None if self.exam_M is None else Exams.of(self.exam_M)

    def _places(self) -> Int32:
        """Indices of rows_M for all places of the epoch."""
        shuffle = Shuffle(self.seed, self.epoch, self.block_shards)
        if self._exams is not None:
            return place_exams(self._exams, self.shard_M, self.batch_size, shuffle)
        draws = int(self.filled_G.sum())
        if self.class_MC is not None:
            order = draw_classes(self.class_MC, self.shard_M, draws, self.batch_size, shuffle)
        else:
            order = shuffle(self.shard_M)
        if self.last_batch != "pad":
            return np.resize(order, draws)  # cuts the end off, or starts again from the first
        last = order[(self.num_batches - 1) * self.batch_size :]
        # Rows of this very batch: their shards are being read anyway.
        return np.concatenate([order[: len(order) - len(last)], np.resize(last, self.batch_size)])


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


def rank_columns(batch_size: int, world: int, ranks: Sequence[int], accumulation: int) -> NDArray[np.int64]:
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
