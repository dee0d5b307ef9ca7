"""From source pixels to stored pixels and back: crop, then scale, then pad, then flip.

Coordinates are those of pixel edges: pixel i covers i..i+1, so a box scales without half-pixel shifts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from shards.types import Box, Geometry


def identity(height_px: int, width_px: int) -> Geometry:
    """The map of an image that is stored as it is."""
    return Geometry(
        source_height_px=height_px,
        source_width_px=width_px,
        crop_x_px=0,
        crop_y_px=0,
        crop_width_px=width_px,
        crop_height_px=height_px,
        scale_x=1.0,
        scale_y=1.0,
        pad_left_px=0,
        pad_top_px=0,
        flipped=False,
        stored_height_px=height_px,
        stored_width_px=width_px,
    )


def crop(geometry: Geometry, *, x_px: int, y_px: int, width_px: int, height_px: int) -> Geometry:
    """Cut a window out of what `geometry` shows; a second crop is relative to the first.

    Only before scaling, padding and flipping, since that is the order in which a Geometry is applied.
    """
    assert (geometry.scale_x, geometry.scale_y) == (1.0, 1.0), "crop comes before scaling"
    assert (geometry.pad_left_px, geometry.pad_top_px, geometry.flipped) == (0, 0, False), "crop comes before padding"
    assert 0 <= x_px < x_px + width_px <= geometry.crop_width_px, (x_px, width_px)
    assert 0 <= y_px < y_px + height_px <= geometry.crop_height_px, (y_px, height_px)
    return replace(
        geometry,
        crop_x_px=geometry.crop_x_px + x_px,
        crop_y_px=geometry.crop_y_px + y_px,
        crop_width_px=width_px,
        crop_height_px=height_px,
        stored_width_px=width_px,
        stored_height_px=height_px,
    )


def resize(geometry: Geometry, *, height_px: int, width_px: int) -> Geometry:
    """Stretch what is cropped to a size; the aspect ratio may change."""
    assert (geometry.pad_left_px, geometry.pad_top_px, geometry.flipped) == (0, 0, False), "scaling before padding"
    return replace(
        geometry,
        scale_x=width_px / geometry.crop_width_px,
        scale_y=height_px / geometry.crop_height_px,
        stored_width_px=width_px,
        stored_height_px=height_px,
    )


def map_boxes(geometry: Geometry, boxes: Iterable[Box]) -> tuple[Box, ...]:
    """Source pixels -> stored pixels, clipped to the stored image; boxes of which nothing is left are left out."""
    mapped = (_mapped(geometry, box) for box in boxes)
    clipped = (clip(box, geometry.stored_height_px, geometry.stored_width_px) for box in mapped)
    return tuple(box for box in clipped if box.x0 < box.x1 and box.y0 < box.y1)


def unmap_boxes(geometry: Geometry, boxes: Iterable[Box]) -> tuple[Box, ...]:
    """Stored pixels -> source pixels, clipped to the source image; as many boxes as came in, in order."""
    unmapped = (_unmapped(geometry, box) for box in boxes)
    return tuple(clip(box, geometry.source_height_px, geometry.source_width_px) for box in unmapped)


def clip(box: Box, height_px: int, width_px: int) -> Box:
    """The part of a box inside an image; without area where it lies outside."""
    return Box(
        label=box.label,
        x0=min(max(box.x0, 0.0), float(width_px)),
        y0=min(max(box.y0, 0.0), float(height_px)),
        x1=min(max(box.x1, 0.0), float(width_px)),
        y1=min(max(box.y1, 0.0), float(height_px)),
    )


def _mapped(geometry: Geometry, box: Box) -> Box:
    x0, x1 = ((x - geometry.crop_x_px) * geometry.scale_x + geometry.pad_left_px for x in (box.x0, box.x1))
    y0, y1 = ((y - geometry.crop_y_px) * geometry.scale_y + geometry.pad_top_px for y in (box.y0, box.y1))
    if geometry.flipped:
        x0, x1 = geometry.stored_width_px - x1, geometry.stored_width_px - x0
    return Box(label=box.label, x0=x0, y0=y0, x1=x1, y1=y1)


def _unmapped(geometry: Geometry, box: Box) -> Box:
    x0, x1 = box.x0, box.x1
    if geometry.flipped:
        x0, x1 = geometry.stored_width_px - x1, geometry.stored_width_px - x0
    x0, x1 = ((x - geometry.pad_left_px) / geometry.scale_x + geometry.crop_x_px for x in (x0, x1))
    y0, y1 = ((y - geometry.pad_top_px) / geometry.scale_y + geometry.crop_y_px for y in (box.y0, box.y1))
    return Box(label=box.label, x0=x0, y0=y0, x1=x1, y1=y1)
