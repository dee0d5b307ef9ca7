"""The order of a packed folder's training images. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

from shards.balance import label_classes
from shards.manifest import Manifest
from shards.plan import EpochPlan, LastBatch
from shards.samples import coded

Sampling: TypeAlias = Literal["uniform", "class_balanced"]
GroupBy: TypeAlias = Literal["none", "exam"]


def train_plan(
    manifest: Manifest,
    *,
    seed: int,
    epoch: int,
    batch_size: int,
    last_batch: LastBatch,
    block_shards: int,
    sampling: Sampling = "uniform",
    group_by: GroupBy = "none",
    labels: Sequence[str] = (),
) -> EpochPlan:
    """The order of the training images in an epoch; the arguments are those of `shards.stream.train_stream`.

    Raises:
        UserError: as EpochPlan and label_classes.
    """
    exam_N = coded(manifest.table, "exam_id") if group_by == "exam" else None
    row_M = manifest.rows("train")
    balanced = sampling == "class_balanced" and len(row_M) > 0
    return EpochPlan(
        rows_M=row_M,
        shard_M=manifest.shard_N()[row_M],
        seed=seed,
        epoch=epoch,
        batch_size=batch_size,
        last_batch=last_batch,
        block_shards=block_shards,
        class_MC=label_classes(manifest.label_NK(labels, row_M), labels) if balanced else None,
        exam_M=None if exam_N is None else exam_N[row_M],
    )
