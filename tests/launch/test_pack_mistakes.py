"""An archive, a packed folder or a disk that is not as it should be: one line with file, thing and fix, exit code 2."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from launch.cli import main
from shards.codecs import Pixels, encode
from shards.manifest import read_manifest
from shards.recipes import AsIs
from shards.types import Geometry
from tests.archives import GroupedArchive, contents
from tests.docs.alone import one_rank_in_this_process
from tests.experiments import write_tiny
from tests.shards.test_pack_faults import fill_disk, noisy_archive, small_disk  # noqa: F401
from tests.shards.test_verify import only, repack

Capture = pytest.CaptureFixture[str]


def packing(archive: GroupedArchive, out: Path) -> list[str]:
    source = ["--table", str(archive.table), "--images", str(archive.images)]
    return ["pack", str(out), *source, "--samples-per-shard", "4", "--processes", "1", "--quiet"]


def refused(capsys: Capture, *arguments: str) -> str:
    """The one line that a command says before it ends with 2."""
    capsys.readouterr()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("msmil: error: ")
    assert " Fix: " in line
    return line


@pytest.mark.parametrize("column", ["image_id", "patient_id", "laterality", "view", "split", "Mass"])
def test_a_missing_column(tiny_archive: GroupedArchive, tmp_path: Path, capsys: Capture, column: str) -> None:
    tiny_archive.rows[:] = [{key: row[key] for key in row if key != column} for row in tiny_archive.rows]
    tiny_archive.write_table()
    line = refused(capsys, *packing(tiny_archive, tmp_path / "out"))
    assert f"{tiny_archive.table}: no column '{column}'" in line
    assert not (tmp_path / "out").exists()


def test_a_label_with_text(tiny_archive: GroupedArchive, tmp_path: Path, capsys: Capture) -> None:
    tiny_archive.rows[3]["Mass"] = "maybe"
    tiny_archive.write_table()
    line = refused(capsys, *packing(tiny_archive, tmp_path / "out"))
    assert f"{tiny_archive.table}: row 4 " in line
    assert "column Mass: 'maybe' is not 0, 1 or empty. Fix: correct the cell" in line
    assert not (tmp_path / "out").exists()


COLOUR = np.random.default_rng(0).integers(0, 255, (64, 48, 3), np.uint8)
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: path.unlink(), "is missing"),
    "empty": (lambda path: path.write_bytes(b""), "is an empty file"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:700]), "cannot be read (Truncated File Read)"),
    "RGB": (lambda path: Image.fromarray(COLOUR).save(path), "is RGB, with different channels"),
    "size": (lambda path: Image.fromarray(COLOUR[:60, :, 0]).save(path), "is 60 x 48 (height x width)"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_image(tiny_archive: GroupedArchive, tmp_path: Path, capsys: Capture, kind: str) -> None:
    """Once it is mended the same command goes on: shards that were whole are kept, and the end is the same."""
    damage, said = BROKEN[kind]
    assert main(packing(tiny_archive, tmp_path / "whole")) == 0
    image, out = tiny_archive.path(23), tmp_path / "out"
    good = image.read_bytes()
    damage(image)
    line = refused(capsys, *packing(tiny_archive, out))
    assert f"{image}: the image {said}" in line
    assert "--on-broken drop" in line
    assert not (out / "manifest.json").exists()
    kept = {tar: tar.stat().st_mtime_ns for tar in out.glob("*.tar")}
    assert bool(kept) == (kind not in ("missing", "empty")), "those are found before anything is packed"
    image.write_bytes(good)
    assert main(packing(tiny_archive, out)) == 0
    assert all(tar.stat().st_mtime_ns == time for tar, time in kept.items())
    assert contents(out) == contents(tmp_path / "whole")


def test_a_broken_archive_leaves_what_was_packed_before(
    tiny_archive: GroupedArchive, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    assert main(packing(tiny_archive, out)) == 0
    before = contents(out)
    for damage, _ in BROKEN.values():
        damage(tiny_archive.path(7))
        refused(capsys, *packing(tiny_archive, out))
        Image.fromarray(COLOUR[..., 0]).save(tiny_archive.path(7))
    assert contents(out) == before


@pytest.fixture
def other_size(packed: Path, tmp_path: Path) -> tuple[Path, str]:
    """A packed folder with one training image of another size than the manifest's, and that image's name."""
    folder = Path(shutil.copytree(packed, tmp_path / "shards"))
    image = encode(np.zeros((10, 10), np.uint8), "png")
    repack(folder, only(2, lambda record, document, _: (record.key, document, image)))
    manifest = read_manifest(folder)
    assert 2 in manifest.rows("train")
    return folder, manifest.text("image_id", [2])[0]


def test_verify_names_an_image_of_another_size_than_the_manifests(
    other_size: tuple[Path, str], capsys: Capture
) -> None:
    folder, name = other_size
    assert main(["verify", str(folder), "--processes", "1", "--quiet"]) == 2
    captured = capsys.readouterr()
    assert captured.err == ""
    (line,) = [line for line in captured.out.splitlines() if "shard-000000.tar" in line]
    assert f"sample {name} (row 2) is 10 x 10 uint8 (height x width) instead of 64 x 48 uint8" in line


@pytest.mark.slow
def test_train_stops_at_an_image_of_another_size_than_the_manifests(
    other_size: tuple[Path, str], tmp_path: Path, capsys: Capture
) -> None:
    folder, name = other_size
    before = contents(folder)
    experiment = str(write_tiny(tmp_path, folder, train={"epochs": 1}))
    with one_rank_in_this_process():
        line = refused(capsys, "train", experiment, "--ranks", "1", "--quiet")
    assert f"{folder / 'shard-000000.tar'}: the image of sample {name} (row 2) is 10 x 10 uint8" in line
    assert "instead of 64 x 48 uint8. Fix: pack the folder again" in line
    assert contents(folder) == before


def test_a_disk_that_fills_up_while_packing(
    tmp_path: Path,
    small_disk: Path,  # noqa: F811
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was whole is kept, half a tar gives its room back, and with room again the same command ends the same."""
    archive, _ = noisy_archive(tmp_path / "archive", 8, (128, 128))
    out, filler, apply = small_disk / "out", small_disk / "filler", AsIs.apply
    images: list[int] = []

    def fill_at_the_twentieth(recipe: AsIs, source_HW: Pixels) -> tuple[Pixels, Geometry]:
        images.append(1)
        if len(images) == 20:
            fill_disk(filler)
        return apply(recipe, source_HW)

    with monkeypatch.context() as patch:
        patch.setattr(AsIs, "apply", fill_at_the_twentieth)
        line = refused(capsys, *packing(archive, out))
    assert f"{out}/shard-" in line
    assert "the disk is full" in line
    kept = {tar: tar.read_bytes() for tar in out.glob("*.tar")}
    assert kept
    assert not list(out.glob(".*.tmp"))
    filler.unlink()
    assert main(packing(archive, out)) == 0
    assert all(tar.read_bytes() == data for tar, data in kept.items())
    assert main(packing(archive, tmp_path / "elsewhere")) == 0
    assert contents(out) == contents(tmp_path / "elsewhere")


def test_a_disk_that_is_too_small(tmp_path: Path, small_disk: Path, capsys: Capture) -> None:  # noqa: F811
    archive, _ = noisy_archive(tmp_path / "archive", 8, (400, 400))
    line = refused(capsys, *packing(archive, small_disk / "out"))
    assert f"{small_disk / 'out'}: the disk is too small" in line
