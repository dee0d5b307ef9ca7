"""Folders that training writes to, the memory file system that batches go through, and the data."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from msmil.config import Config
from msmil.engine.doctor.check import Check, broken, ok, warning
from msmil.engine.run_folder import nearest_folder
from shards.errors import UserError
from shards.files import free_bytes, human_bytes

GIGABYTE: Final = 10**9
RUNS_BYTES: Final = (GIGABYTE // 5, 5 * GIGABYTE)  # checkpoints of one run, of some
TEMPORARY_BYTES: Final = (GIGABYTE // 100, GIGABYTE)
_SHARED_BYTES: Final = GIGABYTE
_DTYPE_BYTES: Final = {"uint8": 1, "uint16": 2}


def check_folder(name: str, folder: Path, least_bytes: tuple[int, int], how: str) -> Check:
    """Whether a folder (or the nearest one above that exists) can be written, and has room.

    Args:
        name: of the line.
        folder: need not exist yet.
        least_bytes: below the first it is broken, below the second a warning.
        how: how another folder is chosen.
    """
    try:
        nearest = nearest_folder(folder.absolute())
        with tempfile.TemporaryFile(dir=nearest) as file:
            file.write(bytes(4096))
            file.flush()
        free = free_bytes(nearest)
    except UserError as error:
        return broken(name, f"{error.file}: {error.thing}", how)
    except OSError as error:
        return broken(name, f"{nearest} cannot be written ({error.strerror})", f"make it writable, or {how}")
    text = f"{folder}: {human_bytes(free)} free"
    fix = f"make room, or {how}"
    if free < least_bytes[0]:
        return broken(name, text, fix)
    if free < least_bytes[1]:
        return warning(name, text, fix)
    return ok(name, f"{text}, can be written")


def check_temporary() -> Check:
    """The folder for temporary files, where torch and the launcher write."""
    how = "set TMPDIR to a folder with room"
    try:
        folder = Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        return broken("TMPDIR", str(error), how)
    return check_folder("TMPDIR", folder, TEMPORARY_BYTES, how)


def check_shared_memory(config: Config, image_bytes: int | None, folder: Path = Path("/dev/shm")) -> Check:
    """Decoding processes hand batches over in shared memory; Docker gives 64 MB unless told otherwise.

    Args:
        config: says how many batches are on their way.
        image_bytes: of a stored image, None where no data are known.
        folder: where it is mounted.
    """
    from shards.slots import slots_for

    workers = config.data.workers
    if not workers:
        return ok("/dev/shm", "not needed with data.workers: 0")
    fix = "docker run --shm-size=8g (or --ipc=host), or set data.workers=0"
    try:
        free = free_bytes(folder)
    except OSError as error:
        return broken("/dev/shm", f"cannot be used ({error.strerror})", fix)
    text = f"{human_bytes(free)} free"
    if image_bytes is None:
        return ok("/dev/shm", text) if free >= _SHARED_BYTES else warning("/dev/shm", text, fix)
    # all ranks together: they share the images of a global batch
    needed = workers * slots_for(config.data.prefetch_batches) * config.train.batch_size * image_bytes
    text += f", batches need about {human_bytes(needed)}"
    return ok("/dev/shm", text) if free >= needed else broken("/dev/shm", text, fix)


def check_data(config: Config) -> tuple[Check, int | None]:
    """The packed data of an experiment; also the bytes of one of its images, None where they cannot be read."""
    from msmil.engine.data import open_data
    from shards.manifest import check_shards

    try:
        manifest = open_data(config)
    except UserError as error:
        where = f"{error.file}: " if error.file else ""
        return broken("shards", f"{where}{error.thing}", error.fix), None
    image_bytes = manifest.height_px * manifest.width_px * _DTYPE_BYTES[manifest.dtype]
    size = f"{manifest.height_px} x {manifest.width_px} pixels"
    counts = ", ".join(f"{len(manifest.rows(split))} {split}" for split in ("train", "val", "test"))
    labels = ", ".join(config.data.labels)
    try:
        check_shards(manifest)
    except UserError as error:  # data.on_error: skip lets a run start
        return warning("shards", f"{error.file}: {error.thing}; its images would be skipped", error.fix), image_bytes
    return ok("shards", f"{config.data.shards}: {counts} images of {size} with {labels}"), image_bytes


def check_packed_folders(root: Path) -> Iterator[Check]:
    """Without an experiment: what lies packed in data/ of the current folder."""
    from shards.manifest import read_manifest

    found = [folder for folder in (root / "data/shards", *sorted(root.glob("data/*/shards"))) if folder.is_dir()]
    for folder in found:
        try:
            manifest = read_manifest(folder)
        except UserError as error:
            yield broken("shards", f"{folder}: {error.thing}", error.fix)
        else:
            yield ok("shards", f"{folder}: {len(manifest)} images, labels {', '.join(manifest.labels)}")
    if not found:
        fix = "`msmil pack` an archive, or `msmil demo`; `msmil doctor CONFIG` looks where CONFIG has its data"
        yield warning("shards", "none in data/shards or data/*/shards", fix)


def check_experiment(found: dict[str, Any]) -> Check:
    """What the child found when it did the checks that `msmil train` does before it starts."""
    if "error" not in found:
        return ok("experiment", f"would start on {found['value']} ranks")
    where = f"{found['file']}: " if found.get("file") else ""
    fix = found.get("fix") or "see what `msmil train` says"
    return broken("experiment", f"{where}{found['error']}", fix)
