"""Features into tars: atomic, one shard at a time, each with a sidecar that says it is whole.

A shard holds the rows index * images_per_shard and on of the packed folder, so that what is in it depends on neither
ranks nor interruptions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from shards.checksums import sha256, xxh3
from shards.errors import UserError
from shards.feature_codec import FeatureType, encode, extension
from shards.features import WORK_FOLDER, Features, read_features, write_features
from shards.files import atomic_file
from shards.header import ShardInfo
from shards.manifest import Manifest
from shards.members import Place
from shards.pack_shard import member_json, shard_name
from shards.pool import default_processes
from shards.tars import TarWriter


@dataclass(frozen=True, kw_only=True)
class FeatureJob:
    """What is the same for all shards of an extraction; `settings` is the digest of everything that was asked for."""

    out: Path
    manifest: Manifest
    dtype: FeatureType
    zstd: bool
    images_per_shard: int
    settings: str

    @property
    def num_shards(self) -> int:
        """Shards of the whole folder."""
        return -(-len(self.manifest) // self.images_per_shard)

    def rows(self, shard: int) -> range:
        """The rows of a shard."""
        start = shard * self.images_per_shard
        return range(start, min(start + self.images_per_shard, len(self.manifest)))

    def left(self) -> list[int]:
        """Shards that no process has finished."""
        return [shard for shard in range(self.num_shards) if read_sidecar(self, shard) is None]

    def forget(self, shards: Iterable[int]) -> None:
        """Remove the sidecars of shards that are written again."""
        for shard in shards:
            _sidecar_path(self, shard).unlink(missing_ok=True)


def write_shard(job: FeatureJob, shard: int, batches: Iterable[Mapping[int, Tensor]], needed_bytes: int) -> None:
    """Write one tar, then its sidecar: a sidecar stands for a tar that is whole.

    Args:
        job: the extraction.
        shard: which one.
        batches: levels of its images in order, float32 on the CPU, {level: [B, N, ...]}; consumed up to the last image.
        needed_bytes: about how large the tar gets.

    Raises:
        UserError: the disk is full, or a number cannot be stored; the image is named.
    """
    rows: list[list[Any]] = []
    path = job.out / shard_name(shard)
    with atomic_file(path, needed_bytes=needed_bytes) as file, ThreadPoolExecutor(default_processes()) as pool:
        writer = TarWriter(file)
        for row, data in zip(job.rows(shard), _encoded(job, shard, batches, pool.map), strict=True):
            record = job.manifest.record(row)
            writer.add(f"{record.key}.json", member_json(record))
            offset = writer.add(f"{record.key}.{extension(job.zstd)}", data)
            rows.append([record.key, offset, len(data), sha256(data).hex(), xxh3(data).hex()])
        writer.finish()
    about = {
        "settings": job.settings,
        "num_bytes": writer.num_bytes,
        "sha256": writer.sha256().hex(),
        "rows": rows,
    }
    with atomic_file(_sidecar_path(job, shard)) as file:
        file.write(json.dumps(about).encode())


def read_sidecar(job: FeatureJob, shard: int) -> dict[str, Any] | None:
    """What a process wrote as this shard of this extraction, or None where none finished it."""
    path, tar = _sidecar_path(job, shard), job.out / shard_name(shard)
    if not path.is_file():
        return None
    about: dict[str, Any] = json.loads(path.read_bytes())
    whole = tar.is_file() and tar.stat().st_size == about["num_bytes"]
    return about if whole and about["settings"] == job.settings else None


def is_finished(job: FeatureJob, shard: int) -> bool:
    """Whether the sidecar of a shard is there; cheap, for counting."""
    return _sidecar_path(job, shard).is_file()


def finish(job: FeatureJob, fields: Mapping[str, Any]) -> Features:
    """Put the rows of all shards together, write the manifest, and open the folder.

    Args:
        job: the extraction, of which every shard is written.
        fields: of the manifest: levels, encoder, bags, data, settings.
    """
    rows: list[tuple[str, Place]] = []
    shards: list[ShardInfo] = []
    for shard in range(job.num_shards):
        about = read_sidecar(job, shard)
        assert about is not None, shard
        rows += [
            (key, Place(shard, offset, num_bytes, *map(bytes.fromhex, digests)))
            for key, offset, num_bytes, *digests in about["rows"]
        ]
        shards.append(ShardInfo(shard_name(shard), about["num_bytes"], about["sha256"], len(about["rows"])))
    assert len(rows) == len(job.manifest), "every image is encoded exactly once"
    write_features(job.out, rows, shards, {**fields, "dtype": job.dtype, "zstd": job.zstd})
    return read_features(job.out)


def _encoded(
    job: FeatureJob, shard: int, batches: Iterable[Mapping[int, Tensor]], run: Callable[..., Iterator[bytes]]
) -> Iterator[bytes]:
    """The payloads of a shard's images in order; the images of a batch are encoded side by side."""
    row, end = job.rows(shard).start, job.rows(shard).stop
    for batch in batches:
        size = len(next(iter(batch.values())))

        def payload(b: int, batch: Mapping[int, Tensor] = batch, first: int = row) -> bytes:
            try:
                return encode({level: x[b] for level, x in batch.items()}, job.dtype, zstd=job.zstd)
            except UserError as error:
                thing = f"sample {job.manifest.record(first + b).key}: {error.thing}"
                raise UserError(thing, fix=error.fix) from error

        yield from run(payload, range(size))
        row += size
        if row == end:
            return


def _sidecar_path(job: FeatureJob, shard: int) -> Path:
    return job.out / WORK_FOLDER / f"shard-{shard:06d}.json"
