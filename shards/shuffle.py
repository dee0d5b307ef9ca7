"""A shuffle that reads from few shards at a time, the same on every machine. numpy only.

U units to shuffle (samples, exams, visits of samples), S shards that hold any.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

Int32: TypeAlias = NDArray[np.int32]

# Tell these random numbers from others that are drawn from the same seed and epoch.
_EPOCHS: Final = 1
_RUNS: Final = 2


class Shuffle:
    """Shuffles of one epoch. Each call draws on, so that the same calls in the same order give the same shuffles.

    Raw words of a bit generator are sorted: numpy promises their stream, and not that of Generator.permutation.
    """

    def __init__(self, seed: int, epoch: int, block_shards: int) -> None:
        self.seed, self.epoch, self.block_shards = seed, epoch, block_shards
        self._words = np.random.Philox(np.random.SeedSequence((seed, epoch), spawn_key=(_EPOCHS,)))

    def __call__(self, shard_U: NDArray[np.integer[Any]]) -> Int32:
        """The units [U] in the order of permuted blocks of shards, permuted inside each block."""
        return self.within(self.blocks(shard_U))

    def blocks(self, shard_U: NDArray[np.integer[Any]]) -> NDArray[np.integer[Any]]:
        """The block of each unit: shards are permuted and cut into blocks of `block_shards`."""
        shards_S = np.flatnonzero(np.bincount(shard_U))
        order_S = np.argsort(self.words(len(shards_S)), kind="stable")
        block = np.zeros(int(shards_S[-1]) + 1, np.min_scalar_type(len(shards_S)))
        block[shards_S[order_S]] = np.arange(len(shards_S)) // self.block_shards
        block_U: NDArray[np.integer[Any]] = block[shard_U]
        return block_U

    def within(self, key_U: NDArray[np.integer[Any]]) -> Int32:
        """The units [U] by ascending key (not negative), permuted where keys are equal."""
        bits = int(key_U.max(initial=0)).bit_length()
        word_U = self.words(len(key_U)) >> np.uint64(bits)
        if bits:
            word_U |= key_U.astype(np.uint64) << np.uint64(64 - bits)
        return np.argsort(word_U, kind="stable").astype(np.int32)

    def words(self, count: int) -> NDArray[np.uint64]:
        """The next random words."""
        return self._words.random_raw(count)

    def cycle(self, number: int, length: int) -> Int32:
        """A permutation that is the same in all epochs; `number` tells several apart."""
        words = np.random.Philox(np.random.SeedSequence(self.seed, spawn_key=(_RUNS, number)))
        return np.argsort(words.random_raw(length), kind="stable").astype(np.int32)
