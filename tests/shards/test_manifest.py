"""Manifest: columns without a Python object per row, and a clear word when a folder is not what it should be."""

from __future__ import annotations

import errno
import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from shards import samples
from shards.codecs import decode
from shards.errors import UserError
from shards.geometry import identity
from shards.manifest import Manifest, check_shards, read_manifest, write_manifest
from shards.types import Box, SampleRecord
from tests.archives import LABELS


def record(row: int, **changed: Any) -> SampleRecord:
    fields: dict[str, Any] = {
        "row": row,
        "key": f"k{row}",
        "shard": row // 2,
        "offset_bytes": 512 * row,
        "num_bytes": 10 + row,
        "sha256": bytes([row]) * 32,
        "xxh3": bytes([row]) * 16,
        "image_id": f"i{row}",
        "exam_id": f"e{row // 4}",
        "patient_id": f"p{row // 4}",
        "laterality": "LR"[row % 2],
        "view": "CC",
        "split": "train",
        "fold": -1,
        "labels": {"Mass": row % 2, "Calc": -1},
        "boxes": (),
        "geometry": identity(64, 48),
        "manufacturer": "IMS",
        "density": "",
        "birads": "BI-RADS 2",
    }
    return SampleRecord(**fields | changed)


def write(folder: Path, records: list[SampleRecord]) -> Manifest:
    table = samples.to_table(records, ["Mass", "Calc"])
    write_manifest(folder, table, header_fields())
    return read_manifest(folder)


def header_fields(**changed: Any) -> dict[str, Any]:
    fields = {"name": "test", "labels": ["Mass", "Calc"], "height_px": 64, "width_px": 48, "dtype": "uint8"}
    fields |= {"codec": "png", "recipe": {"name": "as_is", "version": 1}, "fingerprint": "f", "settings": {}}
    fields |= {"counts": {}, "dropped": [], "notes": {}, "shards": []}
    return fields | changed


def test_records_come_back_as_they_were_written(tmp_path: Path) -> None:
    boxes = (Box("Mass", 1.25, 2.0, 3.5, 4.0), Box("Calc", 0.0, 0.0, 48.0, 64.0))
    records = [record(0), record(1, boxes=boxes, split="test", fold=3), record(2, manufacturer='Müller, "X"')]
    manifest = write(tmp_path, records)
    assert len(manifest) == 3
    assert [manifest.record(row) for row in range(3)] == records


def test_columns(tmp_path: Path) -> None:
    records = [record(row, split=("train", "test", "train", "val")[row]) for row in range(4)]
    manifest = write(tmp_path, records)
    assert manifest.rows("train").tolist() == [0, 2]
    assert manifest.rows("train").dtype == np.int64
    assert manifest.rows("test").tolist() == [1]
    assert manifest.shard_N().tolist() == [0, 0, 1, 1]
    assert manifest.label_NK(["Calc", "Mass"]).tolist() == [[-1, 0], [-1, 1], [-1, 0], [-1, 1]]
    assert manifest.label_NK(["Mass"]).dtype == np.int8
    assert manifest.text("image_id", [2, 0, 2]) == ["i2", "i0", "i2"]
    assert manifest.text("laterality", np.array([1, 0])) == ["R", "L"]
    assert manifest.location(3) == (1, 1536, 13, bytes([3]) * 32, bytes([3]) * 16)


def test_a_split_that_is_not_there_has_no_rows(tmp_path: Path) -> None:
    rows = write(tmp_path, [record(0)]).rows("val")
    assert rows.tolist() == []
    assert rows.dtype == np.int64


def test_an_unknown_label_names_those_that_are_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no label 'Masss'. Fix: choose from Mass, Calc"):
        write(tmp_path, [record(0)]).label_NK(["Masss"])


