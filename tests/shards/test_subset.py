"""A share of the training patients: whole patients, nested, alike in labels, with a fingerprint of its own."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.folds import with_fold
from shards.manifest import Manifest, read_manifest
from shards.subset import patient_share, with_fraction
from tests.archives import LABELS


@pytest.fixture(scope="module")
def manifest(packed: Path) -> Manifest:
    return read_manifest(packed)


def share(manifest: Manifest, fraction: float, seed: int = 0) -> Manifest:
    return with_fraction(manifest, fraction=fraction, seed=seed, labels=LABELS)


def patients(manifest: Manifest, split: str = "train") -> set[str]:
    return set(manifest.text("patient_id", manifest.rows(split)))


@given(
    kinds=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    fractions=st.lists(st.floats(0.01, 1), min_size=2, max_size=4),
    seed=st.integers(0, 1000),
)
def test_smaller_shares_lie_in_larger_ones_and_hold_each_combination_to_within_one_patient(
    kinds: list[int], fractions: list[float], seed: int
) -> None:
    positive_PK = np.array([(kind % 2, kind // 2) for kind in kinds], bool)
    names = [f"p{i}" for i in range(len(kinds))]
    larger = np.ones(len(kinds), bool)
    for fraction in sorted(fractions, reverse=True):
        chosen_P = patient_share(names, positive_PK, fraction, seed)
        assert not (chosen_P & ~larger).any()
        for kind in set(kinds):
            of_kind = np.array(kinds) == kind
            assert abs(chosen_P[of_kind].sum() - fraction * of_kind.sum()) < 1
        larger = chosen_P
    backwards = patient_share(names[::-1], positive_PK[::-1], fraction, seed)
    assert backwards[::-1].tolist() == chosen_P.tolist()


def test_all_images_of_a_patient_train_or_none(manifest: Manifest) -> None:
    half = share(manifest, 0.5)
    assert 0.3 < len(patients(half)) / len(patients(manifest)) < 0.7
    everyone = manifest.text("patient_id", manifest.rows("train"))
    assert len(half.rows("train")) == sum(patient in patients(half) for patient in everyone)
    assert (np.diff(half.rows("train")) > 0).all()


def test_validation_and_test_stay(manifest: Manifest) -> None:
    for split in ("val", "test"):
        np.testing.assert_array_equal(share(manifest, 0.3).rows(split), manifest.rows(split))


def test_it_is_a_share_of_the_patients_who_train_in_a_fold(manifest: Manifest) -> None:
    fold = with_fold(manifest, folds=3, fold=1, seed=0, labels=LABELS)
    part = share(fold, 0.4)
    assert patients(part) < patients(fold)
    assert patients(part, "val") == patients(fold, "val")


def test_each_share_has_a_fingerprint_of_its_own(manifest: Manifest) -> None:
    shares = [share(manifest, 0.5), share(manifest, 0.25), share(manifest, 0.5, seed=1), manifest]
    assert len({part.fingerprint for part in shares}) == 4
    assert share(manifest, 0.5).fingerprint == shares[0].fingerprint
    assert share(manifest, 1.0) is manifest


def test_another_process_gets_the_same_share(manifest: Manifest) -> None:
    half = share(manifest, 0.5)
    other = pickle.loads(pickle.dumps(half))
    assert other.fingerprint == half.fingerprint
    np.testing.assert_array_equal(other.rows("train"), half.rows("train"))
    assert half.packed().fingerprint == manifest.fingerprint
