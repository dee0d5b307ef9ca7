"""Classification metrics of one label, exact under ties, for any non-negative weights of the images.

N images, M images with a known label, T distinct probabilities, R sets of weights (replicates), U = T + 1.

With weights of 1 they equal scikit-learn's; with whole-number weights they equal scikit-learn's on repeated images.
NaN stands for "undefined" inside arrays; what leaves through `scores` is a number, or None with a reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shards.types import UNKNOWN

Array = NDArray[Any]

METRICS: Final = ("auroc", "average_precision", "f1", "balanced_accuracy", "sensitivity", "specificity")
AT_THRESHOLD: Final = ("f1", "balanced_accuracy", "sensitivity", "specificity")


@dataclass(frozen=True, slots=True)
class Ranking:
    """The images with a known label in descending order of probability, sorted once for any number of weights.

    order_M: positions in the arrays that were ranked; positive_M: bool; value_T: the distinct probabilities,
    descending; end_T: how many images have at least that probability.
    """

    order_M: Array
    positive_M: Array
    value_T: Array
    end_T: Array


@dataclass(frozen=True, slots=True)
class Threshold:
    """An operating point: an image is called positive where its probability is at least `value`.

    `value` is None where none could be chosen; `reason` then says why, and is empty otherwise.
    """

    value: float | None
    reason: str


@dataclass(frozen=True, slots=True)
class Scores:
    """Metrics of one label: `value` holds every name of METRICS; `undefined` says why a value is None."""

    value: dict[str, float | None]
    undefined: dict[str, str]


def rank(target_N: Array, probability_N: Array) -> Ranking:
    """Sort images by probability, leaving out those with an unknown label (-1).

    Raises ValueError for another target than 1, 0, -1, or a probability outside 0..1 (NaN included).
    """
    target_N, probability_N = np.asarray(target_N), np.asarray(probability_N, np.float64)
    if target_N.shape != probability_N.shape or target_N.ndim != 1:
        raise ValueError(f"targets {target_N.shape} and probabilities {probability_N.shape} are not one per image")
    if not np.isin(target_N, (0, 1, UNKNOWN)).all():
        raise ValueError(f"targets {sorted(set(target_N.tolist()))} are not among 1, 0 and {UNKNOWN}")
    bad_N = ~((probability_N >= 0) & (probability_N <= 1))
    if bad_N.any():
        first = int(np.argmax(bad_N))
        raise ValueError(f"probability {probability_N[first]} of image number {first} is not in 0..1")
    known_M = np.flatnonzero(target_N != UNKNOWN)
    order_M = known_M[np.argsort(-probability_N[known_M], kind="stable")]
    sorted_M = probability_N[order_M]
    end_T = np.append(np.flatnonzero(np.diff(sorted_M)) + 1, len(sorted_M)) if len(sorted_M) else np.zeros(0, np.int64)
    return Ranking(order_M, target_N[order_M] == 1, sorted_M[end_T - 1], end_T)


def cumulative(ranking: Ranking, weight_RM: Array) -> tuple[Array, Array]:
    """Weight of true and of false positives (tp_RU, fp_RU) as the threshold falls; column 0 is "none positive"."""
    column_U = np.concatenate([[0], ranking.end_T])
    positive_RM = np.where(ranking.positive_M, weight_RM, 0.0)
    tp_RM = np.cumsum(np.pad(positive_RM, ((0, 0), (1, 0))), axis=1)
    all_RM = np.cumsum(np.pad(np.asarray(weight_RM, np.float64), ((0, 0), (1, 0))), axis=1)
    tp_RU = tp_RM[:, column_U]
    return tp_RU, all_RM[:, column_U] - tp_RU


def weighted_metrics(ranking: Ranking, weight_RM: Array, threshold: float | None) -> dict[str, Array]:
    """Every metric of METRICS for R sets of weights at once, float64 [R], NaN where undefined.

    Args:
        ranking: of `rank`.
        weight_RM: non-negative weights, in the ranking's order.
        threshold: probability from which on an image is positive; None leaves the metrics at a threshold undefined.

    AUROC is the area under the trapezoids (ties count one half). Average precision is the sum of precision times the
    step of recall over the distinct probabilities, without interpolation (scikit-learn's definition). All metrics need
    a positive and a negative image; sensitivity needs positives alone and specificity negatives alone.
    """
    tp_RU, fp_RU = cumulative(ranking, weight_RM)
    positives_R, negatives_R = tp_RU[:, -1], fp_RU[:, -1]
    both_R = (positives_R > 0) & (negatives_R > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        area_R = (np.diff(fp_RU) * (tp_RU[:, 1:] + tp_RU[:, :-1])).sum(axis=1) / 2
        called_RT = tp_RU[:, 1:] + fp_RU[:, 1:]
        precision_RT = np.where(called_RT > 0, tp_RU[:, 1:] / called_RT, 0.0)
        auroc_R = area_R / (positives_R * negatives_R)
        average_precision_R = (np.diff(tp_RU) * precision_RT).sum(axis=1) / positives_R
        if threshold is None:
            f1_R = sensitivity_R = specificity_R = np.full(len(tp_RU), np.nan)
        else:
            column = int(np.count_nonzero(ranking.value_T >= threshold))
            tp_R, fp_R = tp_RU[:, column], fp_RU[:, column]
            f1_R = 2 * tp_R / (tp_R + fp_R + positives_R)
            sensitivity_R = tp_R / positives_R
            specificity_R = (negatives_R - fp_R) / negatives_R
    return {
        "auroc": auroc_R,
        "average_precision": np.where(both_R, average_precision_R, np.nan),
        "f1": np.where(both_R, f1_R, np.nan),
        "balanced_accuracy": (sensitivity_R + specificity_R) / 2,
        "sensitivity": sensitivity_R,
        "specificity": specificity_R,
    }


def scores(ranking: Ranking, threshold: Threshold) -> Scores:
    """The metrics of the images themselves (each counted once)."""
    metrics = weighted_metrics(ranking, np.ones((1, len(ranking.order_M))), threshold.value)
    value = {name: float(metrics[name][0]) if np.isfinite(metrics[name][0]) else None for name in METRICS}
    lacking = _lacking(ranking)
    undefined = {
        name: threshold.reason if name in AT_THRESHOLD and threshold.value is None else lacking
        for name in METRICS
        if value[name] is None
    }
    return Scores(value, undefined)


def choose_threshold(target_N: Array, probability_N: Array) -> Threshold:
    """The threshold with the highest balanced accuracy (Youden's J + 1, halved); meant for validation images.

    Candidates lie half-way between neighbouring distinct probabilities, so that no image sits on the boundary; the last
    one is the lowest probability itself ("all positive"). Among equals the lowest threshold wins, the one with the
    highest sensitivity. J is compared in whole numbers, so the choice depends on no rounding. Without positive or
    without negative images there is no threshold.
    """
    ranking = rank(target_N, probability_N)
    lacking = _lacking(ranking)
    if lacking:
        return Threshold(None, f"no threshold: {lacking} to choose it on")
    positives = int(ranking.positive_M.sum())
    negatives = len(ranking.positive_M) - positives
    tp_T = np.cumsum(ranking.positive_M)[ranking.end_T - 1]
    fp_T = ranking.end_T - tp_T
    youden_T = tp_T * negatives - fp_T * positives
    best = int(np.flatnonzero(youden_T == youden_T.max())[-1])
    upper = float(ranking.value_T[best])
    lower = float(ranking.value_T[best + 1]) if best + 1 < len(ranking.value_T) else upper
    middle = lower + (upper - lower) / 2
    return Threshold(middle if middle > lower else upper, "")


def confusion(target_N: Array, probability_N: Array, threshold: float) -> Array:
    """Counts of images as int64 [2, 2]: rows true negative / positive, columns called negative / positive."""
    ranking = rank(target_N, probability_N)
    called_M = np.asarray(probability_N, np.float64)[ranking.order_M] >= threshold
    return np.bincount(2 * ranking.positive_M + called_M, minlength=4).reshape(2, 2)


def _lacking(ranking: Ranking) -> str:
    """What the images lack for a metric, in words; empty where they lack nothing."""
    if not len(ranking.positive_M):
        return "no image with a known label"
    if not ranking.positive_M.any():
        return "no positive image"
    return "no negative image" if ranking.positive_M.all() else ""
