"""The results of a split: the form of metrics/<split>.json, where thresholds come from, and the table."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from sklearn import metrics as sk

from msmil.evaluation.bootstrap import PatientBootstrap, interval
from msmil.evaluation.classification import METRICS, choose_threshold, rank
from msmil.evaluation.results import classification_results, columns, results_table
from msmil.types import Prediction
from shards.errors import UserError

LABELS = ("Mass", "Suspicious_Calcification")
SCALES = (8, 16)
OPTIONS = {"replicates": 50, "confidence": 0.95, "seed": 3}


def predictions(seed, *, patients=20, deep=True, unknown=0.1):
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(4 * patients):
        target = {label: int(rng.choice([1, 0, -1], p=[0.3, 0.7 - unknown, unknown])) for label in LABELS}
        score = {label: 1 / (1 + math.exp(-rng.normal() - 2 * max(target[label], 0) + 1)) for label in LABELS}
        by_scale = {(scale, label): float(rng.random()) for scale in SCALES for label in LABELS} if deep else {}
        rows.append(Prediction(f"i{number}", f"e{number // 4}", f"p{number // 4}", target, score, by_scale, {}))
    return rows


def results(test, validation, **options):
    return classification_results(test, validation, LABELS, SCALES, **(OPTIONS | options))


def with_target(rows, label, target):
    return [dataclasses.replace(row, target=row.target | {label: target}) for row in rows]


def test_the_form_is_the_documented_one():
    found = results(predictions(0), predictions(1))
    branch = {name for metric in METRICS for name in (metric, f"{metric}_ci")}
    branch |= {"threshold", "undefined", "undefined_replicates"}
    assert list(found["labels"]) == list(LABELS)
    for label in LABELS:
        merged = found["labels"][label]
        assert set(merged) == branch | {"positives", "images", "patients", "calibration", "scales"}
        assert [set(merged["scales"][str(scale)]) for scale in SCALES] == [branch, branch]
        assert merged["auroc_ci"][0] <= merged["auroc"] <= merged["auroc_ci"][1]
    assert found["mean_auroc"] == pytest.approx(np.mean([found["labels"][label]["auroc"] for label in LABELS]))
    assert found["mean_auroc_ci"][0] < found["mean_auroc"] < found["mean_auroc_ci"][1]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_numbers_are_those_of_the_images_with_a_known_label():
    test, validation = predictions(0), predictions(1)
    found = results(test, validation)["labels"]["Mass"]
    known = [row for row in test if row.target["Mass"] >= 0]
    target = [row.target["Mass"] for row in known]
    assert (found["images"], found["positives"]) == (len(known), sum(target))
    assert found["patients"] == len({row.patient_id for row in known})
    assert found["auroc"] == pytest.approx(sk.roc_auc_score(target, [row.probability["Mass"] for row in known]))
    side = [row.scale_probability[16, "Mass"] for row in known]
    assert found["scales"]["16"]["average_precision"] == pytest.approx(sk.average_precision_score(target, side))
    bootstrap = PatientBootstrap([row.patient_id for row in test], replicates=50, seed=3)
    ours = interval(bootstrap.metrics(rank(*columns(test, "Mass", 16)), None)["auroc"], 0.95)
    assert found["scales"]["16"]["auroc_ci"] == [ours.low, ours.high]


@pytest.mark.parametrize("scale", [None, *SCALES])
@pytest.mark.parametrize("label", LABELS)
def test_every_branch_has_its_threshold_from_validation_alone(label, scale):
    validation = predictions(1)
    chosen = choose_threshold(*columns(validation, label, scale)).value
    for seed in (0, 5):
        found = results(predictions(seed), validation)["labels"][label]
        assert (found if scale is None else found["scales"][str(scale)])["threshold"] == chosen


def test_without_deep_supervision_there_are_no_scale_branches():
    found = results(predictions(0, deep=False), predictions(1, deep=False))
    assert [found["labels"][label]["scales"] for label in LABELS] == [{}, {}]


@pytest.mark.filterwarnings("error")
def test_a_label_without_positives_is_null_with_a_reason_and_left_out_of_the_mean():
    test = with_target(predictions(0), "Mass", 0)
    found = results(test, predictions(1))
    mass = found["labels"]["Mass"]
    assert (mass["auroc"], mass["auroc_ci"], mass["f1"]) == (None, None, None)
    assert mass["undefined"]["auroc"] == "no positive image"
    assert mass["specificity"] is not None
    assert found["mean_auroc"] == found["labels"]["Suspicious_Calcification"]["auroc"]
    json.dumps(found, allow_nan=False)
    assert "no auroc: no positive image" in results_table(found, None)


@pytest.mark.parametrize("target", [0, 1, -1])
def test_validation_with_one_class_gives_no_threshold_and_says_so(target):
    found = results(predictions(0), with_target(predictions(1), "Mass", target))["labels"]["Mass"]
    assert found["threshold"] is None
    assert found["auroc"] is not None
    assert found["f1"] is None
    assert found["undefined"]["f1"].startswith("no threshold: no ")


def test_labels_that_are_all_unknown_leave_no_mean():
    test = with_target(with_target(predictions(0), "Mass", -1), "Suspicious_Calcification", -1)
    found = results(test, predictions(1))
    assert (found["mean_auroc"], found["mean_auroc_ci"]) == (None, None)
    assert found["labels"]["Mass"]["undefined"]["auroc"] == "no image with a known label"
    results_table(found, None)


@pytest.mark.parametrize(("patients", "replicates"), [(1, 50), (20, 0)])
def test_a_single_patient_or_no_replicates_leave_intervals_null(patients, replicates):
    found = results(predictions(4, patients=patients, unknown=0), predictions(1), replicates=replicates)
    assert [found["labels"]["Mass"][f"{metric}_ci"] for metric in METRICS] == [None] * len(METRICS)
    assert found["intervals"]["replicates"] == 0
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("which", ["test", "validation"])
def test_nan_is_refused_with_the_image_named(which):
    sets = {"test": predictions(0), "validation": predictions(1)}
    row = sets[which][5]
    sets[which][5] = dataclasses.replace(row, probability=row.probability | {"Mass": math.nan})
    with pytest.raises(UserError, match="image i5 has nan for Mass"):
        results(**sets)


def test_the_table_aligns_and_shows_the_numbers():
    found = results(predictions(0), predictions(1))
    peak = {"images": 30, "hits": 24, "rate": 0.8, "chance": 0.04, "ratio": 20.0}
    none = {"images": 0, "hits": 0, "rate": None, "chance": None, "ratio": None}
    text = results_table(found, {"Mass": {"merged": peak, "attention_8": none}})
    lines = text.splitlines()
    assert max(map(len, lines)) <= 120
    merged = next(line for line in lines if line.startswith("  all scales"))
    low, high = found["labels"]["Mass"]["auroc_ci"]
    assert f"{found['labels']['Mass']['auroc']:.3f} [{low:.3f}, {high:.3f}]" in merged
    head = next(line for line in lines if "AUROC" in line)
    assert len(head) == len(merged)
    rows = [" ".join(line.split()) for line in lines]
    assert rows[-2:] == ["Mass merged 30 24 0.800 0.040 20.0", "Mass attention_8 0 0 - - -"]
