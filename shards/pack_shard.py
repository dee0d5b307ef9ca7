"""One tar and its sidecar: the unit that a process packs, and that is kept when packing is interrupted."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import pyarrow as pa

from shards import samples
from shards.checksums import sha256, xxh3
from shards.codecs import EXTENSION, Codec, Pixels, encode
from shards.errors import UserError
from shards.files import atomic_file
from shards.fingerprint import pixels_sha256
from shards.geometry import map_boxes
from shards.images import DROP_HINT, NO_BREAST, OTHER_SIZE, BrokenImageError, read_grey
from shards.manifest import WORK_FOLDER
from shards.recipes import EmptyImageError, Recipe
from shards.sources.base import BOXES_CLIPPED, BOXES_LEFT_OUT, SourceRow
from shards.tars import TarWriter
from shards.types import Box, Geometry, SampleRecord

PIXELS_COLUMN: Final = "pixels_sha256"
_LONGEST_KEY: Final = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """The form that every stored image has; `decided_by` is the file that it was taken from, where it was."""

    height_px: int
    width_px: int
    dtype: Literal["uint8", "uint16"]
    decided_by: Path | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is the same for all shards of a pack; `plan` stands for all that was asked for and the stored form."""

    out: Path
    recipe: Recipe
    codec: Codec
    labels: tuple[str, ...]
    stored: Stored
    drop_broken: bool
    plan: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardTask:
    """One tar to write, with its images in order, the sizes of their files, and about how large it gets."""

    job: Job
    index: int
    rows: list[SourceRow]
    file_bytes: list[int]
    needed_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedShard:
    """What a sidecar says of its tar: the rows of samples.arrow with PIXELS_COLUMN, its size and digest,
    the images left out as (image_id, reason), and what was mended with counts.
    """

    table: pa.Table
    num_bytes: int
    sha256: str
    dropped: list[tuple[str, str]]
    notes: dict[str, int]


def shard_name(index: int) -> str:
    """The file name of a tar."""
    return f"shard-{index:06d}.tar"


def sample_key(image_id: str) -> str:
    """The name of a sample in its tar: the image id without what WebDataset and file systems stumble over.

    A key ends at the first dot; ids that must be changed get a digest, so that they stay different.

    >>> sample_key("0a1b2c")
    '0a1b2c'
    """
    key = re.sub(r"[^A-Za-z0-9_-]", "_", image_id)[:_LONGEST_KEY]
    return key if key == image_id else f"{key}-{hashlib.sha256(image_id.encode()).hexdigest()[:12]}"


def member_json(record: SampleRecord) -> bytes:
    """What stands beside the image in the tar: these fields and no others, so that no patient data slips in."""
    document = {
        "key": record.key,
        "image_id": record.image_id,
        "exam_id": record.exam_id,
        "patient_id": record.patient_id,
        "laterality": record.laterality,
        "view": record.view,
        "split": record.split,
        "fold": record.fold,
        "labels": record.labels,
        "boxes": [asdict(box) for box in record.boxes],
        "geometry": asdict(record.geometry),
        "manufacturer": record.manufacturer,
        "density": record.density,
        "birads": record.birads,
    }
    return json.dumps(document, separators=(",", ":")).encode()


def prepare(job: Job, row: SourceRow) -> tuple[Pixels, Geometry]:
    """Read one image and bring it into the stored form.

    Raises:
        BrokenImageError: it cannot be read, is not grey, has another size, or shows nothing.
        UserError: it has another bit depth than the others.
    """
    source_HW = read_grey(row.image_path)
    try:
        stored_HW, geometry = job.recipe.apply(source_HW)
    except EmptyImageError as error:
        thing = f"the recipe {job.recipe.name} finds nothing in the image ({error})"
        fix = f"look at it, {DROP_HINT}"
        raise BrokenImageError(NO_BREAST, thing, fix=fix, file=row.image_path) from error
    stored = job.stored
    if stored_HW.dtype.name != stored.dtype:
        thing = f"the image is {stored_HW.dtype}, while {stored.decided_by} is {stored.dtype}: 8 and 16 bit are mixed"
        fix = "convert the images to one bit depth, or use --recipe mammoclip, which stores 8 bit"
        raise UserError(thing, fix=fix, file=row.image_path)
    if stored_HW.shape != (stored.height_px, stored.width_px):
        height, width = stored_HW.shape
        reference = "asked for was" if job.recipe.size() else f"{stored.decided_by} is"
        thing = f"the image is {height} x {width} (height x width), while {reference} {stored.height_px} x "
        fix = f"resize the images to one size, use --recipe mammoclip, {DROP_HINT}"
        raise BrokenImageError(OTHER_SIZE, f"{thing}{stored.width_px}", fix=fix, file=row.image_path)
    return stored_HW, geometry


