"""Metrics as the published code counts them, beside ours: at a threshold of 0.5, chosen on nothing.

N images.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from msmil.evaluation.classification import confusion, rank, weighted_metrics

Array = NDArray[Any]

LEGACY_METRICS: Final = ("auroc", "f1_weighted", "balanced_accuracy")
LEGACY_THRESHOLD: Final = 0.5


def legacy_scores(target_N: Array, probability_N: Array) -> dict[str, float | None]:
    """AUROC, and at 0.5 the F1 of both classes weighted by their images, and balanced accuracy (FPN-MIL's code).

    Images with an unknown label (-1) are left out. All are None without a positive or without a negative image.
    """
    ranking = rank(target_N, probability_N)
    found = weighted_metrics(ranking, np.ones((1, len(ranking.order_M))), LEGACY_THRESHOLD)
    auroc, accuracy = float(found["auroc"][0]), float(found["balanced_accuracy"][0])
    if not np.isfinite(auroc):
        return dict.fromkeys(LEGACY_METRICS)
    (tn, fp), (fn, tp) = confusion(target_N, probability_N, LEGACY_THRESHOLD).tolist()
    f1_negative, f1_positive = 2 * tn / (2 * tn + fn + fp), 2 * tp / (2 * tp + fn + fp)
    f1 = ((tn + fp) * f1_negative + (fn + tp) * f1_positive) / (tn + fp + fn + tp)
    return dict(zip(LEGACY_METRICS, (auroc, f1, accuracy), strict=True))
