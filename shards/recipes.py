"""Recipes: how source pixels become stored pixels, with the exact geometry of it. H W pixels."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import numpy.typing as npt

from shards import geometry
from shards.codecs import Pixels
from shards.errors import UserError
from shards.types import Geometry


class Recipe(Protocol):
    """A named and versioned way from the pixels of a file to those that are stored."""

    name: ClassVar[str]
    version: ClassVar[int]
    dtype: ClassVar[Literal["uint8"] | None]
    """Of the stored pixels; None where it is that of the first image."""

    def apply(self, source_HW: Pixels) -> tuple[Pixels, Geometry]:
        """Stored pixels, and where each of them came from.

        Raises:
            EmptyImageError: nothing but air is left.
        """

    def size(self) -> tuple[int, int] | None:
        """Height and width of what is stored; None where the first image decides."""

    def describe(self) -> dict[str, Any]:
        """Name, version and what else determines the pixels, as the manifest records it."""


class EmptyImageError(ValueError):
    """There is no breast in the image."""


@dataclass(frozen=True, kw_only=True)
class AsIs:
    """The pixels of the file, 8 or 16 bit; every image of the archive must have the same size.

    Where a size is given it is the one that they must have; else the first image decides.
    """

    name: ClassVar[str] = "as_is"
    version: ClassVar[int] = 1
    dtype: ClassVar[Literal["uint8"] | None] = None

    height_px: int | None = None
    width_px: int | None = None

    def apply(self, source_HW: Pixels) -> tuple[Pixels, Geometry]:
        """The pixels themselves."""
        return source_HW, geometry.identity(*source_HW.shape)

    def size(self) -> tuple[int, int] | None:
        """The size that was given."""
        return (self.height_px, self.width_px) if self.height_px and self.width_px else None

    def describe(self) -> dict[str, Any]:
        """Name and version: the size changes nothing in the pixels."""
        return {"name": self.name, "version": self.version}


@dataclass(frozen=True, kw_only=True)
class MammoClip:
    """The preparation of Mammo-CLIP's PNG release of VinDr-Mammo: cut to the breast, stretched to one size, 8 bit.

    Crop `border_px` from each side; min-max to 0..255; set what is `air` or darker to 0; keep the longest run of
    non-constant columns (judged on the central 80 % of the rows), then of non-constant rows; resize by area to
    height x width. The aspect ratio is not kept.
    """

    name: ClassVar[str] = "mammoclip"
    version: ClassVar[int] = 1
    dtype: ClassVar[Literal["uint8"] | None] = "uint8"

    height_px: int = 1520
    width_px: int = 912
    border_px: int = 5
    air: int = 40

    def apply(self, source_HW: Pixels) -> tuple[Pixels, Geometry]:
        """uint8 pixels [height_px, width_px] of the breast."""
        height, width = source_HW.shape
        border = self.border_px
        if min(height, width) < 2 * border + 3:
            raise EmptyImageError(f"{height} x {width} pixels are all border")
        inner_HW = min_max_uint8(source_HW[border : height - border, border : width - border])
        inner_HW[inner_HW <= self.air] = 0
        middle, reach = inner_HW.shape[0] // 2, int(inner_HW.shape[0] * 0.4)
        central_HW = inner_HW[middle - reach : middle + reach]
        x, crop_width = longest_run(np.ptp(central_HW, axis=0) > 0)
        y, crop_height = longest_run(np.ptp(inner_HW[:, x : x + crop_width], axis=1) > 0) if crop_width else (0, 0)
        if not crop_width or not crop_height:
            raise EmptyImageError(f"no pixel is brighter than {self.air} of 255")
        stored_HW = area_resize(inner_HW[y : y + crop_height, x : x + crop_width], self.height_px, self.width_px)
        cut = geometry.crop(
            geometry.identity(height, width),
            x_px=border + x,
            y_px=border + y,
            width_px=crop_width,
            height_px=crop_height,
        )
        return stored_HW, geometry.resize(cut, height_px=self.height_px, width_px=self.width_px)

    def size(self) -> tuple[int, int] | None:
        """The size to which it stretches."""
        return self.height_px, self.width_px

    def describe(self) -> dict[str, Any]:
        """Name, version and parameters."""
        return {"name": self.name, "version": self.version, **asdict(self)}


def make_recipe(name: str, *, height_px: int | None = None, width_px: int | None = None) -> Recipe:
    """A recipe by name. Sizes that are left out are mammoclip's own; for as_is the first image decides.

    Raises:
        UserError: a size is not positive, or as_is was given only one of the two.
    """
    sizes = {"height_px": height_px, "width_px": width_px}
    given = {key: value for key, value in sizes.items() if value is not None}
    if any(value < 1 for value in given.values()):
        raise UserError(f"a stored size of {height_px} x {width_px}", fix="give --height and --width of at least 1")
    if name == AsIs.name:
        if len(given) == 1:
            raise UserError("only one of --height and --width", fix="give both, or neither")
        return AsIs(**given)
    assert name == MammoClip.name, name
    return MammoClip(**given)


def min_max_uint8(image_HW: Pixels) -> npt.NDArray[np.uint8]:
    """Stretch so that the darkest pixel is 0 and the brightest 255, rounded down; a constant image becomes 0."""
    low, high = int(image_HW.min()), int(image_HW.max())
    if low == high:
        return np.zeros(image_HW.shape, np.uint8)
    table = ((np.arange(high + 1, dtype=np.int64) - low).clip(0) * 255 // (high - low)).astype(np.uint8)
    return table[image_HW]


def longest_run(flags: npt.NDArray[np.bool_]) -> tuple[int, int]:
    """Start and length of the longest run of True, the first of equals; length 0 where there is none."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], flags, [False])).astype(np.int8)))
    starts, ends = edges[::2], edges[1::2]
    if not len(starts):
        return 0, 0
    best = int(np.argmax(ends - starts))
    return int(starts[best]), int(ends[best] - starts[best])


def area_resize(image_HW: npt.NDArray[np.uint8], height_px: int, width_px: int) -> npt.NDArray[np.uint8]:
    """Resize so that a pixel is the mean over the area of the source that it covers, fractions of pixels counted.

    That is what OpenCV's INTER_AREA computes when it shrinks. Pillow's BOX filter is not: it counts a source pixel
    wholly or not at all. Sums are exact integers; means are rounded to the nearest, halves to even.
    """
    rows_HW = _area_sums(image_HW.astype(np.int64), height_px)
    both_WH = _area_sums(np.ascontiguousarray(rows_HW.T), width_px)
    area = image_HW.shape[0] * image_HW.shape[1]
    return np.ascontiguousarray(np.rint(both_WH.T / area).astype(np.uint8))


def _area_sums(values_LX: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.int64]:
    """`length` times the means of `size` equal pieces along the first axis.

    Piece i ends at source position i * length / size; in units of 1 / size all of that is whole numbers.
    """
    length = values_LX.shape[0]
    sums_LX = np.zeros((length + 1, values_LX.shape[1]), np.int64)
    np.cumsum(values_LX, axis=0, out=sums_LX[1:])
    whole, rest = np.divmod(np.arange(size + 1) * length, size)
    at_end_SX = sums_LX[whole] * size + rest[:, None] * values_LX[np.minimum(whole, length - 1)]
    pieces_SX: npt.NDArray[np.int64] = np.diff(at_end_SX, axis=0)
    return pieces_SX
