"""What stored features take on a disk, for every way to store them, measured on a few images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from shards.errors import UserError
from shards.feature_codec import TYPES, FeatureType, encode
from shards.files import human_bytes
from shards.manifest import Manifest
from shards.pack_shard import member_json
from shards.tars import member_bytes


@dataclass(frozen=True)
class Sizes:
    """shapes: of an image's levels; image_bytes: mean bytes of an image in a tar by (dtype, zstd), None where a
    number does not fit the type."""

    shapes: dict[int, tuple[int, ...]]
    image_bytes: dict[tuple[FeatureType, bool], int | None]

    def of(self, dtype: FeatureType, *, zstd: bool) -> int:
        """Bytes of an image; 0 where they could not be measured (the extraction then names the image)."""
        return self.image_bytes[dtype, zstd] or 0


def measure(manifest: Manifest, images: Sequence[Mapping[int, Tensor]], rows: np.ndarray) -> Sizes:
    """Sizes of the levels of some images, {level: float32 [N, ...]}, that are rows of the manifest."""
    about = [member_bytes(len(member_json(manifest.record(int(row))))) for row in rows]
    image_bytes: dict[tuple[FeatureType, bool], int | None] = {}
    for dtype in TYPES:
        for zstd in (False, True):
            try:
                data = [member_bytes(len(encode(levels, dtype, zstd=zstd))) for levels in images]
                image_bytes[dtype, zstd] = (sum(data) + sum(about)) // len(images)
            except UserError:
                image_bytes[dtype, zstd] = None
    return Sizes({level: tuple(x.shape) for level, x in images[0].items()}, image_bytes)


def summary(sizes: Sizes, images: int) -> dict[str, Any]:
    """The sizes for a script: shapes of the levels, and bytes of an image and of all for every way to store them."""
    ways = [
        {
            "dtype": dtype,
            "zstd": zstd,
            "image_bytes": size,
            "all_bytes": None if size is None else size * images,
        }
        for (dtype, zstd), size in sizes.image_bytes.items()
    ]
    return {"images": images, "levels": {str(level): list(x) for level, x in sizes.shapes.items()}, "ways": ways}


def table(sizes: Sizes, images: int, dtype: FeatureType, *, zstd: bool) -> str:
    """The sizes for people, with what was chosen."""
    shapes = ", ".join(f"{level}: {' x '.join(map(str, shape))}" for level, shape in sizes.shapes.items())
    lines = [f"levels of an image (tiles x channels x height x width): {shapes}"]
    lines.append(f"{'stored as':<12} {'per image':>12} {f'{images} images':>16}")
    for (kind, packed), size in sizes.image_bytes.items():
        name = f"{kind}, zstd" if packed else kind
        mark = "  <- chosen" if (kind, packed) == (dtype, zstd) else ""
        one, every = ("does not fit", "") if size is None else (human_bytes(size), human_bytes(size * images))
        lines.append(f"{name:<12} {one:>12} {every:>16}{mark}")
    return "\n".join(lines)
