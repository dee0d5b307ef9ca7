"""The figure of the method: `python docs/figures/method.py` writes docs/images/method.png.

Sizes are those of the published recipe in `image` mode: 1520 x 912 pixels, padded to 1536 x 1024, EfficientNet-B2. The
mammogram is a phantom; the maps are drawn, not computed by a model.
"""

from __future__ import annotations

import io
import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from numpy.typing import NDArray
from PIL import Image

from shards.phantoms.canvas import Canvas
from shards.phantoms.draw import Phantom, draw_phantom, phantom_boxes
from shards.phantoms.exam import MASS

OUT = Path(__file__).parents[1] / "images" / "method.png"
WIDTH_IN, HEIGHT_IN, DPI = 14.3, 7.1, 130
SEED = 3
PHANTOM_PX = (384, 240)  # a quarter of the real size along each axis
ROW_Y = {128: 6.0, 32: 4.6, 16: 3.2}  # centre of each scale's row, in inches from below
CELLS = {128: "12 x 8", 32: "48 x 32", 16: "96 x 64"}

# Okabe and Ito's colours, lightened for fills
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#AA5588", "#444444"
FILL = {BLUE: "#dcecf6", ORANGE: "#fbe5d8", GREEN: "#d9f1e9", PURPLE: "#f7e6ef", GREY: "#eeeeee"}

Array = NDArray[Any]


class Drawing:
    """One figure whose coordinates are inches from its lower left corner."""

    def __init__(self) -> None:
        self.figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN), facecolor="white")
        FigureCanvasAgg(self.figure)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_xlim(0, WIDTH_IN)
        self.axes.set_ylim(0, HEIGHT_IN)
        self.axes.axis("off")

    def box(self, x: float, y: float, w: float, h: float, text: str, colour: str, size: float = 9.5) -> None:
        """A rounded box around its centre."""
        style = "round,pad=0,rounding_size=0.08"
        corner = (x - w / 2, y - h / 2)
        patch = FancyBboxPatch(corner, w, h, boxstyle=style, facecolor=FILL[colour], edgecolor=colour, linewidth=1.3)
        self.axes.add_patch(patch)
        self.axes.text(x, y, text, ha="center", va="center", fontsize=size, linespacing=1.25)

    def arrow(self, *points: tuple[float, float], colour: str = GREY, dashed: bool = False, head: bool = True) -> None:
        """A line through points with a head at its end."""
        style = "--" if dashed else "-"
        for start, end in itertools.pairwise(points[:-1]):
            x, y = zip(start, end, strict=True)
            self.axes.plot(x, y, color=colour, linewidth=1.4, linestyle=style, solid_capstyle="round")
        shape = "-|>" if head else "-"
        patch = FancyArrowPatch(
            points[-2], points[-1], arrowstyle=shape, mutation_scale=11, color=colour, linewidth=1.4, linestyle=style,
            shrinkA=0, shrinkB=0,
        )  # fmt: skip
        self.axes.add_patch(patch)

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        """Text, centred unless told otherwise."""
        defaults = {"ha": "center", "va": "center", "fontsize": 8.5, "color": GREY, "linespacing": 1.25}
        self.axes.text(x, y, text, **defaults | style)

    def picture(self, image: Array, x: float, y: float, h: float, **style: Any) -> float:
        """An image around its centre, of height `h`; returns its width."""
        w = h * image.shape[1] / image.shape[0]
        self.axes.imshow(image, extent=(x - w / 2, x + w / 2, y - h / 2, y + h / 2), aspect="auto", zorder=2, **style)
        frame = Rectangle((x - w / 2, y - h / 2), w, h, fill=False, edgecolor=GREY, linewidth=0.8, zorder=3)
        self.axes.add_patch(frame)
        return w


def draw() -> Figure:
    """All of it."""
    phantom = choose_phantom()
    d = Drawing()
    draw_input(d, phantom)
    draw_pyramid(d)
    for scale in ROW_Y:
        draw_scale(d, scale)
    draw_merging(d)
    draw_maps(d, phantom)
    return d.figure