def write_shard(task: ShardTask, tick: Callable[[], object]) -> None:
    """Write one tar, then its sidecar: a sidecar stands for a tar that is whole."""
    job, path = task.job, task.job.out / shard_name(task.index)
    records: list[SampleRecord] = []
    pixels: list[bytes] = []
    dropped: list[tuple[str, str]] = []
    notes: Counter[str] = Counter()
    with atomic_file(path, needed_bytes=task.needed_bytes) as file:
        writer = TarWriter(file)
        for row in task.rows:
            tick()
            try:
                image_HW, geometry = prepare(job, row)
            except BrokenImageError as error:
                if not job.drop_broken:
                    raise
                dropped.append((row.image_id, error.reason))
                continue
            boxes = _stored_boxes(row.boxes, geometry, notes)
            records.append(_add(writer, task, row, encode(image_HW, job.codec), boxes, geometry))
            pixels.append(pixels_sha256(image_HW))
        writer.finish()
    if not records:
        path.unlink()
    table = samples.to_table(records, job.labels)
    table = table.append_column(pa.field(PIXELS_COLUMN, pa.binary(32), nullable=False), pa.array(pixels, pa.binary(32)))
    about = {
        "plan": job.plan,
        "file_bytes": task.file_bytes,
        "num_bytes": writer.num_bytes,
        "sha256": writer.sha256().hex(),
        "dropped": dropped,
        "notes": dict(notes),
    }
    table = table.replace_schema_metadata({"shard": json.dumps(about)})
    with atomic_file(sidecar_path(job.out, task.index)) as file, pa.ipc.new_file(file, table.schema) as sidecar:
        sidecar.write_table(table)


def read_sidecar(job: Job, index: int, file_bytes: list[int]) -> PackedShard | None:
    """What an earlier process packed as this shard from files of these sizes, or None where it did not finish it."""
    path, tar = sidecar_path(job.out, index), job.out / shard_name(index)
    if not path.is_file():
        return None
    with pa.OSFile(str(path)) as file:
        table = pa.ipc.open_file(file).read_all()
    about: dict[str, Any] = json.loads(table.schema.metadata[b"shard"])
    if about["plan"] != job.plan or about["file_bytes"] != file_bytes:
        return None
    if table.num_rows and not (tar.is_file() and tar.stat().st_size == about["num_bytes"]):
        return None
    return PackedShard(
        table=table.replace_schema_metadata(None),
        num_bytes=about["num_bytes"],
        sha256=about["sha256"],
        dropped=[(image_id, reason) for image_id, reason in about["dropped"]],
        notes=about["notes"],
    )


def sidecar_path(out: Path, index: int) -> Path:
    """Where the rows of a shard lie until the manifest is written."""
    return out / WORK_FOLDER / f"shard-{index:06d}.arrow"


def _stored_boxes(boxes: tuple[Box, ...], geometry: Geometry, notes: Counter[str]) -> tuple[Box, ...]:
    height, width = geometry.source_height_px, geometry.source_width_px
    notes[BOXES_CLIPPED] += sum(b.x0 < 0 or b.y0 < 0 or b.x1 > width or b.y1 > height for b in boxes)
    stored = map_boxes(geometry, boxes)
    notes[BOXES_LEFT_OUT] += len(boxes) - len(stored)
    return stored


def _add(
    writer: TarWriter, task: ShardTask, row: SourceRow, payload: bytes, boxes: tuple[Box, ...], geometry: Geometry
) -> SampleRecord:
    """Append one sample to the tar; its record carries the place of the payload, which the json member does not."""
    key = sample_key(row.image_id)
    record = SampleRecord(
        row=-1,
        key=key,
        shard=task.index,
        offset_bytes=0,
        num_bytes=len(payload),
        sha256=sha256(payload),
        xxh3=xxh3(payload),
        image_id=row.image_id,
        exam_id=row.exam_id,
        patient_id=row.patient_id,
        laterality=row.laterality,
        view=row.view,
        split=row.split,
        fold=row.fold,
        labels={label: row.labels[label] for label in task.job.labels},
        boxes=boxes,
        geometry=geometry,
        manufacturer=row.manufacturer,
        density=row.density,
        birads=row.birads,
    )
    writer.add(f"{key}.json", member_json(record))
    offset = writer.add(f"{key}.{EXTENSION[task.job.codec]}", payload)
    return replace(record, offset_bytes=offset)
