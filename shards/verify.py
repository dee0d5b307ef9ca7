"""Read a packed folder again, everything in it, and tell all that is wrong. N rows (samples), K labels, H W pixels."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from shards.codecs import EXTENSION
from shards.errors import UserError
from shards.files import sha256_file
from shards.fingerprint import fingerprint, pixels_sha256
from shards.header import ShardInfo
from shards.manifest import MANIFEST_NAME, Manifest, read_manifest
from shards.pack_report import count
from shards.pack_shard import member_json
from shards.pool import default_processes, run_tasks
from shards.reader import ShardReader
from shards.remote.whole import tars_here

if TYPE_CHECKING:
    from shards.features import Features

_DIGEST_BYTES: Final = 32
_SHOWN_PER_FILE: Final = 5


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is wrong with a file of the folder."""

    file: str
    thing: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What was read and what is wrong; `str()` of it is the table for people."""

    directory: str
    images: int
    shards: int
    problems: tuple[Problem, ...]
    made: str = "packed"

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def summary(self) -> dict[str, Any]:
        """The same for a script."""
        return {
            "ok": self.ok,
            "directory": self.directory,
            "made": self.made,
            "images": self.images,
            "shards": self.shards,
            "problems": [asdict(problem) for problem in self.problems],
        }

    def __str__(self) -> str:
        head = f"{self.directory}: {self.images} images in {self.shards} shards"
        if self.ok:
            return f"{head}, all as {self.made}"
        files = list(dict.fromkeys(problem.file for problem in self.problems))
        width = max(len(file) for file in files)
        lines = []
        for file in files:
            things = [problem.thing for problem in self.problems if problem.file == file]
            lines += [f"{file:<{width}}  {thing}" for thing in things[:_SHOWN_PER_FILE]]
            if len(things) > _SHOWN_PER_FILE:
                lines.append(f"{file:<{width}}  ... and {len(things) - _SHOWN_PER_FILE} more")
        return "\n".join([f"{head}, {len(self.problems)} problems in {len(files)} files", "", *lines])


@dataclass(frozen=True, slots=True)
class _Task:
    manifest: Manifest
    shard: int


@dataclass(frozen=True, slots=True)
class _Checked:
    """The problems of a shard, and the digests of its images' pixels in order (empty where one is broken)."""

    problems: list[Problem]
    pixels: bytes


def verify(directory: str | Path, *, processes: int | None = None, quiet: bool = False) -> VerifyReport:
    """Check all of a packed folder.

    That is: every tar's size and checksum, every image's checksum, size and type, every json, the fingerprint, the
    counts in manifest.json, and that no tar lies there that manifest.json does not name.

    Args:
        directory: what `pack` wrote, or its address: tars are then downloaded one after the other, and removed.
        processes: how many at a time; by default one per core.
        quiet: show no progress.

    Raises:
        UserError: the manifest itself cannot be read, or `processes` is below 1. What is wrong with the shards is in
            the report.
    """
    if processes is not None and processes < 1:
        raise UserError(f"{processes} processes", fix="give at least 1 (--processes)")
    manifest = read_manifest(directory)
    checked = run_tasks(
        _check_shard,
        [_Task(manifest, shard) for shard in range(len(manifest.shards))],
        processes=processes or default_processes(),
        what="verifying",
        unit="images",
        total=len(manifest),
        quiet=quiet,
    )
    problems = [problem for shard in checked for problem in shard.problems]
    if not problems and _fingerprint(manifest, b"".join(shard.pixels for shard in checked)) != manifest.fingerprint:
        problems.append(Problem(MANIFEST_NAME, "its fingerprint is not that of the images, labels and splits"))
    problems += [*_check_counts(manifest), *check_foreign_tars(manifest)]
    return VerifyReport(
        directory=manifest.place, images=len(manifest), shards=len(manifest.shards), problems=tuple(problems)
    )


def _check_shard(task: _Task, tick: Callable[[], object]) -> _Checked:
    info = task.manifest.shards[task.shard]
    try:
        with tars_here(task.manifest, task.shard) as manifest:
            return _check_shard_here(manifest, task.shard, tick)
    except UserError as error:  # it cannot be downloaded
        return _Checked([Problem(info.name, error.thing)], b"")


