"""What the machine does to the tissue: grey curve, noise, and what it burns into the picture. H W pixels."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from shards.phantoms.canvas import Canvas, Float
from shards.types import Laterality, View

# exponent, and how much of an S-shaped curve is mixed in
GREY_CURVES: Final = {
    "SIEMENS": (0.8, 0.0),
    "Planmed": (1.0, 0.35),
    "IMS s.r.l.": (1.3, 0.0),
    "IMS GIOTTO S.p.A.": (1.0, 0.0),
}
NOISE_SD: Final = 0.012  # at 384 rows; finer pixels collect fewer photons

Grey = NDArray[np.uint8]


def expose(rng: np.random.Generator, tissue_HW: Float, cover_HW: Float, scanner: str, canvas: Canvas) -> Grey:
    """Tissue in intensities to 8-bit grey: noise, exposure, the manufacturer's curve. Air is exactly 0."""
    exponent, mix = GREY_CURVES[scanner]
    noise_sd = NOISE_SD * np.sqrt(canvas.height_px / 384)
    noisy = tissue_HW + np.float32(noise_sd) * rng.standard_normal(tissue_HW.shape, dtype=np.float32)
    level = np.clip(noisy * np.float32(rng.uniform(0.87, 1.13)), 0, 1)
    curve = level ** np.float32(exponent * rng.uniform(0.93, 1.07))
    smooth = np.square(level) * (3 - 2 * level)
    grey = curve + np.float32(mix) * (smooth - curve)
    return (np.float32(255) * grey * (cover_HW > 0) + np.float32(0.5)).astype(np.uint8)


@lru_cache(maxsize=8)
def _font(size_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size_px)


def burn_in(
    rng: np.random.Generator, image_HW: Grey, laterality: Laterality, view: View, canvas: Canvas
) -> tuple[Grey, NDArray[np.bool_]]:
    """Write the corner label and the grey marker block into the air beside the breast.

    Returns the image and a mask [H, W] of what was written over. The chest wall is where it is in the final picture:
    at the left for a left breast.
    """
    picture = Image.fromarray(image_HW)
    pen = ImageDraw.Draw(picture)
    mm, at_top = canvas.px_per_mm, bool(rng.random() < 0.7)
    covered = np.zeros(image_HW.shape, dtype=bool)

    def corner(width_px: int, height_px: int, top: bool) -> tuple[int, int, int, int]:
        margin_x, margin_y = round(mm * rng.uniform(2, 6)), round(mm * rng.uniform(3, 9))
        left = canvas.width_px - margin_x - width_px if laterality == "L" else margin_x
        upper = margin_y if top else canvas.height_px - margin_y - height_px
        return left, upper, left + width_px, upper + height_px

    font = _font(max(6, round(mm * rng.uniform(7, 9))))
    text = f"{laterality}{'-' if rng.random() < 0.5 else ' '}{view}"
    ink = pen.textbbox((0, 0), text, font=font)
    label = corner(int(ink[2] - ink[0]) + 1, int(ink[3] - ink[1]) + 1, at_top)
    pen.text((label[0] - ink[0], label[1] - ink[1]), text, fill=255, font=font)
    block = corner(round(mm * rng.uniform(9, 20)), round(mm * rng.uniform(7, 14)), not at_top)
    pen.rectangle((block[0], block[1], block[2] - 1, block[3] - 1), fill=int(rng.integers(120, 251)))
    for left, upper, right, lower in (label, block):
        covered[max(upper, 0) : lower, max(left, 0) : right] = True
    return np.asarray(picture), covered
