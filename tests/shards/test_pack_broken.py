"""Images that cannot be packed: each stops with its name and a fix, or is left out and counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shards.errors import UserError
from shards.manifest import read_manifest
from shards.pack import pack
from shards.recipes import AsIs, MammoClip
from shards.sources.grouped_table import read_grouped_table
from shards.splits import Validation
from tests.archives import (
    GroupedArchive,
    contents,
    pack_grouped,
)

pytestmark = pytest.mark.slow


def save(path: Path, array: np.ndarray) -> None:
    Image.fromarray(array).save(path)


COLOUR = np.random.default_rng(0).integers(0, 255, (64, 48, 3), np.uint8)
BROKEN: list[tuple[str, Callable[[Path], Any], str, str]] = [
    ("missing", lambda p: p.unlink(), "the image is missing", "file is missing"),
    ("empty", lambda p: p.write_bytes(b""), "is an empty file", "file is empty"),
    ("truncated", lambda p: p.write_bytes(p.read_bytes()[:700]), "cannot be read", "truncated, or not an image"),
    (
        "zeros",
        lambda p: p.write_bytes(p.read_bytes()[:700].ljust(3000, b"\0")),
        "cannot be read",
        "truncated, or not an image",
    ),
    ("text", lambda p: p.write_text("hello"), "cannot be read", "truncated, or not an image"),
    ("colour", lambda p: save(p, COLOUR), "is RGB, with different channels", "not a grey image of 8 or 16 bit"),
    ("grey_rgb", lambda p: save(p, COLOUR[..., [0, 0, 0]]), "with equal channels", "not a grey image of 8 or 16 bit"),
    ("one_bit", lambda p: save(p, COLOUR[..., 0] > 9), "pixels of type '1'", "not a grey image of 8 or 16 bit"),
    ("size", lambda p: save(p, COLOUR[:60, :, 0]), "is 60 x 48 .* is 64 x 48", "another size than the others"),
]


class TestBrokenImages:
    @pytest.mark.parametrize(("damage", "said"), [(b[1], b[2]) for b in BROKEN], ids=[b[0] for b in BROKEN])
    def test_it_stops_and_names_the_image(
        self, tiny_archive: GroupedArchive, tmp_path: Path, damage: Callable[[Path], Any], said: str
    ) -> None:
        damage(tiny_archive.path(7))
        with pytest.raises(UserError, match=said) as caught:
            pack_grouped(tiny_archive, tmp_path / "out")
        assert caught.value.file == str(tiny_archive.path(7))
        assert "--on-broken drop" in caught.value.fix
        assert not (tmp_path / "out" / "manifest.json").exists()

    @pytest.mark.parametrize(("damage", "reason"), [(b[1], b[3]) for b in BROKEN], ids=[b[0] for b in BROKEN])
    def test_or_it_is_left_out_and_counted(
        self, tiny_archive: GroupedArchive, tmp_path: Path, damage: Callable[[Path], Any], reason: str
    ) -> None:
        damage(tiny_archive.path(7))
        report = pack_grouped(tiny_archive, tmp_path / "out", drop_broken=True)
        image_id = tiny_archive.rows[7]["image_id"]
        assert report.header.dropped == [{"reason": reason, "count": 1, "image_ids": [image_id]}]
        assert f"left out: 1 images, {reason} ({image_id})" in str(report)
        manifest = read_manifest(tmp_path / "out")
        assert len(manifest) == 23
        assert image_id not in manifest.text("image_id", range(23))

    def test_a_shard_of_broken_images_only_is_no_shard(self, tiny_archive: GroupedArchive, tmp_path: Path) -> None:
        options: dict[str, Any] = {"samples_per_shard": 1, "drop_broken": True, "validation": Validation(fraction=0)}
        tiny_archive.path(7).write_text("hello")
        pack_grouped(tiny_archive, tmp_path / "out", **options)
        manifest = read_manifest(tmp_path / "out")
        names = [shard.name for shard in manifest.shards]
        assert len(names) == 23
        assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == names
        assert manifest.shard_N().tolist() == list(range(23))

    def test_missing_images_are_counted_before_anything_is_packed(
        self, tiny_archive: GroupedArchive, tmp_path: Path
    ) -> None:
        for row in (3, 5, 9):
            tiny_archive.path(row).unlink()
        with pytest.raises(UserError, match=r"and 2 more of 24 are missing or empty"):
            pack_grouped(tiny_archive, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_nothing_left(self, tiny_archive: GroupedArchive, tmp_path: Path) -> None:
        for row in range(24):
            tiny_archive.path(row).write_text("hello")
        with pytest.raises(UserError, match="no image of the table can be read"):
            pack_grouped(tiny_archive, tmp_path / "out", drop_broken=True)

    def test_nothing_left_once_all_were_looked_at(self, tiny_archive: GroupedArchive, tmp_path: Path) -> None:
        for row in range(24):
            save(tiny_archive.path(row), np.zeros((64, 48), np.uint8))
        with pytest.raises(UserError, match="no image is left: all are broken"):
            pack_grouped(tiny_archive, tmp_path / "out", recipe=MammoClip(height_px=30, width_px=20), drop_broken=True)

    def test_a_wrong_folder_of_images_is_named(self, tiny_archive: GroupedArchive, tmp_path: Path) -> None:
        archive = read_grouped_table(tiny_archive.table, tmp_path)
        with pytest.raises(UserError, match="no image of the table is there"):
            pack(archive, tmp_path / "out", recipe=AsIs(), drop_broken=True, quiet=True)

    def test_an_unreadable_file_is_named(self, tiny_archive: GroupedArchive, tmp_path: Path) -> None:
        tiny_archive.path(7).unlink()
        tiny_archive.path(7).symlink_to(tiny_archive.path(7).name)
        with pytest.raises(UserError, match=r"cannot be read \(Too many levels of symbolic links") as caught:
            pack_grouped(tiny_archive, tmp_path / "out")
        assert caught.value.file == str(tiny_archive.path(7))

    def test_the_first_image_that_can_be_read_decides_the_size(
        self, tiny_archive: GroupedArchive, tmp_path: Path
    ) -> None:
        tiny_archive.path(0).write_text("hello")
        save(tiny_archive.path(1), np.zeros((60, 40), np.uint8))
        report = pack_grouped(tiny_archive, tmp_path / "out", drop_broken=True)
        assert (report.header.height_px, report.header.width_px) == (60, 40)
        assert [dropped["count"] for dropped in report.header.dropped] == [1, 22]

    @pytest.mark.parametrize("drop_broken", [False, True])
    def test_8_and_16_bit_are_not_mixed(self, tiny_archive: GroupedArchive, tmp_path: Path, drop_broken: bool) -> None:
        save(tiny_archive.path(7), np.zeros((64, 48), np.uint16))
        with pytest.raises(UserError, match=r"is uint16, while .*png is uint8: 8 and 16 bit are mixed") as caught:
            pack_grouped(tiny_archive, tmp_path / "out", drop_broken=drop_broken)
        assert caught.value.file == str(tiny_archive.path(7))

    def test_a_size_that_was_asked_for(self, tiny_archive: GroupedArchive, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"is 64 x 48 .* while asked for was 64 x 40"):
            pack_grouped(tiny_archive, tmp_path / "out", recipe=AsIs(height_px=64, width_px=40))

    def test_an_image_of_air_under_a_recipe_that_cuts(self, tiny_archive: GroupedArchive, tmp_path: Path) -> None:
        save(tiny_archive.path(7), np.zeros((64, 48), np.uint8))
        recipe = MammoClip(height_px=30, width_px=20)
        with pytest.raises(UserError, match="the recipe mammoclip finds nothing") as caught:
            pack_grouped(tiny_archive, tmp_path / "out", recipe=recipe)
        assert caught.value.file == str(tiny_archive.path(7))
        report = pack_grouped(tiny_archive, tmp_path / "out2", recipe=recipe, drop_broken=True)
        assert [dropped["reason"] for dropped in report.header.dropped] == ["nothing but air in it"]

    def test_an_error_in_a_worker_process_is_the_same_error(self, tiny_archive: GroupedArchive, tmp_path: Path) -> None:
        tiny_archive.path(7).write_text("hello")
        with pytest.raises(UserError, match="cannot be read") as caught:
            pack_grouped(tiny_archive, tmp_path / "out", processes=2)
        assert caught.value.file == str(tiny_archive.path(7))


def test_after_an_error_the_same_pack_goes_on_with_broken_images_left_out(
    tiny_archive: GroupedArchive, tmp_path: Path
) -> None:
    tiny_archive.path(7).write_text("hello")
    pack_grouped(tiny_archive, tmp_path / "dropped", drop_broken=True)
    out = tmp_path / "out"
    with pytest.raises(UserError, match="cannot be read"):
        pack_grouped(tiny_archive, out)
    pack_grouped(tiny_archive, out, drop_broken=True)
    assert contents(out) == contents(tmp_path / "dropped")


def interrupted(archive: GroupedArchive, out: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Pack until every shard is whole, and no further."""

    def finish(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shards.pack.finish", finish)
        with pytest.raises(KeyboardInterrupt):
            pack_grouped(archive, out, **options)


def test_an_image_that_is_mended_changes_its_own_shard_alone(
    tiny_archive: GroupedArchive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack_grouped(tiny_archive, tmp_path / "whole", drop_broken=True)
    good = tiny_archive.path(7).read_bytes()
    tiny_archive.path(7).write_text("hello")
    out = tmp_path / "out"
    interrupted(tiny_archive, out, monkeypatch, drop_broken=True)
    tiny_archive.path(7).write_bytes(good)
    times = {tar: tar.stat().st_mtime_ns for tar in out.glob("*.tar")}
    pack_grouped(tiny_archive, out, drop_broken=True)
    assert contents(out) == contents(tmp_path / "whole")
    assert sum(tar.stat().st_mtime_ns != time for tar, time in times.items()) == 1


def test_where_the_image_that_decides_the_size_is_mended_nothing_is_kept(
    tiny_archive: GroupedArchive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack_grouped(tiny_archive, tmp_path / "whole", drop_broken=True)
    good = tiny_archive.path(0).read_bytes()
    save(tiny_archive.path(0), COLOUR[:60, :, 0])
    out = tmp_path / "out"
    interrupted(tiny_archive, out, monkeypatch, drop_broken=True)
    tiny_archive.path(0).write_bytes(good)
    pack_grouped(tiny_archive, out, drop_broken=True)
    assert contents(out) == contents(tmp_path / "whole")
