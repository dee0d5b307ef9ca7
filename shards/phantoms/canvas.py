"""The plane that phantoms are drawn on, in millimetres, and the few shapes everything is made of. H W pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter

Float = NDArray[np.float32]

FIELD_HEIGHT_MM: Final = 200.0
SUPERSAMPLING: Final = 2
LINE_BLUR_MM: Final = 0.3  # tubes have no flat sides


@dataclass(frozen=True)
class Canvas:
    """An image of square pixels that shows 200 mm from top to bottom; x runs from the chest wall to the nipple."""

    height_px: int
    width_px: int

    @property
    def px_per_mm(self) -> float:
        """Pixels per millimetre, the same in x and y."""
        return self.height_px / FIELD_HEIGHT_MM

    @property
    def width_mm(self) -> float:
        """Width of the field in millimetres."""
        return self.width_px / self.px_per_mm

    @cached_property
    def x_mm(self) -> Float:
        """Pixel centres, [1, W]."""
        return ((np.arange(self.width_px, dtype=np.float32) + 0.5) / np.float32(self.px_per_mm))[None, :]

    @cached_property
    def y_mm(self) -> Float:
        """Pixel centres, [H, 1]."""
        return ((np.arange(self.height_px, dtype=np.float32) + 0.5) / np.float32(self.px_per_mm))[:, None]

    def zeros(self) -> Float:
        """An empty layer [H, W]."""
        return np.zeros((self.height_px, self.width_px), dtype=np.float32)

    def window(self, x_mm: float, y_mm: float, radius_mm: float) -> tuple[tuple[slice, slice], Float, Float]:
        """The square around a point, cut to the canvas: its slices, and dx [1, w] and dy [h, 1] from the point."""

        def span(centre_mm: float, size_px: int) -> slice:
            low = int(np.floor((centre_mm - radius_mm) * self.px_per_mm))
            high = int(np.ceil((centre_mm + radius_mm) * self.px_per_mm)) + 1
            return slice(min(max(low, 0), size_px), max(min(high, size_px), 0))

        rows, columns = span(y_mm, self.height_px), span(x_mm, self.width_px)
        return (rows, columns), self.x_mm[:, columns] - np.float32(x_mm), self.y_mm[rows] - np.float32(y_mm)


def add_spots(
    layer_HW: Float, canvas: Canvas, x_mm: ArrayLike, y_mm: ArrayLike, sigma_mm: ArrayLike, amplitude: ArrayLike
) -> None:
    """Add Gaussian spots, all at once. The pixel aperture widens them: a spot never falls between two pixels."""
    scale = canvas.px_per_mm
    x, y = np.asarray(x_mm) * scale - 0.5, np.asarray(y_mm) * scale - 0.5
    sigma = np.hypot(np.asarray(sigma_mm) * scale, 0.45)
    if x.size == 0:
        return
    reach = int(np.ceil(3 * float(np.max(sigma)))) + 1
    offset = np.arange(-reach, reach + 1)
    column, row = np.rint(x).astype(np.int64)[:, None] + offset, np.rint(y).astype(np.int64)[:, None] + offset
    inverse = (0.5 / np.square(sigma))[:, None]
    across = np.exp(-np.square(column - x[:, None]) * inverse)
    down = np.exp(-np.square(row - y[:, None]) * inverse) * np.asarray(amplitude)[:, None]
    height, width = layer_HW.shape
    across[(column < 0) | (column >= width)] = 0
    down[(row < 0) | (row >= height)] = 0
    index = np.clip(row, 0, height - 1)[:, :, None] * width + np.clip(column, 0, width - 1)[:, None, :]
    spots = (down[:, :, None] * across[:, None, :]).astype(np.float32)
    np.add.at(layer_HW.reshape(-1), index.reshape(-1), spots.reshape(-1))


@dataclass(frozen=True)
class Line:
    """A line through points [N, 2] (x, y) in millimetres; `level` is its intensity in 0..1."""

    points_mm: NDArray[np.float64]
    width_mm: float
    level: float


def draw_lines(canvas: Canvas, lines: Sequence[Line], *, full_scale: float) -> Float:
    """A layer [H, W] with the lines, later ones over earlier ones; `full_scale` is the highest level among them."""
    scale = canvas.px_per_mm * SUPERSAMPLING
    picture = Image.new("L", (canvas.width_px * SUPERSAMPLING, canvas.height_px * SUPERSAMPLING))
    pen = ImageDraw.Draw(picture)
    for line in lines:
        wanted_px = line.width_mm * scale
        width_px = max(1, round(wanted_px))
        faint = min(1.0, wanted_px / width_px)  # a line thinner than a pixel loses contrast, as it would in a detector
        fill = round(255 * min(1.0, faint * line.level / full_scale))
        pen.line((line.points_mm * scale).ravel().tolist(), fill=fill, width=width_px, joint="curve")
    layer_HW = np.asarray(picture.reduce(SUPERSAMPLING), dtype=np.float32) * np.float32(full_scale / 255)
    soft_HW: Float = gaussian_filter(layer_HW, LINE_BLUR_MM * canvas.px_per_mm, truncate=2.5)
    return soft_HW
