"""The archive of phantoms: the published layout, the same bytes however it is made, and whole files only."""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from launch.cli import main
from shards.errors import UserError
from shards.phantoms.canvas import Canvas
from shards.phantoms.draw import draw_phantom
from shards.phantoms.exam import SIDES, VIEWS
from shards.sources.grouped_table import read_grouped_table
from shards.sources.phantom import IMAGES_NAME, SETTINGS_NAME, TABLE_NAME, PhantomReport, write_phantoms

pytestmark = pytest.mark.slow

OPTIONS: dict[str, Any] = {"exams": {"training": 5, "test": 2}, "height_px": 96, "width_px": 64, "seed": 3}


def make(out: Path, **changes: Any) -> PhantomReport:
    return write_phantoms(out, **({"processes": 1, "quiet": True} | OPTIONS | changes))


def digests(out: Path) -> dict[str, str]:
    files = [path for path in out.rglob("*") if path.is_file()]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> PhantomReport:
    return make(tmp_path_factory.mktemp("phantoms"))


def test_the_table_has_the_published_columns_and_quoting(archive: PhantomReport) -> None:
    header, *rows = archive.table.read_text().splitlines()
    assert header == (
        "image_id,patient_id,laterality,view,finding_categories,finding_birads,breast_birads,breast_density,split,fold,"
        "Mass,Suspicious_Calcification,resized_xmin,resized_ymin,resized_xmax,resized_ymax"
    )
    assert len(rows) == 28
    without = next(row for row in rows if "No Finding" in row)
    assert '''"[""['No Finding']""]"''' in without
    assert without.endswith(",0,0,[0.0],[0.0],[0.0],[0.0]")


def test_rows_say_what_the_images_show(archive: PhantomReport) -> None:
    with archive.table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    canvas = Canvas(96, 64)
    expected = [(exam, side, view) for exam in range(7) for side in SIDES for view in VIEWS]
    for (exam, side, view), row in zip(expected, rows, strict=True):
        phantom = draw_phantom(3, exam, side, view, canvas)
        with Image.open(archive.images_folder / row["patient_id"] / row["image_id"]) as image:
            assert (image.mode, image.format) == ("L", "PNG")
            np.testing.assert_array_equal(np.asarray(image), phantom.image_HW)
        assert (row["laterality"], row["view"]) == (side, view)
        assert [int(row["Mass"]), int(row["Suspicious_Calcification"])] == list(phantom.plan.labels.values())
        assert json.loads(row["finding_categories"]) == ([str([b.label]) for b in phantom.boxes] or ["['No Finding']"])
        xmax = [float(part) for part in row["resized_xmax"].strip("[]").split(",")]
        assert xmax == pytest.approx([box.x1 for box in phantom.boxes] or [0.0], abs=1e-3)
        assert row["split"] == ("training" if exam < 5 else "test")
        assert int(row["fold"]) == exam % 4


def test_the_source_for_the_published_table_reads_it(archive: PhantomReport) -> None:
    read = read_grouped_table(archive.table, archive.images_folder)
    assert all(row.image_path.is_file() for row in read.rows)
    assert not read.notes
    for label in ("Mass", "Suspicious_Calcification"):
        boxes = sum(box.label == label for row in read.rows for box in row.boxes)
        assert boxes == sum(archive.counts[f"{label.replace('_', ' ')} boxes"].values()) > 0


def test_patients_stay_in_one_split_and_one_fold(archive: PhantomReport) -> None:
    rows = read_grouped_table(archive.table, archive.images_folder).rows
    for patient in {row.patient_id for row in rows}:
        of_patient = [row for row in rows if row.patient_id == patient]
        assert len(of_patient) == 4
        assert len({(row.split, row.fold) for row in of_patient}) == 1


def test_the_report_counts_what_was_written(archive: PhantomReport) -> None:
    assert archive.counts["images"] == {"training": 20, "test": 8}
    assert archive.counts["exams"] == {"training": 5, "test": 2}
    assert (archive.written, archive.kept) == (28, 0)
    assert "28 images drawn, 0 kept" in str(archive)
    assert f"{'images':34}{20:>10}{8:>8}" in str(archive)


@pytest.mark.parametrize("processes", [2, 3])
def test_bytes_do_not_depend_on_the_number_of_processes(archive: PhantomReport, tmp_path: Path, processes: int) -> None:
    make(tmp_path, processes=processes)
    assert digests(tmp_path) == digests(archive.table.parent)


