"""What every archive is read into: rows with paths, ids, labels and boxes; no pixels yet."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from shards.types import Box, Split

BOXES_SWAPPED: Final = "boxes with inverted corners, swapped"
BOXES_CLIPPED: Final = "boxes reaching outside their image, clipped"
BOXES_LEFT_OUT: Final = "boxes without area inside the stored image, left out"


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRow:
    """One image of an archive.

    `labels` holds 1, 0 or UNKNOWN for every label that the archive offers; `boxes` are in pixels of the image file,
    with x0 < x1 and y0 < y1; `fold` is -1 where the archive has none.
    """

    image_path: Path
    image_id: str
    exam_id: str
    patient_id: str
    laterality: str
    view: str
    split: Split
    fold: int
    labels: dict[str, int]
    boxes: tuple[Box, ...]
    manufacturer: str
    density: str
    birads: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Archive:
    """What a source gives.

    file: the table it was read from, for messages; name: what the manifest calls the archive;
    labels: every label that it offers; notes: what was mended while reading, with counts.
    """

    file: Path
    name: str
    labels: tuple[str, ...]
    rows: list[SourceRow]
    notes: Counter[str] = field(default_factory=Counter)


def upright(boxes: list[Box], notes: Counter[str]) -> tuple[Box, ...]:
    """Boxes with their corners in order; inverted ones are swapped and counted, those without area left out."""
    kept = []
    for box in boxes:
        x0, x1 = sorted((box.x0, box.x1))
        y0, y1 = sorted((box.y0, box.y1))
        if (x0, y0) != (box.x0, box.y0):
            notes[BOXES_SWAPPED] += 1
        if x0 < x1 and y0 < y1:
            kept.append(Box(label=box.label, x0=x0, y0=y0, x1=x1, y1=y1))
        else:
            notes[BOXES_LEFT_OUT] += 1
    return tuple(kept)
