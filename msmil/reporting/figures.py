"""Every picture, drawn once: for a run's figures, TensorBoard, the report and the documentation.

Each function makes one matplotlib Figure of its own, without pyplot's global state, so they may run in any thread.
H W pixels of a stored image.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from msmil.evaluation.bootstrap import Curve, PatientBootstrap
from msmil.evaluation.classification import confusion as confusion_counts
from msmil.evaluation.classification import rank
from msmil.evaluation.predictions import write_atomically
from msmil.evaluation.results import columns
from msmil.types import Prediction
from shards.types import Box

Array = NDArray[Any]

# Blue, orange and grey of Okabe and Ito, and viridis: told apart with any kind of colour vision, and in grey.
_LINE: Final = "#0072B2"
_POINT: Final = "#D55E00"
_GREY: Final = "#666666"
_COLOURS: Final = "viridis"
_OUTSIDE: Final = "#e4e4e4"
_DPI: Final = 150
_SQUARE_IN: Final = 3.8  # side of a curve's axes, in inches
_PANEL_IN: Final = 2.3  # longest side of a picture of `maps_figure`, in inches, as are the others
_GAP_IN: Final = 0.08
_HEAD_IN: Final = 0.62
_ROW_TITLE_IN: Final = 0.24
_FOOT_IN: Final = 0.4
_LEAST_WIDTH_IN: Final = 5.6


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


def save(figure: Any, path: Path) -> None:
    """Write a PNG that appears under its name only when whole. Raises UserError where it cannot be written."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=_DPI)
    write_atomically(path, data.getvalue())


def classification_figures(
    predictions: Sequence[Prediction],
    results: Mapping[str, Any],
    *,
    replicates: int,
    confidence: float,
    seed: int,
) -> dict[str, Any]:
    """Figures of every label by name: <label>_roc, <label>_precision_recall, <label>_confusion.

    Args:
        predictions: of the split that `results` (`classification_results`) are about.
        results: give the thresholds, areas and intervals in the texts.
        replicates, confidence, seed: of the bands, as for the results.

    A figure is left out where its label has no such curve or no threshold; the results say why.
    """
    bootstrap = PatientBootstrap([p.patient_id for p in predictions], replicates=replicates, seed=seed)
    figures: dict[str, Any] = {}
    for label, found in results["labels"].items():
        target_N, probability_N = columns(predictions, label, None)
        ranking = rank(target_N, probability_N)
        curve = bootstrap.roc(ranking, confidence)
        if curve is not None:
            point = None
            if found["threshold"] is not None:
                point = (1 - found["specificity"], found["sensitivity"])
            figures[f"{label}_roc"] = roc(curve, label, found["auroc"], found["auroc_ci"], point)
        curve = bootstrap.precision_recall(ranking, confidence)
        if curve is not None:
            value, bounds = found["average_precision"], found["average_precision_ci"]
            figures[f"{label}_precision_recall"] = precision_recall(curve, label, value, bounds)
        if found["threshold"] is not None:
            counts_22 = confusion_counts(target_N, probability_N, found["threshold"])
            figures[f"{label}_confusion"] = confusion(counts_22, label, found["threshold"])
    return figures


def confusion(counts_22: Array, label: str, threshold: float) -> Any:
    """Confusion matrix: counts and shares of the true class; shaded by the share.

    Args:
        counts_22: images, rows true negative / positive, columns called negative / positive.
        label: for the title.
        threshold: probability from which on an image is called positive.
    """
    figure, axes = _figure(label, "confusion", left_in=1.1)
    total_2 = counts_22.sum(axis=1, keepdims=True)
    share_22 = counts_22 / np.maximum(total_2, 1)
    axes.imshow(share_22, cmap=_COLOURS, vmin=0, vmax=1)
    for i in range(2):
        for j in range(2):
            colour = "black" if share_22[i, j] > 0.5 else "white"
            text = f"{counts_22[i, j]}\n{share_22[i, j]:.1%}" if total_2[i, 0] else "0"
            axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=13)
    axes.set_xticks([0, 1], ["negative", "positive"])
    axes.set_yticks([0, 1], [f"negative\n(n = {total_2[0, 0]})", f"positive\n(n = {total_2[1, 0]})"])
    axes.set_xlabel(f"model, positive from {threshold:.3f} on")
    axes.set_ylabel("truth (a row adds up to 100 %)")
    return figure


def roc(
    curve: Curve,
    label: str,
    auroc: float | None,
    bounds: Sequence[float] | None,
    point: tuple[float, float] | None = None,
) -> Any:
    """ROC curve with its band, the diagonal of chance, and the operating point (1 - specificity, sensitivity)."""
    figure, axes = _figure(label, "ROC", legend_lines=4)
    axes.plot([0, 1], [0, 1], color=_GREY, linestyle="--", linewidth=1, label="chance")
    _curve(axes, curve, "default", _area("AUROC", auroc, bounds))
    if point is not None:
        name = f"threshold: sens. {point[1]:.2f}, spec. {1 - point[0]:.2f}"
        axes.plot(*point, marker="o", markersize=8, color=_POINT, markeredgecolor="white", linestyle="", label=name)
    axes.set_xlabel("1 - specificity")
    axes.set_ylabel("sensitivity")
    _legend_below(figure)
    return figure


