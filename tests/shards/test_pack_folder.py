"""The folder that is packed into: two packs never mix, and what lay there is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shards.errors import UserError
from shards.manifest import WORK_FOLDER
from shards.recipes import MammoClip
from shards.splits import Validation
from shards.work import locked
from tests.archives import (
    GroupedArchive,
    contents,
    pack_grouped,
)


class TestFolder:
    @pytest.mark.parametrize(
        ("changed", "said"),
        [
            ({"seed": 1}, "seed was 0, now 1"),
            ({"samples_per_shard": 7}, "samples_per_shard was 5, now 7"),
            ({"labels": ("Mass",)}, r"labels was \['Mass', 'Suspicious_Calcification'\], now \['Mass'\]"),
            ({"codec": "zstd"}, "codec was png, now zstd"),
            ({"recipe": MammoClip(height_px=64, width_px=48)}, "recipe was .*as_is.* now .*mammoclip"),
            ({"validation": Validation(fraction=0.5)}, "validation_fraction was None, now 0.5"),
        ],
    )
    @pytest.mark.parametrize("finished", [True, False])
    def test_other_input_does_not_mix_with_what_is_there(
        self, tiny_archive: GroupedArchive, tmp_path: Path, changed: dict[str, Any], said: str, finished: bool
    ) -> None:
        out = tmp_path / "out"
        if not finished:
            good = tiny_archive.path(23).read_bytes()
            tiny_archive.path(23).write_bytes(good[:700] + bytes(len(good) - 700))
            with pytest.raises(UserError, match="cannot be read"):
                pack_grouped(tiny_archive, out)
            tiny_archive.path(23).write_bytes(good)
        else:
            pack_grouped(tiny_archive, out)
        before = contents(out)
        with pytest.raises(UserError, match=f"was packed with other input: {said}") as caught:
            pack_grouped(tiny_archive, out, **changed)
        assert caught.value.file == str(out)
        assert contents(out) == before

    def test_a_changed_table_does_not_mix_with_what_is_there(
        self, tiny_archive: GroupedArchive, tmp_path: Path
    ) -> None:
        pack_grouped(tiny_archive, tmp_path / "out")
        tiny_archive.rows[0]["breast_density"] = "DENSITY B"
        tiny_archive.write_table()
        with pytest.raises(UserError, match="the table, the splits or the sizes of the image files have changed"):
            pack_grouped(tiny_archive, tmp_path / "out")

    def test_tars_of_something_else_are_left_alone(self, tiny_archive: GroupedArchive, tmp_path: Path) -> None:
        (tmp_path / "shard-000000.tar").write_bytes(b"precious")
        with pytest.raises(UserError, match=r"holds shard-000000.tar of something else"):
            pack_grouped(tiny_archive, tmp_path)
        assert (tmp_path / "shard-000000.tar").read_bytes() == b"precious"
        assert not (tmp_path / ".packing").exists()

    def test_two_packs_do_not_share_a_folder(self, tiny_archive: GroupedArchive, tmp_path: Path) -> None:
        with (
            locked(tmp_path / "out" / WORK_FOLDER, verb="packs"),
            pytest.raises(UserError, match="another process packs into this folder"),
        ):
            pack_grouped(tiny_archive, tmp_path / "out")

    def test_a_folder_that_cannot_be_made(self, tiny_archive: GroupedArchive, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match=r"cannot be written to \(Not a directory\)"):
            pack_grouped(tiny_archive, tmp_path / "file" / "out")

    def test_a_packed_folder_that_lost_a_tar_is_not_taken_for_whole(
        self, tiny_archive: GroupedArchive, tmp_path: Path
    ) -> None:
        pack_grouped(tiny_archive, tmp_path / "out")
        (tmp_path / "out" / "shard-000001.tar").unlink()
        with pytest.raises(UserError, match="missing"):
            pack_grouped(tiny_archive, tmp_path / "out")

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"labels": ("Masss",)}, "no label 'Masss'. Fix: use Mass"),
            ({"labels": ("Mass", "Mass")}, "each once"),
            ({"labels": ()}, "name at least one label"),
            ({"samples_per_shard": 0}, "0 samples per shard"),
            ({"processes": 0}, "0 processes"),
        ],
    )
    def test_options_that_cannot_be(
        self, tiny_archive: GroupedArchive, tmp_path: Path, options: dict[str, Any], said: str
    ) -> None:
        with pytest.raises(UserError, match=said):
            pack_grouped(tiny_archive, tmp_path / "out", **options)
