"""Verify: every byte of a packed folder is read again, and everything that is wrong is told at once."""

from __future__ import annotations

import errno
import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards import samples
from shards.checksums import sha256, xxh3
from shards.codecs import encode
from shards.errors import UserError
from shards.files import sha256_file
from shards.manifest import read_manifest
from shards.pack_shard import member_json
from shards.tars import TarWriter
from shards.types import SampleRecord
from shards.verify import verify

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(packed: Path, tmp_path: Path) -> Path:
    """A copy of the packed folder, to break."""
    return Path(shutil.copytree(packed, tmp_path / "copy"))


def check(folder: Path) -> list[tuple[str, str]]:
    return [(problem.file, problem.thing) for problem in verify(folder, processes=1, quiet=True).problems]


@pytest.mark.parametrize("processes", [1, 2])
def test_what_was_packed_is_whole(packed: Path, processes: int) -> None:
    report = verify(packed, processes=processes, quiet=True)
    assert report.ok
    assert (report.images, report.shards) == (96, 8)
    assert str(report) == f"{packed}: 96 images in 8 shards, all as packed"


def test_a_flipped_bit_names_the_tar_and_the_sample(folder: Path) -> None:
    manifest = read_manifest(folder)
    shard, offset, num_bytes, *_ = manifest.location(17)
    tar = folder / manifest.shards[shard].name
    data = bytearray(tar.read_bytes())
    data[offset + num_bytes // 2] ^= 1
    tar.write_bytes(bytes(data))
    image_id = manifest.text("image_id", [17])[0]
    problems = check(folder)
    assert problems == [
        (tar.name, "changed: its checksum is another"),
        (tar.name, f"changed since it was packed: the checksum of sample {image_id} (row 17) is another"),
    ]


def test_everything_is_told_at_once(folder: Path) -> None:
    (folder / "shard-000001.tar").unlink()
    tar = folder / "shard-000004.tar"
    tar.write_bytes(tar.read_bytes()[:20000])
    with (folder / "shard-000006.tar").open("ab") as file:
        file.write(b"more")
    report = verify(folder, processes=2, quiet=True)
    told = {problem.file: problem.thing for problem in reversed(report.problems)}
    assert told["shard-000001.tar"] == "missing"
    assert told["shard-000004.tar"].startswith("truncated: 20000 bytes instead of")
    assert told["shard-000006.tar"].startswith("too long")
    assert set(told) == {"shard-000001.tar", "shard-000004.tar", "shard-000006.tar"}
    assert "problems in 3 files" in str(report)
    assert "... and" in str(report), "a file with many problems is cut short"


@pytest.mark.parametrize("column", ["sha256", "xxh3"])
def test_each_of_the_two_checksums_is_compared(folder: Path, column: str) -> None:
    """Reading compares the quicker one alone."""
    manifest = read_manifest(folder)
    records = [manifest.record(row) for row in range(len(manifest))]
    other = getattr(records[4], column)
    rewrite(folder, [replace(record, **{column: other}) if record.row == 3 else record for record in records])
    name = manifest.text("image_id", [3])[0]
    thing = f"changed since it was packed: the checksum of sample {name} (row 3) is another"
    assert check(folder) == [(manifest.shards[0].name, thing)]


def repack(folder: Path, change: Callable[[SampleRecord, bytes, bytes], tuple[str, bytes, bytes]]) -> None:
    """Rewrite the first tar with changed members, and make manifest and samples.arrow believe in it."""
    manifest = read_manifest(folder)
    records = [manifest.record(row) for row in range(len(manifest))]
    path = folder / manifest.shards[0].name
    with tarfile.open(path) as tar:
        members = [tar.extractfile(member).read() for member in tar.getmembers()]
    changed = []
    with path.open("wb") as file:
        writer = TarWriter(file)
        for i, record in enumerate(records[: manifest.shards[0].num_samples]):
            key, document, image = change(record, members[2 * i], members[2 * i + 1])
            writer.add(f"{key}.json", document)
            offset = writer.add(f"{key}.png", image)
            place = {"offset_bytes": offset, "num_bytes": len(image), "sha256": sha256(image), "xxh3": xxh3(image)}
            changed.append(replace(record, **place))
        writer.finish()
    rewrite(folder, changed + records[len(changed) :], path)


def rewrite(folder: Path, records: list[SampleRecord], tar: Path | None = None) -> None:
    """Write samples.arrow and manifest.json anew, with checksums that fit."""
    from shards.manifest import write_manifest

    header = json.loads((folder / "manifest.json").read_text())
    for name in ("schema_version", "format", "samples"):
        del header[name]
    if tar is not None:
        header["shards"][0] |= {"num_bytes": tar.stat().st_size, "sha256": sha256_file(tar).hex()}
    write_manifest(folder, samples.to_table(records, header["labels"]), header)


def only(index: int, changed: Any) -> Callable[[SampleRecord, bytes, bytes], tuple[str, bytes, bytes]]:
    """Change one row of the first tar."""

    def change(record: SampleRecord, document: bytes, image: bytes) -> tuple[str, bytes, bytes]:
        return changed(record, document, image) if record.row == index else (record.key, document, image)

    return change


def test_the_way_of_changing_a_tar_changes_nothing_by_itself(folder: Path) -> None:
    repack(folder, lambda record, document, image: (record.key, document, image))
    assert check(folder) == []


def test_an_image_of_another_size_is_found_though_all_checksums_fit(folder: Path) -> None:
    other = encode(np.zeros((10, 10), np.uint8), "png")
    repack(folder, only(2, lambda record, document, image: (record.key, document, other)))
    ((file, thing),) = check(folder)
    assert file == "shard-000000.tar"
    assert "(row 2) is 10 x 10 uint8 (height x width) instead of 64 x 48 uint8" in thing


def test_a_payload_that_is_no_image_is_found_though_all_checksums_fit(folder: Path) -> None:
    repack(folder, only(2, lambda record, document, image: (record.key, document, b"no image")))
    ((_, thing),) = check(folder)
    assert "(row 2) cannot be decoded as png" in thing


def test_a_json_that_says_something_else_is_found(folder: Path) -> None:
    def change(record: SampleRecord, document: bytes, image: bytes) -> tuple[str, bytes, bytes]:
        return record.key, member_json(replace(record, labels={**record.labels, "Mass": -1})), image

    repack(folder, only(2, change))
    key = read_manifest(folder).record(2).key
    assert check(folder) == [("shard-000000.tar", f"{key}.json does not say what samples.arrow says")]


def test_another_member_is_found(folder: Path) -> None:
    repack(folder, only(2, lambda record, document, image: ("other", document, image)))
    assert check(folder) == [
        ("shard-000000.tar", "its members are not the samples of the manifest, in their order"),
    ]


def test_other_pixels_are_found_by_the_fingerprint_though_all_checksums_fit(folder: Path) -> None:
    black = encode(np.zeros((64, 48), np.uint8), "png")
    repack(folder, only(2, lambda record, document, image: (record.key, document, black)))
    assert check(folder) == [
        ("manifest.json", "its fingerprint is not that of the images, labels and splits"),
    ]


def test_a_folder_whose_manifest_is_broken_is_an_error(folder: Path) -> None:
    (folder / "samples.arrow").write_bytes(b"")
    with pytest.raises(UserError, match="checksum"):
        verify(folder, quiet=True)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO])
