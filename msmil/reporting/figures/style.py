"""What all pictures share: colours, sizes, and how they become files."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from msmil.evaluation.predictions import write_atomically

# Okabe and Ito's colours, and viridis: told apart with any kind of colour vision. Lines of several runs also differ in
# their dashes, so that they are told apart in grey.
LINE: Final = "#0072B2"
POINT: Final = "#D55E00"
GREY: Final = "#666666"
SERIES: Final = (
    ("#0072B2", "-"),
    ("#D55E00", "--"),
    ("#009E73", "-."),
    ("#CC79A7", (0, (5, 1, 1, 1, 1, 1))),
    ("#000000", ":"),
    ("#56B4E9", (0, (8, 2))),
    ("#E69F00", (0, (3, 1, 1, 1))),
    ("#7F5F3F", (0, (1, 1))),
)
COLOURS: Final = "viridis"
OUTSIDE: Final = "#e4e4e4"
_DPI: Final = 150
_SQUARE_IN: Final = 3.8  # side of a curve's axes, in inches
_PALETTE: Final = 96  # colours of a small PNG
_WHITE_FROM: Final = 252  # its white is a shade darker otherwise


def save(figure: Any, path: Path) -> None:
    """Write a PNG that appears under its name only when whole. Raises UserError where it cannot be written."""
    data = io.BytesIO()
    figure.savefig(data, format="png")
    write_atomically(path, data.getvalue())


def png(figure: Any) -> bytes:
    """A PNG of few colours, a third of the size: for pages that carry many figures."""
    figure.canvas.draw()
    drawn = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy())
    few = drawn.quantize(_PALETTE, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    few.putpalette([255 if value >= _WHITE_FROM else value for value in few.getpalette() or []])
    data = io.BytesIO()
    few.save(data, format="png")
    return data.getvalue()


def square_figure(
    label: str, what: str, *, legend_lines: int = 0, left_in: float = 0.7, above_in: float = 0.0
) -> tuple[Any, Any]:
    """A figure of one square between a title and a legend, all laid out in inches so that nothing is ever clipped."""
    title = textwrap.wrap(f"{words(label)}: {what}", 48)
    top_in, bottom_in = 0.12 + 0.2 * len(title) + above_in, 0.55 + 0.2 * legend_lines
    width_in, height_in = left_in + _SQUARE_IN + 0.2, top_in + _SQUARE_IN + bottom_in
    figure = new_figure(width_in, height_in)
    figure.text(0.5, 1 - 0.06 / height_in, "\n".join(title), ha="center", va="top", fontsize=11)
    square = (left_in / width_in, bottom_in / height_in, _SQUARE_IN / width_in, _SQUARE_IN / height_in)
    return figure, figure.add_axes(square)


def new_figure(width_in: float, height_in: float) -> Any:
    """An empty white figure that draws itself, without pyplot."""
    figure = Figure(figsize=(width_in, height_in), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def legend_below(figure: Any, handles: Sequence[Any] | None = None) -> None:
    """The legend below the axes: inside there is no corner that every curve and band leaves free.

    handles: in their order; None takes all that have a label.
    """
    figure.legend(handles=handles, loc="lower center", fontsize=9, frameon=False, borderaxespad=0.1)


def grid(axes: Any) -> None:
    """Thin lines behind the data."""
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def words(label: str) -> str:
    """A label for people: Suspicious_Calcification -> Suspicious Calcification."""
    return label.replace("_", " ")
