"""Small folders of features for tests: random levels for the images of a packed folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from shards.feature_pack import FeatureJob, finish, write_shard
from shards.features import WORK_FOLDER, Features
from shards.manifest import Manifest

SHAPES = {16: (2, 5, 4, 3), 32: (2, 7, 2, 2)}
BATCH = 4
FIELDS: dict[str, Any] = {
    "levels": {str(level): list(shape) for level, shape in SHAPES.items()},
    "encoder": {"backbone": "none", "sha256": "0" * 64},
    "bags": {},
    "settings": {},
}


def random_levels(row: int) -> dict[int, torch.Tensor]:
    """The levels of a row: standard normal, with exact zeros as behind a ReLU."""
    generator = torch.Generator().manual_seed(row)
    return {level: torch.randn(shape, generator=generator).clamp_min(-1) for level, shape in SHAPES.items()}


def batches(rows: range) -> Iterator[dict[int, torch.Tensor]]:
    """The levels of rows, in batches."""
    for start in range(rows.start, rows.stop, BATCH):
        levels = [random_levels(row) for row in range(start, min(start + BATCH, rows.stop))]
        yield {level: torch.stack([x[level] for x in levels]) for level in SHAPES}


def make_job(manifest: Manifest, out: Path, *, dtype: Any = "fp32", zstd: bool = False, images: int = 8) -> FeatureJob:
    (out / WORK_FOLDER).mkdir(parents=True, exist_ok=True)
    settings = hashlib.sha256(json.dumps([dtype, zstd, images]).encode()).hexdigest()
    return FeatureJob(out=out, manifest=manifest, dtype=dtype, zstd=zstd, images_per_shard=images, settings=settings)


def write_left(job: FeatureJob) -> None:
    """Write the shards that are not written."""
    for shard in job.left():
        write_shard(job, shard, batches(job.rows(shard)), 0)


def make_features(manifest: Manifest, out: Path, **options: Any) -> Features:
    """A whole folder."""
    job = make_job(manifest, out, **options)
    write_left(job)
    data = {"name": manifest.header.name, "fingerprint": manifest.fingerprint}
    return finish(job, {**FIELDS, "data": data})
