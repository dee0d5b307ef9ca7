"""The table of predictions: written whole, read back exactly, and refused with a word on what is wrong."""

from __future__ import annotations

import dataclasses
import math
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from msmil.evaluation.predictions import read_predictions, write_predictions
from msmil.types import Prediction
from shards.errors import UserError

LABELS = ("Mass", "Suspicious_Calcification")
SCALES = (8, 16)
KEYS = [(scale, label) for scale in SCALES for label in LABELS]


def prediction(number=0, **changes):
    whole = Prediction(
        image_id=f"image{number}",
        exam_id="exam",
        patient_id="patient, with a comma",
        target={"Mass": 1, "Suspicious_Calcification": -1},
        probability={"Mass": 0.1 + 0.2, "Suspicious_Calcification": 1e-17},
        scale_probability=dict.fromkeys(KEYS, 0.25),
        scale_weight=dict.fromkeys(KEYS, 0.5),
    )
    return dataclasses.replace(whole, **changes)


probabilities = st.floats(0, 1)
by_key = st.fixed_dictionaries(dict.fromkeys(KEYS, probabilities))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(
    target=st.fixed_dictionaries({label: st.sampled_from([1, 0, -1]) for label in LABELS}),
    probability=st.fixed_dictionaries(dict.fromkeys(LABELS, probabilities)),
    scale_probability=st.one_of(st.just({}), by_key),
    scale_weight=st.one_of(st.just({}), by_key),
)
def test_what_was_written_is_read_back_exactly(tmp_path, **values):
    path = tmp_path / "predictions" / "test.csv"
    written = [prediction(0, **values), prediction(1, **values)]
    write_predictions(path, written, LABELS, SCALES)
    assert read_predictions(path) == written


def test_the_columns_are_the_documented_ones(tmp_path):
    path = tmp_path / "test.csv"
    write_predictions(path, [prediction(scale_weight={})], ["Mass", "Suspicious_Calcification"], SCALES)
    assert path.read_text().splitlines()[0] == (
        "image_id,exam_id,patient_id,target_Mass,target_Suspicious_Calcification,"
        "probability_Mass,probability_Suspicious_Calcification,"
        "probability_Mass_scale8,probability_Suspicious_Calcification_scale8,"
        "probability_Mass_scale16,probability_Suspicious_Calcification_scale16"
    )


@pytest.mark.parametrize("where", ["probability", "scale_probability", "scale_weight"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1, 1.1])
def test_a_number_outside_0_to_1_is_refused_with_the_image_named(tmp_path, where, value):
    good = prediction(0)
    bad = prediction(7, **{where: getattr(good, where) | {next(iter(getattr(good, where))): value}})
    with pytest.raises(UserError, match=f"image7 has {value!r} for Mass"):
        write_predictions(tmp_path / "test.csv", [good, bad], LABELS, SCALES)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("rows", "word"),
    [
        ([prediction(3), prediction(3)], "image3 comes twice"),
        ([], "no predictions"),
        ([prediction(0), prediction(5, probability={"Mass": 0.5})], "image5 has a probability for"),
        ([prediction(0), prediction(5, target={"Mass": 1})], "image5 has a target for"),
        ([prediction(0), prediction(5, scale_probability={})], "image5 has a scale probability for"),
        ([prediction(0), prediction(5, scale_weight={})], "image5 has a scale weight for"),
        ([prediction(6, target={"Mass": 2, "Suspicious_Calcification": 0})], "image6 has target 2 for Mass"),
    ],
)
def test_rows_that_do_not_fit_together_are_refused(tmp_path, rows, word):
    with pytest.raises(UserError, match=word):
        write_predictions(tmp_path / "test.csv", rows, LABELS, SCALES)


def test_labels_whose_columns_would_have_one_name_are_refused(tmp_path):
    labels = ["A", "A_scale8"]
    values = dict.fromkeys(labels, 0.5)
    keys = dict.fromkeys([(scale, label) for scale in SCALES for label in labels], 0.5)
    rows = [
        prediction(target=dict.fromkeys(labels, 1), probability=values, scale_probability=keys, scale_weight={}),
    ]
    with pytest.raises(UserError, match="probability_A_scale8"):
        write_predictions(tmp_path / "test.csv", rows, labels, SCALES)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda text: "", "missing"),
        (lambda text: text.replace("probability_Mass,", "probability_mass,"), "missing.*probability_Mass"),
        (lambda text: text.replace("weight_Mass_scale8", "colour"), "unknown.*colour"),
        (lambda text: text.replace("target_", "truth_"), "no column target_"),
        (lambda text: text[: text.rindex(",")], "line 3 has 14 fields instead of 15"),
        (lambda text: text.replace("0.25", "a quarter", 1), "line 2.*'a quarter'.*no number"),
        (lambda text: text.replace("0.25", "nan", 1), "image0 has nan"),
        (lambda text: text.replace("image1", "image0"), "image0 comes twice"),
        (lambda text: text.splitlines()[0] + "\n", "no predictions"),
        (lambda text: "\udcff" + text, "no UTF-8"),
    ],
)
def test_a_broken_file_is_refused_with_its_name_and_the_fault(tmp_path, change, word):
    path = tmp_path / "test.csv"
    write_predictions(path, [prediction(0), prediction(1)], LABELS, SCALES)
    path.write_bytes(change(path.read_text()).encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=word) as caught:
        read_predictions(path)
    assert caught.value.file == str(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_predictions(tmp_path / "absent.csv")


def test_a_write_that_fails_leaves_the_old_table_whole(tmp_path, monkeypatch):
    path = tmp_path / "test.csv"
    write_predictions(path, [prediction(0)], LABELS, SCALES)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError) as caught:
        write_predictions(path, [prediction(1)], LABELS, SCALES)
    assert caught.value.file == str(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_reported(tmp_path):
    (tmp_path / "predictions").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cannot be written"):
        write_predictions(tmp_path / "predictions" / "test.csv", [prediction(0)], LABELS, SCALES)
