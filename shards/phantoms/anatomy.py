"""Shape of a breast in one view, and its tissue. H W pixels; lengths in millimetres, chest wall at x = 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from shards.phantoms.canvas import FIELD_HEIGHT_MM, Canvas, Float
from shards.phantoms.texture import random_fields
from shards.types import View

FAT: Final = 0.27
ANGLES: Final = 721
# share of the breast that is glandular, by density class
DENSITY_THRESHOLD: Final = {"A": 1.25, "B": 0.7, "C": 0.15, "D": -0.45}


@dataclass(frozen=True, kw_only=True)
class BreastShape:
    """What both views of a breast share: depth from chest wall to nipple, scale of its height, density class."""

    depth_mm: float
    stature: float
    density: str


@dataclass(frozen=True)
class Anatomy:
    """The outline of a breast in one view, as a radius by angle around a point of the chest wall, and its muscle.

    radius_mm and slope are tables over the angle -90° (up) .. 90° (down); slope is the cosine between the radius and
    the outline's normal. muscle_x_mm, muscle_y_mm: where the muscle's edge meets the top and the chest wall (MLO);
    on CC muscle_y_mm is 0 and the muscle is a shallow bow of muscle_x_mm at the chest wall, often out of view.
    """

    view: View
    density: str
    centre_y_mm: float
    depth_mm: float
    radius_mm: NDArray[np.float64]
    slope: NDArray[np.float64]
    muscle_x_mm: float
    muscle_y_mm: float

    def _lookup(self, table: NDArray[np.float64], angle: Float) -> Float:
        position = (angle + np.float32(np.pi / 2)) * np.float32((ANGLES - 1) / np.pi)
        index = np.clip(position.astype(np.int32), 0, ANGLES - 2)
        table32 = table.astype(np.float32)
        low = table32[index]
        between: Float = low + (table32[index + 1] - low) * (position - index.astype(np.float32))
        return between

    def polar(self, x_mm: Float, y_mm: Float) -> tuple[Float, Float, Float]:
        """Depth under the skin in mm (negative in air), share of the way from chest wall to skin, and angle."""
        dy = y_mm - np.float32(self.centre_y_mm)
        angle = np.arctan2(dy, np.maximum(x_mm, np.float32(1e-3)))
        distance = np.hypot(x_mm, dy)
        radius = self._lookup(self.radius_mm, angle)
        return (radius - distance) * self._lookup(self.slope, angle), distance / radius, angle

    def muscle_mm(self, x_mm: Float, y_mm: Float) -> Float:
        """Depth inside the pectoral muscle in mm, negative outside."""
        if self.view == "CC":
            dy = y_mm - np.float32(self.centre_y_mm)
            bow: Float = np.float32(self.muscle_x_mm) - x_mm - np.square(dy) / np.float32(250)
            return bow
        down = y_mm / np.float32(self.muscle_y_mm)
        inside = 1 - x_mm / np.float32(self.muscle_x_mm) - down + np.float32(0.08) * np.sin(np.float32(np.pi) * down)
        depth: Float = inside / np.float32(np.hypot(1 / self.muscle_x_mm, 1 / self.muscle_y_mm))
        return depth

    def room_mm(self, x_mm: NDArray[np.float64], y_mm: NDArray[np.float64], canvas: Canvas) -> NDArray[np.float64]:
        """Distance in mm of points to the nearest of skin, muscle and border of the image, negative outside."""
        x, y = x_mm.astype(np.float32), y_mm.astype(np.float32)
        border = np.minimum(np.minimum(x, canvas.width_mm - x), np.minimum(y, FIELD_HEIGHT_MM - y))
        tissue = np.minimum(self.polar(x, y)[0], -self.muscle_mm(x, y))
        room: NDArray[np.float64] = np.minimum(tissue, border).astype(np.float64)
        return room


def make_anatomy(rng: np.random.Generator, shape: BreastShape, view: View, canvas: Canvas) -> Anatomy:
    """Draw the outline of a breast in one view; it always fits the width of the field."""
    depth = min(shape.depth_mm * rng.uniform(0.95, 1.05), 0.92 * canvas.width_mm)
    if view == "CC":
        centre, up, down = rng.uniform(96, 106), rng.uniform(86, 106), rng.uniform(78, 90)
        power_up, power_down = rng.uniform(1.6, 2.1), rng.uniform(1.9, 2.4)
        muscle = (rng.uniform(-9, 9), 0.0)
    else:
        centre, up, down = rng.uniform(116, 128), rng.uniform(165, 205), rng.uniform(58, 70)
        power_up, power_down = rng.uniform(1.45, 1.8), rng.uniform(1.8, 2.2)
        muscle = (rng.uniform(34, 62), rng.uniform(95, 140))
    up, down = up * shape.stature, down * shape.stature
    angle = np.linspace(-np.pi / 2, np.pi / 2, ANGLES)
    extent, power = np.where(angle < 0, up, down), np.where(angle < 0, power_up, power_down)
    across, along = np.abs(np.cos(angle)) / depth, np.abs(np.sin(angle)) / extent
    radius = (across**power + along**power) ** (-1 / power)
    waves = sum(rng.normal(0, 0.012 / k) * np.sin(k * angle + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 5))
    tilt = np.deg2rad(rng.uniform(-6, 6) if view == "CC" else rng.uniform(2, 14))
    nipple = rng.uniform(1, 3.5) * np.exp(-0.5 * np.square((angle - tilt) * depth / 4))
    radius = radius * (1 + waves) + nipple
    slope = radius / np.hypot(radius, np.gradient(radius, angle))
    return Anatomy(view, shape.density, centre, depth, radius, slope, *muscle)


def draw_tissue(rng: np.random.Generator, anatomy: Anatomy, canvas: Canvas) -> tuple[Float, Float]:
    """Tissue [H, W] in intensities of 0..1 (0 in air), and the cover [H, W] of each pixel by the breast."""
    skin, share, angle = anatomy.polar(canvas.x_mm, canvas.y_mm)
    texture, glands, strand_a, strand_b = random_fields(rng, canvas)
    # glandular tissue lies in a fan behind the nipple and spares the fat under the skin and before the muscle
    fan = np.exp(-np.square((share - rng.uniform(0.5, 0.65)) / np.float32(0.33))) * np.square(np.cos(angle * 0.75))
    threshold = DENSITY_THRESHOLD[anatomy.density] + rng.normal(0, 0.15)
    gland = expit((glands + 0.9 * texture * 0.3 + np.float32(2.2) * (fan - 0.55) - threshold) * np.float32(1.9))
    gland *= np.clip((skin - 4) * np.float32(1 / 8), 0, 1)
    ridge = np.exp(-np.square(strand_a * np.float32(5))) + np.exp(-np.square(strand_b * np.float32(5)))
    tissue = (
        np.float32(FAT)
        + np.float32(rng.uniform(0.16, 0.24)) * gland * (1 + np.float32(0.08) * strand_a)
        + np.float32(0.035) * texture
        + np.float32(0.022) * ridge * np.maximum(np.float32(0.7) + np.float32(0.5) * texture + gland, 0)
    )
    muscle = expit(anatomy.muscle_mm(canvas.x_mm, canvas.y_mm) * np.float32(0.8))
    level = np.float32(rng.uniform(0.55, 0.8)) + np.float32(0.03) * texture + np.float32(0.012) * strand_b
    tissue += muscle * (level - tissue)
    thickness = 1 - np.exp(-np.maximum(skin, 0) * np.float32(1 / rng.uniform(2.5, 7)))
    line = np.float32(rng.uniform(0.05, 0.2)) * np.exp(-np.square((skin - 1) / np.float32(0.9)))
    cover = np.clip(skin * np.float32(canvas.px_per_mm) + np.float32(0.5), 0, 1)
    return (tissue * (np.float32(0.25) + np.float32(0.75) * thickness) + line) * cover, cover