def choose_phantom() -> Phantom:
    """Of forty phantom breasts seen from above, the one with one mass and nothing else whose box is the largest."""
    canvas = Canvas(*PHANTOM_PX)
    by_exam = {exam: phantom_boxes(SEED, exam, "L", "MLO", canvas) for exam in range(40)}
    area = {
        exam: (boxes[0].x1 - boxes[0].x0) * (boxes[0].y1 - boxes[0].y0)
        for exam, boxes in by_exam.items()
        if [box.label for box in boxes] == [MASS]
    }
    return draw_phantom(SEED, max(area, key=lambda exam: area[exam]), "L", "MLO", canvas)


def draw_input(d: Drawing, phantom: Phantom) -> None:
    """The mammogram, and what the device makes of it."""
    y = 4.15
    w = d.picture(phantom.image_HW, 1.0, y, 2.3, cmap="gray", vmin=0, vmax=255)
    d.text(1.0, y + 1.38, "mammogram\n1520 x 912, 8 or 16 bit", va="bottom")
    d.text(1.0, y - 1.28, "image-level labels only", va="top", color=ORANGE, weight="bold")
    d.box(
        2.58,
        y,
        0.94,
        1.9,
        "on the\ndevice:\nscale to 0..1,\naugment,\nstandardise,\npad;\nwhole image\nor tiles",
        GREY,
        8,
    )
    d.arrow((1.0 + w / 2, y), (2.11, y))


def draw_pyramid(d: Drawing) -> None:
    """Backbone and FPN: laterals, top-down path, refinement, and the subsampled level."""
    fine, coarse, last = ROW_Y[16], ROW_Y[32], ROW_Y[128]
    frame = {"fill": False, "linewidth": 1.0, "linestyle": (0, (4, 3))}
    d.axes.add_patch(Rectangle((3.26, fine - 0.52), 0.98, 2.55, edgecolor=BLUE, **frame))
    d.text(3.75, coarse + 0.75, "backbone", color=BLUE, weight="bold", fontsize=10)
    d.axes.add_patch(Rectangle((4.56, fine - 0.52), 1.94, 2.55, edgecolor=GREEN, **frame))
    d.text(5.22, coarse + 0.75, "feature pyramid", color=GREEN, weight="bold", fontsize=10)
    d.box(3.75, fine, 0.78, 0.62, "C4\nstride 16", BLUE)
    d.box(3.75, coarse, 0.78, 0.62, "C5\nstride 32", BLUE)
    d.arrow((3.05, 4.15), (3.12, 4.15), (3.12, fine), (3.36, fine))
    d.arrow((3.75, fine + 0.31), (3.75, coarse - 0.31), colour=BLUE)
    for y, name in ((fine, "P4'"), (coarse, "P5'")):
        d.arrow((4.14, y), (4.68, y), colour=GREEN)
        d.text(4.39, y + 0.12, "1x1", fontsize=7.5)
        d.box(4.95, y, 0.54, 0.5, name, GREEN)
        d.arrow((5.22, y), (5.8, y), colour=GREEN)
        d.text(5.5, y + 0.13, "3x3", fontsize=8)
        d.box(6.1, y, 0.6, 0.5, name[:2], GREEN)
    d.arrow((4.95, coarse - 0.25), (4.95, fine + 0.25), colour=GREEN)
    d.text(5.02, (fine + coarse) / 2, "upsampled,\nadded", ha="left", fontsize=8)
    d.arrow((6.1, coarse + 0.25), (6.1, last), (6.83, last), colour=GREEN)
    d.text(6.04, last - 0.02, "every 4th\ncell of P5", ha="right", fontsize=8)
    for y in (fine, coarse):
        d.arrow((6.4, y), (6.83, y), colour=GREEN)


