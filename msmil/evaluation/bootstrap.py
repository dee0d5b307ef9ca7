"""Percentile intervals from resampling patients, since the images of a patient are not independent.

N images, P patients, R replicates, M images with a known label, T distinct probabilities, G points of a grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from msmil.evaluation.classification import METRICS, Ranking, cumulative, weighted_metrics

Array = NDArray[Any]

_CHUNK_NUMBERS: Final = 1 << 18  # numbers in one array of a chunk of replicates: it stays in the cache
_GRID: Final = 201
_Points = Callable[[Array, Array], tuple[Array, Array, Array]]


@dataclass(frozen=True, slots=True)
class Interval:
    """A percentile interval; `undefined` counts the replicates that had no value and were left out."""

    low: float
    high: float
    undefined: int


@dataclass(frozen=True, slots=True)
class Curve:
    """A ROC curve (x false positive rate, y sensitivity) or a precision-recall curve (x recall, y precision).

    x_T, y_T is the curve of the images; grid_G with low_G and high_G is the pointwise interval around it, empty where
    there were too few patients or replicates for one; `confidence` is theirs. `base_rate` is the share of positives.
    """

    x_T: Array
    y_T: Array
    grid_G: Array
    low_G: Array
    high_G: Array
    base_rate: float
    confidence: float


class PatientBootstrap:
    """R resamples of the patients, drawn once and used for every metric, label and scale of the same images.

    A replicate draws as many patients as there are, with replacement; an image's weight is how often its patient was
    drawn. Sharing the draws makes replicates of different columns comparable one by one.

    Args:
        patient: patient of each image.
        replicates: number of resamples; 0 draws none, and every interval is then None.
        seed: of numpy's PCG64 generator; the same seed and patients give the same weights.
    """

    def __init__(self, patient: Sequence[str], *, replicates: int, seed: int) -> None:
        names, self.patient_N = np.unique(np.asarray(patient, dtype=np.str_), return_inverse=True)
        self.num_patients = len(names)
        # The resample of a single patient is always the same: an interval of width 0 would be a lie.
        self.replicates = replicates if self.num_patients > 1 else 0
        drawn_RP = np.random.default_rng(seed).integers(
            self.num_patients or 1, size=(self.replicates, self.num_patients)
        )
        drawn_RP += self.num_patients * np.arange(self.replicates)[:, None]
        count = np.bincount(drawn_RP.ravel(), minlength=self.replicates * self.num_patients)
        self._weight_RP = count.reshape(self.replicates, self.num_patients).astype(np.int32)

    def metrics(self, ranking: Ranking, threshold: float | None) -> dict[str, Array]:
        """Every metric of METRICS for every replicate, float64 [R], NaN where undefined."""
        chunks = [weighted_metrics(ranking, weight_RM, threshold) for weight_RM in self.weights(ranking)]
        return {name: np.concatenate([np.zeros(0), *(chunk[name] for chunk in chunks)]) for name in METRICS}

    def roc(self, ranking: Ranking, confidence: float) -> Curve | None:
        """ROC curve with the interval of the sensitivity at each false positive rate; None where undefined."""
        return self._curve(ranking, confidence, _roc_points)

    def precision_recall(self, ranking: Ranking, confidence: float) -> Curve | None:
        """Precision-recall curve with the interval of the precision at each recall; None where undefined."""
        return self._curve(ranking, confidence, _precision_recall_points)

    def _curve(self, ranking: Ranking, confidence: float, points: _Points) -> Curve | None:
        positives = int(ranking.positive_M.sum())
        if not 0 < positives < len(ranking.positive_M):
            return None
        tp_1U, fp_1U = cumulative(ranking, np.ones((1, len(ranking.order_M))))
        x_T, y_T, _ = points(tp_1U[0], fp_1U[0])
        rows = [
            points(tp_U, fp_U)[2]
            for weight_RM in self.weights(ranking)
            for tp_U, fp_U in zip(*cumulative(ranking, weight_RM), strict=True)
            if tp_U[-1] > 0 and fp_U[-1] > 0
        ]
        empty = np.zeros(0)
        grid_G, low_G, high_G = empty, empty, empty
        if rows:
            grid_G = np.linspace(0.0, 1.0, _GRID)
            low_G, high_G = np.quantile(np.stack(rows), _tails(confidence), axis=0)
        return Curve(x_T, y_T, grid_G, low_G, high_G, positives / len(ranking.positive_M), confidence)

    def weights(self, ranking: Ranking) -> Iterator[Array]:
        """Weights of the ranked images, float64 [some replicates, M], a chunk of replicates at a time."""
        patient_M = self.patient_N[ranking.order_M]
        size = max(1, _CHUNK_NUMBERS // max(1, len(patient_M)))
        for start in range(0, self.replicates, size):
            yield self._weight_RP[start : start + size, patient_M].astype(np.float64)


def interval(value_R: Array, confidence: float) -> Interval | None:
    """Percentile interval of the replicates that have a value; None where none has."""
    defined_R = value_R[np.isfinite(value_R)]
    if not len(defined_R):
        return None
    low, high = np.quantile(defined_R, _tails(confidence))
    return Interval(float(low), float(high), len(value_R) - len(defined_R))


def _tails(confidence: float) -> tuple[float, float]:
    return (1 - confidence) / 2, (1 + confidence) / 2


def _roc_points(tp_U: Array, fp_U: Array) -> tuple[Array, Array, Array]:
    """The curve's points and its height on the grid; at a vertical step the upper end counts."""
    x_U, y_U = fp_U / fp_U[-1], tp_U / tp_U[-1]
    last_U = np.append(np.diff(x_U) > 0, True)
    return x_U, y_U, np.interp(np.linspace(0.0, 1.0, _GRID), x_U[last_U], y_U[last_U])


def _precision_recall_points(tp_U: Array, fp_U: Array) -> tuple[Array, Array, Array]:
    """The curve's points from the highest probability on, and the precision where each recall is first reached."""
    called_U = tp_U + fp_U
    seen_T = called_U > 0
    recall_T, precision_T = tp_U[seen_T] / tp_U[-1], tp_U[seen_T] / called_U[seen_T]
    first_G = np.searchsorted(recall_T, np.linspace(0.0, 1.0, _GRID), side="left")
    return recall_T, precision_T, precision_T[np.minimum(first_G, len(recall_T) - 1)]
