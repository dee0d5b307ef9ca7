"""What a run is worth: metrics with intervals, curves, calibration, scales, and how often it finds the box."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from msmil.evaluation.classification import METRICS
from msmil.evaluation.results import number
from msmil.reporting.figures import classification_figures, scale_weights
from msmil.reporting.figures.maps import heading
from msmil.reporting.figures.style import words
from msmil.reporting.html import Budget, Markup, Section, element, figures, join, missing, paragraph, table
from msmil.reporting.html import with_bounds as bounds
from msmil.reporting.run_files import RunFiles
from msmil.reporting.trees import at, bounds_at, mapping_at, number_at, text_at, whole_at

NAMES: Final = {
    "auroc": "AUROC",
    "average_precision": "average precision",
    "f1": "F1",
    "balanced_accuracy": "balanced accuracy",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
}
SPLIT_NAMES: Final = {"train": "training", "val": "validation", "test": "test"}
_DEFAULT_CONFIDENCE: Final = 0.95
_KINDS: Final = {
    "roc": "ROC curve",
    "precision_recall": "precision-recall curve",
    "reliability": "reliability diagram",
    "confusion": "confusion matrix at the operating point",
}


def command(run: RunFiles) -> str:
    """The command that evaluates a run."""
    return f"msmil evaluate {run.folder} --split {run.split}"


def not_evaluated(run: RunFiles) -> Markup:
    """What stands in the place of results."""
    text = f"This run has not been evaluated on the {SPLIT_NAMES[run.split]} split."
    if run.other_splits:
        known = ", ".join(f"--split {split}" for split in run.other_splits)
        text += f" It has results of another one: msmil report {run.folder} {known}."
    return missing(text, command(run))


def results_section(run: RunFiles, prefix: str) -> Section:
    """Metrics of every label, with intervals, and what the numbers rest on."""
    title = f"Results on the {SPLIT_NAMES[run.split]} split"
    if not mapping_at(run.results, "labels"):
        return Section(f"{prefix}results", title, not_evaluated(run))
    rows: list[list[object]] = []
    for label in run.labels:
        branch = run.branch(label)
        cells = [bounds(branch[metric], branch[f"{metric}_ci"]) for metric in METRICS]
        rows.append([words(label), _positives(run, label), *cells, number(branch["threshold"])])
    mean = bounds(number_at(run.results, "mean_auroc"), bounds_at(run.results, "mean_auroc_ci"))
    head = ["label", "positive images", *NAMES.values(), "threshold"]
    parts = [paragraph(basis(run)), table(head, rows), paragraph(Markup(f"Mean AUROC over labels: {mean}"))]
    return Section(f"{prefix}results", title, join([*parts, _undefined(run), _calibration(run)]))


def basis(run: RunFiles) -> Markup:
    """What was judged, by which weights, and what brackets and thresholds mean."""
    results = run.results
    images, patients = whole_at(results, "images"), whole_at(results, "patients")
    text = f"{images} images of {patients} patients" if images and patients else "An unknown number of images"
    text += f", judged by checkpoint {text_at(results, 'checkpoint') or 'unknown'}."
    if at(results, "other_data_than_trained_on") is True:
        text += " These are other data than those it was trained on."
    replicates = whole_at(results, "intervals", "replicates")
    if replicates:
        text += f" Brackets: {confidence(run):.0%} interval from {replicates} resamples of the patients."
    rule, chosen_on = text_at(results, "thresholds_from", "rule"), whole_at(results, "thresholds_from", "images")
    if rule:
        text += f" Operating point: the threshold with the {rule} on {chosen_on} validation images."
        if run.split == "val":
            text += " These are the same images: what is counted at the threshold is optimistic."
    if run.is_finished is False:
        text += f" Training was not finished when this report was made ({run.progress})."
    return element("span", text)


def confidence(run: RunFiles) -> float:
    """Coverage of the intervals."""
    return number_at(run.results, "intervals", "confidence") or _DEFAULT_CONFIDENCE


def _positives(run: RunFiles, label: str) -> str:
    positives, images = (whole_at(run.results, "labels", label, key) for key in ("positives", "images"))
    return number(None) if positives is None else f"{positives}\u00a0of\u00a0{'?' if images is None else images}"


def _undefined(run: RunFiles) -> Markup:
    """Why numbers are missing."""
    reasons: dict[str, list[str]] = {}
    for label in run.labels:
        for metric, reason in mapping_at(run.results, "labels", label, "undefined").items():
            reasons.setdefault(f"{words(label)}: {reason}", []).append(NAMES.get(metric, str(metric)))
    items = [element("li", f"{where} (undefined: {', '.join(names)})") for where, names in reasons.items()]
    return Markup(f'<ul class="notes">{join(items)}</ul>') if items else Markup("")


def _calibration(run: RunFiles) -> Markup:
    rows: list[list[object]] = []
    for label in run.labels:
        keys = ("labels", label, "calibration")
        if (brier := number_at(run.results, *keys, "brier")) is not None:
            value = bounds(brier, bounds_at(run.results, *keys, "brier_ci"))
            rows.append([words(label), value, number(number_at(run.results, *keys, "ece"))])
    if not rows:
        return Markup("")
    bins = whole_at(run.results, "labels", run.labels[0], "calibration", "bins") or 10
    text = f"Calibration error: expected calibration error over {bins} bins of equal width; it has no interval, since "
    text += "resampling alone makes it larger. "
    if at(run.config, "loss", "pos_weight") not in ("none", None):
        text += "Training weighted positive images (loss.pos_weight), which shifts probabilities by design: they rank "
        text += "images and are not to be read as risks."
    head = ["label", "Brier score", "calibration error"]
    return join([element("h4", "Calibration"), table(head, rows), paragraph(text, "small")])


def curves_section(run: RunFiles, prefix: str, budget: Budget) -> Section:
    """ROC, precision and recall, reliability, and confusion of every label."""
    title = "ROC, precision and recall, calibration, confusion"
    if not mapping_at(run.results, "labels"):
        return Section(f"{prefix}curves", title, not_evaluated(run))
    if not run.predictions:
        why = f"There are no predictions/{run.split}.csv that these results were computed from."
        return Section(f"{prefix}curves", title, missing(why, command(run)))
    plain = {"labels": {label: run.branch(label) for label in run.labels}}
    drawn = classification_figures(
        run.predictions,
        plain,
        replicates=whole_at(run.results, "intervals", "replicates") or 0,
        confidence=confidence(run),
        seed=whole_at(run.config, "seed") or 0,
    )
    parts: list[Markup] = []
    for label in run.labels:
        mine = [
            (drawn[name], _alternative(run, label, kind)) for kind in _KINDS if (name := f"{label}_{kind}") in drawn
        ]
        parts.append(element("h4", words(label)))
        parts.append(figures(mine, budget))
        absent = [what for kind, what in _KINDS.items() if f"{label}_{kind}" not in drawn]
        if absent:
            parts.append(missing(f"No {', no '.join(absent)}: see the reasons below the table of results."))
    return Section(f"{prefix}curves", title, join(parts))


def _alternative(run: RunFiles, label: str, kind: str) -> str:
    """A figure in words, with its main numbers."""
    branch = run.branch(label)
    text = f"{words(label)}, {_KINDS[kind]} on the {SPLIT_NAMES[run.split]} split"
    if kind == "roc":
        return f"{text}: AUROC {number(branch['auroc'])}"
    if kind == "precision_recall":
        return f"{text}: average precision {number(branch['average_precision'])}"
    if kind == "confusion":
        at_point = f"sensitivity {number(branch['sensitivity'])}, specificity {number(branch['specificity'])}"
        return f"{text}: threshold {number(branch['threshold'])}, {at_point}"
    return f"{text}: share of positive images against mean probability in ten bins"


def scales_section(run: RunFiles, prefix: str, budget: Budget) -> Section:
    """Metrics of every scale's own head, and the weights that the model gives to scales."""
    title = "Scales"
    if not mapping_at(run.results, "labels"):
        return Section(f"{prefix}scales", title, not_evaluated(run))
    rows: list[list[object]] = []
    drawn = []
    for label in run.labels:
        rows += [[words(label), *row] for row in _scale_rows(run, label)]
        figure = scale_weights(run.predictions, label) if run.predictions else None
        if figure is not None:
            alternative = f"{words(label)}: weights of the scales, by truth, as box plots; the means are in the table"
            drawn.append((figure, alternative))
    head = ["label", "scale", "AUROC", "average precision", "balanced accuracy"]
    head += ["mean weight, negatives", "mean weight, positives"]
    text = (
        "A scale is named by its stride, in pixels of the stored image, or by its tile size. Its own metrics are those "
    )
    text += (
        "of its head alone (deep supervision), each at its own threshold from validation. A weight says how much the "
    )
    text += "model relies on a scale for an image; the weights of an image add up to 1."
    body = [paragraph(text), table(head, rows, left=2), figures(drawn, budget)]
    return Section(f"{prefix}scales", title, join(body))


