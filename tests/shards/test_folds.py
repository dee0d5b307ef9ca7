"""Folds: a partition by patient, stratified, by a seed or by the table; the test split stays out of it."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.errors import UserError
from shards.folds import Folds, fold_numbers, fold_of_patients, with_fold
from shards.manifest import Manifest, read_manifest
from tests.archives import LABELS, make_grouped_archive, pack_grouped

COMBINATIONS = st.lists(st.sampled_from([(), ("Mass",), ("Calc",), ("Calc", "Mass")]), min_size=2, max_size=80)


@pytest.fixture(scope="module")
def manifest(packed: Path) -> Manifest:
    return read_manifest(packed)


def cut(manifest: Manifest, folds: Folds, fold: int, seed: int = 0) -> Manifest:
    return with_fold(manifest, folds=folds, fold=fold, seed=seed, labels=LABELS)


def patients(manifest: Manifest, split: str) -> set[str]:
    return set(manifest.text("patient_id", manifest.rows(split)))


@given(combinations=COMBINATIONS, folds=st.integers(2, 7), seed=st.integers(0, 1000))
def test_every_combination_of_labels_is_spread_to_within_one_patient(
    combinations: list[tuple[str, ...]], folds: int, seed: int
) -> None:
    positives = {f"p{i}": labels for i, labels in enumerate(combinations)}
    fold_of = fold_of_patients(positives, folds, seed)
    assert set(fold_of) == set(positives)
    for combination in (None, *set(combinations)):
        chosen = [fold for patient, fold in fold_of.items() if combination in (None, positives[patient])]
        counts = [chosen.count(fold) for fold in range(folds)]
        assert max(counts) - min(counts) <= 1
    assert fold_of == fold_of_patients(dict(reversed(positives.items())), folds, seed)


@pytest.mark.parametrize("folds", [2, 5, "table"])
def test_folds_partition_the_patients_outside_test(manifest: Manifest, folds: Folds) -> None:
    views = [cut(manifest, folds, fold) for fold in fold_numbers(manifest, folds)]
    everyone = patients(manifest, "train") | patients(manifest, "val")
    validating = [patients(view, "val") for view in views]
    assert Counter(patient for part in validating for patient in part) == Counter(everyone)
    for view, part in zip(views, validating, strict=True):
        assert patients(view, "train") == everyone - part
        assert np.array_equal(view.rows("test"), manifest.rows("test"))
        row_N = np.concatenate([view.rows(split) for split in ("train", "val", "test")])
        assert sorted(row_N.tolist()) == list(range(len(manifest)))
        assert all(np.all(np.diff(view.rows(split)) > 0) for split in ("train", "val", "test"))


def test_folds_of_the_table_are_those_it_had(manifest: Manifest) -> None:
    assert fold_numbers(manifest, "table") == [0, 1, 2, 3]
    view = cut(manifest, "table", 2)
    assert {view.record(int(row)).fold for row in view.rows("val")} == {2}
    assert 2 not in {view.record(int(row)).fold for row in view.rows("train")}


def test_the_folds_depend_on_their_seed(manifest: Manifest) -> None:
    assert len({frozenset(patients(cut(manifest, 3, 0, seed), "val")) for seed in range(4)}) > 1
    assert patients(cut(manifest, 3, 0, 7), "val") == patients(cut(manifest, 3, 0, 7), "val")


def test_a_fold_has_a_fingerprint_of_its_own(manifest: Manifest) -> None:
    cuts = [cut(manifest, 3, fold) for fold in range(3)] + [cut(manifest, 3, 0, seed=1), cut(manifest, 4, 0)]
    prints = {view.fingerprint for view in cuts}
    assert len(prints) == 5
    assert manifest.fingerprint not in prints
    assert cut(manifest, 3, 0).fingerprint in prints


def test_legacy_folds_are_those_of_one_label_and_have_no_seed(manifest: Manifest) -> None:
    views = [
        with_fold(manifest, folds=5, fold=0, seed=seed, labels=(label,), rule="legacy")
        for label in LABELS
        for seed in (0, 1)
    ]
    validating = [patients(view, "val") for view in views]
    assert validating[0] == validating[1] != validating[2] == validating[3]
    assert all(3 <= len(part) <= 4 for part in validating)
    with pytest.raises(UserError, match=r"data.folds is 19, but only 18 patients"):
        with_fold(manifest, folds=19, fold=0, seed=0, labels=LABELS[:1], rule="legacy")


def test_a_decoding_process_gets_the_same_fold(manifest: Manifest) -> None:
    view = cut(manifest, 3, 1)
    other = pickle.loads(pickle.dumps(view))
    assert other.fingerprint == view.fingerprint
    assert all(np.array_equal(other.rows(split), view.rows(split)) for split in ("train", "val", "test"))


def test_more_folds_than_patients_are_refused(manifest: Manifest) -> None:
    cut(manifest, 18, 17)
    with pytest.raises(UserError, match=r"data.folds is 19, but only 18 patients .* Fix: give at most 18"):
        cut(manifest, 19, 0)


def test_a_fold_that_does_not_exist_is_refused(manifest: Manifest) -> None:
    with pytest.raises(UserError, match=r"in fold 4. Fix: choose from \[0, 1, 2, 3\]"):
        cut(manifest, "table", 4)


@pytest.mark.parametrize(
    ("fold", "said"), [("", "1 of 16 images outside the test split have no fold"), ("3", "is in folds 0 and 3")]
)
def test_folds_of_the_table_that_are_none_are_refused(tmp_path: Path, fold: str, said: str) -> None:
    archive = make_grouped_archive(tmp_path / "archive", exams=5, test_share=0.2)
    archive.rows[1]["fold"] = fold
    archive.write_table()
    pack_grouped(archive, tmp_path / "shards")
    with pytest.raises(UserError, match=said):
        fold_numbers(read_manifest(tmp_path / "shards"), "table")
