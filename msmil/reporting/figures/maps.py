"""Pictures of mammograms: the image, where the network looked, and the true boxes. H W pixels of a stored image."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgb
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from msmil.reporting.figures.style import COLOURS, OUTSIDE, new_figure, words
from shards.types import Box

Array = NDArray[Any]

_PANEL_IN: Final = 2.3  # longest side of a picture of `maps_figure`, in inches, as are the others
_GAP_IN: Final = 0.08
_HEAD_IN: Final = 0.62
_ROW_TITLE_IN: Final = 0.24
_FOOT_IN: Final = 0.4
_LEAST_WIDTH_IN: Final = 5.6
_DASH_PX: Final = 6


@dataclass(frozen=True, slots=True)
class MapRow:
    """One image of `maps_figure`.

    title: printed above the row (no patient id); image_HW: as stored; boxes: in stored pixels, drawn if they carry the
    figure's label; breast_HW: bool; maps: {name: [H, W]} in the order of the columns, the same names in every row.
    """

    title: str
    image_HW: Array
    breast_HW: Array
    maps: Mapping[str, Array]
    boxes: Sequence[Box] = field(default=())


def reduced(row: MapRow, side_px: int) -> MapRow:
    """The row with a longer side of at most `side_px`; an image that is smaller stays as it is."""
    height, width = row.image_HW.shape
    factor = side_px / max(height, width)
    if factor >= 1:
        return row
    size = (max(1, round(width * factor)), max(1, round(height * factor)))

    def resize(value_HW: Array, how: Image.Resampling) -> Array:
        return np.asarray(Image.fromarray(value_HW.astype(np.float32)).resize(size, how))

    breast_HW = resize(row.breast_HW, Image.Resampling.BOX) >= 0.5
    if not breast_HW.any():  # a breast that is narrower than a pixel of the small image
        breast_HW = resize(row.breast_HW, Image.Resampling.BOX) > 0
    x, y = size[0] / width, size[1] / height
    return replace(
        row,
        image_HW=np.maximum(resize(row.image_HW, Image.Resampling.LANCZOS), 0),
        breast_HW=breast_HW,
        maps={name: resize(map_HW, Image.Resampling.BILINEAR) for name, map_HW in row.maps.items()},
        boxes=[Box(box.label, box.x0 * x, box.y0 * y, box.x1 * x, box.y1 * y) for box in row.boxes],
    )


def panel(row: MapRow, name: str | None, label: str) -> Array:
    """One picture with its boxes, uint8 [H, W, 3], for pages that lay pictures out themselves.

    Args:
        row: the image; the first of its maps is the one that is laid over it.
        name: of a map; None gives the image alone, on which boxes of other labels are drawn too, dashed.
        label: whose boxes are drawn.
    """
    base_HW3 = np.broadcast_to(np.array(to_rgb(OUTSIDE)), (*row.image_HW.shape, 3))
    overlay = name is not None and name == next(iter(row.maps))
    if name is None or overlay:
        base_HW3 = np.repeat(_grey(row)[..., None], 3, axis=2)
    if name is not None:
        colour_HW4 = _colours(row.maps[name], row.breast_HW, overlay=overlay)
        base_HW3 = base_HW3 + (colour_HW4[..., :3] - base_HW3) * colour_HW4[..., 3:]
    picture = Image.fromarray(np.round(base_HW3 * 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for box in row.boxes:
        if box.label == label or name is None:
            _draw_frame(draw, box, dashed=box.label != label)
    return np.asarray(picture)


def _draw_frame(draw: ImageDraw.ImageDraw, box: Box, *, dashed: bool) -> None:
    """White between two black lines, just outside the box, so that it hides nothing of it."""
    x0, y0, x1, y1 = (int(np.floor(v)) for v in (box.x0, box.y0, np.ceil(box.x1), np.ceil(box.y1)))
    draw.rectangle((x0 - 3, y0 - 3, x1 + 2, y1 + 2), outline="black", width=3)
    if not dashed:
        draw.rectangle((x0 - 2, y0 - 2, x1 + 1, y1 + 1), outline="white")
        return
    for x in range(x0 - 2, x1 + 2, 2 * _DASH_PX):
        for y in (y0 - 2, y1 + 1):
            draw.line((x, y, min(x + _DASH_PX, x1 + 1), y), fill="white")
    for y in range(y0 - 2, y1 + 2, 2 * _DASH_PX):
        for x in (x0 - 2, x1 + 1):
            draw.line((x, y, x, min(y + _DASH_PX, y1 + 1)), fill="white")


def maps_figure(rows: Sequence[MapRow], label: str) -> Any:
    """A table of pictures: per row an image with its true boxes, the first map laid over it, and the other maps.

    Every map is stretched to its own lowest and highest value inside the breast, so colours compare places within one
    picture, not pictures. Images may differ in size and shape; their aspect is kept.

    Args:
        rows: at least one, all with the same map names; the first map is the one that is laid over the image.
        label: whose boxes are drawn.
    """
    names = list(rows[0].maps)
    assert all(list(row.maps) == names for row in rows), "rows with different maps"
    shapes = np.array([row.image_HW.shape for row in rows], float)
    width_in = float(np.clip(_PANEL_IN * (shapes[:, 1] / shapes[:, 0]).max(), 0.45 * _PANEL_IN, _PANEL_IN))
    heights_in = np.clip(width_in * shapes[:, 0] / shapes[:, 1], 0.3, 1.3 * _PANEL_IN)
    total_w = max((width_in + _GAP_IN) * (1 + len(names)) + _GAP_IN, _LEAST_WIDTH_IN)
    total_h = float(heights_in.sum()) + _ROW_TITLE_IN * len(rows) + _HEAD_IN + _FOOT_IN
    figure = new_figure(total_w, total_h)

    def at(x_in: float, y_in: float, w_in: float, h_in: float) -> Any:
        axes = figure.add_axes((x_in / total_w, 1 - (y_in + h_in) / total_h, w_in / total_w, h_in / total_h))
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        return axes

    def write(x_in: float, y_in: float, text: str, **style: Any) -> None:
        figure.text(x_in / total_w, 1 - y_in / total_h, text, **style)

    write(_GAP_IN, 0.08, words(label), va="top", fontsize=11, weight="bold")
    for column, name in enumerate(["image", *names]):
        middle = _GAP_IN + column * (width_in + _GAP_IN) + width_in / 2
        write(middle, _HEAD_IN - 0.03, heading(name), va="bottom", ha="center", fontsize=8)
    top = _HEAD_IN
    for row, height_in in zip(rows, heights_in.tolist(), strict=True):
        write(_GAP_IN, top + _ROW_TITLE_IN - 0.04, row.title, va="bottom", fontsize=8)
        top += _ROW_TITLE_IN
        for column in range(1 + len(names)):
            axes = at(_GAP_IN + column * (width_in + _GAP_IN), top, width_in, height_in)
            draw_panel(axes, row, names[column - 1] if column else None, overlay=column == 1)
            draw_boxes(axes, [box for box in row.boxes if box.label == label])
        top += height_in
    _foot(figure, at(_GAP_IN, total_h - _FOOT_IN + 0.16, 1.5, 0.12))
    return figure


def draw_panel(axes: Any, row: MapRow, name: str | None, *, overlay: bool) -> None:
    """The image (`name` None), a map inside the breast, or a map laid over the image."""
    if name is None or overlay:
        axes.imshow(_grey(row), cmap="gray", vmin=0, vmax=1)
    if name is not None:
        axes.set_facecolor(OUTSIDE)
        axes.imshow(_colours(row.maps[name], row.breast_HW, overlay=overlay))


def _grey(row: MapRow) -> Array:
    """The image as float64 [H, W] in 0..1; 1 is its brightest place inside the breast."""
    brightest = max(float(row.image_HW[row.breast_HW].max()), 1e-6)
    return np.clip(row.image_HW / brightest, 0, 1)


def _colours(map_HW: Array, breast_HW: Array, *, overlay: bool) -> Array:
    """A map's colours and opacity, float64 [H, W, 4], from its lowest to its highest value inside the breast."""
    inside = map_HW[breast_HW]
    low, high = float(inside.min()), float(inside.max())
    scaled_HW = np.clip((map_HW - low) / (high - low if high > low else 1.0), 0, 1)
    colour_HW4: Array = colormaps[COLOURS](scaled_HW)
    colour_HW4[..., 3] = np.where(breast_HW, 0.1 + 0.55 * scaled_HW if overlay else 1.0, 0.0)
    return colour_HW4


