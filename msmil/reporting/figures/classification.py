"""Pictures of classification: curves, operating point, calibration, weights of scales. N images, B bins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msmil.evaluation.bootstrap import Curve, PatientBootstrap
from msmil.evaluation.calibration import Calibration, calibration
from msmil.evaluation.classification import confusion as confusion_counts
from msmil.evaluation.classification import rank
from msmil.evaluation.results import columns
from msmil.reporting.figures.style import COLOURS, GREY, LINE, POINT, grid, legend_below, square_figure
from msmil.types import Prediction

Array = NDArray[Any]


def classification_figures(
    predictions: Sequence[Prediction],
    results: Mapping[str, Any],
    *,
    replicates: int,
    confidence: float,
    seed: int,
) -> dict[str, Any]:
    """Figures of every label by name: <label>_roc, <label>_precision_recall, <label>_confusion,
    <label>_reliability.

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
            found_bins = calibration(target_N, probability_N, bootstrap, confidence)
            assert found_bins is not None, "an image with a known label is there"
            figures[f"{label}_reliability"] = reliability(found_bins, label)
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
    figure, axes = square_figure(label, "confusion", left_in=1.1)
    total_2 = counts_22.sum(axis=1, keepdims=True)
    share_22 = counts_22 / np.maximum(total_2, 1)
    axes.imshow(share_22, cmap=COLOURS, vmin=0, vmax=1)
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
    figure, axes = square_figure(label, "ROC", legend_lines=4)
    axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="chance")
    _curve(axes, curve, "default", _area("AUROC", auroc, bounds))
    if point is not None:
        name = f"threshold: sens. {point[1]:.2f}, spec. {1 - point[0]:.2f}"
        axes.plot(*point, marker="o", markersize=8, color=POINT, markeredgecolor="white", linestyle="", label=name)
    axes.set_xlabel("1 - specificity")
    axes.set_ylabel("sensitivity")
    legend_below(figure)
    return figure


def precision_recall(curve: Curve, label: str, average: float | None, bounds: Sequence[float] | None) -> Any:
    """Precision-recall curve with its band and the line of chance, the share of positive images."""
    figure, axes = square_figure(label, "precision and recall", legend_lines=3)
    chance = f"chance: {curve.base_rate:.1%} positive"
    axes.axhline(curve.base_rate, color=GREY, linestyle="--", linewidth=1, label=chance)
    _curve(axes, curve, "steps-pre", _area("average precision", average, bounds))
    axes.set_xlabel("recall (sensitivity)")
    axes.set_ylabel("precision")
    legend_below(figure)
    return figure


def _curve(axes: Any, curve: Curve, style: str, name: str) -> None:
    if len(curve.grid_G):
        step = "pre" if style == "steps-pre" else None
        axes.fill_between(
            curve.grid_G,
            curve.low_G,
            curve.high_G,
            color=LINE,
            alpha=0.2,
            linewidth=0,
            step=step,
            label=f"{curve.confidence:.0%} interval (patients resampled)",
        )
    axes.plot(curve.x_T, curve.y_T, color=LINE, linewidth=1.8, drawstyle=style, label=name)
    _unit_square(axes)


def _unit_square(axes: Any) -> None:
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xticks(np.linspace(0, 1, 6))
    axes.set_yticks(np.linspace(0, 1, 6))
    grid(axes)


def _area(name: str, value: float | None, bounds: Sequence[float] | None) -> str:
    text = f"{name} undefined" if value is None else f"{name} {value:.3f}"
    return text if bounds is None else f"{text} [{bounds[0]:.3f}, {bounds[1]:.3f}]"


def reliability(found: Calibration, label: str) -> Any:
    """Reliability diagram: the share of positives against the mean probability, bin by bin, and the images of each."""
    figure, axes = square_figure(label, "reliability", legend_lines=3, above_in=0.36)
    (diagonal,) = axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="calibrated")
    there_B = found.count_B > 0
    below_B, above_B = found.share_B - found.low_B, found.high_B - found.share_B
    bars = axes.errorbar(
        found.probability_B[there_B],
        found.share_B[there_B],
        yerr=np.maximum([below_B[there_B], above_B[there_B]], 0),
        color=LINE,
        marker="o",
        linestyle="",
        elinewidth=1.2,
        capsize=2.5,
        label=f"images of a bin, {found.confidence:.0%} interval (Wilson, patients counted)",
    )
    numbers = f"expected calibration error {found.ece:.3f}, {_area('Brier score', found.brier, found.brier_ci)}"
    (no_line,) = axes.plot([], [], linestyle="", label=numbers)
    _unit_square(axes)
    axes.set_xlabel("mean predicted probability")
    axes.set_ylabel("share of positive images")
    top = axes.secondary_xaxis("top")
    bins = len(found.count_B)
    top.set_xticks((np.arange(bins) + 0.5) / bins, [str(count) for count in found.count_B], fontsize=8)
    top.tick_params(length=0, pad=1)
    top.set_xlabel("images in the bin", fontsize=8, labelpad=2)
    legend_below(figure, [bars, diagonal, no_line])
    return figure


def scale_weights(predictions: Sequence[Prediction], label: str) -> Any | None:
    """How the model weighs its scales: a box per scale and truth (quartiles; whiskers 5 % to 95 %; mean as a point).

    None where the model gives no weights, or no image has a known label.
    """
    scales = list(dict.fromkeys(scale for scale, name in predictions[0].scale_weight if name == label))
    if not scales or all(p.target[label] not in (0, 1) for p in predictions):
        return None
    figure, axes = square_figure(label, "weights of the scales", legend_lines=2)
    for truth, colour, shift, name in ((0, LINE, -0.18, "negative"), (1, POINT, 0.18, "positive")):
        mine = [p for p in predictions if p.target[label] == truth]
        if not mine:
            continue
        axes.boxplot(
            [[p.scale_weight[scale, label] for p in mine] for scale in scales],
            positions=np.arange(len(scales)) + shift,
            widths=0.3,
            whis=(5, 95),
            showfliers=False,
            showmeans=True,
            patch_artist=True,
            manage_ticks=False,
            boxprops={"facecolor": colour, "alpha": 0.35, "edgecolor": colour},
            medianprops={"color": colour, "linewidth": 1.6},
            whiskerprops={"color": colour},
            capprops={"color": colour},
            meanprops={"marker": "o", "markerfacecolor": "white", "markeredgecolor": colour, "markersize": 5},
        )
        axes.plot([], [], color=colour, linewidth=6, alpha=0.5, label=f"{name} images (n = {len(mine)})")
    axes.set_xticks(range(len(scales)), [str(scale) for scale in scales])
    axes.set_xlim(-0.6, len(scales) - 0.4)
    axes.set_ylim(-0.02, 1.02)
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.set_xlabel("scale (stride in pixels)")
    axes.set_ylabel("weight (the scales of an image add up to 1)")
    grid(axes)
    legend_below(figure)
    return figure