def test_a_tar_that_cannot_be_read_is_a_problem(packed: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    tar, real = packed / "shard-000002.tar", Path.open

    def refuse(path: Path, *args: Any, **options: Any) -> Any:
        if path == tar:
            raise OSError(code, "the reason", str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(Path, "open", refuse)
    assert check(packed) == [("shard-000002.tar", "cannot be read (the reason)")]


def test_counts_that_are_not_those_of_the_rows_are_found(folder: Path) -> None:
    path = folder / "manifest.json"
    header = json.loads(path.read_text())
    images, positives = header["counts"]["images"], header["counts"]["positives"]
    images["train"] += 1
    del positives["Mass"]["test"]
    header["counts"]["pages"] = 3
    path.write_text(json.dumps(header))
    manifest = read_manifest(folder)
    rows = manifest.rows("test")
    positive = int((manifest.label_NK(["Mass"])[rows] == 1).sum())
    train = len(manifest.rows("train"))
    assert check(folder) == [
        ("manifest.json", f"its count of images train is {train + 1}, that of samples.arrow {train}"),
        ("manifest.json", f"its count of positives Mass test is None, that of samples.arrow {positive}"),
        ("manifest.json", "its count of pages is 3, that of samples.arrow None"),
    ]


def test_a_tar_that_the_manifest_does_not_name_is_found(folder: Path) -> None:
    shutil.copy(folder / "shard-000000.tar", folder / "shard-000008.tar")
    (folder / "notes.txt").write_text("no tar")
    assert check(folder) == [("shard-000008.tar", "is not named by manifest.json")]


@pytest.mark.parametrize("processes", [0, -1])
def test_fewer_than_one_process_is_an_error(packed: Path, processes: int) -> None:
    with pytest.raises(UserError, match=f"{processes} processes"):
        verify(packed, processes=processes, quiet=True)
