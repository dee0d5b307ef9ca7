"""Sources: what users downloaded becomes rows, and every error names file, row, column, value and fix."""

from __future__ import annotations

import builtins
import errno
import json
from pathlib import Path
from typing import Any

import pytest

from shards.errors import UserError
from shards.sources.base import BOXES_LEFT_OUT, BOXES_SWAPPED, Archive
from shards.sources.grouped_table import LABELS, read_grouped_table
from shards.sources.image_folder import read_image_folder
from shards.types import UNKNOWN, Box
from tests.archives import GroupedArchive, write_csv


def read(archive: GroupedArchive) -> Archive:
    archive.write_table()
    return read_grouped_table(archive.table, archive.images)


def finding(row: dict[str, str], categories: list[list[str]], corners: list[tuple[float, float, float, float]]) -> None:
    """Give a row these findings and boxes, in the published quoting."""
    row["finding_categories"] = json.dumps([str(names) for names in categories])
    for i, name in enumerate(("resized_xmin", "resized_ymin", "resized_xmax", "resized_ymax")):
        row[name] = str([box[i] for box in corners])
    row["Mass"] = str(int(any("Mass" in names for names in categories)))
    row["Suspicious_Calcification"] = str(int(any("Suspicious Calcification" in names for names in categories)))


class TestGroupedTable:
    def test_every_cell_arrives(self, tiny_archive: GroupedArchive) -> None:
        cells = tiny_archive.rows[0]
        finding(cells, [["Mass"]], [(1.5, 2.0, 10.0, 20.0)])
        archive = read(tiny_archive)
        assert archive.name == "vindrmammo_grouped_df"
        assert archive.labels == LABELS
        assert len(archive.rows) == 24
        row = archive.rows[0]
        assert row.image_path == tiny_archive.path(0)
        assert row.image_path.is_file()
        assert (row.image_id, row.exam_id, row.patient_id) == (
            cells["image_id"],
            cells["patient_id"],
            cells["patient_id"],
        )
        assert (row.laterality, row.view, row.split, row.fold) == ("L", "CC", "train", 0)
        assert (row.density, row.birads) == (cells["breast_density"], cells["breast_birads"])
        assert row.boxes == (Box("Mass", 1.5, 2.0, 10.0, 20.0),)
        assert {row.split for row in archive.rows} == {"train", "test"}

    def test_a_finding_of_several_categories_is_a_label_and_a_box_of_each(self, tiny_archive: GroupedArchive) -> None:
        findings = [["Mass", "Suspicious Calcification"], ["Skin Thickening"]]
        finding(tiny_archive.rows[0], findings, [(1, 2, 10, 20), (5, 6, 7, 8)])
        row = read(tiny_archive).rows[0]
        assert {name for name, value in row.labels.items() if value} == {
            "Mass",
            "Suspicious_Calcification",
            "Skin_Thickening",
        }
        assert set(row.labels) == set(LABELS)
        assert row.boxes == (
            Box("Mass", 1, 2, 10, 20),
            Box("Suspicious_Calcification", 1, 2, 10, 20),
            Box("Skin_Thickening", 5, 6, 7, 8),
        )

    def test_the_image_id_may_carry_png(self, tiny_archive: GroupedArchive) -> None:
        without = read(tiny_archive).rows
        for cells in tiny_archive.rows:
            cells["image_id"] += ".png"
        assert read(tiny_archive).rows == without

    @pytest.mark.parametrize("nothing", ["[0.0]", "[nan]"])
    def test_no_finding_has_neither_label_nor_box(self, tiny_archive: GroupedArchive, nothing: str) -> None:
        finding(tiny_archive.rows[0], [["No Finding"]], [])
        for name in ("resized_xmin", "resized_ymin", "resized_xmax", "resized_ymax"):
            tiny_archive.rows[0][name] = nothing
        row = read(tiny_archive).rows[0]
        assert row.boxes == ()
        assert set(row.labels.values()) == {0}

    def test_inverted_boxes_are_swapped_and_empty_ones_left_out_with_a_count(
        self, tiny_archive: GroupedArchive
    ) -> None:
        finding(tiny_archive.rows[0], [["Mass"], ["Mass"]], [(1, 20, 10, 2), (5, 5, 5, 9)])
        archive = read(tiny_archive)
        assert archive.rows[0].boxes == (Box("Mass", 1, 2, 10, 20),)
        assert archive.notes[BOXES_SWAPPED] == 1
        assert archive.notes[BOXES_LEFT_OUT] == 1

    def test_the_table_needs_no_fold(self, tiny_archive: GroupedArchive) -> None:
        for cells in tiny_archive.rows:
            del cells["fold"]
        assert {row.fold for row in read(tiny_archive).rows} == {-1}

    @pytest.mark.parametrize(
        ("column", "value", "said"),
        [
            ("Mass", "yes", "is not 0, 1 or empty"),
            ("Mass", "", "disagrees with finding_categories"),
            ("Mass", "2", "is not 0, 1 or empty"),
            ("laterality", "X", "is neither L nor R"),
            ("view", "ML", "is neither CC nor MLO"),
            ("split", "holdout", "is none of training, validation, test"),
            ("fold", "a", "is not a fold"),
            ("patient_id", "", "is empty"),
            ("patient_id", "NaN", "is empty"),
            ("finding_categories", "Mass", "is not a JSON list"),
            ("finding_categories", "[]", "is not a JSON list"),
            ("finding_categories", "[\"['Cyst']\"]", "names 'Cyst', which is none of the categories"),
            ("resized_xmin", "12.0", "is not a list of numbers"),
            ("resized_xmin", "[a]", "is not a list of numbers"),
            ("resized_ymax", "[1.0, 2.0]", "has 2 numbers for 1 findings"),
            ("resized_xmax", "[inf]", "is no number of pixels"),
        ],
    )
    def test_a_wrong_cell_is_named(self, tiny_archive: GroupedArchive, column: str, value: str, said: str) -> None:
        row = tiny_archive.rows[2]
        finding(row, [["Mass"]], [(1, 2, 10, 20)])
        row[column] = value
        with pytest.raises(UserError) as caught:
            read(tiny_archive)
        assert caught.value.file == str(tiny_archive.table)
        assert f"row 3 (image_id {row['image_id']}), column {column}: {value!r}" in caught.value.thing
        assert said in caught.value.thing

    def test_a_label_column_that_disagrees_with_the_findings_is_an_error(self, tiny_archive: GroupedArchive) -> None:
        finding(tiny_archive.rows[2], [["Mass"]], [(1, 2, 10, 20)])
        tiny_archive.rows[2]["Suspicious_Calcification"] = "1"
        with pytest.raises(UserError, match=r"row 3 .* disagrees with finding_categories \['Mass'\], which say 0"):
            read(tiny_archive)

    def test_an_image_that_comes_twice_is_an_error_with_both_rows(self, tiny_archive: GroupedArchive) -> None:
        tiny_archive.rows[5]["image_id"] = tiny_archive.rows[1]["image_id"] + ".png"
        with pytest.raises(UserError, match=r"row 6 .* was in row 2 already"):
            read(tiny_archive)

    def test_a_missing_column_is_named_with_those_near_it(self, tiny_archive: GroupedArchive) -> None:
        for cells in tiny_archive.rows:
            cells["Suspicious_Calcifications"] = cells.pop("Suspicious_Calcification")
        with pytest.raises(UserError) as caught:
            read(tiny_archive)
        assert "no column 'Suspicious_Calcification'" in caught.value.thing
        assert "near it: Suspicious_Calcifications" in caught.value.thing
        assert caught.value.file == str(tiny_archive.table)

    def test_the_wrong_table_is_told_all_its_missing_columns(self, tmp_path: Path) -> None:
        table = write_csv(tmp_path / "other.csv", [{"site": "1", "age": "50"}])
        with pytest.raises(UserError, match=r"12 are missing in all: image_id, patient_id.*it has site, age"):
            read_grouped_table(table, tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "the table is missing"),
        (b"", "the table cannot be read"),
        (b'image_id,view\n"a,b\n', "the table cannot be read"),
        (b"\xff\xfe\x00i\x00m", "the table cannot be read"),
        (b"image_id,view\na,CC,\nb,CC,\n", "the table cannot be read .*Expected 2 fields in line 2, saw 3"),
    ],
)
def test_a_file_that_is_no_table(tmp_path: Path, content: bytes | None, said: str) -> None:
    table = tmp_path / "table.csv"
    if content is not None:
        table.write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        read_grouped_table(table, tmp_path)
    assert caught.value.file == str(table)


