"""Packing survives kill -9 and a full disk: what was finished is kept, and the end is byte for byte the same."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from shards.codecs import Pixels
from shards.errors import UserError
from shards.manifest import read_manifest
from shards.pack import pack
from shards.pack_finish import finish
from shards.recipes import AsIs
from shards.sources.base import Archive
from shards.sources.grouped_table import read_grouped_table
from shards.types import Geometry
from tests.archives import LABELS, GroupedArchive, contents, make_grouped_archive

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys
from pathlib import Path
from shards.errors import UserError
from shards.pack import pack
from shards.recipes import AsIs
from shards.sources.grouped_table import read_grouped_table
if __name__ == "__main__":
    table, images, out, processes = sys.argv[1:]
    archive = read_grouped_table(Path(table), Path(images))
    try:
        pack(archive, Path(out), recipe=AsIs(), labels=("Mass",), samples_per_shard=4, processes=int(processes))
    except UserError as error:
        sys.exit(str(error))
"""


def command(archive: GroupedArchive, out: Path, processes: int, folder: Path) -> list[str]:
    program = folder / "program.py"
    program.write_text(PROGRAM)
    return [sys.executable, str(program), str(archive.table), str(archive.images), str(out), str(processes)]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


def children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in listed]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[GroupedArchive, Path]:
    """An archive that takes a second or two to pack, and its packed folder, made without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    archive = make_grouped_archive(folder / "archive", exams=16, hw=(320, 240))
    rows = read_grouped_table(archive.table, archive.images)
    pack(rows, folder / "out", recipe=AsIs(), labels=("Mass",), samples_per_shard=4, processes=1, quiet=True)
    return archive, folder / "out"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_midway_it_goes_on_where_it_stopped(
    whole: tuple[GroupedArchive, Path], tmp_path: Path, processes: int
) -> None:
    archive, uninterrupted = whole
    out = tmp_path / "out"
    process = subprocess.Popen(command(archive, out, processes, tmp_path), env=environment(), stderr=subprocess.DEVNULL)
    sidecars = out / ".packing"
    deadline_s = time.monotonic() + 60
    while len(list(sidecars.glob("*.arrow"))) < 2 and time.monotonic() < deadline_s:
        time.sleep(0.002)
    workers = children(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "manifest.json").exists(), "it was killed before the end"
    with pytest.raises(UserError, match="packing was not finished"):
        read_manifest(out)
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline_s, "workers outlive the process that started them"
        time.sleep(0.02)

    finished = [out / f"{sidecar.stem}.tar" for sidecar in sidecars.glob("*.arrow")]
    times = {tar: tar.stat().st_mtime_ns for tar in finished}
    assert 2 <= len(times) < 16
    again = subprocess.run(
        command(archive, out, processes, tmp_path), env=environment(), check=True, capture_output=True
    )
    assert b"64/64 images" in again.stderr
    assert {tar: tar.stat().st_mtime_ns for tar in finished} == times, "whole shards are kept"
    assert contents(out) == contents(uninterrupted)


def test_a_tar_without_its_sidecar_and_a_partial_tar_are_made_anew(tmp_path: Path) -> None:
    archive = make_grouped_archive(tmp_path / "archive", exams=4)
    rows = read_grouped_table(archive.table, archive.images)
    options = {"recipe": AsIs(), "labels": LABELS, "samples_per_shard": 4, "processes": 1, "quiet": True}
    pack(rows, tmp_path / "whole", **options)
    broken = archive.path(15)
    good = broken.read_bytes()
    broken.write_bytes(b"x" * len(good))
    out = tmp_path / "out"
    with pytest.raises(UserError, match="cannot be read"):
        pack(rows, out, **options)
    broken.write_bytes(good)
    sidecars = sorted((out / ".packing").glob("*.arrow"))
    assert sidecars, "some shards were finished before the broken image"
    sidecars[0].unlink()
    (out / ".shard-000002.tar.123.tmp").write_bytes(b"half")
    pack(rows, out, **options)
    assert contents(out) == contents(tmp_path / "whole")


def fill_disk(filler: Path) -> None:
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


class FillingRecipe(AsIs):
    """Fills the disk after some images, as another program might."""

    filler: ClassVar[Path]
    calls: ClassVar[int] = 0

    def apply(self, source_HW: Pixels) -> tuple[Pixels, Geometry]:
        type(self).calls += 1
        if self.calls == 20:
            fill_disk(self.filler)
        return super().apply(source_HW)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small disk needs the right to mount: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def noisy_archive(folder: Path, exams: int, hw: tuple[int, int]) -> tuple[GroupedArchive, Archive]:
    """Images that do not compress."""
    archive = make_grouped_archive(folder, exams=exams, hw=hw)
    rng = np.random.default_rng(0)
    for row in range(len(archive.rows)):
        Image.fromarray(rng.integers(0, 256, hw, np.uint8)).save(archive.path(row))
    return archive, read_grouped_table(archive.table, archive.images)


def test_a_disk_that_fills_up_while_packing(tmp_path: Path, small_disk: Path) -> None:
    _, rows = noisy_archive(tmp_path / "archive", 8, (128, 128))
    options = {"labels": LABELS, "samples_per_shard": 4, "processes": 1, "quiet": True}
    FillingRecipe.filler, FillingRecipe.calls = small_disk / "filler", 0
    out = small_disk / "out"
    with pytest.raises(UserError, match=r"the disk is full: .* of about .* needed written, 0 bytes free") as caught:
        pack(rows, out, recipe=FillingRecipe(), **options)
    assert "shard-" in str(caught.value.file)
    kept = {path: path.read_bytes() for path in out.glob("shard-*.tar")}
    assert kept
    assert not list(out.glob(".*.tmp")), "the partial file gives its room back"
    FillingRecipe.filler.unlink()
    pack(rows, out, recipe=FillingRecipe(), **options)
    assert all(path.read_bytes() == data for path, data in kept.items())
    pack(rows, tmp_path / "elsewhere", recipe=AsIs(), **options)
    assert contents(out) == contents(tmp_path / "elsewhere")


def test_a_disk_that_is_too_small_is_refused_before_anything_is_packed(tmp_path: Path, small_disk: Path) -> None:
    _, rows = noisy_archive(tmp_path / "archive", 8, (400, 400))
    with pytest.raises(UserError, match=r"the disk is too small: about 5.\d MB are needed, 2.\d MB are free") as caught:
        pack(rows, small_disk / "out", recipe=AsIs(), processes=1, quiet=True)
    assert caught.value.file == str(small_disk / "out")
    assert not list(small_disk.glob("out/*.tar"))


def test_a_file_size_limit_is_an_error_like_a_full_disk(tmp_path: Path) -> None:
    archive, _ = noisy_archive(tmp_path / "archive", 4, (100, 100))

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = subprocess.run(
        command(archive, tmp_path / "out", 1, tmp_path),
        env=environment(),
        preexec_fn=limit,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    (message,) = done.stderr.strip().splitlines()
    assert "shard-000000.tar: over the file size limit (ulimit -f): " in message
    assert "Fix: make room" in message
    assert not list((tmp_path / "out").glob(".*.tmp"))


def test_a_manifest_that_cannot_be_written_leaves_the_shards(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, rows = noisy_archive(tmp_path / "archive", 4, (64, 64))
    options = {"recipe": AsIs(), "labels": LABELS, "processes": 1, "quiet": True}
    out, filler = small_disk / "out", small_disk / "filler"

    def fill_then_finish(*arguments: Any) -> Any:
        fill_disk(filler)
        return finish(*arguments)

    monkeypatch.setattr("shards.pack.finish", fill_then_finish)
    with pytest.raises(UserError, match="the disk is full") as caught:
        pack(rows, out, **options)
    assert caught.value.file == str(out / "samples.arrow")
    assert not (out / "manifest.json").exists()
    monkeypatch.undo()
    filler.unlink()
    pack(rows, out, **options)
    pack(rows, tmp_path / "elsewhere", **options)
    assert contents(out) == contents(tmp_path / "elsewhere")