def _scale_rows(run: RunFiles, label: str) -> list[list[object]]:
    """A row for all scales together, and one per scale."""
    scales = [str(scale) for scale in mapping_at(run.results, "labels", label, "scales")]
    weight = _weights(run, label)
    rows: list[list[object]] = []
    for scale in (None, *(scales or [str(scale) for scale in weight])):
        branch = run.branch(label, scale)
        cells = [bounds(branch[m], branch[f"{m}_ci"]) for m in ("auroc", "average_precision", "balanced_accuracy")]
        told = weight.get(int(scale)) if scale is not None and scale.isdigit() else None
        mean = [number(None), number(None)] if told is None else [number(value, 2) for value in told]
        rows.append(["all" if scale is None else scale, *cells, *mean])
    return rows


def _weights(run: RunFiles, label: str) -> dict[int, tuple[float | None, float | None]]:
    """{scale: mean weight over negative and over positive images}."""
    found = run.predictions
    if not found:
        return {}
    scales = [scale for scale, name in found[0].scale_weight if name == label]
    by_truth = [[p for p in found if p.target[label] == truth] for truth in (0, 1)]
    means: dict[int, tuple[float | None, float | None]] = {}
    for scale in scales:
        negative, positive = (
            float(np.mean([p.scale_weight[scale, label] for p in part])) if part else None for part in by_truth
        )
        means[scale] = (negative, positive)
    return means


