"""Validation: whole patients, evenly over combinations of labels, by a seed or by a fold."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.errors import UserError
from shards.sources.base import SourceRow
from shards.splits import Validation, assign_validation, choose_patients
from shards.types import Split

TABLE = Path("table.csv")
LABELS = ("Mass", "Calc")


def image(
    patient: int, number: int = 0, *, split: Split = "train", fold: int = -1, exam: str = "", labels: str = ""
) -> SourceRow:
    return SourceRow(
        image_path=Path("x.png"),
        image_id=f"{patient}-{number}",
        exam_id=exam or f"e{patient}",
        patient_id=f"p{patient}",
        laterality="L",
        view="CC",
        split=split,
        fold=fold,
        labels={label: int(label in labels.split()) for label in LABELS},
        boxes=(),
        manufacturer="",
        density="",
        birads="",
    )


def archive(patients: int = 60) -> list[SourceRow]:
    """Two images per patient; a third with a mass, a fifth with calcifications, the last tenth tests."""
    rows = []
    for p in range(patients):
        labels = " ".join(["Mass"] * (p % 3 == 0) + ["Calc"] * (p % 5 == 0))
        split: Split = "test" if p >= 0.9 * patients else "train"
        rows += [image(p, 0, split=split, fold=p % 4, labels=labels), image(p, 1, split=split, fold=p % 4)]
    return rows


def assign(rows: list[SourceRow], *, seed: int = 0, **options: object) -> list[SourceRow]:
    return assign_validation(rows, Validation(**options), labels=LABELS, seed=seed, file=TABLE)


def validating(rows: list[SourceRow]) -> set[str]:
    return {row.patient_id for row in rows if row.split == "val"}


def test_by_default_15_percent_of_the_training_patients_validate() -> None:
    rows = assign(archive(100))
    assert len(validating(rows)) in (13, 14)
    assert Counter(row.split for row in rows)["test"] == 20, "test images stay where they were"


def test_patients_stay_whole_and_rows_stay_in_order() -> None:
    before = archive()
    after = assign(before, fraction=0.3)
    assert [row.image_id for row in after] == [row.image_id for row in before]
    for patient in validating(after):
        assert {row.split for row in after if row.patient_id == patient} == {"val"}


@given(
    combinations=st.lists(st.sampled_from([(), ("Mass",), ("Calc",), ("Calc", "Mass")]), max_size=80),
    fraction=st.floats(0, 0.99),
    seed=st.integers(0, 1000),
)
def test_every_combination_of_labels_has_its_share_to_within_one_patient(
    combinations: list[tuple[str, ...]], fraction: float, seed: int
) -> None:
    positives = {f"p{i}": labels for i, labels in enumerate(combinations)}
    chosen = choose_patients(positives, fraction, seed)
    assert chosen <= set(positives)
    assert abs(len(chosen) - fraction * len(positives)) < 1
    for combination, count in Counter(combinations).items():
        taken = sum(positives[patient] == combination for patient in chosen)
        assert abs(taken - fraction * count) < 1 + 1e-9


def test_the_choice_depends_on_the_seed_and_on_nothing_else() -> None:
    rows = archive()
    assert validating(assign(rows)) == validating(assign(rows[::-1]))
    assert len({frozenset(validating(assign(rows, seed=seed))) for seed in range(5)}) == 5


def test_a_fraction_of_zero_leaves_no_validation() -> None:
    assert validating(assign(archive(), fraction=0)) == set()


def test_a_fold_validates() -> None:
    rows = assign(archive(), fold=2)
    assert {row.fold for row in rows if row.split == "val"} == {2}
    assert 2 not in {row.fold for row in rows if row.split == "train"}


def test_validation_rows_of_the_table_are_kept() -> None:
    rows = [image(0), image(1, split="val"), image(2, split="test")]
    assert assign(rows) == rows
    with pytest.raises(UserError, match="marks validation images itself"):
        assign(rows, fraction=0.1)
    with pytest.raises(UserError, match="marks validation images itself"):
        assign(rows, fold=1)


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        ([image(0), image(0, 1, split="test")], {}, "the patient of image 0-1 is in two splits: train and test"),
        (
            [image(0, fold=0), image(0, 1, fold=1)],
            {"fold": 1},
            "the patient of image 0-1 is in two splits: train and val",
        ),
        ([image(0, split="val"), image(0, 1)], {}, "the patient of image 0-1 is in two splits: val and train"),
        ([image(0, exam="e"), image(1, exam="e")], {}, "exam e is of two patients: p0 and p1"),
        ([image(0, fold=0), image(1, fold=1)], {"fold": 7}, r"in fold 7. Fix: choose from \[0, 1\]"),
        ([image(0)], {"fold": 0}, "in fold 0. Fix: add a column fold"),
        ([image(0)], {"fold": 0, "fraction": 0.1}, "both a validation fraction and a validation fold"),
        ([image(0)], {"fraction": 1.0}, "a validation fraction of 1.0"),
    ],
)
def test_what_is_refused(rows: list[SourceRow], options: dict[str, float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        assign(rows, **options)
