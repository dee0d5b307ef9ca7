"""Batches of stored features: the order, the ranks and the resume of image batches, with features instead."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shards.errors import UserError
from shards.features import Features
from shards.manifest import Manifest, read_manifest
from shards.stream import evaluation_stream, train_stream
from shards.types import Batch
from tests.archives import LABELS
from tests.features import SHAPES, make_features, random_levels


@pytest.fixture(scope="module")
def manifest(packed: Path) -> Manifest:
    return read_manifest(packed)


@pytest.fixture(scope="module")
def features(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Features:
    return make_features(manifest, tmp_path_factory.mktemp("features") / "out", dtype="bf16")


def training(manifest: Manifest, **changes: Any) -> Iterator[Batch]:
    options: dict[str, Any] = {
        "labels": LABELS, "seed": 3, "epoch": 1, "batch_size": 8, "accumulation": 1, "world": 1, "rank": 0,
        "start_batch": 0, "last_batch": "pad", "block_shards": 2, "workers": 0, "prefetch_batches": 2,
        "pin_memory": False,
    }  # fmt: skip
    return train_stream(manifest, **options | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"start_batch": 3},
        {"world": 2, "rank": 1},
        {"accumulation": 2},
        {"last_batch": "drop"},
        {"group_by": "exam"},
    ],
    ids=str,
)
def test_the_order_is_that_of_images(manifest: Manifest, features: Features, changes: dict[str, Any]) -> None:
    seen = 0
    for images, stored in zip(
        training(manifest, **changes), training(manifest, features=features, **changes), strict=True
    ):
        assert stored.image_B1HW is None
        for name in ("sample_B", "label_BK", "weight_B"):
            assert torch.equal(getattr(stored, name), getattr(images, name))
        assert stored.levels is not None
        for level, x_BN in stored.levels.items():
            expected = torch.stack([random_levels(int(row))[level].bfloat16() for row in stored.sample_B])
            assert torch.equal(x_BN, expected)
        assert set(stored.levels) == set(SHAPES)
        seen += len(stored.sample_B)
    assert seen > 0


@pytest.mark.slow
def test_decoding_processes_give_the_same(manifest: Manifest, features: Features) -> None:
    chosen = features.only([32])
    for alone, shared in zip(
        training(manifest, features=chosen), training(manifest, features=chosen, workers=2), strict=True
    ):
        assert alone.levels is not None
        assert shared.levels is not None
        assert alone.levels.keys() == shared.levels.keys() == {32}
        assert torch.equal(alone.levels[32], shared.levels[32])


def test_an_evaluation_reads_both_where_it_needs_both(manifest: Manifest, features: Features) -> None:
    rows = np.array([4, 90, 5])
    options: dict[str, Any] = {
        "labels": LABELS, "rows": rows, "batch_size": 2, "workers": 0, "prefetch_batches": 2, "pin_memory": False,
    }  # fmt: skip
    both = list(evaluation_stream(manifest, features=features, **options))
    assert torch.cat([b.sample_B for b in both]).tolist() == rows.tolist()
    images = list(evaluation_stream(manifest, **options))
    for a, b in zip(both, images, strict=True):
        assert torch.equal(a.image_B1HW, b.image_B1HW)  # type: ignore[arg-type]
        assert a.levels is not None
        assert b.levels is None
    alone = next(iter(evaluation_stream(manifest, features=features, images=False, **options)))
    assert alone.image_B1HW is None


def test_a_broken_shard_is_named_in_its_place(manifest: Manifest, tmp_path: Path) -> None:
    broken = make_features(manifest, tmp_path / "out")
    place = broken.place(int(next(iter(training(manifest, start_batch=2))).sample_B[0]))
    with (broken.directory / broken.shards[place.shard].name).open("r+b") as tar:
        tar.seek(place.offset_bytes)
        tar.write(b"?")
    stream = training(manifest, features=broken)
    next(stream), next(stream)
    with pytest.raises(UserError, match="changed since it was extracted") as caught:
        next(stream)
    assert caught.value.file == str(broken.directory / broken.shards[place.shard].name)


def test_a_broken_sample_is_skipped_where_asked_for(manifest: Manifest, tmp_path: Path) -> None:
    broken = make_features(manifest, tmp_path / "out")
    row = int(next(iter(training(manifest, start_batch=2))).sample_B[3])
    place = broken.place(row)
    with (broken.directory / broken.shards[place.shard].name).open("r+b") as tar:
        tar.seek(place.offset_bytes)
        tar.write(b"?")
    batch = list(training(manifest, features=broken, on_error="skip"))[2]
    assert list(batch.skipped) == [3]
    assert batch.weight_B.tolist() == [1, 1, 1, 0, 1, 1, 1, 1]
    assert batch.levels is not None
    for level, x_BN in batch.levels.items():
        assert not x_BN[3].any()
        assert torch.equal(x_BN[2], random_levels(int(batch.sample_B[2]))[level].to(x_BN.dtype))