def draw_scale(d: Drawing, scale: int) -> None:
    """One row: instances, MIL encoder, pooling, embedding, side head."""
    y = ROW_Y[scale]
    lines = {128: 4, 32: 8, 16: 16}[scale]
    x0, w, h = 6.86, 0.5, 0.75
    for i in range(lines + 1):
        thin = {"color": GREEN, "linewidth": 0.9 if scale == 128 else 0.5}
        d.axes.plot([x0 + w * i / lines] * 2, [y - h / 2, y + h / 2], **thin)
        d.axes.plot([x0, x0 + w], [y - h / 2 + h * i / lines] * 2, **thin)
    d.text(x0 + w / 2, y + 0.4, f"scale {scale}", va="bottom", weight="bold", fontsize=9)
    d.text(x0 + w / 2, y - 0.4, f"{CELLS[scale]} instances", va="top", fontsize=7.5)
    d.arrow((x0 + w, y), (7.68, y))
    d.box(8.18, y, 1.0, 0.66, "MIL encoder\nMLP, SAB, ISAB", PURPLE, 8.5)
    d.arrow((8.68, y), (8.94, y))
    d.box(9.5, y, 1.12, 0.66, "attention pooling,\none per label", PURPLE, 8.5)
    d.arrow((10.06, y), (11.3, y))
    d.arrow((10.06, y - 0.2), (10.18, y - 0.2), colour=BLUE, dashed=True, head=False)
    d.text(10.75, y - 0.15, f"$h_{{{scale}}}$", fontsize=10)
    d.arrow((10.32, y), (10.32, y + 0.42), (10.44, y + 0.42), colour=ORANGE)
    d.box(10.83, y + 0.42, 0.76, 0.34, "side head", ORANGE, 8.5)


def draw_merging(d: Drawing) -> None:
    """Attention over scales, the classifier, and the losses."""
    for x, name in ((7.11, "instances"), (8.84, "MIL per scale"), (11.75, "scales merged")):
        d.text(x, HEIGHT_IN - 0.2, name, color=PURPLE if x > 8 else GREEN, weight="bold", fontsize=10)
    top, bottom = ROW_Y[128] + 0.36, ROW_Y[16] - 0.36
    middle = (top + bottom) / 2
    d.box(11.75, middle, 0.9, top - bottom, "gated\nattention\nover\nscales,\none\nper label", PURPLE, 9)
    d.arrow((12.2, middle), (12.62, middle))
    d.box(13.08, middle, 0.9, 0.5, "classifier", PURPLE)
    d.arrow((13.08, middle - 0.25), (13.08, middle - 0.7))
    d.text(13.25, middle - 0.88, "one logit per label", weight="bold", fontsize=9.5)
    d.text(
        13.25, middle + 1.15, "loss: binary cross-\nentropy of the logit\nand of every side head\n(deep supervision)",
        color=ORANGE, fontsize=8.5,
    )  # fmt: skip


