"""Which patients validate: taken out of training, patient by patient, alike in labels, by a seed or by a fold.

Draws are SHA-256 digests of (seed, id): the same on every machine, with every library, in any order of the table.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from shards.errors import UserError
from shards.sources.base import SourceRow
from shards.types import Split

DEFAULT_FRACTION: Final = 0.15


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """How validation is chosen: a share of the training patients, or one fold of the table.

    With neither, the table's own validation rows are kept, and where it has none DEFAULT_FRACTION is taken.
    """

    fraction: float | None = None
    fold: int | None = None

    def __post_init__(self) -> None:
        if self.fraction is not None and self.fold is not None:
            raise UserError("both a validation fraction and a validation fold", fix="give one of them")
        if self.fraction is not None and not 0 <= self.fraction < 1:
            raise UserError(f"a validation fraction of {self.fraction}", fix="give a number in 0 <= x < 1")


def assign_validation(
    rows: Sequence[SourceRow], validation: Validation, *, labels: Sequence[str], seed: int, file: Path
) -> list[SourceRow]:
    """The rows with `val` in the split of those that validate.

    Args:
        rows: all images of the archive.
        validation: how to choose.
        labels: what the choice is stratified by: patients with the same combination of positives share it evenly.
        seed: of the choice.
        file: the table, for messages.

    Raises:
        UserError: the table has validation rows and others were asked for, the fold does not exist, or a patient would
            be in two splits.
    """
    has_own = any(row.split == "val" for row in rows)
    asked = validation.fraction is not None or validation.fold is not None
    if has_own and asked:
        fix = "leave out --validation-fraction and --validation-fold, or mark those rows as training"
        raise UserError("the table marks validation images itself", fix=fix, file=file)
    if has_own:
        chosen = list(rows)
    elif validation.fold is not None:
        chosen = _by_fold(rows, validation.fold, file)
    else:
        fraction = DEFAULT_FRACTION if validation.fraction is None else validation.fraction
        check_patients(rows, file)
        patients = choose_patients(_positives(rows, labels), fraction, seed)
        chosen = [_moved(row, row.patient_id in patients) for row in rows]
    check_patients(chosen, file)
    return chosen


def choose_patients(positives: Mapping[str, tuple[str, ...]], fraction: float, seed: int) -> set[str]:
    """A share of patients in which every combination of positives has its share, to within one patient.

    Patients are put in the order (combination, digest of seed and id) and taken at even steps from a random start.

    Args:
        positives: the labels for which a patient is positive, sorted, by patient.
        fraction: the share to take.
        seed: of the choice.
    """
    ordered = sorted(positives, key=lambda patient: (positives[patient], draw(seed, "validation", patient)))
    start = int.from_bytes(draw(seed, "start", "")[:6], "big") / 2**48
    steps = [int(start + fraction * i) for i in range(len(ordered) + 1)]
    return {patient for i, patient in enumerate(ordered) if steps[i + 1] > steps[i]}


def draw(seed: int, purpose: str, name: str) -> bytes:
    """A random-looking digest that depends on nothing but its arguments."""
    return hashlib.sha256(f"{seed}\0{purpose}\0{name}".encode()).digest()


def check_patients(rows: Sequence[SourceRow], file: Path) -> None:
    """Refuse a patient who is in two splits (what is tested must not have been trained on) and an exam of two."""
    split_of: dict[str, Split] = {}
    patient_of: dict[str, str] = {}
    for row in rows:
        split = split_of.setdefault(row.patient_id, row.split)
        if split != row.split:
            thing = f"the patient of image {row.image_id} is in two splits: {split} and {row.split}"
            raise UserError(thing, fix="give all images of a patient the same split and fold", file=file)
        patient = patient_of.setdefault(row.exam_id, row.patient_id)
        if patient != row.patient_id:
            thing = f"exam {row.exam_id} is of two patients: {patient} and {row.patient_id} (image {row.image_id})"
            raise UserError(thing, fix="give every exam an id of its own", file=file)


def _positives(rows: Sequence[SourceRow], labels: Sequence[str]) -> dict[str, tuple[str, ...]]:
    found: dict[str, set[str]] = {}
    for row in rows:
        if row.split == "train":
            found.setdefault(row.patient_id, set()).update(label for label in labels if row.labels[label] == 1)
    return {patient: tuple(sorted(names)) for patient, names in found.items()}


def _by_fold(rows: Sequence[SourceRow], fold: int, file: Path) -> list[SourceRow]:
    folds = sorted({row.fold for row in rows if row.split == "train" and row.fold >= 0})
    if fold not in folds:
        fix = f"choose from {folds}" if folds else "add a column fold, or use --validation-fraction"
        raise UserError(f"no training image is in fold {fold}", fix=fix, file=file)
    return [_moved(row, row.fold == fold) for row in rows]


def _moved(row: SourceRow, validates: bool) -> SourceRow:
    return replace(row, split="val") if validates and row.split == "train" else row
