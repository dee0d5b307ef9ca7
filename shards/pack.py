"""Archives -> WebDataset tars + manifest: atomic, resumable after a kill, the same bytes for any number of processes.

H W pixels.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

import numpy as np

from shards.codecs import Codec, encode
from shards.errors import UserError
from shards.files import free_bytes, human_bytes
from shards.header import Header
from shards.images import BrokenImageError, read_grey
from shards.manifest import (
    MANIFEST_NAME,
    SAMPLES_NAME,
    WORK_FOLDER,
    check_shards,
    read_manifest,
)
from shards.pack_finish import finish
from shards.pack_plan import PackOptions, PackPlan, make_plan
from shards.pack_report import PackReport
from shards.pack_shard import (
    Job,
    ShardTask,
    Stored,
    prepare,
    read_sidecar,
    write_shard,
)
from shards.pool import default_processes, run_tasks
from shards.recipes import Recipe
from shards.sources.base import Archive, SourceRow
from shards.splits import Validation
from shards.work import check_same, locked, start_or_resume

SAMPLES_PER_SHARD: Final = 256
_EXPLAINED: Final = {
    "table": "the table, the splits or the images that are missing have changed",
    "table_and_images": "the table, the splits or the sizes of the image files have changed",
}
_PROBES: Final = 8
# Headers, the json member and the row of samples.arrow, per image.
_OVERHEAD_BYTES: Final = 4096


def pack(
    archive: Archive,
    out: Path,
    *,
    recipe: Recipe,
    codec: Codec = "png",
    labels: Sequence[str] | None = None,
    validation: Validation | None = None,
    seed: int = 0,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    processes: int | None = None,
    drop_broken: bool = False,
    quiet: bool = False,
) -> PackReport:
    """Pack an archive into a folder.

    A shard that is whole is kept: the same call after an interruption goes on where it stopped, also where a broken
    image that stopped it has been mended, and after the end it changes nothing. What is written depends on neither
    `processes` nor interruptions.

    Args:
        archive: what a source read.
        out: the folder to fill; created where it is missing.
        recipe: how pixels are prepared.
        codec: how they are encoded.
        labels: which of the archive's labels to keep, with their boxes; by default all.
        validation: how validation images are chosen; by default see Validation.
        seed: of that choice and of the order of exams.
        samples_per_shard: the most images in a tar.
        processes: how many at a time; by default one per core.
        drop_broken: leave out images that are missing, broken, not grey or of another size, and count them.
        quiet: show no progress.

    Raises:
        UserError: something about the table, an image, the folder or the disk that the user can mend.
    """
    options = PackOptions(
        recipe=recipe,
        codec=codec,
        labels=tuple(archive.labels if labels is None else labels),
        validation=validation or Validation(),
        seed=seed,
        samples_per_shard=samples_per_shard,
        drop_broken=drop_broken,
    )
    if processes is not None and processes < 1:
        raise UserError(f"{processes} processes", fix="give at least 1 (--processes)")
    plan = make_plan(archive, options)
    work = out / WORK_FOLDER
    with locked(work, verb="packs"):
        done = _already_packed(out, plan)
        if done is None:
            start_or_resume(work, plan.begun, rows_name=SAMPLES_NAME, explained=_EXPLAINED)
            job = _make_job(archive, out, options, plan)
            _write_shards(job, plan, processes or default_processes(), quiet)
            done = finish(job, plan, archive)
        shutil.rmtree(work)
    return PackReport(directory=out, header=done)


def _already_packed(out: Path, plan: PackPlan) -> Header | None:
    """The manifest of a folder that holds this very plan, complete."""
    if not (out / MANIFEST_NAME).exists():
        return None
    manifest = read_manifest(out)
    check_same(out, manifest.header.settings, plan.settings, explained=_EXPLAINED)
    check_shards(manifest)
    return manifest.header


def _make_job(archive: Archive, out: Path, options: PackOptions, plan: PackPlan) -> Job:
    rows = [row for shard in plan.shards for row in shard]
    of_id = {row.image_id: row for row in rows}
    in_table = [of_id[row.image_id] for row in archive.rows if row.image_id in of_id]
    stored = _stored_form(in_table, options)
    return Job(
        out=out,
        recipe=options.recipe,
        codec=options.codec,
        labels=options.labels,
        stored=stored,
        drop_broken=options.drop_broken,
        plan=f"{plan.digest} {stored.height_px} x {stored.width_px} {stored.dtype}",
    )


def _stored_form(rows: Sequence[SourceRow], options: PackOptions) -> Stored:
    """Size and type of all stored images; what the recipe leaves open, the first readable image decides."""
    size, dtype = options.recipe.size(), options.recipe.dtype
    if size and dtype:
        return Stored(height_px=size[0], width_px=size[1], dtype=dtype, decided_by=None)
    for row in rows:
        try:
            source_HW = read_grey(row.image_path)
        except BrokenImageError:
            if not options.drop_broken:
                raise
            continue
        height, width = size or source_HW.shape
        found: Literal["uint8", "uint16"] = "uint8" if source_HW.dtype == np.uint8 else "uint16"
        return Stored(height_px=height, width_px=width, dtype=found, decided_by=row.image_path)
    raise UserError("no image of the table can be read", fix="look at the images", file=rows[0].image_path.parent)


def _write_shards(job: Job, plan: PackPlan, processes: int, quiet: bool) -> None:
    whole = [read_sidecar(job, i, file_bytes) is not None for i, file_bytes in enumerate(plan.file_bytes)]
    left = {i: rows for i, rows in enumerate(plan.shards) if not whole[i]}
    image_bytes = _check_space(job, [row for rows in left.values() for row in rows])
    tasks = [
        ShardTask(job=job, index=i, rows=rows, file_bytes=plan.file_bytes[i], needed_bytes=image_bytes * len(rows))
        for i, rows in left.items()
    ]
    total = sum(len(rows) for rows in plan.shards)
    run_tasks(
        write_shard,
        tasks,
        processes=processes,
        what="packing",
        unit="images",
        total=total,
        done=total - sum(len(rows) for rows in left.values()),
        quiet=quiet,
    )


def _check_space(job: Job, rows: Sequence[SourceRow]) -> int:
    """Bytes per image, judged by a few spread over the rows; refuses to start where the disk cannot hold them all."""
    sizes = []
    for row in rows[:: -(-len(rows) // _PROBES) or 1]:
        try:
            sizes.append(len(encode(prepare(job, row)[0], job.codec)))
        except BrokenImageError:
            if not job.drop_broken:
                raise
    image_bytes = sum(sizes) // len(sizes) + _OVERHEAD_BYTES if sizes else 0
    needed, free = image_bytes * len(rows), free_bytes(job.out)
    if free < needed:
        thing = f"the disk is too small: about {human_bytes(needed)} are needed, {human_bytes(free)} are free"
        raise UserError(thing, fix="make room, or choose a folder on another disk", file=job.out)
    return image_bytes