def draw_boxes(axes: Any, boxes: Sequence[Box]) -> None:
    """White frames with a dark edge, seen on dark and on bright ground."""
    # Pixel i spans i..i + 1 in boxes, but i - 0.5..i + 0.5 in imshow.
    for box in boxes:
        corner = (box.x0 - 0.5, box.y0 - 0.5)
        frame = Rectangle(corner, box.x1 - box.x0, box.y1 - box.y0, fill=False, edgecolor="white", linewidth=1.2)
        frame.set_path_effects([withStroke(linewidth=2.6, foreground="black")])
        axes.add_patch(frame)


def _foot(figure: Any, axes: Any) -> None:
    figure.colorbar(ScalarMappable(Normalize(0, 1), COLOURS), cax=axes, orientation="horizontal", ticks=[])
    text = "each map: lowest to highest value inside the breast"
    axes.text(1.04, 0.5, text, va="center", fontsize=8, transform=axes.transAxes)
    frame = Patch(facecolor="none", edgecolor="black", linewidth=1.2, label="true box")
    figure.legend(handles=[frame], loc="lower right", fontsize=8, frameon=False, borderaxespad=0.3)


def heading(name: str) -> str:
    """A map's name for people, on one or two lines: attention_16 -> attention, scale 16."""
    kind, _, stride = name.rpartition("_")
    return f"{kind}\nscale {stride}" if stride.isdigit() else words(name)


def legend_picture() -> bytes:
    """The colours of all maps as a PNG bar, from the lowest value on its left to the highest."""
    colour_W3 = (colormaps[COLOURS](np.linspace(0, 1, 160))[:, :3] * 255).round().astype(np.uint8)
    data = io.BytesIO()
    Image.fromarray(np.repeat(colour_W3[None], 14, axis=0)).save(data, format="png")
    return data.getvalue()
