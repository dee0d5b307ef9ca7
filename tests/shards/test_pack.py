"""Packing: what is in the tars, the same bytes however it was made, and what stops it."""

from __future__ import annotations

import hashlib
import json
import tarfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from shards.errors import UserError
from shards.manifest import read_manifest
from shards.pack import pack
from shards.pack_shard import sample_key
from shards.recipes import AsIs, MammoClip
from shards.sources.base import BOXES_CLIPPED, BOXES_LEFT_OUT
from shards.sources.grouped_table import read_grouped_table
from shards.splits import Validation
from tests.archives import (
    LABELS,
    GroupedArchive,
    contents,
    make_grouped_archive,
    pack_grouped,
    stored_image,
    write_csv,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shared_archive(tmp_path_factory: pytest.TempPathFactory) -> GroupedArchive:
    """For tests that change nothing in it."""
    return make_grouped_archive(tmp_path_factory.mktemp("shared"), exams=8)


class TestTars:
    def test_webdataset_reads_them_unaided(self, packed: Path) -> None:
        manifest = read_manifest(packed)
        tars = [str(packed / shard.name) for shard in manifest.shards]
        found = list(webdataset.WebDataset(tars, shardshuffle=False))
        assert len(found) == len(manifest) == 96
        for row in (0, 41, 95):
            record, sample = manifest.record(row), found[row]
            assert sample["__key__"] == record.key
            assert hashlib.sha256(sample["png"]).digest() == record.sha256
            assert json.loads(sample["json"])["image_id"] == record.image_id

    def test_each_image_is_the_one_of_the_archive_bit_for_bit(
        self, shared_archive: GroupedArchive, tmp_path: Path
    ) -> None:
        pack_grouped(shared_archive, tmp_path / "out")
        source = {cells["image_id"]: shared_archive.path(row) for row, cells in enumerate(shared_archive.rows)}
        manifest = read_manifest(tmp_path / "out")
        assert sorted(manifest.text("image_id", range(len(manifest)))) == sorted(source)
        for row in range(len(manifest)):
            stored_HW = stored_image(manifest, row)
            np.testing.assert_array_equal(stored_HW, np.array(Image.open(source[manifest.record(row).image_id])))

    def test_16_bit_stays_16_bit_in_either_codec(self, tmp_path: Path) -> None:
        archive = make_grouped_archive(tmp_path, exams=2, dtype=np.uint16)
        prints = set()
        for codec, extension in (("png", "png"), ("zstd", "npy.zst")):
            pack_grouped(archive, tmp_path / codec, codec=codec, validation=Validation(fraction=0))
            manifest = read_manifest(tmp_path / codec)
            prints.add(manifest.fingerprint)
            record = manifest.record(0)
            (original,) = archive.images.glob(f"*/{record.image_id}.png")
            np.testing.assert_array_equal(stored_image(manifest, 0), np.array(Image.open(original)))
            with tarfile.open(tmp_path / codec / "shard-000000.tar") as tar:
                assert tar.getnames()[1] == f"{record.key}.{extension}"
            (sample, *_) = webdataset.WebDataset(str(tmp_path / codec / "shard-000000.tar"), shardshuffle=False)
            assert hashlib.sha256(sample[extension]).digest() == record.sha256
        assert len(prints) == 1, "the codec does not change what is trained on"

    def test_nothing_in_a_header_tells_when_or_by_whom_it_was_packed(self, packed: Path) -> None:
        with tarfile.open(packed / "shard-000000.tar") as tar:
            for member in tar.getmembers():
                assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
                assert member.mode == 0o644
                assert member.name.count(".") == 1, "a key holds no dot"

    def test_the_json_holds_these_fields_and_no_others(self, packed: Path) -> None:
        with tarfile.open(packed / "shard-000000.tar") as tar:
            documents = [json.load(tar.extractfile(m)) for m in tar.getmembers() if m.name.endswith(".json")]
        fields = "key image_id exam_id patient_id laterality view split fold labels boxes geometry"
        assert {tuple(document) for document in documents} == {(*fields.split(), "manufacturer", "density", "birads")}
        assert set(documents[0]["labels"]) == set(LABELS)

    def test_text_in_a_source_png_does_not_reach_the_tar(self, tiny_archive: GroupedArchive, tmp_path: Path) -> None:
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        info.add_text("PatientName", "DOE JANE")
        with Image.open(tiny_archive.path(0)) as image:
            image.load()
            image.save(tiny_archive.path(0), pnginfo=info)
        assert b"DOE JANE" in tiny_archive.path(0).read_bytes()
        pack_grouped(tiny_archive, tmp_path / "out")
        assert not any(b"DOE JANE" in tar.read_bytes() for tar in (tmp_path / "out").iterdir())

    def test_a_shard_holds_one_split_and_whole_exams_side_by_side(self, packed: Path) -> None:
        manifest = read_manifest(packed)
        splits = manifest.text("split", range(96))
        shards = manifest.shard_N().tolist()
        assert all(len({s for s, k in zip(splits, shards, strict=True) if k == shard}) == 1 for shard in set(shards))
        exams = manifest.text("exam_id", range(96))
        assert sum(a != b for a, b in pairwise(exams)) == 23

    def test_exams_are_shuffled_by_the_seed(self, shared_archive: GroupedArchive, tmp_path: Path) -> None:
        orders = []
        for seed in (0, 1):
            pack_grouped(shared_archive, tmp_path / str(seed), seed=seed, validation=Validation(fraction=0))
            manifest = read_manifest(tmp_path / str(seed))
            orders.append(manifest.text("image_id", range(len(manifest))))
        assert sorted(orders[0]) == sorted(orders[1])
        assert orders[0] != orders[1]
        assert orders[0] != sorted(orders[0])

    @pytest.mark.parametrize("image_id", ["1.2.840.113619", "p1/L CC", "ü", "x" * 200])
    def test_keys_of_awkward_ids(self, image_id: str) -> None:
        key = sample_key(image_id)
        assert key.isascii()
        assert not set(key) & set("./ ")
        assert len(key) <= 93, "the name of the member fits a plain tar header"
        assert sample_key(image_id + "y") != key


class TestSameBytes:
    def test_for_any_number_of_processes_any_path_and_any_order_of_the_table(
        self, shared_archive: GroupedArchive, tmp_path: Path
    ) -> None:
        pack_grouped(shared_archive, tmp_path / "one")
        pack_grouped(shared_archive, tmp_path / "deeper" / "two", processes=2)
        moved = make_grouped_archive(tmp_path / "moved", exams=8)
        moved.rows.reverse()
        moved.write_table()
        pack_grouped(moved, tmp_path / "three")
        expected = contents(tmp_path / "one")
        assert set(expected) == {"manifest.json", "samples.arrow", *(f"shard-{i:06d}.tar" for i in range(7))}
        assert contents(tmp_path / "deeper" / "two") == expected
        assert contents(tmp_path / "three") == expected

    def test_packing_again_changes_nothing_and_reports_the_same(
        self, tiny_archive: GroupedArchive, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        first = pack_grouped(tiny_archive, out)
        times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
        assert str(pack_grouped(tiny_archive, out)) == str(first)
        assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times

    def test_the_fingerprint_changes_with_what_is_trained_on_and_with_nothing_else(
        self, tiny_archive: GroupedArchive, tmp_path: Path
    ) -> None:
        prints: dict[str, str] = {}

        def add(name: str, **options: Any) -> None:
            pack_grouped(tiny_archive, tmp_path / name, **options)
            prints[name] = read_manifest(tmp_path / name).fingerprint

        add("reference")
        add("shards", samples_per_shard=3)
        add("labels", labels=("Mass",))
        add("seed", seed=1)
        add("recipe", recipe=MammoClip(height_px=64, width_px=48))
        for cells in tiny_archive.rows:
            cells["breast_density"] = "DENSITY A"
        tiny_archive.write_table()
        add("density")
        pixels = np.array(Image.open(tiny_archive.path(0)))
        pixels[0, 0] ^= 1
        Image.fromarray(pixels).save(tiny_archive.path(0))
        add("pixels")
        assert prints.pop("density") == prints["reference"]
        assert len(set(prints.values())) == len(prints)


def test_two_images_of_one_name_are_refused_whatever_the_source(tiny_archive: GroupedArchive, tmp_path: Path) -> None:
    archive = read_grouped_table(tiny_archive.table, tiny_archive.images)
    doubled = replace(archive, rows=[*archive.rows, archive.rows[3]])
    with pytest.raises(UserError, match=rf"row 25: image_id {archive.rows[3].image_id} comes twice"):
        pack(doubled, tmp_path / "out", recipe=AsIs(), quiet=True)


def test_an_unknown_label_is_counted_as_such(tiny_archive: GroupedArchive, tmp_path: Path) -> None:
    archive = read_grouped_table(tiny_archive.table, tiny_archive.images)
    rows = [replace(row, labels={**row.labels, "Mass": -1}) for row in archive.rows[:8]] + archive.rows[8:]
    report = pack(replace(archive, rows=rows), tmp_path / "out", recipe=AsIs(), processes=1, quiet=True)
    assert sum(report.header.counts["unknown"]["Mass"].values()) == 8
    assert ["Mass", "unknown"] in [line.split()[:2] for line in str(report).splitlines()]


class TestReport:
    def test_it_counts_what_was_packed(self, shared_archive: GroupedArchive, tmp_path: Path) -> None:
        report = pack_grouped(shared_archive, tmp_path / "out", validation=Validation(fold=1))
        counts = report.header.counts
        assert counts["images"] == {"train": 16, "val": 8, "test": 8}
        assert counts["exams"] == counts["patients"] == {"train": 4, "val": 2, "test": 2}
        for label in LABELS:
            expected = sum(cells[label] == "1" for cells in shared_archive.rows)
            assert sum(counts["positives"][label].values()) == expected > 0
            assert sum(counts["boxes"][label].values()) == expected
        lines = [line.split() for line in str(report).splitlines()]
        assert ["images", "16", "8", "8", "32"] in lines
        assert ["patients", "4", "2", "2", "8"] in lines

    def test_boxes_outside_are_clipped_or_left_out_and_counted(
        self, tiny_archive: GroupedArchive, tmp_path: Path
    ) -> None:
        for row, xs in ((0, (40.0, 60.0)), (1, (50.0, 60.0))):
            cells = tiny_archive.rows[row]
            cells |= {"finding_categories": json.dumps(["['Mass']"]), "Mass": "1", "Suspicious_Calcification": "0"}
            cells |= {"resized_xmin": str([xs[0]]), "resized_xmax": str([xs[1]])}
            cells |= {"resized_ymin": "[-3.0]", "resized_ymax": "[9.0]"}
        tiny_archive.write_table()
        report = pack_grouped(tiny_archive, tmp_path / "out")
        assert report.header.notes == {BOXES_CLIPPED: 2, BOXES_LEFT_OUT: 1}
        assert f"mended: 2 {BOXES_CLIPPED}" in str(report)
        manifest = read_manifest(tmp_path / "out")
        row = manifest.text("image_id", range(24)).index(tiny_archive.rows[0]["image_id"])
        (box,) = manifest.record(row).boxes
        assert (box.x0, box.y0, box.x1, box.y1) == (40.0, 0.0, 48.0, 9.0)

    def test_boxes_follow_the_recipe_into_stored_pixels(self, shared_archive: GroupedArchive, tmp_path: Path) -> None:
        pack_grouped(shared_archive, tmp_path / "out", recipe=MammoClip(height_px=128, width_px=96))
        manifest = read_manifest(tmp_path / "out")
        masses = [record for record in map(manifest.record, range(len(manifest))) if record.labels["Mass"] == 1]
        assert masses
        for record in masses:
            image_HW = stored_image(manifest, record.row)
            (box,) = (box for box in record.boxes if box.label == "Mass")
            inside_HW = image_HW[round(box.y0) + 2 : round(box.y1) - 2, round(box.x0) + 2 : round(box.x1) - 2]
            assert (inside_HW > 240).mean() > 0.9

    def test_labels_that_are_left_out_take_their_boxes_along(
        self, shared_archive: GroupedArchive, tmp_path: Path
    ) -> None:
        pack_grouped(shared_archive, tmp_path / "out", labels=("Mass",))
        manifest = read_manifest(tmp_path / "out")
        assert manifest.labels == ("Mass",)
        labels = {box.label for row in range(len(manifest)) for box in manifest.record(row).boxes}
        assert labels == {"Mass"}


def test_real_mammograms_pack_and_come_back(real_data: Path, tmp_path: Path) -> None:
    from shards.sources.image_folder import read_image_folder

    rows = [
        {"image": f"{side}-{view}.png", "patient_id": "p", "laterality": side, "view": view, "Mass": "0"}
        for side in "LR"
        for view in ("CC", "MLO")
    ]
    archive = read_image_folder(write_csv(tmp_path / "exam.csv", rows), real_data / "real_exam_8bit")
    pack(archive, tmp_path / "out", recipe=MammoClip(), validation=Validation(fraction=0), processes=1, quiet=True)
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.height_px, manifest.width_px, manifest.dtype, len(manifest)) == (1520, 912, "uint8", 4)
    record = manifest.record(0)
    with Image.open(real_data / "real_exam_8bit" / f"{record.image_id}.png") as image:
        expected_HW, geometry = MammoClip().apply(np.array(image))
    assert record.geometry == geometry
    np.testing.assert_array_equal(stored_image(manifest, 0), expected_HW)
