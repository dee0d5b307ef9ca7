"""What a run was trained or judged on, in numbers, so that its folder tells it without the shards. No ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from shards.manifest import Manifest
from shards.pack_report import count_parts
from shards.samples import from_numbers
from shards.types import SPLITS


def describe_data(manifest: Manifest, labels: Sequence[str]) -> dict[str, Any]:
    """Name, images, recipe and fingerprints of the data, and the counts of each split as this run divides them.

    The fingerprint is that of the images and their splits, the packed one that of the folder, whatever fold is used.
    The address is there where they were read from elsewhere.

    Args:
        manifest: of the data, with the run's fold in place.
        labels: that are learned.
    """
    header = manifest.header
    parts: dict[str, pa.Table] = {split: manifest.table.take(from_numbers(manifest.rows(split))) for split in SPLITS}
    return {
        "name": header.name,
        **({} if manifest.remote is None else {"address": manifest.place}),
        "fingerprint": manifest.fingerprint,
        "packed_fingerprint": header.fingerprint,
        "height_px": header.height_px,
        "width_px": header.width_px,
        "dtype": header.dtype,
        "codec": header.codec,
        "recipe": header.recipe,
        "left_out": [{"reason": dropped["reason"], "count": dropped["count"]} for dropped in header.dropped],
        "counts": count_parts(parts, labels),
    }
