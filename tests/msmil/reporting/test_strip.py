"""A strip shows an image of any shape whole, with its boxes where they are, small, and in legible words."""

from __future__ import annotations

import io

import numpy as np
import pytest
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from PIL import Image

from msmil.reporting.figures import MapRow
from msmil.reporting.strip import as_jpeg, map_strip
from shards.types import Box

LABELS = ("Mass", "Architectural_Distortion_or_Asymmetry")
CAPTIONS = [f"{label}\npresent, p = 0.83" for label in LABELS]


def strip(height, width, boxes=(), dtype=np.uint8):
    rng = np.random.default_rng(0)
    image_HW = (rng.random((height, width)) * np.iinfo(dtype).max).astype(dtype)
    breast_HW = np.zeros((height, width), bool)
    breast_HW[:, : max(1, width // 2)] = True
    maps = {label: rng.random((height, width)) for label in LABELS}
    return map_strip(MapRow("image 1", image_HW, breast_HW, maps, boxes), CAPTIONS)


@pytest.mark.parametrize("shape", [(384, 240), (1520, 912), (64, 48), (100, 300), (900, 100), (12, 400)])
def test_an_image_of_any_shape_is_shown_whole_and_small(shape):
    figure = strip(*shape, dtype=np.uint16)
    data = as_jpeg(figure)
    width, height = Image.open(io.BytesIO(data)).size
    assert width <= 1300
    assert height <= 1300
    assert len(data) < 150_000, "noise, which compresses worst"
    extents = [axes.get_window_extent() for axes in figure.axes]
    assert len(extents) == 1 + len(LABELS)
    for axes, extent in zip(figure.axes, extents, strict=True):
        shown = axes.get_images()[0].get_array().shape
        assert shown[0] / shown[1] == pytest.approx(shape[0] / shape[1], rel=0.03)
        assert extent.height / extent.width == pytest.approx(shape[0] / shape[1], rel=0.03), "its aspect is kept"
    texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    for extent in [*extents, *(text.get_window_extent() for text in texts)]:
        assert extent.x0 >= -1
        assert extent.y0 >= -1
        assert extent.x1 <= width + 1
        assert extent.y1 <= height + 1
    words = [text.get_window_extent() for text in texts]
    assert not any(a.padded(-1).overlaps(b.padded(-1)) for a in words for b in [*words, *extents] if a is not b)


def test_the_image_has_all_boxes_and_a_map_those_of_its_label():
    boxes = [Box("Mass", 100, 200, 300, 500), Box("Another", 0, 0, 50, 50)]
    panels = strip(1000, 800, boxes).axes
    frames = [[patch for patch in axes.patches if isinstance(patch, Rectangle)] for axes in panels]
    assert [len(found) for found in frames] == [2, 1, 0]
    frame = frames[1][0]
    height = panels[1].get_images()[0].get_array().shape[0]
    assert (frame.get_y() + 0.5) / height == pytest.approx(200 / 1000), "drawn in the pixels of the reduced image"
    assert frame.get_height() / height == pytest.approx(300 / 1000)
