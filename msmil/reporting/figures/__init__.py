"""Every picture, drawn once: for a run's figures, TensorBoard, the report and the documentation.

Each function makes one matplotlib Figure of its own, without pyplot's global state, so they may run in any thread.
"""

from msmil.reporting.figures.classification import (
    classification_figures,
    confusion,
    precision_recall,
    reliability,
    roc,
    scale_weights,
)
from msmil.reporting.figures.maps import MapRow, draw_boxes, draw_panel, maps_figure, panel, reduced
from msmil.reporting.figures.series import Series, intervals, lines
from msmil.reporting.figures.style import png, save

__all__ = [
    "MapRow",
    "Series",
    "classification_figures",
    "confusion",
    "draw_boxes",
    "draw_panel",
    "intervals",
    "lines",
    "maps_figure",
    "panel",
    "png",
    "precision_recall",
    "reduced",
    "reliability",
    "roc",
    "save",
    "scale_weights",
]