def test_the_place_of_a_sample_holds_its_image(packed: Path) -> None:
    manifest = read_manifest(packed)
    for row in (0, len(manifest) // 2, len(manifest) - 1):
        shard, offset, num_bytes, *_ = manifest.location(row)
        data = (packed / manifest.shards[shard].name).read_bytes()[offset : offset + num_bytes]
        image_HW = decode(data, "png", expect_hw=(manifest.height_px, manifest.width_px), dtype="uint8", name="x")
        assert image_HW.any()


def test_it_is_mapped_again_where_it_is_unpickled(packed: Path) -> None:
    manifest = read_manifest(packed)
    data = pickle.dumps(manifest)
    assert len(data) < 1000, "the rows are not pickled"
    again = pickle.loads(data)
    assert again.fingerprint == manifest.fingerprint
    assert again.record(5) == manifest.record(5)


def test_unpickling_refuses_a_folder_that_was_packed_anew_meanwhile(tmp_path: Path) -> None:
    data = pickle.dumps(write(tmp_path, [record(0)]))
    write_manifest(tmp_path, samples.to_table([record(1)], ["Mass", "Calc"]), header_fields(fingerprint="g"))
    with pytest.raises(UserError, match="changed while it was in use"):
        pickle.loads(data)


def large_table(count: int) -> pa.Table:
    """Rows made by repeating one, with ids of their own."""
    one = samples.to_table([record(0, boxes=(Box("Mass", 1, 2, 3, 4),))], ["Mass", "Calc"])
    table = one.take(pa.array(np.zeros(count, np.int64)))
    ids = pa.array(np.char.mod("%032d", np.arange(count)).tolist(), pa.string())
    for name in ("key", "image_id", "exam_id", "patient_id"):
        at = table.schema.get_field_index(name)
        table = table.set_column(at, table.schema.field(at), ids)
    return table


def test_opening_makes_no_python_object_per_row(tmp_path: Path) -> None:
    count = 200_000
    write_manifest(tmp_path, large_table(count), header_fields())
    read_manifest(tmp_path)
    blocks = sys.getallocatedblocks()
    manifest = read_manifest(tmp_path)
    manifest.rows("train"), manifest.shard_N(), manifest.label_NK(["Mass"]), manifest.location(count - 1)
    assert sys.getallocatedblocks() - blocks < 2000
    assert manifest.text("image_id", [count - 1]) == [f"{count - 1:032d}"]


def copy(packed: Path, folder: Path) -> Path:
    return Path(shutil.copytree(packed, folder / "copy"))


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def edit(path: Path, **changed: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


@pytest.mark.parametrize(
    ("damage", "file", "said"),
    [
        (lambda f: (f / "manifest.json").unlink(), "", "there is no manifest.json"),
        (lambda f: ((f / "manifest.json").unlink(), (f / ".packing").mkdir()), "", "packing was not finished"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json", "is not JSON"),
        (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json", "is not a manifest of packed mammograms"),
        (lambda f: (f / "manifest.json").write_text('{"a": 1}'), "manifest.json", "is not a manifest of packed"),
        (lambda f: edit(f / "manifest.json", schema_version=99), "manifest.json", "is of schema version 99"),
        (lambda f: edit(f / "manifest.json", colour="red"), "manifest.json", "has other fields .*colour"),
        (lambda f: edit(f / "manifest.json", shards=[{"name": "a.tar"}]), "manifest.json", "has other fields .*sha256"),
        (lambda f: edit(f / "manifest.json", shards=["a.tar"]), "manifest.json", "has other fields"),
        (lambda f: edit(f / "manifest.json", samples={"sha256": ""}), "manifest.json", "other fields .*num_bytes"),
        (lambda f: edit(f / "manifest.json", samples=[]), "manifest.json", "has other fields"),
        (lambda f: edit(f / "manifest.json", codec="jxl"), "manifest.json", "codec 'jxl'; known are png, zstd"),
        (lambda f: edit(f / "manifest.json", dtype="int32"), "manifest.json", "dtype 'int32'; known are uint8, uint16"),
        (lambda f: edit(f / "manifest.json", labels=["Cyst"]), "samples.arrow", "its columns are not those"),
        (lambda f: (f / "samples.arrow").unlink(), "samples.arrow", "missing, though manifest.json names it"),
        (lambda f: flip_byte(f / "samples.arrow"), "samples.arrow", "its checksum is another"),
        (lambda f: (f / "samples.arrow").write_bytes(b"x"), "samples.arrow", "its checksum is another"),
    ],
)
def test_a_damaged_folder(packed: Path, tmp_path: Path, damage: Callable[[Path], Any], file: str, said: str) -> None:
    folder = copy(packed, tmp_path)
    damage(folder)
    with pytest.raises(UserError, match=said) as caught:
        read_manifest(folder)
    assert caught.value.file == str(folder / file)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda tar: tar.unlink(), "missing"),
        (lambda tar: tar.write_bytes(tar.read_bytes()[:-512]), "truncated: .* bytes instead of"),
        (lambda tar: tar.write_bytes(tar.read_bytes() + b"0"), "longer than packed"),
    ],
)
def test_check_shards(packed: Path, tmp_path: Path, damage: Callable[[Path], Any], said: str) -> None:
    folder = copy(packed, tmp_path)
    manifest = read_manifest(folder)
    check_shards(manifest)
    damage(folder / "shard-000003.tar")
    with pytest.raises(UserError, match=said) as caught:
        check_shards(manifest)
    assert caught.value.file == str(folder / "shard-000003.tar")


def forbid(monkeypatch: pytest.MonkeyPatch, method: str, forbidden: Path) -> None:
    """Let a method of Path fail for one file, as it does for a user without permission (who may not be root)."""
    real = getattr(Path, method)

    def refuse(path: Path, *args: Any, **options: Any) -> Any:
        if path == forbidden:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(Path, method, refuse)


@pytest.mark.parametrize("name", ["manifest.json", "samples.arrow"])
@pytest.mark.parametrize("method", ["open", "stat"])  # the file, or its folder, is not ours to read
def test_an_unreadable_file_is_named(packed: Path, monkeypatch: pytest.MonkeyPatch, name: str, method: str) -> None:
    forbid(monkeypatch, method, packed / name)
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied\)") as caught:
        read_manifest(packed)
    assert caught.value.file == str(packed / name)


def test_a_tar_out_of_reach_is_named(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = read_manifest(packed)
    forbid(monkeypatch, "stat", packed / "shard-000003.tar")
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied\)") as caught:
        check_shards(manifest)
    assert caught.value.file == str(packed / "shard-000003.tar")


def test_labels_of_the_fixture_are_packed(packed: Path) -> None:
    manifest = read_manifest(packed)
    assert manifest.labels == LABELS
    assert len(manifest) == 96
    assert sum(shard.num_samples for shard in manifest.shards) == 96
