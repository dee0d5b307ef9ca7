"""How far a probability can be taken at its word. N images, M of them with a known label, R replicates, B bins."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from msmil.evaluation.bootstrap import PatientBootstrap, interval
from msmil.evaluation.classification import rank

Array = NDArray[Any]

BINS: Final = 10


@dataclass(frozen=True, slots=True)
class Calibration:
    """Calibration of one label's probability, over the images with a known label.

    brier: mean squared difference of probability and truth (Brier 1950), with its interval from resampled patients
    (None without replicates); ece: expected calibration error (Naeini et al. 2015), sum_b n_b / M |mean probability_b -
    share of positives_b|, over B bins of equal width, [b / B, (b + 1) / B) and the last one closed. It has no interval:
    resampling alone makes it larger.

    count_B: images of each bin; probability_B: their mean probability; share_B: their share of positives, with its
    interval low_B..high_B (`wilson`); NaN where the bin is empty.
    """

    brier: float
    brier_ci: tuple[float, float] | None
    ece: float
    count_B: Array
    probability_B: Array
    share_B: Array
    low_B: Array
    high_B: Array
    confidence: float

    def numbers(self) -> dict[str, Any]:
        """What metrics/<split>.json holds of it."""
        bounds = None if self.brier_ci is None else list(self.brier_ci)
        return {"brier": self.brier, "brier_ci": bounds, "ece": self.ece, "bins": len(self.count_B)}


def calibration(
    target_N: Array, probability_N: Array, bootstrap: PatientBootstrap, confidence: float
) -> Calibration | None:
    """The calibration of a label; None where no image has a known label.

    Args:
        target_N: 1, 0, -1 (unknown, left out).
        probability_N: in 0..1.
        bootstrap: of the same N images.
        confidence: of the intervals.
    """
    ranking = rank(target_N, probability_N)
    if not len(ranking.order_M):
        return None
    probability_M = np.asarray(probability_N, np.float64)[ranking.order_M]
    positive_M = ranking.positive_M.astype(np.float64)
    bin_M = np.searchsorted(np.arange(1, BINS) / BINS, probability_M, side="right")
    count_B, total_B, positive_B = (
        np.bincount(bin_M, weights=value_M, minlength=BINS) for value_M in (None, probability_M, positive_M)
    )
    patient_M = bootstrap.patient_N[ranking.order_M]
    patients_B = np.array([len(np.unique(patient_M[bin_M == b])) for b in range(BINS)])
    with np.errstate(invalid="ignore"):
        mean_B, share_B = total_B / count_B, positive_B / count_B
    low_B, high_B = wilson(share_B, patients_B, confidence)
    error_M = (probability_M - positive_M) ** 2
    with np.errstate(invalid="ignore"):  # a replicate may hold none of these images
        brier_R = [weight_RM @ error_M / weight_RM.sum(axis=1) for weight_RM in bootstrap.weights(ranking)]
    brier = interval(np.concatenate([np.zeros(0), *brier_R]), confidence)
    return Calibration(
        brier=float(error_M.mean()),
        brier_ci=None if brier is None else (brier.low, brier.high),
        ece=float(np.nansum(count_B * np.abs(mean_B - share_B)) / len(positive_M)),
        count_B=count_B,
        probability_B=mean_B,
        share_B=share_B,
        low_B=low_B,
        high_B=high_B,
        confidence=confidence,
    )


def wilson(share_B: Array, trials_B: Array, confidence: float) -> tuple[Array, Array]:
    """Wilson's (1927) interval of a share; NaN where nothing was tried.

    For images `trials_B` are their patients, which errs to the wide side: images of a patient are not independent. It
    has a width where all or none are positive, as a resampled share has not.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale_B = 1 + z**2 / trials_B
        middle_B = (share_B + z**2 / (2 * trials_B)) / scale_B
        half_B = z * np.sqrt(share_B * (1 - share_B) / trials_B + z**2 / (4 * trials_B**2)) / scale_B
    return np.clip(middle_B - half_B, 0, 1), np.clip(middle_B + half_B, 0, 1)
