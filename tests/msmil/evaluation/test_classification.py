"""Metrics of one label: equal to scikit-learn's, exact under ties, None where undefined."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from msmil.evaluation.classification import (
    AT_THRESHOLD,
    METRICS,
    Threshold,
    choose_threshold,
    confusion,
    rank,
    scores,
    weighted_metrics,
)

NO_THRESHOLD = Threshold(None, "none was chosen")


@st.composite
def weighted_images(draw):
    """Images with ties and with weights of 0, at least one positive and one negative of weight 1."""
    images = draw(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 6), st.integers(0, 3)), min_size=0, max_size=40))
    images += [(1, draw(st.integers(0, 6)), 1), (0, draw(st.integers(0, 6)), 1)]
    target, level, weight = (np.array(column) for column in zip(*images, strict=True))
    return target, level / 6, weight


def sklearn_metrics(target, probability, weight, threshold):
    called = (probability >= threshold).astype(int)
    options = {"sample_weight": weight, "zero_division": 0}
    sensitivity = sk.recall_score(target, called, **options)
    specificity = sk.recall_score(target, called, pos_label=0, **options)
    return {
        "auroc": sk.roc_auc_score(target, probability, sample_weight=weight),
        "average_precision": sk.average_precision_score(target, probability, sample_weight=weight),
        "f1": sk.f1_score(target, called, **options),
        "balanced_accuracy": (sensitivity + specificity) / 2,
        "sensitivity": sensitivity,
        "specificity": specificity,
    }


@given(weighted_images(), st.integers(0, 12))
def test_every_metric_equals_scikit_learn_for_any_weights_and_ties(images, step):
    target, probability, weight = images
    threshold = step / 12
    ranking = rank(target, probability)
    ours = weighted_metrics(ranking, weight[None, ranking.order_M], threshold)
    expected = sklearn_metrics(target, probability, weight, threshold)
    assert {name: float(ours[name][0]) for name in METRICS} == pytest.approx(expected, abs=1e-12)


@given(weighted_images())
def test_replicates_computed_together_equal_replicates_computed_alone(images):
    target, probability, weight = images
    ranking = rank(target, probability)
    weight_RM = np.stack([weight, np.ones_like(weight), weight[::-1]])
    together = weighted_metrics(ranking, weight_RM, 0.5)
    for r in range(3):
        alone = weighted_metrics(ranking, weight_RM[r : r + 1], 0.5)
        for name in METRICS:
            np.testing.assert_array_equal(together[name][r], alone[name][0])


def test_unknown_labels_are_left_out():
    target, probability = np.array([1, 0, 1, 0]), np.array([0.9, 0.4, 0.3, 0.2])
    with_unknown = np.concatenate([target, [-1, -1]]), np.concatenate([probability, [1.0, 0.0]])
    threshold = Threshold(0.35, "")
    assert scores(rank(*with_unknown), threshold) == scores(rank(target, probability), threshold)


@pytest.mark.parametrize(
    ("target", "undefined", "reason"),
    [
        ([0, 0, 0], ["auroc", "average_precision", "f1", "balanced_accuracy", "sensitivity"], "no positive image"),
        ([1, 1, 1], ["auroc", "average_precision", "f1", "balanced_accuracy", "specificity"], "no negative image"),
        ([-1, -1, -1], list(METRICS), "no image with a known label"),
        ([1, 0, -1], [], ""),
    ],
)
@pytest.mark.filterwarnings("error")
def test_a_metric_without_its_class_is_none_with_a_reason(target, undefined, reason):
    found = scores(rank(np.array(target), np.array([0.2, 0.7, 0.5])), Threshold(0.5, ""))
    assert [name for name in METRICS if found.value[name] is None] == undefined
    assert found.undefined == dict.fromkeys(undefined, reason)
    assert all(0 <= value <= 1 for value in found.value.values() if value is not None)


def test_without_a_threshold_the_ranking_metrics_remain():
    found = scores(rank(np.array([1, 0]), np.array([0.6, 0.4])), NO_THRESHOLD)
    assert found.value["auroc"] == found.value["average_precision"] == 1
    assert found.undefined == dict.fromkeys(AT_THRESHOLD, "none was chosen")


def test_a_threshold_above_all_images_gives_an_f1_of_zero():
    found = scores(rank(np.array([1, 0]), np.array([0.6, 0.4])), Threshold(0.9, ""))
    assert (found.value["f1"], found.value["sensitivity"], found.value["specificity"]) == (0, 0, 1)


@settings(max_examples=50)
@given(weighted_images())
def test_no_threshold_has_a_higher_balanced_accuracy_than_the_chosen_one(images):
    target, probability, _ = images
    ranking = rank(target, probability)
    chosen = choose_threshold(target, probability)
    accuracy = scores(ranking, chosen).value["balanced_accuracy"]
    others = {t: scores(ranking, Threshold(t, "")).value["balanced_accuracy"] for t in np.linspace(0, 1, 25)}
    assert accuracy >= max(others.values()) - 1e-12
    # Among equals it has the highest sensitivity.
    best = [t for t, value in others.items() if value > accuracy - 1e-12]
    most = max((scores(ranking, Threshold(t, "")).value["sensitivity"] for t in best), default=0)
    assert scores(ranking, chosen).value["sensitivity"] >= most - 1e-12


@given(weighted_images(), st.randoms())
def test_the_threshold_does_not_depend_on_the_order_of_images(images, random):
    target, probability, _ = images
    order = list(range(len(target)))
    random.shuffle(order)
    assert choose_threshold(target[order], probability[order]) == choose_threshold(target, probability)


@pytest.mark.parametrize(
    ("target", "probability", "expected"),
    [
        ([0, 0, 1, 1], [0.1, 0.3, 0.7, 0.9], 0.5),  # half-way between the classes
        ([0, 1], [0.5, 0.5], 0.5),  # all tied: all positive
        ([1, 0], [0.2, 0.8], 0.2),  # worse than chance: all positive
        ([1, 0, 1, 0], [0.875, 0.625, 0.375, 0.125], 0.25),  # 0.75 is as good and less sensitive
        ([0, 1], [0.5, math.nextafter(0.5, 1)], math.nextafter(0.5, 1)),  # no number in between
        ([0, 1], [0.0, 5e-324], 5e-324),
    ],
)
def test_where_the_threshold_lies(target, probability, expected):
    assert choose_threshold(np.array(target), np.array(probability)) == Threshold(expected, "")


@pytest.mark.parametrize("target", [[0, 0], [1, 1], [-1, -1], []])
def test_one_class_gives_no_threshold_but_a_reason(target):
    chosen = choose_threshold(np.array(target), np.full(len(target), 0.5))
    assert chosen.value is None
    assert chosen.reason.startswith("no threshold: no ")


def test_confusion_counts_images_at_and_above_the_threshold():
    target, probability = np.array([0, 0, 0, 1, 1, -1]), np.array([0.1, 0.5, 0.9, 0.5, 0.4, 0.9])
    assert confusion(target, probability, 0.5).tolist() == [[1, 2], [1, 1]]


@pytest.mark.parametrize(
    ("target", "probability", "word"),
    [
        ([0, 1], [0.5, math.nan], "image number 1"),
        ([0, 1], [1.5, 0.5], "image number 0"),
        ([0, 2], [0.5, 0.5], "not among"),
        ([0, 1], [0.5], "one per image"),
    ],
)
def test_what_is_no_probability_or_label_is_refused(target, probability, word):
    with pytest.raises(ValueError, match=word):
        rank(np.array(target), np.array(probability))
