"""How training went: losses, validation metrics, learning rates, throughput."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from msmil.evaluation.results import number
from msmil.reporting.figures import Series, lines
from msmil.reporting.figures.style import words
from msmil.reporting.html import Budget, Markup, Section, figures, join, missing, paragraph, table
from msmil.reporting.run_files import RunFiles, checkpoint_step

_LINES: Final = 6  # in one picture; more are told apart with difficulty
_PHASES: Final = {
    "wait": "waiting for images",
    "forward": "forward",
    "backward": "backward, with the exchange of gradients",
    "communication": "exchange of losses",
    "optimizer": "optimizer",
}


def training_section(run: RunFiles, prefix: str, budget: Budget) -> Section:
    """The curves that TensorBoard shows, and a table of speed."""
    title = "Training"
    if not run.curves.scalars:
        text = "There are no TensorBoard events in this run folder: nothing was trained here, or they were removed."
        return Section(f"{prefix}training", title, missing(text, f"msmil train {run.folder / 'config.yaml'}"))
    parts = [figures(list(_figures(run)), budget)]
    if not run.curves.series("val/"):
        text = "There is no validation metric yet: the first epoch to be validated is not done, or no label had both "
        parts.append(missing(text + "positive and negative validation images."))
    return Section(f"{prefix}training", title, join([*parts, _speed(run)]))


def _figures(run: RunFiles) -> list[tuple[Any, str]]:
    step = checkpoint_step(run.results)
    mark = None if step is None else (float(step), f"evaluated: step {step}")
    drawn = []
    for title, y_label, series, smooth in _groups(run):
        for part in _parts(series):
            ends = ", ".join(f"{one.name} {_end(one)}" for one in part)
            logarithmic = y_label != "learning rate"
            figure = lines(title, part, y_label=y_label, mark=mark, smooth=smooth, may_be_logarithmic=logarithmic)
            drawn.append((figure, f"{title} over training steps; at the end: {ends}"))
    return drawn


def _end(series: Series) -> str:
    value = float(series.y_T[-1])
    return f"{value:.4g}" if math.isfinite(value) else "undefined"


def _groups(run: RunFiles) -> list[tuple[str, str, list[Series], bool]]:
    """(title, axis, lines, noisy) of every picture."""
    curves = run.curves
    loss, auroc = curves.series("train/loss/"), curves.series("val/auroc/")
    precision = curves.series("val/average_precision/")
    by_label = {label: [s for s in auroc if s.name.startswith(f"{label}/scale_")] for label in run.labels}
    groups = [
        ("Training loss", "loss", [s for s in loss if "/" not in s.name], True),
        ("Training loss per label", "loss", _below(loss, "label/"), True),
        ("Training loss per scale", "loss", _below(loss, "scale/", "scale "), True),
        ("Validation AUROC", "AUROC", [s for s in auroc if "/" not in s.name], False),
        ("Validation average precision", "average precision", [s for s in precision if "/" not in s.name], False),
    ]
    for label, own in by_label.items():
        groups.append((f"{words(label)}: validation AUROC per scale", "AUROC", _below(own, f"{label}/"), False))
    groups += [
        ("Throughput", "images per second", _one(run, "train/images_per_s", "images per second"), True),
        ("Learning rate", "learning rate", curves.series("train/lr/"), False),
        ("Gradient norm", "norm", _one(run, "train/gradient_norm", "gradient norm"), True),
    ]
    return [
        (title, axis, [Series(words(s.name), s.x_T, s.y_T) for s in group], noisy)
        for title, axis, group, noisy in groups
    ]


def _one(run: RunFiles, tag: str, name: str) -> list[Series]:
    points = run.curves.one(tag)
    return [] if points is None else [Series(name, *points)]


def _below(series: Sequence[Series], prefix: str, instead: str = "") -> list[Series]:
    found = [s for s in series if s.name.startswith(prefix)]
    return [Series(instead + s.name.removeprefix(prefix), s.x_T, s.y_T) for s in found]


def _parts(series: Sequence[Series]) -> list[list[Series]]:
    """A few at a time, total and mean first, then labels as they come, scales by their size."""
    ordered = sorted(series, key=lambda s: (s.name not in ("total", "mean"), _size(s.name)))
    return [ordered[i : i + _LINES] for i in range(0, len(ordered), _LINES)]


def _size(name: str) -> int:
    digits = name.removeprefix("scale ")
    return int(digits) if digits.isdigit() else 0


def _speed(run: RunFiles) -> Markup:
    """Medians over the steps that were tracked."""

    def median(tag: str) -> float | None:
        points = run.curves.one(tag)
        finite = points[1][np.isfinite(points[1])] if points is not None else np.zeros(0)
        return float(np.median(finite)) if len(finite) else None

    step_s = median("train/seconds/step")
    rows = [["images per second", number(median("train/images_per_s"), 1)]]
    rows.append(["peak memory (GB)", number(median("train/memory_gb"), 2)])
    rows.append(["one step (s)", number(step_s)])
    for phase, name in _PHASES.items():
        seconds = median(f"train/seconds/{phase}")
        share = "" if seconds is None or not step_s else f" ({seconds / step_s:.0%})"
        rows.append([f"of it {name} (s)", number(seconds) + share])
    known = [row for row in rows if row[1] != number(None)]
    if not known:
        return Markup("")
    return join([paragraph("Speed, as medians over the tracked steps of rank 0:"), table(["", "median"], known)])