def test_a_table_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, real = tmp_path / "table.csv", builtins.open
    table.write_text("image_id\n1\n")

    def refuse(file: Any, *args: Any, **options: Any) -> Any:
        if str(file) == str(table):
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return real(file, *args, **options)

    monkeypatch.setattr(builtins, "open", refuse)
    with pytest.raises(UserError, match=r"the table cannot be read \(Permission denied\)") as caught:
        read_grouped_table(table, tmp_path)
    assert caught.value.file == str(table)


@pytest.mark.parametrize("path", [".", "file.txt/table.csv"])
def test_a_path_that_is_no_file(tmp_path: Path, path: str) -> None:
    (tmp_path / "file.txt").touch()
    with pytest.raises(UserError, match="the table cannot be read"):
        read_grouped_table(tmp_path / path, tmp_path)


@pytest.mark.parametrize("again", ["Cancer", "Cancer ", " Cancer"])
def test_a_column_that_comes_twice_is_named(tmp_path: Path, again: str) -> None:
    table = tmp_path / "mine.csv"
    table.write_text(f"image,patient_id,laterality,view,Cancer,Cyst,{again}\na.png,p,L,CC,1,0,0\n")
    with pytest.raises(UserError, match="more than one column 'Cancer' ") as caught:
        read_image_folder(table, tmp_path)
    assert caught.value.file == str(table)


