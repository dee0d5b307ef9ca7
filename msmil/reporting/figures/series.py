"""Pictures of things that go on: losses and metrics over steps, and several runs side by side. T points of a line."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from msmil.reporting.figures.style import GREY, LINE, SERIES, grid, new_figure

Array = NDArray[Any]

_WIDTH_IN: Final = 5.0
_AXES_HEIGHT_IN: Final = 2.6
_LEFT_IN: Final = 0.75
_SMOOTHED_FROM: Final = 60  # points: fewer are shown as they are
_MARKED_UP_TO: Final = 30  # points: so few are marked one by one
_WINDOWS: Final = 40  # a smoothed line is a mean over one of so many parts of it
_LARGEST_RATIO: Final = 30  # between the ends of a linear axis
_NAME_CHARACTERS: Final = 46


@dataclass(frozen=True, slots=True)
class Series:
    """A line: its name in the legend and its points, ascending in x."""

    name: str
    x_T: Array
    y_T: Array


def lines(
    title: str,
    series: Sequence[Series],
    *,
    y_label: str,
    x_label: str = "step",
    smooth: bool = False,
    mark: tuple[float, str] | None = None,
    unit_square: bool = False,
    may_be_logarithmic: bool = True,
) -> Any:
    """Lines over one axis; at most as many as there are styles, which the caller sees to.

    Args:
        title: one line.
        series: values that are not finite leave a gap.
        y_label, x_label: of the axes.
        smooth: noisy lines are drawn pale, with their running mean.
        mark: an x with a name, such as the step that was evaluated.
        unit_square: both axes from 0 to 1, as a curve of rates has.
        may_be_logarithmic: where positive values span much; otherwise never.
    """
    assert len(series) <= len(SERIES), f"{len(series)} lines in one picture"
    legend = len(series) + (mark is not None)
    height_in = _WIDTH_IN - _LEFT_IN - 0.15 if unit_square else _AXES_HEIGHT_IN
    figure, axes = _axes(title, height_in, below_in=0.5 + 0.19 * legend)
    smoothed = False
    for one, (colour, dash) in zip(series, SERIES, strict=False):
        x_T, y_T = np.asarray(one.x_T, float), np.asarray(one.y_T, float)
        marker = "." if len(x_T) <= _MARKED_UP_TO else None
        if smooth and len(y_T) >= _SMOOTHED_FROM:
            axes.plot(x_T, y_T, color=colour, linewidth=0.6, alpha=0.3)
            y_T, smoothed = running_mean(y_T, max(3, len(y_T) // _WINDOWS)), True
        name = textwrap.shorten(one.name, _NAME_CHARACTERS, placeholder="...") or one.name[:_NAME_CHARACTERS]
        axes.plot(x_T, y_T, color=colour, linestyle=dash, linewidth=1.6, marker=marker, label=name)
    if mark is not None:
        axes.axvline(mark[0], color=GREY, linestyle=":", linewidth=1.2, label=mark[1])
    axes.set_xlabel(x_label + (", with running means" if smoothed else ""))
    axes.set_ylabel(y_label)
    if unit_square:
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.02, 1.02)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        if may_be_logarithmic and _spans_much(series):
            axes.set_yscale("log")
        else:
            axes.ticklabel_format(axis="y", scilimits=(-2, 4))
    grid(axes)
    figure.legend(loc="lower center", fontsize=9, frameon=False, borderaxespad=0.2)
    return figure


def intervals(title: str, rows: Sequence[tuple[str, float, tuple[float, float] | None]], *, x_label: str) -> Any:
    """A point and its interval per row, from top to bottom: several runs, one metric.

    Args:
        title: one line.
        rows: (name, value, bounds or None).
        x_label: the metric, and what the interval is.
    """
    figure, axes = _axes(title, 0.26 * len(rows) + 0.2, below_in=0.55, left_in=1.9)
    for place, (_, value, bounds) in enumerate(rows):
        if bounds is not None:
            axes.plot(bounds, [place, place], color=LINE, linewidth=1.6, solid_capstyle="butt")
        axes.plot([value], [place], color=LINE, marker="o", markersize=5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    short = [name if len(name) <= 24 else f"...{name[-21:]}" for name, _, _ in rows]
    axes.set_yticks(range(len(rows)), short, fontsize=8)
    axes.set_xlabel(x_label)
    grid(axes)
    return figure


def running_mean(value_T: Array, window: int) -> Array:
    """The mean over the `window` points up to each one (fewer at the start), leaving out what is not finite."""
    finite_T = np.isfinite(value_T)
    total_T, count_T = (np.cumsum(x) for x in (np.where(finite_T, value_T, 0.0), finite_T.astype(float)))
    for sum_T in (total_T, count_T):
        sum_T[window:] -= sum_T[:-window].copy()
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(count_T > 0, total_T / count_T, np.nan))


def _axes(title: str, height_in: float, *, below_in: float, left_in: float = _LEFT_IN) -> tuple[Any, Any]:
    total_in = 0.35 + height_in + below_in
    figure = new_figure(_WIDTH_IN, total_in)
    figure.text(0.5, 1 - 0.06 / total_in, title, ha="center", va="top", fontsize=11)
    where = (left_in / _WIDTH_IN, below_in / total_in, (_WIDTH_IN - left_in - 0.15) / _WIDTH_IN, height_in / total_in)
    return figure, figure.add_axes(where)


def _spans_much(series: Sequence[Series]) -> bool:
    """Whether all values are positive, and the largest is many times the smallest."""
    every = np.concatenate([np.zeros(0), *(np.asarray(one.y_T, float) for one in series)])
    every = every[np.isfinite(every)]
    return bool(len(every) and every.min() > 0 and every.max() / every.min() > _LARGEST_RATIO)