def localisation_section(run: RunFiles, prefix: str) -> Section:
    """How often the peak of each map lies in a true box."""
    title = "Where it looks"
    if not mapping_at(run.results, "labels"):
        return Section(f"{prefix}maps", title, not_evaluated(run))
    by_label: Mapping[str, Any] = mapping_at(run.results, "localisation")
    rows: list[list[object]] = []
    for label, by_map in by_label.items():
        for name, found in mapping_at({"x": by_map}, "x").items():
            images = whole_at(found, "images")
            if not images:
                continue
            rate, chance, ratio = (number_at(found, key) for key in ("rate", "chance", "ratio"))
            numbers = [f"{whole_at(found, 'hits')} of {images}", _percent(rate), _percent(chance), number(ratio, 1)]
            rows.append([words(str(label)), map_words(str(name)), *numbers])
    if not rows:
        text = "No image of this split has a box of a label that is learned, or the model has no maps."
        return Section(f"{prefix}maps", title, missing(text))
    text = "How often the peak of a map lies in a true box of its label, over the images that have one. Chance is the "
    text += "boxes' share of the breast. The model was never shown a box."
    head = ["label", "map", "peak in a box", "rate", "chance", "rate / chance"]
    return Section(f"{prefix}maps", title, join([paragraph(text), table(head, rows, left=2)]))


def map_words(name: str) -> str:
    """A map's name for people: attention_16 -> attention, scale 16."""
    return heading(name).replace("\n", ", ")


def _percent(value: float | None) -> str:
    return number(None) if value is None else f"{value:.1%}"