def _check_shard_here(manifest: Manifest, shard: int, tick: Callable[[], object]) -> _Checked:
    info = manifest.shards[shard]
    path = manifest.directory / info.name
    row_S = np.flatnonzero(manifest.shard_N() == shard)
    try:
        if not path.is_file():
            return _Checked([Problem(info.name, "missing")], b"")
        things = check_file(path, info)
    except OSError as error:
        things = [f"cannot be read ({error.strerror})"]
    if len(row_S) != info.num_samples:
        things.append(f"the manifest counts {info.num_samples} samples, samples.arrow {len(row_S)}")
    things += _check_members(manifest, path, row_S)
    pixels = []
    with ShardReader(manifest, all_checksums=True) as reader:
        for row in row_S.tolist():
            tick()
            try:
                pixels.append(pixels_sha256(reader.read(row)))
            except UserError as error:
                things.append(error.thing)
    return _Checked([Problem(info.name, thing) for thing in things], b"".join(pixels))


def check_file(path: Path, info: ShardInfo) -> list[str]:
    """What is wrong with the size or the checksum of a tar."""
    size = path.stat().st_size
    if size != info.num_bytes:
        return [f"{'truncated' if size < info.num_bytes else 'too long'}: {size} bytes instead of {info.num_bytes}"]
    if sha256_file(path).hex() != info.sha256:
        return ["changed: its checksum is another"]
    return []


def _check_members(manifest: Manifest, path: Path, row_S: np.ndarray[tuple[int], np.dtype[np.int64]]) -> list[str]:
    """Names and order of the members, the place of each image, and that each json says what the manifest says."""
    things: list[str] = []
    records = [manifest.record(row) for row in row_S.tolist()]
    suffixes = ("json", EXTENSION[manifest.codec])
    expected = [f"{record.key}.{suffix}" for record in records for suffix in suffixes]
    try:
        with tarfile.open(path, "r:") as tar:
            members = tar.getmembers()
            if [member.name for member in members] != expected:
                return ["its members are not the samples of the manifest, in their order"]
            for record, document, image in zip(records, members[::2], members[1::2], strict=True):
                file = tar.extractfile(document)
                if file is None or file.read() != member_json(record):
                    things.append(f"{document.name} does not say what samples.arrow says")
                if image.offset_data != record.offset_bytes:
                    things.append(f"{image.name} is not at byte {record.offset_bytes}")
    except (tarfile.TarError, OSError) as error:
        things.append(f"is no readable tar ({error})")
    return things


def _check_counts(manifest: Manifest) -> list[Problem]:
    """Count again what manifest.json says by split and label."""
    told = dict(_leaves(manifest.header.counts))
    found = dict(_leaves(count(manifest.table, manifest.labels)))
    return [
        Problem(MANIFEST_NAME, f"its count of {name} is {told.get(name)}, that of samples.arrow {found.get(name)}")
        for name in [*found, *(name for name in told if name not in found)]
        if told.get(name) != found.get(name)
    ]


def _leaves(counts: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested dicts, by their keys: "positives Mass train"."""
    if not isinstance(counts, dict):
        yield name, counts
        return
    for key, value in counts.items():
        yield from _leaves(value, f"{name} {key}".strip())


def check_foreign_tars(folder: Manifest | Features) -> list[Problem]:
    """Tars that a loader with a wildcard would read, though they are not part of what was written.

    A web server cannot be asked for them.
    """
    named = {shard.name for shard in folder.shards}
    if folder.remote is not None:
        present = sorted(name for name in folder.remote.store().sizes() or {} if name.endswith(".tar"))
    else:
        try:
            present = sorted(path.name for path in folder.directory.iterdir() if path.suffix == ".tar")
        except OSError as error:
            return [Problem(".", f"the folder cannot be listed ({error.strerror})")]
    return [Problem(name, "is not named by manifest.json") for name in present if name not in named]


def _fingerprint(manifest: Manifest, pixels: bytes) -> str:
    return fingerprint(
        labels=manifest.labels,
        height_px=manifest.height_px,
        width_px=manifest.width_px,
        dtype=manifest.dtype,
        recipe=manifest.recipe,
        shard_N=manifest.shard_N(),
        split_N=manifest.text("split", np.arange(len(manifest))),
        label_NK=manifest.label_NK(manifest.labels),
        pixels_N32=np.frombuffer(pixels, np.uint8).reshape(-1, _DIGEST_BYTES),
    )
