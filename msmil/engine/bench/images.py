"""Images to measure with: those of a packed folder, or drawn ones, packed into a folder for the time being.

H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from msmil.config import Config
from shards.codecs import Codec, Pixels
from shards.manifest import Manifest, read_manifest
from shards.pack import pack
from shards.recipes import AsIs
from shards.sources.base import Archive, SourceRow
from shards.splits import Validation

_SPECKLE = 6.0  # grey levels; it decides how well a drawn image compresses: to about 0.8 byte per pixel of tissue
DIFFERENT = 16


@contextmanager
def packed_for(config: Config, size_hw: tuple[int, int] | None, images: int) -> Iterator[Config]:
    """The configuration with data to measure on: its own, or `images` drawn ones of a size (of which few differ)."""
    if size_hw is None:
        yield config
        return
    with TemporaryDirectory(prefix="msmil_bench_") as folder:
        drawn = (draw(size_hw, seed) for seed in range(min(images, DIFFERENT)))
        pack_images(Path(folder), drawn, codec="png", labels=config.data.labels, number=images)
        data = replace(config.data, shards=str(Path(folder) / "shards"), features="", folds="none")
        yield replace(config, data=data)


def draw(size_hw: tuple[int, int], seed: int) -> Pixels:
    """A bright half ellipse with a smooth pattern and speckle in black air, uint8: what a mammogram costs to decode."""
    height, width = size_hw
    rng = np.random.default_rng(seed)
    y_H1, x_1W = np.arange(height)[:, None] / height - 0.5, np.arange(width)[None] / width
    inside_HW = (x_1W / 0.8) ** 2 + (y_H1 / 0.45) ** 2 < 1
    phase, turns = rng.uniform(0, 6.28, 2), rng.uniform(3, 9, 2)
    smooth_HW = 110 + 45 * np.sin(turns[0] * 6.28 * y_H1 + phase[0]) * np.cos(turns[1] * 6.28 * x_1W + phase[1])
    speckle_HW = rng.normal(scale=_SPECKLE, size=size_hw).astype(np.float32)
    image_HW: Pixels = np.where(inside_HW, (smooth_HW + speckle_HW).clip(1, 255), 0).astype(np.uint8)
    return image_HW


def pack_images(
    folder: Path, images: Iterable[Pixels], *, codec: Codec, labels: Sequence[str], number: int
) -> Manifest:
    """Pack `number` training images, these in turn, into folder/shards; every second one has all labels."""
    paths = []
    for i, image_HW in enumerate(images):
        paths.append(folder / f"{i:05}.png")
        Image.fromarray(image_HW).save(paths[-1], compress_level=1)
    rows = [_row(paths[i % len(paths)], i, labels) for i in range(number)]
    archive = Archive(file=folder, name="bench", labels=tuple(labels), rows=rows)
    out = folder / "shards"
    pack(
        archive,
        out,
        recipe=AsIs(),
        codec=codec,
        validation=Validation(fraction=0),
        samples_per_shard=64,
        quiet=True,
    )
    for path in paths:
        path.unlink()
    return read_manifest(out)


def _row(path: Path, i: int, labels: Sequence[str]) -> SourceRow:
    return SourceRow(
        image_path=path,
        image_id=f"{i:06}",
        exam_id=f"{i:06}",
        patient_id=f"{i:06}",
        laterality="L",
        view="CC",
        split="train",
        fold=-1,
        labels=dict.fromkeys(labels, i % 2),
        boxes=(),
        manufacturer="",
        density="",
        birads="",
    )