def precision_recall(curve: Curve, label: str, average: float | None, bounds: Sequence[float] | None) -> Any:
    """Precision-recall curve with its band and the line of chance, the share of positive images."""
    figure, axes = _figure(label, "precision and recall", legend_lines=3)
    chance = f"chance: {curve.base_rate:.1%} positive"
    axes.axhline(curve.base_rate, color=_GREY, linestyle="--", linewidth=1, label=chance)
    _curve(axes, curve, "steps-pre", _area("average precision", average, bounds))
    axes.set_xlabel("recall (sensitivity)")
    axes.set_ylabel("precision")
    _legend_below(figure)
    return figure


def _figure(label: str, what: str, *, legend_lines: int = 0, left_in: float = 0.7) -> tuple[Any, Any]:
    """A figure of one square between a title and a legend, all laid out in inches so that nothing is ever clipped."""
    title = textwrap.wrap(f"{_words(label)}: {what}", 48)
    top_in, bottom_in = 0.12 + 0.2 * len(title), 0.55 + 0.2 * legend_lines
    width_in, height_in = left_in + _SQUARE_IN + 0.2, top_in + _SQUARE_IN + bottom_in
    figure = Figure(figsize=(width_in, height_in), facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(0.5, 1 - 0.06 / height_in, "\n".join(title), ha="center", va="top", fontsize=11)
    square = (left_in / width_in, bottom_in / height_in, _SQUARE_IN / width_in, _SQUARE_IN / height_in)
    return figure, figure.add_axes(square)


def _legend_below(figure: Any) -> None:
    # Below the axes: inside there is no corner that every curve and band leaves free.
    figure.legend(loc="lower center", fontsize=9, frameon=False, borderaxespad=0.1)


def _curve(axes: Any, curve: Curve, style: str, name: str) -> None:
    if len(curve.grid_G):
        step = "pre" if style == "steps-pre" else None
        axes.fill_between(
            curve.grid_G,
            curve.low_G,
            curve.high_G,
            color=_LINE,
            alpha=0.2,
            linewidth=0,
            step=step,
            label=f"{curve.confidence:.0%} interval (patients resampled)",
        )
    axes.plot(curve.x_T, curve.y_T, color=_LINE, linewidth=1.8, drawstyle=style, label=name)
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xticks(np.linspace(0, 1, 6))
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def _area(name: str, value: float | None, bounds: Sequence[float] | None) -> str:
    text = f"{name} undefined" if value is None else f"{name} {value:.3f}"
    return text if bounds is None else f"{text} [{bounds[0]:.3f}, {bounds[1]:.3f}]"


def _words(label: str) -> str:
    return label.replace("_", " ")


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
    figure = Figure(figsize=(total_w, total_h), facecolor="white")
    FigureCanvasAgg(figure)

    def at(x_in: float, y_in: float, w_in: float, h_in: float) -> Any:
        axes = figure.add_axes((x_in / total_w, 1 - (y_in + h_in) / total_h, w_in / total_w, h_in / total_h))
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        return axes

    def write(x_in: float, y_in: float, text: str, **style: Any) -> None:
        figure.text(x_in / total_w, 1 - y_in / total_h, text, **style)

    write(_GAP_IN, 0.08, _words(label), va="top", fontsize=11, weight="bold")
    for column, name in enumerate(["image", *names]):
        middle = _GAP_IN + column * (width_in + _GAP_IN) + width_in / 2
        write(middle, _HEAD_IN - 0.03, _heading(name), va="bottom", ha="center", fontsize=8)
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
        axes.imshow(row.image_HW, cmap="gray", vmin=0, vmax=max(float(row.image_HW[row.breast_HW].max()), 1e-6))
    if name is not None:
        inside = row.maps[name][row.breast_HW]
        low, high = float(inside.min()), float(inside.max())
        scaled_HW = np.clip((row.maps[name] - low) / (high - low if high > low else 1.0), 0, 1)
        colour_HW4 = colormaps[_COLOURS](scaled_HW)
        colour_HW4[..., 3] = np.where(row.breast_HW, 0.1 + 0.55 * scaled_HW if overlay else 1.0, 0.0)
        axes.set_facecolor(_OUTSIDE)
        axes.imshow(colour_HW4)


def draw_boxes(axes: Any, boxes: Sequence[Box]) -> None:
    """White frames with a dark edge, seen on dark and on bright ground."""
    # Pixel i spans i..i + 1 in boxes, but i - 0.5..i + 0.5 in imshow.
    for box in boxes:
        corner = (box.x0 - 0.5, box.y0 - 0.5)
        frame = Rectangle(corner, box.x1 - box.x0, box.y1 - box.y0, fill=False, edgecolor="white", linewidth=1.2)
        frame.set_path_effects([withStroke(linewidth=2.6, foreground="black")])
        axes.add_patch(frame)


def _foot(figure: Any, axes: Any) -> None:
    figure.colorbar(ScalarMappable(Normalize(0, 1), _COLOURS), cax=axes, orientation="horizontal", ticks=[])
    text = "each map: lowest to highest value inside the breast"
    axes.text(1.04, 0.5, text, va="center", fontsize=8, transform=axes.transAxes)
    frame = Patch(facecolor="none", edgecolor="black", linewidth=1.2, label="true box")
    figure.legend(handles=[frame], loc="lower right", fontsize=8, frameon=False, borderaxespad=0.3)


def _heading(name: str) -> str:
    """attention_16 -> attention, scale 16, on two lines."""
    kind, _, stride = name.rpartition("_")
    return f"{kind}\nscale {stride}" if stride.isdigit() else _words(name)