def draw_maps(d: Drawing, phantom: Phantom) -> None:
    """How attention becomes heat-maps, and what is read off them."""
    y, h = 1.1, 1.5
    d.axes.plot([0.3, WIDTH_IN - 0.3], [2.3, 2.3], color="#cccccc", linewidth=0.8)
    d.text(0.35, 2.12, "where it looks", ha="left", va="top", color=BLUE, weight="bold", fontsize=10)
    d.text(
        0.35, 1.84, "Per scale and label, two maps:\nthe weights of attention, and the\nside head on single instances."
        "\nBrought to the image's pixels;\nmerged with the weights of the\nscales. No box was ever trained on.",
        ha="left", va="top", fontsize=8.5, linespacing=1.35,
    )  # fmt: skip
    trunk, above, below = 10.18, 2.62, 2.47
    d.arrow(
        (trunk, ROW_Y[128] - 0.2), (trunk, above), (5.55, above), (5.55, y + h / 2 + 0.03), colour=BLUE, dashed=True
    )  # fmt: skip
    d.text(trunk - 0.08, above + 0.12, "weights of the instances, every scale", ha="right", color=BLUE)
    d.arrow(
        (11.75, ROW_Y[16] - 0.36), (11.75, below), (8.7, below), (8.7, y + 0.1), colour=BLUE, dashed=True
    )  # fmt: skip
    d.text(11.85, 2.62, "weights of the scales", ha="left", color=BLUE)
    maps = {scale: schematic_map(phantom, scale // 4) for scale in (16, 32, 128)}
    for i, (scale, map_HW) in enumerate(maps.items()):
        x = 4.1 + 1.45 * i
        d.picture(coloured(map_HW, phantom), x, y, h)
        d.text(x, y - h / 2 - 0.06, f"scale {scale}", va="top")
        d.text(x + 0.72, y, "+" if i < 2 else "", fontsize=14)
    d.arrow((7.6, y), (9.9, y), colour=BLUE)
    d.text(8.75, y - 0.13, "weighted mean")
    merged_HW = sum(maps.values()) / len(maps)
    d.picture(overlaid(merged_HW, phantom), 10.45, y, h)
    d.text(10.45, y - h / 2 - 0.06, "merged map", va="top")
    w = d.picture(phantom.image_HW, 12.5, y, h, cmap="gray", vmin=0, vmax=255)
    d.arrow((11.0, y), (12.0, y), colour=BLUE)
    mark_peak(d, phantom, merged_HW, (12.5 - w / 2, y + h / 2), h / phantom.image_HW.shape[0])
    d.text(12.5, y - h / 2 - 0.06, "its peak, and the true box", va="top")


def schematic_map(phantom: Phantom, cell_px: int) -> Array:
    """A hill over the lesion in cells of this size, as a coarse scale would see it."""
    box = phantom.boxes[0]
    y_h = np.arange(0, PHANTOM_PX[0], cell_px) + cell_px / 2
    x_w = np.arange(0, PHANTOM_PX[1], cell_px) + cell_px / 2
    sigma = max(box.x1 - box.x0, cell_px) * 0.4
    noise_hw = np.random.default_rng(cell_px).random((len(y_h), len(x_w)))
    distance_hw = (y_h[:, None] - (box.y0 + box.y1) / 2) ** 2 + (x_w[None] - (box.x0 + box.x1) / 2) ** 2
    value_hw = np.exp(-distance_hw / (2 * sigma**2)) + 0.12 * noise_hw
    map_HW = value_hw.repeat(cell_px, axis=0).repeat(cell_px, axis=1)[: PHANTOM_PX[0], : PHANTOM_PX[1]]
    return np.asarray(map_HW / map_HW.max())


def coloured(map_HW: Array, phantom: Phantom) -> Array:
    """The map in colour inside the breast."""
    colour_HW4 = colormaps["viridis"](map_HW)
    colour_HW4[~phantom.breast_HW] = (0.9, 0.9, 0.9, 1)
    return np.asarray(colour_HW4)


def overlaid(map_HW: Array, phantom: Phantom) -> Array:
    """The map over the image."""
    grey_HW3 = (phantom.image_HW / 255.0)[..., None].repeat(3, axis=2)
    share_HW1 = np.where(phantom.breast_HW, 0.1 + 0.6 * map_HW, 0.0)[..., None]
    return np.asarray((1 - share_HW1) * grey_HW3 + share_HW1 * colormaps["viridis"](map_HW)[..., :3])


def mark_peak(d: Drawing, phantom: Phantom, map_HW: Array, corner: tuple[float, float], scale_in: float) -> None:
    """The map's highest point and the true box; `corner` is the picture's upper left one."""
    inside_HW = np.where(phantom.breast_HW, map_HW, -1)
    top = inside_HW >= inside_HW.max() - 1e-9
    row, column = (float(axis.mean()) + 0.5 for axis in np.nonzero(top))
    box = phantom.boxes[0]
    lower_left = (corner[0] + box.x0 * scale_in, corner[1] - box.y1 * scale_in)
    size = ((box.x1 - box.x0) * scale_in, (box.y1 - box.y0) * scale_in)
    d.axes.add_patch(Rectangle(lower_left, *size, fill=False, edgecolor="white", linewidth=1.6, zorder=4))
    x, y = corner[0] + column * scale_in, corner[1] - row * scale_in
    d.axes.plot(x, y, marker="+", color=ORANGE, markersize=11, markeredgewidth=2.2, zorder=5)


def save(figure: Figure, out: Path) -> None:
    """Write a PNG of 256 colours, a third of the size in full colour."""
    data = io.BytesIO()
    figure.savefig(data, dpi=DPI)
    out.parent.mkdir(parents=True, exist_ok=True)
    Image.open(data).convert("RGB").quantize(256).save(out, optimize=True)


if __name__ == "__main__":
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else OUT
    save(draw(), out)
    print(f"{out}: {out.stat().st_size / 1e3:.0f} kB")
