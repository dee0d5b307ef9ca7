"""The end of packing: the rows of all shards become samples.arrow and manifest.json. N rows (samples), K labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from shards import samples
from shards.errors import UserError
from shards.fingerprint import fingerprint
from shards.header import Header
from shards.images import REASONS
from shards.manifest import write_manifest
from shards.pack_plan import PackPlan
from shards.pack_report import count
from shards.pack_shard import PIXELS_COLUMN, Job, PackedShard, read_sidecar, shard_name
from shards.sources.base import Archive


def finish(job: Job, plan: PackPlan, archive: Archive) -> Header:
    """Put the rows of all shards together and write the manifest.

    Raises:
        UserError: every image was left out, or the disk is full.
    """
    packed: list[tuple[int, PackedShard]] = []
    dropped, notes = list(plan.missing), Counter(archive.notes)
    for index in range(len(plan.shards)):
        shard = read_sidecar(job, index, plan.file_bytes[index])
        assert shard is not None, index
        dropped += shard.dropped
        notes.update(shard.notes)
        if shard.table.num_rows:
            packed.append((index, shard))
    if not packed:
        raise UserError("no image is left: all are broken", fix="look at the images", file=archive.file)
    table, form = _joined(job, [shard for _, shard in packed])
    fields = {
        "name": archive.name,
        "codec": job.codec,
        "settings": plan.settings,
        "counts": count(table, job.labels),
        "dropped": _by_reason(dropped),
        "notes": {what: number for what, number in sorted(notes.items()) if number},
        "shards": [
            {"name": shard_name(i), "num_bytes": s.num_bytes, "sha256": s.sha256, "num_samples": s.table.num_rows}
            for i, s in packed
        ],
    }
    return write_manifest(job.out, table, {**form, **fields})


def _joined(job: Job, shards: Sequence[PackedShard]) -> tuple[pa.Table, dict[str, Any]]:
    """The rows of all shards, and the fields of the manifest that say what training sees of them."""
    shard_N = np.repeat(np.arange(len(shards), dtype=np.int32), [shard.table.num_rows for shard in shards])
    table = pa.concat_tables([shard.table for shard in shards]).combine_chunks()
    form: dict[str, Any] = {
        "labels": list(job.labels),
        "height_px": job.stored.height_px,
        "width_px": job.stored.width_px,
        "dtype": job.stored.dtype,
        "recipe": job.recipe.describe(),
    }
    identity = fingerprint(
        **form,
        shard_N=shard_N,
        split_N=table.column("split").to_pylist(),
        label_NK=np.stack([samples.fixed(table, samples.LABEL_PREFIX + label) for label in job.labels], axis=1),
        pixels_N32=samples.digests(table, PIXELS_COLUMN),
    )
    at = table.schema.get_field_index("shard")
    table = table.set_column(at, table.schema.field(at), pa.array(shard_N)).drop_columns([PIXELS_COLUMN])
    return table, {**form, "fingerprint": identity}


def _by_reason(dropped: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    found = []
    for reason in REASONS:
        image_ids = sorted(image_id for image_id, why in dropped if why == reason)
        if image_ids:
            found.append({"reason": reason, "count": len(image_ids), "image_ids": image_ids})
    return found
