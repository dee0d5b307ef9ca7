"""What flows from an archive to a batch. B bags (images), H W pixels, K labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from torch import Tensor

Split = Literal["train", "val", "test"]
Laterality = Literal["L", "R"]
View = Literal["CC", "MLO"]

SPLITS: Final[tuple[Split, ...]] = ("train", "val", "test")
UNKNOWN: Final = -1


@dataclass(frozen=True, slots=True)
class Box:
    """A finding in pixels; x1 and y1 are exclusive ends, so that the width is x1 - x0."""

    label: str
    x0: float
    y0: float
    x1: float
    y1: float


@dataclass(frozen=True, slots=True)
class Geometry:
    """Invertible map from source pixels to stored pixels: crop, then scale, then pad, then flip.

    All lengths are pixels. `crop_*` is in source pixels; `scale_*` is stored pixels per source pixel;
    `pad_*` is in stored pixels; `flipped` mirrors left and right within `stored_width_px`.
    """

    source_height_px: int
    source_width_px: int
    crop_x_px: int
    crop_y_px: int
    crop_width_px: int
    crop_height_px: int
    scale_x: float
    scale_y: float
    pad_left_px: int
    pad_top_px: int
    flipped: bool
    stored_height_px: int
    stored_width_px: int


@dataclass(frozen=True, slots=True)
class SampleRecord:
    """A view of one manifest row. `labels` holds 1, 0 or UNKNOWN; `boxes` are in stored pixels."""

    row: int
    key: str
    shard: int
    offset_bytes: int
    num_bytes: int
    sha256: bytes
    xxh3: bytes
    image_id: str
    exam_id: str
    patient_id: str
    laterality: str
    view: str
    split: Split
    fold: int
    labels: dict[str, int]
    boxes: tuple[Box, ...]
    geometry: Geometry
    manufacturer: str
    density: str
    birads: str


@dataclass(slots=True)
class Batch:
    """What a rank gets for one micro-step, on the host.

    image_B1HW: uint8 or uint16, None where features take their place; label_BK: int8 with 1, 0, -1 (unknown);
    weight_B: float32, 0 marks padding; sample_B: int64 row of the manifest;
    levels: {stride or tile size: stored features, [B, N, ...]}, where they are read;
    skipped: {place in the batch: what is broken} of samples that could not be read: black, and of weight 0.
    """

    image_B1HW: Tensor | None
    label_BK: Tensor
    weight_B: Tensor
    sample_B: Tensor
    levels: dict[int, Tensor] | None = None
    skipped: Mapping[int, str] = field(default_factory=dict)

    def part(self, part: slice) -> Batch:
        """The samples of a slice of the batch, as views."""
        places = range(len(self.sample_B))[part]
        return Batch(
            image_B1HW=None if self.image_B1HW is None else self.image_B1HW[part],
            label_BK=self.label_BK[part],
            weight_B=self.weight_B[part],
            sample_B=self.sample_B[part],
            levels=None if self.levels is None else {level: x[part] for level, x in self.levels.items()},
            skipped={places.index(place): text for place, text in self.skipped.items() if place in places},
        )

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (torch's DataLoader calls this)."""
        return Batch(
            image_B1HW=None if self.image_B1HW is None else self.image_B1HW.pin_memory(),
            label_BK=self.label_BK.pin_memory(),
            weight_B=self.weight_B.pin_memory(),
            sample_B=self.sample_B.pin_memory(),
            levels=None if self.levels is None else {level: x.pin_memory() for level, x in self.levels.items()},
            skipped=self.skipped,
        )