def test_commas_at_the_end_of_all_rows_shift_no_column(tmp_path: Path) -> None:
    table = tmp_path / "mine.csv"
    table.write_text("image,patient_id,laterality,view,Cancer\na.png,p,L,CC,1,\nb.png,p,L,MLO,0,\n")
    with pytest.raises(UserError, match="Expected 5 fields in line 2, saw 6") as caught:
        read_image_folder(table, tmp_path)
    assert "no row of more cells than the header" in caught.value.fix
    assert "\n" not in str(caught.value)


def test_a_table_without_rows(tiny_archive: GroupedArchive) -> None:
    header = tiny_archive.table.read_text().splitlines()[0]
    tiny_archive.table.write_text(header + "\n")
    with pytest.raises(UserError, match="a header and no rows"):
        read_grouped_table(tiny_archive.table, tiny_archive.images)


class TestImageFolder:
    @staticmethod
    def cells(**changed: Any) -> dict[str, Any]:
        return {
            "image": "p1/a.png",
            "patient_id": "p1",
            "laterality": "L",
            "view": "CC",
            "Cancer": "1",
            "Cyst": "",
        } | changed

    def read(self, folder: Path, *rows: dict[str, Any], **options: Any) -> Archive:
        return read_image_folder(write_csv(folder / "mine.csv", rows), folder / "images", **options)

    def test_the_least_that_a_table_needs(self, tmp_path: Path) -> None:
        archive = self.read(tmp_path, self.cells())
        assert archive.labels == ("Cancer", "Cyst")
        (row,) = archive.rows
        assert row.image_path == tmp_path / "images" / "p1" / "a.png"
        assert (row.image_id, row.patient_id, row.exam_id) == ("p1/a", "p1", "p1")
        assert row.labels == {"Cancer": 1, "Cyst": UNKNOWN}
        assert (row.split, row.fold, row.boxes, row.manufacturer) == ("train", -1, (), "")

    def test_all_that_a_table_may_have(self, tmp_path: Path) -> None:
        extra = {"image_id": "x", "exam_id": "e", "split": "Testing", "fold": "2.0"}
        extra |= {"manufacturer": "IMS", "density": "B", "birads": "nan", "laterality": "right", "view": "mlo"}
        (row,) = self.read(tmp_path, self.cells(**extra)).rows
        assert (row.image_id, row.exam_id, row.split, row.fold) == ("x", "e", "test", 2)
        assert (row.manufacturer, row.density, row.birads, row.laterality, row.view) == ("IMS", "B", "", "R", "MLO")

    def test_named_labels_leave_other_columns_alone(self, tmp_path: Path) -> None:
        archive = self.read(tmp_path, self.cells(age="fifty"), labels=["Cyst"])
        assert archive.labels == ("Cyst",)
        assert archive.rows[0].labels == {"Cyst": UNKNOWN}

    def test_a_text_in_a_label_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"row 2 \(image p1/b.png\), column Cancer: 'benign' is not 0, 1 or empty"):
            self.read(tmp_path, self.cells(), self.cells(image="p1/b.png", Cancer="benign"))

    def test_a_misspelt_label_is_told_the_near_one(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="no column 'cancer'; near it: Cancer"):
            self.read(tmp_path, self.cells(), labels=["cancer"])

    def test_a_table_without_labels(self, tmp_path: Path) -> None:
        cells = self.cells()
        del cells["Cancer"], cells["Cyst"]
        with pytest.raises(UserError, match="has no label column"):
            self.read(tmp_path, cells)

    @pytest.mark.parametrize("column", ["image", "image_id"])
    def test_an_image_that_comes_twice(self, tmp_path: Path, column: str) -> None:
        rows = [self.cells(image="p1/a.png", image_id="a"), self.cells(image="p1/b.png", image_id="b")]
        rows[1][column] = rows[0][column]
        with pytest.raises(UserError, match=rf"column {column}: .* was in row 1 already"):
            self.read(tmp_path, *rows)

    def boxes(self, folder: Path, **changed: Any) -> Path:
        cells = {"image": "p1/a.png", "label": "Cancer", "x0": "10", "y0": "2.5", "x1": "4", "y1": "20"}
        return write_csv(folder / "boxes.csv", [cells | changed])

    def test_boxes_come_from_a_second_table(self, tmp_path: Path) -> None:
        archive = self.read(tmp_path, self.cells(), boxes=self.boxes(tmp_path))
        assert archive.rows[0].boxes == (Box("Cancer", 4, 2.5, 10, 20),)
        assert archive.notes[BOXES_SWAPPED] == 1

    @pytest.mark.parametrize(
        ("changed", "said"),
        [
            ({"image": "p1/z.png"}, "column image: 'p1/z.png' is not an image of the table"),
            ({"label": "Cancr"}, r"column label: 'Cancr' is no label of the table. Fix: use a label, such as Cancer"),
            ({"x1": "wide"}, "column x1: 'wide' is not a number of pixels"),
            ({"x1": "nan"}, "column x1: 'nan' is not a number of pixels"),
        ],
    )
    def test_a_wrong_box_is_named(self, tmp_path: Path, changed: dict[str, str], said: str) -> None:
        boxes = self.boxes(tmp_path, **changed)
        with pytest.raises(UserError, match=said) as caught:
            self.read(tmp_path, self.cells(), boxes=boxes)
        assert caught.value.file == str(boxes)

    def test_a_box_on_a_negative_image_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"has a box on p1/a.png, for which the table says 0"):
            self.read(tmp_path, self.cells(Cancer="0"), boxes=self.boxes(tmp_path))
