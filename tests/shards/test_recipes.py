"""Recipes: what they keep of an image, and that the geometry says exactly where it came from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shards.errors import UserError
from shards.geometry import map_boxes
from shards.images import read_grey
from shards.recipes import AsIs, EmptyImageError, MammoClip, area_resize, longest_run, make_recipe, min_max_uint8
from shards.types import Box


def area_weights(length: int, size: int) -> np.ndarray:
    """The share of every source pixel in every target pixel, by its definition."""
    weights = np.zeros((size, length))
    for i in range(size):
        start, stop = i * length / size, (i + 1) * length / size
        for j in range(length):
            weights[i, j] = max(0.0, min(stop, j + 1) - max(start, j)) / (stop - start)
    return weights


@settings(max_examples=40)
@given(
    image_HW=hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=24)),
    height=st.integers(1, 30),
    width=st.integers(1, 30),
)
def test_area_resize_is_the_mean_over_the_covered_area(image_HW: np.ndarray, height: int, width: int) -> None:
    exact = area_weights(image_HW.shape[0], height) @ image_HW @ area_weights(image_HW.shape[1], width).T
    resized = area_resize(image_HW, height, width)
    assert resized.dtype == np.uint8
    assert resized.shape == (height, width)
    assert np.abs(resized - exact).max() <= 0.5 + 1e-9


def test_area_resize_by_a_whole_number_is_the_mean_of_blocks() -> None:
    image_HW = np.random.default_rng(0).integers(0, 256, (60, 40), np.uint8)
    blocks = image_HW.reshape(20, 3, 10, 4).mean(axis=(1, 3))
    np.testing.assert_array_equal(area_resize(image_HW, 20, 10), np.rint(blocks).astype(np.uint8))


@given(st.lists(st.booleans(), max_size=30))
def test_longest_run(flags: list[bool]) -> None:
    runs = [(j - i, -i) for i in range(len(flags)) for j in range(i + 1, len(flags) + 1) if all(flags[i:j])]
    length, negative_start = max(runs, default=(0, 0))
    assert longest_run(np.array(flags, bool)) == (-negative_start, length)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_min_max_uses_the_whole_range(dtype: type) -> None:
    values = np.array([[10, 20, 110]], dtype)
    assert min_max_uint8(values).tolist() == [[0, 25, 255]]
    assert min_max_uint8(np.full((2, 2), 7, dtype)).tolist() == [[0, 0], [0, 0]]


def scene(dtype: type = np.uint8) -> np.ndarray:
    """200 x 150: a textured breast in rows 20-180, columns 30-110, a label at the right, a bright frame of 5 px."""
    high = np.iinfo(dtype).max
    image = np.random.default_rng(1).integers(0, high // 20, (200, 150)).astype(dtype)
    image[20:180, 30:110] = np.random.default_rng(2).integers(high // 3, high // 2, (160, 80))
    image[90:100, 130:140] = np.random.default_rng(3).integers(high // 3, high // 2, (10, 10))
    image[50, 60] = high
    image[10, 10] = 0
    image[:5], image[-5:], image[:, :5], image[:, -5:] = high, high, high, high
    return image


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_mammoclip_keeps_the_breast_and_leaves_out_frame_label_and_air(dtype: type) -> None:
    stored_HW, geometry = MammoClip(height_px=80, width_px=40).apply(scene(dtype))
    assert stored_HW.dtype == np.uint8
    assert stored_HW.shape == (80, 40)
    assert (geometry.crop_x_px, geometry.crop_width_px) == (30, 80)
    assert (geometry.crop_y_px, geometry.crop_height_px) == (20, 160)
    assert (geometry.scale_x, geometry.scale_y) == (0.5, 0.5)
    assert (geometry.source_height_px, geometry.source_width_px) == (200, 150)
    assert stored_HW.min() > 40, "nothing but breast is left"


def test_mammoclip_puts_boxes_where_the_pixels_went() -> None:
    image_HW = scene()
    image_HW[120:140, 50:62] = 255
    stored_HW, geometry = MammoClip(height_px=320, width_px=160).apply(image_HW)
    (box,) = map_boxes(geometry, [Box("Mass", 50, 120, 62, 140)])
    bright = np.argwhere(stored_HW > 250)
    bright = bright[bright[:, 0] > 150]
    assert (box.y0, box.x0) == tuple(bright.min(axis=0))
    assert (box.y1, box.x1) == tuple(bright.max(axis=0) + 1)


def test_mammoclip_judges_columns_by_the_middle_of_the_image() -> None:
    image_HW = scene()
    # In the uppermost tenth, right of the breast: joined to it if all rows counted.
    image_HW[6:15, 100:140] = np.random.default_rng(4).integers(100, 200, (9, 40))
    _, geometry = MammoClip(height_px=80, width_px=40).apply(image_HW)
    assert (geometry.crop_x_px, geometry.crop_width_px) == (30, 80)


@pytest.mark.parametrize(
    "image_HW", [np.zeros((50, 40), np.uint8), np.full((50, 40), 9, np.uint16), np.ones((9, 9), np.uint8)]
)
def test_mammoclip_finds_nothing_in_an_image_of_air(image_HW: np.ndarray) -> None:
    with pytest.raises(EmptyImageError):
        MammoClip().apply(image_HW)


def test_mammoclip_on_a_real_exam(real_data: Path) -> None:
    for name in ("L-CC", "L-MLO", "R-CC", "R-MLO"):
        source_HW = read_grey(real_data / "real_exam_8bit" / f"{name}.png")
        stored_HW, geometry = MammoClip().apply(source_HW)
        assert stored_HW.shape == (1520, 912)
        assert geometry.crop_width_px < 0.8 * source_HW.shape[1], "air beside the breast is cut off"
        assert stored_HW.mean() > source_HW.mean(), "more of the stored image is breast"
        x, width = geometry.crop_x_px, geometry.crop_width_px
        air = np.delete(source_HW[300:-300], np.s_[x : x + width], axis=1)
        assert np.median(air) <= 40, "what was cut off is air"


def test_mammoclip_on_a_real_film_pair_of_16_bit(real_data: Path) -> None:
    for path in sorted((real_data / "real_pair_16bit").glob("*.png")):
        source_HW = read_grey(path)
        assert source_HW.dtype == np.uint16
        stored_HW, _ = MammoClip().apply(source_HW)
        assert stored_HW.shape == (1520, 912)
        assert stored_HW.max() > 200


def test_as_is_changes_nothing() -> None:
    image_HW = scene(np.uint16)
    stored_HW, geometry = AsIs().apply(image_HW)
    np.testing.assert_array_equal(stored_HW, image_HW)
    assert (geometry.stored_height_px, geometry.stored_width_px, geometry.scale_x) == (200, 150, 1.0)


def test_recipes_by_name() -> None:
    assert make_recipe("mammoclip") == MammoClip(height_px=1520, width_px=912)
    assert make_recipe("mammoclip", height_px=100).size() == (100, 912)
    assert make_recipe("as_is").size() is None
    assert make_recipe("as_is", height_px=10, width_px=20).size() == (10, 20)
    with pytest.raises(UserError, match="only one of"):
        make_recipe("as_is", height_px=10)
    with pytest.raises(UserError, match="stored size of 0"):
        make_recipe("mammoclip", height_px=0)


def test_the_manifest_records_every_parameter_that_changes_pixels() -> None:
    expected = {"name": "mammoclip", "version": 1, "height_px": 80, "width_px": 912, "border_px": 5, "air": 40}
    assert make_recipe("mammoclip", height_px=80).describe() == expected
