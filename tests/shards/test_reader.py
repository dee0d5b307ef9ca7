"""Reading a sample by its offset: the right pixels, checked every time, and one clear word when a tar is broken."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards import members as members_module
from shards.errors import UserError
from shards.manifest import Manifest, read_manifest
from shards.pack import pack
from shards.reader import ShardReader
from shards.recipes import AsIs
from shards.sources.grouped_table import read_grouped_table
from tests.archives import GroupedArchive, make_grouped_archive


def packed_from(archive: GroupedArchive, out: Path, codec: str = "png") -> Manifest:
    rows = read_grouped_table(archive.table, archive.images)
    pack(rows, out, recipe=AsIs(), codec=codec, samples_per_shard=4, processes=1, quiet=True)
    return read_manifest(out)


@pytest.fixture
def manifest(tiny_archive: GroupedArchive, tmp_path: Path) -> Manifest:
    return packed_from(tiny_archive, tmp_path / "shards")


def tar_of(manifest: Manifest, row: int) -> Path:
    return manifest.directory / manifest.shards[manifest.location(row)[0]].name


def open_tars(manifest) -> list[str]:
    """Of this folder: tests in the same process may hold others open."""
    links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    targets = [link.readlink() for link in links]
    return [str(target) for target in targets if target.suffix == ".tar" and target.parent == manifest.directory]


@pytest.mark.parametrize("codec", ["png", "zstd"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_every_row_gives_the_pixels_that_were_packed(tmp_path, codec, dtype):
    archive = make_grouped_archive(tmp_path / "archive", exams=5, dtype=dtype)
    manifest = packed_from(archive, tmp_path / "shards", codec)
    source = {cells["image_id"]: archive.path(i) for i, cells in enumerate(archive.rows)}
    image_ids = manifest.text("image_id", range(len(manifest)))
    assert sorted(image_ids) == sorted(source)
    with ShardReader(manifest) as reader:
        for row in np.random.default_rng(0).permutation(len(manifest)).tolist():
            image_HW = reader.read(row)
            assert image_HW.dtype == dtype
            np.testing.assert_array_equal(image_HW, np.array(Image.open(source[image_ids[row]])))


def test_a_missing_tar_is_named_with_the_sample_and_a_fix(manifest):
    tar_of(manifest, 5).unlink()
    with pytest.raises(UserError) as caught, ShardReader(manifest) as reader:
        reader.read(5)
    assert caught.value.file == str(tar_of(manifest, 5))
    assert "missing" in caught.value.thing
    assert f"sample {manifest.text('image_id', [5])[0]} (row 5)" in caught.value.thing
    assert "msmil verify" in caught.value.fix


def test_a_truncated_tar_is_named_with_both_sizes(manifest):
    _, offset, num_bytes, *_ = manifest.location(6)
    os.truncate(tar_of(manifest, 6), offset + num_bytes - 1)
    with ShardReader(manifest) as reader:
        with pytest.raises(
            UserError, match=rf"truncated: sample \w+ \(row 6\) ends at byte {offset + num_bytes}"
        ) as caught:
            reader.read(6)
        assert caught.value.file == str(tar_of(manifest, 6))
        # What lies before the cut is whole.
        before = next(row for row in range(len(manifest)) if tar_of(manifest, row) == tar_of(manifest, 6))
        reader.read(before)


@pytest.mark.parametrize("codec", ["png", "zstd"])
def test_one_changed_byte_is_found_even_where_the_image_still_decodes(tiny_archive, tmp_path, codec):
    manifest = packed_from(tiny_archive, tmp_path / "shards", codec)
    _, offset, num_bytes, *_ = manifest.location(7)
    with tar_of(manifest, 7).open("r+b") as file:
        file.seek(offset + num_bytes - 1)  # the end of a PNG is a checksum of nothing
        last = file.read(1)
        file.seek(offset + num_bytes - 1)
        file.write(bytes([last[0] ^ 1]))
    with ShardReader(manifest) as reader:
        with pytest.raises(UserError, match=r"changed since it was packed: .*row 7.* Fix: run `msmil verify"):
            reader.read(7)
        reader.read(6)


def test_a_change_is_found_while_the_tar_is_open(manifest):
    _, offset, *_ = manifest.location(0)
    with ShardReader(manifest) as reader:
        reader.read(0)
        with tar_of(manifest, 0).open("r+b") as file:
            file.seek(offset)
            file.write(b"\0\0\0")
        with pytest.raises(UserError, match="changed"):
            reader.read(0)


def test_an_image_of_another_size_or_type_than_the_manifest_says_is_refused(manifest):
    manifest.height_px += 1
    wrong = r"row 2.* is 64 x 48 uint8 .*instead of 65 x 48"
    with ShardReader(manifest) as reader, pytest.raises(UserError, match=wrong) as caught:
        reader.read(2)
    assert caught.value.file == str(tar_of(manifest, 2))
    manifest.height_px -= 1
    manifest.dtype = "uint16"
    with ShardReader(manifest) as reader, pytest.raises(UserError, match=r"uint8 .*instead of 64 x 48 uint16"):
        reader.read(2)


def test_what_cannot_be_read_at_all_is_named(manifest):
    tar_of(manifest, 0).unlink()
    tar_of(manifest, 0).mkdir()
    with pytest.raises(UserError, match=r"row 0\) cannot be read \(Is a directory\)"), ShardReader(manifest) as reader:
        reader.read(0)


def test_files_are_opened_when_needed_and_closed_at_the_end(manifest):
    with ShardReader(manifest) as reader:
        assert open_tars(manifest) == []
        for row in (0, 1, 0):
            reader.read(row)
        assert open_tars(manifest) == [str(tar_of(manifest, 0))]
    assert open_tars(manifest) == []


def test_no_more_files_stay_open_than_allowed(manifest, monkeypatch):
    monkeypatch.setattr(members_module, "MAX_OPEN", 2)
    with ShardReader(manifest) as reader:
        for row in range(len(manifest)):
            reader.read(row)
            assert len(open_tars(manifest)) <= 2
        assert len(open_tars(manifest)) == 2


def test_a_forked_process_opens_files_of_its_own(manifest):
    with ShardReader(manifest) as reader:
        expected = reader.read(0)
        tar_of(manifest, 0).rename(manifest.directory / "moved.tar")
        child = os.fork()
        if child == 0:
            try:
                reader.read(0)  # the parent's file is still open, but the name is gone
            except UserError as error:
                os._exit(11 if "missing" in error.thing and open_tars(manifest) == [] else 12)
            os._exit(13)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 11
        np.testing.assert_array_equal(reader.read(0), expected)  # and the parent's is untouched
