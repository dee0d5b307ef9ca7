"""Intervals from resampling patients: exact, seeded, wide enough, and fast."""

from __future__ import annotations

import time
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from msmil.evaluation.bootstrap import PatientBootstrap, interval
from msmil.evaluation.classification import METRICS, Threshold, rank, scores


def clustered(rng, *, patients, images, separation, shared):
    """Images of patients with a label each; `shared` is the part of the score's variance that a patient's images share.

    The AUROC is that of two normal distributions, `separation` standard deviations apart.
    """
    target = np.repeat(rng.random(patients) < 0.4, images).astype(int)
    noise = np.sqrt(shared) * np.repeat(rng.normal(size=patients), images)
    noise += np.sqrt(1 - shared) * rng.normal(size=patients * images)
    probability = 1 / (1 + np.exp(-(noise + separation * target)))
    patient = [f"patient {i}" for i in range(patients) for _ in range(images)]
    return target, probability, patient


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(2, 8), st.integers(1, 4))
def test_a_replicate_equals_scikit_learn_on_the_images_of_the_patients_drawn(seed, patients, images):
    rng = np.random.default_rng(seed)
    patient = rng.permutation(np.repeat(np.arange(patients), images)).astype(str).tolist()
    target = rng.integers(-1, 2, len(patient))
    probability = rng.integers(0, 5, len(patient)) / 4
    bootstrap = PatientBootstrap(patient, replicates=20, seed=seed)
    auroc_R = bootstrap.metrics(rank(target, probability), 0.5)["auroc"]
    for r in range(20):
        # Patients in the order of their names, as numpy's unique gives them.
        drawn = np.random.default_rng(seed).integers(patients, size=(20, patients))[r]
        times = np.bincount(drawn, minlength=patients)
        names = sorted(set(patient))
        repeated = [i for i, name in enumerate(patient) for _ in range(times[names.index(name)]) if target[i] >= 0]
        if len({int(target[i]) for i in repeated}) < 2:
            assert np.isnan(auroc_R[r])
        else:
            expected = sk.roc_auc_score(target[repeated], probability[repeated])
            assert auroc_R[r] == pytest.approx(expected, abs=1e-12)


def test_the_same_seed_gives_the_same_intervals_and_another_seed_others():
    target, probability, patient = clustered(np.random.default_rng(0), patients=30, images=4, separation=1, shared=0.5)
    ranking = rank(target, probability)
    first, again, other = (
        interval(PatientBootstrap(patient, replicates=200, seed=seed).metrics(ranking, 0.5)["auroc"], 0.95)
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_images_of_a_patient_are_drawn_together():
    """Copies of an image add no information: the interval of 40 patients stays as wide with 8 copies of each image."""
    rng = np.random.default_rng(3)
    target, probability, patient = clustered(rng, patients=40, images=1, separation=1, shared=0)

    def width(target, probability, patient):
        bootstrap = PatientBootstrap(patient, replicates=400, seed=0)
        found = interval(bootstrap.metrics(rank(target, probability), 0.5)["auroc"], 0.95)
        return found.high - found.low

    alone = width(target, probability, patient)
    copied = np.repeat(target, 8), np.repeat(probability, 8)
    assert width(*copied, np.repeat(patient, 8).tolist()) == pytest.approx(alone, abs=1e-9)
    assert width(*copied, [str(i) for i in range(320)]) < 0.6 * alone


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    truth = NormalDist().cdf(1 / np.sqrt(2))
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(150):
        target, probability, patient = clustered(rng, patients=60, images=4, separation=1, shared=0.7)
        bootstrap = PatientBootstrap(patient, replicates=200, seed=0)
        found = interval(bootstrap.metrics(rank(target, probability), 0.5)["auroc"], 0.9)
        covered += found.low <= truth <= found.high
    # 90 % of 150 is 135, with a standard deviation of 3.7; percentile intervals of few patients cover a little less.
    assert 122 <= covered <= 145


def test_replicates_without_a_value_are_left_out_and_counted():
    patient = ["a", "b", "c", "d"]
    target, probability = np.array([1, 0, 0, 0]), np.array([0.9, 0.1, 0.2, 0.95])
    bootstrap = PatientBootstrap(patient, replicates=500, seed=0)
    replicate = bootstrap.metrics(rank(target, probability), 0.5)
    found = interval(replicate["auroc"], 0.95)
    # The one positive is not drawn with probability (3/4)^4, and drawn alone with (1/4)^4.
    assert found.undefined == int(np.isnan(replicate["auroc"]).sum())
    assert found.undefined / 500 == pytest.approx(0.75**4 + 0.25**4, abs=0.07)
    assert interval(replicate["specificity"], 0.95).undefined < 10


@pytest.mark.parametrize("patient", [["a", "a", "a"], ["a", "b", "c"]])
def test_a_single_patient_or_no_replicates_give_no_interval(patient):
    bootstrap = PatientBootstrap(patient, replicates=50 if len(set(patient)) == 1 else 0, seed=0)
    ranking = rank(np.array([1, 0, 0]), np.array([0.9, 0.5, 0.1]))
    replicate = bootstrap.metrics(ranking, 0.5)
    assert [interval(replicate[name], 0.95) for name in METRICS] == [None] * len(METRICS)
    curve = bootstrap.roc(ranking, 0.95)
    assert (curve.x_T.tolist(), len(curve.grid_G)) == ([0, 0, 0.5, 1], 0)


def test_the_curves_enclose_the_areas_that_the_metrics_state():
    target, probability, patient = clustered(np.random.default_rng(1), patients=50, images=4, separation=1, shared=0.3)
    ranking = rank(target, np.round(probability, 1))
    bootstrap = PatientBootstrap(patient, replicates=100, seed=0)
    value = scores(ranking, Threshold(0.5, "")).value
    roc, recall = bootstrap.roc(ranking, 0.95), bootstrap.precision_recall(ranking, 0.95)
    assert np.trapezoid(roc.y_T, roc.x_T) == pytest.approx(value["auroc"])
    assert np.diff(recall.x_T, prepend=0) @ recall.y_T == pytest.approx(value["average_precision"])
    assert recall.base_rate == target.mean()
    for curve in (roc, recall):
        assert (curve.low_G <= curve.high_G).all()
    inside = (roc.low_G <= np.interp(roc.grid_G, roc.x_T, roc.y_T)) & (
        np.interp(roc.grid_G, roc.x_T, roc.y_T) <= roc.high_G
    )
    assert inside[1:-1].all()


@pytest.mark.parametrize("target", [[0, 0, 0], [1, 1, 1], [-1, -1, -1]])
def test_one_class_has_no_curve(target):
    bootstrap = PatientBootstrap(["a", "b", "c"], replicates=10, seed=0)
    ranking = rank(np.array(target), np.array([0.1, 0.2, 0.3]))
    assert bootstrap.roc(ranking, 0.95) is None
    assert bootstrap.precision_recall(ranking, 0.95) is None


def test_a_thousand_replicates_of_four_thousand_images_take_no_more_than_two_seconds():
    target, probability, patient = clustered(np.random.default_rng(1), patients=1000, images=4, separation=1, shared=0)
    start_s = time.process_time()
    PatientBootstrap(patient, replicates=1000, seed=0).metrics(rank(target, probability), 0.5)
    assert time.process_time() - start_s < 2
