"""The results of a split in the form of metrics/<split>.json, and as a table for the terminal.

N images, R replicates of the bootstrap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msmil.evaluation.bootstrap import PatientBootstrap, interval
from msmil.evaluation.calibration import calibration
from msmil.evaluation.classification import METRICS, Scores, choose_threshold, rank, scores
from msmil.evaluation.legacy import LEGACY_THRESHOLD, legacy_scores
from msmil.evaluation.predictions import check_predictions
from msmil.types import Prediction
from shards.tables import aligned
from shards.types import UNKNOWN

Array = NDArray[Any]


def classification_results(
    test: Sequence[Prediction],
    validation: Sequence[Prediction],
    labels: Sequence[str],
    scales: Sequence[int],
    *,
    replicates: int,
    confidence: float,
    seed: int,
) -> dict[str, Any]:
    """Metrics of `test` at thresholds chosen on `validation`, per label, aggregated and per scale branch.

    Args:
        test: the images that are judged, each once.
        validation: the images on which every branch's threshold is chosen.
        labels: in the order of the result.
        scales: strides; they have results where predictions hold scale probabilities (deep supervision).
        replicates: of the patient bootstrap; 0 leaves every interval null.
        confidence: of the intervals, for example 0.95.
        seed: of the bootstrap.

    Returns a dict that JSON can hold (no NaN): "labels" {label: {each of METRICS, each with `_ci` [low, high],
    "threshold", "positives", "images", "patients" (of images with a known label), "undefined" {metric: reason},
    "undefined_replicates" {metric: count}, "calibration" (`Calibration.numbers`), "scales" {stride: the same
    metrics}}}, "mean_auroc" over the labels that have an AUROC, "mean_auroc_ci", and how it was made. A metric that is
    undefined is None, with its reason.
    "legacy" {label: {each of LEGACY_METRICS, "scales" {stride: the same}}} counts as the published code does.

    Raises UserError, naming the image, for what `check_predictions` refuses.
    """
    check_predictions(test, labels, scales)
    check_predictions(validation, labels, scales)
    bootstrap = PatientBootstrap([p.patient_id for p in test], replicates=replicates, seed=seed)
    by_label: dict[str, Any] = {}
    legacy: dict[str, Any] = {}
    auroc_LR: list[Array] = []
    for label in labels:
        merged, auroc_R = _branch(test, validation, label, None, bootstrap, confidence)
        known = [p for p in test if p.target[label] != UNKNOWN]
        merged["positives"] = sum(p.target[label] for p in known)
        merged["images"] = len(known)
        merged["patients"] = len({p.patient_id for p in known})
        found = calibration(*columns(test, label, None), bootstrap, confidence)
        merged["calibration"] = None if found is None else found.numbers()
        branches = scales if test[0].scale_probability and validation[0].scale_probability else ()
        merged["scales"] = {
            str(scale): _branch(test, validation, label, scale, bootstrap, confidence)[0] for scale in branches
        }
        by_label[label] = merged
        legacy[label] = legacy_scores(*columns(test, label, None)) | {
            "scales": {str(scale): legacy_scores(*columns(test, label, scale)) for scale in branches}
        }
        if merged["auroc"] is not None:
            auroc_LR.append(auroc_R)
    aurocs = [by_label[label]["auroc"] for label in labels if by_label[label]["auroc"] is not None]
    return {
        "labels": by_label,
        "legacy": legacy,
        "mean_auroc": float(np.mean(aurocs)) if aurocs else None,
        "mean_auroc_ci": _interval(np.mean(auroc_LR, axis=0), confidence) if auroc_LR else None,
        "images": len(test),
        "patients": bootstrap.num_patients,
        "thresholds_from": {"images": len(validation), "rule": "highest balanced accuracy"},
        "intervals": {"confidence": confidence, "replicates": bootstrap.replicates, "resampled": "patients"},
    }


def columns(predictions: Sequence[Prediction], label: str, scale: int | None) -> tuple[Array, Array]:
    """Targets int64 [N] and probabilities float64 [N] of a label, aggregated (`scale` None) or of one scale branch."""
    target_N = np.array([p.target[label] for p in predictions], np.int64)
    probability_N = np.array(
        [p.probability[label] if scale is None else p.scale_probability[scale, label] for p in predictions], np.float64
    )
    return target_N, probability_N


def _branch(
    test: Sequence[Prediction],
    validation: Sequence[Prediction],
    label: str,
    scale: int | None,
    bootstrap: PatientBootstrap,
    confidence: float,
) -> tuple[dict[str, Any], Array]:
    """The metrics of one probability column, and its AUROC in every replicate."""
    threshold = choose_threshold(*columns(validation, label, scale))
    ranking = rank(*columns(test, label, scale))
    point: Scores = scores(ranking, threshold)
    replicate = bootstrap.metrics(ranking, threshold.value)
    branch: dict[str, Any] = {}
    left_out: dict[str, int] = {}
    for name in METRICS:
        value = point.value[name]
        found = interval(replicate[name], confidence) if value is not None else None
        branch[name] = value
        branch[f"{name}_ci"] = None if found is None else [found.low, found.high]
        if found is not None and found.undefined:
            left_out[name] = found.undefined
    branch |= {"threshold": threshold.value, "undefined": point.undefined, "undefined_replicates": left_out}
    return branch, replicate["auroc"]


def _interval(value_R: Array, confidence: float) -> list[float] | None:
    found = interval(value_R, confidence)
    return None if found is None else [found.low, found.high]


def results_table(results: Mapping[str, Any], localisation: Mapping[str, Any] | None) -> str:
    """The results as text for a terminal, at most about 120 columns wide.

    Args:
        results: of `classification_results`.
        localisation: of `PeakHits.results`, or None where no image had boxes or maps were not asked for.
    """
    made, chosen = results["intervals"], results["thresholds_from"]
    lines = [
        f"{results['images']} images of {results['patients']} patients.",
        f"Brackets: {made['confidence']:.0%} interval from {made['replicates']} resamples of the patients.",
        f"Thresholds: {chosen['rule']} on {chosen['images']} validation images.",
    ]
    head = ["", "AUROC", "average precision", "F1", "bal. acc.", "sens.", "spec.", "threshold"]
    for label, merged in results["labels"].items():
        lines += ["", f"{label}: {merged['positives']} of {merged['images']} images positive"]
        rows = [head, _row("all scales", merged)]
        rows += [_row(f"scale {scale}", branch) for scale, branch in merged["scales"].items()]
        lines += aligned(rows, indent=2)
        lines += [f"  no {name}: {reason}" for name, reason in merged["undefined"].items()]
        f1, accuracy = (number(results["legacy"][label][name]) for name in ("f1_weighted", "balanced_accuracy"))
        lines.append(f"  as published, at {LEGACY_THRESHOLD}: weighted F1 {f1}, balanced accuracy {accuracy}")
    mean = _with_interval(results["mean_auroc"], results["mean_auroc_ci"])
    lines += ["", f"Mean AUROC over labels: {mean}"]
    if localisation:
        lines += ["", "How often the peak of a map lies in a box of the label; chance: the boxes' share of the breast"]
        rows = [["", "map", "images", "hits", "rate", "chance", "rate / chance"]]
        for label, by_map in localisation.items():
            for map_name, found in by_map.items():
                numbers = [number(found[key]) for key in ("rate", "chance")]
                ratio = "-" if found["ratio"] is None else f"{found['ratio']:.1f}"
                rows.append([label, map_name, str(found["images"]), str(found["hits"]), *numbers, ratio])
        lines += aligned(rows, left=2, indent=2)
    return "\n".join(lines)


def _row(name: str, branch: Mapping[str, Any]) -> list[str]:
    ranked = [_with_interval(branch[metric], branch[f"{metric}_ci"]) for metric in ("auroc", "average_precision")]
    fixed = [number(branch[m]) for m in ("f1", "balanced_accuracy", "sensitivity", "specificity", "threshold")]
    return [name, *ranked, *fixed]


def number(value: float | None, digits: int = 3) -> str:
    """A number with this many digits, or a dash for what is undefined."""
    return "-" if value is None else f"{value:.{digits}f}"


def _with_interval(value: float | None, bounds: Sequence[float] | None) -> str:
    return number(value) if bounds is None else f"{number(value)} [{bounds[0]:.3f}, {bounds[1]:.3f}]"
