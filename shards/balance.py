"""Class-balanced sampling: draws go through the classes in turn. numpy only.

M samples, K labels, C classes, B samples of a global batch.

The classes are the positives of each label, and the samples without any (with a label that is known to be 0). A
sample that is positive for several labels is in the class of each; one without a known label is in none, since a loss
would learn nothing from it. Draw number x of a run, counted over epochs, is of class (-1 - x) mod C, and each class
hands out its members round and round (class-aware sampling: Shen, Lin and Huang, Relay Backpropagation, ECCV 2016,
section 3.3). So in every global batch, in every epoch and over the run the classes have equally many draws to within
one, and in every epoch and over the run the members of a class have equally many of its draws to within one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError
from shards.shuffle import Int32, Shuffle


def label_classes(label_MK: NDArray[np.int8], labels: Sequence[str]) -> NDArray[np.bool_]:
    """Which classes each sample is in, [M, C]: the positives of each label, then the rest, where there is one.

    Raises:
        UserError: a label has no positives, or there is nothing to balance against.
    """
    positive_MK = label_MK == 1
    rest_M = ~positive_MK.any(axis=1) & (label_MK == 0).any(axis=1)
    fix = "set data.sampling: uniform, or leave the label out of data.labels"
    for label, positives in zip(labels, positive_MK.sum(axis=0).tolist(), strict=True):
        if not positives:
            raise UserError(f"label {label} has no positives to draw (data.sampling: class_balanced)", fix=fix)
    class_MC = np.column_stack([positive_MK, rest_M]) if rest_M.any() else positive_MK
    if class_MC.shape[1] < 2:
        thing = f"label {labels[0]} has no known negatives to draw (data.sampling: class_balanced)"
        raise UserError(thing, fix=fix)
    return class_MC


def draw_share(class_MC: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The share of all draws of a long run that each sample has, [M]; sums to 1."""
    size_C = class_MC.sum(axis=0)
    share_M: NDArray[np.float64] = class_MC @ (1 / (size_C * len(size_C)))
    return share_M


def draw_classes(
    class_MC: NDArray[np.bool_],
    shard_M: NDArray[np.integer[Any]],
    draws: int,
    batch_size: int,
    shuffle: Shuffle,
) -> Int32:
    """The samples [draws] of an epoch that draws so many, as every epoch before it did.

    A class's draws of an epoch are shuffled by blocks of shards, pass by pass through its members where they come more
    than once; then the places of each batch are shuffled, so that no rank always gets the same class.
    """
    classes = class_MC.shape[1]
    first = shuffle.epoch * draws
    block_M = shuffle.blocks(shard_M)
    blocks = int(block_M.max()) + 1
    order = np.empty(draws, np.int32)
    for c in range(classes):
        members = np.flatnonzero(class_MC[:, c]).astype(np.int32)
        start, stop = (first + c) // classes, (first + draws + c) // classes
        turn = np.arange(stop - start)
        taken = members[shuffle.cycle(c, len(members))][(turn + start % len(members)) % len(members)]
        key = turn // len(members) * blocks + block_M[taken]
        order[(-1 - c - first) % classes :: classes] = taken[shuffle.within(key)]
    return order[_places(draws, batch_size, shuffle)]


def _places(draws: int, batch_size: int, shuffle: Shuffle) -> Int32:
    """0 .. draws-1, permuted inside each batch."""
    batches = -(-draws // batch_size)
    word_GB = shuffle.words(batches * batch_size)
    word_GB[draws:] = np.iinfo(np.uint64).max  # padding stays behind
    word_GB = word_GB.reshape(batches, batch_size)
    place_GB = np.argsort(word_GB, axis=1, kind="stable").astype(np.int32)
    place_GB += np.arange(batches, dtype=np.int32)[:, None] * batch_size
    return place_GB.reshape(-1)[:draws]