def test_what_is_missing_is_made_and_what_exists_is_kept(archive: PhantomReport, tmp_path: Path) -> None:
    make(tmp_path)
    images = sorted((tmp_path / IMAGES_NAME).rglob("*.png"))
    for path in [*images[::3], tmp_path / TABLE_NAME]:
        path.unlink()
    leftover = images[1].with_name(f".{images[1].name}.123.tmp")
    leftover.write_bytes(b"half an image")
    kept = {path: path.stat().st_mtime_ns for path in images if path.exists()}
    report = make(tmp_path)
    assert (report.written, report.kept) == (len(images[::3]), len(kept))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert digests(tmp_path) == digests(archive.table.parent)


def test_an_interrupted_archive_has_no_table(archive: PhantomReport, tmp_path: Path, monkeypatch: Any) -> None:
    from shards.sources import phantom

    calls = iter(range(9))

    def stop_at_the_ninth(*args: Any) -> Any:
        if next(calls) == 8:
            raise KeyboardInterrupt
        return draw_phantom(*args)

    with monkeypatch.context() as patch:
        patch.setattr(phantom, "draw_phantom", stop_at_the_ninth)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path)
    assert len(list(tmp_path.rglob("*.png"))) == 8
    assert not (tmp_path / TABLE_NAME).exists()
    assert make(tmp_path).kept == 8
    assert digests(tmp_path) == digests(archive.table.parent)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 4}, "seed was 3, now 4"),
        ({"exams": {"training": 6, "test": 2}}, "exams_training was 5, now 6"),
        ({"height_px": 128}, "height_px was 96, now 128"),
    ],
)
def test_an_archive_of_other_settings_is_refused_and_stays(
    archive: PhantomReport, change: dict[str, Any], named: str
) -> None:
    out = archive.table.parent
    before = digests(out)
    with pytest.raises(UserError, match=named) as caught:
        make(out, **change)
    assert caught.value.file == str(out)
    assert digests(out) == before


def test_another_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / TABLE_NAME).write_text("image_id\nreal\n")
    with pytest.raises(UserError, match=f"holds {TABLE_NAME} of another archive"):
        make(tmp_path)
    assert (tmp_path / TABLE_NAME).read_text() == "image_id\nreal\n"


@pytest.mark.parametrize("text", ["{", "[]"])
def test_broken_settings_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / SETTINGS_NAME).write_text(text)
    with pytest.raises(UserError, match=r"is no JSON|other settings"):
        make(tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"exams": {"training": 0, "test": 0}}, "0 training and 0 test exams"),
        ({"exams": {"training": 3, "test": -1}}, "3 training and -1 test exams"),
        ({"exams": {"val": 3}}, "split 'val'"),
        ({"height_px": 63}, "phantoms of 63 x 64 pixels"),
        ({"width_px": 0}, "phantoms of 96 x 0 pixels"),
        ({"seed": -1}, "seed -1"),
        ({"processes": 0}, "0 processes"),
    ],
)
def test_options_out_of_range_are_named_and_nothing_is_written(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    with pytest.raises(UserError, match=named):
        make(tmp_path / "out", **change)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("below", ["file", "file/folder"])
def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written") as caught:
        make(tmp_path / below)
    assert "file" in str(caught.value.file)


def test_a_full_disk_is_named_and_leaves_whole_files_only(
    archive: PhantomReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = iter(range(1000))

    def full_after_some(descriptor: int) -> None:
        if next(synced) == 13:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_after_some)
        with pytest.raises(UserError, match="the disk is full") as caught:
            make(tmp_path)
    assert str(caught.value.file).endswith(".png")
    assert not list(tmp_path.rglob("*.tmp"))
    whole = digests(archive.table.parent)
    assert digests(tmp_path).items() <= whole.items()
    make(tmp_path)
    assert digests(tmp_path) == whole


def test_the_command_makes_the_archive_and_prints_what_it_holds(
    archive: PhantomReport, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = ["--height", "96", "--width", "64", "--seed", "3", "--exams-training", "5", "--exams-test", "2"]
    assert main(["phantom", str(tmp_path), *size, "--processes", "1"]) == 0
    assert digests(tmp_path) == digests(archive.table.parent)
    printed = capsys.readouterr()
    assert "28 images drawn, 0 kept" in printed.out
    assert "drawing phantoms: 28/28 images (100 %)" in printed.err
    assert main(["phantom", str(tmp_path), *size, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert main(["phantom", str(tmp_path), "--seed", "4"]) == 2
    assert "holds phantoms made with other settings" in capsys.readouterr().err
