"""Calibration: equal to a plain loop, to scikit-learn and to SciPy; intervals have a width where they must."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import brier_score_loss

from msmil.evaluation.bootstrap import PatientBootstrap
from msmil.evaluation.calibration import BINS, calibration, wilson


def sample(images=120, seed=0):
    rng = np.random.default_rng(seed)
    probability = rng.random(images).round(2)  # some lie on the edges of bins
    target = (rng.random(images) < probability).astype(int)
    target[::17] = -1
    bootstrap = PatientBootstrap([f"{i // 3:03d}" for i in range(images)], replicates=200, seed=1)
    return target, probability, bootstrap


def test_it_equals_a_plain_computation() -> None:
    target, probability, bootstrap = sample()
    found = calibration(target, probability, bootstrap, 0.9)
    assert found is not None
    known = target >= 0
    assert found.brier == pytest.approx(brier_score_loss(target[known], probability[known]))
    bins = [[] for _ in range(BINS)]
    for t, p in zip(target[known], probability[known], strict=True):
        bins[sum(p >= edge / 10 for edge in range(1, BINS))].append((t, p))
    error = 0.0
    for b, members in enumerate(bins):
        assert found.count_B[b] == len(members)
        share, mean = np.mean([t for t, _ in members]), np.mean([p for _, p in members])
        assert (found.share_B[b], found.probability_B[b]) == pytest.approx((share, mean))
        error += len(members) / known.sum() * abs(share - mean)
    assert found.ece == pytest.approx(error)


def test_the_interval_of_the_brier_score_resamples_patients() -> None:
    target, probability, bootstrap = sample()
    found = calibration(target, probability, bootstrap, 0.9)
    assert found is not None
    assert found.brier_ci is not None
    known = np.flatnonzero(target >= 0)
    patient = np.arange(len(target))[known] // 3
    rng = np.random.default_rng(1)
    scores = []
    for drawn in rng.integers(40, size=(200, 40)):
        weight = np.bincount(drawn, minlength=40)[patient]
        scores.append(np.average((probability[known] - target[known]) ** 2, weights=weight))
    assert found.brier_ci == pytest.approx(tuple(np.quantile(scores, [0.05, 0.95])))


@pytest.mark.parametrize(("hits", "trials"), [(0, 5), (3, 7), (9, 9), (40, 100)])
def test_wilson_is_scipys(hits: int, trials: int) -> None:
    low, high = wilson(np.array([hits / trials]), np.array([trials]), 0.95)
    expected = binomtest(hits, trials).proportion_ci(0.95, method="wilson")
    assert (low[0], high[0]) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_images_of_one_patient_count_once_in_an_interval() -> None:
    target, probability = np.ones(6, int), np.full(6, 0.95)
    apart, together = (
        calibration(target, probability, PatientBootstrap(patients, replicates=0, seed=0), 0.95)
        for patients in (list("abcdef"), list("aaaaaa"))
    )
    assert apart is not None
    assert together is not None
    assert together.low_B[-1] < apart.low_B[-1] < 1
    assert np.isnan(apart.low_B[:-1]).all()


def test_without_a_known_label_there_is_no_calibration() -> None:
    bootstrap = PatientBootstrap(["a", "b"], replicates=10, seed=0)
    assert calibration(np.array([-1, -1]), np.array([0.1, 0.9]), bootstrap, 0.95) is None
