"""Geometry: boxes go from source to stored pixels and back, exactly, for any crop, scale, pad and flip."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.geometry import clip, crop, identity, map_boxes, resize, unmap_boxes
from shards.types import Box, Geometry


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    height, width = draw(st.integers(8, 4000)), draw(st.integers(8, 4000))
    x, y = draw(st.integers(0, width - 4)), draw(st.integers(0, height - 4))
    cut = crop(
        identity(height, width),
        x_px=x,
        y_px=y,
        width_px=draw(st.integers(4, width - x)),
        height_px=draw(st.integers(4, height - y)),
    )
    scaled = resize(cut, height_px=draw(st.integers(4, 2000)), width_px=draw(st.integers(4, 2000)))
    left, top = draw(st.integers(0, 50)), draw(st.integers(0, 50))
    fields = {name: getattr(scaled, name) for name in Geometry.__dataclass_fields__}
    fields |= {
        "pad_left_px": left,
        "pad_top_px": top,
        "flipped": draw(st.booleans()),
        "stored_width_px": scaled.stored_width_px + left + draw(st.integers(0, 50)),
        "stored_height_px": scaled.stored_height_px + top + draw(st.integers(0, 50)),
    }
    return Geometry(**fields)


@st.composite
def boxes_in_crop(draw: st.DrawFn, geometry: Geometry) -> Box:
    def span(start: int, length: int) -> tuple[float, float]:
        first = draw(st.floats(0, 0.8))
        return start + first * length, start + min(1.0, first + draw(st.floats(0.05, 0.2))) * length

    x0, x1 = span(geometry.crop_x_px, geometry.crop_width_px)
    y0, y1 = span(geometry.crop_y_px, geometry.crop_height_px)
    return Box(label="Mass", x0=x0, y0=y0, x1=x1, y1=y1)


def corners(box: Box) -> tuple[float, float, float, float]:
    return box.x0, box.y0, box.x1, box.y1


@given(st.data())
def test_a_box_inside_the_crop_comes_back_as_it_was(data: st.DataObject) -> None:
    geometry = data.draw(geometries())
    box = data.draw(boxes_in_crop(geometry))
    (stored,) = map_boxes(geometry, [box])
    assert 0 <= stored.x0 < stored.x1 <= geometry.stored_width_px
    assert 0 <= stored.y0 < stored.y1 <= geometry.stored_height_px
    (back,) = unmap_boxes(geometry, [stored])
    np.testing.assert_allclose(corners(back), corners(box), rtol=0, atol=1e-6)


@given(geometries())
def test_the_crop_fills_the_stored_image_but_for_the_padding(geometry: Geometry) -> None:
    x0, y0 = geometry.crop_x_px, geometry.crop_y_px
    whole = Box("Mass", x0, y0, x0 + geometry.crop_width_px, y0 + geometry.crop_height_px)
    (stored,) = map_boxes(geometry, [whole])
    width, height = geometry.crop_width_px * geometry.scale_x, geometry.crop_height_px * geometry.scale_y
    left = geometry.pad_left_px
    if geometry.flipped:
        left = geometry.stored_width_px - left - width
    expected = (left, geometry.pad_top_px, left + width, geometry.pad_top_px + height)
    np.testing.assert_allclose(corners(stored), expected, rtol=0, atol=1e-6)


def test_identity_changes_nothing() -> None:
    box = Box("Mass", 1.5, 2.0, 10.0, 64.0)
    assert map_boxes(identity(64, 48), [box]) == (box,)
    assert unmap_boxes(identity(64, 48), [box]) == (box,)


def test_a_second_crop_is_relative_to_the_first() -> None:
    once = crop(identity(100, 100), x_px=30, y_px=50, width_px=40, height_px=20)
    twice = crop(once, x_px=5, y_px=6, width_px=10, height_px=10)
    assert (twice.crop_x_px, twice.crop_y_px) == (35, 56)
    assert (twice.stored_width_px, twice.stored_height_px) == (10, 10)


def test_boxes_are_clipped_to_the_stored_image_and_left_out_where_nothing_remains() -> None:
    geometry = crop(identity(100, 100), x_px=50, y_px=0, width_px=50, height_px=100)
    reaching = Box("Mass", 40, 10, 60, 20)
    outside = Box("Mass", 10, 10, 50, 20)
    assert map_boxes(geometry, [reaching, outside]) == (Box("Mass", 0, 10, 10, 20),)


def test_unmapping_keeps_every_box_so_that_scores_stay_beside_them() -> None:
    geometry = Geometry(**{**_fields(identity(10, 10)), "pad_left_px": 10, "stored_width_px": 20})
    in_padding, in_image = Box("Mass", 0, 0, 5, 5), Box("Mass", 10, 0, 15, 5)
    assert unmap_boxes(geometry, [in_padding, in_image]) == (Box("Mass", 0, 0, 0, 5), Box("Mass", 0, 0, 5, 5))


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        (Box("Mass", -5, -5, 5, 5), (0, 0, 5, 5)),
        (Box("Mass", 5, 5, 500, 500), (5, 5, 20, 10)),
        (Box("Mass", 30, 30, 40, 40), (20, 10, 20, 10)),
    ],
)
def test_clip(box: Box, expected: tuple[float, ...]) -> None:
    assert corners(clip(box, height_px=10, width_px=20)) == expected


def _fields(geometry: Geometry) -> dict[str, int]:
    return {name: getattr(geometry, name) for name in Geometry.__dataclass_fields__}
