"""Cross-validation inside a packed folder: which patients validate in which fold.

N rows of the manifest, M rows outside the test split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from shards import samples
from shards.errors import UserError
from shards.manifest import Manifest
from shards.splits import draw
from shards.types import SPLITS

Folds = Literal["table"] | int
Rule = Literal["seeded", "legacy"]
_COLUMN: Final = "fold"


def with_fold(
    manifest: Manifest, *, folds: Folds, fold: int, seed: int, labels: Sequence[str], rule: Rule = "seeded"
) -> Manifest:
    """The folder with fold `fold` as its validation split; all other images outside test train, test stays.

    The fingerprint is that of the choice, so that a run of one fold cannot go on with another.

    Args:
        manifest: as it was packed; what it holds as train and val is cut anew.
        folds: their number, or "table" for those that the packed table had.
        fold: the one that validates.
        seed: of the folds; without effect on those of the table and of `legacy`.
        labels: what the folds are stratified by; one for `legacy`.
        rule: how a number of folds is drawn: `fold_of_patients`, or `published_folds` (legacy).

    Raises:
        UserError: more folds than patients; the table has no such fold, images without one, or a patient in two.
    """
    row_M = _development_rows(manifest)
    if folds == "table":
        fold_M = _folds_of_table(manifest, row_M)
    elif rule == "legacy":
        patient_M = _enough_patients(manifest, row_M, folds)
        fold_M = published_folds(patient_M, manifest.label_NK(labels)[row_M, 0] == 1, folds)
    else:
        fold_M = _seeded(manifest, row_M, folds, seed, labels)
    known = sorted(set(fold_M.tolist()))
    if fold not in known:
        raise UserError(f"no training image is in fold {fold}", fix=f"choose from {known}", file=manifest.place)
    rows = {"train": row_M[fold_M != fold], "val": row_M[fold_M == fold], "test": manifest.rows("test")}
    code_N = np.full(len(manifest), -1, np.int8)
    for code, split in enumerate(SPLITS):
        code_N[rows[split]] = code
    digest = hashlib.sha256(manifest.fingerprint.encode() + code_N.tobytes())
    return manifest.with_rows(rows, fingerprint=digest.hexdigest())


def fold_numbers(manifest: Manifest, folds: Folds) -> list[int]:
    """The folds there are, ascending.

    Raises:
        UserError: the packed table has none, or not for every image.
    """
    if folds != "table":
        return list(range(folds))
    return sorted(set(_folds_of_table(manifest, _development_rows(manifest)).tolist()))


def fold_of_patients(positives: Mapping[str, tuple[str, ...]], folds: int, seed: int) -> dict[str, int]:
    """A fold for every patient; every combination of positives is spread over the folds to within one patient.

    Patients are put in the order (combination, digest of seed and id) and dealt out like cards.

    Args:
        positives: the labels for which a patient is positive, sorted, by patient.
        folds: how many.
        seed: of the order.
    """
    ordered = sorted(positives, key=lambda patient: (positives[patient], draw(seed, "folds", patient)))
    return {patient: position % folds for position, patient in enumerate(ordered)}


def published_folds(patient_M: Sequence[str], positive_M: NDArray[np.bool_], folds: int) -> NDArray[np.int64]:
    """The folds of FPN-MIL's published code: scikit-learn's StratifiedGroupKFold, by patient and one label.

    The first of five is its validation split. It shuffles the images before, which changes no fold: only the patients'
    labels and the order of their ids count. Ids that are all whole numbers are ordered as such, as pandas reads them.

    Args:
        patient_M: of each image.
        positive_M: whether the image is positive; unknown is negative there.
        folds: how many.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    numbers = all(patient.isdecimal() for patient in patient_M)
    group_M = np.array([int(patient) for patient in patient_M] if numbers else patient_M)
    fold_M = np.zeros(len(group_M), np.int64)
    splits = StratifiedGroupKFold(folds).split(fold_M, positive_M, group_M)
    for fold, (_, validating) in enumerate(splits):
        fold_M[validating] = fold
    return fold_M


def _development_rows(manifest: Manifest) -> NDArray[np.int64]:
    return np.sort(np.concatenate([manifest.rows("train"), manifest.rows("val")]))


def _seeded(
    manifest: Manifest, row_M: NDArray[np.int64], folds: int, seed: int, labels: Sequence[str]
) -> NDArray[np.int64]:
    patient_M = _enough_patients(manifest, row_M, folds)
    found: dict[str, set[str]] = {}
    for patient, label_K in zip(patient_M, manifest.label_NK(labels)[row_M].tolist(), strict=True):
        positive = (label for label, value in zip(labels, label_K, strict=True) if value == 1)
        found.setdefault(patient, set()).update(positive)
    fold_of = fold_of_patients({patient: tuple(sorted(names)) for patient, names in found.items()}, folds, seed)
    return np.array([fold_of[patient] for patient in patient_M], np.int64)


def _enough_patients(manifest: Manifest, row_M: NDArray[np.int64], folds: int) -> Sequence[str]:
    """The patients of these rows, of whom there are at least as many as folds."""
    patient_M: Sequence[str] = manifest.text("patient_id", row_M)
    if (patients := len(set(patient_M))) < folds:
        thing = f"data.folds is {folds}, but only {patients} patients are outside the test split"
        raise UserError(thing, fix=f"give at most {patients}", file=manifest.place)
    return patient_M


def _folds_of_table(manifest: Manifest, row_M: NDArray[np.int64]) -> NDArray[np.int64]:
    fold_M = samples.fixed(manifest.table, _COLUMN)[row_M].astype(np.int64)
    missing = int((fold_M < 0).sum())
    if missing:
        thing = f"data.folds is table, but {missing} of {len(row_M)} images outside the test split have no fold"
        fix = "pack a table that has a fold for each of them, or give data.folds a number"
        raise UserError(thing, fix=fix, file=manifest.place)
    fold_of: dict[str, int] = {}
    patient_M, image_M = manifest.text("patient_id", row_M), manifest.text("image_id", row_M)
    for patient, image, fold in zip(patient_M, image_M, fold_M.tolist(), strict=True):
        if fold_of.setdefault(patient, fold) != fold:
            thing = f"the patient of image {image} is in folds {fold_of[patient]} and {fold}"
            fix = "give all images of a patient the same fold and pack again, or give data.folds a number"
            raise UserError(thing, fix=fix, file=manifest.place)
    return fold_M
