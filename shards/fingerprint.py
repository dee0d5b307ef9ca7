"""What identifies training data, whatever machine, path, codec or number of processes made it.

N rows (samples), K labels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.codecs import Pixels
from shards.types import SPLITS


def pixels_sha256(image_HW: Pixels) -> bytes:
    """Digest of decoded pixels, row by row, little-endian: the same whatever codec or zlib wrote them."""
    little = image_HW.astype(image_HW.dtype.newbyteorder("<"), copy=False)
    return hashlib.sha256(np.ascontiguousarray(little).data).digest()


def fingerprint(
    *,
    labels: Sequence[str],
    height_px: int,
    width_px: int,
    dtype: str,
    recipe: Mapping[str, Any],
    shard_N: npt.NDArray[np.int32],
    split_N: Sequence[str],
    label_NK: npt.NDArray[np.int8],
    pixels_N32: npt.NDArray[np.uint8],
) -> str:
    """SHA-256 over what training sees: stored form, and per row in order its shard, split, labels and pixels.

    The shard counts because samples are shuffled in blocks of shards; the ids of patients do not.
    """
    assert len(shard_N) == len(split_N) == len(label_NK) == len(pixels_N32)
    form = {"labels": list(labels), "size_px": [height_px, width_px], "dtype": dtype, "recipe": dict(recipe)}
    digest = hashlib.sha256(json.dumps(form, sort_keys=True).encode())
    digest.update(np.ascontiguousarray(shard_N, "<i4").data)
    code = {split: position for position, split in enumerate(SPLITS)}
    digest.update(bytes(code[split] for split in split_N))  # type: ignore[index]
    digest.update(np.ascontiguousarray(label_NK).data)
    digest.update(np.ascontiguousarray(pixels_N32).data)
    return digest.hexdigest()
