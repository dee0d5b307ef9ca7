"""One image on a strip, small enough for a card of TensorBoard: itself with its boxes, then the map of each label.

H W pixels of a stored image.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from msmil.reporting.figures import MapRow, draw_boxes, draw_panel, reduced

_DPI: Final = 100
_JPEG_QUALITY: Final = 85
_LONGEST_PX: Final = 640  # of an image before it is drawn: drawing takes a time that grows with its pixels
_AREA_IN2: Final = 5.5  # of a panel: a tall image and a wide one get as much of the strip
_LEAST_IN, _MOST_IN = 1.5, 4.0  # sides of a panel
_WIDE: Final = 1.5  # panels of images that are wider than so many times their height stand one below the other
_GAP_IN: Final = 0.06
_LINE_IN: Final = 0.18
_FONT_PT: Final = 11  # legible where a card shows the strip at half its size
_CHARACTERS_PER_IN: Final = 11  # of that font, so that a caption stays over its panel


def map_strip(row: MapRow, captions: Sequence[str]) -> Any:
    """A figure: the image with all of its boxes, then each map laid over it with the boxes of that label.

    Args:
        row: its maps are by label, a map of each; images of any shape are shown whole, with their aspect.
        captions: printed over the maps, in their order (no patient id); the row's title is that of the image.
    """
    row = reduced(row, _LONGEST_PX)
    height_px, width_px = row.image_HW.shape
    width_in = float(np.clip((_AREA_IN2 * width_px / height_px) ** 0.5, _LEAST_IN, _MOST_IN))
    height_in = float(np.clip((_AREA_IN2 * height_px / width_px) ** 0.5, _LEAST_IN, _MOST_IN))
    wrapped = [_wrapped(text, width_in) for text in (row.title, *captions)]
    head_in = _LINE_IN * max(len(lines) for lines in wrapped) + _GAP_IN
    across_in, down_in = width_in + _GAP_IN, head_in + height_in + _GAP_IN
    columns = 1 if width_px > _WIDE * height_px else len(wrapped)
    total_w, total_h = columns * across_in + _GAP_IN, len(wrapped) // columns * down_in + _GAP_IN
    figure = Figure(figsize=(total_w, total_h), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    for number, (name, lines) in enumerate(zip([None, *row.maps], wrapped, strict=True)):
        left_in, top_in = _GAP_IN + number % columns * across_in, _GAP_IN + number // columns * down_in
        bottom = 1 - (top_in + head_in + height_in) / total_h
        axes = figure.add_axes((left_in / total_w, bottom, width_in / total_w, height_in / total_h))
        axes.set_axis_off()
        draw_panel(axes, row, name, overlay=True)
        draw_boxes(axes, [box for box in row.boxes if name is None or box.label == name])
        place = (left_in / total_w, 1 - top_in / total_h)
        figure.text(*place, "\n".join(lines), va="top", fontsize=_FONT_PT, linespacing=1.1)
    return figure


def as_jpeg(figure: Any) -> bytes:
    """The figure as a JPEG, which for an X-ray is a fraction of a PNG."""
    data = io.BytesIO()
    figure.savefig(data, format="jpeg", dpi=_DPI, pil_kwargs={"quality": _JPEG_QUALITY})
    return data.getvalue()


def _wrapped(text: str, width_in: float) -> list[str]:
    width = round(width_in * _CHARACTERS_PER_IN)
    return [part for line in text.replace("_", " ").splitlines() for part in textwrap.wrap(line, width)]
